package test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// checksumErrors is the number of TCP segments that a namespace's stack has
// dropped for a wrong checksum (RFC 4022, tcpInErrs; Linux counts these apart
// as InCsumErrors in /proc/net/snmp).
func checksumErrors(t *testing.T, ns *testnet.NS) string {
	t.Helper()
	var text []byte
	must(t, ns.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/snmp")
		return err
	}))
	var names []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, name := range names {
			if name == "InCsumErrors" {
				return f[i]
			}
		}
	}
	t.Fatalf("no InCsumErrors in /proc/net/snmp: %s", text)
	return ""
}

// wrongChecksums computes the checksum of each captured TCP segment anew.
func wrongChecksums(packets []gopacket.Packet) error {
	var errs []error
	for _, p := range packets {
		tcp, _ := p.TransportLayer().(*layers.TCP)
		if tcp == nil {
			continue
		}
		flow := p.NetworkLayer().NetworkFlow()
		segment := append(bytes.Clone(tcp.Contents), tcp.Payload...)
		got := tcp.Checksum
		segment[16], segment[17] = 0, 0
		if want := checksum(flow.Src().Raw(), flow.Dst().Raw(), segment); got != want {
			errs = append(errs, fmt.Errorf("%v:%d > %v:%d seq %d, %d bytes: checksum %#04x, want %#04x",
				flow.Src(), tcp.SrcPort, flow.Dst(), tcp.DstPort, tcp.Seq, len(tcp.Payload), got, want))
		}
	}
	return errors.Join(errs...)
}

// checksum is the TCP checksum of a segment (RFC 9293, section 3.1; RFC 8200,
// section 8.1).
func checksum(src, dst, segment []byte) uint16 {
	var b bytes.Buffer
	b.Write(src)
	b.Write(dst)
	b.Write([]byte{0, 6, byte(len(segment) >> 8), byte(len(segment))}) // the zeros of the longer pseudo header add nothing
	b.Write(segment)
	if b.Len()%2 == 1 {
		b.WriteByte(0)
	}
	sum := uint32(0)
	for s := b.Bytes(); len(s) > 0; s = s[2:] {
		sum += uint32(s[0])<<8 | uint32(s[1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// TestWrongChecksums: the check itself sees a single wrong bit.
func TestWrongChecksums(t *testing.T) {
	a, b := &net.TCPAddr{IP: net.IPv4(10, 77, 0, 1), Port: 6379}, &net.TCPAddr{IP: net.IPv4(10, 77, 0, 2), Port: 40000}
	for _, payload := range []string{"", "x", ":1\r\n", "abc"} {
		raw := forge(a, b, layers.TCP{Seq: 1, Ack: 2, ACK: true}, []byte(payload), nil)
		decode := func() []gopacket.Packet {
			return []gopacket.Packet{gopacket.NewPacket(raw, layers.LayerTypeIPv4, gopacket.Default)}
		}
		if err := wrongChecksums(decode()); err != nil {
			t.Errorf("%q: %v", payload, err)
		}
		raw[27] ^= 0x10 // the sequence number
		if err := wrongChecksums(decode()); err == nil {
			t.Errorf("%q: a wrong bit was not seen", payload)
		}
	}
}

// TestSmallSegmentChecksums sends segments of a byte, of a few bytes and large
// ones over translated connections: the kernel accepts a wrong checksum on a
// large outbound segment, so bulk alone would prove nothing.
func TestSmallSegmentChecksums(t *testing.T) {
	for _, off := range []bool{false, true} {
		t.Run(map[bool]string{false: "offloads", true: "no offloads"}[off], func(t *testing.T) {
			n, load := redisUp(t, harness.Options{Name: "csum", NoOffloads: off}, 20)
			big := make([]*clients.RedisRaw, 3)
			for i := range big {
				var err error
				big[i], err = clients.DialRaw(n.Dial, at(6379))
				must(t, err)
				defer big[i].Close()
			}
			for cycle := range 2 {
				snapshot(t, n, "redis", "redis-server")
				var capt *testnet.Capture
				if off {
					// With offloads the checksum in a captured frame is only partial.
					var err error
					capt, err = n.Net.Client().Capture(testnet.Iface, "tcp in src "+vip)
					must(t, err)
				}
				wake(t, n, "redis", load.Clients[3])
				for i, c := range load.Clients {
					c.Piece = []int{1, 2, 7, 0}[i%4]
				}
				rounds(t, load, 4)
				for i, c := range big {
					must(t, c.SetGet(fmt.Sprintf("big:%d", i), 100_000+i+cycle, reply))
				}
				if capt != nil {
					packets := capt.Stop()
					must(t, capt.Err())
					if len(packets) < 4*len(load.Clients) {
						t.Errorf("only %d segments captured", len(packets))
					}
					must(t, wrongChecksums(packets))
				}
			}
			translated := 0
			conns, err := n.Conns("redis")
			must(t, err)
			for _, c := range conns {
				if c.Translated {
					translated++
				}
			}
			if translated != len(load.Clients)+len(big) {
				t.Errorf("%d of %d connections are translated", translated, len(load.Clients)+len(big))
			}
			all := map[string]*testnet.NS{"node": n.Net.Node(), "client": n.Net.Client()}
			if ns := n.Behind("redis"); ns != nil {
				all["behind"] = ns
			}
			for name, ns := range all {
				if e := checksumErrors(t, ns); e != "0" {
					t.Errorf("%s: %s segments with a wrong checksum", name, e)
				}
			}
		})
	}
}

// TestFilterKilledConnected: without a filter traffic flows as if there were
// none, on old and on new connections.
func TestFilterKilledConnected(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "killc"}, 50)
	n.Filter.Kill()
	rounds(t, load, 4)
	redisClients(t, n, 20)
	rounds(t, load, 4)
}

// TestFilterKilledAway: while the application is away and there is no filter,
// nothing answers, so that TCP retransmits; an RST would end a connection.
func TestFilterKilledAway(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "killa"}, 50, clients.KeepAlive{})
	snapshot(t, n, "redis", "redis-server")
	n.Filter.Kill()
	resets, err := n.Net.Node().Capture(testnet.Iface, "tcp rst out")
	must(t, err)
	sent, err := n.Net.Node().Capture(testnet.Iface, "tcp in data")
	must(t, err)
	for _, c := range load.Clients {
		if _, err := c.Conn().Write([]byte("PING\r\n")); err != nil {
			t.Error(err)
		}
	}
	load.Clients[0].Close() // FIN too
	// And one that wants to connect. Nobody may answer it either.
	go func() {
		if c, err := n.Dial(at(6379)); err == nil {
			c.Close()
		}
	}()
	time.Sleep(5 * time.Second)
	rst := resets.Stop()
	must(t, resets.Err())
	if len(rst) != 0 {
		t.Errorf("%d RST left the node, the first: %v", len(rst), rst[0])
	}
	if got := len(sent.Stop()); got < 2*len(load.Clients) {
		t.Errorf("only %d segments with data came: the clients did not retransmit", got)
	}
	for _, c := range load.Clients[1:] {
		var b [1]byte
		must(t, c.Conn().SetReadDeadline(time.Now().Add(time.Millisecond)))
		if _, err := c.Conn().Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%v after the filter's death: %v", c.LocalAddr(), err)
		}
	}
}

func TestSynToOtherPort(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "port"}, 10)
	snapshot(t, n, "redis", "redis-server")
	start := time.Now()
	c, err := n.Dial(at(7777))
	if err == nil {
		c.Close()
		t.Fatal("connected to a port on which nobody listens")
	}
	if took := time.Since(start); !strings.Contains(err.Error(), "refused") || took > time.Second {
		t.Errorf("a port on which nobody listened: %v after %v, want connection refused at once", err, took)
	}
	held(t, n, "redis", "redis-server", load, 2*time.Second)
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 4)
}

func TestNewConnectionWakes(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "new"}, 50)
	snapshot(t, n, "redis", "redis-server")
	held(t, n, "redis", "redis-server", load, time.Second)
	start := time.Now()
	c, err := clients.DialRedis(n.Dial, at(6379), 1000, clients.Strictest)
	must(t, err)
	defer c.Close()
	must(t, c.Command(reply))
	t.Logf("a new connection, from SYN to its first reply: %v", time.Since(start).Round(100*time.Microsecond))
	rounds(t, load, 4)
	must(t, c.Command(reply))
}

// TestClientClosesWhileHeld: a FIN wakes the application, which sees the close.
func TestClientClosesWhileHeld(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "fin"}, 20)
	leaver := load.Clients[5]
	load.Clients = append(load.Clients[:5:5], load.Clients[6:]...)
	defer leaver.Close()
	snapshot(t, n, "redis", "redis-server")
	held(t, n, "redis", "redis-server", load, time.Second)
	must(t, leaver.Conn().CloseWrite())
	// Redis closes its side when it reads the end: that is how the close shows.
	must(t, leaver.Conn().SetReadDeadline(time.Now().Add(reply)))
	if k, err := leaver.Conn().Read(make([]byte, 1)); k != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("the leaver read %d bytes, %v, want the end of the stream", k, err)
	}
	must(t, n.WaitState("redis", "RESTORED", 5*time.Second))
	rounds(t, load, 4)
	forgotten(t, n, leaver.LocalAddr())
}

// TestClientResetsWhileHeld: an RST wakes nobody; the connection is gone when
// the application is back.
func TestClientResetsWhileHeld(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "rst"}, 20)
	leaver := load.Clients[5]
	load.Clients = append(load.Clients[:5:5], load.Clients[6:]...)
	snapshot(t, n, "redis", "redis-server")
	must(t, leaver.Reset())
	held(t, n, "redis", "redis-server", load, 3*time.Second)
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 4)
	forgotten(t, n, leaver.LocalAddr())
}

// forgotten waits until a remote's connection is in no list of the application
// and the filter has none or one that is closed: translation of a closed
// connection lingers as TIME_WAIT does.
func forgotten(t *testing.T, n *harness.Node, remote net.Addr) {
	t.Helper()
	var still string
	err := harness.Wait(10*time.Second, "the connection is gone", func() bool {
		still = ""
		conns, err := n.Conns("redis")
		must(t, err)
		for _, c := range conns {
			if c.Remote == remote.String() && c.State != "CLOSING" && c.State != "RST" {
				still += fmt.Sprintf("the filter has %+v; ", c)
			}
		}
		out, err := n.Net.Node().Command("redis-cli", "-h", vip, "client", "list").Output()
		must(t, err)
		if strings.Contains(string(out), "addr="+remote.String()+" ") {
			still += "redis has it in its client list"
		}
		return still == ""
	})
	if err != nil {
		t.Fatalf("%v: %v: %s", remote, err, still)
	}
}
