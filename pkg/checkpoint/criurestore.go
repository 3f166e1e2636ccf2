package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// beginRestore begins the operation of a CRIU that restores.
func (a *agent) beginRestore(ctx context.Context, app *config.App, ref criuRef, m *pb.AgentCriuActionRequest) (*actionRun, error) {
	if err := errors.Join(supported(opCriu, app), a.trusted(app)); err != nil {
		return nil, err
	}
	r, err := a.beginAction(app, ref)
	if err != nil {
		return nil, err
	}
	if err = r.prepareRestore(ctx, m); err != nil {
		r.err = err
		r.end()
		return nil, err
	}
	r.start()
	return r, nil
}

func (r *actionRun) prepareRestore(ctx context.Context, m *pb.AgentCriuActionRequest) error {
	a, app := r.a, r.app
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return err
	}
	switch {
	case st.State == control.StateBlockData:
		return refused(opCriu, app.Name, st.State, fmt.Sprintf("node %s has taken it over", st.TakenBy))
	case st.State != control.StateSnapshotDone:
		return refused(opCriu, app.Name, st.State, "a restore is allowed in SNAPSHOTDONE")
	case st.OldNode != "":
		return refused(opCriu, app.Name, st.State, fmt.Sprintf("it was taken over from node %s and not restored since; ckptctl restore does that", st.OldNode))
	}
	at, err := a.foreign.place(m.ImageDir)
	if err != nil {
		return failed(opCriu, app.Name, st.State, err)
	}
	mf, err := a.store.manifestOf(app.Name, st.SnapshotId)
	if err != nil {
		return failed(opCriu, app.Name, st.State, err)
	}
	if mf != nil && mf.Engine != config.EngineCRIU {
		return refused(opCriu, app.Name, st.State, fmt.Sprintf("its snapshot %s is none of CRIU; ckptctl restore brings it back", mf.ID))
	}
	if left, err := a.processOf(app); err != nil {
		return failed(opCriu, app.Name, st.State, err)
	} else if left != nil {
		return failed(opCriu, app.Name, st.State, fmt.Errorf("%s, which counts as the application's, still runs; end it first", left.describe()))
	}
	// Whoever ended a moment ago, and is not reaped, still has a number that CRIU needs;
	// any other has it tell so itself.
	_, _ = a.images.taken(m.ImageDir)
	s, err := a.openSockets(app.Process.Namespace)
	if errors.Is(err, os.ErrNotExist) { // CRIU makes it
		s, err, r.late = nil, nil, true
	}
	if err != nil {
		return failed(opCriu, app.Name, st.State, err)
	}
	r.restore = &restoreRun{a: a, op: r.op, app: app, id: st.SnapshotId, socks: s, manifest: &Manifest{App: app.Name, ID: st.SnapshotId, Engine: config.EngineCRIU, Images: at}}
	if err := r.intend(false); err != nil {
		return failed(opCriu, app.Name, st.State, err)
	}
	return nil
}

// intend records how far a restore is.
func (r *actionRun) intend(back bool) error {
	return r.a.intend(r.op, intent{SnapshotID: r.restore.id, CRIU: r.criu.pid, CRIUStart: r.criu.start, Images: r.restore.manifest.Images, Back: back})
}

// actRestore carries out one action of a restore.
func (r *actionRun) actRestore(c actionCall) (over bool, err error) {
	switch {
	case c.action == criu.PreRestore && r.late:
		r.op.enter("criu")
		r.op.note("CRIU %d restores it and makes its network namespace %s", r.criu.pid, r.app.Process.Namespace)
	case c.action == criu.PreRestore:
		err = r.beginHeld()
	case c.action == criu.PostRestore:
		err = r.back(c.pid)
	case c.action == criu.PreResume && r.restore.proc == nil:
		err = errors.New("CRIU has not called for post-restore, so that its processes are not known")
	case c.action == criu.PreResume:
		if err = r.restore.comeBack(); err == nil {
			r.a.hookRunning(r.app, r.restore.proc)
			r.op.note("its connections are open again")
			return true, nil
		}
	}
	if err != nil {
		return true, r.restore.rollBack(err)
	}
	return false, nil
}

// beginHeld tells the filter that the application comes back.
func (r *actionRun) beginHeld() error {
	clear := r.restore.clear
	if r.late { // what is in the new namespace was restored just now
		clear = r.restore.activateAll
	}
	for _, step := range []func() error{r.restore.place, r.restore.announce, clear} {
		if err := step(); err != nil {
			return err
		}
	}
	r.op.enter("criu")
	r.op.note("CRIU %d restores it from %s", r.criu.pid, r.restore.manifest.Images)
	return nil
}

// activateAll is clear where no old socket can be.
func (r *restoreRun) activateAll() error {
	info, err := r.a.connInfo(r.op.ctx, r.app.Name)
	if err != nil {
		return err
	}
	return r.activate(info)
}

// back looks what CRIU has made; the tasks stand still.
func (r *actionRun) back(pid int) (err error) {
	d := r.restore
	if err := r.a.foreign.made(r.criu, pid); err != nil {
		return err
	}
	if d.proc, err = r.a.launch.adopt(r.app, pid); err != nil {
		return err
	}
	r.a.setProcess(r.app.Name, d.proc)
	if err := d.proc.within(r.app.Process.Namespace); err != nil {
		return err
	}
	if r.late {
		if d.socks, err = r.a.openSockets(r.app.Process.Namespace); err != nil {
			return err
		}
		if err := r.beginHeld(); err != nil {
			return err
		}
		r.late = false
	}
	if err := d.socketsBack(); err != nil {
		return err
	}
	if err := r.intend(true); err != nil {
		return err
	}
	r.op.enter("criu")
	r.op.note("its connections are there again")
	return nil
}

// resumeAction goes on with what an earlier agent did for a CRIU that somebody else has
// started. While that runs its next action is waited for.
func (a *agent) resumeAction(op *operation, app *config.App, in *intent, st *pb.AppStatus, proc process) (did string, again func() error, err error) {
	op.enter("criu")
	ref := criuRef{in.CRIU, in.CRIUStart}
	if a.foreign.runs(ref) && in.Op != opAbort {
		a.mu.Lock()
		a.takingUp[app.Name] = true // until then a call of it waits
		a.mu.Unlock()
		return fmt.Sprintf("CRIU %d still runs, its next action is waited for", ref.pid), func() error { return a.takeUp(app, ref, in) }, nil
	}
	ctx, cancel := op.cleanup()
	defer cancel()
	if proc != nil {
		runsOn, err := a.foreign.outcome(ctx, proc)
		if err != nil {
			return "", nil, err
		}
		if !runsOn {
			proc = nil
		}
	}
	if st.State != control.StateRestoreStart {
		did, again, err = a.resumeSnapshot(op, app, in, st, proc)
		return did, again, err
	}
	if proc == nil || !in.Back || in.Op == opAbort {
		r := &restoreRun{a: a, op: op, app: app, proc: proc}
		if err := r.rollBack(errAborted); control.Info(err).GetState() != control.StateSnapshotDone {
			return "", nil, err
		}
		return "its restore was undone, CRIU had failed", nil, nil
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return "", nil, err
	}
	defer s.Close()
	r := &restoreRun{a: a, op: op, app: app, proc: proc, socks: s, id: in.SnapshotID, manifest: &Manifest{}}
	if err := r.comeBack(); err != nil {
		if !r.opened() {
			err = errors.Join(err, proc.stop(unix.SIGKILL, 0))
		}
		return "", nil, err
	}
	return "its connections are open again", nil, nil
}

// takeUp goes on with the operation of a CRIU that still runs.
func (a *agent) takeUp(app *config.App, ref criuRef, in *intent) error {
	defer func() {
		a.mu.Lock()
		delete(a.takingUp, app.Name)
		a.mu.Unlock()
	}()
	r, err := a.beginAction(app, ref)
	if err != nil {
		a.recoverLater(app.Name)
		return err
	}
	fail := func(err error) error {
		r.op.left = true
		a.finish(r.op, err)
		return err
	}
	r.op.intended = true
	ctx, cancel := r.op.cleanup()
	defer cancel()
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return fail(err)
	}
	proc, err := a.processOf(app)
	if err != nil {
		return fail(err)
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fail(err)
	}
	if err != nil {
		s = nil
	}
	if st.State == control.StateRestoreStart {
		r.restore = &restoreRun{a: a, op: r.op, app: app, id: in.SnapshotID, socks: s, proc: proc,
			manifest: &Manifest{App: app.Name, ID: in.SnapshotID, Engine: config.EngineCRIU, Images: in.Images}}
		r.start()
		return nil
	}
	r.dump = &snapshotRun{a: a, op: r.op, app: app, proc: proc, socks: s, engine: config.EngineCRIU, drain: app.Checkpoint.DrainTimeout.Std(),
		leftOut: map[string]bool{}, criu: ref, callers: in.Images, id: in.SnapshotID}
	if in.Sealed {
		if err := r.dump.prepare(); err != nil {
			return fail(err)
		}
		r.op.forward()
	}
	r.op.enter("dump")
	r.start()
	return nil
}
