package test

import (
	"flag"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

var snapshots = flag.Int("snapshots", 5, "how many TestSnapshotUnderTraffic takes")

// TestSnapshotUnderTraffic takes snapshots while every client sends one
// command after the other without pause: each snapshot falls between requests
// and replies, and the next request wakes the application at once.
func TestSnapshotUnderTraffic(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "traffic"}, 200)
	underTraffic(t, n, load, *snapshots)
}

// TestSnapshotWithLoss is the same where one packet in fifty is lost, each way.
func TestSnapshotWithLoss(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "loss", Apps: []harness.App{patient()}}, 50)
	for _, chain := range []string{"INPUT", "OUTPUT"} {
		out, err := n.Net.Client().Command(iptables(), "-A", chain, "-p", "tcp", "-m", "statistic", "--mode", "random",
			"--probability", "0.02", "-j", "DROP").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	underTraffic(t, n, load, *snapshots)
}

// patient is Redis whose snapshots wait out a few retransmissions.
func patient() harness.App {
	a := harness.Redis("redis", vip)
	a.Checkpoint = `drain_timeout = "15s"`
	return a
}

func underTraffic(t *testing.T, n *harness.Node, load *clients.Load, snapshots int) {
	t.Helper()
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1) // the capture knows all numbers from here on
	var stop atomic.Bool
	done := make([]atomic.Int64, len(load.Clients))
	var wg sync.WaitGroup
	errs := make([]error, len(load.Clients))
	for i, c := range load.Clients {
		wg.Go(func() {
			for !stop.Load() {
				if err := c.Command(reply); err != nil {
					errs[i] = fmt.Errorf("client %d: %w", i, err)
					return
				}
				done[i].Add(1)
			}
		})
	}
	for i := range snapshots {
		id, err := n.Snapshot("redis")
		if err != nil {
			t.Errorf("snapshot %d: %v", i+1, err)
			break
		}
		if err := n.WaitState("redis", "RESTORED", 20*time.Second); err != nil {
			t.Errorf("after snapshot %s: %v", id, err)
			break
		}
		// Every client gets on before the next one.
		before := make([]int64, len(done))
		for c := range done {
			before[c] = done[c].Load()
		}
		if err := harness.Wait(reply, "every client gets on", func() bool {
			for c := range done {
				if done[c].Load() < before[c]+4 {
					return false
				}
			}
			return true
		}); err != nil {
			t.Errorf("after snapshot %s: %v", id, err)
			break
		}
		t.Logf("snapshot %d, %s: client 0 has %d replies", i+1, id, done[0].Load())
	}
	stop.Store(true)
	wg.Wait()
	must(t, clients.Summary(slices.DeleteFunc(errs, func(err error) bool { return err == nil })))
	rounds(t, load, 4)
	unnoticed()
}

// TestPipelinesAtBoundary takes snapshots with boundary "resp" while Redis clients
// send commands of many segments without ever waiting for a reply. Between two of
// them no connection is at a turn; each freezes in the middle of what is on its
// way, and every reply is right.
func TestPipelinesAtBoundary(t *testing.T) {
	n := pipelinedRedis(t, "pipes", false)
	pipelined(t, n, 8, 100_000, 10)
}

// TestPipelinesBehindNode is the same with Redis in a network namespace, to which
// what is cut goes over a link.
func TestPipelinesBehindNode(t *testing.T) {
	n := pipelinedRedis(t, "pipesns", true)
	pipelined(t, n, 4, 100_000, 3)
}

// TestPipelinesWithLoss is the same where one packet in fifty is lost, each way.
func TestPipelinesWithLoss(t *testing.T) {
	n := pipelinedRedis(t, "pipeloss", false)
	for _, chain := range []string{"INPUT", "OUTPUT"} {
		out, err := n.Net.Client().Command(iptables(), "-A", chain, "-p", "tcp", "-m", "statistic", "--mode", "random",
			"--probability", "0.02", "-j", "DROP").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	pipelined(t, n, 4, 30_000, 6)
}

// pipelinedRedis is a node with a Redis whose clients pipeline.
func pipelinedRedis(t *testing.T, name string, namespace bool) *harness.Node {
	t.Helper()
	app := harness.Redis("redis", vip)
	app.Namespace = namespace
	app.Checkpoint = "boundary = \"resp\"\ndrain_timeout = \"15s\""
	n := newNode(t, harness.Options{Name: name, Apps: []harness.App{app}})
	must(t, n.Up())
	return n
}

// pipelined takes snapshots while clients keep commands with values of size bytes
// on their way, and checks every reply.
func pipelined(t *testing.T, n *harness.Node, nClients, size, snapshots int) {
	t.Helper()
	const depth = 8
	var (
		pipes []*clients.Pipeline
		wg    sync.WaitGroup
		stop  = make(chan struct{})
		errs  = make([]error, nClients)
	)
	for i := range nClients {
		p, err := clients.DialPipeline(n.Dial, at(6379), i, depth, size)
		must(t, err)
		t.Cleanup(func() { p.Close() })
		pipes = append(pipes, p)
		wg.Go(func() { errs[i] = p.Run(stop, reply) })
	}
	getsOn := func() error {
		before := make([]int64, nClients)
		for i, p := range pipes {
			before[i] = p.Replies()
		}
		return harness.Wait(reply, "every client gets on", func() bool {
			for i, p := range pipes {
				if p.Replies() < before[i]+3*depth {
					return false
				}
			}
			return true
		})
	}
	err := getsOn()
	for i := 0; i < snapshots && err == nil; i++ {
		var id string
		if id, err = n.Snapshot("redis"); err != nil {
			err = fmt.Errorf("snapshot %d: %w", i+1, err)
			break
		}
		if err = n.WaitState("redis", "RESTORED", 20*time.Second); err == nil {
			err = getsOn()
		}
		if err != nil {
			err = fmt.Errorf("after snapshot %s: %w", id, err)
		}
		t.Logf("snapshot %d, %s: client 0 has %d replies", i+1, id, pipes[0].Replies())
	}
	close(stop)
	wg.Wait()
	reasons, rerr := n.Reasons("redis")
	must(t, rerr)
	if cut := reasons["frozen-cut"]; cut == 0 {
		t.Errorf("no segment was cut at a boundary: %v", reasons)
	} else {
		t.Logf("%d segments were cut at a boundary", cut)
	}
	must(t, clients.Summary(slices.DeleteFunc(append(errs, err), func(err error) bool { return err == nil })))
}
