package vip

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var vips = []netip.Addr{netip.MustParseAddr("10.77.0.50"), netip.MustParseAddr("fd77::50")}

func newNet(t *testing.T, name string) *testnet.Net {
	t.Helper()
	testnet.RequireRoot(t)
	n := testnet.New(t, testnet.Options{Name: name})
	must(t, errors.Join(
		n.Node().AddAddr(testnet.Iface, "fd77::1/64"), n.Client().AddAddr(testnet.Iface, "fd77::2/64")))
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func has(t *testing.T, ns *testnet.NS, addr netip.Addr, want string) {
	t.Helper()
	var got string
	var ok bool
	must(t, ns.Do(func() (err error) { got, ok, err = Has(addr); return err }))
	if got != want || ok != (want != "") {
		t.Fatalf("Has(%s) = %q, %v, want %q", addr, got, ok, want)
	}
}

func TestAddRemove(t *testing.T) {
	n := newNet(t, "vip")
	for _, addr := range vips {
		node := n.Node()
		has(t, node, addr, "")
		for range 2 { // the second time it is there already
			must(t, node.Do(func() error { return Add(testnet.Iface, addr) }))
			has(t, node, addr, testnet.Iface)
		}
		must(t, node.Do(func() error {
			link, err := netlink.LinkByName(testnet.Iface)
			if err != nil {
				return err
			}
			found, err := addrs(link, addr)
			if err != nil {
				return err
			}
			if len(found) != 1 {
				t.Fatalf("%d entries for %s", len(found), addr)
			}
			a := found[0]
			if ones, bits := a.Mask.Size(); ones != bits {
				t.Errorf("%s/%d", addr, ones)
			}
			if addr.Is6() && (a.Flags&unix.IFA_F_DEPRECATED == 0 || a.Flags&unix.IFA_F_TENTATIVE != 0 ||
				a.Flags&unix.IFA_F_NODAD == 0 || a.PreferedLft != 0 || uint32(a.ValidLft) != forever) {
				t.Errorf("flags %#x, lifetimes %d %d", a.Flags, a.PreferedLft, uint32(a.ValidLft))
			}
			return nil
		}))
		// It serves at once, and is not chosen as a source unasked.
		ln, err := node.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		must(t, err)
		c, err := n.Client().Dial("tcp", ln.Addr().String())
		must(t, err)
		must(t, errors.Join(c.Close(), ln.Close()))

		for range 2 { // the second time it is gone already
			must(t, node.Do(func() error { return Remove(testnet.Iface, addr) }))
			has(t, node, addr, "")
		}
	}
	back, err := n.Client().Listen("tcp", "[fd77::2]:0")
	must(t, err)
	defer back.Close()
	must(t, n.Node().Do(func() error { return Add(testnet.Iface, vips[1]) }))
	c, err := n.Node().Dial("tcp", back.Addr().String())
	must(t, err)
	defer c.Close()
	if ip := c.LocalAddr().(*net.TCPAddr).IP.String(); ip != "fd77::1" {
		t.Errorf("an outgoing connection comes from %s", ip)
	}
}

func TestRemoveOtherPrefixLength(t *testing.T) {
	n := newNet(t, "vippfx")
	must(t, n.Node().AddAddr(testnet.Iface, "10.77.0.50/24"))
	must(t, n.Node().Do(func() error { return Remove(testnet.Iface, vips[0]) }))
	has(t, n.Node(), vips[0], "")
	has(t, n.Node(), n.NodeAddr(), testnet.Iface)
	must(t, n.Node().Do(func() error { return Add(testnet.Iface, netip.AddrFrom16(vips[0].As16())) }))
	has(t, n.Node(), vips[0], testnet.Iface)
}

func TestErrors(t *testing.T) {
	n := newNet(t, "viperr")
	must(t, n.Node().AddAddr("lo", "10.77.0.50/32"))
	for name, c := range map[string]struct {
		f    func() error
		want []string
	}{
		"other interface": {func() error { return Add(testnet.Iface, vips[0]) }, []string{"lo", "ip address del 10.77.0.50 dev lo"}},
		"add nowhere":     {func() error { return Add("nosuch0", vips[1]) }, []string{"nosuch0", "ip link"}},
		"remove nowhere":  {func() error { return Remove("nosuch0", vips[1]) }, []string{"nosuch0", "ip link"}},
		"announce":        {func() error { return Announce("nosuch0", vips[1]) }, []string{"nosuch0", "ip link"}},
		"no address":      {func() error { return Add("lo", netip.Addr{}) }, []string{"unicast"}},
		"multicast":       {func() error { return Add("lo", netip.MustParseAddr("ff02::1")) }, []string{"unicast"}},
		"broadcast":       {func() error { return Add("lo", netip.MustParseAddr("255.255.255.255")) }, []string{"unicast"}},
		"wildcard":        {func() error { return Add("lo", netip.MustParseAddr("0.0.0.0")) }, []string{"unicast"}},
		"link-local":      {func() error { return Add("lo", netip.MustParseAddr("fe80::1")) }, []string{"link-local"}},
	} {
		err := n.Node().Do(c.f)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not mention %q", name, err, want)
			}
		}
	}
	down := n.Node().Do(func() error {
		link, err := netlink.LinkByName(testnet.Iface)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(link); err != nil {
			return err
		}
		return Announce(testnet.Iface, vips[0])
	})
	if down == nil || !strings.Contains(down.Error(), testnet.Iface) || !strings.Contains(down.Error(), "up") {
		t.Errorf("interface down: %v", down)
	}
	must(t, n.Node().Do(func() error { return Announce("lo", vips[0]) }))
}

// neighbour returns what the client remembers for the address.
func neighbour(t *testing.T, n *testnet.Net, addr netip.Addr) (mac string) {
	t.Helper()
	must(t, n.Client().Do(func() error {
		list, err := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, e := range list {
			if ip, ok := netip.AddrFromSlice(e.IP); ok && ip.Unmap() == addr {
				mac = e.HardwareAddr.String()
			}
		}
		return err
	}))
	return mac
}

func TestAnnounceMovesNeighbours(t *testing.T) {
	n := newNet(t, "vipann")
	var mac string
	must(t, n.Node().Do(func() error {
		link, err := netlink.LinkByName(testnet.Iface)
		if err == nil {
			mac = link.Attrs().HardwareAddr.String()
		}
		return err
	}))
	old := net.HardwareAddr{2, 0, 0, 0, 0, 0x99}
	for _, addr := range vips {
		must(t, n.Client().Do(func() error {
			link, err := netlink.LinkByName(testnet.Iface)
			if err != nil {
				return err
			}
			return netlink.NeighAdd(&netlink.Neigh{
				LinkIndex: link.Attrs().Index, IP: addr.AsSlice(), HardwareAddr: old, State: netlink.NUD_STALE,
			})
		}))
		if got := neighbour(t, n, addr); got != old.String() {
			t.Fatalf("%s: %s before", addr, got)
		}
		seen, err := n.Client().Capture(testnet.Iface, "in")
		must(t, err)
		must(t, n.Node().Do(func() error { return errors.Join(Add(testnet.Iface, addr), Announce(testnet.Iface, addr)) }))
		deadline := time.Now().Add(5 * time.Second)
		for neighbour(t, n, addr) != mac {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the client still has %s, want %s", addr, neighbour(t, n, addr), mac)
			}
			time.Sleep(2 * time.Millisecond)
		}
		checkFrames(t, seen.Stop(), addr)
	}
}

func checkFrames(t *testing.T, packets []gopacket.Packet, addr netip.Addr) {
	t.Helper()
	operations := map[uint16]bool{}
	advertised := false
	for _, p := range packets {
		if arp, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok && netip.AddrFrom4([4]byte(arp.SourceProtAddress)) == addr {
			if string(arp.DstProtAddress) != string(arp.SourceProtAddress) {
				t.Errorf("target %v, sender %v", arp.DstProtAddress, arp.SourceProtAddress)
			}
			operations[arp.Operation] = true
		}
		if na, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement); ok {
			advertised = advertised || na.Override() && !na.Solicited() && !na.Router() && na.TargetAddress.String() == addr.String()
		}
	}
	if addr.Is4() && !(operations[1] && operations[2]) || addr.Is6() && !advertised {
		t.Errorf("%s: ARP operations %v, advertised %v in %d frames", addr, operations, advertised, len(packets))
	}
}
