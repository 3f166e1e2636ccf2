package test

import (
	"testing"

	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// TestMigrateKillAcross kills what TestMigrateKill does not: the agent of one
// node while that of the other works, and whoever has a part in giving the
// connections back.
func TestMigrateKillAcross(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "across", Holdpoint: true}, 60)
	m := &matrix{c: c, load: load}
	defer m.print(t)
	m.agent(t, 0, "migrate", "check")
	for _, p := range []string{"look", "hand over", "addresses", "clear", "process", "listen", "reconnect", "open", "release"} {
		n := m.nodes()
		m.inside(t, n[1], "restore", p, "old agent", m.migrate, n[0].Agent.Kill, n[0].StartAgent)
	}
	for _, p := range []string{"check", "announce", "freeze", "drain", "before", "stop", "account", "prepare", "seal", "kill", "store", "hold", "hand over"} {
		n := m.nodes()
		m.inside(t, n[0], "migrate", p, "new agent", m.migrate, n[1].Agent.Kill, n[1].StartAgent)
	}
	for _, victim := range []string{"old agent", "new agent", "old filter", "new filter"} {
		m.undo(t, victim)
	}
	_, err := c.Migrate("redis", m.on, 1-m.on)
	must(t, err)
	rounds(t, load, 2)
}

// undo aborts a migration whose handshakes are about to begin, and kills a
// daemon while the connections are given back.
func (m *matrix) undo(t *testing.T, victim string) {
	t.Helper()
	n := m.nodes()
	kill, start := n[0].Agent.Kill, n[0].StartAgent
	switch victim {
	case "new agent":
		kill, start = n[1].Agent.Kill, n[1].StartAgent
	case "old filter":
		kill, start = n[0].Filter.Kill, n[0].StartFilter
	case "new filter":
		kill, start = n[1].Filter.Kill, n[1].StartFilter
	}
	aborted := make(chan harness.Result, 1)
	must(t, n[1].Hold("restore/reconnect", "restore/undo"))
	m.run(t, victim, "restore: undo", m.migrate, func() {
		must(t, inPhase(n[1], "restore", "reconnect"))
		go func() { aborted <- n[0].Ctl("abort", "redis") }()
		must(t, inPhase(n[1], "restore", "undo"))
		kill()
		must(t, n[1].Hold())
		must(t, start())
	})
	t.Logf("%s killed in undo: the abort says %v", victim, (<-aborted).Err())
}
