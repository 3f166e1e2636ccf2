package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// boxed puts a process into a memory cgroup of its own; what it returns tells how
// often the kernel has killed there for want of memory.
func boxed(t *testing.T, pid, limit int) (kills func() int) {
	t.Helper()
	root, most, events, old := "/sys/fs/cgroup", "memory.max", "memory.events", false
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		root, most, events, old = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control", true
	}
	dir := filepath.Join(root, fmt.Sprintf("nfcf-%d-memory", os.Getpid()))
	must(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		check(t, os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644))
		check(t, harness.Wait(5*time.Second, "the cgroup goes", func() bool { return os.Remove(dir) == nil }))
	})
	must(t, os.WriteFile(filepath.Join(dir, most), []byte(strconv.Itoa(limit)), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644))
	return func() int {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, events))
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" {
				k, err := strconv.Atoi(f[1])
				must(t, err)
				return k
			}
		}
		t.Fatalf("%s says nothing of kills (an old one: %v): %s", dir, old, b)
		return 0
	}
}

// TestMemoryLimit: clients offer much more than the filter may keep while their
// server is away. It closes their windows long before the memory that it is
// confined to is full, and what was kept arrives, and what comes behind it.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	const (
		writers = 48
		each    = 640 << 10
		kept    = 6 << 20
		limit   = 40 << 20
	)
	n := newNode(t, harness.Options{Name: "memory", Lines: fmt.Sprintf("[limits]\nkept_bytes = \"%d\"\nkept_bytes_per_app = \"%d\"\n", kept, kept)})
	path := n.Path("counts")
	counts, err := clients.OpenCountFile(path)
	must(t, err)
	t.Cleanup(func() { counts.Close() })
	app := bulkApp(n, path)
	app.Start[len(app.Start)-1] = "0" // as fast as it can
	app.Checkpoint = "[hold]\nspool = \"4MiB\"\nwake = \"full\"\n"
	must(t, n.WriteApp(placed(app)))
	must(t, n.Up())
	must(t, n.Ctl("start", "count").Err())
	var writing []*clients.ByteWriter
	for range writers {
		w, err := clients.DialByteWriter(n.Dial, at(9000), each, clients.KeepAlive{})
		must(t, err)
		t.Cleanup(func() { w.Close() })
		writing = append(writing, w)
	}
	snapshot(t, n, "count", "bytecount")
	kills := boxed(t, n.Filter.PID(), limit)
	must(t, n.Agent.Stop(5*time.Second)) // nobody brings it back meanwhile
	for _, w := range writing {
		go func() { _ = w.Run(time.Now().Add(3 * reply)) }() // until the test ends
	}
	used := func() (k float64) {
		t.Helper()
		var s struct {
			Apps []struct {
				KeptBytes float64 `json:"keptBytes"`
			} `json:"apps"`
		}
		must(t, n.FilterAPI(reply, "Status", map[string]string{"app": "count"}, &s))
		return s.Apps[0].KeptBytes
	}
	// Until it takes no more: the limit is used, or windows that were closed stay so.
	last, since := 0.0, time.Now()
	must(t, harness.Wait(20*time.Second, "no more is taken", func() bool {
		if k := used(); k != last {
			last, since = k, time.Now()
		}
		return last > kept/2 && time.Since(since) > time.Second
	}))
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Filter.PID()))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "VmHWM") {
			t.Logf("kept %.1f MiB of %d MiB offered, %s", last/(1<<20), writers*each>>20, strings.TrimSpace(line))
		}
	}
	if last > kept {
		t.Errorf("%g octets are kept, the limit is %d", last, kept)
	}
	must(t, n.StartAgent())
	began := time.Now()
	arrived := func() (all uint64) {
		for _, w := range writing {
			if r := counts.Find(w.Port()); r != nil {
				all += r.Count()
			}
		}
		return all
	}
	must(t, harness.Wait(2*reply, "what was kept has arrived, and more", func() bool { return arrived() > 2*kept }))
	t.Logf("%.1f MiB have arrived %v after the agent was back", float64(arrived())/(1<<20), time.Since(began).Round(time.Millisecond))
	if k := kills(); k != 0 || !n.Filter.Running() {
		t.Errorf("the kernel has killed %d times for want of memory", k)
	}
	for _, w := range writing {
		if r := counts.Find(w.Port()); r != nil && r.Wrong() != 0 {
			t.Errorf("%d octets are wrong", r.Wrong())
		}
	}
}
