package checkpoint

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

func shellApp(script string) *config.App {
	app := &config.App{Name: "shell"}
	app.Process.Start = []string{"/bin/sh", "-c", script}
	app.Process.StopTimeout = config.Duration(5 * time.Second)
	return app
}

// withLaunchers runs a test with signals alone and, where this machine has
// one, with a cgroup.
func withLaunchers(t *testing.T, f func(t *testing.T, l *osLauncher)) {
	for _, noCgroup := range []bool{true, false} {
		t.Run(map[bool]string{true: "signals", false: "cgroup"}[noCgroup], func(t *testing.T) {
			l := &osLauncher{stateDir: t.TempDir(), noCgroup: noCgroup, log: slog.New(slog.NewTextHandler(io.Discard, nil))}
			t.Cleanup(l.children.Wait)
			f(t, l)
		})
	}
}

func startShell(t *testing.T, l *osLauncher, app *config.App) *osProcess {
	t.Helper()
	p, err := l.start(app)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.stop(unix.SIGKILL, 0); err != nil {
			t.Error(err)
		}
	})
	return p.(*osProcess)
}

// within polls a condition for at most five seconds.
func within(t *testing.T, what string, f func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := poll(ctx, pollFirst, pollMost, func() (bool, error) { return f(), nil }); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func memberCount(p *osProcess) int {
	m, _ := p.members()
	return len(m)
}

// A whole tree is stopped, runs on and ends: child, grandchild and one in the
// background whose parent is gone.
func TestProcessTree(t *testing.T) {
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		dir := t.TempDir()
		count := filepath.Join(dir, "count")
		p := startShell(t, l, shellApp(`(sh -c "while :; do echo x >>`+count+`; sleep 0.01; done" &) ; sh -c "sleep 1000; :" ; :`))
		within(t, "all run", func() bool { return memberCount(p) >= 4 })
		size := func() int64 {
			st, err := os.Stat(count)
			if err != nil {
				return 0
			}
			return st.Size()
		}
		within(t, "it counts", func() bool { return size() > 0 })
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := size()
		time.Sleep(60 * time.Millisecond) // nothing may happen in this time
		if size() != before {
			t.Error("something still ran after the freeze")
		}
		if err := p.thaw(); err != nil {
			t.Fatal(err)
		}
		within(t, "it counts again", func() bool { return size() > before })
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := p.stop(unix.SIGKILL, 0); err != nil {
			t.Fatal(err)
		}
		if p.alive() || memberCount(p) != 0 {
			t.Error("something is left")
		}
		if _, err := os.Stat(recordPath(l.stateDir, "shell")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the record is left: %v", err)
		}
		if p.rec.Cgroup != "" {
			if _, err := os.Stat(p.rec.Cgroup); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the cgroup is left: %v", err)
			}
		}
	})
}

// A stop signal reaches a stopped process, and one that ignores it is killed.
func TestProcessStopSignal(t *testing.T) {
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		mark := filepath.Join(t.TempDir(), "mark")
		p := startShell(t, l, shellApp(`trap "echo bye >`+mark+`; exit 0" TERM; echo ready; while :; do sleep 0.01; done`))
		within(t, "trap set", func() bool { b, _ := os.ReadFile(l.logPath(shellApp(""))); return strings.Contains(string(b), "ready") })
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := p.stop(unix.SIGTERM, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(mark); string(b) != "bye\n" {
			t.Errorf("the trap did not run: %q", b)
		}
		deaf := startShell(t, l, shellApp(`trap "" TERM; echo set; while :; do sleep 0.01; done`))
		within(t, "trap set", func() bool { b, _ := os.ReadFile(l.logPath(shellApp(""))); return strings.Contains(string(b), "set") })
		if err := deaf.stop(unix.SIGTERM, 50*time.Millisecond); err != nil || deaf.alive() {
			t.Errorf("%v, alive %v", err, deaf.alive())
		}
	})
}

// Another agent finds the process by its record, and no stranger.
func TestProcessFoundAgain(t *testing.T) {
	withLaunchers(t, func(t *testing.T, l *osLauncher) {
		app := shellApp("sleep 1000")
		p := startShell(t, l, app)
		other := &osLauncher{stateDir: l.stateDir, log: l.log}
		found, err := other.find(app)
		if err != nil || found == nil {
			t.Fatal(found, err)
		}
		rec := p.rec
		rec.StartTime++
		rec.Cgroup = ""
		if err := saveRecord(l.stateDir, rec); err != nil {
			t.Fatal(err)
		}
		if p, err := other.find(app); p != nil || err != nil {
			t.Errorf("found a process with another start time: %v, %v", p, err)
		}
		if err := saveRecord(l.stateDir, p.rec); err != nil {
			t.Fatal(err)
		}
		if err := found.stop(unix.SIGKILL, 0); err != nil || found.alive() {
			t.Error(err)
		}
		within(t, "reaped", func() bool {
			select {
			case <-p.child:
				return true
			default:
				return false
			}
		})
		writeFile(t, recordPath(l.stateDir, "shell"), "{")
		if _, err := other.find(app); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("damaged record: %v", err)
		}
		os.Remove(recordPath(l.stateDir, "shell"))
	})
}

// pid_file adopts; the adopted one's session is not touched when it is not its
// own.
func TestProcessAdopted(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	cmd := exec.Command("/bin/sleep", "1000")
	neighbour := exec.Command("/bin/sleep", "1000")
	for _, c := range []*exec.Cmd{cmd, neighbour} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer c.Wait()
		defer c.Process.Kill()
	}
	app := shellApp("")
	app.Process.PidFile = filepath.Join(t.TempDir(), "pid")
	if p, err := l.find(app); p != nil || err != nil {
		t.Fatalf("no pid_file: %v, %v", p, err)
	}
	writeFile(t, app.Process.PidFile, "one\n")
	if _, err := l.find(app); err == nil {
		t.Error("a pid_file without a number is taken")
	}
	writeFile(t, app.Process.PidFile, strconv.Itoa(cmd.Process.Pid)+"\n")
	p, err := l.find(app)
	if err != nil || p == nil {
		t.Fatal(p, err)
	}
	if err := p.freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, _ := readStat(neighbour.Process.Pid); s.stopped() {
		t.Error("a process of the same session was stopped")
	}
	if s, _ := readStat(cmd.Process.Pid); !s.stopped() {
		t.Error("the adopted process runs on")
	}
	if err := p.stop(unix.SIGKILL, 0); err != nil || p.alive() {
		t.Error(err)
	}
}

func TestCommandOfApplication(t *testing.T) {
	l := &osLauncher{stateDir: t.TempDir(), log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	app := shellApp("")
	app.Process.Environment = []string{"GREETING=hello"}
	app.Process.WorkingDirectory = t.TempDir()
	if err := l.run(t.Context(), app, []string{"/bin/sh", "-c", `echo "$GREETING $PWD"; cat`}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(l.logPath(app)); string(b) != "hello "+app.Process.WorkingDirectory+"\n" {
		t.Errorf("log %q", b)
	}
	err := l.run(t.Context(), app, []string{"/bin/sh", "-c", "exit 3"})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("exit status: %v", err)
	}
	pid := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for n := 0; n == 0 && ctx.Err() == nil; { // until it has its child
			n, _, _ = readPidFile(pid)
			runtime.Gosched()
		}
		cancel()
	}()
	if err := l.run(ctx, app, []string{"/bin/sh", "-c", "sleep 1000 & echo $! >" + pid + "; wait"}); !errors.Is(err, context.Canceled) {
		t.Errorf("killed: %v", err)
	}
	n, _, err := readPidFile(pid)
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	within(t, "its child is killed too", func() bool { s, err := readStat(n); return err != nil || s.gone() })
	app.Process.Start = []string{"/nowhere/program"}
	if _, err := l.start(app); err == nil {
		t.Error("a missing program started")
	}
	app.Process.User = "nobody-of-that-name"
	app.Process.Start = []string{"/bin/true"}
	if _, err := l.start(app); err == nil || !strings.Contains(err.Error(), "process.user") {
		t.Errorf("missing user: %v", err)
	}
}

func TestCommandUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("changing the user needs root")
	}
	l := &osLauncher{stateDir: t.TempDir(), log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	app := shellApp("")
	app.Process.User = "nobody"
	if err := l.run(t.Context(), app, []string{"/bin/sh", "-c", "id -un; echo $USER"}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(l.logPath(app)); string(b) != "nobody\nnobody\n" {
		t.Errorf("ran as %q", b)
	}
	untrusted := filepath.Join(t.TempDir(), "program")
	writeFile(t, untrusted, "#!/bin/sh\n")
	if err := os.Chmod(untrusted, 0o777); err != nil {
		t.Fatal(err)
	}
	app.Process.User = ""
	if err := l.run(t.Context(), app, []string{untrusted}); err == nil || !strings.Contains(err.Error(), "not run as root") {
		t.Errorf("a program that all may write was run as root: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	s, err := readStat(os.Getpid())
	if err != nil || s.pid != os.Getpid() || s.ppid != os.Getppid() || s.pgid != syscall.Getpgrp() || s.start == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	odd := "7 (a ) 1 (b) S 3 4 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0"
	if s, err = parseStat([]byte(odd)); err != nil || s != (procStat{pid: 7, ppid: 3, pgid: 4, sid: 5, state: 'S', start: 99}) {
		t.Errorf("%+v, %v", s, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (sh) S 3 4 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0"))
	f.Add([]byte("("))
	f.Add([]byte(")("))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStat(b); err == nil && s.state == 0 {
			t.Errorf("no state in %q", b)
		}
	})
}
