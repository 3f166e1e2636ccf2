package test

import (
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// TestAbortOnData: with that policy a client that speaks during the snapshot
// gives it up, and is answered by the application, which runs on.
func TestAbortOnData(t *testing.T) {
	app := gated()
	app.Checkpoint = "[hold]\non_data_during_snapshot = \"abort\""
	n, load := redisUp(t, harness.Options{Name: "policy", Apps: []harness.App{app}}, 20, clients.KeepAlive{})
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1) // the capture knows all numbers from here on
	c := &crashNode{Node: n, load: load}
	before, err := n.Processes("redis-server")
	must(t, err)
	c.gate(t, "before", true)
	c.background("snapshot", "redis")
	must(t, harness.Wait(reply, "everything is frozen and the command before the stop runs", func() bool {
		pids, err := n.Processes("sh")
		return err == nil && len(pids) > 0
	}))
	speaker := load.Clients[3]
	answered := make(chan error, 1)
	go func() { answered <- speaker.Command(reply) }()
	must(t, harness.Wait(reply, "the filter keeps what the client says", func() bool {
		conns, err := n.Conns("redis")
		must(t, err)
		for _, k := range conns {
			if k.WindowClosed {
				return true
			}
		}
		return false
	}))
	c.gate(t, "before", false)
	err = c.done()
	must(t, <-answered)
	if err == nil || !strings.Contains(err.Error(), speaker.LocalAddr().String()) || !strings.Contains(err.Error(), "exit 1") {
		t.Errorf("the snapshot in which a client spoke: %v", err)
	}
	s, err := n.Status("redis")
	must(t, err)
	after, err := n.Processes("redis-server")
	must(t, err)
	if s.State != "RESTORED" || len(after) != 1 || after[0] != before[0] {
		t.Errorf("state %s, processes %v became %v", s.State, before, after)
	}
	rounds(t, load, 2)
	snapshot(t, n, "redis", "redis-server") // in quieter times it works
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 2)
	unnoticed()
}
