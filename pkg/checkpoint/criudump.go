package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// beginDump begins the operation of a CRIU that dumps.
func (a *agent) beginDump(ctx context.Context, app *config.App, ref criuRef, m *pb.AgentCriuActionRequest) (*actionRun, error) {
	if err := errors.Join(supported(opCriu, app), a.trusted(app)); err != nil {
		return nil, err
	}
	r, err := a.beginAction(app, ref)
	if err != nil {
		return nil, err
	}
	if err = r.prepareDump(ctx, m); err != nil {
		r.err = err
		r.end()
		return nil, err
	}
	r.start()
	return r, nil
}

func (r *actionRun) prepareDump(ctx context.Context, m *pb.AgentCriuActionRequest) error {
	a, app := r.a, r.app
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return err
	}
	if st.State != control.StateConnected && st.State != control.StateRestored {
		return refused(opCriu, app.Name, st.State, "a dump is allowed in CONNECTED and RESTORED")
	}
	if err := a.intents.clear(app.Name); err != nil { // of an operation long past
		return failed(opCriu, app.Name, st.State, err)
	}
	proc, err := a.processOf(app)
	if err == nil && proc == nil {
		err = errors.New("the agent knows of no process of it; name it in process.pid_file and call ckptctl start")
	}
	if err == nil {
		err = proc.within(app.Process.Namespace)
	}
	pid := int(m.Pid)
	if pid == 0 {
		pid = a.foreign.target(r.criu)
	}
	if err == nil && pid != 0 {
		err = proc.rootedIn(pid)
	}
	var at string
	if err == nil {
		at, err = a.foreign.place(m.ImageDir)
	}
	var s sockets
	if err == nil {
		s, err = a.openSockets(app.Process.Namespace)
	}
	if err != nil {
		return failed(opCriu, app.Name, st.State, err)
	}
	r.dump = &snapshotRun{a: a, op: r.op, app: app, proc: proc, socks: s, engine: config.EngineCRIU, drain: app.Checkpoint.DrainTimeout.Std(),
		leftOut: map[string]bool{}, criu: r.criu, callers: at, id: newSnapshotID(time.Now())}
	return nil
}

// actDump carries out one action of a dump.
func (r *actionRun) actDump(c actionCall) (over bool, err error) {
	_, _, sealed := r.op.state()
	switch {
	case sealed && c.action == criu.NetUnlock: // it lets the tasks run on
		return r.endDump(nil)
	case sealed || c.action == criu.PreRestore || c.action == criu.PostRestore || c.action == criu.PreResume:
		return false, nil
	case c.action == criu.PreDump, c.action == criu.NetLock && r.dump.scope == nil:
		err = r.freeze()
	case c.action == criu.PostDump:
		err = r.seal(c.dir)
	case c.action == criu.NetUnlock:
		err = errors.New("CRIU gives the dump up; its log tells why")
	}
	if err != nil {
		return true, r.dump.rollBack(err)
	}
	return false, nil
}

// freeze holds the connections before the tasks are stopped.
func (r *actionRun) freeze() error {
	d := r.dump
	if err := d.intendImage(false); err != nil {
		return err
	}
	for _, step := range []func() error{d.announce, d.freeze, d.accepted} {
		if err := step(); err != nil {
			return err
		}
	}
	r.op.enter("dump")
	r.op.note("its connections are frozen, CRIU %d writes to %s", r.criu.pid, d.callers)
	return nil
}

// seal compares CRIU's images, in dir, with what the filter knows.
func (r *actionRun) seal(dir string) error {
	d := r.dump
	d.read = dir
	defer func() { d.read = "" }()
	if err := r.a.foreign.fit(dir); err != nil {
		return err
	}
	if err := d.scoped(); err != nil {
		return err
	}
	if err := d.prepare(); err != nil {
		return err
	}
	if err := d.sealImage(func() {}); err != nil {
		return err
	}
	r.op.note("its connections are held as %s once CRIU has ended the process", d.id)
	return nil
}

// endDump brings a dump to its end. Behind the seal that is CRIU's, which ends the tasks
// or lets them run on; cause is nil where CRIU has told that it does.
func (r *actionRun) endDump(cause error) (over bool, err error) {
	d := r.dump
	if _, _, sealed := r.op.state(); !sealed {
		select {
		case <-r.gone: // killed, it has left the sockets as they were then
			if _, err := r.runsOn(); err != nil {
				r.a.log.Error("the sockets may not work", "app", r.app.Name, "err", err)
			}
		default:
		}
		return true, d.rollBack(cause)
	}
	if cause != nil {
		select {
		case <-r.gone:
		case <-time.After(stopWait): // only where the agent is stopped
			r.op.handedOn = true
			return true, fmt.Errorf("%w; CRIU %d has its images and still runs, the next agent goes on", cause, r.criu.pid)
		}
		runsOn, err := r.runsOn()
		if err != nil {
			r.a.log.Error("CRIU has left the application in disorder", "app", r.app.Name, "runs", runsOn, "err", err)
		}
		if !runsOn {
			_, err := d.complete()
			return true, err
		}
	}
	refused, err := r.a.takeBack(r.op, r.app)
	switch {
	case err == nil:
		d.pending.discard()
		r.op.takeBack()
		r.a.log.Info("CRIU has let the application run on with its connections, there is no snapshot", "app", r.app.Name, "images", d.callers)
		return true, nil
	case refused: // its connections can be held alone
		r.a.log.Error("the application cannot go on after the dump, it is ended and its connections are held", "app", r.app.Name, "err", err)
		_, err := d.complete()
		return true, err
	}
	r.op.left = true
	return true, failed(opCriu, r.app.Name, "", noted(err, "; it is tried again"))
}

// runsOn tells whether a CRIU that has ended has left the application running.
func (r *actionRun) runsOn() (bool, error) {
	if r.dump.proc == nil { // an earlier agent has seen the last of it
		return false, nil
	}
	ctx, cancel := r.op.cleanup()
	defer cancel()
	return r.a.foreign.outcome(ctx, r.dump.proc)
}
