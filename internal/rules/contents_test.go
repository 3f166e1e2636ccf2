package rules

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func lists(t *testing.T, m *Manager) (all []Change) {
	t.Helper()
	for _, s := range AllSets() {
		l, err := m.List(s)
		must(t, err)
		all = append(all, l...)
	}
	return all
}

func TestRepairSets(t *testing.T) {
	remote4, remote6 := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:1::7")
	entries := []Change{
		{Set: VIP, Add: true, IP: vip4}, {Set: VIP, Add: true, IP: vip6}, {Set: Full, Add: true, IP: vip6}, {Set: Away, Add: true, IP: vip4},
		{Set: Active, Add: true, IP: vip4}, {Set: Skip, Add: true, IP: vip4, Port: 22},
		{Set: Flow, Add: true, IP: remote4, Port: 40000, Peer: vip4}, {Set: Flow, Add: true, IP: remote6, Port: 40000, Peer: vip6},
	}
	for _, c := range []struct{ name, harm, want string }{
		{"all emptied", "ipset flush", "IPv6: set nfcf6-flow lacked 1 of 1 entries"},
		{"one emptied", "ipset flush nfcf4-away", "IPv4: set nfcf4-away lacked 1 of 1 entries and had 0"},
		{"an entry taken out", "ipset del nfcf6-full 2001:db8::100", "nfcf6-full lacked 1"},
		{"a flow taken out", "ipset del nfcf4-flow 198.51.100.7,tcp:40000,192.0.2.100", "nfcf4-flow lacked 1 of 1"},
		{"a port left out by another", "ipset add nfcf4-skip 192.0.2.100,tcp:6379", "nfcf4-skip lacked 0 of 1 entries and had 1"},
		{"an entry exchanged", "ipset del nfcf4-away 192.0.2.100; ipset add nfcf4-away 192.0.2.9", "nfcf4-away lacked 1 of 1 entries and had 1"},
		{"exchanged as a whole", "ipset create x hash:ip; ipset swap x nfcf4-vip", "nfcf4-vip lacked 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := newNS(t)
			install(t, ns, Config{Queue: 64})
			before := install(t, ns, Config{Queue: 64})
			must(t, before.Apply(entries))
			// One that starts later takes what is there for right, until it changes it.
			m := install(t, ns, Config{Queue: 64})
			gone := Change{Set: VIP, Add: true, IP: remote4}
			must(t, m.Apply([]Change{gone}))
			gone.Add = false
			must(t, m.Apply([]Change{gone}))
			if found, err := m.RepairSets(); err != nil || len(found) > 0 {
				t.Fatalf("with nothing amiss: %q, %v", found, err)
			}
			sh(t, ns, c.harm)
			found, err := m.RepairSets()
			if err != nil || !strings.Contains(strings.Join(found, "\n"), c.want) {
				t.Errorf("found %q, %v; want %q", found, err, c.want)
			}
			if got := lists(t, m); !slices.Equal(got, entries) {
				t.Errorf("got  %+v\nwant %+v", got, entries)
			}
			if found, err := m.RepairSets(); err != nil || len(found) > 0 {
				t.Errorf("not repaired: %q, %v", found, err)
			}
		})
	}
}

// A look at the sets is cheap, however many flows there are.
func TestRepairSetsOfManyFlows(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	const n = 200_000
	must(t, m.Apply(manyFlows(n, true)))
	took := func(want int) time.Duration {
		t.Helper()
		began := time.Now()
		found, err := m.RepairSets()
		if err != nil || len(found) != want {
			t.Fatalf("%q, %v", found, err)
		}
		return time.Since(began)
	}
	look, least := took(0), time.Hour
	for range 5 {
		least = min(least, took(0))
	}
	began := time.Now()
	l, err := m.List(Flow)
	if err != nil || len(l) != n {
		t.Fatalf("%d flows, %v", len(l), err)
	}
	list := time.Since(began)
	sh(t, ns, "ipset del nfcf4-flow 10.0.0.7,tcp:1031,192.0.2.100")
	one := took(1)
	sh(t, ns, "ipset flush")
	all := took(1)
	t.Logf("%d flows: a look %v, then %v; reading them all %v; one repaired in %v, all in %v", n, look, least, list, one, all)
	if least*10 > list {
		t.Errorf("a look takes %v, reading all flows %v", least, list)
	}
}

// With empty sets the kernel's RST still comes to the queue: while nothing is active it does not.
func TestResetsWithoutSets(t *testing.T) {
	l := newLink(t)
	refused := netip.AddrPortFrom(vip4, 9)
	try := func() {
		t.Helper()
		in(t, l.remote, func() error {
			if c, err := net.DialTimeout("tcp4", refused.String(), patience); err == nil {
				c.Close()
				t.Error("somebody listens")
			}
			return nil
		})
	}
	must(t, l.m.Engage(true, false))
	try()
	if n := hits(t, l.node, "raw", ChainReset, "NFQUEUE", "bypass"); n != 1 {
		t.Errorf("%d RSTs came to the queue, want 1", n)
	}
	must(t, talk(l.dial(t, l.remote, vipPort()), 100_000, patience))
	if n := hits(t, l.node, "raw", ChainReset, "NFQUEUE", "bypass"); n != 1 {
		t.Errorf("%d packets came to the queue, want the RST alone", n)
	}
	must(t, l.m.Engage(false, false))
	try()
	if n := hits(t, l.node, "raw", ChainReset, "NFQUEUE", "bypass"); n != 1 {
		t.Errorf("an idle node queues RSTs: %d", n)
	}
}

// A SYN-ACK that OUTPUT has let by does not leave when the filter has ended since. Nobody listens on the queue
// here, and the chains before routing are empty, so that everything is let by.
func TestSynAckBehindRouting(t *testing.T) {
	l := newLink(t)
	must(t, l.m.Apply([]Change{{Set: VIP, Add: true, IP: vip4}, {Set: Active, Add: true, IP: vip4}, {Set: Away, Add: true, IP: vip4}}))
	sh(t, l.node, "iptables -t raw -F NFCF-OUT; iptables -t raw -F NFCF-IN; iptables -t raw -F NFCF-FWD")
	in(t, l.remote, func() error {
		if c, err := net.DialTimeout("tcp4", vipPort().String(), silence); err == nil {
			c.Close()
			t.Error("the handshake came through")
		}
		return nil
	})
	if n := hits(t, l.node, "mangle", ChainPost, "nfcf4-away", "FIN,SYN,RST"); n == 0 {
		t.Error("no SYN-ACK came behind routing")
	}
}
