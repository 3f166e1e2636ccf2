package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func mapsKeys[K comparable, V any](m map[K]V) iter.Seq[K] { return maps.Keys(m) }

const redisRequest = "Restore 192.000.002.100\r\n"

// say sends text to the port and gives the answer.
func (b *bench) say(text string) string {
	b.t.Helper()
	c, err := net.DialTimeout("tcp", b.addr, 10*time.Second)
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(c, text)
	line, _ := bufio.NewReader(c).ReadString('\n')
	return line
}

func restored(app, node string) func(map[string]*fakeNode) bool {
	return func(all map[string]*fakeNode) bool { return all[node].apps[app].State == control.StateRestored }
}

func TestOneRestore(t *testing.T) {
	n := newNodes("a", "b", "c")
	hold(n.all["b"].apps["redis"], false)
	under := make(chan struct{})
	n.hook = func(context.Context, string) error { <-under; return nil }
	b := run(t, n, nil)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if got := b.say(redisRequest); got != "OK\r\n" {
				t.Errorf("answer %q", got)
			}
		})
	}
	wg.Wait()
	b.until("a restore", func(map[string]*fakeNode) bool { return len(n.events) > 0 })
	b.rounds(3)
	close(under)
	b.until("restored", restored("redis", "b"))
	if got := b.say(redisRequest); got != "OK\r\n" { // late
		t.Errorf("answer %q", got)
	}
	b.rounds(3)
	if got := n.trace(); got != "restore redis on b" {
		t.Errorf("100 requests: %s", got)
	}
	if got := b.say("Restore 192.000.002.009\r\n"); got != "ERR no application has the VIP 192.0.2.9\r\n" {
		t.Errorf("answer %q", got)
	}
}

func TestElsewhere(t *testing.T) {
	n := newNodes("a", "b", "c")
	n.all["a"].apps["redis"].MayRun = false
	hold(n.all["a"].apps["redis"], true) // nobody sends a request
	n.all["b"].load, n.all["c"].load = 0.3, 0.2
	n.hook = func(_ context.Context, event string) error {
		if event == "restore redis on c held on a" {
			return errors.New("port 6379 is taken")
		}
		return nil
	}
	b := run(t, n, nil)
	b.until("restored", restored("redis", "b"))
	if got := n.trace(); got != "restore redis on c held on a, restore redis on b held on a" {
		t.Error(got)
	}
	if b.log.count("port 6379 is taken") != 1 {
		t.Error("the failure is not in the log")
	}
}

func TestUnreachableHolder(t *testing.T) {
	n := newNodes("a", "b", "c")
	hold(n.all["a"].apps["redis"], true)
	n.all["a"].apps["redis"].MayRun = false
	n.all["b"].apps["redis"].MayRun, n.all["c"].apps["redis"].MayRun = false, false
	b := run(t, n, nil)
	b.rounds(2)
	n.set(func(all map[string]*fakeNode) {
		all["a"].down = true
		all["b"].apps["redis"].MayRun, all["c"].apps["redis"].MayRun = true, true
	})
	if got := b.say(redisRequest); got != "OK\r\n" {
		t.Errorf("answer %q", got)
	}
	b.rounds(10)
	if got := n.trace(); got != "" {
		t.Fatalf("begun without the holder: %s", got)
	}
	for _, text := range []string{"does not answer, and not taken over", "what it holds is not taken over: connection refused"} {
		if c := b.log.count(text); c != 1 {
			t.Errorf("%q is logged %d times", text, c)
		}
	}
	n.set(func(all map[string]*fakeNode) { all["a"].down = false })
	b.until("restored", restored("redis", "b"))
}

// A node that swallows what is sent to it delays nobody.
func TestHungNode(t *testing.T) {
	n := newNodes("a", "b", "c")
	n.all["c"].hung = true
	hold(n.all["a"].apps["redis"], false)
	b := run(t, n, nil)
	b.rounds(2)
	began := time.Now()
	b.say(redisRequest)
	b.until("restored", restored("redis", "a"))
	if took := time.Since(began); took > pollTimeout {
		t.Errorf("the restore took %v", took)
	}
	b.until("a line in the log", func(map[string]*fakeNode) bool { return b.log.count("no answer within") == 1 })
}

// A scheduler that ends in the middle leaves nothing that the next one cannot
// take up: a restore is undone by its agent, and begun anew.
func TestAnotherScheduler(t *testing.T) {
	old := grace
	grace = 10 * time.Millisecond
	defer func() { grace = old }()
	n := newNodes("a", "b", "c")
	hold(n.all["b"].apps["redis"], true)
	n.hook = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
	first := run(t, n, nil)
	first.until("a restore", func(map[string]*fakeNode) bool { return len(n.events) == 1 })
	first.stop()
	if got := first.log.count("cut off"); got != 1 {
		t.Errorf("logged %d times", got)
	}
	n.set(func(all map[string]*fakeNode) {
		n.hook = nil
		if st := all["b"].apps["redis"].State; st != control.StateSnapshotDone {
			t.Fatalf("state %s", st)
		}
	})
	second := run(t, n, nil)
	second.until("restored", restored("redis", "b"))
	// What the agent goes on with by itself is waited for.
	n.set(func(all map[string]*fakeNode) {
		hold(all["b"].apps["redis"], true)
		all["b"].apps["redis"].Operation = "restore"
	})
	third := run(t, n, nil)
	third.rounds(5)
	n.set(func(all map[string]*fakeNode) {
		*all["b"].apps["redis"] = pb.NodeApp{Name: "redis", State: control.StateRestored, MayRun: true}
	})
	third.rounds(3)
	if got := n.trace(); got != "restore redis on b, restore redis on b" {
		t.Error(got)
	}
}

func TestHibernateAndWake(t *testing.T) {
	n := newNodes("a", "b", "c")
	n.all["a"].apps["redis"].State, n.all["a"].apps["redis"].IdleMs = control.StateConnected, 59_000
	b := run(t, n, func(c *config.Config) { c.Apps["redis"].Hibernate.After = config.Duration(time.Minute) })
	b.rounds(3)
	if got := n.trace(); got != "" {
		t.Fatalf("too early: %s", got)
	}
	n.set(func(all map[string]*fakeNode) { all["a"].apps["redis"].IdleMs = 60_000 })
	b.until("asleep", func(all map[string]*fakeNode) bool {
		return all["a"].apps["redis"].State == control.StateSnapshotDone
	})
	b.rounds(3)
	if got := b.say(redisRequest); got != "OK\r\n" {
		t.Errorf("answer %q", got)
	}
	b.until("restored", restored("redis", "a"))
	b.rounds(3)
	if got := n.trace(); got != "snapshot redis on a, restore redis on a" {
		t.Error(got)
	}
}

func TestBalance(t *testing.T) {
	n := newNodes("a", "b", "c")
	for app, conns := range map[string]uint32{"redis": 10, "nginx": 20} {
		n.all["a"].apps[app].State, n.all["a"].apps[app].Connections = control.StateConnected, conns
	}
	n.all["a"].load, n.all["b"].load, n.all["c"].load = 1.4, 0.2, 0.5
	n.moved = func(_, from, to string) { n.all[from].load, n.all[to].load = 0.7, 0.7 }
	b := run(t, n, func(c *config.Config) {
		c.Cluster.Balance = config.Balance{High: 1, Low: 0.3, Cooldown: config.Duration(30 * time.Millisecond)}
	})
	b.until("moved", restored("redis", "b"))
	began := time.Now()
	for time.Since(began) < 100*time.Millisecond { // several times its cooldown
		b.rounds(1)
	}
	if got := n.trace(); got != "migrate redis from a to b" {
		t.Error(got)
	}
}

func TestPort(t *testing.T) {
	n := newNodes("a")
	hold(n.all["a"].apps["redis"], false)
	b := run(t, n, nil)
	b.rounds(1)
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "\r\n", strings.Repeat("x", 4096), "Restore 999.000.002.100\r\n", "\x16\x03\x01\x02\x00\x01\n"} {
		if got := b.say(text); !strings.HasPrefix(got, "ERR ") {
			t.Errorf("%.20q: %q", text, got)
		}
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range 5000 {
		c, err := net.DialTimeout("tcp", b.addr, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		if i%2 == 0 {
			_, _ = io.WriteString(c, "Restore 19")
		}
	}
	if got := n.trace(); got != "" {
		t.Fatalf("garbage began %s", got)
	}
	if got := b.say(redisRequest); got != "OK\r\n" {
		t.Errorf("beside 5000 connections: %q", got)
	}
	b.until("restored", restored("redis", "a"))
}

func TestReload(t *testing.T) {
	n := newNodes("a", "b")
	hold(n.all["b"].apps["redis"], true)
	b := run(t, n, func(c *config.Config) { c.Cluster.Nodes = c.Cluster.Nodes[:1] })
	b.until("a is asked", func(all map[string]*fakeNode) bool { return all["a"].asked > 3 })
	b.newer = func() (*config.Config, error) { return nil, errors.New("cluster.toml:3:1: bad") }
	b.hups <- struct{}{}
	b.until("a line in the log", func(map[string]*fakeNode) bool { return b.log.count("the old one stays in force") == 1 })
	if got := n.trace(); got != "" {
		t.Fatal(got)
	}
	b.newer = func() (*config.Config, error) {
		c := testConfig(n)
		c.Cluster.Nodes = c.Cluster.Nodes[1:]
		return c, nil
	}
	b.hups <- struct{}{}
	b.until("restored", restored("redis", "b"))
	var asked int
	n.set(func(all map[string]*fakeNode) { asked = all["a"].asked })
	b.until("b is asked", func(all map[string]*fakeNode) bool { return all["b"].asked > 5 })
	n.set(func(all map[string]*fakeNode) {
		if all["a"].asked > asked+1 {
			t.Error("a node that is gone is asked on")
		}
	})
}

// A host that vanishes in the middle of an action does not keep it for ever.
func TestDeadNode(t *testing.T) {
	old := deadAfter
	deadAfter = 50 * time.Millisecond
	defer func() { deadAfter = old }()
	n := newNodes("a")
	hold(n.all["a"].apps["redis"], true)
	n.hook = func(ctx context.Context, _ string) error {
		n.set(func(all map[string]*fakeNode) { all["a"].down = true })
		<-ctx.Done()
		return ctx.Err()
	}
	b := run(t, n, nil)
	b.until("given up", func(map[string]*fakeNode) bool { return b.log.count("restore failed") > 0 })
}

func TestNodeStatus(t *testing.T) {
	st := nodeStatus(&pb.AgentNodeStatusReply{Node: "a", Load: math.NaN(), Apps: []*pb.NodeApp{
		nil,
		{Name: "x", State: "LATER", MayRun: true, IdleMs: -5},
		{Name: "y", State: control.StateRestored, MayRun: true, IdleMs: math.MaxInt64},
	}})
	if st.Load != -1 || len(st.Apps) != 2 {
		t.Fatalf("%+v", st)
	}
	if x := st.Apps[0]; x.State != appstate.Unknown || x.MayRun || x.Operation == "" || x.Idle != -1 || !strings.Contains(x.Fault, "LATER") {
		t.Errorf("%+v", x)
	}
	if y := st.Apps[1]; y.State != appstate.Restored || !y.MayRun || y.Idle < time.Hour {
		t.Errorf("%+v", y)
	}
	for _, load := range []float64{math.Inf(1), -3} {
		if st := nodeStatus(&pb.AgentNodeStatusReply{Load: load}); st.Load != -1 {
			t.Errorf("load %v is %v", load, st.Load)
		}
	}
}

func TestWrongNode(t *testing.T) {
	n := newNodes("a")
	n.all["a"].name = "z"
	hold(n.all["a"].apps["redis"], true)
	b := run(t, n, nil)
	b.until("a line in the log", func(map[string]*fakeNode) bool { return b.log.count(`node \"z\" answers at 198.51.100.1`) == 1 })
	if got := n.trace(); got != "" {
		t.Error(got)
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	node := write("node.toml", "name = \"elsewhere\"\n")
	write("cluster.toml", "[[node]]\nname = \"node-a\"\naddress = \"127.0.0.1\"\n")
	o := Options{SharedDir: dir, NodeFile: node}
	var mis Misconfigured
	if err := Run(t.Context(), o); !errors.As(err, &mis) || !strings.Contains(err.Error(), "no [scheduler]") {
		t.Errorf("without [scheduler]: %v", err)
	}
	o.Listen = "here"
	if err := Run(t.Context(), o); !errors.As(err, &mis) || !strings.Contains(err.Error(), "ADDR:PORT") {
		t.Errorf("a listen address: %v", err)
	}
	o.Listen = taken.Addr().String()
	if err := Run(t.Context(), o); err == nil || errors.As(err, &mis) || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a port that is taken: %v", err)
	}
	write("cluster.toml", fmt.Sprintf("[[node]]\nname = \"node-a\"\naddress = \"127.0.0.1\"\nagent_port = 1\n[scheduler]\naddress = \"127.0.0.1\"\nport = %d\n",
		taken.Addr().(*net.TCPAddr).Port))
	taken.Close()
	o.Listen = ""
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	o.Ready = func() { close(ready) }
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	write("cluster.toml", "[[node]\n")
	var faults config.Faults
	if err := Run(t.Context(), o); !errors.As(err, &faults) {
		t.Errorf("a faulty file: %v", err)
	}
}
