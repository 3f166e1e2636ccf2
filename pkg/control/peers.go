package control

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"

	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// Peer is another node of the cluster, or its scheduler.
type Peer struct {
	Name                  string // of the node; SchedulerName: the scheduler
	Address               netip.Addr
	FilterPort, AgentPort uint16
}

// SchedulerName is the name of the scheduler where that is not a node.
const SchedulerName = "scheduler"

// PeerOptions say how the nodes of a cluster speak with each other.
type PeerOptions struct {
	// Files of this node's certificate, its key and the authority, in PEM. All
	// empty: in plain text.
	Cert, Key, CA string
	// AllowPlaintext permits plain text with other addresses than loopback's.
	AllowPlaintext bool
	// Peers gives the nodes and the scheduler as they are configured now.
	Peers func() []Peer
}

// Peers is the way to the other nodes, and from them to this one.
type Peers struct{ o PeerOptions }

// NewPeers checks the options as far as they can be.
func NewPeers(o PeerOptions) (*Peers, error) { return &Peers{o}, nil }

type peerKey struct{}

// PeerFrom returns the node that a request came from; false when it did not
// come through Peers.Serve.
func PeerFrom(ctx context.Context) (Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(Peer)
	return p, ok
}

// Serve answers the named methods to the peers until ctx ends, and closes l.
func (p *Peers) Serve(ctx context.Context, l net.Listener, h http.Handler, procedures ...string) error {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		for _, o := range p.o.Peers() {
			if o.Address.String() == host {
				r = r.WithContext(context.WithValue(r.Context(), peerKey{}, o))
			}
		}
		h.ServeHTTP(w, r)
	})}
	go func() { <-ctx.Done(); srv.Close() }()
	srv.Serve(l)
	return nil
}

// DialFilter returns a client of a node's filter.
func (p *Peers) DialFilter(node string) (*FilterClient, error) {
	t, url, err := p.dial(node, func(p Peer) uint16 { return p.FilterPort })
	if err != nil {
		return nil, err
	}
	return &FilterClient{nfconnfilterv1connect.NewFilterClient(&http.Client{Transport: t}, url, clientOptions(nil)...), t}, nil
}

// DialAgent returns a client of a node's agent.
func (p *Peers) DialAgent(node string) (*AgentClient, error) {
	t, url, err := p.dial(node, func(p Peer) uint16 { return p.AgentPort })
	if err != nil {
		return nil, err
	}
	return &AgentClient{nfconnfilterv1connect.NewAgentClient(&http.Client{Transport: t}, url, clientOptions(nil)...), t}, nil
}

func (p *Peers) dial(node string, port func(Peer) uint16) (*http.Transport, string, error) {
	for _, o := range p.o.Peers() {
		if o.Name == node {
			return &http.Transport{}, "http://" + net.JoinHostPort(o.Address.String(), strconv.Itoa(int(port(o)))), nil
		}
	}
	return nil, "", fmt.Errorf("no node %q in cluster.toml", node)
}
