package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// An application that another node holds comes here. In this order:
//
//	this node's filter has the structures handed over   old: BLOCKDATA, silent
//	the old agent removes the VIPs                       nobody answers for them
//	this agent adds and announces them                   this filter answers
//	the application starts, its connections come back, RESTORED
//	the old agent releases                               old: unknown
//
// Before RESTORED all of it is given back in the opposite order. Which node
// answers is decided by the filters alone; the agents move addresses and may
// die at any point: each step can be repeated.

const (
	// peerTimeout bounds one request to another node that does nothing long.
	peerTimeout = 10 * time.Second
	// peerPatience is how long an agent or filter of another node may be away,
	// to be started anew, before an operation is given up.
	peerPatience = 15 * time.Second
	// settleEvery is how often an old node is asked again that could not be
	// released.
	settleEvery = 2 * time.Second
)

// dialPeers makes the daemons of other nodes reachable.
func (a *agent) dialPeers() {
	a.dialAgent = func(node string) (nfconnfilterv1connect.AgentClient, func(), error) {
		c, err := a.peers.DialAgent(node)
		if err != nil {
			return nil, nil, err
		}
		return c, c.Close, nil
	}
	a.dialFilter = func(node string) (nfconnfilterv1connect.FilterClient, func(), error) {
		c, err := a.peers.DialFilter(node)
		if err != nil {
			return nil, nil, err
		}
		return c, c.Close, nil
	}
}

// restoreFrom restores what another node holds.
func (a *agent) restoreFrom(ctx context.Context, m *pb.AgentRestoreRequest) (reply *pb.AgentReply, err error) {
	app, err := a.freshApp(m.App)
	if err != nil {
		return nil, err
	}
	// The asking node may die meanwhile: it is ended by Abort alone.
	op, err := a.begin(context.WithoutCancel(ctx), m.App, opRestore)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	op.enter("look")
	st, err := a.status(op.ctx, m.App)
	if err != nil {
		return nil, err
	}
	switch st.State {
	case control.StateRestored:
		return &pb.AgentReply{App: m.App, State: st.State}, nil
	case control.StateSnapshotDone: // it was taken over before
		return a.restoreHeld(op, app, st, m.SnapshotId)
	}
	if err := a.mayTake(st, m.OldNode); err != nil {
		return nil, refused(opRestore, m.App, st.State, err.Error())
	}
	old, done, err := a.dialAgent(m.OldNode)
	if err != nil {
		return nil, failed(opRestore, m.App, st.State, err)
	}
	defer done()
	r := &restoreRun{a: a, op: op, app: app, id: m.SnapshotId, old: m.OldNode, oldAgent: old}
	if err := r.lookAtOld(); err != nil {
		return nil, failed(opRestore, m.App, st.State, err)
	}
	if r.socks, err = a.openSockets(app.Process.Namespace); err != nil {
		return nil, failed(opRestore, m.App, st.State, err)
	}
	defer r.socks.Close()
	// A release that an earlier migration still owes to that node would be of
	// this one.
	unlock := a.settleLock(m.App)
	err = errors.Join(a.owed.drop(m.App, m.OldNode), a.owed.add(m.App, m.OldNode))
	if err == nil {
		err = a.intend(op, intent{SnapshotID: r.id, OldNode: m.OldNode})
	}
	unlock()
	if err != nil {
		return nil, failed(opRestore, m.App, st.State, err)
	}
	if err := r.run(); err != nil {
		held, err := r.rollBackForeign(err)
		if !held || op.ctx.Err() != nil {
			return nil, err
		}
		a.log.Warn("the filter was started anew meanwhile and holds the connections here; restoring from there", "app", m.App, "err", err)
		if st, err = a.status(op.ctx, m.App); err != nil {
			return nil, err
		}
		if _, err := a.restoreHeld(op, app, st, ""); err != nil {
			return nil, err
		}
	}
	op.enter("release")
	a.settle(m.App)
	return &pb.AgentReply{App: m.App, State: control.StateRestored, Phases: op.took()}, nil
}

// lookAtOld sees that the old node holds the application and can be asked, and
// that this node can take it, before anything is changed.
func (r *restoreRun) lookAtOld() error {
	st, links, err := r.a.askOld(r.op.ctx, r.oldAgent, r.old, r.app.Name)
	if err != nil {
		return err
	}
	self := r.a.config().Node.Name
	held := st.State == control.StateSnapshotDone || st.State == control.StateBlockData && st.TakenBy == self
	switch {
	case !held && st.TakenBy != "":
		return fmt.Errorf("node %s has handed it to node %s; restore it there", r.old, st.TakenBy)
	case !held:
		return fmt.Errorf("node %s does not hold it, it is in state %q there; take a snapshot there first (ckptctl migrate)", r.old, st.State)
	case r.id != "" && st.SnapshotId != "" && r.id != st.SnapshotId:
		return fmt.Errorf("the current snapshot on node %s is %s and not %s", r.old, st.SnapshotId, r.id)
	case r.id == "":
		r.id = st.SnapshotId
	}
	if r.a.wasPrepared(r.app.Name, r.old) {
		return r.a.store.await(r.op.ctx, r.app.Name, r.id)
	}
	r.op.enter("check")
	_, _, err = r.a.fit(r.op.ctx, r.app, suitor{node: r.old, links: links, id: r.id})
	return err
}

// askOld asks another node's agent what it knows of an application.
func (a *agent) askOld(ctx context.Context, old nfconnfilterv1connect.AgentClient, node, app string) (*pb.NodeApp, []string, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	r, err := old.NodeStatus(ctx, connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err != nil {
		return nil, nil, peerError(err, app, node)
	}
	for _, st := range r.Msg.Apps {
		if st.Name == app {
			return st, r.Msg.LinkAddresses, nil
		}
	}
	return nil, nil, fmt.Errorf("node %s does not know the application; see that it shares the directory with its file", node)
}

// peerError says which node's agent a failure is of.
func peerError(err error, app, node string) error {
	code, state := connect.CodeOf(err), ""
	if i := control.Info(err); i != nil {
		state = i.State
	}
	if connect.IsWireError(err) {
		return control.Error(code, app, state, fmt.Sprintf("the agent of node %s: %s", node, message(err)))
	}
	return control.Error(connect.CodeUnavailable, app, state,
		fmt.Sprintf("the agent of node %s cannot be asked: %s; its connections stay where they are held", node, message(err)))
}

// yieldTo asks the old node for something, again while it cannot be reached or
// its filter is away.
func (a *agent) yieldTo(ctx context.Context, old nfconnfilterv1connect.AgentClient, node, app, what string) (*pb.AgentReply, error) {
	late := errors.New("it was not there in time")
	ctx, cancel := context.WithTimeoutCause(ctx, peerPatience, late)
	defer cancel()
	var reply *pb.AgentReply
	var last error
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, peerTimeout)
		defer cancel()
		r, err := old.Yield(ctx, connect.NewRequest(&pb.AgentYieldRequest{App: app, Taker: a.config().Node.Name, What: what}))
		if err == nil {
			reply = r.Msg
			return true, nil
		}
		last = peerError(err, app, node)
		if c := connect.CodeOf(err); connect.IsWireError(err) && c != connect.CodeUnavailable && c != connect.CodeDeadlineExceeded {
			return false, last // its own answer
		}
		return false, nil
	})
	if err != nil && last != nil {
		err = last
	}
	return reply, err
}

// claim has the old node give the VIPs up and takes them.
func (r *restoreRun) claim() error {
	if r.old == "" || r.taken && r.a.hasVIPs(r.app) {
		return nil
	}
	r.op.enter("addresses")
	old, done := r.oldAgent, func() {}
	if old == nil {
		var err error
		if old, done, err = r.a.dialAgent(r.old); err != nil {
			return err
		}
	}
	defer done()
	if _, err := r.a.yieldTo(r.op.ctx, old, r.old, r.app.Name, control.YieldAddresses); err != nil {
		return err
	}
	if err := r.a.addVIPs(&undo{op: r.op}, r.app); err != nil {
		return err
	}
	return r.a.announceVIPs(r.app)
}

// hasAnyVIP tells whether an address of an application is, or may be, on this node.
func (a *agent) hasAnyVIP(app *config.App) bool {
	for _, v := range app.VIPs {
		for _, ns := range []string{hostNamespace, app.Process.Namespace} {
			if _, here, err := a.addrs.has(ns, v); err != nil || here {
				return true
			}
		}
	}
	return false
}

// hasVIPs tells whether all addresses of an application are on this node.
func (a *agent) hasVIPs(app *config.App) bool {
	for _, v := range app.VIPs {
		_, here, err := a.addrs.has(hostNamespace, v)
		if err == nil && !here && app.Process.Namespace != hostNamespace {
			_, here, err = a.addrs.has(app.Process.Namespace, v)
		}
		if err != nil || !here {
			return false
		}
	}
	return true
}

// rollBackForeign ends what was started, and gives the connections back; held
// tells that they are held here and stay.
func (r *restoreRun) rollBackForeign(cause error) (held bool, failure error) {
	cause = r.op.why(cause)
	r.op.enter("undo")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.op.ctx), 2*cleanupTimeout)
	defer cancel()
	name := r.app.Name
	st, err := r.a.status(ctx, name)
	if err == nil && st.State == control.StateRestored {
		r.op.left = true // the old node is to be released
		return false, failed(opRestore, name, st.State, noted(cause, "; but its connections are open again and it runs"))
	}
	if r.proc != nil && (err == nil || !r.opening) { // otherwise the application may be reached already
		err = errors.Join(err, r.proc.stop(unix.SIGKILL, 0))
		r.a.setProcess(name, nil)
	}
	if err == nil {
		// A filter that was started anew holds them as its own, and the restore
		// goes on from there, once.
		held, err = r.a.giveBack(ctx, r.app, r.old, !r.taken && r.op.ctx.Err() == nil)
	}
	switch {
	case err != nil:
		r.op.left = true
		return false, failed(opRestore, name, "", noted(cause, "; and its connections are not given back to node "+r.old+" yet: "+err.Error()+"; it is tried again"))
	case held:
		r.op.takeBack()
		return true, failed(opRestore, name, control.StateSnapshotDone, noted(cause, "; its connections are held here"))
	}
	r.op.takeBack()
	return false, failed(opRestore, name, control.StateUnknown, noted(cause, "; node "+r.old+" holds its connections again"))
}

// giveBack ends a take-over that no client has seen anything of: the old node
// answers again. held tells that the connections are held here and stay: keep
// leaves them where this node's filter was started anew and holds them as its
// own; or they were open here before.
func (a *agent) giveBack(ctx context.Context, app *config.App, node string, keep bool) (held bool, err error) {
	old, done, err := a.dialAgent(node)
	if err != nil {
		return false, err
	}
	defer done()
	err = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		st, err := a.status(ctx, app.Name)
		if err != nil {
			return false, err
		}
		switch {
		case st.State == control.StateRestored, st.State == control.StateSnapshotDone && (keep || st.OldNode != node):
			held = true
			return true, nil
		case st.State == control.StateSnapshotDone, st.State == control.StateRestoreStart:
			return false, a.handBack(ctx, app, old, node)
		case st.State == control.StateBlockData && st.TakenBy == node:
			// It may have begun; or it was handed there by us, long ago.
			if err := a.restoreAbort(ctx, app); err == nil || connect.CodeOf(err) != connect.CodeFailedPrecondition {
				return false, err
			}
		}
		there, _, err := a.askOld(ctx, old, node, app.Name)
		if err != nil {
			return false, err
		}
		if there.State == control.StateBlockData && there.TakenBy == a.config().Node.Name {
			// Handed over to a filter that died before it could write it down.
			return false, a.announceTake(ctx, app, there.SnapshotId, node)
		}
		_, err = a.yieldTo(ctx, old, node, app.Name, control.YieldBack)
		return true, err
	})
	if err == nil && !held {
		err = a.owed.drop(app.Name, node)
	}
	return held, err
}

// handBack has the filter return the structures. The VIPs go first, or this
// node's kernel would answer where the filter does not any more; where the old
// node cannot be told they come again, and all stays held here.
func (a *agent) handBack(ctx context.Context, app *config.App, old nfconnfilterv1connect.AgentClient, node string) error {
	// With the addresses still there the old filter answers as soon as it has
	// them back, whether its agent lives or not.
	if a.hasAnyVIP(app) {
		if _, _, err := a.askOld(ctx, old, node, app.Name); err != nil {
			return err
		}
	}
	if err := a.leave(app); err != nil {
		return err
	}
	err := a.restoreAbort(ctx, app)
	if err != nil {
		if st, serr := a.status(ctx, app.Name); serr == nil && (st.State == control.StateRestoreStart || st.State == control.StateSnapshotDone) {
			if st.State == control.StateSnapshotDone && st.OldNode == "" {
				err = nil // the old node has forgotten it: it is this one's own now
			}
			err = errors.Join(err, a.takeAddresses(app)) // it answers here still
		}
	}
	return err
}

func (a *agent) restoreAbort(ctx context.Context, app *config.App) error {
	_, err := a.filter.RestoreAbort(ctx, connect.NewRequest(&pb.AppRequest{App: app.Name}))
	return filterError(err, app.Name, control.RequestRestoreAbort)
}

// announceTake has this node's filter take the structures over.
func (a *agent) announceTake(ctx context.Context, app *config.App, id, node string) error {
	_, err := a.filter.RestoreStart(ctx, connect.NewRequest(&pb.RestoreStartRequest{
		App: app.Name, Ip: app.VIPs[0].String(), SnapshotId: id, OldNode: node}))
	return filterError(err, app.Name, control.RequestRestoreStart)
}

// resumeForeign goes on where an earlier agent was about to take an application
// over from another node.
func (a *agent) resumeForeign(op *operation, app *config.App, in *intent, st *pb.AppStatus, proc process) (did string, again func() error, err error) {
	switch st.State {
	case control.StateRestored:
		if proc != nil {
			a.hookRunning(app, proc)
		}
		a.settle(app.Name)
		return "its restore had ended", nil, nil
	case control.StateSnapshotDone:
	case control.StateUnknown, control.StateRestoreStart, control.StateBlockData:
		if proc != nil {
			op.enter("kill")
			if err := proc.stop(unix.SIGKILL, 0); err != nil {
				return "", nil, err
			}
			a.setProcess(app.Name, nil)
		}
		op.enter("undo")
		ctx, cancel := context.WithTimeout(context.WithoutCancel(op.ctx), 2*cleanupTimeout)
		defer cancel()
		held, err := a.giveBack(ctx, app, in.OldNode, true)
		if err != nil {
			return "", nil, err
		}
		if !held {
			return "its restore was undone, node " + in.OldNode + " holds it again", nil, nil
		}
	default:
		return "", nil, nil
	}
	return "its restore is begun anew", a.comeBack(app.Name), nil
}

// settle tells every node that an application was taken over from, and that
// still swallows its segments, that it may forget it. Those that cannot be told
// are told later.
func (a *agent) settle(app string) {
	defer a.settleLock(app)()
	if err := a.releaseOld(app); err != nil {
		a.log.Warn("an old node is not released yet, it is asked again", "app", app, "err", err)
	}
}

// settleLock is held while old nodes are released, and while one is put on the
// list.
func (a *agent) settleLock(app string) (unlock func()) {
	m, _ := a.settling.LoadOrStore(app, &sync.Mutex{})
	m.(*sync.Mutex).Lock()
	return m.(*sync.Mutex).Unlock
}

// releaseOld is called with the lock.
func (a *agent) releaseOld(app string) error {
	nodes, err := a.owed.nodes(app)
	for _, n := range nodes {
		old, done, derr := a.dialAgent(n)
		if derr == nil {
			ctx, cancel := context.WithTimeout(a.root, peerTimeout)
			_, derr = old.Yield(ctx, connect.NewRequest(&pb.AgentYieldRequest{App: app, Taker: a.config().Node.Name, What: control.YieldRelease}))
			cancel()
			done()
		}
		if derr == nil {
			derr = a.owed.drop(app, n)
		}
		if derr != nil {
			err = errors.Join(err, peerError(derr, app, n))
		}
	}
	return err
}

// keepSettled releases what could not be released at once, until ctx ends.
func (a *agent) keepSettled(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	said := map[string]string{} // the failure that is in the log
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		apps, err := a.owed.apps()
		if err != nil {
			a.log.Warn("old nodes that are to be released are not known", "err", err)
		}
		for _, app := range apps {
			text := ""
			if err := a.settleLater(ctx, app); err != nil {
				text = err.Error()
			}
			if text != "" && text != said[app] {
				a.log.Warn("an old node is not released yet, it is asked again", "app", app, "err", text)
			}
			said[app] = text
		}
	}
}

// settleLater releases the old nodes of an application that nothing is done
// with and that is not to be given back.
func (a *agent) settleLater(ctx context.Context, app string) error {
	defer a.settleLock(app)()
	if a.busy(app) {
		return nil
	}
	if in, err := a.intents.load(app); err != nil || in != nil && in.OldNode != "" {
		return err
	}
	st, err := a.status(ctx, app)
	if err != nil || slices.Contains([]string{control.StateRestoreStart, control.StateBlockData}, st.State) ||
		st.State == control.StateSnapshotDone && st.OldNode != "" { // not restored here once: it can go back still
		return err
	}
	return a.releaseOld(app)
}
