package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// listenPoll is the wait between two looks for the listen ports.
const listenPoll = 2 * time.Millisecond

// supported refuses what is configured and not built yet.
func supported(op string, app *config.App) error {
	if app.Process.SystemdUnit != "" {
		return control.Error(connect.CodeUnimplemented, app.Name, "",
			op+" of "+app.Name+": process.systemd_unit is not supported yet; use process.start")
	}
	return nil
}

// start brings an application up on this node.
func (a *agent) start(ctx context.Context, name string) (reply *pb.AgentReply, err error) {
	app, err := a.freshApp(name)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(supported(opStart, app), a.trusted(app)); err != nil {
		return nil, err
	}
	if n := a.config().Node.Name; len(app.Nodes) > 0 && !slices.Contains(app.Nodes, n) {
		return nil, refused(opStart, name, "", fmt.Sprintf("its nodes are %q and this is %q", app.Nodes, n))
	}
	op, err := a.begin(ctx, name, opStart)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	op.enter("look")
	st, err := a.status(op.ctx, name)
	if err != nil {
		return nil, err
	}
	proc, err := a.processOf(app)
	if err != nil {
		return nil, failed(opStart, name, st.State, err)
	}
	switch st.State {
	case control.StateUnknown, control.StateConnected, control.StateRestored:
	case control.StateSnapshotDone:
		return nil, refused(opStart, name, st.State, "restore it, or stop it with --discard")
	default:
		return nil, refused(opStart, name, st.State, "wait for what is under way or abort it")
	}
	reply = &pb.AgentReply{App: name, State: st.State}
	if proc != nil {
		if err := proc.thaw(); err != nil { // an earlier agent may have left it stopped
			return nil, failed(opStart, name, st.State, err)
		}
		if err := a.launch.hook(app, proc); err != nil { // its file was read afresh
			return nil, failed(opStart, name, st.State, err)
		}
	}
	if proc != nil && st.State != control.StateUnknown {
		return reply, nil
	}
	fresh := st.State == control.StateUnknown
	if in, _ := a.intents.load(name); in != nil && in.Op == opStart && in.BootID == bootID() {
		fresh = fresh || in.Fresh // an earlier agent's start goes on
	}
	if err := a.intend(op, intent{Fresh: fresh}); err != nil {
		return nil, failed(opStart, name, st.State, err)
	}
	u := &undo{op: op}
	if fresh && st.State != control.StateUnknown {
		u.add(func(ctx context.Context) error { return a.unregister(ctx, name, true) })
		u.add(func(context.Context) error { return a.removeVIPs(app) })
	}
	if err := a.bringUp(u, app, proc, st.State == control.StateUnknown); err != nil {
		u.run(a)
		return nil, failed(opStart, name, st.State, err)
	}
	if proc != nil {
		r, err := a.adopt(op.ctx, app)
		if err != nil {
			u.run(a)
			return nil, failed(opStart, name, st.State, err)
		}
		reply.Notes = append(reply.Notes, fmt.Sprintf("adopted %s with %d connections", proc.describe(), r.Adopted))
	}
	if st.State == control.StateUnknown {
		reply.State = control.StateConnected
	}
	return reply, nil
}

// bringUp does what start has to do, in the order in which no packet of a
// connection passes unseen: filter, address, process.
func (a *agent) bringUp(u *undo, app *config.App, running process, register bool) error {
	op := u.op
	if register {
		if err := a.nobodyElse(app); err != nil {
			return err
		}
		op.enter("register")
		if err := a.register(op.ctx, app); err != nil {
			return err
		}
		u.add(func(ctx context.Context) error { return a.unregister(ctx, app.Name, true) })
	}
	op.enter("address")
	if err := a.addVIPs(u, app); err != nil {
		return err
	}
	if running != nil {
		return nil
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return err
	}
	defer s.Close()
	proc, err := a.startProcess(op, app, s)
	if proc != nil {
		u.add(func(context.Context) error {
			a.setProcess(app.Name, nil)
			return proc.stop(unix.SIGKILL, 0)
		})
	}
	return err
}

// undo takes back, last first.
type undo struct {
	op    *operation
	steps []func(context.Context) error
}

func (u *undo) add(f func(context.Context) error) { u.steps = append(u.steps, f) }

func (u *undo) run(a *agent) {
	ctx, cancel := u.op.cleanup()
	defer cancel()
	for _, f := range slices.Backward(u.steps) {
		if err := f(ctx); err != nil {
			a.log.Error("could not undo a step", "app", u.op.app, "operation", u.op.name, "err", err)
		}
	}
}

func (a *agent) unregister(ctx context.Context, app string, force bool) error {
	_, err := a.filter.Unregister(ctx, connect.NewRequest(&pb.UnregisterRequest{App: app, Force: force}))
	return filterError(err, app, control.RequestUnregister)
}

// startProcess starts the application and waits until it listens. With an
// error the process may run already: it is returned then too.
func (a *agent) startProcess(op *operation, app *config.App, s sockets) (process, error) {
	op.enter("process")
	if err := notTaken(s, app); err != nil {
		return nil, err
	}
	proc, err := a.launch.start(app)
	if err != nil {
		return nil, err
	}
	a.setProcess(app.Name, proc)
	op.enter("listen")
	op.note("%s", proc.describe())
	ready := app.Process.ReadyTimeout.Std()
	cause := fmt.Errorf("%s does not listen within ready_timeout (%s)", app.Name, ready)
	ctx, cancel := context.WithTimeoutCause(op.ctx, ready, cause)
	defer cancel()
	var missing []string
	err = poll(ctx, listenPoll, listenPoll, func() (bool, error) {
		if missing, err = a.notListening(s, app); err != nil || len(missing) == 0 {
			return err == nil, err
		}
		if proc.alive() {
			return false, nil
		}
		// With a pid_file the command may have put itself into the background.
		if p, err := a.launch.find(app); err == nil && p != nil {
			proc = p
			a.setProcess(app.Name, proc)
			return false, nil
		}
		return false, fmt.Errorf("%s ended before it listened on %v", proc.describe(), missing)
	})
	if err == nil {
		return proc, nil
	}
	if errors.Is(err, cause) {
		err = fmt.Errorf("%w on %v", err, missing)
	}
	return proc, fmt.Errorf("%w; its output is in %s", err, a.launch.logPath(app))
}

// notListening names the addresses and ports that nobody listens on yet.
func (a *agent) notListening(s sockets, app *config.App) ([]string, error) {
	if len(app.IncludePorts) == 0 {
		return nil, nil
	}
	ls, err := s.Listeners(app.VIPs, app.IncludePorts)
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, port := range app.IncludePorts {
		// One of two VIPs is enough: a program may serve only IPv4.
		if !slices.ContainsFunc(app.VIPs, func(v netip.Addr) bool { return len(listenersFor(ls, v, port)) > 0 }) {
			missing = append(missing, netip.AddrPortFrom(app.VIPs[0], port).String())
		}
	}
	return missing, nil
}

// stop takes an application down.
func (a *agent) stop(ctx context.Context, name string, discard bool) (reply *pb.AgentReply, err error) {
	app, err := a.app(name)
	if err != nil {
		return nil, err
	}
	op, err := a.begin(ctx, name, opStop)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	st, err := a.status(op.ctx, name)
	if err != nil {
		return nil, err
	}
	if st.State == control.StateSnapshotFreeze && discard {
		if st, err = a.endFreeze(op, app); err != nil {
			return nil, failed(opStop, name, control.StateSnapshotFreeze, err)
		}
	}
	switch {
	case st.State == control.StateConnected, st.State == control.StateRestored:
	case st.State == control.StateSnapshotDone && discard:
	case st.State == control.StateSnapshotDone:
		return nil, refused(opStop, name, st.State, "its held clients would be reset: say so with --discard")
	case st.State == control.StateUnknown && a.halfStopped(app):
	case st.State == control.StateUnknown:
		return nil, refused(opStop, name, st.State, "there is nothing to stop")
	default:
		return nil, refused(opStop, name, st.State, "wait for what is under way or abort it")
	}
	proc, err := a.processOf(app)
	if err != nil {
		return nil, failed(opStop, name, st.State, err)
	}
	if err := a.intend(op, intent{Discard: discard}); err != nil {
		return nil, failed(opStop, name, st.State, err)
	}
	if proc != nil {
		op.enter("process")
		if err := proc.stop(stopSignal(app), app.Process.StopTimeout.Std()); err != nil {
			return nil, failed(opStop, name, st.State, err)
		}
		a.setProcess(name, nil)
	}
	op.forward() // half a stop helps nobody
	ctx, cancel := op.cleanup()
	defer cancel()
	op.enter("unregister")
	if st.State != control.StateUnknown {
		if err := a.unregister(ctx, name, true); err != nil {
			return nil, err
		}
	}
	op.enter("address")
	if err := a.removeVIPs(app); err != nil {
		return nil, failed(opStop, name, control.StateUnknown, err)
	}
	return &pb.AgentReply{App: name}, nil
}

// endFreeze brings a snapshot that nobody carries on to its end or takes it
// back.
func (a *agent) endFreeze(op *operation, app *config.App) (*pb.AppStatus, error) {
	in, err := a.intents.load(app.Name)
	if err != nil {
		a.log.Error("an operation of an earlier agent is not known", "app", app.Name, "err", err)
	}
	if _, _, err := a.resume(op, app, in); err != nil {
		return nil, err
	}
	return a.status(op.ctx, app.Name)
}

// halfStopped tells that an earlier stop got as far as the filter.
func (a *agent) halfStopped(app *config.App) bool {
	in, err := a.intents.load(app.Name)
	return err == nil && in != nil && in.Op == opStop
}

// stopSignal is the application's stop signal; the configuration has checked
// its name.
func stopSignal(app *config.App) unix.Signal {
	if s := unix.SignalNum(app.Process.StopSignal); s != 0 {
		return s
	}
	return unix.SIGKILL
}
