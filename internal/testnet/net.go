// Package testnet makes network namespaces, joins them, and captures their packets: for tests that need real sockets
// and for the demonstration. It touches nothing outside the namespaces it made. It needs root.
package testnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TB is the part of testing.TB that New uses.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
}

// Skipper is the part of testing.TB that RequireRoot uses.
type Skipper interface {
	Helper()
	Skipf(format string, args ...any)
}

// Options shape a Net. The zero value is an ordinary IPv4 net with offloads.
type Options struct {
	// Name becomes part of the namespaces' names; default "net".
	Name string
	// NoOffloads switches checksum and segmentation offloads off at both ends, so that every frame is small and has a
	// full checksum. Otherwise frames of up to 64 KiB with partial checksums are seen, as the kernel sets it up.
	NoOffloads bool
	// NodeAddr and ClientAddr are the two ends in CIDR form, IPv4 or IPv6; defaults 10.77.0.1/24 and 10.77.0.2/24.
	NodeAddr, ClientAddr string
}

// Iface is the name of the joining interface at both ends of a Net.
const Iface = "eth0"

// Net is a node namespace and a client namespace joined by a veth pair whose ends are both named Iface.
type Net struct {
	node, client         *NS
	nodeAddr, clientAddr netip.Addr
}

// RequireRoot skips the test unless it runs as root; that is the only ground for skipping.
func RequireRoot(tb Skipper) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skipf("needs root, to make network namespaces")
	}
}

// New makes a Net that is removed with the test.
func New(tb TB, o Options) *Net {
	tb.Helper()
	n, err := Setup(o)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() {
		if err := n.Close(); err != nil {
			tb.Logf("%v", err)
		}
	})
	return n
}

// Setup makes a Net; the caller closes it.
func Setup(o Options) (*Net, error) {
	if o.Name == "" {
		o.Name = "net"
	}
	if o.NodeAddr == "" {
		o.NodeAddr = "10.77.0.1/24"
	}
	if o.ClientAddr == "" {
		o.ClientAddr = "10.77.0.2/24"
	}
	nodeAddr, err := netip.ParsePrefix(o.NodeAddr)
	if err != nil {
		return nil, fmt.Errorf("testnet: NodeAddr: %w", err)
	}
	clientAddr, err := netip.ParsePrefix(o.ClientAddr)
	if err != nil {
		return nil, fmt.Errorf("testnet: ClientAddr: %w", err)
	}
	n := &Net{nodeAddr: nodeAddr.Addr(), clientAddr: clientAddr.Addr()}
	if n.node, err = NewNS(o.Name + "-node"); err != nil {
		return nil, err
	}
	if n.client, err = NewNS(o.Name + "-client"); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	err = errors.Join(
		Join(n.node, Iface, n.client, Iface),
		n.node.AddAddr(Iface, o.NodeAddr),
		n.client.AddAddr(Iface, o.ClientAddr),
	)
	if err == nil && o.NoOffloads {
		err = errors.Join(n.node.DisableOffloads(Iface), n.client.DisableOffloads(Iface))
	}
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Close removes both namespaces and kills the commands that still run in them.
func (n *Net) Close() error {
	var errs []error
	for _, ns := range []*NS{n.client, n.node} {
		if ns != nil {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// Node returns the namespace of the machine under test.
func (n *Net) Node() *NS { return n.node }

// Client returns the namespace of the remotes.
func (n *Net) Client() *NS { return n.client }

// NodeAddr returns the node's address on the link.
func (n *Net) NodeAddr() netip.Addr { return n.nodeAddr }

// ClientAddr returns the client's address on the link.
func (n *Net) ClientAddr() netip.Addr { return n.clientAddr }

// Join makes a veth pair with one end, up, in each of the two namespaces. Interface names are at most 15 bytes.
func Join(a *NS, ifaceA string, b *NS, ifaceB string) error {
	err := a.withHandle(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = ifaceA
		if err := h.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: ifaceB, PeerNamespace: netlink.NsFd(int(b.file.Fd())),
		}); err != nil {
			return fmt.Errorf("add veth %s: %w", ifaceA, err)
		}
		return linkUp(ifaceA)(h)
	})
	if err != nil {
		return err
	}
	return b.withHandle(linkUp(ifaceB))
}

// AddAddr adds an address in CIDR form ("10.77.1.1/24") to an interface; an IPv6 address is usable at once, without
// duplicate address detection.
func (ns *NS) AddAddr(iface, cidr string) error {
	prefix, err := netip.ParsePrefix(cidr)
	if err != nil {
		return fmt.Errorf("testnet: %w", err)
	}
	return ns.AddAddrs(iface, prefix, 1)
}

// AddAddrs adds count addresses to an interface, counting up from the prefix's own: a range of client addresses, when
// one address has too few ports. The caller sees to a route back when they lie outside the link's network.
func (ns *NS) AddAddrs(iface string, first netip.Prefix, count int) error {
	return ns.withHandle(func(h *netlink.Handle) error {
		link, err := h.LinkByName(iface)
		if err != nil {
			return fmt.Errorf("interface %s: %w", iface, err)
		}
		addr := first.Addr()
		for range count {
			if !addr.IsValid() {
				return fmt.Errorf("no address left after %s", first)
			}
			a := &netlink.Addr{IPNet: &net.IPNet{
				IP: addr.AsSlice(), Mask: net.CIDRMask(first.Bits(), addr.BitLen()),
			}}
			if addr.Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := h.AddrAdd(link, a); err != nil {
				return fmt.Errorf("add %s to %s: %w", a.IPNet, iface, err)
			}
			addr = addr.Next()
		}
		return nil
	})
}

// AddRoute adds a route to dst ("default" or CIDR form) by the gateway via; an invalid via means that dst is on the
// link itself.
func (ns *NS) AddRoute(iface, dst string, via netip.Addr) error {
	return ns.withHandle(func(h *netlink.Handle) error {
		link, err := h.LinkByName(iface)
		if err != nil {
			return fmt.Errorf("interface %s: %w", iface, err)
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index}
		if dst != "default" {
			if _, r.Dst, err = net.ParseCIDR(dst); err != nil {
				return err
			}
		}
		if via.IsValid() {
			r.Gw = via.AsSlice()
		} else {
			r.Scope = netlink.SCOPE_LINK
		}
		if err := h.RouteAdd(r); err != nil {
			return fmt.Errorf("add route to %s: %w", dst, err)
		}
		return nil
	})
}
