package test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// smallDisk puts a disk of that size in the place of a directory.
func smallDisk(t *testing.T, path, size string) {
	t.Helper()
	must(t, syscall.Mount("nfcf", path, "tmpfs", 0, "size="+size+",mode=700"))
	t.Cleanup(func() { check(t, syscall.Unmount(path, syscall.MNT_DETACH)) })
}

// fill leaves so many pages of a disk free.
func fill(t *testing.T, dir string, pages int) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(t, err)
	defer f.Close()
	var st syscall.Statfs_t
	must(t, syscall.Statfs(dir, &st))
	page := make([]byte, st.Bsize)
	for range max(int(st.Bfree)-pages, 0) {
		if _, err := f.Write(page); errors.Is(err, syscall.ENOSPC) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// room takes away what fill has written.
func room(t *testing.T, dir string) {
	t.Helper()
	must(t, os.Remove(filepath.Join(dir, "ballast")))
}

// TestDiskFull: state_dir is full to the last page, or nearly so, when a snapshot is
// to be taken and while an application is away. A snapshot is refused or whole.
// Who is held stays so and is answered. When there is room again, all goes on by itself.
func TestDiskFull(t *testing.T) {
	n := newNode(t, harness.Options{Name: "full", Apps: []harness.App{harness.Redis("redis", vip)}})
	smallDisk(t, n.Path("state"), "2m")
	must(t, n.Up())
	load := redisClients(t, n, 50, clients.Strictest)
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)

	refused := 0
	for _, pages := range []int{0, 1, 2, 3, 4, 8} {
		fill(t, n.Path("state"), pages)
		r := n.Ctl("snapshot", "redis")
		s, err := n.Status("redis")
		must(t, err)
		t.Logf("%d pages: exit %d, %s: %s", pages, r.Code, s.State, strings.TrimSpace(r.Stderr))
		switch {
		case r.Code == 0 && s.State == "SNAPSHOTDONE":
			must(t, clients.Summary(load.Idle()))
			room(t, n.Path("state"))
			wake(t, n, "redis", load.Clients[pages])
		case r.Code == 1 && (s.State == "CONNECTED" || s.State == "RESTORED"):
			refused++
			if !strings.Contains(r.Stderr, "no space left") || !strings.Contains(r.Stderr, "room") {
				t.Errorf("%d pages: the refusal does not say why, and what helps: %s", pages, r.Stderr)
			}
			rounds(t, load, 1) // it runs on, and they speak with it as ever
			room(t, n.Path("state"))
		default:
			t.Fatalf("%d pages: exit %d, state %s: %s", pages, r.Code, s.State, r.Stderr)
		}
		rounds(t, load, 1)
	}
	if refused == 0 {
		t.Error("no snapshot was refused")
	}

	snapshot(t, n, "redis", "redis-server")
	fill(t, n.Path("state"), 0)
	held(t, n, "redis", "redis-server", load, 4*time.Second) // longer than a keepalive's patience
	woken := make(chan error, 1)
	go func() { woken <- load.Clients[0].Command(reply) }()
	must(t, harness.Wait(5*time.Second, "a restore is asked for", func() bool {
		s, err := n.Status("redis")
		return err == nil && (s.RestoreRequested || s.State == "RESTORED")
	}))
	room(t, n.Path("state"))
	must(t, <-woken)
	rounds(t, load, 2)
	unnoticed()
}

// TestAgentDisk: the agent's records cannot be written, because their disk is full
// or read-only. It refuses what it could not go on with after its own end, and
// held clients stay held; when it can write again, it goes on by itself.
func TestAgentDisk(t *testing.T) {
	t.Parallel()
	n, load := redisUp(t, harness.Options{Name: "records"}, 20, clients.Strictest)
	dir := n.Path("state", "agent")
	must(t, os.MkdirAll(dir, 0o700))
	smallDisk(t, dir, "256k")
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	remount := func(flags uintptr) { must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, "")) }
	for i, fault := range []struct {
		name, why string
		on, off   func()
	}{
		{"full", "no space left", func() { fill(t, dir, 0) }, func() { room(t, dir) }},
		{"read-only", "read-only file system", func() { remount(syscall.MS_RDONLY) }, func() { remount(0) }},
	} {
		fault.on()
		r := n.Ctl("snapshot", "redis")
		if r.Code != 1 || !strings.Contains(r.Stderr, fault.why) || !strings.Contains(r.Stderr, n.Path("state")+" can be written and has room") {
			t.Errorf("%s: exit %d: %s", fault.name, r.Code, r.Stderr)
		}
		rounds(t, load, 1)
		fault.off()
		snapshot(t, n, "redis", "redis-server")
		fault.on()
		if r := n.Ctl("restore", "redis"); r.Code != 1 || !strings.Contains(r.Stderr, fault.why) {
			t.Errorf("%s: exit %d: %s", fault.name, r.Code, r.Stderr)
		}
		woken := make(chan error, 1)
		go func() { woken <- load.Clients[i].Command(reply) }()
		held(t, n, "redis", "redis-server", &clients.Load{Clients: load.Clients[2:]}, 2*time.Second)
		fault.off()
		must(t, <-woken)
		rounds(t, load, 1)
	}
	unnoticed()
}

// TestReadOnlyState: a filter whose state_dir cannot be written does not begin, and
// says why. Nobody is reset meanwhile, and the next one goes on.
func TestReadOnlyState(t *testing.T) {
	n := newNode(t, harness.Options{Name: "ro", Apps: []harness.App{harness.Redis("redis", vip)}})
	dir := n.Path("state")
	smallDisk(t, dir, "8m")
	must(t, n.Up())
	load := redisClients(t, n, 20, clients.Strictest)
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	snapshot(t, n, "redis", "redis-server")
	must(t, n.Down())
	must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	if err := n.StartFilter(); err == nil || !strings.Contains(err.Error(), "read-only file system") || !strings.Contains(err.Error(), "journal.db") {
		t.Errorf("a filter on a read-only disk: %v", err)
	}
	must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT, ""))
	must(t, n.StartFilter())
	must(t, n.StartAgent())
	held(t, n, "redis", "redis-server", load, time.Second)
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 1)
	unnoticed()
}
