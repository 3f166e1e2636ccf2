package test

import (
	"net"
	"testing"
	"time"

	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// dualStack is one application with an address of each family, and a server
// that takes both on one socket, where the connections of IPv4 show as mapped
// addresses.
func dualStack(t *testing.T) {
	nginx(t, vip4+","+vip6, "[::]:80 ipv6only=off", net.JoinHostPort(vip4, "80"), net.JoinHostPort(vip6, "80"))
}

// extensionHeaders sends a held application its data behind extension headers
// and in fragments, as the network may, by hand: of the former the segment is
// taken, the latter are dropped, and come again whole.
func extensionHeaders(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "ext"}, 5, clients.KeepAlive{})
	victim := load.Clients[0]
	seq, ack := numbers(t, n, load, victim)
	snapshot(t, n, "redis", "redis-server")
	segment := func(payload string) []byte {
		return forge(victim.LocalAddr(), victim.RemoteAddr(), layers.TCP{Seq: seq, Ack: ack, ACK: true, PSH: true, Window: 500}, []byte(payload), nil)
	}
	behind := func(kind byte, header []byte, b []byte) []byte {
		header[0] = b[6]
		out := append(append(append([]byte(nil), b[:40]...), header...), b[40:]...)
		out[6] = kind
		out[4], out[5] = byte((len(out)-40)>>8), byte(len(out)-40)
		return out
	}
	before, err := n.Reasons("redis")
	must(t, err)
	// A fragment of a whole datagram: more are to come.
	inject(t, n, behind(44, []byte{0, 0, 0, 1, 0, 0, 0, 9}, segment("PING\r\n")))
	held(t, n, "redis", "redis-server", load, time.Second)
	after, err := n.Reasons("redis")
	must(t, err)
	t.Logf("a fragment: %v, before %v", after, before)
	inject(t, n, behind(60, []byte{0, 0, 1, 4, 0, 0, 0, 0}, segment("PING\r\n")))
	must(t, n.WaitState("redis", "RESTORED", 10*time.Second))
	// The client's own stack knows nothing of these octets: it is asked no more.
	must(t, victim.Reset())
	load.Clients = load.Clients[1:]
	rounds(t, load, 4)
}
