package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

func TestMain(m *testing.M) {
	pollEvery, pollTimeout = 20*time.Millisecond, 200*time.Millisecond
	goleak.VerifyTestMain(m)
}

// nodes are three nodes in one process.
type nodes struct {
	mu     sync.Mutex
	all    map[string]*fakeNode
	events []string
	hook   func(ctx context.Context, event string) error // called unlocked in each action, with its word
	moved  func(app, from, to string)
}

type fakeNode struct {
	nfconnfilterv1connect.AgentClient
	n    *nodes
	name string

	down, hung bool
	load       float64
	apps       map[string]*pb.NodeApp
	asked      int
}

func newNodes(names ...string) *nodes {
	n := &nodes{all: map[string]*fakeNode{}}
	for _, name := range names {
		f := &fakeNode{n: n, name: name, load: 0.5, apps: map[string]*pb.NodeApp{}}
		for _, app := range []string{"nginx", "redis"} {
			f.apps[app] = &pb.NodeApp{Name: app, MayRun: true, IdleMs: -1}
		}
		n.all[name] = f
	}
	return n
}

// set changes the nodes under their lock.
func (n *nodes) set(f func(all map[string]*fakeNode)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n.all)
}

func hold(a *pb.NodeApp, requested bool) {
	a.State, a.SnapshotId, a.RestoreRequested = control.StateSnapshotDone, "id-1", requested
}

func (n *nodes) trace() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.events, ", ")
}

func (f *fakeNode) Close() {}

func (f *fakeNode) reach(ctx context.Context) error {
	f.n.mu.Lock()
	down, hung := f.down, f.hung
	f.n.mu.Unlock()
	if hung {
		<-ctx.Done()
		return connect.NewError(connect.CodeDeadlineExceeded, ctx.Err())
	}
	if down {
		return connect.NewError(connect.CodeUnavailable, errors.New("connection refused"))
	}
	return nil
}

func (f *fakeNode) NodeStatus(ctx context.Context, _ *connect.Request[pb.AgentNodeStatusRequest]) (*connect.Response[pb.AgentNodeStatusReply], error) {
	if err := f.reach(ctx); err != nil {
		return nil, err
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	f.asked++
	r := &pb.AgentNodeStatusReply{Node: f.name, Load: f.load}
	for _, a := range f.apps {
		r.Apps = append(r.Apps, &pb.NodeApp{Name: a.Name, State: a.State, SnapshotId: a.SnapshotId, Operation: a.Operation, MayRun: a.MayRun,
			Fault: a.Fault, IdleMs: a.IdleMs, RestoreRequested: a.RestoreRequested, Connections: a.Connections, OldNode: a.OldNode, TakenBy: a.TakenBy})
	}
	return connect.NewResponse(r), nil
}

// do is an action of an agent: it has a name in the trace, and the operation is
// under way meanwhile.
func (f *fakeNode) do(ctx context.Context, app, op, word string, change func() error) error {
	if err := f.reach(ctx); err != nil {
		return err
	}
	f.n.mu.Lock()
	f.n.events = append(f.n.events, word)
	busy := f.apps[app].Operation != ""
	if !busy {
		f.apps[app].Operation = op
	}
	hook := f.n.hook
	f.n.mu.Unlock()
	if busy {
		return connect.NewError(connect.CodeFailedPrecondition, errors.New("another operation is under way"))
	}
	var err error
	if hook != nil {
		err = hook(ctx, word)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	f.apps[app].Operation = ""
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = change()
	}
	return err
}

// take moves an application's state between nodes.
func (f *fakeNode) take(app string, from *fakeNode) {
	p := f.apps[app]
	p.State, p.IdleMs, p.RestoreRequested, p.SnapshotId = control.StateRestored, 0, false, from.apps[app].SnapshotId
	if from != f {
		p.OldNode = from.name
		*from.apps[app] = pb.NodeApp{Name: app, MayRun: from.apps[app].MayRun, State: control.StateBlockData, TakenBy: f.name, IdleMs: -1}
	}
	if f.n.moved != nil {
		f.n.moved(app, from.name, f.name)
	}
}

func (f *fakeNode) Restore(ctx context.Context, r *connect.Request[pb.AgentRestoreRequest]) (*connect.Response[pb.AgentReply], error) {
	word := fmt.Sprintf("restore %s on %s", r.Msg.App, f.name)
	from := f
	if r.Msg.OldNode != "" {
		word += " held on " + r.Msg.OldNode
		from = f.n.all[r.Msg.OldNode]
	}
	err := f.do(ctx, r.Msg.App, "restore", word, func() error {
		h := from.apps[r.Msg.App]
		if h.State != control.StateSnapshotDone || h.SnapshotId != r.Msg.SnapshotId || from.down {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s holds it in state %q", from.name, h.State))
		}
		f.take(r.Msg.App, from)
		return nil
	})
	return connect.NewResponse(&pb.AgentReply{}), err
}

func (f *fakeNode) Snapshot(ctx context.Context, r *connect.Request[pb.AgentSnapshotRequest]) (*connect.Response[pb.AgentSnapshotReply], error) {
	err := f.do(ctx, r.Msg.App, "snapshot", fmt.Sprintf("snapshot %s on %s", r.Msg.App, f.name), func() error {
		hold(f.apps[r.Msg.App], false)
		f.apps[r.Msg.App].IdleMs = -1
		return nil
	})
	return connect.NewResponse(&pb.AgentSnapshotReply{}), err
}

func (f *fakeNode) Migrate(ctx context.Context, r *connect.Request[pb.AgentMigrateRequest]) (*connect.Response[pb.AgentMigrateReply], error) {
	err := f.do(ctx, r.Msg.App, "migrate", fmt.Sprintf("migrate %s from %s to %s", r.Msg.App, f.name, r.Msg.ToNode), func() error {
		f.n.all[r.Msg.ToNode].take(r.Msg.App, f)
		return nil
	})
	return connect.NewResponse(&pb.AgentMigrateReply{}), err
}

// logs keeps what is logged.
type logs struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// bench is a scheduler that runs, and its nodes.
type bench struct {
	t     *testing.T
	n     *nodes
	d     *driver
	log   *logs
	addr  string
	stop  func()
	hups  chan struct{}
	newer func() (*config.Config, error)
}

var redisVIP = netip.MustParseAddr("192.0.2.100")

func testConfig(n *nodes) *config.Config {
	cfg := &config.Config{Apps: map[string]*config.App{
		"redis": {Name: "redis", VIPs: []netip.Addr{redisVIP}},
		"nginx": {Name: "nginx", VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.101")}},
	}}
	for i, name := range slices.Sorted(mapsKeys(n.all)) {
		cfg.Cluster.Nodes = append(cfg.Cluster.Nodes, config.ClusterNode{Name: name, Address: netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 1)})})
	}
	return cfg
}

// run starts a scheduler; f may change its configuration.
func run(t *testing.T, n *nodes, f func(*config.Config)) *bench {
	t.Helper()
	cfg := testConfig(n)
	if f != nil {
		f(cfg)
	}
	b := &bench{t: t, n: n, log: &logs{}, hups: make(chan struct{})}
	b.d = newDriver(slog.New(slog.NewTextHandler(b.log, nil)), cfg)
	b.d.load = func() (*config.Config, error) { return b.newer() }
	b.d.dial = func(node string) (agentClient, error) { return n.all[node], nil }
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.d.serve(ctx, l, Options{Reload: b.hups}) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(b.stop)
	return b
}

// until waits for a condition of the nodes.
func (b *bench) until(what string, f func(all map[string]*fakeNode) bool) {
	b.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); ; <-tick.C {
		b.n.mu.Lock()
		ok := f(b.n.all)
		b.n.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(end) {
			b.t.Fatalf("%s: not within 20 s; %s\n%s", what, b.n.trace(), b.log.b.String())
		}
	}
}

// rounds lets every node that answers be asked n times more.
func (b *bench) rounds(n int) {
	b.t.Helper()
	at := map[string]int{}
	b.n.set(func(all map[string]*fakeNode) {
		for name, f := range all {
			at[name] = f.asked
		}
	})
	b.until("rounds", func(all map[string]*fakeNode) bool {
		for name, f := range all {
			if !f.down && !f.hung && f.asked < at[name]+n {
				return false
			}
		}
		return true
	})
}
