package test

import (
	"net"
	"strconv"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// wireCount is how many segments a remote has sent to the VIP, and got from it.
type wireCount struct{ from, to uint64 }

func countWire(packets []gopacket.Packet) map[string]wireCount {
	all := map[string]wireCount{}
	for _, p := range packets {
		tcp, _ := p.TransportLayer().(*layers.TCP)
		if tcp == nil {
			continue
		}
		flow := p.NetworkLayer().NetworkFlow()
		src := net.JoinHostPort(flow.Src().String(), strconv.Itoa(int(tcp.SrcPort)))
		dst := net.JoinHostPort(flow.Dst().String(), strconv.Itoa(int(tcp.DstPort)))
		if src == at(6379) {
			c := all[dst]
			c.to++
			all[dst] = c
		} else {
			c := all[src]
			c.from++
			all[src] = c
		}
	}
	return all
}

// TestConnStatistics: what conns says of held and of translated connections is
// what is on the wire.
func TestConnStatistics(t *testing.T) {
	const count = 5
	n, load := redisUp(t, harness.Options{Name: "conns"}, count, clients.Strictest)
	for _, c := range conns(t, n, "redis", count) {
		if c.IdleSeconds != -1 || c.Reasons["handshake"] < 2 || c.SegmentsIn > 4 {
			t.Fatalf("data in the kernel was seen: %+v", c)
		}
	}
	snapshot(t, n, "redis", "redis-server")
	capture, err := n.Net.Node().Capture(testnet.Iface, "tcp")
	must(t, err)
	defer capture.Stop()
	byRemote := func() map[string]harness.Conn {
		m := map[string]harness.Conn{}
		for _, c := range conns(t, n, "redis", count) {
			sum := uint64(0)
			for _, k := range c.Reasons {
				sum += k
			}
			if sum != c.SegmentsIn+c.SegmentsOut {
				t.Errorf("%d verdicts: %+v", sum, c)
			}
			m[c.Remote] = c
		}
		return m
	}
	// between runs f and compares what the counters say of the time with what
	// was seen on the wire in less than that time, and in more.
	between := func(f func(before map[string]harness.Conn), out func(harness.Conn) uint64) {
		t.Helper()
		more := countWire(capture.Packets())
		before := byRemote()
		less := countWire(capture.Packets())
		f(before)
		lessEnd := countWire(capture.Packets())
		after := byRemote()
		moreEnd := countWire(capture.Packets())
		for r, b := range before {
			in, sent := after[r].SegmentsIn-b.SegmentsIn, out(after[r])-out(b)
			if in < lessEnd[r].from-less[r].from || in > moreEnd[r].from-more[r].from || in == 0 {
				t.Errorf("%s: %d segments in, the wire had %d to %d", r, in, lessEnd[r].from-less[r].from, moreEnd[r].from-more[r].from)
			}
			if sent < lessEnd[r].to-less[r].to || sent > moreEnd[r].to-more[r].to || sent == 0 {
				t.Errorf("%s: %d segments to the remote, the wire had %d to %d", r, sent, lessEnd[r].to-less[r].to, moreEnd[r].to-more[r].to)
			}
		}
	}
	between(func(before map[string]harness.Conn) {
		must(t, harness.Wait(2*reply, "three keepalives of each are answered", func() bool {
			for r, c := range byRemote() {
				if b := before[r]; c.Answered < b.Answered+3 || c.Reasons["held-answered"] < b.Reasons["held-answered"]+3 {
					return false
				}
				if c.IdleSeconds < 0 || c.IdleSeconds > 5 {
					t.Errorf("a keepalive a second, and idle for %v s", c.IdleSeconds)
				}
			}
			return true
		}))
	}, func(c harness.Conn) uint64 { return c.SentToRemote })
	wake(t, n, "redis", load.Clients[0])
	between(func(map[string]harness.Conn) { rounds(t, load, 4) },
		func(c harness.Conn) uint64 { return c.SegmentsOut })
	for _, c := range byRemote() {
		if c.Reasons["translated"] == 0 || !c.Translated {
			t.Errorf("translated: %+v", c)
		}
	}
}
