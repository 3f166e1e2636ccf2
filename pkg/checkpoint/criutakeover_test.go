package checkpoint

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

const (
	leftID   = "20261122T153000Z-1a2b3c"
	leftTemp = "redis/.new-node-a@" + leftID + "-0badcafe"
)

// halfDumped is what an agent has left that was killed during a dump.
func halfDumped(t *testing.T, sealed bool) (w *world, a *agent, in intent) {
	t.Helper()
	w, a, _ = imagedWorld(t, 2)
	w.state = control.StateSnapshotFreeze
	in = intent{App: "redis", Op: opMigrate, Ran: true, ToNode: "node-b", Sealed: sealed, SnapshotID: leftID, Temp: leftTemp, CRIU: 99, CRIUStart: 1, BootID: bootID()}
	for _, name := range []string{"files.img", "pages-1.img"} {
		writeFile(t, filepath.Join(a.store.dir, leftTemp, imagesDir, name), "octets of "+name)
	}
	return w, a, in
}

// ended is the end of the application's process, of which its sockets say nothing.
func (w *world) ended() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running, w.listening, w.socks = false, false, nil
}

// TestImageTakeOver: an agent that goes on behind the seal says that it repeats SEAL, and
// what it cannot bring to its end at once stays known as it was, with its images.
func TestImageTakeOver(t *testing.T) {
	for _, event := range []string{"SEAL", "INFO", "SNAPSHOTDONE"} {
		t.Run(event, func(t *testing.T) {
			w, a, in := halfDumped(t, true)
			in.Op, in.Ran, in.ToNode = opSnapshot, false, ""
			w.ended()
			try(t, a.intents.save(in))
			w.setFail(event, connect.NewError(connect.CodeInternal, errTest))
			w.setFail(event+"-force", connect.NewError(connect.CodeInternal, errTest))
			a.recover(t.Context())
			was, err := a.intents.load("redis")
			if err != nil || was == nil || *was != in {
				t.Errorf("record %+v, %v, want %+v", was, err, in)
			}
			w.setFail(event, nil)
			w.setFail(event+"-force", nil)
			a.wg.Wait()
			m, _, err := a.store.check("redis", leftID)
			if err != nil || m.Engine != config.EngineCRIU || w.state != control.StateSnapshotDone || w.id != leftID {
				t.Errorf("%+v, %v, state %s of %s", m, err, w.state, w.id)
			}
			if len(w.seals) < 2 && event != "INFO" || slices.Contains(w.seals, false) {
				t.Errorf("SEAL repeats one: %v", w.seals)
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
		})
	}
}

// TestImageTakeOverMigration: a migration that ended behind the seal stays one in the
// record, whoever goes on dies.
func TestImageTakeOverMigration(t *testing.T) {
	w, a, in := halfDumped(t, true)
	w.ended()
	try(t, a.intents.save(in))
	w.setFail("SEAL", connect.NewError(connect.CodeInternal, errTest))
	w.setHook("SEAL", w.stopAgent)
	a.recover(t.Context())
	a.wg.Wait()
	if was, err := a.intents.load("redis"); err != nil || was == nil || *was != in {
		t.Errorf("record %+v, %v, want %+v", was, err, in)
	}
	if _, err := os.Stat(filepath.Join(a.store.dir, leftTemp, imagesDir, "files.img")); err != nil {
		t.Error(err)
	}
}

// TestImageFirstSeal repeats nothing.
func TestImageFirstSeal(t *testing.T) {
	w, a, _ := imagedWorld(t, 1)
	if _, err := snapshotOnce(t.Context(), a, false); err != nil || !slices.Equal(w.seals, []bool{false}) {
		t.Errorf("%v, SEAL repeats one: %v", err, w.seals)
	}
}

// inStore are the names in the application's place in the store.
func inStore(t *testing.T, a *agent) (names []string) {
	t.Helper()
	all, err := os.ReadDir(filepath.Join(a.store.dir, "redis"))
	if !errors.Is(err, os.ErrNotExist) {
		try(t, err)
	}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// TestImageTakeOverEnds: what an agent makes of a dump, wherever the one before it was
// killed. What nobody has sealed is given up, also where its process is gone, and leaves no
// images.
func TestImageTakeOverEnds(t *testing.T) {
	refused := control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotFreeze, "refused")
	for _, c := range []struct {
		name   string
		sealed bool
		change func(*world, *agent)
		after  string
		left   []string // in the store
	}{
		{"announced", false, func(w *world, _ *agent) { w.state = control.StateSnapshotStart }, control.StateRestored, nil},
		{"dumping", false, nil, control.StateRestored, nil},
		{"ended by itself", false, func(w *world, _ *agent) { w.ended() }, control.StateRestored, nil},
		{"too late to take back", false, func(w *world, _ *agent) { w.fail["SNAPSHOTABORT"] = refused }, control.StateSnapshotDone, []string{leftID}},
		{"sealed", true, nil, control.StateSnapshotDone, []string{leftID}},
		{"sealed, ended by CRIU", true, func(w *world, _ *agent) { w.ended() }, control.StateSnapshotDone, []string{leftID}},
		{"it has its name", true, func(w *world, a *agent) {
			w.ended()
			_ = os.Rename(filepath.Join(a.store.dir, leftTemp), filepath.Join(a.store.dir, "redis", leftID))
		}, control.StateSnapshotDone, []string{leftID}},
		{"it did not come to the seal", true, func(w *world, _ *agent) { w.fail["SEAL"] = refused }, control.StateRestored, nil},
		{"images that cannot be read", true, func(w *world, _ *agent) { w.fail["sockets"] = errTest }, control.StateRestored, nil},
		{"another engine meanwhile", true, func(_ *world, a *agent) { a.cfg.Apps["redis"].Checkpoint.Engine = config.EngineRestart },
			control.StateSnapshotDone, []string{leftID}},
		{"the filter was started anew", false, func(w *world, _ *agent) { w.state = control.StateConnected }, control.StateConnected, []string{filepath.Base(leftTemp)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, in := halfDumped(t, c.sealed)
			in.Op, in.Ran, in.ToNode = opSnapshot, false, ""
			if c.change != nil {
				c.change(w, a)
			}
			ran := w.running
			try(t, a.intents.save(in))
			a.recover(t.Context())
			a.wg.Wait()
			if w.state != c.after || w.running != (ran && c.after != control.StateSnapshotDone) {
				t.Errorf("state %s, running %v: %s", w.state, w.running, w.trace())
			}
			if ran && !strings.HasPrefix(w.trace(), "settle") {
				t.Errorf("CRIU was not looked at first: %s", w.trace())
			}
			if got := inStore(t, a); !slices.Equal(got, c.left) {
				t.Errorf("left %q, want %q", got, c.left)
			}
			if c.after == control.StateSnapshotDone {
				if m, _, err := a.store.check("redis", leftID); err != nil || m.Engine != config.EngineCRIU || w.id != leftID {
					t.Errorf("%+v, %v, the filter has %s", m, err, w.id)
				}
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
		})
	}
}

// TestTakeOverOtherEngine: a snapshot without images stays one, although the configuration
// has changed since.
func TestTakeOverOtherEngine(t *testing.T) {
	w, a, _ := imagedWorld(t, 2)
	w.state, w.frozen = control.StateSnapshotFreeze, true
	try(t, a.intents.save(intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: leftID}))
	a.recover(t.Context())
	a.wg.Wait()
	if m, _, err := a.store.check("redis", leftID); err != nil || m.Engine != config.EngineRestart || w.state != control.StateSnapshotDone {
		t.Errorf("%+v, %v, state %s", m, err, w.state)
	}
}

// TestImageEngineChanges: the configuration changes in the middle of a dump.
func TestImageEngineChanges(t *testing.T) {
	w, a, _ := imagedWorld(t, 2)
	w.setHook("images", func() { a.cfg.Apps["redis"].Checkpoint.Engine = config.EngineRestart })
	r, err := snapshotOnce(t.Context(), a, false)
	try(t, err)
	if m, _, err := a.store.check("redis", r.SnapshotId); err != nil || m.Engine != config.EngineCRIU || m.Files["images/files.img"] == "" {
		t.Errorf("%+v, %v", m, err)
	}
}

// TestImageRecordLeadsAway: a record that is damaged names another place, or no snapshot:
// nothing there is touched, and the application runs on where it can.
func TestImageRecordLeadsAway(t *testing.T) {
	victims := []string{"../outside", "nginx", "redis/" + leftID, "nginx/.new-node-a@x"}
	for name, change := range map[string]func(*intent){
		"a place outside":      func(in *intent) { in.Temp = "../outside" },
		"another application":  func(in *intent) { in.Temp = "nginx/.new-node-a@x" },
		"a snapshot":           func(in *intent) { in.Temp = "redis/" + leftID },
		"a place further down": func(in *intent) { in.Temp = "redis/.new-node-a/../../nginx" },
		"an ID that leads up":  func(in *intent) { in.SnapshotID = "../nginx" },
		"an ID that is none":   func(in *intent) { in.SnapshotID = ".." },
	} {
		for _, sealed := range []bool{true, false} {
			w, a, in := halfDumped(t, sealed)
			in.Op, in.Ran, in.ToNode = opSnapshot, false, ""
			for _, v := range victims {
				writeFile(t, filepath.Join(a.store.dir, v, imagesDir, "x"), "x")
			}
			change(&in)
			try(t, a.intents.save(in))
			a.recover(t.Context())
			a.wg.Wait()
			for _, v := range victims {
				_, merr := os.Stat(filepath.Join(a.store.dir, v, manifestFile))
				if all, err := os.ReadDir(filepath.Join(a.store.dir, v, imagesDir)); len(all) != 1 || !errors.Is(merr, os.ErrNotExist) {
					t.Errorf("%s, sealed %v: %s holds %v, %v, manifest %v", name, sealed, v, all, err, merr)
				}
			}
			wantRunning(t, w, control.StateRestored)
		}
	}
	// Where the process is gone the message says what to do.
	w, a, in := halfDumped(t, true)
	in.SnapshotID = "../nginx"
	w.ended()
	try(t, a.intents.save(in))
	_, err := a.recoverApp(t.Context(), a.cfg.Apps["redis"])
	if err == nil || !strings.Contains(err.Error(), `names snapshot "../nginx", which is the name of none; put `+a.intents.path("redis")+" right") {
		t.Errorf("%v", err)
	}
}

// TestImageTrust: whoever can write images decides what root runs.
func TestImageTrust(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		path string
		mode os.FileMode
		uid  int
	}{
		"the images": {imagesDir, 0o777, 0}, "an image": {"images/pages-1.img", 0o622, 0},
		"another's image": {"images/pages-1.img", 0o600, stranger}, "another's images": {imagesDir, 0o700, stranger},
	} {
		t.Run(name, func(t *testing.T) {
			w, a, _ := imageAway(t, 1)
			path := filepath.Join(a.store.dir, "redis", w.id, c.path)
			try(t, os.Chmod(path, c.mode))
			try(t, os.Chown(path, c.uid, -1))
			_, err := a.restore(t.Context(), "redis", "")
			if err == nil || !strings.Contains(err.Error(), path+" ") || !strings.Contains(err.Error(), "chmod go-w") && !strings.Contains(err.Error(), "chown") {
				t.Errorf("%v", err)
			}
			if w.running || w.state != control.StateSnapshotDone || strings.Contains(w.trace(), "make") {
				t.Errorf("running %v, state %s: %s", w.running, w.state, w.trace())
			}
			try(t, os.Chmod(path, 0o700))
			try(t, os.Chown(path, 0, -1))
			_, err = a.restore(t.Context(), "redis", "")
			try(t, err)
		})
	}
}

// TestImageKill: what CRIU has left of the process is not told to end: what it did then the
// one in the images would do again.
func TestImageKill(t *testing.T) {
	w, a, _ := imagedWorld(t, 1)
	a.cfg.Apps["redis"].Process.StopSignal = "SIGTERM"
	w.setFail("killed", errTest)
	_, err := snapshotOnce(t.Context(), a, false)
	try(t, err)
	if got := w.trace(); !strings.Contains(got, "stop-SIGKILL") || strings.Contains(got, "stop-SIGTERM") {
		t.Error(got)
	}
}
