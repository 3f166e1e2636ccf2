package checkpoint

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// peerProcedures are what the other nodes and the scheduler may ask. Starting
// and stopping are for this node's own people.
var peerProcedures = []string{
	nfconnfilterv1connect.AgentNodeStatusProcedure,
	nfconnfilterv1connect.AgentRestoreProcedure,
	nfconnfilterv1connect.AgentSnapshotProcedure,
	nfconnfilterv1connect.AgentMigrateProcedure,
	nfconnfilterv1connect.AgentAbortProcedure,
	nfconnfilterv1connect.AgentPrepareProcedure,
	nfconnfilterv1connect.AgentYieldProcedure,
	nfconnfilterv1connect.AgentProgressProcedure,
}

// peerAddress is where the other nodes and the scheduler reach this agent; not
// valid where there is neither, or where no [[node]] tells them of it.
func peerAddress(c *config.Config) netip.AddrPort {
	here := slices.ContainsFunc(c.Cluster.Nodes, func(n config.ClusterNode) bool { return n.Name == c.Node.Name })
	if !here || len(c.Cluster.Nodes) < 2 && c.Cluster.Scheduler == nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(c.Node.Address, c.Node.AgentPort)
}

// peerPort is the agent's door for the other nodes: it opens once cluster.toml
// has any, also after a reload, and stays open.
type peerPort struct {
	a    *agent
	ctx  context.Context
	open netip.AddrPort // where it is open
}

// ensure opens the door if it is to be open and is not, and returns what serves
// it until ctx ends; nil when there is nothing to serve.
func (p *peerPort) ensure() (func() error, error) {
	want := peerAddress(p.a.config())
	switch {
	case !want.IsValid() || want == p.open:
		return nil, nil
	case p.open.IsValid():
		return nil, fmt.Errorf("this agent listens at %s until it is started anew, and not at %s", p.open, want)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(p.ctx, "tcp", want.String())
	if err != nil {
		return nil, fmt.Errorf("port for other nodes: %w; give this node's own address and a free agent_port in its [[node]]", err)
	}
	p.open = want
	p.a.log.Info("agent serves other nodes", "address", want)
	return func() error { return p.a.peers.Serve(p.ctx, l, control.AgentHandler(p.a), peerProcedures...) }, nil
}
