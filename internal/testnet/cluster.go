package testnet

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// ClusterOptions shape a Cluster.
type ClusterOptions struct {
	// Name becomes part of the namespaces' names; default "cluster".
	Name string
	// Nodes is how many there are, 1 to 80; default 2.
	Nodes int
	// Cable has the client on a Link, which can be impaired; otherwise it is on a veth pair.
	Cable bool
	// Seed of the Link.
	Seed uint64
}

// Cluster is a number of node namespaces and a client namespace on one switch: a bridge in a namespace of its own. All
// are on one link, each with its interface Iface, so that an address moves between the nodes by gratuitous ARP and
// unsolicited neighbour advertisements. Node i (from 0) is 10.77.0.(11+i)/24 and fd77::(11+i)/64, the client
// 10.77.0.2/24 and fd77::2/64.
type Cluster struct {
	sw, client *NS
	nodes      []*NS
	link       *Link
}

const bridge = "br0"

// NewCluster makes a Cluster that is removed with the test.
func NewCluster(tb TB, o ClusterOptions) *Cluster {
	tb.Helper()
	c, err := SetupCluster(o)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Logf("%v", err)
		}
	})
	return c
}

// SetupCluster makes a Cluster; the caller closes it.
func SetupCluster(o ClusterOptions) (c *Cluster, err error) {
	if o.Name == "" {
		o.Name = "cluster"
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Nodes < 1 || o.Nodes > 80 {
		return nil, fmt.Errorf("testnet: a cluster of %d nodes: 1 to 80 are possible", o.Nodes)
	}
	c = &Cluster{}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
			c = nil
		}
	}()
	if c.sw, err = NewNS(o.Name + "-switch"); err != nil {
		return c, err
	}
	if err = c.sw.addBridge(); err != nil {
		return c, err
	}
	if c.client, err = NewNS(o.Name + "-client"); err != nil {
		return c, err
	}
	if o.Cable {
		if c.link, err = Cable(c.client, Iface, c.sw, "client", o.Seed); err != nil {
			return c, err
		}
		err = c.sw.plug("client")
	} else {
		err = c.attach(c.client, "client")
	}
	err = errors.Join(err, c.client.AddAddr(Iface, "10.77.0.2/24"), c.client.AddAddr(Iface, "fd77::2/64"))
	for i := 0; i < o.Nodes && err == nil; i++ {
		ns, nerr := NewNS(fmt.Sprintf("%s-%s", o.Name, string(rune('a'+i%26))))
		if nerr != nil {
			return c, nerr
		}
		c.nodes = append(c.nodes, ns)
		v4, v6 := nodeAddrs(i)
		err = errors.Join(c.attach(ns, fmt.Sprintf("node%d", i)), ns.AddAddr(Iface, v4.String()), ns.AddAddr(Iface, v6.String()))
	}
	return c, err
}

// nodeAddrs are the addresses of node i.
func nodeAddrs(i int) (v4, v6 netip.Prefix) {
	return netip.MustParsePrefix(fmt.Sprintf("10.77.0.%d/24", 11+i)), netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 11+i))
}

// addBridge makes the bridge of a switch. It forwards from the beginning, learns addresses from what it sees, and
// sends multicasts to every port.
func (ns *NS) addBridge() error {
	// The switch itself is nobody on the link.
	if err := ns.Sysctl("net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return fmt.Errorf("testnet: %w", err)
	}
	return ns.withHandle(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridge
		snooping := false
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		return linkUp(bridge)(h)
	})
}

// plug makes an interface of the switch a port of its bridge.
func (ns *NS) plug(iface string) error {
	return ns.withHandle(func(h *netlink.Handle) error {
		link, err := h.LinkByName(iface)
		if err != nil {
			return fmt.Errorf("interface %s: %w", iface, err)
		}
		br, err := h.LinkByName(bridge)
		if err != nil {
			return fmt.Errorf("interface %s: %w", bridge, err)
		}
		return h.LinkSetMaster(link, br)
	})
}

// attach joins a namespace to the switch by a veth pair; port is its name there.
func (c *Cluster) attach(ns *NS, port string) error {
	if err := Join(ns, Iface, c.sw, port); err != nil {
		return err
	}
	return c.sw.plug(port)
}

// Attach puts one more machine on the switch, with an address in CIDR form. The caller closes its namespace.
func (c *Cluster) Attach(label, cidr string) (*NS, error) {
	ns, err := NewNS(label)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(c.attach(ns, label), ns.AddAddr(Iface, cidr)); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// Close removes all namespaces and kills the commands that still run in them.
func (c *Cluster) Close() error {
	var errs []error
	if c.link != nil {
		errs = append(errs, c.link.Close())
	}
	for _, ns := range append([]*NS{c.client, c.sw}, c.nodes...) {
		if ns != nil {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// Nodes is the number of nodes.
func (c *Cluster) Nodes() int { return len(c.nodes) }

// Node returns the namespace of node i, from 0.
func (c *Cluster) Node(i int) *NS { return c.nodes[i] }

// Client returns the namespace of the remotes.
func (c *Cluster) Client() *NS { return c.client }

// Switch returns the namespace of the bridge.
func (c *Cluster) Switch() *NS { return c.sw }

// Link returns the client's cable, its frames to the nodes being those "forth"; nil without ClusterOptions.Cable.
func (c *Cluster) Link() *Link { return c.link }

// Net is the view of one node and the client, for what knows only these two. It belongs to the Cluster and is not
// closed.
func (c *Cluster) Net(i int) *Net {
	v4, _ := nodeAddrs(i)
	return &Net{node: c.nodes[i], client: c.client, nodeAddr: v4.Addr(), clientAddr: netip.MustParseAddr("10.77.0.2")}
}
