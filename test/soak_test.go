package test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

var soakFlag = flag.Duration("soak", 16*time.Second, "how long TestSoak snapshots, restores and kills")

// metricsAt is where the filter of a soak serves its metrics.
const metricsAt = "127.0.0.1:9464"

// use is what a process has of the machine.
type use struct {
	rss   int // KiB
	files int
	tasks int // goroutines of the filter, threads of the agent
}

// used looks at a daemon.
func used(t *testing.T, n *harness.Node, d *harness.Daemon) (u use) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d", d.PID())
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	must(t, err)
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	must(t, err)
	u.files = len(fds)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2:
		case f[0] == "VmRSS:":
			u.rss, err = strconv.Atoi(f[1])
		case f[0] == "Threads:" && d != n.Filter:
			u.tasks, err = strconv.Atoi(f[1])
		}
		must(t, err)
	}
	if d == n.Filter {
		u.tasks = int(metric(t, n.Net.Node(), metricsAt, "go_goroutines"))
	}
	return u
}

// TestSoak snapshots and restores an application under clients that speak all the time, and
// kills the agent now and then, later the filter. What the other one has of memory,
// descriptors, goroutines or threads does not grow.
func TestSoak(t *testing.T) {
	for _, s := range []struct {
		name string
		criu bool
	}{{"restart", false}, {"criu", true}} {
		t.Run(s.name, func(t *testing.T) {
			app := harness.Redis("redis", vip)
			o := harness.Options{Name: "soak", Lines: fmt.Sprintf("metrics_listen = %q\n", metricsAt)}
			if s.criu {
				app.Checkpoint, app.Before = "engine = \"criu\"\n", nil
				o = withCRIU(t, o)
			}
			o.Apps = []harness.App{app}
			n, load := redisUp(t, o, 100, clients.KeepAlive{})
			talk, stop := talk(t, load, 20*time.Millisecond)
			soak(t, n, talk, "agent", *soakFlag/4, func() *harness.Daemon { return n.Filter }, func() error { n.Agent.Kill(); return n.StartAgent() })
			soak(t, n, talk, "filter", *soakFlag/4, func() *harness.Daemon { return n.Agent }, func() error { n.Filter.Kill(); return n.StartFilter() })
			must(t, stop())
		})
	}
}

// soak goes on for a time, in which kill ends and starts what is called victim.
func soak(t *testing.T, n *harness.Node, talk *clients.Talk, victim string, long time.Duration, watched func() *harness.Daemon, kill func() error) {
	t.Helper()
	const each = 5 // cycles from one kill to the next
	var seen []use
	cycles, kills := 0, 0
	for end := time.Now().Add(long); time.Now().Before(end) || len(seen) < 6; cycles++ {
		everybody(t, talk, 1)
		must(t, n.Ctl("snapshot", "redis").Err())
		must(t, n.WaitState("redis", "RESTORED", reply))
		must(t, harness.Wait(reply, "nothing is under way", func() bool { return doing(n, "redis") == "/" }))
		everybody(t, talk, 1)
		seen = append(seen, used(t, n, watched()))
		if cycles%each == each-1 {
			must(t, kill())
			kills++
		}
	}
	third := len(seen) / 3
	first, last := typical(seen[:third]), typical(seen[len(seen)-third:])
	t.Logf("%d cycles with %d kills of the %s; the other one had %d KiB, %d descriptors, %d tasks, and has %d, %d, %d",
		cycles, kills, victim, first.rss, first.files, first.tasks, last.rss, last.files, last.tasks)
	if last.rss > first.rss*5/4+8<<10 || last.files > first.files+2 || last.tasks > first.tasks+4 {
		t.Errorf("it grows")
	}
}

// typical are the medians.
func typical(seen []use) use {
	median := func(of func(use) int) int {
		var x []int
		for _, u := range seen {
			x = append(x, of(u))
		}
		slices.Sort(x)
		return x[len(x)/2]
	}
	return use{median(func(u use) int { return u.rss }), median(func(u use) int { return u.files }), median(func(u use) int { return u.tasks })}
}
