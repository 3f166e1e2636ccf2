package checkpoint

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// What is brought to its end may take longer than the first look at the filter.
func TestResumeOutlastsFirstLook(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.frozen = control.StateSnapshotFreeze, true
	sealed := intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: "20261122T153000Z-1a2b3c"}
	if err := a.intents.save(sealed); err != nil {
		t.Fatal(err)
	}
	slow := true
	w.hook["INFO"] = func() {
		if slow {
			slow = false
			time.Sleep(recoverFirst + 100*time.Millisecond)
		}
	}
	a.recover(t.Context())
	a.wg.Wait()
	if w.state != control.StateSnapshotDone || w.frozen {
		in, _ := a.intents.load("redis")
		t.Errorf("state %s, frozen %v, record %+v: %s", w.state, w.frozen, in, w.trace())
	}
}

// What cannot be brought to its end now is tried again, and not forgotten.
func TestResumeTriedAgain(t *testing.T) {
	sealed := &intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: "20261122T153000Z-1a2b3c"}
	wished := &intent{App: "redis", Op: opRestore}
	for _, c := range []struct {
		name, state, fail, after string
		in                       *intent
	}{
		{"sealed", control.StateSnapshotFreeze, "SEAL", control.StateSnapshotDone, sealed},
		{"not sealed", control.StateSnapshotFreeze, "SNAPSHOTABORT", control.StateRestored, nil},
		{"restoring", control.StateRestoreStart, "RESTOREABORT", control.StateRestored, wished},
		{"restore wished for", control.StateSnapshotDone, "vip+eth0", control.StateRestored, wished},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a := newWorld(t, 0)
			w.state, w.frozen = c.state, c.state == control.StateSnapshotFreeze
			if c.state == control.StateSnapshotDone {
				w.running, w.listening, w.vip[""] = false, false, false
			}
			if c.in != nil {
				if err := a.intents.save(*c.in); err != nil {
					t.Fatal(err)
				}
			}
			w.fail[c.fail] = connect.NewError(connect.CodeInternal, errTest)
			a.recover(t.Context())
			if in, err := a.intents.load("redis"); c.in != nil && (in == nil || in.Op != c.in.Op && !in.Sealed) {
				t.Errorf("the record is gone: %+v, %v", in, err)
			}
			w.mu.Lock()
			delete(w.fail, c.fail)
			w.mu.Unlock()
			within(t, "brought to its end", func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				return w.state == c.after && !w.frozen
			})
			a.wg.Wait()
		})
	}
}

// What a living agent could not take back is taken back as soon as it can.
func TestUndoneLater(t *testing.T) {
	w, a := newWorld(t, 2)
	w.fail["before"], w.fail["SNAPSHOTABORT"] = errTest, connect.NewError(connect.CodeInternal, errTest)
	if _, err := snapshotOnce(t.Context(), a, false); err == nil {
		t.Fatal("no error")
	}
	w.mu.Lock()
	delete(w.fail, "SNAPSHOTABORT")
	w.mu.Unlock()
	within(t, "taken back", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.state == control.StateRestored
	})
}

// Success of abort means that it was taken back.
func TestAbortTellsWhatBecame(t *testing.T) {
	w, a := newWorld(t, 2)
	aborted := make(chan error, 1)
	w.fail["SNAPSHOTABORT"] = connect.NewError(connect.CodeInternal, errTest)
	w.hook["before"] = func() {
		a.mu.Lock()
		o := a.ops["redis"]
		a.mu.Unlock()
		go func() {
			_, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
			aborted <- err
		}()
		<-o.ctx.Done()
	}
	_, _ = snapshotOnce(t.Context(), a, false)
	if err := <-aborted; err == nil {
		t.Error("abort succeeded and the application is in SNAPSHOTFREEZE")
	}
}

// An operator's abort does not stop an agent that brings a sealed snapshot to
// its end half-way.
func TestAbortOfRecover(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.frozen = control.StateSnapshotFreeze, true
	if err := a.intents.save(intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: "20261122T153000Z-1a2b3c"}); err != nil {
		t.Fatal(err)
	}
	aborted := make(chan error, 1)
	once := true
	w.hook["INFO"] = func() {
		if !once {
			return
		}
		once = false
		go func() {
			_, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
			aborted <- err
		}()
		time.Sleep(100 * time.Millisecond)
	}
	a.recover(t.Context())
	if err := <-aborted; err == nil || w.state != control.StateSnapshotDone || w.frozen {
		t.Errorf("abort %v, state %s, frozen %v", err, w.state, w.frozen)
	}
}

// A stop that got as far as the filter can be repeated.
func TestStopRepeated(t *testing.T) {
	w, a := newWorld(t, 0)
	w.fail["vip-eth0"] = errTest
	if _, err := a.stop(t.Context(), "redis", false); err == nil {
		t.Fatal("no error")
	}
	delete(w.fail, "vip-eth0")
	w.vip[""] = true // it was not removed
	if _, err := a.stop(t.Context(), "redis", false); err != nil || w.vip[""] {
		t.Errorf("the VIP stays %v: %v", w.vip[""], err)
	}
}

// A start that an earlier agent began and that fails now leaves nothing.
func TestStartOfEarlierAgentUndone(t *testing.T) {
	w, a := newWorld(t, 0)
	w.state, w.running, w.listening, w.vip[""] = "", false, false, false
	writeFile(t, a.intents.path("redis"), `{"app":"redis","op":"start","fresh":true,"boot_id":"`+bootID()+`"}`)
	w.state, w.vip[""] = control.StateConnected, true // killed where the process is started
	w.fail["exec"] = errTest
	b := a
	b.recover(t.Context())
	b.wg.Wait()
	if w.state != "" || w.vip[""] {
		t.Errorf("state %q, VIP on the node %v: %s", w.state, w.vip[""], w.trace())
	}
}

// Connections that the filter knows are told, also when the configuration has
// been changed since so that new ones are left alone: one that is not told is
// forgotten with its translation.
func TestAdoptTellsKnown(t *testing.T) {
	w, a := newWorld(t, 2)
	w.state = control.StateRestored
	a.cfg.Cluster.Filter.ExcludeAddresses = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	if _, err := a.adopt(t.Context(), a.cfg.Apps["redis"]); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(w.trace(), "sockets=2") {
		t.Error(w.trace())
	}
}

// A stray file in the snapshot directory is not an application.
func TestStoreStrayFile(t *testing.T) {
	_, a := newWorld(t, 2)
	if _, err := snapshotOnce(t.Context(), a, false); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(a.store.dir, ".nfs0001"), "")
	r, err := a.Snapshots(t.Context(), connect.NewRequest(&pb.AgentSnapshotsRequest{}))
	if err != nil || len(r.Msg.Snapshots) != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

// A pid_file that its writer has made a link or a pipe names nobody.
func TestPidFileOfLink(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog()}
	stranger := exec.Command("/bin/sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer stranger.Wait()
	defer stranger.Process.Kill()
	app := shellApp("")
	theirs := filepath.Join(t.TempDir(), "sshd.pid")
	writeFile(t, theirs, strconv.Itoa(stranger.Process.Pid)+"\n")
	app.Process.PidFile = filepath.Join(t.TempDir(), "redis.pid")
	if err := os.Symlink(theirs, app.Process.PidFile); err != nil {
		t.Fatal(err)
	}
	if p, err := l.find(app); p != nil || err == nil {
		t.Errorf("a link to another program's pid_file: %v, %v", p, err)
	}
	_ = os.Remove(app.Process.PidFile)
	if err := unix.Mkfifo(app.Process.PidFile, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { _, err := l.find(app); done <- err }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a pipe is no error")
		}
	case <-time.After(2 * time.Second):
		t.Error("the agent waits for a pipe's writer")
		if f, err := os.OpenFile(app.Process.PidFile, os.O_WRONLY, 0); err == nil {
			f.Close()
		}
	}
}

func TestLogFileIsPipe(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog(), noCgroup: true}
	app := shellApp("true")
	app.Process.LogFile = filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(app.Process.LogFile, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- l.run(t.Context(), app, app.Process.Start) }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a pipe is no error")
		}
	case <-time.After(2 * time.Second):
		t.Error("the agent waits for a pipe's reader")
		if f, err := os.Open(app.Process.LogFile); err == nil {
			<-done
			f.Close()
		}
	}
}

// A process that an earlier agent stopped hears its stop signal.
func TestStopSignalOfFoundProcess(t *testing.T) {
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		mark := filepath.Join(t.TempDir(), "mark")
		p := startShell(t, l, shellApp(`trap "echo bye >`+mark+`; exit 0" TERM; echo ready; while :; do sleep 0.01; done`))
		within(t, "trap set", func() bool { b, _ := os.ReadFile(l.logPath(shellApp(""))); return strings.Contains(string(b), "ready") })
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		found, err := (&osLauncher{stateDir: l.stateDir, log: l.log}).find(shellApp(""))
		if err != nil || found == nil {
			t.Fatal(found, err)
		}
		if err := found.stop(unix.SIGTERM, 2*time.Second); err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(mark); string(b) != "bye\n" {
			t.Errorf("the trap did not run: %q", b)
		}
	})
}

// Programs that write their title over their environment (Redis, PostgreSQL,
// nginx) are found by the cgroup that has the mark in its name.
func TestProcessMarkedByCgroup(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog()}
	t.Cleanup(l.children.Wait)
	app := shellApp("exec env -u " + startVariable + " sleep 1000")
	p := startShell(t, l, app)
	if p.rec.Cgroup == "" {
		t.Skip("no cgroup v2 with a freezer here")
	}
	within(t, "sleep runs", func() bool {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(p.rec.PID) + "/comm")
		return string(b) == "sleep\n"
	})
	if err := saveRecord(l.stateDir, record{App: app.Name, BootID: bootID(), Mark: p.rec.Mark}); err != nil {
		t.Fatal(err)
	}
	found, err := (&osLauncher{stateDir: l.stateDir, log: l.log}).find(app)
	if err != nil || found == nil {
		t.Fatalf("not found: %v, %v", found, err)
	}
	if got := found.(*osProcess).rec; got.PID != p.rec.PID || got.Cgroup != p.rec.Cgroup {
		t.Errorf("found %+v, want %+v", got, p.rec)
	}
}

// The sockets of an application that runs elsewhere are not to be found here:
// the filter would forget them all with their translations.
func TestElsewhere(t *testing.T) {
	w, a := newWorld(t, 2)
	w.state, w.socks, w.fail["elsewhere"] = control.StateRestored, nil, errElsewhere
	if _, err := a.adopt(t.Context(), a.cfg.Apps["redis"]); !errors.Is(err, errElsewhere) {
		t.Errorf("adopt: %v", err)
	}
	if _, err := snapshotOnce(t.Context(), a, false); err == nil {
		t.Error("snapshot of what runs elsewhere")
	}
	wantTrace(t, w, "")
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		p := startShell(t, l, shellApp("sleep 1000"))
		if err := p.within(""); err != nil {
			t.Error(err)
		}
		if err := p.within("/proc/self/ns/uts"); !errors.Is(err, errElsewhere) {
			t.Errorf("in another: %v", err)
		}
	})
}

// A seal that the filter refuses to the next agent: the snapshot is given up
// where the application still is, and forced where it is not.
func TestResumeSealRefused(t *testing.T) {
	for _, gone := range []bool{false, true} {
		w, a := newWorld(t, 2)
		w.state, w.frozen, w.running = control.StateSnapshotFreeze, !gone, !gone
		if err := a.intents.save(intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: "20261122T153000Z-1a2b3c"}); err != nil {
			t.Fatal(err)
		}
		w.fail["SEAL"] = connect.NewError(connect.CodeFailedPrecondition, errTest)
		a.recover(t.Context())
		a.wg.Wait()
		want := control.StateRestored
		if gone {
			want = control.StateSnapshotDone
		}
		if w.state != want || w.frozen {
			t.Errorf("gone %v: state %s, frozen %v: %s", gone, w.state, w.frozen, w.trace())
		}
	}
}

// An old socket that swallows the handshake of its successor is ended, and the
// handshake tried again at once; a socket of a connection that is back is not.
func TestStaleSocket(t *testing.T) {
	now := time.Unix(1000, 0)
	p := newPacer(func() time.Time { return now })
	conn := func(remote, state string) *pb.ConnInfo {
		return &pb.ConnInfo{Local: "10.0.0.100:6379", Remote: remote, Role: control.RolePassive, State: state, Restorable: state == control.ConnRestoring}
	}
	conns := []*pb.ConnInfo{conn("198.51.100.7:30000", control.ConnRestoring), conn("198.51.100.7:30001", control.ConnRestoring)}
	listener := sockdiag.Socket{Local: netip.MustParseAddrPort("10.0.0.100:6379"), State: sockdiag.Listen, SendQ: 511}
	p.observe(conns, nil)
	if got := p.next([]sockdiag.Socket{listener}, everyOne); len(got) != 2 {
		t.Fatalf("%d handshakes begun", len(got))
	}
	socks := []sockdiag.Socket{
		{Local: listener.Local, Remote: netip.MustParseAddrPort("198.51.100.7:30000"), State: sockdiag.TimeWait},
		{Local: listener.Local, Remote: netip.MustParseAddrPort("198.51.100.7:30001"), State: sockdiag.FinWait1},
	}
	conns[1].State, conns[1].Restorable = control.ConnConnect, false // the application has closed it
	p.observe(conns, socks)
	if got := p.stale(socks); len(got) != 1 || got[0].Remote.Port() != 30000 {
		t.Errorf("stale: %v", got)
	}
	if got := p.next([]sockdiag.Socket{listener}, everyOne); len(got) != 1 || got[0].Remote != "198.51.100.7:30000" {
		t.Errorf("tried again: %v", got)
	}
}

// A new agent gives an earlier one's migration up, and the taker takes the application over
// all the same: what is recorded of the migration goes when that is through.
func TestResumeOvertaken(t *testing.T) {
	w, a := newWorld(t, 1)
	w.away()
	w.vip[""] = false
	if err := a.intents.save(intent{App: "redis", Op: opMigrate, Ran: true, ToNode: "node-b", BootID: bootID()}); err != nil {
		t.Fatal(err)
	}
	w.setHook("vip+eth0", func() { // behind the look at its state, before the restore
		w.mu.Lock()
		defer w.mu.Unlock()
		w.state, w.takenBy = control.StateBlockData, "node-b"
	})
	a.recover(t.Context())
	if in, err := a.intents.load("redis"); in == nil || err != nil {
		t.Errorf("the record is %v, %v while the other node is at it", in, err)
	}
	w.mu.Lock()
	w.state, w.takenBy, w.conns = "", "", nil
	w.mu.Unlock()
	within(t, "nothing is recorded any more", func() bool {
		in, err := a.intents.load("redis")
		return err == nil && in == nil
	})
}
