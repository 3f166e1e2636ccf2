package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// A CRIU that somebody else has started calls at its actions (criu/action-scripts.c).
// The calls of one run of it are one operation:
//
//	pre-dump       SNAPSHOTSTART, SNAPSHOTFREEZE (at network-lock where that comes alone)
//	post-dump      SEAL with the numbers of the images; an error lets the tasks run on
//	its end        SNAPSHOTDONE where the tasks are gone, SNAPSHOTABORT where they run on
//
//	pre-restore    RESTORESTART
//	post-restore   RESTORECONN "image"; an error ends the restore
//	pre-resume     RESTORED
//	its end        before that: RESTOREABORT
//
// A dump that fails calls for nothing any more, so its end is watched.

// actionRun is the operation.
type actionRun struct {
	a    *agent
	op   *operation
	app  *config.App
	criu criuRef
	// One of them.
	dump    *snapshotRun
	restore *restoreRun
	late    bool // the restored namespace is not there yet

	calls chan actionCall
	gone  chan struct{} // closed when CRIU has ended
	over  chan struct{} // closed when the operation has
	err   error         // of the operation
}

// actionCall is one action of CRIU.
type actionCall struct {
	action string
	pid    int
	dir    string
	answer chan error
}

var errCRIUEnded = errors.New("CRIU has ended in the middle of it; its log tells why (criu dump --log-file, -v4)")

// CriuAction serves the request of the same name.
func (a *agent) CriuAction(ctx context.Context, r *connect.Request[pb.AgentCriuActionRequest]) (*connect.Response[pb.AgentCriuActionReply], error) {
	// It names processes and directories that the agent believes in: one that is not
	// the application's could be ended in its place.
	if c, ok := control.CallerFrom(ctx); ok && c.UID != 0 && int(c.UID) != os.Geteuid() {
		return nil, control.Error(connect.CodePermissionDenied, r.Msg.App, "",
			fmt.Sprintf("user ID %d is not allowed: a CRIU that root runs may call this, and no other", c.UID))
	}
	return answer(a.criuAction(ctx, r.Msg))
}

func (a *agent) criuAction(ctx context.Context, m *pb.AgentCriuActionRequest) (*pb.AgentCriuActionReply, error) {
	ref, err := a.foreign.find(int(m.CriuPid))
	if err != nil {
		return nil, control.Error(connect.CodeInvalidArgument, m.App, "", err.Error())
	}
	if m.App != "" {
		if _, err := a.app(m.App); err != nil {
			return nil, err
		}
	}
	run, err := a.actionOf(ctx, ref, m.App)
	if err != nil {
		return nil, err
	}
	if run != nil {
		return run.call(ctx, m)
	}
	switch m.Action {
	case criu.PreDump, criu.NetLock, criu.PostDump, criu.PreRestore, criu.PostRestore, criu.PreResume:
	default: // of what was given up already, or not begun
		return &pb.AgentCriuActionReply{}, nil
	}
	app, err := a.concerned(ctx, ref, m)
	if err != nil || app == nil {
		return &pb.AgentCriuActionReply{}, err
	}
	switch m.Action {
	case criu.PreDump, criu.NetLock:
		run, err = a.beginDump(ctx, app, ref, m)
	case criu.PreRestore:
		run, err = a.beginRestore(ctx, app, ref, m)
	default:
		return nil, control.Error(connect.CodeFailedPrecondition, app.Name, "", fmt.Sprintf(
			"%s of %s: nothing is under way for criu %d: it was given up, or its script was not called before (see the log of ckptctl agent)", m.Action, app.Name, ref.pid))
	}
	if err != nil {
		return nil, err
	}
	return run.call(ctx, m)
}

// actionOf gives the operation of a CRIU; nil: there is none. After a start of the agent
// it may be about to be taken up.
func (a *agent) actionOf(ctx context.Context, ref criuRef, app string) (run *actionRun, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerPatience)
	defer cancel()
	err = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		taking := false
		a.mu.Lock()
		for _, r := range a.actions {
			if r.criu == ref {
				run = r
			}
		}
		for name, o := range a.ops {
			taking = taking || o.name == opRecover && (app == "" || app == name)
		}
		taking = taking || len(a.takingUp) > 0
		a.mu.Unlock()
		return run != nil || !taking, nil
	})
	return run, err
}

// concerned finds the application that a CRIU dumps or restores; nil: it is none of ours.
func (a *agent) concerned(ctx context.Context, ref criuRef, m *pb.AgentCriuActionRequest) (*config.App, error) {
	if m.App != "" {
		return a.app(m.App)
	}
	apps := a.config().Apps
	pid := cmp.Or(int(m.Pid), a.foreign.target(ref))
	for _, name := range slices.Sorted(maps.Keys(apps)) {
		switch m.Action {
		case criu.PreDump, criu.NetLock:
			if p, err := a.processOf(apps[name]); err == nil && p != nil && (p.has(pid) || p.rootedIn(pid) == nil) {
				return apps[name], nil
			}
		default:
			if held, err := a.heldIn(ctx, apps[name], m.ImageDir); err != nil || held {
				return apps[name], err
			}
		}
	}
	return nil, nil
}

// heldIn tells whether images are those of the application: of its present snapshot, or
// with connections of its addresses.
func (a *agent) heldIn(ctx context.Context, app *config.App, dir string) (bool, error) {
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return false, err
	}
	if at, err := a.foreign.place(dir); err == nil && st.SnapshotId != "" {
		if m, err := a.store.callersOf(app.Name, st.SnapshotId); err == nil && m != nil && m.Images == at {
			return true, nil
		}
	}
	socks, err := a.images.sockets(dir)
	return err == nil && slices.ContainsFunc(socks, func(k criu.Socket) bool { return slices.Contains(app.VIPs, k.Local.Addr()) }), nil
}

// beginAction begins the operation; it goes on when the caller has its answer.
func (a *agent) beginAction(app *config.App, ref criuRef) (*actionRun, error) {
	op, err := a.begin(a.root, app.Name, opCriu)
	if err != nil {
		return nil, err
	}
	op.enter("look")
	return &actionRun{a: a, op: op, app: app, criu: ref,
		calls: make(chan actionCall), gone: make(chan struct{}), over: make(chan struct{})}, nil
}

// start has it wait for CRIU's calls.
func (r *actionRun) start() {
	r.a.mu.Lock()
	r.a.actions[r.app.Name] = r
	r.a.mu.Unlock()
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.op.ctx))
	r.a.wg.Go(func() {
		if r.a.foreign.awaitEnd(ctx, r.criu) == nil {
			close(r.gone)
			r.op.cancel(errCRIUEnded)
		}
	})
	r.a.wg.Go(func() {
		defer cancel()
		r.drive()
	})
}

func (r *actionRun) drive() {
	defer close(r.over)
	for over := false; !over; {
		select {
		case c := <-r.calls:
			var err error
			if over, err = r.act(c); over {
				r.err = err
				r.end()
			}
			c.answer <- err
		case <-r.op.ctx.Done():
			if over, r.err = r.ended(context.Cause(r.op.ctx)); over {
				r.end()
			}
		}
	}
}

// end finishes the operation.
func (r *actionRun) end() {
	r.a.mu.Lock()
	delete(r.a.actions, r.app.Name)
	r.a.mu.Unlock()
	var s sockets
	if r.dump != nil {
		s = r.dump.socks
	} else if r.restore != nil {
		s = r.restore.socks
	}
	if s != nil {
		s.Close()
	}
	r.a.finish(r.op, r.err)
}

// call hands an action over and waits for what comes of it.
func (r *actionRun) call(ctx context.Context, m *pb.AgentCriuActionRequest) (*pb.AgentCriuActionReply, error) {
	c := actionCall{action: m.Action, pid: int(m.Pid), dir: m.ImageDir, answer: make(chan error, 1)}
	select {
	case r.calls <- c:
	case <-r.over:
		if m.Action == criu.NetUnlock {
			return &pb.AgentCriuActionReply{App: r.app.Name}, nil
		}
		if r.err != nil {
			return nil, r.err
		}
		return nil, control.Error(connect.CodeFailedPrecondition, r.app.Name, "", m.Action+" of "+r.app.Name+": its operation has ended already")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := <-c.answer; err != nil {
		return nil, err
	}
	reply := &pb.AgentCriuActionReply{App: r.app.Name}
	_, reply.Note, _ = r.op.state()
	if st, err := r.a.status(ctx, r.app.Name); err == nil {
		reply.State = st.State
	}
	return reply, nil
}

func (r *actionRun) act(c actionCall) (over bool, err error) {
	if r.dump != nil {
		return r.actDump(c)
	}
	return r.actRestore(c)
}

// ended is for a CRIU that has ended, an abort, and an agent that is stopped.
func (r *actionRun) ended(cause error) (over bool, err error) {
	if r.dump != nil {
		return r.endDump(cause)
	}
	return true, r.restore.rollBack(cause)
}

// stopWait is how long an agent that is stopped waits for the end of a CRIU that has its
// images; the next agent goes on.
const stopWait = 10 * time.Second
