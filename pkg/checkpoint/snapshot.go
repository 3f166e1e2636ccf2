package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	// drainPollFirst and drainPollMost are the waits between two accounts.
	drainPollFirst = 2 * time.Millisecond
	drainPollMost  = 20 * time.Millisecond
	// cutTimeout is how long an application has at most, with --force, to
	// read what it was given before it was cut off.
	cutTimeout = 2 * time.Second
	// beforeTimeout bounds the command that runs before the stop; a save of
	// a large data set takes minutes.
	beforeTimeout = 10 * time.Minute
	// maxNamed is how many connections a message names; the error's detail
	// and the reply hold all.
	maxNamed = 5
)

// snapshotRun is one snapshot with the restart engine.
type snapshotRun struct {
	a         *agent
	op        *operation
	app       *config.App
	proc      process
	socks     sockets
	scope     *scope
	engine    string // as it began, whatever the configuration says meanwhile
	force     bool
	drain     time.Duration
	leftOut   map[string]bool   // connections that the filter could not learn
	forced    []string          // what is missing of which connection
	notes     []string          // what the operator should know
	info      *pb.ConnInfoReply // of the last account
	pending   *pendingSnapshot
	id        string       // known from an earlier agent
	earlier   *intent      // the record of that agent; nil: there is none
	criu      criuRef      // CRIU's process
	announced func() error // waits for the end of announce
	finished  <-chan error // all of a snapshot with images is on the disk
	parent    string       // directory of a pre-dump
	written   follower     // of the images while they are written; nil: they are read in the end
	unstored  bool         // the images are whole and have no name yet
	temp      string       // of images that an earlier agent has written
	callers   string       // directory of images that the caller's CRIU writes; "": they are ours, or none
	read      string       // where these are read while CRIU runs
}

// snapshot takes an application off its node while its clients stay connected.
func (a *agent) snapshot(ctx context.Context, req *pb.AgentSnapshotRequest) (reply *pb.AgentSnapshotReply, err error) {
	app, err := a.app(req.App)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(supported(opSnapshot, app), a.trusted(app)); err != nil {
		return nil, err
	}
	op, err := a.begin(ctx, app.Name, opSnapshot)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	op.enter("look")
	st, err := a.status(op.ctx, app.Name)
	if err != nil {
		return nil, err
	}
	switch st.State {
	case control.StateConnected, control.StateRestored:
	case control.StateSnapshotDone:
		return &pb.AgentSnapshotReply{App: app.Name, SnapshotId: st.SnapshotId}, nil
	default:
		return nil, refused(opSnapshot, app.Name, st.State, "it is allowed in CONNECTED and RESTORED")
	}
	return a.takeSnapshot(op, app, req, st)
}

// takeSnapshot takes one of an application that runs.
func (a *agent) takeSnapshot(op *operation, app *config.App, req *pb.AgentSnapshotRequest, st *pb.AppStatus) (*pb.AgentSnapshotReply, error) {
	if err := a.intents.clear(app.Name); err != nil { // of an operation long past
		return nil, failed(opSnapshot, app.Name, st.State, err)
	}
	proc, err := a.processOf(app)
	if err == nil && proc == nil {
		err = errors.New("its process is not running; start it first")
	}
	if err == nil {
		err = proc.within(app.Process.Namespace)
	}
	if err != nil {
		return nil, failed(opSnapshot, app.Name, st.State, err)
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return nil, failed(opSnapshot, app.Name, st.State, err)
	}
	defer s.Close()
	r := &snapshotRun{a: a, op: op, app: app, proc: proc, socks: s, engine: engine(app), force: req.Force,
		drain: app.Checkpoint.DrainTimeout.Std(), leftOut: map[string]bool{}}
	if req.DrainTimeoutMs > 0 {
		r.drain = time.Duration(req.DrainTimeoutMs) * time.Millisecond
	}
	if r.byImage() {
		return r.runImage()
	}
	return r.run()
}

// byImage tells whether the process is dumped.
func (r *snapshotRun) byImage() bool { return r.engine == config.EngineCRIU }

// run goes through the steps. Up to the seal everything can be taken back.
func (r *snapshotRun) run() (*pb.AgentSnapshotReply, error) {
	for _, step := range []func() error{r.announce, r.freeze, r.settle, r.prepare, r.seal} {
		err := step()
		if err == nil {
			err = context.Cause(r.op.ctx)
			if _, _, sealed := r.op.state(); sealed {
				err = nil
			}
		}
		if err != nil {
			return nil, r.rollBack(err)
		}
	}
	return r.complete()
}

// rollBack lets the application run on.
func (r *snapshotRun) rollBack(cause error) error {
	cause = r.op.why(cause)
	r.op.enter("undo")
	ctx, cancel := r.op.cleanup()
	defer cancel()
	state := ""
	st, serr := r.a.status(ctx, r.app.Name)
	if serr == nil {
		state = st.State
		if state == control.StateSnapshotStart || state == control.StateSnapshotFreeze {
			var reply *connect.Response[pb.AppReply]
			reply, serr = r.a.filter.SnapshotAbort(ctx, connect.NewRequest(&pb.AppRequest{App: r.app.Name}))
			if serr = filterError(serr, r.app.Name, control.RequestSnapshotAbort); serr == nil {
				state = reply.Msg.State
			}
		}
	}
	// Where it is too late to take it back the images are all there is.
	if r.pending != nil && (serr == nil || !r.byImage()) {
		r.pending.discard()
	}
	// After the filter: what it says while everything is sealed is lost.
	var err error
	if _, _, sealed := r.op.state(); r.proc != nil && (serr == nil || !sealed) {
		err = r.proc.thaw()
	}
	if err = errors.Join(err, serr); err != nil {
		r.op.left = true
		// Both are told: the reason, and what was not taken back.
		r.a.log.Error("snapshot not undone", "app", r.app.Name, "err", err)
		return failed(opSnapshot, r.app.Name, state, noted(cause, "; and it could not be undone: "+err.Error()))
	}
	return failed(opSnapshot, r.app.Name, state, noted(cause, "; it was given up and the application runs on"))
}

// notedError adds a remark to an error and keeps what it wraps.
type notedError struct {
	error
	remark string
}

func noted(err error, remark string) error { return notedError{err, remark} }

func (e notedError) Unwrap() error { return e.error }
func (e notedError) Error() string { return e.error.Error() + e.remark }

// announce finds the sockets and tells the filter, which then learns every
// connection.
func (r *snapshotRun) announce() error {
	r.op.enter("announce")
	ls, err := r.socks.Listeners(r.app.VIPs, nil)
	if err != nil {
		return err
	}
	if r.scope, err = r.a.newScope(r.op.ctx, r.app, ls); err != nil {
		return err
	}
	all, err := r.socks.List(sockdiag.Query{Local: r.app.VIPs, Info: true})
	if err != nil {
		return err
	}
	if err := r.dsack(all); err != nil {
		return err
	}
	req := &pb.SnapshotStartRequest{App: r.app.Name, LeaveOut: r.force, ListenPorts: r.scope.listenPorts(ls),
		Boundary: r.app.Checkpoint.Boundary, QuietMs: r.app.Checkpoint.Quiet.Std().Milliseconds(), Silent: r.byImage()}
	var others []sockdiag.Socket
	if req.Sockets, others, err = r.scope.pick(all, forSnapshot, r.known); err != nil {
		return err
	}
	sameHost := 0
	for _, k := range others {
		if r.scope.sameHost(k) {
			// Its two ends are both here: seen from the VIP each shows up.
			sameHost++
			r.notes = append(r.notes, fmt.Sprintf("a connection within this node is not kept: %v", k))
			r.a.log.Warn("connection within this node is not kept", "app", r.app.Name, "socket", k.String())
		}
	}
	r.op.note("%d connections, %d within this node are not kept", len(req.Sockets), sameHost)
	reply, err := r.a.filter.SnapshotStart(r.op.ctx, connect.NewRequest(req))
	if err != nil {
		return filterError(err, r.app.Name, control.RequestSnapshotStart)
	}
	for _, u := range reply.Msg.Unlearned {
		name, reason, _ := strings.Cut(u, ": ")
		r.leftOut[name] = true
		r.forced = append(r.forced, name+": left out, "+reason)
	}
	return r.lookAgain(req.Sockets)
}

// known asks the filter which connections it follows.
func (r *snapshotRun) known() (*pb.ConnInfoReply, error) { return r.a.connInfo(r.op.ctx, r.app.Name) }

// lookAgain tells the filter where a socket has changed between the list and
// the answer to SNAPSHOTSTART, from which on everything is captured: a close
// that passed unseen would leave a connection that is held as open.
func (r *snapshotRun) lookAgain(before []*pb.Socket) error {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return err
	}
	all, err := r.socks.List(sockdiag.Query{Local: r.app.VIPs, Info: true})
	if err != nil {
		return err
	}
	req := &pb.AdoptRequest{App: r.app.Name, ListedAtNs: ts.Nano()}
	if req.Sockets, _, err = r.scope.pick(all, forSnapshot, r.known); err != nil {
		return err
	}
	state := make(map[string]string, len(all))
	for _, m := range req.Sockets {
		state[pairName(m.Local, m.Remote)] = m.State
	}
	if !slices.ContainsFunc(before, func(m *pb.Socket) bool { return state[pairName(m.Local, m.Remote)] != m.State }) {
		return nil
	}
	_, err = r.a.filter.Adopt(r.op.ctx, connect.NewRequest(req))
	return filterError(err, r.app.Name, control.RequestAdopt)
}

// dsack makes sure that sockets tell what the filter asks: it knows their
// answers by the duplicate SACK in them (RFC 2883).
func (r *snapshotRun) dsack(socks []sockdiag.Socket) error {
	uses := slices.ContainsFunc(socks, func(k sockdiag.Socket) bool { return k.Info != nil && k.Info.Options.SACK })
	ns := r.app.Process.Namespace
	if !uses || strings.TrimSpace(r.a.sysctl(ns, "net/ipv4/tcp_dsack")) != "0" {
		return nil
	}
	where := ""
	if ns != "" {
		where = " in the network namespace " + ns
	}
	return fmt.Errorf("net.ipv4.tcp_dsack is 0%s, and without it connections cannot be learned; set it: sysctl -w net.ipv4.tcp_dsack=1", where)
}

func (r *snapshotRun) freeze() error {
	r.op.enter("freeze")
	c, h := r.app.Checkpoint, r.app.Hold
	req := &pb.SnapshotFreezeRequest{
		App: r.app.Name, Boundary: c.Boundary, QuietMs: c.Quiet.Std().Milliseconds(), PassCloses: !r.byImage(), Silent: r.byImage(),
		AbortOnData: r.abortOnData(), Spool: uint32(min(h.Spool, 1<<30)), WakeFull: h.Wake == config.WakeFull}
	for _, b := range r.app.Heartbeats {
		req.Heartbeats = append(req.Heartbeats, &pb.Heartbeat{Remote: b.Remote.String(), Match: b.Match, Reply: b.Reply, Send: b.Send,
			IntervalMs: b.Interval.Std().Milliseconds(), OnlyClosed: b.OnlyClosed})
	}
	_, err := r.a.filter.SnapshotFreeze(r.op.ctx, connect.NewRequest(req))
	return filterError(err, r.app.Name, control.RequestSnapshotFreeze)
}

// abortOnData tells whether data that comes for a frozen connection gives the
// snapshot up.
func (r *snapshotRun) abortOnData() bool {
	return r.app.Hold.OnDataDuringSnapshot == config.OnDataAbort && !r.force
}

// settle drains until everything is accounted for with the application
// stopped: what the last command or the stop itself let move, moves on.
func (r *snapshotRun) settle() error {
	leftOut := slices.Clone(r.forced)
	deadline := time.Now().Add(r.drain)
	for {
		missing, err := r.drained(deadline)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := r.before(); err != nil {
			return err
		}
		deadline = deadline.Add(time.Since(began))
		r.op.enter("stop")
		if err := r.proc.freeze(r.op.ctx); err != nil {
			return err
		}
		r.op.enter("account")
		late := len(missing) > 0 // only with force
		missing, err = r.look(r.op.ctx)
		if err != nil {
			return err
		}
		if len(missing) == 0 || late {
			r.forced = append(leftOut, missing...)
			return nil
		}
		if err := r.proc.thaw(); err != nil {
			return err
		}
	}
}

// drained waits until everything is accounted for; with force it gives what is
// missing when the time is over.
func (r *snapshotRun) drained(deadline time.Time) ([]string, error) {
	r.op.enter("drain")
	for {
		before := r.op.outage(0)
		missing, err := r.drainUntil(deadline)
		waited := r.op.outage(0) - before
		if waited == 0 || !errors.Is(err, errDrain) {
			return r.drainEnd(missing, err)
		}
		deadline = deadline.Add(waited) // nothing could drain while the filter was away
	}
}

var errDrain = errors.New("drain time-out")

func (r *snapshotRun) drainUntil(deadline time.Time) (missing []string, err error) {
	ctx, cancel := context.WithDeadlineCause(r.op.ctx, deadline, errDrain)
	defer cancel()
	err = poll(ctx, drainPollFirst, drainPollMost, func() (bool, error) {
		if !r.proc.alive() {
			return false, fmt.Errorf("%s is gone, it ended during the snapshot", r.proc.describe())
		}
		m, err := r.look(r.op.ctx)
		if err != nil {
			return false, err
		}
		missing = m
		r.op.note("%d connections not accounted for", len(m))
		return len(m) == 0, nil
	})
	return missing, err
}

// drainEnd decides what follows from a drain.
func (r *snapshotRun) drainEnd(missing []string, err error) ([]string, error) {
	switch {
	case !errors.Is(err, errDrain):
		return nil, err
	case r.force:
		return r.cut(missing)
	}
	return nil, control.Error(connect.CodeFailedPrecondition, r.app.Name, "",
		fmt.Sprintf("%d connections are not accounted for within drain_timeout (%s): %s; wait for quieter times, raise it, or use --force",
			len(missing), r.drain, named(missing)), missing...)
}

// cut freezes, with force, what has not reached its boundary, wherever it
// stands, and waits until the application has read what it was given: then
// every byte is accounted for, if not every request.
func (r *snapshotRun) cut(missing []string) ([]string, error) {
	r.op.enter("cut")
	r.op.note("%d connections are frozen in mid-request", len(missing))
	if _, err := r.a.filter.SnapshotFreeze(r.op.ctx, connect.NewRequest(&pb.SnapshotFreezeRequest{
		App: r.app.Name, Boundary: control.BoundaryNow, PassCloses: true})); err != nil {
		return nil, filterError(err, r.app.Name, control.RequestSnapshotFreeze)
	}
	late := errors.New("time-out of the cut")
	ctx, cancel := context.WithTimeoutCause(r.op.ctx, min(cutTimeout, r.drain), late)
	defer cancel()
	err := poll(ctx, drainPollFirst, drainPollMost, func() (bool, error) {
		m, err := r.look(r.op.ctx)
		if err != nil {
			return false, err
		}
		missing = m
		return len(m) == 0, nil
	})
	if errors.Is(err, late) {
		err = nil
	}
	return missing, err
}

// named shortens a list for a message.
func named(list []string) string {
	if len(list) > maxNamed {
		return strings.Join(list[:maxNamed], "; ") + fmt.Sprintf("; and %d more", len(list)-maxNamed)
	}
	return strings.Join(list, "; ")
}

func (r *snapshotRun) before() error {
	argv := r.app.Checkpoint.Before
	if len(argv) == 0 {
		return nil
	}
	r.op.enter("before")
	r.op.note("%s", strings.Join(argv, " "))
	ctx, cancel := context.WithTimeoutCause(r.op.ctx, beforeTimeout, fmt.Errorf("it took longer than %s", beforeTimeout))
	defer cancel()
	if err := r.a.launch.run(ctx, r.app, argv); err != nil {
		return fmt.Errorf("checkpoint.before: %w", err)
	}
	return nil
}

// prepare puts the snapshot on disk as far as it is known, while a full disk
// can still be answered by running on.
func (r *snapshotRun) prepare() error {
	r.op.enter("prepare")
	if r.info == nil { // an earlier agent has accounted for them
		var err error
		if r.info, err = r.a.connInfo(r.op.ctx, r.app.Name); err != nil {
			return err
		}
	}
	switch {
	case r.id == "":
		r.id = newSnapshotID(time.Now())
	case !validSnapshotID(r.id): // it is part of a path
		return fmt.Errorf("the record of the agent before names snapshot %q, which is the name of none; put %s right, or give the application up (ckptctl stop %s --discard)",
			r.id, r.a.intents.path(r.app.Name), r.app.Name)
	}
	m := r.a.manifest(r.app, r.id, r.engine, r.callers)
	var err error
	if r.temp != "" {
		r.pending, err = r.a.store.reopen(m, r.temp)
	} else {
		r.pending, err = r.a.store.begin(m, r.info)
	}
	if err != nil {
		return fmt.Errorf("%w; see that the store can be written and has room", err)
	}
	return nil
}

// manifest describes a snapshot of this node; callers is where the caller's CRIU writes
// its images, "" where that is not so.
func (a *agent) manifest(app *config.App, id, engine, callers string) Manifest {
	node := a.config().Node
	m := Manifest{App: app.Name, ID: id, Node: node.Name, Time: time.Now().UTC(), Engine: engine, Images: callers}
	if node.Address.IsValid() {
		m.NodeAddress = node.Address.String()
	}
	return m
}

// seal is the point of no return: from here nothing of local reaches remotes.
func (r *snapshotRun) seal() error {
	r.op.enter("seal")
	// From here on an agent that takes over goes forward.
	if err := r.intend(intent{Sealed: true, SnapshotID: r.id, Force: r.force}); err != nil {
		return err
	}
	if err := r.op.commit(); err != nil {
		return err
	}
	ctx, cancel := r.op.cleanup()
	defer cancel()
	_, err := r.a.filter.Seal(ctx, connect.NewRequest(&pb.SealRequest{App: r.app.Name}))
	if connect.CodeOf(err) == connect.CodeFailedPrecondition {
		r.op.takeBack()
	}
	return filterError(err, r.app.Name, control.RequestSeal)
}

// complete ends the application and hands its connections to the filter. It
// goes on to the end: clients must be held even where a step fails.
func (r *snapshotRun) complete() (*pb.AgentSnapshotReply, error) {
	r.op.enter("kill")
	err := r.kill()
	ctx, cancel := r.op.cleanup()
	defer cancel()
	r.op.enter("store")
	id := r.pending.manifest.ID
	// With everything accounted for nothing has moved since.
	var moved *pb.ConnInfoReply
	var serr error
	switch {
	case r.byImage() && r.callers == "":
		if r.finished == nil { // an earlier agent has written them
			r.finishImages(r.pending.sumImages())
		}
		serr = <-r.finished
	case r.force || r.byImage():
		moved, serr = r.a.connInfo(ctx, r.app.Name)
	}
	if serr == nil {
		serr = r.pending.commit(moved)
	}
	if serr != nil {
		err = errors.Join(err, fmt.Errorf("the snapshot is not stored: %w", serr))
		if r.byImage() && r.callers == "" {
			err = r.notStored(err)
		} else {
			r.pending.discard()
		}
	}
	r.op.enter("hold")
	state, herr := r.hold(ctx, id)
	if err = errors.Join(err, herr); err != nil {
		r.a.keepOnNode(r.app)
		return nil, failed(opSnapshot, r.app.Name, state, err)
	}
	r.a.keepOnNode(r.app)
	r.a.prune(r.app.Name, id)
	for _, f := range r.forced {
		r.a.log.Warn("forced", "app", r.app.Name, "id", id, "connection", f)
	}
	return &pb.AgentSnapshotReply{App: r.app.Name, SnapshotId: id, Forced: r.forced, Notes: r.notes, Phases: r.op.took()}, nil
}

// kill ends the application's processes.
func (r *snapshotRun) kill() error {
	if r.proc == nil {
		return nil
	}
	sig := stopSignal(r.app)
	if r.byImage() { // what it did now the one in the images would do again
		sig = unix.SIGKILL
	}
	err := r.proc.stop(sig, r.app.Process.StopTimeout.Std())
	if err == nil {
		r.a.setProcess(r.app.Name, nil)
		return nil
	}
	return errors.Join(err, r.proc.stop(unix.SIGKILL, 0))
}

// hold makes the filter answer for the application, and gives the state after
// it. A refusal comes too late for the application, so that the connections
// are held all the same.
func (r *snapshotRun) hold(ctx context.Context, id string) (string, error) {
	req := &pb.SnapshotDoneRequest{App: r.app.Name, SnapshotId: id, Force: r.force}
	reply, err := r.a.filter.SnapshotDone(ctx, connect.NewRequest(req))
	if err == nil {
		for _, n := range reply.Msg.Notes {
			if !slices.Contains(r.forced, n) {
				r.forced = append(r.forced, n)
			}
		}
		return reply.Msg.State, nil
	}
	first := filterError(err, r.app.Name, control.RequestSnapshotDone)
	req.Force = true
	ctx, cancel := r.op.cleanup()
	defer cancel()
	if reply, err = r.a.filter.SnapshotDone(ctx, connect.NewRequest(req)); err != nil {
		second := filterError(err, r.app.Name, control.RequestSnapshotDone)
		return "", noted(first, fmt.Sprintf(
			"; the application is stopped and its connections are not held: %v; try ckptctl ioctl SNAPSHOTDONE %s %s --force",
			second, r.app.Name, id))
	}
	return reply.Msg.State, noted(first, fmt.Sprintf(
		"; the application is stopped and its connections are held under %s, but what they miss may be lost; restore it", id))
}
