package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Engine "criu": the process is dumped with its memory and sockets.
//
//	CRIU starts
//	pre-dump     SNAPSHOTSTART, SNAPSHOTFREEZE: the silent seal, before a task is stopped
//	             CRIU stops the tasks and writes the images
//	post-dump    SEAL with the numbers of the images, or the tasks run on
//	             CRIU ends the tasks: sockets in repair mode say nothing
//	             SNAPSHOTDONE
//
// and back:
//
//	             RESTORESTART, the VIPs
//	post-restore RESTORECONN "image", or all of it is ended
//	pre-resume   RESTORED: the sockets work, the tasks stand still

// runImage takes a snapshot with images. Up to the seal everything can be taken back.
func (r *snapshotRun) runImage() (*pb.AgentSnapshotReply, error) {
	if err := r.prepareImage(); err != nil {
		return nil, r.rollBack(err)
	}
	r.op.enter("criu")
	// While CRIU starts: rules are written and every connection begins to be learned.
	announced := make(chan error, 1)
	r.a.wg.Go(func() { announced <- r.announce() })
	r.announced = sync.OnceValue(func() error { return <-announced })
	err := r.a.images.dump(r.op.ctx, r.app, r.proc, imageRun{
		images: r.imagesAt(), work: r.pending.dir(), log: dumpLog, parent: r.parent,
		began:  func(st procStat) error { r.criu = criuRef{st.pid, st.start}; return r.intendImage(false) },
		notify: r.dumping,
	})
	if aerr := r.announced(); !errors.Is(err, aerr) { // it has ended, or it would begin behind the end
		err = errors.Join(err, aerr)
	}
	if r.written != nil {
		r.written.Stop()
	}
	_, _, sealed := r.op.state()
	if err == nil && !sealed {
		err = errors.New("CRIU has ended without asking whether it may end the process")
	}
	if !sealed {
		return nil, r.rollBack(r.withLog(err))
	} else if err != nil { // the images are whole: what still runs of it is ended
		r.a.log.Warn("CRIU failed behind the seal, the images are whole", "app", r.app.Name, "err", err)
	}
	return r.complete()
}

// withLog leaves CRIU's log where the error says.
func (r *snapshotRun) withLog(err error) error {
	at := filepath.Join(r.pending.dir(), dumpLog)
	if !strings.Contains(err.Error(), at) {
		return err
	}
	if kept := r.pending.keepLog(); kept != "" {
		return errors.New(strings.ReplaceAll(err.Error(), at, kept))
	}
	return err
}

// intendImage records how far the dump is: an agent that takes over looks at the
// process that writes it first.
func (r *snapshotRun) intendImage(sealed bool) error {
	in := intent{Sealed: sealed, SnapshotID: r.id, Force: r.force, CRIU: r.criu.pid, CRIUStart: r.criu.start, Images: r.callers}
	if r.callers == "" {
		in.Temp = r.pending.temp
	}
	return r.intend(in)
}

// imagesAt is where the images are.
func (r *snapshotRun) imagesAt() string {
	return cmp.Or(r.read, r.callers, filepath.Join(r.pending.dir(), imagesDir))
}

// prepareImage makes the place of the snapshot.
func (r *snapshotRun) prepareImage() error {
	r.info = &pb.ConnInfoReply{} // it is written again when they are known
	if err := r.prepare(); err != nil {
		return err
	}
	// Where others can write nothing could be restored from: see trustedImages.
	if err := r.a.trustedFile(r.app, r.pending.dir()); err != nil {
		return err
	}
	if err := r.pending.makeImages(imagesDir); err != nil {
		return err
	}
	if r.app.Checkpoint.PreCopy {
		return r.preCopy()
	}
	return nil
}

// preCopy has the memory written while the process runs on, where the kernel can tell what
// changes behind that: only this is written while it stands still.
func (r *snapshotRun) preCopy() error {
	r.op.enter("pre-copy")
	without := func(why string) {
		r.notes = append(r.notes, "checkpoint.pre_copy: "+why+"; the process stood still while all of its memory was written")
		r.a.log.Warn("no pre-copy", "app", r.app.Name, "why", why)
	}
	if why := r.a.images.tracks(r.op.ctx); why != "" {
		without("this kernel does not track which memory changes (CONFIG_MEM_SOFT_DIRTY): " + why)
		return context.Cause(r.op.ctx)
	}
	if err := r.pending.makeImages(preImagesDir); err != nil {
		return err
	}
	err := r.a.images.preDump(r.op.ctx, r.app, r.proc, imageRun{
		images: filepath.Join(r.pending.dir(), preImagesDir), work: r.pending.dir(), log: preDumpLog})
	if err != nil { // it is written whole then
		without(err.Error())
		return errors.Join(context.Cause(r.op.ctx), r.pending.dropImages(preImagesDir))
	}
	r.parent = "../" + preImagesDir
	return nil
}

// dumping is called by CRIU.
func (r *snapshotRun) dumping(action string) error {
	switch action {
	case criu.PreDump:
		for _, step := range []func() error{r.announced, r.freeze, r.accepted} {
			if err := step(); err != nil {
				return err
			}
		}
		r.op.enter("dump")
		r.written = r.a.images.follow(r.imagesAt())
		r.pending.early = r.written
	case criu.PostDump:
		r.pending.writeOut()
		r.written.Stop()
		var summed <-chan error // while the filter compares them
		if err := r.sealImage(func() { summed = r.pending.sumImages() }); err != nil {
			return err
		}
		r.finishImages(summed) // while CRIU ends the tasks
	}
	return nil
}

// finishImages writes the rest of the snapshot while the caller does other things.
func (r *snapshotRun) finishImages(summed <-chan error) {
	done := make(chan error, 1)
	r.finished = done
	r.a.wg.Go(func() {
		ctx, cancel := r.op.cleanup()
		defer cancel()
		done <- r.pending.finishImages(summed, func() (*pb.ConnInfoReply, error) { return r.a.connInfo(ctx, r.app.Name) })
	})
}

// accepted waits until the application has taken the connections that its kernel has
// accepted for it: they are not the process's before, and in no image.
func (r *snapshotRun) accepted() error {
	late := errors.New("time-out")
	ctx, cancel := context.WithTimeoutCause(r.op.ctx, min(r.drain, time.Second), late)
	defer cancel()
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		ls, err := r.socks.Listeners(r.app.VIPs, nil)
		if err != nil {
			return false, err
		}
		return !slices.ContainsFunc(ls, func(l sockdiag.Socket) bool { return l.RecvQ > 0 }), nil
	})
	if errors.Is(err, late) {
		return nil // SEAL tells what would be lost
	}
	return err
}

// sealImage compares the images with what the filter knows; from here the snapshot
// goes forward. read is called when it has read them.
func (r *snapshotRun) sealImage(read func()) error {
	r.op.enter("compare")
	sockets := func() ([]criu.Socket, error) { return r.a.images.sockets(r.imagesAt()) }
	if r.written != nil {
		sockets = r.written.Sockets
	}
	socks, err := sockets()
	if err != nil {
		return fmt.Errorf("the images: %w", err)
	}
	read()
	req := &pb.SealRequest{App: r.app.Name, Again: r.earlier != nil}
	for i := range socks {
		k := &socks[i]
		if !slices.Contains(r.app.VIPs, k.Local.Addr()) || r.scope.sameHost(sockdiag.Socket{Local: k.Local, Remote: k.Remote}) {
			continue
		}
		req.Image = append(req.Image, r.imageMessage(k))
	}
	r.op.note("%d connections", len(req.Image))
	r.op.enter("seal")
	if err := r.intendImage(true); err != nil {
		return err
	}
	if err := r.op.commit(); err != nil {
		return err
	}
	ctx, cancel := r.op.cleanup()
	defer cancel()
	if _, err = r.a.filter.Seal(ctx, connect.NewRequest(req)); err != nil {
		r.op.takeBack()
		return errors.Join(filterError(err, r.app.Name, control.RequestSeal), r.intendImage(false))
	}
	r.op.enter("kill")
	return nil
}

func (r *snapshotRun) imageMessage(k *criu.Socket) *pb.ImageSocket {
	return &pb.ImageSocket{
		Local: k.Local.String(), Remote: k.Remote.String(), Passive: r.scope.passive(sockdiag.Socket{Local: k.Local}),
		LocalClosed: k.LocalClosed, RemoteClosed: k.RemoteClosed,
		RcvNxt: k.RcvNxt, SndUna: k.SndUna, SndNxt: k.SndNxt, Unread: k.Unread,
		OptTimestamps: k.Timestamps, OptSack: k.SACK, OptWscale: k.WScale, OptEcn: k.ECN,
		SndWscale: uint32(k.SndWScale), RcvWscale: uint32(k.RcvWScale), Tsval: k.TSVal, Mss: k.MSS,
		RemoteWindow: k.SndWnd, LocalWindow: k.RcvWnd, LocalWup: k.RcvWup,
	}
}

// image finds out whether what is restored has images, and begins to look whether they
// are whole.
func (r *restoreRun) image() error {
	if err := r.a.callersImages(r.app.Name, r.id); err != nil {
		return err
	}
	m, err := r.a.store.imagesOf(r.app.Name, r.id)
	if err != nil || m == nil {
		return err // clear tells where connections are in the middle of what only images know
	}
	r.manifest = m
	r.whole = make(chan error, 1)
	r.a.wg.Go(func() { r.whole <- r.trustedImages() })
	return nil
}

// noImages is the error of a restore that would start the application anew although its
// connections are in the middle of what another process knows.
func (r *restoreRun) noImages() error {
	return fmt.Errorf("its process is to be made again from the images of snapshot %s, and they are not in %s; put that directory back from another copy or give the application up (ckptctl stop %s --discard)",
		r.id, r.imagesDir(), r.app.Name)
}

// imagesDir is where the images are.
func (r *restoreRun) imagesDir() string {
	return filepath.Join(r.a.store.dir, r.app.Name, r.id, imagesDir)
}

// trustedImages tells why the processes in the images are not to be made: whoever can
// write there runs as root.
func (r *restoreRun) trustedImages() error {
	if err := r.a.store.checkImages(r.op.ctx, r.manifest); err != nil {
		return err
	}
	at := filepath.Dir(r.imagesDir())
	if err := r.a.trustedFile(r.app, filepath.Join(at, manifestFile)); err != nil {
		return err
	}
	for _, d := range imageDirs {
		if err := imagesOurs(filepath.Join(at, d)); err != nil && (d != preImagesDir || !errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// launchImage has CRIU make the processes again, and opens the connections before they
// go on.
func (r *restoreRun) launchImage() error {
	r.op.enter("check")
	select {
	case err := <-r.whole:
		if err != nil {
			return err
		}
	case <-r.op.ctx.Done(): // the reading ends with it
		return context.Cause(r.op.ctx)
	}
	if who, err := r.a.images.taken(r.imagesDir()); err != nil {
		return err
	} else if who != "" {
		return fmt.Errorf("its process number %s is taken by another process on this node; end that, or restore it on another node (ckptctl restore %s --to NODE)", who, r.app.Name)
	}
	if err := notTaken(r.socks, r.app); err != nil {
		return err
	}
	asked := make(chan error, 1)
	r.a.wg.Go(func() { asked <- r.askRemotes() })
	r.op.enter("criu")
	err := r.a.images.restore(r.op.ctx, r.app, imageRun{
		images: r.imagesDir(), work: filepath.Dir(r.imagesDir()), log: fmt.Sprintf(restoreLogs, cmp.Or(r.a.config().Node.Name, "node")),
		notify: r.restoring,
	}, func(p process) {
		r.proc = p
		r.a.setProcess(r.app.Name, p)
	})
	if err == nil && !r.opening {
		err = errors.New("CRIU has ended without telling that the process is there again")
	}
	return errors.Join(err, r.lost, <-asked)
}

// restoring is called by CRIU.
func (r *restoreRun) restoring(action string) error {
	switch action {
	case criu.PostRestore:
		return r.socketsBack()
	case criu.PreResume:
		err := r.comeBack()
		if err != nil && r.opened() { // its end would be the end of what clients speak with
			r.lost, err = err, nil
		}
		return err
	}
	return nil
}

// openedPatience is how long the filter is asked whether it has opened the connections of
// a restore where the answer to RESTORED was lost.
const openedPatience = 3 * time.Second

// opened tells whether clients may speak with the new process although opening the
// connections has failed: the filter says so, or cannot be asked.
func (r *restoreRun) opened() bool {
	if !r.opening {
		return false
	}
	ctx, cancel := r.op.cleanup()
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, openedPatience)
	defer cancel()
	state := control.StateRestored
	_ = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		st, err := r.a.status(ctx, r.app.Name)
		if err == nil {
			state = st.State
		}
		return err == nil, nil
	})
	return state == control.StateRestored
}

// socketsBack tells the filter which sockets are there again. One that is missing
// would leave its client held for ever.
func (r *restoreRun) socketsBack() error {
	r.op.enter("sockets")
	info, err := r.a.connInfo(r.op.ctx, r.app.Name)
	if err != nil {
		return err
	}
	socks, err := r.socks.List(sockdiag.Query{Local: r.app.VIPs})
	if err != nil {
		return err
	}
	there := make(map[string]bool, len(socks))
	for _, k := range socks {
		there[pairName(k.Local.String(), k.Remote.String())] = k.State != sockdiag.TimeWait
	}
	var ids []*pb.ConnID
	var missing []string
	for _, c := range info.Conns {
		switch {
		case !c.Image:
		case there[socketName(c)]:
			ids = append(ids, &pb.ConnID{Local: c.Local, Remote: c.Remote})
		default:
			missing = append(missing, pairName(c.Local, c.Remote))
		}
	}
	if len(missing) > 0 {
		return control.Error(connect.CodeFailedPrecondition, r.app.Name, "",
			fmt.Sprintf("%d connections are not there again although CRIU has restored their process: %s", len(missing), named(missing)), missing...)
	}
	r.op.note("%d connections", len(ids))
	if len(ids) == 0 {
		return nil
	}
	return r.restoreConn(ids, control.KindImage)
}

// engine names what a snapshot of the application is taken with.
func engine(app *config.App) string { return cmp.Or(app.Checkpoint.Engine, config.EngineRestart) }

// scoped finds which connections are the application's, where nobody has done so before.
func (r *snapshotRun) scoped() error {
	if r.scope != nil {
		return nil
	}
	var ls []sockdiag.Socket
	var err error
	if r.socks != nil {
		if ls, err = r.socks.Listeners(r.app.VIPs, nil); err != nil {
			return err
		}
	}
	r.scope, err = r.a.newScope(r.op.ctx, r.app, ls)
	return err
}

// sealAgain repeats, for an agent that died behind the seal, what the images tell. The
// filter compares them only where that agent's request has not reached it.
func (r *snapshotRun) sealAgain() error {
	if err := r.scoped(); err != nil {
		return err
	}
	return r.sealImage(func() {})
}
