package test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// criuOf finds the CRIU that a node's agent runs; 0: none.
func criuOf(n *harness.Node) int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		if len(f) < 2 || f[1] != fmt.Sprint(n.Agent.PID()) {
			continue
		}
		args, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if bytes.Contains(args, []byte("criu")) { // it gives itself a title
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return pid
		}
	}
	return 0
}

// doing tells what the agent does with an application: OPERATION/PHASE; "/" where nothing.
func doing(n *harness.Node, app string) string {
	var p struct{ Operation, Phase string }
	if n.AgentAPI(time.Second, "Progress", map[string]string{"app": app}, &p) != nil {
		return ""
	}
	return p.Operation + "/" + p.Phase
}

// faultyLife is a node with an interpreter in its memory and clients that type on, with
// its snapshots on a file system of their own.
func faultyLife(t *testing.T, start ...string) (*harness.Node, *life) {
	t.Helper()
	app := interpApp()
	if len(start) > 0 {
		app.Start = append(start, app.Start...)
	}
	n := newNode(t, withCRIU(t, harness.Options{Name: "fault", Holdpoint: true, Apps: []harness.App{app}}))
	must(t, n.Up())
	return n, newLife(t, n.Dial, n.Net.Client(), "10.77.0.2")
}

// imagesOf is the directory of the interpreter's snapshots.
func imagesOf(n *harness.Node) string { return n.Path("shared", "snapshots", "interp") }

// newest is a file of the current snapshot's images.
func newest(t *testing.T, n *harness.Node, name string) string {
	t.Helper()
	s, err := n.Status("interp")
	must(t, err)
	return filepath.Join(imagesOf(n), s.SnapshotID, "images", name)
}

// back brings the interpreter back where it is held, and sees that nothing was lost.
func (l *life) back(t *testing.T, n *harness.Node) {
	t.Helper()
	must(t, harness.Wait(reply, "the interpreter is back", func() bool { return n.Ctl("restore", "interp").Code == 0 }))
	l.look(t)
}

// TestCRIUDumpFails: where CRIU cannot dump a process, or the images have no room, it runs
// on, and its clients with it.
func TestCRIUDumpFails(t *testing.T) {
	for _, f := range []struct {
		name, want string
		start      []string
		set        func(n *harness.Node) (undo func())
	}{
		{name: "undumpable", want: "ghost file", // an open file of 3 MB that has no name any more
			start: []string{"sh", "-c", `head -c 3000000 /dev/zero >"$0"; exec 9<>"$0"; rm "$0"; exec "$@"`, "@app/ghost"}},
		{name: "disk-full", want: "failed", set: func(n *harness.Node) func() {
			must(t, os.MkdirAll(imagesOf(n), 0o700))
			must(t, syscall.Mount("nfcf", imagesOf(n), "tmpfs", 0, "size=1m,mode=700"))
			return func() { must(t, syscall.Unmount(imagesOf(n), syscall.MNT_DETACH)) }
		}},
	} {
		t.Run(f.name, func(t *testing.T) {
			n, l := faultyLife(t, f.start...)
			undo := func() {}
			if f.set != nil {
				undo = sync.OnceFunc(f.set(n))
				t.Cleanup(undo)
			}
			for range 2 {
				r := n.Ctl("snapshot", "interp")
				if r.Code != 1 || !strings.Contains(r.Stderr, f.want) || !strings.Contains(r.Stderr, "it was given up and the application runs on") {
					t.Fatalf("%+v", r)
				}
				l.look(t)
			}
			if left, _ := filepath.Glob(filepath.Join(imagesOf(n), "*20*")); len(left) > 0 {
				t.Errorf("left in the store: %v", left)
			}
			if undo(); f.set != nil {
				must(t, n.Ctl("snapshot", "interp").Err())
				l.back(t, n)
			}
			l.end(t)
		})
	}
}

// TestCRIURestoreFails: where the process cannot be made again its connections stay held,
// until it can.
func TestCRIURestoreFails(t *testing.T) {
	app := interpApp()
	app.Start[0] = "@app/interp"
	n := newNode(t, withCRIU(t, harness.Options{Name: "fault", Holdpoint: true, Apps: []harness.App{app}}))
	program := n.Path("app", "interp")
	b, err := os.ReadFile(filepath.Join(toolDir, "interp"))
	must(t, err)
	must(t, os.WriteFile(program, b, 0o755))
	must(t, n.Up())
	l := newLife(t, n.Dial, n.Net.Client(), "10.77.0.2")
	rename := func(t *testing.T, from, to string) func() {
		must(t, os.Rename(from, to))
		return func() { must(t, os.Rename(to, from)) }
	}
	for _, f := range []struct {
		name, want string
		set        func(t *testing.T) (undo func())
	}{
		{"damaged", "does not have the checksum of the manifest", func(t *testing.T) func() {
			path := newest(t, n, "pages-1.img")
			b, err := os.ReadFile(path)
			must(t, err)
			b[len(b)/2] ^= 1
			must(t, os.WriteFile(path, b, 0o600))
			return func() { b[len(b)/2] ^= 1; must(t, os.WriteFile(path, b, 0o600)) }
		}},
		{"missing", "is missing", func(t *testing.T) func() { return rename(t, newest(t, n, "files.img"), n.Path("files.img")) }},
		{"added", "is not in the manifest", func(t *testing.T) func() {
			must(t, os.WriteFile(newest(t, n, "more.img"), nil, 0o600))
			return func() { must(t, os.Remove(newest(t, n, "more.img"))) }
		}},
		{"open to others", "can be written by others", func(t *testing.T) func() {
			dir := filepath.Dir(filepath.Dir(newest(t, n, "files.img")))
			must(t, os.Chmod(dir, 0o777))
			return func() { must(t, os.Chmod(dir, 0o700)) }
		}},
		{"program gone", "Can't open file", func(t *testing.T) func() { return rename(t, program, program+".away") }},
	} {
		t.Run(strings.ReplaceAll(f.name, " ", "-"), func(t *testing.T) {
			must(t, n.Hold("restore/look")) // the clients wake it at once
			must(t, n.Ctl("snapshot", "interp").Err())
			undo := f.set(t)
			must(t, n.Hold())
			var r harness.Result
			must(t, harness.Wait(reply, "the restore is refused", func() bool {
				r = n.Ctl("restore", "interp")
				return r.Code != 0 && !strings.Contains(r.Stderr, "is under way")
			}))
			undo()
			if !strings.Contains(r.Stderr, f.want) || !strings.Contains(r.Stderr, "stay held") {
				t.Errorf("%s", r.Stderr)
			}
			l.back(t, n)
		})
	}
	l.end(t)
}

// TestCRIUKilled: CRIU is killed in each phase of a dump and of a restore, and at
// random times.
func TestCRIUKilled(t *testing.T) {
	n, l := faultyLife(t)
	kill := func(t *testing.T) {
		t.Helper()
		var pid int
		must(t, harness.Watch(reply, "CRIU runs", func() bool { pid = criuOf(n); return pid != 0 }))
		must(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	running := func(t *testing.T) {
		t.Helper()
		l.back(t, n)
	}
	for _, f := range []struct {
		point string
		ok    bool // the operation goes forward all the same
	}{
		{"snapshot/freeze", false}, // it has stopped nothing yet
		{"snapshot/compare", true}, // all is written, all stand still
		{"snapshot/seal", true},
		{"snapshot/kill", true},
		{"restore/sockets", false},
		{"restore/reconnect", false},
	} {
		t.Run(strings.ReplaceAll(f.point, "/", "-"), func(t *testing.T) {
			must(t, n.Hold(f.point))
			done := make(chan harness.Result, 1)
			go func() { done <- n.Ctl("snapshot", "interp") }()
			must(t, harness.Watch(reply, f.point, func() bool { return doing(n, "interp") == f.point }))
			kill(t)
			must(t, n.Hold())
			r := <-done
			if strings.HasPrefix(f.point, "snapshot") && (r.Code == 0) != f.ok {
				t.Errorf("%+v", r)
			}
			if r.Code != 0 && !strings.Contains(r.Stderr, "runs on") {
				t.Errorf("%s", r.Stderr)
			}
			running(t)
		})
	}
	// Its code is in the task then. What it cannot survive is a kill in the moment in which
	// it puts it there.
	t.Run("in-the-middle", func(t *testing.T) {
		for range 1000 { // so that it has long to do with them
			c, err := n.Dial(at(7000))
			must(t, err)
			defer c.Close()
		}
		for range 10 {
			done := make(chan harness.Result, 1)
			go func() { done <- n.Ctl("snapshot", "interp") }()
			must(t, harness.Watch(reply, "CRIU dumps sockets", func() bool {
				streams, _ := filepath.Glob(filepath.Join(imagesOf(n), ".new-*", "images", "tcp-stream-*"))
				return len(streams) > 50
			}))
			if pid := criuOf(n); pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			if r := <-done; r.Code != 0 && !strings.Contains(r.Stderr, "runs on") {
				t.Errorf("%s", r.Stderr)
			}
			running(t)
		}
	})
	t.Run("restore-random", func(t *testing.T) {
		for range 10 {
			must(t, n.Ctl("snapshot", "interp").Err()) // the clients wake it at once
			must(t, harness.Watch(reply, "CRIU runs", func() bool { return criuOf(n) != 0 }))
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			if pid := criuOf(n); pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			running(t)
		}
	})
	l.end(t)
}

// TestCRIUAgentCrash kills the agent at each step of a snapshot and of a restore, with 100
// live connections, as TestAgentCrash does: the next one goes on or takes back.
func TestCRIUAgentCrash(t *testing.T) {
	const away = 0
	n, load := redisUp(t, withCRIU(t, harness.Options{Name: "agent", Apps: []harness.App{memoryRedis()}}), 100, clients.KeepAlive{})
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	for i, p := range []struct{ phase, after string }{
		{"look", "CONNECTED"}, {"prepare", "CONNECTED"}, {"criu", ""}, {"announce", ""}, {"freeze", "RESTORED"},
		{"dump", "RESTORED"}, {"compare", "RESTORED"}, {"seal", "RESTORED"},
		{"kill", "SNAPSHOTDONE"}, {"store", "SNAPSHOTDONE"}, {"hold", "SNAPSHOTDONE"},
	} {
		doomed(t, n, "snapshot/"+p.phase, away, "snapshot", "redis")
		if p.after != "" {
			must(t, n.WaitState("redis", p.after, 10*time.Second))
		}
		if p.after == "SNAPSHOTDONE" {
			held(t, n, "redis", "redis-server", load, 0)
			if s := n.Ctl("-o", "json", "snapshots", "redis"); s.Err() != nil || len(s.Stdout) < 10 {
				t.Errorf("%s: no snapshot is stored: %v", p.phase, s)
			}
			wake(t, n, "redis", load.Clients[i])
		}
		rounds(t, load, 2)
	}
	doomedRestores(t, n, load, away, 20*time.Second, []string{"look", "announce", "clear", "check", "criu", "sockets", "reconnect", "open"})
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[1])
	rounds(t, load, 2)
	unnoticed()
}

// TestCRIUPreCopy: a kernel that cannot tell which memory changes is named, and the
// snapshot goes on without.
func TestCRIUPreCopy(t *testing.T) {
	app := interpApp()
	app.Checkpoint += "pre_copy = true\n"
	n := newNode(t, withCRIU(t, harness.Options{Name: "pre", Apps: []harness.App{app}}))
	must(t, n.Up())
	l := newLife(t, n.Dial, n.Net.Client(), "10.77.0.2")
	r := n.Ctl("snapshot", "interp")
	must(t, r.Err())
	config, err := exec.Command("zcat", "/proc/config.gz").Output()
	must(t, err)
	if tracks := bytes.Contains(config, []byte("\nCONFIG_MEM_SOFT_DIRTY=y\n")); tracks == strings.Contains(r.Stderr, "does not track which memory changes (CONFIG_MEM_SOFT_DIRTY)") {
		t.Errorf("the kernel tracks memory: %v; %s", tracks, r.Stderr)
	}
	l.back(t, n)
	l.end(t)
}
