package checkpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestUndoLeft(t *testing.T) {
	w, a := newWorld(t, 2)
	w.state, w.frozen = control.StateSnapshotFreeze, true
	a.recover(t.Context())
	wantRunning(t, w, control.StateRestored)
	w, a = newWorld(t, 2)
	w.state = control.StateRestoreStart
	r, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
	if err != nil || r.Msg.State != control.StateSnapshotDone || w.running {
		t.Errorf("%v, %v, running %v", r, err, w.running)
	}
	_, err = a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("nothing to abort: %v", err)
	}
}

// What a new agent makes of what it finds, whatever the earlier one was doing.
func TestResume(t *testing.T) {
	refused := control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotFreeze, "local sides have ended already", "L R")
	sealed := &intent{App: "redis", Op: opSnapshot, BootID: bootID(), Sealed: true, SnapshotID: "20261122T153000Z-1a2b3c"}
	for _, c := range []struct {
		name   string
		state  string
		in     *intent
		change func(w *world)
		after  string
		id     string // of the snapshot
		steps  string
	}{
		{name: "announced", state: control.StateSnapshotStart, after: control.StateRestored, steps: "SNAPSHOTABORT"},
		{name: "announced, gone", state: control.StateSnapshotStart, change: func(w *world) { w.running = false }, after: control.StateRestored, steps: "SNAPSHOTABORT"},
		{name: "frozen", state: control.StateSnapshotFreeze, change: func(w *world) { w.frozen = true }, after: control.StateRestored, steps: "SNAPSHOTABORT thaw"},
		{name: "frozen, gone", state: control.StateSnapshotFreeze, change: func(w *world) { w.running = false },
			after: control.StateSnapshotDone, steps: "INFO SEAL INFO SNAPSHOTDONE-force"},
		{name: "sealed, alive", state: control.StateSnapshotFreeze, in: sealed, change: func(w *world) { w.frozen = true },
			after: control.StateSnapshotDone, id: sealed.SnapshotID, steps: "INFO SEAL stop-SIGKILL SNAPSHOTDONE"},
		{name: "sealed, gone", state: control.StateSnapshotFreeze, in: sealed, change: func(w *world) { w.running = false },
			after: control.StateSnapshotDone, id: sealed.SnapshotID, steps: "INFO SEAL SNAPSHOTDONE"},
		{name: "too late to abort", state: control.StateSnapshotFreeze, change: func(w *world) { w.frozen = true; w.fail["SNAPSHOTABORT"] = refused },
			after: control.StateSnapshotDone, steps: "SNAPSHOTABORT INFO SEAL stop-SIGKILL INFO SNAPSHOTDONE-force"},
		{name: "half stored", state: control.StateSnapshotFreeze, in: sealed, change: func(w *world) { w.running = false; w.fail["SNAPSHOTDONE"] = refused },
			after: control.StateSnapshotDone, id: sealed.SnapshotID, steps: "INFO SEAL SNAPSHOTDONE SNAPSHOTDONE-force"},
		{name: "held, alive", state: control.StateSnapshotDone, after: control.StateSnapshotDone, steps: "stop-SIGKILL"},
		{name: "held, after a reboot", state: control.StateSnapshotDone, change: func(w *world) { w.running, w.vip[""] = false, false },
			after: control.StateSnapshotDone, steps: "vip+eth0"},
		{name: "restore wished for", state: control.StateSnapshotDone, in: &intent{App: "redis", Op: opRestore, BootID: bootID()}, change: func(w *world) { w.running, w.listening = false, false },
			after: control.StateRestored, steps: "RESTORESTART INFO list exec INFO list RESTORED"},
		{name: "restoring", state: control.StateRestoreStart, after: control.StateRestored,
			steps: "stop-SIGKILL RESTOREABORT RESTORESTART INFO list exec INFO list RESTORED"},
		{name: "discarding", state: control.StateSnapshotDone, in: &intent{App: "redis", Op: opStop, BootID: bootID(), Discard: true}, change: func(w *world) { w.running = false },
			after: "", steps: "UNREGISTER vip-eth0"},
		{name: "stopped by an earlier agent", state: control.StateConnected, change: func(w *world) { w.frozen = true }, after: control.StateConnected, steps: "thaw"},
		{name: "starting", state: "", in: &intent{App: "redis", Op: opStart, BootID: bootID()}, change: func(w *world) { w.running, w.listening, w.vip[""] = false, false, false },
			after: control.StateConnected, steps: "REGISTER vip+eth0 exec"},
		{name: "starting, before a reboot", state: "", in: &intent{App: "redis", Op: opStart, BootID: "another"}, change: func(w *world) { w.running, w.vip[""] = false, false },
			after: "", steps: ""},
		{name: "stopping", state: control.StateConnected, in: &intent{App: "redis", Op: opStop, BootID: bootID()}, after: "", steps: "stop-SIGKILL UNREGISTER vip-eth0"},
		{name: "stopped but for its address", state: "", in: &intent{App: "redis", Op: opStop, BootID: bootID()}, change: func(w *world) { w.running = false },
			after: "", steps: "vip-eth0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a := newWorld(t, 0)
			if c.in != nil {
				if err := a.intents.save(*c.in); err != nil {
					t.Fatal(err)
				}
			}
			w.state = c.state
			if c.change != nil {
				c.change(w)
			}
			a.recover(t.Context())
			a.wg.Wait()
			wantTrace(t, w, c.steps)
			if w.state != c.after || w.frozen || c.id != "" && w.id != c.id {
				t.Errorf("state %q, frozen %v, snapshot %q", w.state, w.frozen, w.id)
			}
			if in, err := a.intents.load("redis"); in != nil && in.BootID == bootID() || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
			if c.id != "" {
				if _, _, err := a.store.load("redis", c.id); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// The filter comes after the agent.
func TestResumeLater(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.frozen = control.StateSnapshotFreeze, true
	w.fail["STATUS"] = connect.NewError(connect.CodeUnavailable, errTest)
	a.recover(t.Context())
	if w.trace() != "" {
		t.Errorf("did %s without the filter", w.trace())
	}
	w.mu.Lock()
	delete(w.fail, "STATUS")
	w.mu.Unlock()
	a.wg.Wait()
	wantRunning(t, w, control.StateRestored)
}

// Clients that speak with the new process already keep it, also where the
// filter's answer was lost.
func TestRestoredButError(t *testing.T) {
	w, a := newWorld(t, 1)
	w.away()
	w.hook["RESTORED"] = func() {
		w.mu.Lock()
		w.state = control.StateRestored
		w.mu.Unlock()
	}
	w.fail["RESTORED"] = connect.NewError(connect.CodeInternal, errTest)
	_, err := a.restore(t.Context(), "redis", "")
	if err == nil || !strings.Contains(err.Error(), "open again") || control.Info(err).GetState() != control.StateRestored {
		t.Errorf("error %v", err)
	}
	wantRunning(t, w, control.StateRestored)
}

// A connection that is lost between the last look and the opening is brought
// back once more.
func TestOpenedAgain(t *testing.T) {
	w, a := newWorld(t, 1)
	w.away()
	w.fail["RESTORED"] = control.Error(connect.CodeFailedPrecondition, "redis", control.StateRestoreStart, "not re-established", "L R: local answered RST")
	tries := 0
	w.hook["RESTORED"] = func() {
		if tries++; tries == 2 {
			w.mu.Lock()
			delete(w.fail, "RESTORED")
			w.mu.Unlock()
		}
	}
	if _, err := a.restore(t.Context(), "redis", ""); err != nil || tries != 2 {
		t.Errorf("%d tries, %v", tries, err)
	}
	wantRunning(t, w, control.StateRestored)
}

// A process that an earlier agent left stopped runs when start has succeeded.
func TestStartThaws(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.frozen = "", true
	if _, err := a.start(t.Context(), "redis"); err != nil {
		t.Fatal(err)
	}
	wantRunning(t, w, control.StateConnected)
}

// stop --discard is the last resort, also in a snapshot that nobody carries on.
func TestStopDiscardsFrozen(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.running = control.StateSnapshotFreeze, false
	if _, err := a.Stop(t.Context(), connect.NewRequest(&pb.AgentStopRequest{App: "redis", Discard: true})); err != nil {
		t.Fatal(err)
	}
	if w.state != "" || w.vip[""] {
		t.Errorf("state %q, address there %v", w.state, w.vip[""])
	}
}

// An old pid_file, and one that its writer may not write for that process, do
// not make a stranger the application.
func TestPidFileOfStranger(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog()}
	stranger := exec.Command("/bin/sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer stranger.Wait()
	defer stranger.Process.Kill()
	app := shellApp("")
	app.Process.PidFile = filepath.Join(t.TempDir(), "pid")
	writeFile(t, app.Process.PidFile, strconv.Itoa(stranger.Process.Pid)+"\n")
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(app.Process.PidFile, old, old); err != nil {
		t.Fatal(err)
	}
	if p, err := l.find(app); p != nil || err != nil {
		t.Errorf("a process that is younger than the pid_file is the application: %v, %v", p, err)
	}
	if err := os.Chtimes(app.Process.PidFile, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(app.Process.PidFile, 1, 1); err != nil {
			t.Fatal(err)
		}
		if p, err := l.find(app); p != nil || err != nil {
			t.Errorf("another user's pid_file names root's process: %v, %v", p, err)
		}
		if err := os.Chown(app.Process.PidFile, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if p, err := l.find(app); p == nil || err != nil {
		t.Errorf("its own pid_file: %v, %v", p, err)
	}
}

// A process of which an agent could not write down the number is found by its
// mark.
func TestProcessMarked(t *testing.T) {
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		app := shellApp("sleep 1000")
		p := startShell(t, l, app)
		if err := saveRecord(l.stateDir, record{App: app.Name, BootID: bootID(), Mark: p.rec.Mark}); err != nil {
			t.Fatal(err)
		}
		found, err := (&osLauncher{stateDir: l.stateDir, log: l.log}).find(app)
		if err != nil || found == nil {
			t.Fatalf("not found: %v, %v", found, err)
		}
		if got := found.(*osProcess).rec; got.PID != p.rec.PID || got.StartTime != p.rec.StartTime || got.Cgroup != p.rec.Cgroup {
			t.Errorf("found %+v, want %+v", got, p.rec)
		}
		if err := found.stop(unix.SIGKILL, 0); err != nil {
			t.Error(err)
		}
		if err := saveRecord(l.stateDir, record{App: app.Name, BootID: bootID(), Mark: "nobody"}); err != nil {
			t.Fatal(err)
		}
		if p, err := l.find(app); p != nil || err != nil {
			t.Errorf("found %v, %v", p, err)
		}
	})
}
