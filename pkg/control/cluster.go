package control

import "github.com/nfconnfilter/nfconnfilter/pkg/config"

// ClusterPeers gives the options of a node whose configuration in force is
// what current returns: it is asked again each time, so that nodes may come
// and go. The files of [tls] are those of the first configuration.
func ClusterPeers(current func() *config.Config) PeerOptions {
	n := current().Node
	return PeerOptions{
		Self: n.Name,
		Cert: n.TLS.Cert, Key: n.TLS.Key, CA: n.TLS.CA,
		AllowPlaintext: n.AllowPlaintext,
		Peers:          func() []Peer { return peersOf(&current().Cluster) },
	}
}

// peersOf lists the nodes, and the scheduler where it is not on one of them.
func peersOf(c *config.Cluster) []Peer {
	var out []Peer
	apart := c.Scheduler != nil
	for _, n := range c.Nodes {
		out = append(out, Peer{Name: n.Name, Address: n.Address, FilterPort: n.FilterPort, AgentPort: n.AgentPort})
		apart = apart && c.Scheduler.Address != n.Address
	}
	if apart {
		out = append(out, Peer{Name: SchedulerName, Address: c.Scheduler.Address})
	}
	return out
}
