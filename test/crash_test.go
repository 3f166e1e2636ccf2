package test

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// gated is Redis whose snapshots stop at the gate "before", frozen, and whose
// starts stop at the gate "start", while a file of that name lies in the
// node's directory.
func gated() harness.App {
	a := harness.Redis("redis", vip)
	wait := func(gate string) string { return `while [ -e "$0/` + gate + `" ]; do sleep 0.02; done; exec "$@"` }
	a.Before = append([]string{"sh", "-c", wait("before"), "@app"}, a.Before...)
	a.Start = append([]string{"sh", "-c", wait("start"), "@app"}, a.Start...)
	return a
}

// crash is one way to lose the filter.
type crash struct {
	state string
	// reach brings the application there; leave lets it go on and ends when
	// clients can speak as ever.
	reach, leave func(t *testing.T, c *crashNode)
}

type crashNode struct {
	*harness.Node
	load *clients.Load
	ops  sync.WaitGroup
	err  atomic.Pointer[error]
}

func (c *crashNode) gate(t *testing.T, name string, shut bool) {
	t.Helper()
	p := c.Path("app", name)
	if shut {
		must(t, os.WriteFile(p, nil, 0o644))
		return
	}
	must(t, os.Remove(p))
}

// background runs a command of the operator's; done waits for it.
func (c *crashNode) background(args ...string) {
	c.err.Store(nil)
	c.ops.Go(func() {
		if err := c.Ctl(args...).Err(); err != nil {
			c.err.Store(&err)
		}
	})
}

func (c *crashNode) done() error {
	c.ops.Wait()
	if err := c.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (c *crashNode) await(t *testing.T, state string) {
	t.Helper()
	must(t, c.WaitState("redis", state, 20*time.Second))
}

var crashes = []crash{
	{"CONNECTED", func(*testing.T, *crashNode) {}, func(*testing.T, *crashNode) {}},
	{"SNAPSHOTSTART", func(t *testing.T, c *crashNode) {
		must(t, c.Ctl("ioctl", "SNAPSHOTSTART", "redis").Err())
	}, func(*testing.T, *crashNode) {}},
	{"SNAPSHOTFREEZE", func(t *testing.T, c *crashNode) {
		c.gate(t, "before", true)
		c.background("snapshot", "redis")
		c.await(t, "SNAPSHOTFREEZE")
	}, func(t *testing.T, c *crashNode) {
		c.gate(t, "before", false)
		must(t, c.done())
		wake(t, c.Node, "redis", c.load.Clients[0])
	}},
	{"SNAPSHOTFREEZE, given up", func(t *testing.T, c *crashNode) {
		c.gate(t, "before", true)
		c.background("snapshot", "redis")
		c.await(t, "SNAPSHOTFREEZE")
	}, func(t *testing.T, c *crashNode) {
		must(t, c.Ctl("abort", "redis").Err())
		if err := c.done(); err == nil {
			t.Error("an aborted snapshot succeeded")
		}
		c.gate(t, "before", false)
		c.await(t, "RESTORED")
	}},
	{"SNAPSHOTDONE", func(t *testing.T, c *crashNode) {
		snapshot(t, c.Node, "redis", "redis-server")
	}, func(t *testing.T, c *crashNode) {
		held(t, c.Node, "redis", "redis-server", c.load, 500*time.Millisecond)
		wake(t, c.Node, "redis", c.load.Clients[0])
	}},
	{"RESTORESTART", func(t *testing.T, c *crashNode) {
		snapshot(t, c.Node, "redis", "redis-server")
		c.gate(t, "start", true)
		c.background("restore", "redis")
		c.await(t, "RESTORESTART")
	}, func(t *testing.T, c *crashNode) {
		c.gate(t, "start", false)
		_ = c.done() // that restore may fail; the next one does not
		c.await(t, "RESTORED")
	}},
	{"RESTORED", func(t *testing.T, c *crashNode) {
		snapshot(t, c.Node, "redis", "redis-server")
		wake(t, c.Node, "redis", c.load.Clients[0])
		rounds(t, c.load, 2)
	}, func(*testing.T, *crashNode) {}},
}

// TestFilterCrash kills the filter in every state and starts it again after a
// while. The clients notice nothing.
func TestFilterCrash(t *testing.T) {
	for _, away := range []time.Duration{0, time.Second, 5 * time.Second} {
		filterCrash(t, gated(), away)
	}
}

func filterCrash(t *testing.T, app harness.App, away time.Duration) {
	for _, cr := range crashes {
		t.Run(fmt.Sprintf("%s, away %v", cr.state, away), func(t *testing.T) {
			n, load := redisUp(t, harness.Options{Name: "crash", Apps: []harness.App{app}}, 100, clients.KeepAlive{})
			c := &crashNode{Node: n, load: load}
			unnoticed := watch(t, n.Net, vip)
			rounds(t, load, 1) // the capture knows all numbers from here on
			cr.reach(t, c)
			n.Filter.Kill()
			time.Sleep(away) // the length of the outage
			must(t, n.StartFilter())
			cr.leave(t, c)
			rounds(t, load, 4)
			// And once more all the way round.
			snapshot(t, n, "redis", "redis-server")
			wake(t, n, "redis", load.Clients[1])
			rounds(t, load, 2)
			unnoticed()
		})
	}
}

// TestReboot: rules, sets, addresses and processes are gone, what is on the
// disk is there. Held connections go on, and the packet rules are there before
// the address.
func TestReboot(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "boot"}, 50, clients.KeepAlive{})
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	snapshot(t, n, "redis", "redis-server")
	must(t, n.Down())
	purge(t, n)
	if out, err := n.Net.Node().Command("ip", "address", "del", prefix(), "dev", testnet.Iface).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	j, err := journal.Open(n.Path("state", "journal.db"))
	must(t, err)
	must(t, j.Apply([]journal.Entry{{Table: journal.Meta, Key: []byte("boot"), Value: []byte("the boot before")}}))
	must(t, j.Close())
	address := func() bool {
		out, err := n.Net.Node().Command("ip", "address", "show", "to", vip).Output()
		must(t, err)
		return len(out) > 0
	}

	must(t, n.StartFilter())
	if address() {
		t.Error("the address is there before the packet rules")
	}
	must(t, n.StartAgent())
	must(t, harness.Wait(10*time.Second, "the address is back", address))
	held(t, n, "redis", "redis-server", load, 2*time.Second)
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 4)
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[1])
	rounds(t, load, 2)
	unnoticed()
}

// TestFilterTerminated: SIGTERM leaves rules and records behind, so that the
// next filter goes on; for an upgrade of the program for example.
func TestFilterTerminated(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "term"}, 50, clients.KeepAlive{})
	unnoticed := watch(t, n.Net, vip)
	restart := func() {
		t.Helper()
		must(t, n.Filter.Stop(5*time.Second))
		must(t, n.StartFilter())
	}
	rounds(t, load, 1)
	restart()
	rounds(t, load, 1)
	snapshot(t, n, "redis", "redis-server")
	restart()
	held(t, n, "redis", "redis-server", load, time.Second)
	wake(t, n, "redis", load.Clients[0])
	restart()
	rounds(t, load, 4)
	unnoticed()
}
