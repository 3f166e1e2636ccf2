package checkpoint

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// fakeImager plays CRIU: each of its steps is an event that can fail.
type fakeImager struct {
	w     *world
	owner string // of a process number that the images need
	why   string // memory is not tracked
}

func (f *fakeImager) dump(_ context.Context, _ *config.App, p process, r imageRun) error {
	if err := f.w.do("criu"); err != nil {
		return err
	}
	if err := r.began(procStat{pid: 99, start: 1}); err != nil {
		return err
	}
	if err := r.notify(criu.PreDump); err != nil {
		return err
	}
	for _, name := range []string{"files.img", "pages-1.img"} {
		if err := os.WriteFile(filepath.Join(r.images, name), []byte("octets of "+name), 0o600); err != nil {
			return err
		}
	}
	_ = os.WriteFile(filepath.Join(r.work, r.log), []byte("log"), 0o600)
	if err := f.w.do("images"); err != nil {
		return errors.New("criu dump failed: the telling line (its log is " + filepath.Join(r.work, r.log) + ")")
	}
	if err := r.notify(criu.PostDump); err != nil {
		return err
	}
	if err := f.w.do("killed"); err != nil { // CRIU itself, before it ends the tasks
		return err
	}
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	f.w.running, f.w.listening, f.w.socks = false, false, nil
	for _, c := range f.w.conns {
		c.State, c.Restorable, c.Image = control.ConnConnectRmt, true, true
	}
	return nil
}

func (f *fakeImager) preDump(context.Context, *config.App, process, imageRun) error {
	return f.w.do("pre-dump")
}

func (f *fakeImager) tracks(context.Context) string { return f.why }

func (f *fakeImager) restore(_ context.Context, _ *config.App, r imageRun, back func(process)) error {
	if err := f.w.do("make"); err != nil {
		return err
	}
	f.w.mu.Lock()
	f.w.running, f.w.listening = true, true
	for _, c := range f.w.conns {
		if f.w.lossy[c.Remote] == 0 {
			f.w.socks = append(f.w.socks, sock(c.Remote, sockdiag.Established))
		}
	}
	f.w.mu.Unlock()
	back(fakeProcess{f.w})
	for _, action := range []string{criu.PostRestore, criu.PreResume} {
		if err := r.notify(action); err != nil {
			f.w.mu.Lock()
			f.w.running, f.w.listening = false, false
			f.w.mu.Unlock()
			return err
		}
	}
	return f.w.do("resume")
}

func (f *fakeImager) follow(dir string) follower { return fakeFollower{f, dir} }

// fakeFollower has read nothing early.
type fakeFollower struct {
	f   *fakeImager
	dir string
}

func (fakeFollower) Stop()                                   {}
func (f fakeFollower) Sockets() ([]criu.Socket, error)       { return f.f.sockets(f.dir) }
func (fakeFollower) Sum(string, *unix.Stat_t) (string, bool) { return "", false }

func (f *fakeImager) sockets(string) (out []criu.Socket, err error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	for _, k := range f.w.socks {
		out = append(out, criu.Socket{Local: k.Local, Remote: k.Remote})
	}
	return out, f.w.fail["sockets"]
}

func (f *fakeImager) taken(string) (string, error) { return f.owner, nil }

func (f *fakeImager) settle(context.Context, int, uint64, process) error { return f.w.do("settle") }

// imagedWorld is a world whose application is dumped.
func imagedWorld(t *testing.T, n int) (*world, *agent, *fakeImager) {
	w, a := newWorld(t, n)
	f := &fakeImager{w: w}
	a.images = f
	a.cfg.Apps["redis"].Checkpoint.Engine = config.EngineCRIU
	return w, a, f
}

func without(trace string, events ...string) string {
	var out []string
	for _, e := range strings.Fields(trace) {
		drop := false
		for _, x := range events {
			drop = drop || strings.HasPrefix(e, x)
		}
		if !drop {
			out = append(out, e)
		}
	}
	return strings.Join(out, " ")
}

// TestImageSteps: what happens between the steps of CRIU, and in which order.
func TestImageSteps(t *testing.T) {
	w, a, _ := imagedWorld(t, 3)
	r, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
	if err != nil {
		t.Fatal(err)
	}
	got := without(w.trace(), "list", "sockets=", "INFO", "criu") // CRIU starts while the snapshot is announced
	if want := "SNAPSHOTSTART SNAPSHOTFREEZE images SEAL killed stop-SIGKILL SNAPSHOTDONE"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	m, _, err := a.store.check("redis", r.SnapshotId)
	if err != nil || m.Engine != config.EngineCRIU || m.Files["images/pages-1.img"] == "" {
		t.Errorf("%+v, %v", m, err)
	}
	if in, err := a.intents.load("redis"); in != nil || err != nil {
		t.Errorf("intent %+v, %v", in, err)
	}
	w.mu.Lock()
	w.events = nil
	w.mu.Unlock()
	if _, err := a.restore(t.Context(), "redis", ""); err != nil {
		t.Fatal(err)
	}
	if got, want := without(w.trace(), "list", "INFO", "destroy"), "RESTORESTART make RESTORECONN-image RESTORED resume"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

// TestImageDumpFails: up to the seal the process runs on, with nothing left behind but
// CRIU's log; behind it the snapshot goes forward.
func TestImageDumpFails(t *testing.T) {
	for event, c := range map[string]struct {
		text string
		log  bool
	}{
		"criu":           {text: "made to fail"},
		"SNAPSHOTSTART":  {text: "made to fail"},
		"SNAPSHOTFREEZE": {text: "made to fail"},
		"listeners":      {text: "made to fail"},
		"images":         {text: "failed-dump.log", log: true},
		"sockets":        {text: "the images: made to fail"},
		"SEAL":           {text: "made to fail"},
	} {
		t.Run(event, func(t *testing.T) {
			w, a, _ := imagedWorld(t, 2)
			w.setFail(event, errTest)
			_, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
			if err == nil || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "it was given up and the application runs on") {
				t.Errorf("%v", err)
			}
			w.mu.Lock()
			if !w.running || w.state != control.StateRestored && w.state != control.StateConnected {
				t.Errorf("running %v, state %s", w.running, w.state)
			}
			w.mu.Unlock()
			left, _ := filepath.Glob(filepath.Join(a.store.dir, "redis", "*20*"))
			if _, lerr := os.Stat(filepath.Join(a.store.dir, "redis", failedDump)); len(left) > 0 || (lerr == nil) != c.log {
				t.Errorf("left %v, log %v", left, lerr)
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("intent %+v, %v", in, err)
			}
		})
	}
	w, a, _ := imagedWorld(t, 2)
	w.setFail("killed", errTest)
	r, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
	if err != nil || w.running || w.state != control.StateSnapshotDone {
		t.Fatalf("behind the seal: %v, running %v, state %s", err, w.running, w.state)
	}
	if _, _, err := a.store.check("redis", r.SnapshotId); err != nil {
		t.Error(err)
	}
}

// TestImageAborted: whoever aborts, before the seal the dump is refused, behind it it is
// too late.
func TestImageAborted(t *testing.T) {
	for _, event := range []string{"criu", "SNAPSHOTFREEZE", "images"} {
		w, a, _ := imagedWorld(t, 2)
		aborted := make(chan error, 1)
		w.setHook(event, func() {
			w.setHook(event, nil)
			go func() {
				_, err := a.abort(context.Background(), "redis")
				aborted <- err
			}()
			_ = poll(t.Context(), pollFirst, pollFirst, func() (bool, error) {
				a.mu.Lock()
				defer a.mu.Unlock()
				return a.ops["redis"].ctx.Err() != nil, nil
			})
		})
		if _, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err == nil {
			t.Errorf("%s: the snapshot succeeds", event)
		}
		if err := <-aborted; err != nil || !w.running || w.state == control.StateSnapshotDone {
			t.Errorf("%s: %v, running %v, state %s", event, err, w.running, w.state)
		}
	}
}

// TestImageRestoreFails: its connections stay held, and it can be tried again.
func TestImageRestoreFails(t *testing.T) {
	image := func(a *agent, name string) string {
		ids, _ := a.store.ids("redis")
		return filepath.Join(a.store.dir, "redis", ids[0], imagesDir, name)
	}
	for name, c := range map[string]struct {
		text      string
		set, undo func(w *world, a *agent, f *fakeImager)
		made      bool // something was
	}{
		"damaged": {text: "does not have the checksum of the manifest",
			set: func(_ *world, a *agent, _ *fakeImager) {
				_ = os.WriteFile(image(a, "pages-1.img"), []byte("others"), 0o600)
			},
			undo: func(_ *world, a *agent, _ *fakeImager) {
				_ = os.WriteFile(image(a, "pages-1.img"), []byte("octets of pages-1.img"), 0o600)
			}},
		"missing": {text: "is missing",
			set:  func(_ *world, a *agent, _ *fakeImager) { _ = os.Rename(image(a, "files.img"), a.store.dir+"/x") },
			undo: func(_ *world, a *agent, _ *fakeImager) { _ = os.Rename(a.store.dir+"/x", image(a, "files.img")) }},
		"no snapshot": {text: "put that directory back",
			set: func(_ *world, a *agent, _ *fakeImager) {
				_ = os.Rename(filepath.Dir(image(a, "")), a.store.dir+"/x")
			},
			undo: func(_ *world, a *agent, _ *fakeImager) {
				w, _ := a.status(context.Background(), "redis")
				_ = os.Rename(a.store.dir+"/x", filepath.Join(a.store.dir, "redis", w.SnapshotId))
			}},
		"added": {text: "is not in the manifest",
			set:  func(_ *world, a *agent, _ *fakeImager) { _ = os.WriteFile(image(a, "x.img"), nil, 0o600) },
			undo: func(_ *world, a *agent, _ *fakeImager) { _ = os.Remove(image(a, "x.img")) }},
		"a link": {text: "is damaged",
			set:  func(_ *world, a *agent, _ *fakeImager) { _ = os.Symlink("/etc/passwd", image(a, "x.img")) },
			undo: func(_ *world, a *agent, _ *fakeImager) { _ = os.Remove(image(a, "x.img")) }},
		"a parent elsewhere": {text: "is no image of this snapshot",
			set:  func(_ *world, a *agent, _ *fakeImager) { _ = os.Symlink("/tmp", image(a, "parent")) },
			undo: func(_ *world, a *agent, _ *fakeImager) { _ = os.Remove(image(a, "parent")) }},
		"number taken": {text: "its process number 7 (sshd) is taken",
			set:  func(_ *world, _ *agent, f *fakeImager) { f.owner = "7 (sshd)" },
			undo: func(_ *world, _ *agent, f *fakeImager) { f.owner = "" }},
		"criu": {text: "made to fail",
			set:  func(w *world, _ *agent, _ *fakeImager) { w.setFail("make", errTest) },
			undo: func(w *world, _ *agent, _ *fakeImager) { w.setFail("make", nil) }},
		"a socket is not there": {text: "1 connections are not there again", made: true,
			set:  func(w *world, _ *agent, _ *fakeImager) { w.lossy[netip.AddrPortFrom(client, 20001).String()] = 1 },
			undo: func(w *world, _ *agent, _ *fakeImager) { clear(w.lossy) }},
		"not opened": {text: "made to fail", made: true,
			set:  func(w *world, _ *agent, _ *fakeImager) { w.setFail("RESTORED", errTest) },
			undo: func(w *world, _ *agent, _ *fakeImager) { w.setFail("RESTORED", nil) }},
	} {
		t.Run(name, func(t *testing.T) {
			w, a, f := imagedWorld(t, 3)
			if _, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
				t.Fatal(err)
			}
			c.set(w, a, f)
			_, err := a.restore(t.Context(), "redis", "")
			if err == nil || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "stay held") {
				t.Errorf("%v", err)
			}
			if w.running || w.state != control.StateSnapshotDone || strings.Contains(w.trace(), "make") != (c.made || name == "criu") {
				t.Errorf("running %v, state %s, %s", w.running, w.state, w.trace())
			}
			c.undo(w, a, f)
			w.mu.Lock()
			w.socks = nil
			w.mu.Unlock()
			if _, err := a.restore(t.Context(), "redis", ""); err != nil || !w.running || w.state != control.StateRestored {
				t.Errorf("once more: %v, running %v, state %s", err, w.running, w.state)
			}
		})
	}
}

// TestImagePreCopy: memory is written before where the kernel can tell what changes;
// otherwise, and where it fails, the notes say so and all is written at once.
func TestImagePreCopy(t *testing.T) {
	for name, c := range map[string]struct {
		why  string
		fail error
		note string
	}{"done": {}, "not tracked": {why: "no soft-dirty", note: "CONFIG_MEM_SOFT_DIRTY): no soft-dirty"}, "fails": {fail: errTest, note: "made to fail"}} {
		t.Run(name, func(t *testing.T) {
			w, a, f := imagedWorld(t, 1)
			a.cfg.Apps["redis"].Checkpoint.PreCopy = true
			f.why = c.why
			w.setFail("pre-dump", c.fail)
			if c.fail == nil {
				w.setFail("pre-dump", nil)
			}
			r, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
			if err != nil {
				t.Fatal(err)
			}
			if notes := strings.Join(r.Notes, "; "); c.note == "" && notes != "" || !strings.Contains(notes, c.note) {
				t.Errorf("notes %q", notes)
			}
			if strings.Contains(w.trace(), "pre-dump") != (c.why == "") {
				t.Errorf("%s", w.trace())
			}
			_, serr := os.Stat(filepath.Join(a.store.dir, "redis", r.SnapshotId, preImagesDir))
			if there := serr == nil; there != (c.note == "") {
				t.Errorf("directory of the pre-dump: %v", serr)
			}
			if _, err := a.restore(t.Context(), "redis", ""); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestImageNotStored: behind the seal the images are all there is. A store that fails then
// keeps them, nothing is started anew, and they get their name as soon as it can be given.
func TestImageNotStored(t *testing.T) {
	w, a, _ := imagedWorld(t, 2)
	way := notStored(t, w, a)
	if _, err := a.restore(t.Context(), "redis", ""); err == nil || !strings.Contains(err.Error(), "is not stored yet") {
		t.Errorf("%v", err)
	}
	if w.running || w.state != control.StateSnapshotDone {
		t.Errorf("running %v, state %s", w.running, w.state)
	}
	if err := os.Remove(way); err != nil {
		t.Fatal(err)
	}
	if _, err := a.restore(t.Context(), "redis", ""); err != nil || !w.running || w.state != control.StateRestored {
		t.Errorf("%v, running %v, state %s", err, w.running, w.state)
	}
	if _, _, err := a.store.check("redis", filepath.Base(way)); err != nil {
		t.Error(err)
	}
}
