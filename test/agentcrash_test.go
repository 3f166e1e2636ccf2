package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// The phases of the agent's operations, in their order, and where an
// application stands when a new agent has taken over from one that was killed
// at the beginning of the phase.
var (
	snapshotPhases = []struct{ phase, after string }{
		{"look", "CONNECTED"}, {"announce", "CONNECTED"}, {"freeze", "RESTORED"}, {"drain", "RESTORED"}, {"before", "RESTORED"},
		{"stop", "RESTORED"}, {"account", "RESTORED"}, {"prepare", "RESTORED"}, {"seal", "RESTORED"},
		{"kill", "SNAPSHOTDONE"}, {"store", "SNAPSHOTDONE"}, {"hold", "SNAPSHOTDONE"},
	}
	restorePhases = []string{"look", "announce", "clear", "process", "listen", "reconnect", "open"}
)

// doomed runs a command of an agent that is killed in its phase, and starts
// the next agent after a while.
func doomed(t *testing.T, n *harness.Node, failpoint string, away time.Duration, command ...string) {
	t.Helper()
	must(t, n.Agent.Stop(5*time.Second))
	must(t, n.StartDoomedAgent(failpoint))
	if r := n.Ctl(command...); r.Code == 0 {
		t.Fatalf("%v succeeded with an agent that was killed at %s", command, failpoint)
	}
	must(t, harness.Wait(10*time.Second, "the agent is killed at "+failpoint, func() bool { return !n.Agent.Running() }))
	time.Sleep(away) // the length of the outage
	must(t, n.StartAgent())
}

func outages(t *testing.T, f func(t *testing.T, away time.Duration)) {
	for _, away := range []time.Duration{0, time.Second} {
		t.Run(fmt.Sprintf("away %v", away), func(t *testing.T) { f(t, away) })
	}
}

// TestAgentCrash kills the agent at each step of a snapshot and of a restore,
// with 100 live connections. The next one goes on or takes back; the clients
// notice nothing and the application outlives its agent.
func TestAgentCrash(t *testing.T) {
	outages(t, func(t *testing.T, away time.Duration) {
		n, load := redisUp(t, harness.Options{Name: "agent"}, 100, clients.KeepAlive{})
		unnoticed := watch(t, n.Net, vip)
		rounds(t, load, 1)
		for i, p := range snapshotPhases {
			doomed(t, n, "snapshot/"+p.phase, away, "snapshot", "redis")
			if i > 1 { // translated since the first round
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
		doomedRestores(t, n, load, away, 10*time.Second, restorePhases)
		snapshot(t, n, "redis", "redis-server")
		wake(t, n, "redis", load.Clients[1])
		rounds(t, load, 2)
		unnoticed()
	})
}

// doomedRestores kills the agent at each of these phases of a restore of Redis: the next one
// has it running within so long.
func doomedRestores(t *testing.T, n *harness.Node, load *clients.Load, away time.Duration, within time.Duration, phases []string) {
	t.Helper()
	for _, phase := range phases {
		snapshot(t, n, "redis", "redis-server")
		doomed(t, n, "restore/"+phase, away, "restore", "redis")
		if phase == "look" { // it had not begun
			must(t, n.Ctl("restore", "redis").Err())
		}
		must(t, n.WaitState("redis", "RESTORED", within))
		rounds(t, load, 2) // clients may be faster than the agent's last step
		must(t, harness.Watch(5*time.Second, "the restore ends", func() bool { return doing(n, "redis") == "/" }))
		if pids, err := n.Processes("redis-server"); err != nil || len(pids) != 1 {
			t.Fatalf("%s: processes %v, %v", phase, pids, err)
		}
	}
}

// TestAgentCrashStartStop does the same with start and stop.
func TestAgentCrashStartStop(t *testing.T) {
	n, _ := redisUp(t, harness.Options{Name: "agent"}, 1)
	for _, phase := range []string{"process", "unregister", "address"} {
		doomed(t, n, "stop/"+phase, 0, "stop", "redis")
		must(t, harness.Wait(10*time.Second, "stop is brought to its end after "+phase, func() bool {
			s, err := n.Status("redis")
			pids, perr := n.Processes("redis-server")
			out, _ := n.Net.Node().Command("ip", "address", "show", "to", vip).Output()
			return err == nil && s.State == "" && perr == nil && len(pids) == 0 && len(out) == 0
		}))
		must(t, n.Ctl("start", "redis").Err())
	}
	for _, phase := range []string{"register", "address", "process", "listen"} {
		must(t, n.Ctl("stop", "redis").Err())
		doomed(t, n, "start/"+phase, 0, "start", "redis")
		if phase == "register" { // nothing but the wish was there
			must(t, harness.Wait(10*time.Second, "start is repeated", func() bool {
				s, err := n.Status("redis")
				return err == nil && s.State == "CONNECTED"
			}))
		}
		must(t, n.WaitState("redis", "CONNECTED", 10*time.Second))
		must(t, harness.Wait(10*time.Second, "a client is served after "+phase, func() bool {
			c, err := n.Dial(at(6379))
			if err == nil {
				c.Close()
			}
			return err == nil
		}))
		if pids, err := n.Processes("redis-server"); err != nil || len(pids) != 1 {
			t.Fatalf("%s: processes %v, %v", phase, pids, err)
		}
	}
}
