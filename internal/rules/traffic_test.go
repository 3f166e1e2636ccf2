package rules

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const echoPort = 7777

// link is a node with the VIP and a remote, joined by a veth pair. An echo server listens on the VIP.
type link struct {
	node, remote string
	m            *Manager
	got          atomic.Int64 // bytes that the echo servers have read
}

func newLink(t *testing.T) *link {
	t.Helper()
	l := &link{node: newNS(t), remote: newNS(t)}
	sh(t, "", fmt.Sprintf("ip link add nfcfv0 netns %s type veth peer name nfcfv1 netns %s", l.node, l.remote))
	sh(t, l.node, "ip addr add 198.51.100.1/24 dev nfcfv0; ip addr add 192.0.2.100/32 dev nfcfv0; ip link set nfcfv0 up")
	sh(t, l.remote, "ip addr add 198.51.100.2/24 dev nfcfv1; ip link set nfcfv1 up; ip route add 192.0.2.100/32 via 198.51.100.1")
	l.m = install(t, l.node, Config{Queue: 64})
	l.echo(t, netip.AddrPortFrom(vip4, echoPort), l.node)
	return l
}

// echo starts a server in a namespace that sends back what it gets.
func (l *link) echo(t *testing.T, at netip.AddrPort, ns string) {
	t.Helper()
	var ln net.Listener
	in(t, ns, func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp4", at.String())
		return err
	})
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			go io.Copy(c, io.TeeReader(c, (*counter)(&l.got)))
		}
	}()
}

type counter atomic.Int64

func (c *counter) Write(p []byte) (int, error) {
	(*atomic.Int64)(c).Add(int64(len(p)))
	return len(p), nil
}

func (l *link) dial(t *testing.T, from string, to netip.AddrPort) net.Conn {
	t.Helper()
	var c net.Conn
	in(t, from, func() (err error) {
		c, err = net.DialTimeout("tcp4", to.String(), 5*time.Second)
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// talk sends n bytes and reads them back, or gives up after the wait.
func talk(c net.Conn, n int, wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	go c.Write(make([]byte, n))
	_, err := io.ReadFull(c, make([]byte, n))
	return err
}

const (
	patience = 10 * time.Second
	silence  = 400 * time.Millisecond // longer than the first retransmission
)

func vipPort() netip.AddrPort { return netip.AddrPortFrom(vip4, echoPort) }

func change(s Set, add bool) []Change {
	c := Change{Set: s, Add: add, IP: vip4}
	if s == Skip {
		c.Port = echoPort
	}
	return []Change{c}
}

// Nothing listens on the queue in these tests, so a rule with bypass passes and one without it drops. The
// rules' counters tell which of them took the packets.
func TestConnectedQueuesOnlyEdges(t *testing.T) {
	l := newLink(t)
	c := l.dial(t, l.remote, vipPort())
	must(t, talk(c, 1000, patience))
	c.Close()
	if n := hits(t, l.node, "raw", ChainIn, "nfcf4-vip dst"); n != 0 {
		t.Errorf("%d packets were queued with empty sets", n)
	}

	must(t, l.m.Apply(change(VIP, true)))
	c = l.dial(t, l.remote, vipPort())
	must(t, talk(c, 8<<20, patience))
	in, post := hits(t, l.node, "raw", ChainIn, "nfcf4-vip dst"), hits(t, l.node, "mangle", ChainPost, "nfcf4-vip")
	// The first connection's server end was still open; its FIN may count.
	if in < 1 || in > 2 || post < 1 || post > 2 {
		t.Errorf("8 MiB took %d packets in and %d out to the queue, want the SYN and the SYN-ACK alone", in, post)
	}
	must(t, l.m.Apply(change(Full, true)))
	must(t, talk(c, 1<<20, patience))
	if in := hits(t, l.node, "raw", ChainIn, "nfcf4-full"); in != 0 {
		t.Errorf("full capture took %d packets of a VIP that is not active", in)
	}
	must(t, l.m.Apply(change(Active, true)))
	must(t, talk(c, 1<<20, patience))
	in, post = hits(t, l.node, "raw", ChainIn, "nfcf4-full"), hits(t, l.node, "mangle", ChainPost, "nfcf4-full")
	if in < 10 || post < 10 {
		t.Errorf("full capture took %d packets in and %d out", in, post)
	}
}

func TestAwayAndFlowNeverBypass(t *testing.T) {
	l := newLink(t)
	must(t, l.m.Apply(change(VIP, true)))
	must(t, l.m.Apply(append(change(Active, true), change(Full, true)...)))
	c := l.dial(t, l.remote, vipPort())
	must(t, talk(c, 100, patience))
	remote := c.LocalAddr().(*net.TCPAddr).AddrPort()
	flow := []Change{{Set: Flow, Add: true, IP: remote.Addr(), Port: remote.Port(), Peer: vip4}}
	unflow := []Change{flow[0]}
	unflow[0].Add = false

	for _, s := range []struct {
		name             string
		set, unset       []Change
		table, chain     string
		inWord, postWord string
	}{
		{"away", change(Away, true), change(Away, false), "raw", ChainOut, "nfcf4-away", "nfcf4-away"},
		{"flow", flow, unflow, "mangle", ChainPost, "nfcf4-flow", "nfcf4-flow"},
	} {
		t.Run(s.name, func(t *testing.T) {
			before := l.got.Load()
			must(t, l.m.Apply(s.set))
			if err := talk(c, 100, silence); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("with no filter: %v, want silence", err)
			}
			if hits(t, l.node, "raw", ChainIn, s.inWord) == 0 {
				t.Error("no packet hit the rule")
			}
			if n := l.got.Load(); n != before {
				t.Errorf("%d bytes got in", n-before)
			}
			// Let the data in but nothing out: the outbound rule must hold it.
			sh(t, l.node, "iptables -t raw -I PREROUTING 1 -j ACCEPT")
			deadline := time.Now().Add(patience)
			for hits(t, l.node, s.table, s.chain, s.postWord) == 0 {
				if time.Now().After(deadline) {
					t.Fatal("no outbound packet hit the rule")
				}
				time.Sleep(20 * time.Millisecond)
			}
			sh(t, l.node, "iptables -t raw -D PREROUTING -j ACCEPT")
			must(t, l.m.Apply(s.unset))
			// What was held comes by retransmission: the connection lives, and no byte is lost.
			must(t, c.SetDeadline(time.Now().Add(patience)))
			if _, err := io.ReadFull(c, make([]byte, 100)); err != nil {
				t.Fatalf("after the hold: %v", err)
			}
			must(t, talk(c, 100, patience))
		})
	}

	t.Run("skip wins over away", func(t *testing.T) {
		must(t, l.m.Apply(append(change(Skip, true), change(Away, true)...)))
		must(t, talk(c, 100, patience))
		must(t, l.m.Apply(change(Skip, false)))
		if err := talk(c, 100, silence); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("without skip: %v, want silence", err)
		}
	})
	t.Run("the node itself passes", func(t *testing.T) {
		if l, err := l.m.List(Away); err != nil || len(l) != 1 {
			t.Fatalf("%v, %v", l, err)
		}
		must(t, talk(l.dial(t, l.node, vipPort()), 100, patience))
	})
}

// An application that is gone: its port is closed, yet no RST leaves while the VIP is away, and one does
// afterwards.
func TestAwayLetsNoResetOut(t *testing.T) {
	l := newLink(t)
	must(t, l.m.Apply(change(Away, true)))
	dial := func() (err error) {
		in(t, l.remote, func() error {
			var c net.Conn
			c, err = net.DialTimeout("tcp4", netip.AddrPortFrom(vip4, 9).String(), silence)
			if err == nil {
				c.Close()
			}
			return nil
		})
		return err
	}
	var ne net.Error
	if err := dial(); !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("while away: %v, want silence", err)
	}
	must(t, l.m.Clear(Away))
	if err := dial(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("afterwards: %v, want a refusal", err)
	}
}

func TestICMPErrors(t *testing.T) {
	l := newLink(t)
	must(t, l.m.Apply(change(Active, true)))
	c := l.dial(t, l.remote, vipPort())
	must(t, talk(c, 10, patience))
	// The remote turns the server's segments away, so that its kernel sends port unreachable to the VIP.
	sh(t, l.remote, "iptables -A INPUT -p tcp --sport 7777 -j REJECT --reject-with icmp-port-unreachable")
	if err := talk(c, 10, silence); err == nil {
		t.Fatal("the remote still gets answers")
	}
	if n := hits(t, l.node, "raw", ChainIn, "--icmp-type 3"); n == 0 {
		t.Error("no ICMP error hit the rule")
	}
	if n := hits(t, l.node, "raw", ChainIn, "--icmp-type 11") + hits(t, l.node, "raw", ChainIn, "--icmp-type 12"); n != 0 {
		t.Errorf("%d packets hit the rules of other types", n)
	}
}

// useConntrack turns connection tracking on in the node, with rules that drop what it calls invalid.
func useConntrack(t *testing.T, ns string) {
	t.Helper()
	sh(t, ns, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0")
	sh(t, ns, "for c in INPUT OUTPUT; do iptables -A $c -m conntrack --ctstate INVALID -j DROP; done")
}

func TestDeleteConntrack(t *testing.T) {
	l := newLink(t)
	other := netip.MustParseAddrPort("198.51.100.2:7778")
	l.echo(t, other, l.remote)
	none := TCPFlow{Local: vipPort(), Remote: netip.MustParseAddrPort("203.0.113.1:1")}
	if n, err := l.m.DeleteConntrack([]TCPFlow{none}); n != 0 || err != nil {
		t.Errorf("unused: %d, %v", n, err)
	}
	useConntrack(t, l.node)
	must(t, l.m.Apply(change(VIP, true)))
	must(t, l.m.Apply(change(Full, true)))

	incoming := l.dial(t, l.remote, vipPort())
	bystander := l.dial(t, l.remote, vipPort())
	outgoing := l.dial(t, l.node, other)
	for _, c := range []net.Conn{incoming, bystander, outgoing} {
		must(t, talk(c, 100, patience))
	}
	addr := func(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }
	flows := []TCPFlow{none, {Local: vipPort(), Remote: addr(incoming.LocalAddr())}, {Local: addr(outgoing.LocalAddr()), Remote: other}}
	for i := range 200 { // more than one batch
		flows = append(flows, TCPFlow{Local: vipPort(), Remote: netip.AddrPortFrom(none.Remote.Addr(), uint16(i+2))})
	}
	if n, err := l.m.DeleteConntrack(flows); n != 2 || err != nil {
		t.Errorf("deleted %d, %v; want 2", n, err)
	}
	if n, err := l.m.DeleteConntrack(flows); n != 0 || err != nil {
		t.Errorf("deleted %d, %v the second time", n, err)
	}
	must(t, talk(bystander, 100, patience))
	// Without its entry a connection is invalid to these rules: proof that the entry is gone.
	if err := talk(incoming, 100, silence); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection without an entry: %v, want silence", err)
	}
	if _, err := l.m.DeleteConntrack([]TCPFlow{{}}); err == nil {
		t.Error("a flow without addresses was taken")
	}
	// The set connection still works after errors of the other protocol.
	must(t, l.m.Apply(change(Full, false)))
}

// The filter's own segments pass rules that drop INVALID, because they are not tracked: inbound ones over lo
// as the filter sends them, outbound ones to the remote.
func TestInjectedPassConntrack(t *testing.T) {
	l := newLink(t)
	useConntrack(t, l.node)
	must(t, l.m.Apply(append(change(Full, true), change(Away, true)...)))
	remote := netip.MustParseAddr("198.51.100.2")
	// The receiver's RST, which an away VIP's rules take, proves that the segment arrived.
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		answer   string
	}{{"to the local stack", remote, vip4, ChainOut}, {"to the remote", vip4, remote, ChainIn}} {
		for _, mark := range []uint32{DefaultMark | MarkNoTrack, 0} {
			name := fmt.Sprintf("%s, mark %#x", c.name, mark)
			sh(t, l.node, "iptables -Z; iptables -t raw -Z")
			in(t, l.node, func() error {
				// A packet that a rule drops in OUTPUT is reported to its sender.
				if err := sendSynAck(c.src, c.dst, mark); mark != 0 || !errors.Is(err, unix.EPERM) {
					return err
				}
				return nil
			})
			noTrack := hits(t, l.node, "raw", ChainOut, "--notrack")
			if mark == 0 {
				dropped := invalidDrops(t, l.node) + hits(t, l.node, "raw", ChainOut, "nfcf4-away")
				if dropped != 1 || noTrack != 0 {
					t.Errorf("%s: %d dropped, %d not tracked: the test proves nothing", name, dropped, noTrack)
				}
				continue
			}
			deadline := time.Now().Add(patience)
			for hits(t, l.node, "raw", c.answer, "nfcf4-away") != 1 {
				if time.Now().After(deadline) {
					t.Fatalf("%s: it did not arrive", name)
				}
				time.Sleep(10 * time.Millisecond)
			}
			if invalid := invalidDrops(t, l.node); invalid != 0 || noTrack != 1 {
				t.Errorf("%s: %d dropped as invalid, %d not tracked", name, invalid, noTrack)
			}
		}
	}
}

func invalidDrops(t *testing.T, ns string) int {
	return hits(t, ns, "filter", "INPUT", "INVALID") + hits(t, ns, "filter", "OUTPUT", "INVALID")
}

// sendSynAck sends a SYN-ACK that belongs to nothing, from a raw socket.
func sendSynAck(src, dst netip.Addr, mark uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return err
	}
	s, d := src.As4(), dst.As4()
	p := make([]byte, 40)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP
	copy(p[12:], s[:])
	copy(p[16:], d[:])
	tcp := p[20:]
	binary.BigEndian.PutUint16(tcp, 5555)
	binary.BigEndian.PutUint16(tcp[2:], 6666)
	tcp[12], tcp[13], tcp[14] = 5<<4, 0x12, 0x10
	pseudo := append(append(append([]byte{}, s[:]...), d[:]...), 0, unix.IPPROTO_TCP, 0, 20)
	sum := uint32(0)
	for _, b := range [][]byte{pseudo, tcp} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	return unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: d})
}

// A filter that ends leaves held applications held, and calls after Close are errors, not crashes.
func TestCloseKeepsRules(t *testing.T) {
	l := newLink(t)
	must(t, l.m.Apply(change(Away, true)))
	before := state(t, l.node)
	must(t, l.m.Close())
	if got := state(t, l.node); got != before {
		t.Errorf("Close changed something:\n%s\nwas\n%s", got, before)
	}
	if err := l.m.Apply(change(Away, false)); err == nil {
		t.Error("Apply works after Close")
	}
	if _, err := l.m.Verify(); err == nil || strings.Contains(err.Error(), "panic") {
		t.Errorf("Verify after Close: %v", err)
	}
}
