package control

import (
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

func TestClusterPeers(t *testing.T) {
	addr := netip.MustParseAddr
	cfg := &config.Config{}
	cfg.Node.TLS = config.TLS{Cert: "c", Key: "k", CA: "a"}
	o := ClusterPeers(func() *config.Config { return cfg })
	if o.Cert != "c" || o.Key != "k" || o.CA != "a" || o.AllowPlaintext || len(o.Peers()) != 0 {
		t.Errorf("%+v", o)
	}
	cfg = &config.Config{}
	cfg.Cluster.Nodes = []config.ClusterNode{{Name: "a", Address: addr("192.0.2.1"), FilterPort: 1, AgentPort: 2}}
	cfg.Cluster.Scheduler = &config.Scheduler{Address: addr("192.0.2.1"), Port: 7400}
	if p := o.Peers(); len(p) != 1 || p[0] != (Peer{Name: "a", Address: addr("192.0.2.1"), FilterPort: 1, AgentPort: 2}) {
		t.Errorf("a scheduler on a node: %+v", p)
	}
	cfg.Cluster.Scheduler.Address = addr("192.0.2.9")
	if p := o.Peers(); len(p) != 2 || p[1].Name != SchedulerName || p[1].Address != addr("192.0.2.9") {
		t.Errorf("a scheduler apart: %+v", p)
	}
}
