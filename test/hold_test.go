package test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// TestPlainRedis runs the clients against Redis alone: what they check must
// hold without this project, or the other tests would prove nothing.
func TestPlainRedis(t *testing.T) {
	n := newNode(t, harness.Options{Name: "plain"})
	must(t, n.Net.Node().AddAddr(testnet.Iface, prefix()))
	cmd := n.Net.Node().Command("redis-server", "--bind", vip, "--port", "6379", "--save", "", "--dir", n.Path("app"),
		"--protected-mode", "no", "--maxclients", "8000")
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	must(t, harness.Wait(10*time.Second, "redis answers", func() bool {
		c, err := n.Dial(at(6379))
		if err == nil {
			c.Close()
		}
		return err == nil
	}))
	load := redisClients(t, n, 1000)
	load.Clients[0].Piece = 1
	rounds(t, load, 5)
	must(t, clients.Summary(load.Idle()))
}

// cycles holds and wakes three times on the same connections.
func cycles(t *testing.T, n *harness.Node, load *clients.Load) {
	t.Helper()
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1) // the capture knows all numbers from here on
	for i := range 3 {
		snapshot(t, n, "redis", "redis-server")
		held(t, n, "redis", "redis-server", load, hold())
		took := wake(t, n, "redis", load.Clients[(i*7)%len(load.Clients)])
		t.Logf("cycle %d: %d clients, the waking command took %v", i+1, len(load.Clients), took.Round(100*time.Microsecond))
		rounds(t, load, 4)
	}
	s, err := n.Status("redis")
	must(t, err)
	if s.Connections["CONNECT"] != len(load.Clients) {
		t.Errorf("connections after three cycles: %v, want %d in CONNECT", s.Connections, len(load.Clients))
	}
	unnoticed()
}

func TestRedisHoldAndWake(t *testing.T) {
	t.Parallel() // what mostly waits waits together, once all other tests are done
	n, load := redisUp(t, harness.Options{Name: "hold"}, 1000)
	cycles(t, n, load)
}

// TestKeepaliveStrict is the same where every client gives up after three
// unanswered seconds.
func TestKeepaliveStrict(t *testing.T) {
	t.Parallel()
	keepaliveStrict(t)
}

func keepaliveStrict(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "strict"}, 1000, clients.Strictest)
	cycles(t, n, load)
}

// bulkApp is the byte-counting server; it reads slowly enough that the writers
// are busy for several seconds.
func bulkApp(n *harness.Node, counts string) harness.App {
	return harness.App{
		Name: "count", VIP: vip, Ports: []int{9000},
		Start: []string{filepath.Join(toolDir, "bytecount"), "-listen", at(9000), "-file", counts, "-rate", fmt.Sprint(2 << 20)},
	}
}

// TestBulkWriters takes a forced snapshot while clients write 16 MiB each.
func TestBulkWriters(t *testing.T) {
	const (
		writers = 8
		total   = 16 << 20
	)
	// The writers speak all the time, so the application would be woken at once: a
	// scheduler that only takes the request lets the test decide.
	n := newNode(t, harness.Options{Name: "bulk", Scheduler: "127.0.0.1:7400"})
	sched, err := n.StartScheduler("127.0.0.1:7400")
	must(t, err)
	t.Cleanup(sched.Close)
	path := n.Path("counts")
	counts, err := clients.OpenCountFile(path)
	must(t, err)
	t.Cleanup(func() { counts.Close() })
	must(t, n.WriteApp(placed(bulkApp(n, path))))
	must(t, n.Up())
	must(t, n.Ctl("start", "count").Err())

	var (
		wg   sync.WaitGroup
		errs = make([]error, writers)
		recs = make([]*clients.Record, writers)
	)
	ws := make([]*clients.ByteWriter, writers)
	for i := range ws {
		ws[i], err = clients.DialByteWriter(n.Dial, at(9000), total, clients.Mixed[i%len(clients.Mixed)])
		must(t, err)
		t.Cleanup(func() { ws[i].Close() })
		wg.Go(func() { errs[i] = ws[i].Run(time.Now().Add(hold() + 2*time.Minute)) })
	}
	t.Cleanup(func() { // before the writers are closed, so that a failure ends soon
		for _, w := range ws {
			w.Close()
		}
		wg.Wait()
	})
	must(t, harness.Wait(10*time.Second, "every writer has sent 2 MiB", func() bool {
		for i, w := range ws {
			if recs[i] = counts.Find(w.Port()); recs[i] == nil || recs[i].Count() < 2<<20 {
				return false
			}
		}
		return true
	}))
	adopt(t, n, "count")
	snapshot(t, n, "count", "bytecount", "--force", "--drain-timeout", "1s")
	before := make([]uint64, writers)
	for i, r := range recs {
		before[i] = r.Count()
		if before[i] >= total {
			t.Fatalf("writer %d had finished before the snapshot", i)
		}
	}
	time.Sleep(hold())
	gone(t, n, "bytecount")
	want := "Restore 010.077.000.100\r\n"
	if overIPv6() {
		want = "Restore fd77:0000:0000:0000:0000:0000:0000:0100\r\n"
	}
	if req := sched.Requests(); len(req) == 0 || req[0] != want {
		t.Errorf("restore requests: %q", req)
	}

	// Watch each count from before the restore until its first new byte.
	first := make([]time.Time, writers)
	watched := make(chan error, 1)
	go func() {
		watched <- harness.Watch(20*time.Second, "new bytes of every writer", func() bool {
			all := true
			for i, r := range recs {
				if first[i].IsZero() && r.Count() > before[i] {
					first[i] = time.Now()
				}
				all = all && !first[i].IsZero()
			}
			return all
		})
	}()
	done := make(chan harness.Result, 1)
	go func() { done <- n.Ctl("restore", "count") }()
	restored, err := n.AwaitState("count", "RESTORED", 20*time.Second)
	r := <-done
	werr := <-watched
	must(t, r.Err())
	must(t, err)
	must(t, werr)
	for i, f := range first {
		late := f.Sub(restored)
		t.Logf("writer %d: held at %d bytes, next bytes %v after RESTORED", i, before[i], late.Round(100*time.Microsecond))
		if late > 50*time.Millisecond {
			t.Errorf("writer %d: next bytes %v after RESTORED, want within 50 ms", i, late)
		}
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Error(err)
		}
		if c, w := recs[i].Count(), recs[i].Wrong(); c != total || w != 0 {
			t.Errorf("writer %d: counted %d bytes, %d wrong, want %d and 0", i, c, w, total)
		}
	}
}
