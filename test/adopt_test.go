package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// conns waits until the filter knows that many connections.
func conns(t *testing.T, n *harness.Node, app string, want int) []harness.Conn {
	t.Helper()
	var all []harness.Conn
	var err error
	werr := harness.Wait(10*time.Second, fmt.Sprintf("%d connections known", want), func() bool {
		all, err = n.Conns(app)
		return err == nil && len(all) == want
	})
	must(t, err)
	if werr != nil {
		t.Fatalf("%v: there are %d", werr, len(all))
	}
	return all
}

// TestAdopted: the process and its connections are older than everything that
// filter and agent know.
func TestAdopted(t *testing.T) {
	const count = 100
	app := harness.Redis("redis", vip)
	app.Start = append(app.Start, "--pidfile", "@app/redis.pid")
	n := newNode(t, harness.Options{Name: "adopt", Apps: []harness.App{app}})
	app.Process = fmt.Sprintf("pid_file = %q", n.Path("app", "redis.pid"))
	must(t, n.WriteApp(app))
	must(t, n.Up())
	load := redisClients(t, n, count, clients.KeepAlive{}, clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 3})
	before, err := n.Processes("redis-server")
	must(t, err)

	// Nothing of the two programs is left but the process and its address.
	must(t, n.Down())
	purge(t, n)
	must(t, os.RemoveAll(n.Path("state")))
	rounds(t, load, 2)

	must(t, n.StartFilter())
	must(t, n.StartAgent())
	r := n.Ctl("start", "redis")
	must(t, r.Err())
	if said := r.Stdout + r.Stderr; !strings.Contains(said, fmt.Sprintf("with %d connections", count)) {
		t.Errorf("start says %q", said)
	}
	after, err := n.Processes("redis-server")
	must(t, err)
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Fatalf("processes %v became %v", before, after)
	}
	for _, c := range conns(t, n, "redis", count) {
		if c.Role != "passive" || c.State != "CONNECT" || c.BytesIn == 0 || c.BytesOut == 0 {
			t.Fatalf("adopted as %+v", c)
		}
	}
	snapshot(t, n, "redis", "redis-server")
	held(t, n, "redis", "redis-server", load, 5*time.Second)
	wake(t, n, "redis", load.Clients[1])
	rounds(t, load, 4)

	// A filter that is started anew is told by the agent.
	n.Filter.Kill()
	must(t, n.StartFilter())
	conns(t, n, "redis", count)
	rounds(t, load, 2)
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 2)
}
