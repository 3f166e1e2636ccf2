package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// restoreRun is one restore with the restart engine.
type restoreRun struct {
	a     *agent
	op    *operation
	app   *config.App
	id    string
	socks sockets
	proc  process

	// The node that holds the connections, and its agent; "" and nil: this one.
	old      string
	oldAgent nfconnfilterv1connect.AgentClient
	taken    bool // they were handed over before, and can go back there still

	info     *pb.ConnInfoReply // the connections before the application started; nil where old sockets were in the way
	opening  bool              // RESTORED was sent and not refused
	lost     error             // why nobody knows whether it was carried out; the process runs
	manifest *Manifest         // of the images; nil: the application is started anew
	whole    chan error        // whether they are

	lone    time.Time // since when the application is only waited for to open connections again
	givenUp []string  // connections that it did not open
}

// restore brings an application back, and its connections with it.
func (a *agent) restore(ctx context.Context, name, id string) (reply *pb.AgentReply, err error) {
	app, err := a.app(name)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(supported(opRestore, app), a.trusted(app)); err != nil {
		return nil, err
	}
	op, err := a.begin(ctx, name, opRestore)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	op.enter("look")
	st, err := a.status(op.ctx, name)
	if err != nil {
		return nil, err
	}
	return a.restoreHeld(op, app, st, id)
}

// restoreHeld restores what this node holds.
func (a *agent) restoreHeld(op *operation, app *config.App, st *pb.AppStatus, id string) (*pb.AgentReply, error) {
	name := app.Name
	if id != "" && st.SnapshotId != "" && id != st.SnapshotId {
		return nil, refused(opRestore, name, st.State, fmt.Sprintf("the current snapshot is %s and not %s", st.SnapshotId, id))
	}
	switch st.State {
	case control.StateRestored:
		return &pb.AgentReply{App: name, State: st.State}, nil
	case control.StateSnapshotDone:
	case control.StateBlockData:
		return nil, refused(opRestore, name, st.State, fmt.Sprintf("node %s has taken it over; restore or migrate it there", st.TakenBy))
	default:
		return nil, refused(opRestore, name, st.State, "it is allowed in SNAPSHOTDONE")
	}
	if err := a.callersImages(name, st.SnapshotId); err != nil {
		return nil, failed(opRestore, name, st.State, err)
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return nil, failed(opRestore, name, st.State, err)
	}
	defer s.Close()
	in, err := a.intents.load(name)
	if err == nil {
		err = a.storeLate(op, app, in, st.SnapshotId)
	}
	if err == nil {
		err = a.intend(op, intent{SnapshotID: st.SnapshotId, OldNode: st.OldNode})
	}
	if err != nil {
		return nil, failed(opRestore, name, st.State, err)
	}
	// A process that nobody knows to run keeps the ports; its connections are held.
	if left, err := a.processOf(app); err != nil {
		return nil, failed(opRestore, name, st.State, err)
	} else if left != nil {
		a.log.Warn("a process of the application that is held still ran, it is ended", "app", name, "process", left.describe())
		if err := left.stop(unix.SIGKILL, 0); err != nil {
			return nil, failed(opRestore, name, st.State, err)
		}
		a.setProcess(name, nil)
	}
	r := &restoreRun{a: a, op: op, app: app, id: st.SnapshotId, socks: s, old: st.OldNode, taken: st.OldNode != ""}
	if err := r.run(); err != nil {
		if r.taken {
			_, err := r.rollBackForeign(err)
			return nil, err
		}
		return nil, r.rollBack(err)
	}
	if r.taken {
		a.settle(name)
	}
	return &pb.AgentReply{App: name, State: control.StateRestored, Phases: op.took()}, nil
}

func (r *restoreRun) run() error {
	if err := r.image(); err != nil {
		return err
	}
	steps := []func() error{r.claim, r.place, r.announce, r.clear, r.launch}
	if r.old != "" && !r.taken { // the filter answers before the addresses come
		steps = []func() error{r.place, r.announce, r.claim, r.clear, r.launch}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if r.manifest != nil { // CRIU has called for it
		return nil
	}
	return r.comeBack()
}

// comeBack brings the connections back and opens them.
func (r *restoreRun) comeBack() error {
	for try := 1; ; try++ {
		if err := r.reconnect(); err != nil {
			return err
		}
		err := r.open()
		r.givenUp = nil
		// A connection that was reset just then is brought back once more, or
		// the filter gives it up.
		if try == openTries || !r.refusedToOpen(err) {
			return err
		}
		r.a.log.Info("opening was refused, reconnecting once more", "app", r.app.Name, "err", err)
	}
}

// openTries is how often connections are opened at most.
const openTries = 5

// refusedToOpen tells whether err is the filter's refusal for connections that
// are not back.
func (r *restoreRun) refusedToOpen(err error) bool {
	return connect.CodeOf(err) == connect.CodeFailedPrecondition && control.Info(err).GetState() == control.StateRestoreStart &&
		len(control.Info(err).GetConnections()) > 0
}

// rollBack ends what was started; the clients stay held.
func (r *restoreRun) rollBack(cause error) error {
	cause = r.op.why(cause)
	r.op.enter("undo")
	ctx, cancel := r.op.cleanup()
	defer cancel()
	state := ""
	st, serr := r.a.status(ctx, r.app.Name)
	if serr == nil && st.State == control.StateRestored {
		// The answer was lost, or what followed it failed: clients speak with
		// the new process already.
		return failed(opRestore, r.app.Name, st.State, noted(cause, "; but its connections are open again and it runs"))
	}
	var err error
	if r.proc != nil && (serr == nil || !r.opening) {
		err = r.proc.stop(unix.SIGKILL, 0)
		r.a.setProcess(r.app.Name, nil)
	}
	if serr == nil { // otherwise the application may be reached already
		state = st.State
		r.a.keepOnNode(r.app)
		if state == control.StateRestoreStart {
			var reply *connect.Response[pb.AppReply]
			reply, serr = r.a.filter.RestoreAbort(ctx, connect.NewRequest(&pb.AppRequest{App: r.app.Name}))
			if serr = filterError(serr, r.app.Name, control.RequestRestoreAbort); serr == nil {
				state = reply.Msg.State
			}
		}
	}
	if err = errors.Join(err, serr); err != nil {
		r.op.left = r.op.name == opRestore
		if errors.Is(cause, errAborted) && r.op.left { // it is not begun anew
			err = errors.Join(err, r.a.intents.save(intent{App: r.app.Name, Op: opAbort}))
		}
		return failed(opRestore, r.app.Name, state, noted(cause, "; and it could not be undone: "+err.Error()))
	}
	return failed(opRestore, r.app.Name, state, noted(cause, "; its connections stay held"))
}

func (r *restoreRun) announce() error {
	if r.old == "" || r.taken {
		r.op.enter("announce")
		return r.a.announceTake(r.op.ctx, r.app, r.id, "")
	}
	r.op.enter("hand over")
	r.op.note("from %s", r.old)
	return r.a.announceTake(r.op.ctx, r.app, r.id, r.old)
}

// place gives the application its VIPs where it runs in a network namespace;
// that may be another one than before. The filter looks where they are when the
// restore is announced; on the link nobody sees them there.
func (r *restoreRun) place() error {
	if r.app.Process.Namespace == "" {
		return nil
	}
	r.op.enter("address")
	return r.a.addVIPs(&undo{op: r.op}, r.app)
}

// clear removes the old sockets: they would swallow the handshakes and keep
// the application from binding its port. The filter absorbs what they send.
func (r *restoreRun) clear() error {
	r.op.enter("clear")
	info, err := r.a.connInfo(r.op.ctx, r.app.Name)
	if err != nil {
		return err
	}
	held := make(map[string]bool, len(info.Conns))
	for _, c := range info.Conns {
		held[socketName(c)] = true
		if c.Image && r.manifest == nil {
			return r.noImages()
		}
	}
	n, err := r.a.destroyOld(r.socks, r.app, held)
	if err != nil {
		return err
	}
	if n == 0 && r.manifest == nil { // so none of them can be in the way
		r.info = info
	}
	return r.activate(info)
}

// destroyOld removes the sockets of an application that does not run: those of
// its ports, and held ones by name; n is how many there were.
func (a *agent) destroyOld(socks sockets, app *config.App, held map[string]bool) (n int, err error) {
	f := a.config().Cluster.Filter
	include, exclude := ports(app.IncludePorts, f.IncludePorts), ports(app.ExcludePorts, f.ExcludePorts)
	old, err := socks.List(sockdiag.Query{Local: app.VIPs})
	if err != nil {
		return 0, err
	}
	old = slices.DeleteFunc(old, func(k sockdiag.Socket) bool {
		port := uint32(k.Local.Port())
		ours := (len(include) == 0 || slices.Contains(include, port)) && !slices.Contains(exclude, port)
		return !ours && (len(held) == 0 || !held[pairName(k.Local.String(), k.Remote.String())])
	})
	if _, err := socks.DestroySockets(old); err != nil {
		return len(old), fmt.Errorf("old sockets: %w", err)
	}
	return len(old), nil
}

// activate marks connections that local had opened: the application opens them
// again as soon as it runs.
func (r *restoreRun) activate(info *pb.ConnInfoReply) error {
	var ids []*pb.ConnID
	for _, c := range info.Conns {
		if c.Restorable && c.Role == control.RoleActive && !c.Image {
			ids = append(ids, &pb.ConnID{Local: c.Local, Remote: c.Remote})
		}
	}
	if len(ids) == 0 {
		return nil
	}
	return r.restoreConn(ids, control.KindActivate)
}

func (r *restoreRun) restoreConn(ids []*pb.ConnID, kind string) error {
	_, err := r.a.filter.RestoreConn(r.op.ctx, connect.NewRequest(&pb.RestoreConnRequest{
		App: r.app.Name, Conns: ids, Kind: kind}))
	return filterError(err, r.app.Name, control.RequestRestoreConn)
}

func (r *restoreRun) launch() (err error) {
	if r.manifest != nil {
		return r.launchImage()
	}
	asked := make(chan error, 1)
	r.a.wg.Go(func() { asked <- r.askRemotes() })
	r.proc, err = r.a.startProcess(r.op, r.app, r.socks)
	return errors.Join(err, <-asked)
}

// askRemotes has the filter ask the remotes of what was taken over whether they
// live, as it does with the first RESTORECONN. The addresses are here: the answers
// come while the application starts.
func (r *restoreRun) askRemotes() error {
	if r.old == "" || r.taken {
		return nil // RESTORESTART did
	}
	return r.restoreConn(nil, control.KindActivate)
}

// reconnect brings the connections back by handshakes, no more at once than
// the listeners' queues take.
func (r *restoreRun) reconnect() error {
	r.op.enter("reconnect")
	ready := r.app.Process.ReadyTimeout.Std()
	late := errors.New("ready_timeout")
	ctx, cancel := context.WithTimeoutCause(r.op.ctx, ready, late)
	defer cancel()
	p := newPacer(time.Now)
	if err := r.firstLook(p); err != nil {
		return err
	}
	err := r.paceAll(ctx, p)
	if !errors.Is(err, late) {
		return err
	}
	missing := p.unfinished()
	return control.Error(connect.CodeFailedPrecondition, r.app.Name, "",
		fmt.Sprintf("%d connections were not re-established within ready_timeout (%s): %s",
			len(missing), ready, named(missing)), missing...)
}

// firstLook starts the first handshakes by what was known before the application
// started: another look at every connection would tell nothing new.
func (r *restoreRun) firstLook(p *pacer) error {
	info := r.info
	if r.info = nil; info == nil {
		return nil
	}
	p.observe(info.Conns, nil)
	if len(p.left) == 0 {
		return nil
	}
	return r.startSome(p, everyOne)
}

func (r *restoreRun) paceAll(ctx context.Context, p *pacer) error {
	for {
		began := time.Now()
		if done, err := r.pace(p); done || err != nil {
			return err
		}
		wait := p.wait()
		if p.idle() { // only the application or the time can help now
			wait = max(wait, time.Since(began))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// pace takes one look and starts what has room; true when nothing is left.
// Looking at every connection takes long where there are thousands: while some
// wait for their first handshake the number under way is enough.
func (r *restoreRun) pace(p *pacer) (bool, error) {
	if p.glanceWillDo() {
		st, err := r.a.status(r.op.ctx, r.app.Name)
		if err != nil {
			return false, err
		}
		if st.State != control.StateRestoreStart {
			return false, fmt.Errorf("the application is in state %q now", st.State)
		}
		underWay := int(st.Connections[control.ConnRestoring])
		if p.glanced(underWay); p.untried > 0 {
			return false, r.startSome(p, underWay)
		}
		if underWay > 0 {
			return false, nil
		}
	}
	// The filter first: a handshake that it calls done shows as a socket then.
	info, err := r.a.connInfo(r.op.ctx, r.app.Name)
	if err != nil {
		return false, err
	}
	socks, err := r.socks.List(sockdiag.Query{Local: r.app.VIPs})
	if err != nil {
		return false, err
	}
	p.observe(info.Conns, socks)
	for _, k := range p.stale(socks) {
		if err := r.socks.Destroy(k); err != nil {
			return false, fmt.Errorf("old socket %s: %w", k, err)
		}
	}
	r.op.note("%d of %d connections re-established", p.done, p.done+len(p.left))
	if len(p.left) == 0 || r.lonely(p) {
		return true, nil
	}
	if !r.proc.alive() {
		return false, fmt.Errorf("%s ended while connections came back; its output is in %s", r.proc.describe(), r.a.launch.logPath(r.app))
	}
	return false, r.startSome(p, everyOne)
}

// activeWait is how long the restored application has to open the connections
// again that it had opened, once all others are back. An application that opens
// them when it needs them gets new ones then.
const activeWait = 2 * time.Second

// lonely tells whether the application was given time enough for what only it
// can bring back.
func (r *restoreRun) lonely(p *pacer) bool {
	if slices.ContainsFunc(slices.Collect(maps.Values(p.left)), func(e *comeback) bool { return !e.active }) {
		r.lone = time.Time{}
		return false
	}
	if r.lone.IsZero() {
		r.lone = p.now()
	}
	if p.now().Sub(r.lone) < activeWait {
		return false
	}
	r.givenUp = p.unfinished()
	return true
}

// startSome starts the handshakes that have room, with underWay that were
// started and are not done.
func (r *restoreRun) startSome(p *pacer, underWay int) error {
	ls, err := r.socks.Listeners(r.app.VIPs, p.ports())
	if err != nil {
		return err
	}
	batch := p.next(ls, underWay)
	if len(batch) == 0 {
		return nil
	}
	err = r.restoreConn(batch, control.KindSyn)
	p.moved = p.now() // the filter may have had much to do
	return err
}

// open lets all traffic through again. It is not taken back: what was done is
// told to clients at once.
func (r *restoreRun) open() error {
	r.op.enter("open")
	if err := r.op.commit(); err != nil {
		return err
	}
	ctx, cancel := r.op.cleanup()
	defer cancel()
	r.opening = true
	_, err := r.a.filter.Restored(ctx, connect.NewRequest(&pb.RestoredRequest{App: r.app.Name, ResetMissing: len(r.givenUp) > 0}))
	if err == nil {
		for _, n := range r.givenUp {
			r.a.log.Warn("a connection was given up", "app", r.app.Name, "connection", n)
		}
	}
	if connect.CodeOf(err) == connect.CodeFailedPrecondition {
		r.opening = false
	}
	return filterError(err, r.app.Name, control.RequestRestored)
}

// requested takes a restore request for a VIP: accepted, not done.
func (a *agent) requested(vip netip.Addr) error {
	for name, app := range a.config().Apps {
		if !slices.ContainsFunc(app.VIPs, func(v netip.Addr) bool { return v.Unmap() == vip.Unmap() }) {
			continue
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.root.Err() != nil {
			return errStopping
		}
		switch o := a.ops[name]; {
		case a.wanted[name], o != nil && o.name == opRestore:
		case o != nil:
			a.wanted[name] = true
		default:
			a.wanted[name] = true
			a.restoreSoon(name)
		}
		return nil
	}
	return fmt.Errorf("no application here has the VIP %s", vip)
}

// restoreSoon restores in the background; finish of the restore clears what
// was wanted. Called while the agent is known to run.
func (a *agent) restoreSoon(name string) {
	a.wg.Go(func() {
		why := a.awaitsCaller(a.root, name)
		var err error
		if why == nil {
			_, err = a.restore(a.root, name, "")
		} else {
			a.sayAwaited(name, why)
		}
		a.mu.Lock()
		if a.ops[name] == nil {
			delete(a.wanted, name)
		}
		a.mu.Unlock()
		if err != nil {
			a.log.Warn("restore by request failed", "app", name, "err", err)
		}
	})
}

// listenersFor picks the listeners that take connections to an address.
func listenersFor(ls []sockdiag.Socket, local netip.Addr, port uint16) []sockdiag.Socket {
	var out []sockdiag.Socket
	for _, l := range ls {
		a := l.Local.Addr()
		if l.Local.Port() == port && (a == local || a.IsUnspecified() && (a.Is6() && !l.V6Only || a.Is4() == local.Is4())) {
			out = append(out, l)
		}
	}
	return out
}
