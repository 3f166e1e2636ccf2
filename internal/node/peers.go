package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/vip"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// foreign is what the filter needs to share applications with those of other
// nodes. Fields that tests do not set have defaults.
type foreign struct {
	// dial gives a client of a node's filter and what closes it.
	dial func(node string) (nfconnfilterv1connect.FilterClient, func(), error)
	// here tells which interface of this node has an address.
	here     func(netip.Addr) (iface string, ok bool, err error)
	peerFrom func(context.Context) (control.Peer, bool)
	patience time.Duration // for a filter that is being started again [15 s]
	again    time.Duration // between two tries [200 ms; in the background 1 s]

	mu     sync.Mutex
	locks  map[string]chan struct{} // one operation of an application at a time
	jobs   map[string]*job
	given  map[string]string // applications that were handed back, and to which node
	closed bool
	wg     sync.WaitGroup

	peersMu sync.Mutex
	peers   *control.Peers
}

// lock waits for the application's turn.
func (f *foreign) lock(ctx context.Context, app string) (unlock func(), err error) {
	f.mu.Lock()
	if f.locks == nil {
		f.locks = map[string]chan struct{}{}
	}
	l := f.locks[app]
	if l == nil {
		l = make(chan struct{}, 1)
		f.locks[app] = l
	}
	f.mu.Unlock()
	select {
	case l <- struct{}{}:
		return func() { <-l }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// handedBack tells whether the application was, and is unknown since; node != "" notes it.
func (f *foreign) handedBack(app, node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if node != "" {
		if f.given == nil {
			f.given = map[string]string{}
		}
		f.given[app] = node
	}
	return f.given[app] != ""
}

// forgetGiven is for an application that is here again.
func (f *foreign) forgetGiven(app string) {
	f.mu.Lock()
	delete(f.given, app)
	f.mu.Unlock()
}

// close ends the jobs in the background. They go on with the next filter.
func (f *foreign) close() {
	f.mu.Lock()
	f.closed = true
	for _, j := range f.jobs {
		j.cancel()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

// Peers is the way to the other nodes. It is made when it is needed first, and a
// certificate that is wrong is an error of what needed it.
func (n *Node) Peers() (*control.Peers, error) {
	f := &n.foreign
	f.peersMu.Lock()
	defer f.peersMu.Unlock()
	if f.peers != nil {
		return f.peers, nil
	}
	p, err := control.NewPeers(control.ClusterPeers(n.cfg.Load))
	if err != nil {
		return nil, err
	}
	f.peers = p
	return p, nil
}

// peer gives a client of a node's filter.
func (n *Node) peer(node string) (nfconnfilterv1connect.FilterClient, func(), error) {
	if n.foreign.dial != nil {
		return n.foreign.dial(node)
	}
	p, err := n.Peers()
	if err != nil {
		return nil, nil, err
	}
	c, err := p.DialFilter(node)
	if err != nil {
		return nil, nil, err
	}
	return c.FilterClient, c.Close, nil
}

// vipHere tells which interface of this node has the address.
func (n *Node) vipHere(a netip.Addr) (string, bool, error) {
	if n.foreign.here != nil {
		return n.foreign.here(a)
	}
	return vip.Has(a)
}

// PeerAddress is where the other nodes reach this filter; false where there are
// none, and no scheduler.
func PeerAddress(cfg *config.Config) (string, bool) {
	others := cfg.Cluster.Scheduler != nil
	for _, n := range cfg.Cluster.Nodes {
		others = others || n.Name != cfg.Node.Name
	}
	if !others || !cfg.Node.Address.IsValid() {
		return "", false
	}
	return net.JoinHostPort(cfg.Node.Address.String(), strconv.Itoa(int(cfg.Node.FilterPort))), true
}

// peerProcedures are what other nodes may ask.
var peerProcedures = []string{
	nfconnfilterv1connect.FilterHandoverProcedure, nfconnfilterv1connect.FilterHandbackProcedure, nfconnfilterv1connect.FilterReleaseProcedure,
	nfconnfilterv1connect.FilterStatusProcedure, nfconnfilterv1connect.FilterGetConnCountProcedure,
}

// ServePeers answers the other nodes until ctx ends. What hinders it is logged and
// tried again: a filter that holds connections goes on without.
func (n *Node) ServePeers(ctx context.Context) {
	address, ok := PeerAddress(n.cfg.Load())
	if !ok {
		return
	}
	const again = 2 * time.Second
	last := ""
	for ctx.Err() == nil {
		err := n.servePeers(ctx, address)
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != last {
			last = err.Error()
			n.log.Error("other nodes cannot reach this filter; it is tried again", "address", address, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
}

func (n *Node) servePeers(ctx context.Context, address string) error {
	p, err := n.Peers()
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	n.log.Info("other nodes are answered", "address", address)
	if err := p.Serve(ctx, l, control.PeerFilterHandler(peerService{service: service{n, n.do}}), peerProcedures...); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// peerService is what other nodes are answered: a node speaks for itself alone.
type peerService struct {
	nfconnfilterv1connect.UnimplementedFilterHandler
	service service
}

// caller checks that the request comes from the node that it names.
func (p peerService) caller(ctx context.Context, app, named string) (string, error) {
	from := p.service.n.foreign.peerFrom
	if from == nil {
		from = control.PeerFrom
	}
	peer, ok := from(ctx)
	switch {
	case !ok || peer.Name == "" || peer.Name == control.SchedulerName:
		return "", control.Error(connect.CodePermissionDenied, app, p.service.n.state(app), "only the nodes of cluster.toml may ask this")
	case named != "" && named != peer.Name:
		return "", control.Error(connect.CodePermissionDenied, app, p.service.n.state(app), "node "+peer.Name+" may not ask this in the name of node "+named)
	}
	return peer.Name, nil
}

func (p peerService) Handover(ctx context.Context, r *connect.Request[pb.HandoverRequest]) (*connect.Response[pb.HandoverReply], error) {
	app := r.Msg.App
	from, err := p.caller(ctx, app, r.Msg.ToNode)
	if err != nil {
		return nil, err
	}
	if a := p.service.n.cfg.Load().Apps[app]; a != nil && len(a.Nodes) > 0 && !slices.Contains(a.Nodes, from) {
		return nil, control.Error(connect.CodePermissionDenied, app, p.service.n.state(app), fmt.Sprintf(
			"node %s may not run it: nodes = %q in the application's file, as this filter has read it (systemctl reload nfconnfilter)", from, a.Nodes))
	}
	return p.service.Handover(ctx, r)
}

func (p peerService) Handback(ctx context.Context, r *connect.Request[pb.HandbackRequest]) (*connect.Response[pb.AppReply], error) {
	if _, err := p.caller(ctx, r.Msg.App, r.Msg.FromNode); err != nil {
		return nil, err
	}
	return p.service.Handback(ctx, r)
}

func (p peerService) Release(ctx context.Context, r *connect.Request[pb.ReleaseRequest]) (*connect.Response[pb.AppReply], error) {
	from, err := p.caller(ctx, r.Msg.App, "")
	if err != nil {
		return nil, err
	}
	return p.service.release(ctx, r.Msg.App, from, false)
}

func (p peerService) Status(ctx context.Context, r *connect.Request[pb.StatusRequest]) (*connect.Response[pb.StatusReply], error) {
	return p.service.Status(ctx, r)
}

func (p peerService) GetConnCount(ctx context.Context, r *connect.Request[pb.AppRequest]) (*connect.Response[pb.ConnCountReply], error) {
	return p.service.GetConnCount(ctx, r)
}
