package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// matrix is what became of migrations in which something was killed.
type matrix struct {
	c    *harness.Cluster
	load *clients.Load
	on   int // node that has the application
	rows [][]string
}

// run has all clients talk, starts a migration (or whatever f does), has kill end a daemon and
// start it again, and waits until the application runs on exactly one node, every client is
// answered and no record of anything is left.
func (m *matrix) run(t *testing.T, who, phase string, f func() harness.Result, kill func()) {
	t.Helper()
	talk, stop := talk(t, m.load, 20*time.Millisecond)
	everybody(t, talk, 1)
	talk.Commands()
	start := time.Now()
	done := make(chan harness.Result, 1)
	go func() { done <- f() }()
	kill()
	r := <-done
	node, err := m.c.Settled("redis", vip, time.Minute)
	if err != nil {
		t.Fatalf("%s killed in %q: %v; the command: %v", who, phase, err, r)
	}
	settled := time.Since(start)
	everybody(t, talk, 2)
	if err := stop(); err != nil {
		t.Fatalf("%s killed in %q: %v", who, phase, err)
	}
	noRecords(t, m.c)
	outcome := "rolled back"
	if node != m.on {
		outcome = "migrated"
	}
	m.on = node
	_, slowest := talk.Commands()
	m.rows = append(m.rows, []string{who, phase, outcome, fmt.Sprint(r.Code), settled.Round(time.Millisecond).String(), slowest.Round(time.Millisecond).String()})
}

// noRecords waits until no agent has a record of an operation or of an old node.
func noRecords(t *testing.T, c *harness.Cluster) {
	t.Helper()
	left := ""
	err := harness.Wait(30*time.Second, "no record of an operation is left", func() bool {
		left = ""
		for _, n := range c.Nodes {
			entries, _ := os.ReadDir(n.Path("state", "agent"))
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".op.json") || strings.HasSuffix(e.Name(), "@old.json") {
					left += n.Name() + "/" + e.Name() + " "
				}
			}
		}
		return left == ""
	})
	if err != nil {
		t.Fatalf("%v: %s", err, left)
	}
}

func (m *matrix) migrate() harness.Result {
	return m.c.Nodes[m.on].Ctl("migrate", "redis", "--to", m.c.Nodes[1-m.on].Name())
}

// agent kills the agent of the node that the application leaves (side 0) or
// comes to (1) where the phase of its operation begins.
func (m *matrix) agent(t *testing.T, side int, operation, phase string) {
	t.Helper()
	n, who := m.c.Nodes[m.on], "old agent"
	if side == 1 {
		n, who = m.c.Nodes[1-m.on], "new agent"
	}
	must(t, n.Agent.Stop(10*time.Second))
	must(t, n.StartDoomedAgent(operation+"/"+phase))
	m.run(t, who, operation+": "+phase, m.migrate, func() {
		must(t, harness.Wait(30*time.Second, "the agent is killed in "+phase, func() bool { return !n.Agent.Running() }))
		must(t, n.StartAgent())
	})
}

// filter kills a filter while the agent of one side is in the phase.
func (m *matrix) filter(t *testing.T, victim, watched int, operation, phase string) {
	t.Helper()
	nodes := m.nodes()
	who := []string{"old filter", "new filter"}[victim]
	m.inside(t, nodes[watched], operation, phase, who, m.migrate, nodes[victim].Filter.Kill, nodes[victim].StartFilter)
}

// nodes are the one that the application leaves and the one that it comes to.
func (m *matrix) nodes() []*harness.Node {
	return []*harness.Node{m.c.Nodes[m.on], m.c.Nodes[1-m.on]}
}

// inside kills a daemon while an agent is in a phase, which it does not leave
// before, and starts the next one.
func (m *matrix) inside(t *testing.T, watched *harness.Node, operation, phase, who string, f func() harness.Result, kill func(), start func() error) {
	t.Helper()
	must(t, watched.Hold(operation+"/"+phase))
	m.run(t, who, operation+": "+phase, f, func() {
		must(t, inPhase(watched, operation, phase))
		kill()
		must(t, watched.Hold())
		must(t, start())
	})
}

// inPhase waits until a node's agent is in a phase of an operation, where
// something keeps it.
func inPhase(n *harness.Node, operation, phase string) error {
	return harness.Wait(20*time.Second, fmt.Sprintf("the agent is in phase %s of %s", phase, operation), func() bool {
		var p struct{ Operation, Phase string }
		err := n.AgentAPI(time.Second, "Progress", map[string]string{"app": "redis"}, &p)
		return err == nil && p.Operation == operation && p.Phase == phase
	})
}

func (m *matrix) print(t *testing.T) {
	t.Helper()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KILLED\tIN PHASE\tOUTCOME\tEXIT CODE\tSETTLED AFTER\tSLOWEST REPLY")
	for _, r := range m.rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush()
	t.Logf("%d migrations, %d clients, no connection lost:\n%s", len(m.rows), len(m.load.Clients), b.String())
}

// TestMigrateKill kills the agents and the filters of both nodes in each phase of
// a migration, while clients talk. It is completed or rolled back; exactly one
// node speaks, and no connection is lost.
func TestMigrateKill(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "kill", Holdpoint: true}, 60)
	m := &matrix{c: c, load: load}
	defer m.print(t)
	for _, p := range []string{"look", "hand over", "addresses", "clear", "process", "listen", "reconnect", "open", "release"} {
		m.agent(t, 1, "restore", p)
	}
	for _, p := range []string{"announce", "freeze", "drain", "stop", "account", "prepare", "seal", "kill", "store", "hold", "hand over"} {
		m.agent(t, 0, "migrate", p)
	}
	for _, p := range []string{"hand over", "addresses", "process", "listen", "reconnect", "open", "release"} {
		m.filter(t, 1, 1, "restore", p)
		m.filter(t, 0, 1, "restore", p)
	}
	for _, p := range []string{"check", "freeze", "drain", "account", "prepare", "kill", "store", "hold"} {
		m.filter(t, 0, 0, "migrate", p)
	}
	for _, p := range []string{"check", "freeze", "kill"} {
		m.filter(t, 1, 0, "migrate", p)
	}
}

// TestMigrateKillScheduler kills the scheduler in each phase of a move for load
// that it has begun. The agents finish or undo it, the next scheduler goes on.
func TestMigrateKillScheduler(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "killsched", Scheduler: true, Holdpoint: true, LoadFiles: true,
		Lines: "[balance]\nhigh = 0.8\nlow = 0.5\ncooldown = \"1s\"\n"}, 60)
	m := &matrix{c: c, load: load}
	defer m.print(t)
	for _, p := range []string{"check", "freeze", "drain", "kill", "hand over"} {
		from := c.Nodes[m.on]
		m.inside(t, from, "migrate", p, "scheduler", func() harness.Result {
			if err := from.SetLoad(0.9); err != nil {
				return harness.Result{Code: -1, Stderr: err.Error()}
			}
			return harness.Result{}
		}, func() {
			c.Scheduler.Kill()
			must(t, from.SetLoad(0.1))
		}, c.StartScheduler)
	}
}
