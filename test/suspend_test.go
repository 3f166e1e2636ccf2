package test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// ordinary is a keepalive that outlasts a daemon that stands still for a while.
var ordinary = clients.KeepAlive{Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 9}

// suspended stops a daemon for ten seconds, as a debugger or a hypervisor does.
func suspended(t *testing.T, d *harness.Daemon, during func()) {
	t.Helper()
	must(t, d.Signal(syscall.SIGSTOP))
	resumed := time.AfterFunc(10*time.Second, func() { _ = d.Signal(syscall.SIGCONT) }) // the length of the outage
	t.Cleanup(func() {
		resumed.Stop()
		_ = d.Signal(syscall.SIGCONT)
	})
	during()
	must(t, harness.Wait(15*time.Second, "it goes on", func() bool { return !isStopped(t, d) }))
}

// TestSuspended stops filter and agent for ten seconds each, at once, on a node of
// their own. What was under way goes on or is taken back, and nobody notices.
func TestSuspended(t *testing.T) {
	t.Parallel()
	t.Run("filter", suspendedFilter)
	t.Run("agent", suspendedAgent)
}

func suspendedFilter(t *testing.T) {
	n, away, back, unnoticed := besides(t, "stopf", 30, ordinary)
	t.Parallel()
	talk := back.Talk(500*time.Millisecond, 2*reply)
	suspended(t, n.Filter, func() {
		// The kernel sends again what it has no answer to; a request to the filter waits.
		if r := n.Ctl("status", "--timeout", "1s"); r.Code == 0 {
			t.Error("a filter that is stopped has answered")
		}
	})
	replies := talk.Replies()
	must(t, harness.Wait(2*reply, "every client is served again", func() bool {
		for i, k := range talk.Replies() {
			if k < replies[i]+2 {
				return false
			}
		}
		return true
	}))
	must(t, clients.Summary(talk.Stop()))
	must(t, clients.Summary(away.Idle()))
	if !strings.Contains(n.Filter.Log(), "the filter stood still") {
		t.Error("the filter does not say that it stood still")
	}
	wake(t, n, "redis", away.Clients[0])
	rounds(t, away, 2)
	rounds(t, back, 1)
	unnoticed()
}

func suspendedAgent(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "stopa", Apps: []harness.App{gated(), harness.Redis("second", vipBeside)}}, 30, ordinary)
	away, err := clients.OpenLoad(n.Dial, vipBeside+":6379", nextClient, 30, ordinary)
	must(t, err)
	nextClient += 30
	t.Cleanup(away.Close)
	c := &crashNode{Node: n, load: load}
	first, second := watch(t, n.Net, vip), watch(t, n.Net, vipBeside)
	rounds(t, load, 1)
	rounds(t, away, 1)
	must(t, n.Ctl("snapshot", "second").Err())
	c.gate(t, "before", true)
	c.background("snapshot", "redis")
	c.await(t, "SNAPSHOTFREEZE")
	t.Parallel()
	woken := make(chan error, 1)
	suspended(t, n.Agent, func() {
		c.gate(t, "before", false)
		go func() { woken <- away.Clients[0].Command(2 * reply) }()
		must(t, harness.Wait(5*time.Second, "a restore is asked for", func() bool {
			s, err := n.Status("second")
			must(t, err)
			return s.RestoreRequested
		}))
	})
	began := time.Now()
	must(t, <-woken)
	t.Logf("woken %v after the agent went on", time.Since(began).Round(time.Millisecond))
	err = c.done()
	s, serr := n.Status("redis")
	must(t, serr)
	t.Logf("the snapshot: %v, state %s", err, s.State)
	if want := map[bool]string{true: "SNAPSHOTDONE", false: "RESTORED"}[err == nil]; s.State != want {
		t.Errorf("state %s behind a snapshot with error %v", s.State, err)
	}
	must(t, load.Clients[0].Command(2*reply))
	rounds(t, load, 2)
	rounds(t, away, 2)
	first()
	second()
}

// isStopped tells whether a daemon stands still by a signal.
func isStopped(t *testing.T, d *harness.Daemon) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.PID()))
	must(t, err)
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "T")
}
