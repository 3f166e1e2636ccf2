package config

import (
	"net/netip"
	"slices"
)

// crossNode compares the node's file with cluster.toml and fills in what the
// node's [[node]] knows and its own file does not say.
func (l *loader) crossNode() {
	if l.nodeRoot == nil || l.clusterRoot == nil {
		return
	}
	n, t := &l.node, l.nodeRoot
	i := slices.IndexFunc(l.cluster.Nodes, func(c ClusterNode) bool { return c.Name == n.Name })
	switch {
	case i >= 0:
		l.agree(l.cluster.Nodes[i])
	case len(l.cluster.Nodes) > 0 && len(l.clusterDoc.faults) == 0 && !l.apart:
		t.fault("name", nil, "%q is the name of no [[node]] in %s; add one, or correct the name", n.Name, l.clusterDoc.file)
	}
	if len(l.cluster.Nodes) < 2 && !l.apart || n.AllowPlaintext || n.TLS != (TLS{}) {
		return
	}
	remote := slices.IndexFunc(l.cluster.Nodes, func(c ClusterNode) bool {
		return c.Address.IsValid() && !c.Address.IsLoopback()
	})
	if remote >= 0 {
		key := "tls"
		if t.has("allow_plaintext") {
			key = "allow_plaintext"
		}
		t.fault(key, nil, "node %q is at %s, which is not loopback, and there is no TLS; set cert, key and ca in [tls], or allow_plaintext = true",
			l.cluster.Nodes[remote].Name, l.cluster.Nodes[remote].Address)
	}
}

// agree compares the node with its own [[node]].
func (l *loader) agree(c ClusterNode) {
	n, t := &l.node, l.nodeRoot
	if !t.has("address") {
		n.Address = c.Address
	} else if n.Address.IsValid() && c.Address.IsValid() && n.Address != c.Address {
		t.fault("address", nil, "%s disagrees with %s of [[node]] %q in %s", n.Address, c.Address, c.Name, l.clusterDoc.file)
	}
	for _, p := range []struct {
		key   string
		own   *uint16
		other uint16
	}{{"filter_port", &n.FilterPort, c.FilterPort}, {"agent_port", &n.AgentPort, c.AgentPort}} {
		if !t.has(p.key) {
			*p.own = p.other
		} else if *p.own != p.other {
			t.fault(p.key, nil, "%d disagrees with %d of [[node]] %q in %s", *p.own, p.other, c.Name, l.clusterDoc.file)
		}
	}
}

// crossApps compares the applications with the nodes, with the cluster's
// lists and with one another.
func (l *loader) crossApps() {
	for _, f := range l.apps {
		if f.root == nil {
			continue
		}
		for i, vip := range f.app.VIPs {
			l.crossVIP(f, vip, f.vipIndex(i))
		}
		for i, name := range f.app.Nodes {
			known := slices.ContainsFunc(l.cluster.Nodes, func(c ClusterNode) bool { return c.Name == name })
			if len(l.cluster.Nodes) > 0 && !known {
				f.root.fault("nodes", index(f.app.Nodes, f.root.m["nodes"], i), "%q is the name of no [[node]] in cluster.toml", name)
			}
		}
		l.crossPorts(f)
		f.own = len(f.doc.faults) > 0
	}
	// An application that is disabled anyway takes no other with it.
	for _, f := range l.apps {
		for _, g := range l.apps {
			if f == g || f.root == nil || g.root == nil || g.own && !f.own {
				continue
			}
			for i, vip := range f.app.VIPs {
				if slices.Contains(g.app.VIPs, vip) {
					f.root.fault("vip", f.vipIndex(i), "%s is the VIP of application %q too (%s)", vip, g.name, g.file)
				}
			}
		}
	}
}

// vipIndex is the position of a VIP in the file's list.
func (f *appFile) vipIndex(i int) []int {
	return index(f.app.VIPs, f.root.m["vip"], i)
}

// crossVIP refuses a VIP that is a node's own address: the filter would
// capture the node's own traffic.
func (l *loader) crossVIP(f *appFile, vip netip.Addr, at []int) {
	if vip == l.node.Address {
		f.root.fault("vip", at, "%s is the address of node %q itself; a VIP is an address of the application alone", vip, l.node.Name)
		return
	}
	for _, c := range l.cluster.Nodes {
		if vip == c.Address {
			f.root.fault("vip", at, "%s is the address of node %q; a VIP is an address of the application alone", vip, c.Name)
			return
		}
	}
}

// crossPorts refuses ports that the cluster's lists keep from the filter.
func (l *loader) crossPorts(f *appFile) {
	c := l.cluster.Filter
	for i, p := range f.app.IncludePorts {
		at := index(f.app.IncludePorts, f.root.m["include_ports"], i)
		if slices.Contains(c.ExcludePorts, p) {
			f.root.fault("include_ports", at, "%d is in exclude_ports of [filter] in cluster.toml, by default [22]; take it out of one of them", p)
		} else if len(c.IncludePorts) > 0 && !slices.Contains(c.IncludePorts, p) {
			f.root.fault("include_ports", at, "%d is not in include_ports of [filter] in cluster.toml; add it there", p)
		}
	}
}
