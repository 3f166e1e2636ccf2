package checkpoint

import (
	"context"
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// takeOver plays RESTORESTART with an old node: the other filter's HANDOVER.
func (w *world) takeOver(old string) (*reply, error) {
	if err := w.do("TAKE"); err != nil {
		return nil, err
	}
	o := w.peer
	o.mu.Lock()
	defer o.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.state == control.StateRestoreStart && w.oldNode == old:
	case w.state != "" && w.state != control.StateBlockData,
		o.state != control.StateSnapshotDone && (o.state != control.StateBlockData || o.takenBy != w.node):
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", w.state, fmt.Sprintf("HANDOVER refused in %q and %q", w.state, o.state))
	default:
		o.state, o.takenBy = control.StateBlockData, w.node
		w.state, w.oldNode, w.takenBy, w.id, w.conns = control.StateRestoreStart, old, "", o.id, nil
		for _, c := range o.conns {
			w.conns = append(w.conns, &pb.ConnInfo{Local: c.Local, Remote: c.Remote, Role: c.Role, State: control.ConnConnectRmt, Restorable: true})
		}
	}
	return connect.NewResponse(&pb.AppReply{App: "redis", State: w.state, SnapshotId: w.id}), nil
}

// handBack plays RESTOREABORT with an old node.
func (w *world) handBack() (*reply, error) {
	if err := w.do("RESTOREABORT"); err != nil {
		return nil, err
	}
	o := w.peer
	o.mu.Lock()
	defer o.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.vip[""] {
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", w.state, "the VIP is on this node")
	}
	if o.state == "" { // it has forgotten it
		w.state, w.oldNode = control.StateSnapshotDone, ""
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", w.state, "the connections stay held on this node")
	}
	o.state, o.takenBy = control.StateSnapshotDone, ""
	w.state, w.oldNode, w.conns = "", "", nil
	return connect.NewResponse(&pb.AppReply{App: "redis"}), nil
}

func (w *world) Release(_ context.Context, r *connect.Request[pb.ReleaseRequest]) (*reply, error) {
	w.mu.Lock()
	here := w.vip[""]
	w.mu.Unlock()
	if here {
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", w.state, "RELEASE: the VIP is on this node")
	}
	res, err := w.step("RELEASE", []string{control.StateBlockData}, "")
	if err == nil {
		w.mu.Lock()
		w.takenBy, w.conns = "", nil
		w.mu.Unlock()
	}
	return res, err
}

// pair is two nodes, of which the first runs the application.
type pair struct {
	w [2]*world
	a [2]*agent
	// down: the node's agent cannot be reached.
	down [2]bool
}

func newPair(t *testing.T, n int) *pair {
	t.Helper()
	p := &pair{}
	for i, name := range []string{"node-a", "node-b"} {
		p.w[i], p.a[i] = newWorld(t, n)
		p.w[i].node = name
		p.a[i].cfg.Node.Name = name
		p.a[i].cfg.Cluster.Nodes = []config.ClusterNode{{Name: "node-a"}, {Name: "node-b"}}
	}
	b := p.w[1]
	b.state, b.running, b.listening, b.conns, b.socks, b.vip = "", false, false, nil, nil, map[string]bool{}
	p.w[0].peer, p.w[1].peer = p.w[1], p.w[0]
	p.a[1].store = p.a[0].store // one shared directory
	for i := range p.a {
		srv := httptest.NewServer(control.AgentHandler(p.a[i]))
		t.Cleanup(srv.Close)
		other := p.a[1-i]
		other.dialAgent = func(node string) (nfconnfilterv1connect.AgentClient, func(), error) {
			if node != p.w[i].node || p.down[i] {
				return nil, nil, fmt.Errorf("node %s is down", node)
			}
			return nfconnfilterv1connect.NewAgentClient(srv.Client(), srv.URL), func() {}, nil
		}
		other.dialFilter = func(string) (nfconnfilterv1connect.FilterClient, func(), error) { return p.w[i], func() {}, nil }
	}
	return p
}

// at tells where the application is and that nothing of it is elsewhere.
func (p *pair) at(t *testing.T, i int, state string) {
	t.Helper()
	here, there := p.w[i], p.w[1-i]
	here.mu.Lock()
	defer here.mu.Unlock()
	there.mu.Lock()
	defer there.mu.Unlock()
	running := state == control.StateRestored || state == control.StateConnected
	if here.state != state || here.running != running || !here.vip[""] {
		t.Errorf("%s: state %q, running %v, VIP %v, want %s", here.node, here.state, here.running, here.vip[""], state)
	}
	if there.state != "" || there.running || there.vip[""] {
		t.Errorf("%s: state %q, running %v, VIP %v, want nothing of it", there.node, there.state, there.running, there.vip[""])
	}
	for n := range p.a {
		if nodes, err := p.a[n].owed.nodes("redis"); err != nil || len(nodes) > 0 {
			t.Errorf("%s still owes %q a release (%v)", p.w[n].node, nodes, err)
		}
		if in, err := p.a[n].intents.load("redis"); err != nil || in != nil {
			t.Errorf("%s still has a record of an operation: %+v (%v)", p.w[n].node, in, err)
		}
	}
}

func (p *pair) migrate(ctx context.Context, from int) (*pb.AgentMigrateReply, error) {
	return p.a[from].migrate(ctx, &pb.AgentMigrateRequest{App: "redis", ToNode: p.w[1-from].node}, false)
}

// settled waits until nothing is under way and no record of anything is left.
func (p *pair) settled(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_ = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		for _, a := range p.a {
			in, _ := a.intents.load("redis")
			if nodes, _ := a.owed.nodes("redis"); len(nodes) > 0 || in != nil || a.busy("redis") {
				return false, nil
			}
		}
		return true, nil
	})
}
