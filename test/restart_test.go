package test

import (
	"fmt"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const vipBeside = "10.77.0.101"

// besides is a node with two copies of Redis; see aside.
func besides(t *testing.T, name string, count int, k clients.KeepAlive) (n *harness.Node, away, back *clients.Load, unnoticed func()) {
	t.Helper()
	n = newNode(t, harness.Options{Name: name, Apps: []harness.App{harness.Redis("redis", vip), harness.Redis("second", vipBeside)}})
	must(t, n.Up())
	away, back, unnoticed = aside(t, n, count, k)
	return n, away, back, unnoticed
}

// aside connects as many clients to each of a node's two copies of Redis: those of
// the first are held, those of the second are translated. What is called at the end
// fails the test for what one of them could notice.
func aside(t *testing.T, n *harness.Node, count int, k clients.KeepAlive) (away, back *clients.Load, unnoticed func()) {
	t.Helper()
	away = redisClients(t, n, count, k)
	back, err := clients.OpenLoad(n.Dial, vipBeside+":6379", nextClient, count, k)
	must(t, err)
	nextClient += count
	t.Cleanup(back.Close)
	rounds(t, back, 1)
	must(t, n.Ctl("snapshot", "second").Err())
	wake(t, n, "second", back.Clients[0])
	first, second := watch(t, n.Net, vip), watch(t, n.Net, vipBeside)
	rounds(t, away, 1) // the captures know all numbers from here on
	rounds(t, back, 1)
	must(t, n.Ctl("snapshot", "redis").Err())
	return away, back, func() {
		t.Helper()
		first()
		second()
	}
}

// gapOf reads for how long the filter says that nobody filtered before it.
func gapOf(t *testing.T, d *harness.Daemon) (gap time.Duration, atMost bool) {
	t.Helper()
	m := regexp.MustCompile(`the queue was without a filter for (at most )?([0-9.]+m?s)`).FindStringSubmatch(d.Log())
	if m == nil {
		t.Fatalf("the filter does not say for how long nobody filtered:\n%s", d.Log())
	}
	gap, err := time.ParseDuration(m[2])
	must(t, err)
	return gap, m[1] != ""
}

// silence is the longest time between two packets.
func silence(packets []gopacket.Packet) (longest time.Duration) {
	for i := 1; i < len(packets); i++ {
		longest = max(longest, packets[i].Metadata().Timestamp.Sub(packets[i-1].Metadata().Timestamp))
	}
	return longest
}

// TestHotRestart puts another binary in the filter's place, between clients that
// are held and clients that speak: first in an orderly way, then by a kill. The
// new filter says for how long nobody filtered, and nobody notices.
func TestHotRestart(t *testing.T) {
	n, away, back, unnoticed := besides(t, "restart", 50, clients.Strictest)
	binary, err := os.ReadFile(n.Program("nfconnfilter"))
	must(t, err)
	next := n.Path("nfconnfilter-next")
	must(t, os.WriteFile(next, binary, 0o755))
	// One packet in 4 ms or so, and every client is silent for longer than the gap:
	// what the capture lacks is the gap, and what is lost comes back later.
	talk := back.Talk(400*time.Millisecond, reply)
	const resolution = 100 * time.Millisecond

	for _, end := range []string{"stopped", "killed"} {
		out, err := n.Net.Node().Capture(testnet.Iface, "tcp out src "+vipBeside)
		must(t, err)
		old := n.Filter
		if end == "killed" {
			old.Kill()
		} else {
			must(t, old.Stop(5*time.Second))
		}
		n.Instead = map[string]string{"nfconnfilter": next}
		must(t, n.StartFilter())
		gap, atMost := gapOf(t, n.Filter)
		replies := talk.Replies()
		must(t, harness.Wait(reply, "every client has been served since", func() bool {
			for i, k := range talk.Replies() {
				if k < replies[i]+2 {
					return false
				}
			}
			return true
		}))
		seen := silence(out.Stop())
		must(t, out.Err())
		t.Logf("%s: the filter says %v (at most: %v), the capture was silent for %v", end, gap, atMost, seen)
		switch {
		case atMost != (end == "killed"):
			t.Errorf("%s: at most: %v", end, atMost)
		case gap <= 0 || seen > gap+resolution:
			t.Errorf("%s: the filter says %v, and nothing was sent for %v", end, gap, seen)
		case !atMost && gap > seen+resolution, gap > seen+resolution+time.Second:
			t.Errorf("%s: the filter says %v, and something was sent %v before", end, gap, seen)
		}
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", n.Filter.PID())); err != nil || exe != next {
			t.Errorf("%s filters, %v", exe, err)
		}
		must(t, clients.Summary(away.Idle()))
	}
	must(t, clients.Summary(talk.Stop()))
	held(t, n, "redis", "nothing", away, 3*time.Second) // as long as a keepalive's patience
	wake(t, n, "redis", away.Clients[0])
	rounds(t, away, 2)
	rounds(t, back, 2)
	unnoticed()
}
