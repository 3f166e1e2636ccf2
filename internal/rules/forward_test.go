package rules

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// newForward is a link whose VIP is in a network namespace behind the node.
func newForward(t *testing.T) (l *link, behind string) {
	t.Helper()
	l, behind = &link{node: newNS(t), remote: newNS(t)}, newNS(t)
	sh(t, "", fmt.Sprintf("ip link add nfcfv0 netns %s type veth peer name nfcfv1 netns %s", l.node, l.remote))
	sh(t, "", fmt.Sprintf("ip link add nfcfv2 netns %s type veth peer name nfcfv3 netns %s", l.node, behind))
	sh(t, l.node, "ip addr add 198.51.100.1/24 dev nfcfv0; ip link set nfcfv0 up; ip addr add 203.0.113.1/30 dev nfcfv2; ip link set nfcfv2 up")
	sh(t, l.node, "ip route add 192.0.2.100/32 via 203.0.113.2; sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.nfcfv0.rp_filter=0")
	sh(t, behind, "ip addr add 203.0.113.2/30 dev nfcfv3; ip link set nfcfv3 up; ip addr add 192.0.2.100/32 dev lo; ip route add default via 203.0.113.1")
	sh(t, l.remote, "ip addr add 198.51.100.2/24 dev nfcfv1; ip link set nfcfv1 up; ip route add default via 198.51.100.1")
	l.m = install(t, l.node, Config{Queue: 64})
	l.echo(t, netip.AddrPortFrom(vip4, echoPort), behind)
	return l, behind
}

// What comes from the namespace is taken before connection tracking, as the
// node's own traffic is.
func TestForwardedTraffic(t *testing.T) {
	l, _ := newForward(t)
	must(t, l.m.Apply(change(VIP, true)))
	must(t, l.m.Engage(false, false))
	c := l.dial(t, l.remote, vipPort())
	must(t, talk(c, 8<<20, patience))
	in, out := hits(t, l.node, "raw", ChainIn, "nfcf4-vip dst"), hits(t, l.node, "raw", ChainForward, "nfcf4-vip")
	if in != 1 || out != 1 {
		t.Errorf("8 MiB took %d packets in and %d out to the queue, want the SYN and the SYN-ACK alone", in, out)
	}
	must(t, l.m.Engage(true, true))
	must(t, l.m.Apply(append(change(Active, true), change(Away, true)...)))
	before := l.got.Load()
	if err := talk(c, 100, silence); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("with no filter: %v, want silence", err)
	}
	if n := l.got.Load(); n != before {
		t.Errorf("%d bytes got in", n-before)
	}
	// Let the data in but nothing out: the outbound rule must hold it.
	sh(t, l.node, "iptables -t raw -I PREROUTING 1 -d 192.0.2.100 -j ACCEPT")
	deadline := time.Now().Add(patience)
	for hits(t, l.node, "raw", ChainForward, "nfcf4-away") == 0 {
		if time.Now().After(deadline) {
			t.Fatal("no outbound packet hit the rule")
		}
		time.Sleep(20 * time.Millisecond)
	}
	sh(t, l.node, "iptables -t raw -D PREROUTING -d 192.0.2.100 -j ACCEPT")
	must(t, talk(l.dial(t, l.node, vipPort()), 100, patience)) // the node itself is never held
	must(t, l.m.Apply(append(change(Skip, true), change(Away, true)...)))
	must(t, talk(l.dial(t, l.remote, vipPort()), 100, patience)) // nor is a port that is skipped
	must(t, l.m.Apply(append(change(Skip, false), change(Away, false)...)))
	if hits(t, l.node, "raw", ChainForward, "rpfilter") != 0 {
		t.Error("what came from the namespace was taken for forged")
	}
}

// A remote that uses the VIP as its source gets nothing into the queue, and
// nothing past the node, whether the VIP is behind the node or on it.
func TestForgedSource(t *testing.T) {
	for _, where := range []string{"behind the node", "on the node"} {
		t.Run(where, func(t *testing.T) {
			l, behind := newForward(t)
			if where == "on the node" {
				sh(t, l.node, "ip addr add 192.0.2.100/32 dev nfcfv0; sysctl -qw net.ipv4.conf.nfcfv0.accept_local=1")
			}
			must(t, l.m.Apply(append(change(VIP, true), append(change(Active, true), change(Away, true)...)...)))
			in(t, l.remote, func() error { return sendSynAck(vip4, netip.MustParseAddr("203.0.113.2"), 0) })
			deadline := time.Now().Add(patience)
			for hits(t, l.node, "raw", ChainForward, "rpfilter") == 0 {
				if time.Now().After(deadline) {
					t.Fatal("the packet was not dropped as forged")
				}
				time.Sleep(10 * time.Millisecond)
			}
			if n := hits(t, l.node, "raw", ChainForward, "nfcf4-away"); n != 0 {
				t.Errorf("%d forged packets were queued as the application's", n)
			}
			if where == "on the node" {
				return
			}
			// The same from where the VIP is, to prove the test.
			in(t, behind, func() error { return sendSynAck(vip4, netip.MustParseAddr("198.51.100.2"), 0) })
			for hits(t, l.node, "raw", ChainForward, "nfcf4-away") != 1 {
				if time.Now().After(deadline) {
					t.Fatal("the application's packet was not queued")
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
}

// IPv6 goes the same ways.
func TestForwardedIPv6(t *testing.T) {
	l, behind := newForward(t)
	vip6 := netip.MustParseAddr("2001:db8:2::100")
	sh(t, l.node, "sysctl -qw net.ipv6.conf.all.forwarding=1; ip addr add 2001:db8:1::1/64 dev nfcfv0 nodad; ip addr add 2001:db8:3::1/64 dev nfcfv2 nodad")
	sh(t, behind, "ip addr add 2001:db8:3::2/64 dev nfcfv3 nodad; ip addr add 2001:db8:2::100/128 dev lo nodad; ip route add default via 2001:db8:3::1")
	sh(t, l.remote, "ip addr add 2001:db8:1::2/64 dev nfcfv1 nodad; ip route add default via 2001:db8:1::1")
	sh(t, l.node, "ip route add 2001:db8:2::100/128 via 2001:db8:3::2")
	at := netip.AddrPortFrom(vip6, echoPort)
	var ln net.Listener
	in(t, behind, func() (err error) {
		ln, err = net.Listen("tcp6", at.String())
		return err
	})
	defer ln.Close()
	must(t, l.m.Apply([]Change{{Set: VIP, Add: true, IP: vip6}}))
	must(t, l.m.Engage(false, false))
	dial := func(wait time.Duration) (err error) {
		in(t, l.remote, func() error {
			var c net.Conn
			if c, err = net.DialTimeout("tcp6", at.String(), wait); err == nil {
				c.Close()
			}
			return nil
		})
		return err
	}
	must(t, dial(patience)) // the links' own addresses are checked for duplicates first
	hits := func(words ...string) int { return hitsOf(t, &family6, l.node, "raw", ChainForward, words...) }
	if n := hits("nfcf6-vip"); n == 0 {
		t.Error("nothing of the application was queued")
	}
	must(t, l.m.Engage(true, true))
	must(t, l.m.Apply([]Change{{Set: Active, Add: true, IP: vip6}, {Set: Away, Add: true, IP: vip6}}))
	// Let the remote in: the outbound rule must hold the answer.
	sh(t, l.node, "ip6tables -t raw -I PREROUTING 1 -d 2001:db8:2::100 -j ACCEPT")
	if err := dial(silence); err == nil {
		t.Error("an answer came past the rules")
	}
	if hits("nfcf6-away") == 0 || hits("rpfilter") != 0 {
		t.Errorf("%d held, %d taken for forged", hits("nfcf6-away"), hits("rpfilter"))
	}
}
