package config

import (
	"fmt"
	"net/netip"
	"slices"
)

// defaultCluster is a single node without cluster.toml.
func defaultCluster() Cluster {
	return Cluster{
		Filter: Filter{ExcludePorts: []uint16{22}},
		Hold:   Hold{OnDataDuringSnapshot: OnDataHold, Wake: WakeFirst},

		Snapshots: Snapshots{Keep: DefaultKeep},
	}
}

// readCluster reads cluster.toml; root is nil after a syntax error. The
// tables of [[node]] are given for checks against other files.
func readCluster(file, text string) (c Cluster, d *doc, root *table, nodes []*table) {
	c = defaultCluster()
	d, root = parse(file, text)
	if root == nil {
		return c, d, nil, nil
	}
	if s := root.sub("scheduler"); root.has("scheduler") {
		c.Scheduler = &Scheduler{Port: DefaultSchedulerPort}
		if s.require("address", "write the scheduler's address, or leave [scheduler] out on a single node") {
			s.addr("address", &c.Scheduler.Address)
		}
		integer(s, "port", &c.Scheduler.Port, 1, 65535)
		s.done()
	}
	nodes = root.subs("node")
	for _, t := range nodes {
		c.Nodes = append(c.Nodes, readClusterNode(t, c.Nodes))
	}
	readFilter(root.sub("filter"), &c.Filter)
	readHold(root.sub("hold"), &c.Hold)
	readBalance(root.sub("balance"), &c.Balance)
	s := root.sub("snapshots")
	integer(s, "keep", &c.Snapshots.Keep, 1, 1000)
	s.duration("max_age", &c.Snapshots.MaxAge)
	s.done()
	root.done()
	return c, d, root, nodes
}

func readClusterNode(t *table, before []ClusterNode) ClusterNode {
	n := ClusterNode{FilterPort: DefaultFilterPort, AgentPort: DefaultAgentPort}
	if t.require("name", "write the name that the node's own file has") {
		t.plain("name", &n.Name)
	}
	if t.require("address", "write the address that other nodes dial") {
		t.addr("address", &n.Address)
	}
	integer(t, "filter_port", &n.FilterPort, 1, 65535)
	integer(t, "agent_port", &n.AgentPort, 1, 65535)
	if n.FilterPort == n.AgentPort {
		t.fault("agent_port", nil, "filter_port and agent_port are both %d; two daemons listen there", n.AgentPort)
	}
	for _, b := range before {
		if n.Name != "" && n.Name == b.Name {
			t.fault("name", nil, "%q is the name of an earlier [[node]] too", n.Name)
		}
		if n.Address.IsValid() && n.Address == b.Address && overlap(n, b) {
			t.fault("address", nil, "%s has a port that an earlier [[node]] %q uses too", n.Address, b.Name)
		}
	}
	t.done()
	return n
}

// overlap tells whether two nodes of one address share a port.
func overlap(a, b ClusterNode) bool {
	return a.FilterPort == b.FilterPort || a.FilterPort == b.AgentPort ||
		a.AgentPort == b.FilterPort || a.AgentPort == b.AgentPort
}

func readFilter(t *table, f *Filter) {
	t.ports("include_ports", &f.IncludePorts)
	t.ports("exclude_ports", &f.ExcludePorts)
	if !t.has("exclude_ports") {
		// Who includes the port of ssh by name does not want our default.
		f.ExcludePorts = slices.DeleteFunc(f.ExcludePorts, func(p uint16) bool {
			return slices.Contains(f.IncludePorts, p)
		})
	}
	notBoth(t, f.ExcludePorts, f.IncludePorts)
	t.prefixes("include_addresses", &f.IncludeAddresses)
	t.prefixes("exclude_addresses", &f.ExcludeAddresses)
	for i, p := range f.ExcludeAddresses {
		if slices.ContainsFunc(f.IncludeAddresses, func(q netip.Prefix) bool {
			return p.Overlaps(q) && p.Bits() <= q.Bits()
		}) {
			t.fault("exclude_addresses", index(f.ExcludeAddresses, t.m["exclude_addresses"], i),
				"%s leaves nothing of an entry of include_addresses; take one of them out", p)
		}
	}
	t.done()
}

// index is the position in the file's list of element i of what was read from
// it, where faulty elements are left out; none when that cannot be told.
func index[T any](read []T, file any, i int) []int {
	items, ok := file.([]any)
	if ok && len(items) == len(read) {
		return []int{i}
	}
	for j, item := range items {
		if fmt.Sprint(item) == fmt.Sprint(read[i]) {
			return []int{j}
		}
	}
	return nil
}

// notBoth notes a fault for every excluded port that is included as well.
func notBoth(t *table, exclude, include []uint16) {
	for i, p := range exclude {
		if slices.Contains(include, p) {
			t.fault("exclude_ports", index(exclude, t.m["exclude_ports"], i),
				"%d is in include_ports too; take it out of one of them", p)
		}
	}
}

// readHold reads [hold] over what h has already.
func readHold(t *table, h *Hold) {
	t.word("on_data_during_snapshot", &h.OnDataDuringSnapshot, OnDataHold, OnDataAbort)
	t.size("spool", &h.Spool)
	t.word("wake", &h.Wake, WakeFirst, WakeFull)
	t.done()
}

func readBalance(t *table, b *Balance) {
	t.float("high", &b.High)
	t.float("low", &b.Low)
	if b.Low > b.High {
		t.fault("low", nil, "%v is above high, which is %v", b.Low, b.High)
	}
	t.duration("cooldown", &b.Cooldown)
	t.done()
}
