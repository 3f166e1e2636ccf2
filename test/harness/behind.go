package harness

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// Behind is the network namespace of an application with one of its own; nil
// when there is none.
func (n *Node) Behind(app string) *testnet.NS { return n.behind[app] }

// AddBehind makes the namespace of an application and joins it to the node,
// which forwards for it, routes the VIPs (joined by commas) there and answers
// for them on its link.
func (n *Node) AddBehind(app, vips string) (err error) {
	i := n.links[app]
	if i == 0 {
		i = len(n.links) + 1
		n.links[app] = i
	}
	ns, err := testnet.NewNS(n.o.Name + "-" + app)
	if err != nil {
		return err
	}
	n.behind[app] = ns
	_ = os.Remove(n.namespacePath(app))
	if err := os.Symlink(ns.Path(), n.namespacePath(app)); err != nil {
		return err
	}
	node, dev := n.Net.Node(), fmt.Sprintf("behind%d", i)
	at := func(last int) string { return fmt.Sprintf("10.78.%d.%d", i, last) }
	if err := testnet.Join(node, dev, ns, testnet.Iface); err != nil {
		return err
	}
	if n.o.NoOffloads {
		if err := errors.Join(node.DisableOffloads(dev), ns.DisableOffloads(testnet.Iface)); err != nil {
			return err
		}
	}
	at6 := func(last int) string { return fmt.Sprintf("fd78:%d::%d", i, last) }
	for _, key := range []string{"net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv4/conf/" + testnet.Iface + "/proxy_arp",
		"net/ipv6/conf/all/forwarding", "net/ipv6/conf/" + testnet.Iface + "/proxy_ndp"} {
		if err := node.Sysctl(key, "1"); err != nil {
			return err
		}
	}
	err = errors.Join(
		node.Sysctl("net/ipv4/neigh/"+testnet.Iface+"/proxy_delay", "0"),
		node.Sysctl("net/ipv6/neigh/"+testnet.Iface+"/proxy_delay", "0"),
		node.AddAddr(dev, at(1)+"/30"), node.AddAddr(dev, at6(1)+"/64"),
		ns.AddAddr(testnet.Iface, at(2)+"/30"), ns.AddAddr(testnet.Iface, at6(2)+"/64"),
		ns.AddRoute(testnet.Iface, "0.0.0.0/0", netip.MustParseAddr(at(1))),
		ns.AddRoute(testnet.Iface, "::/0", netip.MustParseAddr(at6(1))),
	)
	for v := range strings.SplitSeq(vips, ",") {
		addr, gateway := netip.MustParseAddr(v), at(2)
		if addr.Is6() {
			gateway = at6(2)
			// Forwarding alone answers ARP by the route; neighbour discovery wants each address.
			out, nerr := node.Command("ip", "-6", "neigh", "replace", "proxy", v, "dev", testnet.Iface).CombinedOutput()
			if nerr != nil {
				err = errors.Join(err, fmt.Errorf("proxy for %s: %w: %s", v, nerr, out))
			}
		}
		err = errors.Join(err, node.AddRoute(dev, netip.PrefixFrom(addr, addr.BitLen()).String(), netip.MustParseAddr(gateway)))
	}
	return err
}

// namespacePath is how the configuration names an application's namespace, the
// same when it is made anew.
func (n *Node) namespacePath(app string) string { return n.Path(app + ".net") }

// DropBehind removes an application's namespace, as the end of a container does.
func (n *Node) DropBehind(app string) error {
	ns := n.behind[app]
	delete(n.behind, app)
	return errors.Join(killInside(ns.Path()), ns.Close(), os.Remove(n.namespacePath(app)))
}

// spaces are the paths of all network namespaces in which the node's processes
// may run.
func (n *Node) spaces() []string {
	all := []string{n.Net.Node().Path()}
	for _, ns := range n.behind {
		all = append(all, ns.Path())
	}
	return all
}
