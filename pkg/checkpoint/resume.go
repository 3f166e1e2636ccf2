package checkpoint

import (
	"context"
	"errors"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	// recoverFirst bounds the first look at the filter, before the agent serves.
	recoverFirst = 3 * time.Second
	// recoverAgain is the wait between looks for a filter that is not there;
	// after a failure it doubles up to recoverMost.
	recoverAgain = time.Second
	recoverMost  = time.Minute
)

// recover brings what an earlier agent left half done to its end, or undoes
// it. Applications of which the filter cannot be asked now are looked at as
// soon as it can.
func (a *agent) recover(ctx context.Context) {
	first, cancel := context.WithTimeout(ctx, recoverFirst)
	defer cancel()
	away := 0
	for _, app := range a.config().Apps {
		done, err := a.recoverApp(first, app)
		if !done {
			a.recoverLater(app.Name)
		}
		if !done && err == nil {
			away++
		}
	}
	if away > 0 {
		a.log.Warn("the filter is not there; what an earlier agent left is looked at when it is", "applications", away)
	}
}

// recoverLater looks at an application again until nothing is left half done.
func (a *agent) recoverLater(name string) {
	a.wg.Go(func() {
		for wait := recoverAgain; ; {
			select {
			case <-a.root.Done():
				return
			case <-time.After(wait):
			}
			app := a.config().Apps[name]
			if app == nil { // disabled; it is looked at when it is there again
				return
			}
			done, err := a.recoverApp(a.root, app)
			if done {
				return
			}
			if wait *= 2; err == nil {
				wait = recoverAgain
			}
			wait = min(wait, recoverMost)
		}
	})
}

// recoverApp brings one application's affairs to their end; look bounds the
// first look at the filter alone. done is false where it has to look again, with
// an error where something failed.
func (a *agent) recoverApp(look context.Context, app *config.App) (done bool, failure error) {
	if _, err := a.status(look, app.Name); err != nil {
		return false, nil
	}
	op, err := a.begin(a.root, app.Name, opRecover)
	if err != nil {
		return a.root.Err() != nil, nil // somebody is quicker; see again later
	}
	in, err := a.intents.load(app.Name)
	if err != nil {
		a.log.Error("an operation of an earlier agent is not known", "app", app.Name, "err", err)
	}
	did, again, err := a.resume(op, app, in)
	if errors.Is(err, errLater) {
		op.quiet, op.handedOn = true, true
		a.finish(op, nil)
		return false, nil
	}
	switch {
	case err != nil:
		a.log.Error("what an earlier agent left could not be brought to an end, it is tried again", "app", app.Name, "err", err)
	case did != "":
		a.log.Warn("an earlier agent ended in the middle of its work: "+did, "app", app.Name)
	}
	op.quiet, op.handedOn = did == "" && err == nil, again != nil
	a.finish(op, err)
	if again != nil && err == nil {
		a.wg.Go(func() {
			err := again()
			if err == nil {
				return
			}
			a.log.Error("what an earlier agent began failed", "app", app.Name, "err", err)
			if st, err := a.status(a.root, app.Name); err == nil && (st.State == control.StateBlockData || st.State == control.StateUnknown) {
				a.recoverLater(app.Name) // another node was quicker: what is recorded ends with what comes of that
			}
		})
	}
	return err == nil, err
}

// resume decides by the filter's state, the process and the intent how to go
// on with an application that nobody works on. did says what was done, ""
// where nothing was; again is what is to be begun anew afterwards.
func (a *agent) resume(op *operation, app *config.App, in *intent) (did string, again func() error, err error) {
	op.enter("look")
	ctx, cancel := op.cleanup()
	defer cancel()
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return "", nil, err
	}
	proc, err := a.processOf(app)
	if err != nil {
		return "", nil, err
	}
	if in == nil {
		in = &intent{App: app.Name}
	}
	if in.OldNode != "" {
		return a.resumeForeign(op, app, in, st, proc)
	}
	if in.Images != "" && in.BootID == bootID() &&
		(st.State == control.StateSnapshotStart || st.State == control.StateSnapshotFreeze || st.State == control.StateRestoreStart) {
		return a.resumeAction(op, app, in, st, proc)
	}
	switch st.State {
	case control.StateSnapshotStart, control.StateSnapshotFreeze:
		did, again, err = a.resumeSnapshot(op, app, in, st, proc)
		if err == nil && again == nil && in.Op == opMigrate && in.Ran {
			again = a.comeBack(app.Name)
		}
		return did, again, err
	case control.StateBlockData:
		return a.resumeHanded(in)
	case control.StateRestoreStart:
		return a.resumeRestore(op, app, in, proc)
	case control.StateSnapshotDone:
		return a.resumeHeld(op, app, in, proc)
	}
	return a.resumeRunning(op, app, in, st, proc)
}

// resumeSnapshot gives a snapshot up, or, where that is not possible any more,
// brings it to its end.
func (a *agent) resumeSnapshot(op *operation, app *config.App, in *intent, st *pb.AppStatus, proc process) (string, func() error, error) {
	if in.Temp != "" && proc != nil {
		op.enter("criu")
		if err := a.images.settle(op.ctx, in.CRIU, in.CRIUStart, proc); err != nil {
			return "", nil, err
		}
		if !proc.alive() {
			proc = nil
		}
	}
	half := in.Temp != "" && !in.Sealed                         // images that nobody can use, also where their process is gone
	if (!in.Sealed || in.Images != "") && proc != nil || half { // a caller's CRIU may let it run on
		refused, err := a.takeBack(op, app)
		if err == nil {
			return a.gaveUp(app, in, proc)
		}
		if !refused {
			return "", nil, err
		}
	}
	if st.State == control.StateSnapshotStart { // its process ended by itself
		_, err := a.takeBack(op, app)
		return "its snapshot was given up; the application does not run", nil, err
	}
	id, err := a.goForward(op, app, in, proc)
	if _, _, sealed := op.state(); err != nil && in.Sealed && proc != nil && !sealed { // that agent did not come to it
		if _, uerr := a.takeBack(op, app); uerr != nil {
			return "", nil, errors.Join(err, uerr)
		}
		did, again, uerr := a.gaveUp(app, in, proc)
		return did + ": " + err.Error(), again, uerr
	}
	return "its snapshot was brought to its end, the connections are held as " + id, nil, err
}

// gaveUp lets the application run on where the filter has taken its snapshot back; images
// of it are of no use then.
func (a *agent) gaveUp(app *config.App, in *intent, proc process) (did string, again func() error, err error) {
	a.store.drop(app.Name, in.Temp)
	if proc == nil {
		return "its snapshot was given up; the application does not run", nil, nil
	}
	return "its snapshot was given up and the application runs on", nil, proc.thaw()
}

// takeBack has the filter give a snapshot up; refused tells that it is too late
// for that. The filter comes before the process: after the seal what the
// application says is lost.
func (a *agent) takeBack(op *operation, app *config.App) (refused bool, err error) {
	op.enter("undo")
	ctx, cancel := op.cleanup()
	defer cancel()
	_, err = a.filter.SnapshotAbort(ctx, connect.NewRequest(&pb.AppRequest{App: app.Name}))
	return connect.CodeOf(err) == connect.CodeFailedPrecondition, filterError(err, app.Name, control.RequestSnapshotAbort)
}

// goForward completes a snapshot from the seal on; every step may be repeated.
func (a *agent) goForward(op *operation, app *config.App, in *intent, proc process) (string, error) {
	s, err := a.openSockets(app.Process.Namespace)
	switch {
	case err == nil:
		defer s.Close()
	case !errors.Is(err, os.ErrNotExist): // a namespace goes with its last process; nothing is looked at any more
		return "", err
	}
	r := &snapshotRun{a: a, op: op, app: app, proc: proc, socks: s, engine: in.engine(), force: in.Force || !in.Sealed, leftOut: map[string]bool{}, id: in.SnapshotID, earlier: in, temp: in.Temp, callers: in.Images}
	if err := r.prepare(); err != nil {
		return "", err
	}
	if in.Temp != "" || in.Images != "" { // SEAL may be repeated, and the images tell the same
		if err := r.sealAgain(); err != nil && in.Images == "" {
			return "", err
		} else if err != nil { // they may have been moved
			a.log.Error("the images cannot be compared with the connections once more, which are held all the same", "app", app.Name, "err", err)
			r.force = true
		}
	} else if err := r.seal(); err != nil {
		if proc != nil || connect.CodeOf(err) != connect.CodeFailedPrecondition {
			return "", err
		}
		r.force = true // nobody is left who could account for what is missing
	}
	reply, err := r.complete()
	if err != nil {
		st, serr := a.status(op.ctx, app.Name)
		if serr != nil || st.State != control.StateSnapshotDone || r.unstored {
			return "", err
		}
		a.log.Warn("the snapshot is complete, with something missing", "app", app.Name, "err", err)
		return st.SnapshotId, nil
	}
	return reply.SnapshotId, nil
}

// resumeRestore undoes a restore that no client has seen anything of, and
// begins it anew.
func (a *agent) resumeRestore(op *operation, app *config.App, in *intent, proc process) (string, func() error, error) {
	r := &restoreRun{a: a, op: op, app: app, proc: proc}
	if err := r.rollBack(errAborted); control.Info(err).GetState() != control.StateSnapshotDone {
		return "", nil, err
	}
	if in.Op == opAbort {
		return "its restore was undone", nil, nil
	}
	return "its restore is begun anew", a.comeBack(app.Name), nil
}

// resumeHeld sees that an application that is held is really gone and its
// addresses are there: after a reboot they are not.
func (a *agent) resumeHeld(op *operation, app *config.App, in *intent, proc process) (string, func() error, error) {
	did := ""
	if proc != nil {
		op.enter("kill")
		if err := proc.stop(unix.SIGKILL, 0); err != nil {
			return "", nil, err
		}
		a.setProcess(app.Name, nil)
		did = "its process, whose connections are held, was ended"
	}
	op.enter("address")
	u := &undo{op: op}
	if err := a.heldHere(u, app); err != nil {
		return did, nil, err
	}
	if err := a.storeLate(op, app, in, in.SnapshotID); err != nil {
		return did, nil, err
	}
	if did == "" && len(u.steps) > 0 {
		did = "its addresses are on the node again"
	}
	switch in.Op {
	case opMigrate:
		if in.Ran {
			return "its migration was given up, it is restored here", a.comeBack(app.Name), nil
		}
	case opRestore:
		return "its restore is begun anew", a.comeBack(app.Name), nil
	case opStop:
		if in.Discard {
			return "its stop is brought to its end", func() error {
				_, err := a.stop(a.root, app.Name, true)
				return err
			}, nil
		}
	}
	return did, nil, nil
}

// heldHere is heldVIPs unless another node has taken the application over since
// its state was looked at.
func (a *agent) heldHere(u *undo, app *config.App) error {
	a.yielding.Lock()
	defer a.yielding.Unlock()
	ctx, cancel := u.op.cleanup()
	defer cancel()
	st, err := a.status(ctx, app.Name)
	if err != nil || st.State == control.StateBlockData || st.State == control.StateUnknown {
		return err
	}
	return a.heldVIPs(u, app)
}

// heldVIPs puts the addresses of an application that is away on the node.
func (a *agent) heldVIPs(u *undo, app *config.App) error {
	if app.Process.Namespace != hostNamespace {
		return a.putOnNode(app)
	}
	return a.addVIPs(u, app)
}

// resumeRunning lets every process run on, and repeats a start or stop that was
// under way.
func (a *agent) resumeRunning(op *operation, app *config.App, in *intent, st *pb.AppStatus, proc process) (did string, again func() error, err error) {
	if proc != nil && in.Temp != "" && in.BootID == bootID() { // the filter, too, was started anew in the middle of a dump
		if err := a.images.settle(op.ctx, in.CRIU, in.CRIUStart, proc); err != nil {
			return "", nil, err
		}
	}
	if proc != nil {
		if err := proc.thaw(); err != nil {
			return "", nil, err
		}
		if st.State != control.StateUnknown {
			a.hookRunning(app, proc)
		}
	}
	if in.BootID != bootID() {
		return "", nil, nil // nothing of it is left
	}
	switch in.Op {
	case opStart:
		return "its start is repeated", func() error {
			_, err := a.start(a.root, app.Name)
			return err
		}, nil
	case opStop:
		return "its stop is brought to its end", func() error {
			_, err := a.stop(a.root, app.Name, in.Discard)
			return err
		}, nil
	}
	return "", nil, nil
}

// undoLeft takes back, at an operator's request, a snapshot or restore that
// nobody carries on.
func (a *agent) undoLeft(op *operation, app *config.App) (*pb.AgentReply, error) {
	ctx, cancel := op.cleanup()
	defer cancel()
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return nil, err
	}
	switch st.State {
	case control.StateSnapshotStart, control.StateSnapshotFreeze, control.StateRestoreStart:
	default:
		return nil, refused(opAbort, app.Name, st.State, "nothing is under way")
	}
	in, err := a.intents.load(app.Name)
	if err != nil {
		a.log.Error("an operation of an earlier agent is not known", "app", app.Name, "err", err)
	}
	if in == nil {
		in = &intent{App: app.Name}
	}
	in.Op = opAbort
	if _, _, err := a.resume(op, app, in); err != nil {
		return nil, failed(opAbort, app.Name, st.State, err)
	}
	after, err := a.status(ctx, app.Name)
	if err != nil {
		return nil, err
	}
	if st.State != control.StateRestoreStart && after.State == control.StateSnapshotDone {
		return nil, failed(opAbort, app.Name, after.State, errors.New(
			"it was too late, its process had ended or could not go on; its connections are held, ckptctl restore brings it back"))
	}
	return &pb.AgentReply{App: app.Name, State: after.State}, nil
}
