package test

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// begun counts what the schedulers of a cluster have begun, such as "restore".
func begun(t *testing.T, c *harness.Cluster, what string) (n int) {
	t.Helper()
	files, err := filepath.Glob(c.Nodes[0].Path("log", "*ckptctl-scheduler.log"))
	must(t, err)
	for _, f := range files {
		text, err := os.ReadFile(f)
		must(t, err)
		n += strings.Count(string(text), `msg="`+what+` begins"`)
	}
	return n
}

// TestSchedulerSleep: Redis is put to sleep while its clients only exchange
// heartbeats, and comes back for the first command; a hundred requests at once
// restore it once.
func TestSchedulerSleep(t *testing.T) {
	t.Parallel()
	const after = 3 * time.Second
	app := beating("match = \"PING\\r\\n\"\nreply = \"+PONG\\r\\n\"\n[hibernate]\nafter = \"" + after.String() + "\"\n")
	c, load := clusterUp(t, harness.ClusterOptions{Name: "sleep", Scheduler: true, LoadFiles: true, Apps: []harness.App{app}}, 50)
	beat, err := c.Dial(at(6379))
	must(t, err)
	defer beat.Close()
	state := func() string { return c.Peek("redis", vip)[0].State }
	asleep := func() time.Duration {
		t.Helper()
		began := time.Now()
		for state() != "SNAPSHOTDONE" {
			if time.Since(began) > 30*time.Second {
				t.Fatalf("not asleep after %v, in state %s", time.Since(began), state())
			}
			must(t, said(beat, "PING\r\n", "+PONG\r\n", reply))
			time.Sleep(600 * time.Millisecond) // the client's interval
		}
		return time.Since(began)
	}
	must(t, said(beat, "PING\r\n", "+PONG\r\n", reply))
	if took := asleep(); took < after-time.Second {
		t.Errorf("asleep after %v, too early", took)
	} else {
		t.Logf("asleep after %v", took)
	}
	began := time.Now()
	rounds(t, load, 1)
	t.Logf("50 clients answered after %v", time.Since(began))
	if n := begun(t, c, "restore"); n != 1 {
		t.Errorf("%d restores for 50 clients that spoke", n)
	}
	asleep()
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			conn, err := c.Nodes[0].Net.Node().Dial("tcp", c.Nodes[0].Net.NodeAddr().String()+":7400")
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(reply))
			_, _ = io.WriteString(conn, "Restore 010.077.000.100\r\n")
			if line, err := bufio.NewReader(conn).ReadString('\n'); line != "OK\r\n" {
				t.Errorf("the scheduler answers %q, %v", line, err)
			}
		})
	}
	wg.Wait()
	must(t, harness.Wait(reply, "restored by request", func() bool { return state() == "RESTORED" }))
	rounds(t, load, 4)
	if n := begun(t, c, "restore"); n != 2 {
		t.Errorf("a hundred requests began %d restores", n-1)
	}
}

// TestSchedulerElsewhere: the scheduler is killed while Redis is away, and what
// Redis needs on its node is taken. The next scheduler knows that clients wait,
// and brings it back on the other node when its own fails.
func TestSchedulerElsewhere(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "else", Scheduler: true, LoadFiles: true}, 50)
	snapshot(t, c.Nodes[0], "redis", "redis-server")
	l, err := c.Nodes[0].Net.Node().Listen("tcp", "0.0.0.0:6379")
	must(t, err)
	defer l.Close()
	c.Scheduler.Kill()
	answered := make(chan error, 1)
	go func() { answered <- clients.Summary(load.Round(reply)) }()
	must(t, harness.Wait(reply, "a client waits", func() bool {
		st, err := c.Nodes[0].Status("redis")
		return err == nil && st.RestoreRequested
	}))
	must(t, c.StartScheduler())
	must(t, <-answered)
	if node, err := c.Settled("redis", vip, reply); err != nil || node != 1 {
		t.Errorf("it runs on node %d, %v", node, err)
	}
	if n := begun(t, c, "restore"); n != 2 {
		t.Errorf("%d restores were begun, want one on each node", n)
	}
	rounds(t, load, 4)
}

// TestSchedulerBalance: Redis moves off a loaded node, once, under clients that
// keep speaking.
func TestSchedulerBalance(t *testing.T) {
	t.Parallel()
	const cooldown = 2 * time.Second
	c, load := clusterUp(t, harness.ClusterOptions{Name: "balance", Scheduler: true, LoadFiles: true,
		Lines: "[balance]\nhigh = 0.9\nlow = 0.5\ncooldown = \"" + cooldown.String() + "\"\n"}, 50)
	must(t, c.Nodes[0].SetLoad(1.5))
	for end := time.Now().Add(reply); begun(t, c, "migrate") == 0; {
		rounds(t, load, 1)
		if time.Now().After(end) {
			t.Fatal("nothing moves")
		}
	}
	must(t, harness.Wait(reply, "it runs on the other node", func() bool {
		rounds(t, load, 1)
		return harness.Running(c.Peek("redis", vip)[1].State)
	}))
	if node, err := c.Settled("redis", vip, reply); err != nil || node != 1 {
		t.Fatalf("it runs on node %d, %v", node, err)
	}
	// The load has moved with it: that is no reason to go back.
	must(t, c.Nodes[0].SetLoad(0.1))
	must(t, c.Nodes[1].SetLoad(1.5))
	for end := time.Now().Add(2*cooldown + 2*time.Second); time.Now().Before(end); {
		rounds(t, load, 1)
	}
	if n := begun(t, c, "migrate"); n != 1 {
		t.Errorf("it was moved %d times", n)
	}
}

// TestHibernate: on a node without a scheduler the agent itself puts Redis to
// sleep, and wakes it.
func TestHibernate(t *testing.T) {
	t.Parallel()
	app := beating("match = \"PING\\r\\n\"\nreply = \"+PONG\\r\\n\"\n[hibernate]\nafter = \"2s\"\n")
	n := newNode(t, harness.Options{Name: "hibernate", Apps: []harness.App{app}})
	must(t, n.Up())
	c, err := n.Dial(at(6379))
	must(t, err)
	defer c.Close()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		must(t, said(c, "SET k value\r\n", "+OK\r\n", reply)) // twice a second, and awake for it
		if st, err := n.Status("redis"); err != nil || st.State != "CONNECTED" {
			t.Fatalf("in state %s while a client speaks, %v", st.State, err)
		}
	}
	must(t, harness.Wait(reply, "asleep", func() bool {
		must(t, said(c, "PING\r\n", "+PONG\r\n", reply))
		time.Sleep(500 * time.Millisecond) // the client's interval
		st, err := n.Status("redis")
		return err == nil && st.State == "SNAPSHOTDONE"
	}))
	gone(t, n, "redis-server")
	must(t, said(c, "GET k\r\n", "$5\r\nvalue\r\n", reply))
}
