package checkpoint

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

func TestMigrateThereAndBack(t *testing.T) {
	p := newPair(t, 5)
	for i := range 6 {
		from := i % 2
		r, err := p.migrate(t.Context(), from)
		if err != nil {
			t.Fatalf("migration %d: %v", i+1, err)
		}
		if r.State != control.StateRestored || r.From != p.w[from].node || r.To != p.w[1-from].node || r.SnapshotId == "" {
			t.Errorf("migration %d: reply %v", i+1, r)
		}
		var names []string
		for _, ph := range r.Phases {
			names = append(names, ph.Name)
		}
		if got := strings.Join(names, " "); got != "check freeze drain stop hand over start re-establish open release" {
			t.Errorf("phases: %s", got)
		}
		p.at(t, 1-from, control.StateRestored)
	}
}

// The order in which a packet finds exactly one node that answers for the VIP.
func TestMigrateOrder(t *testing.T) {
	p := newPair(t, 2)
	if _, err := p.migrate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	inOrder(t, p.w[0].trace(), "SEAL", "stop-SIGKILL", "SNAPSHOTDONE", "vip-eth0", "RELEASE")
	inOrder(t, p.w[1].trace(), "TAKE", "vip+eth0", "announce+eth0", "exec", "RESTORECONN-syn", "RESTORED")
}

func inOrder(t *testing.T, trace string, want ...string) {
	t.Helper()
	rest := strings.Fields(trace)
	for _, w := range want {
		i := slices.Index(rest, w)
		if i < 0 {
			t.Errorf("%s is missing, or not in the order %q: %s", w, want, trace)
			return
		}
		rest = rest[i+1:]
	}
}

// Whatever fails on the new node before RESTORED, the application runs on the
// old one again, with everything that it had.
func TestMigrateFails(t *testing.T) {
	for _, step := range []string{"TAKE", "vip+eth0", "exec", "dies", "deaf", "RESTORECONN-syn", "RESTORED", "INFO"} {
		t.Run(step, func(t *testing.T) {
			p := newPair(t, 3)
			p.w[1].setFail(step, connect.NewError(connect.CodeInternal, errTest))
			_, err := p.migrate(t.Context(), 0)
			if err == nil || !strings.Contains(err.Error(), "was restored here and runs") {
				t.Errorf("error: %v", err)
			}
			p.at(t, 0, control.StateRestored)
			p.w[1].setFail(step, nil)
			if _, err := p.migrate(t.Context(), 0); err != nil {
				t.Errorf("the next migration: %v", err)
			}
			p.at(t, 1, control.StateRestored)
		})
	}
}

// Aborted at any point before it opens, from either side.
func TestMigrateAborted(t *testing.T) {
	for _, side := range []string{"old", "new", "caller"} {
		for _, at := range []string{"TAKE", "vip+eth0", "exec", "RESTORECONN-syn"} {
			t.Run(side+"/"+at, func(t *testing.T) {
				p := newPair(t, 3)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				aborted := make(chan error, 1)
				p.w[1].hook[at] = func() {
					p.w[1].setHook(at, nil)
					switch side {
					case "caller":
						cancel()
						// The new node must have been told before the step goes on.
						_ = poll(t.Context(), pollFirst, pollMost, func() (bool, error) {
							p.a[1].mu.Lock()
							defer p.a[1].mu.Unlock()
							o := p.a[1].ops["redis"]
							return o == nil || o.ctx.Err() != nil, nil
						})
						aborted <- nil
					default:
						n := 0
						if side == "new" {
							n = 1
						}
						go func() {
							_, err := p.a[n].abort(context.Background(), "redis")
							aborted <- err
						}()
						_ = poll(t.Context(), pollFirst, pollMost, func() (bool, error) {
							p.a[1].mu.Lock()
							defer p.a[1].mu.Unlock()
							o := p.a[1].ops["redis"]
							return o == nil || o.ctx.Err() != nil, nil
						})
					}
				}
				if _, err := p.migrate(ctx, 0); err == nil {
					t.Error("the migration went on")
				}
				if err := <-aborted; err != nil {
					t.Errorf("abort: %v", err)
				}
				p.at(t, 0, control.StateRestored)
			})
		}
	}
}

func TestMigrateRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(*pair)
		to   string
		want string
	}{
		{"no such node", nil, "node-x", `no node "node-x" in cluster.toml; there is ["node-a" "node-b"]`},
		{"itself", nil, "node-a", "node-a is this node"},
		{"not allowed", func(p *pair) { p.a[0].cfg.Apps["redis"].Nodes = []string{"node-a"} }, "node-b", `does not allow node-b`},
		{"down", func(p *pair) { p.down[1] = true }, "node-b", "node node-b is down; nothing was changed"},
		{"another configuration", func(p *pair) { p.a[1].cfg.Cluster.Filter.ExcludePorts = []uint16{23} }, "node-b", "reload both agents"},
		{"somebody else has the VIP", func(p *pair) { p.w[1].answering = []string{"02:00:00:00:00:0a", "02:00:00:00:00:99"} }, "node-b", "answered for on eth0 by 02:00:00:00:00:99"},
		{"the VIP is there", func(p *pair) { p.w[1].vip[""] = true }, "node-b", "is on interface eth0 here already"},
		{"port taken", func(p *pair) { p.w[1].listening = true }, "node-b", "listened on already"},
		{"known there", func(p *pair) { p.w[1].state = control.StateConnected }, "node-b", "in state CONNECTED here already"},
		{"its filter is away", func(p *pair) { p.w[1].fail["STATUS"] = connect.NewError(connect.CodeUnavailable, errTest) }, "node-b", "made to fail"},
		{"under way", func(p *pair) { p.w[0].state = control.StateSnapshotFreeze }, "node-b", "it is allowed in CONNECTED, RESTORED and SNAPSHOTDONE"},
		{"taken", func(p *pair) { p.w[0].state, p.w[0].takenBy = control.StateBlockData, "node-b" }, "node-b", "node node-b has taken it over"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, 2)
			if c.set != nil {
				c.set(p)
			}
			before := p.w[0].state
			for _, dry := range []bool{true, false} {
				_, err := p.a[0].migrate(t.Context(), &pb.AgentMigrateRequest{App: "redis", ToNode: c.to, DryRun: dry}, false)
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("dry run %v: %v, want %q", dry, err, c.want)
				}
			}
			if p.w[0].state != before || !p.w[0].running || strings.Contains(p.w[0].trace(), "SNAPSHOT") {
				t.Errorf("something was changed: %s %s", p.w[0].state, p.w[0].trace())
			}
		})
	}
}

func TestMigrateDryRun(t *testing.T) {
	p := newPair(t, 2)
	r, err := p.a[0].migrate(t.Context(), &pb.AgentMigrateRequest{App: "redis", ToNode: "node-b", DryRun: true}, false)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Checks) < 6 || r.State != control.StateConnected {
		t.Errorf("reply %v", r)
	}
	if got := p.w[0].trace() + p.w[1].trace(); got != "" {
		t.Errorf("something was done: %s", got)
	}
}

// What is held moves with restore --to, and stays held where that fails.
func TestRestoreTo(t *testing.T) {
	p := newPair(t, 3)
	if _, err := p.a[0].snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
		t.Fatal(err)
	}
	p.w[1].setFail("exec", errTest)
	to := &pb.AgentRestoreRequest{App: "redis", ToNode: "node-b"}
	if _, err := p.a[0].Restore(t.Context(), connect.NewRequest(to)); err == nil || !strings.Contains(err.Error(), "node node-a holds its connections again") {
		t.Errorf("error: %v", err)
	}
	p.at(t, 0, control.StateSnapshotDone)
	p.w[1].setFail("exec", nil)
	r, err := p.a[0].Restore(t.Context(), connect.NewRequest(to))
	if err != nil || r.Msg.State != control.StateRestored {
		t.Fatal(r, err)
	}
	p.at(t, 1, control.StateRestored)
}

// The scheduler asks the new node itself, any number of times.
func TestRestoreFrom(t *testing.T) {
	p := newPair(t, 3)
	if _, err := p.a[0].snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
		t.Fatal(err)
	}
	from := &pb.AgentRestoreRequest{App: "redis", OldNode: "node-a"}
	if _, err := p.a[1].restoreFrom(t.Context(), &pb.AgentRestoreRequest{App: "redis", OldNode: "node-a", SnapshotId: "20200101T000000Z-000000"}); err == nil ||
		!strings.Contains(err.Error(), "and not 20200101T000000Z-000000") {
		t.Errorf("another snapshot: %v", err)
	}
	for range 2 {
		if r, err := p.a[1].restoreFrom(t.Context(), from); err != nil || r.State != control.StateRestored {
			t.Fatal(r, err)
		}
		p.at(t, 1, control.StateRestored)
	}
}

// A holder that cannot be reached keeps what it has.
func TestRestoreFromUnreachable(t *testing.T) {
	p := newPair(t, 3)
	if _, err := p.a[0].snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
		t.Fatal(err)
	}
	p.down[0] = true
	if _, err := p.a[1].restoreFrom(t.Context(), &pb.AgentRestoreRequest{App: "redis", OldNode: "node-a"}); err == nil || !strings.Contains(err.Error(), "down") {
		t.Errorf("error: %v", err)
	}
	p.at(t, 0, control.StateSnapshotDone)
}

// The new filter dies in the middle and has written down what it holds: the
// restore goes on from there, and where that fails too all is given back.
func TestMigrateNewFilterRestarts(t *testing.T) {
	for _, again := range []bool{true, false} {
		p := newPair(t, 3)
		w := p.w[1]
		w.hook["RESTORECONN-syn"] = func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.hook, "RESTORECONN-syn")
			w.state = control.StateSnapshotDone
			w.fail["RESTORECONN-syn"] = control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotDone, "refused")
			w.hook["RESTORESTART"] = func() {
				w.mu.Lock()
				defer w.mu.Unlock()
				if again {
					delete(w.fail, "RESTORECONN-syn")
				}
			}
		}
		_, err := p.migrate(t.Context(), 0)
		if again {
			if err != nil {
				t.Fatal(err)
			}
			p.at(t, 1, control.StateRestored)
			continue
		}
		if err == nil || !strings.Contains(err.Error(), "was restored here and runs") {
			t.Errorf("error: %v", err)
		}
		p.at(t, 0, control.StateRestored)
	}
}

// A release that does not reach the old node is repeated, and the way back
// does not wait for it.
func TestMigrateReleaseLater(t *testing.T) {
	p := newPair(t, 3)
	p.w[0].setFail("RELEASE", errTest)
	if _, err := p.migrate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if nodes, err := p.a[1].owed.nodes("redis"); err != nil || !slices.Equal(nodes, []string{"node-a"}) {
		t.Fatalf("owed: %v %v", nodes, err)
	}
	p.w[0].setFail("RELEASE", nil)
	if err := p.a[1].settleLater(t.Context(), "redis"); err != nil {
		t.Error(err)
	}
	p.at(t, 1, control.StateRestored)

	p.w[1].setFail("RELEASE", errTest) // now the other way round, and straight back
	if _, err := p.migrate(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := p.migrate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	p.w[1].setFail("RELEASE", nil)
	if err := p.a[0].settleLater(t.Context(), "redis"); err != nil {
		t.Error(err)
	}
	p.at(t, 1, control.StateRestored)
}

func TestYieldRefused(t *testing.T) {
	p := newPair(t, 1)
	p.w[0].state, p.w[0].takenBy = control.StateBlockData, "node-b"
	for _, c := range []struct{ taker, what, want string }{
		{"node-c", control.YieldAddresses, "has not taken"},
		{"node-b", control.YieldBack, "not handed back"},
		{"node-b", "all", "want addresses, back or release"},
	} {
		if _, err := p.a[0].yield(t.Context(), &pb.AgentYieldRequest{App: "redis", Taker: c.taker, What: c.what}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s by %s: %v, want %q", c.what, c.taker, err, c.want)
		}
	}
	// A release by whom it was not given to changes nothing.
	if _, err := p.a[0].yield(t.Context(), &pb.AgentYieldRequest{App: "redis", Taker: "node-c", What: control.YieldRelease}); err != nil || p.w[0].state != control.StateBlockData {
		t.Errorf("release by a stranger: %v, state %q", err, p.w[0].state)
	}
	if !p.w[0].vip[""] {
		t.Error("the VIP went")
	}
}

// What cannot be given back at once is given back later, and then the
// application comes back.
func TestMigrateUndoneLater(t *testing.T) {
	p := newPair(t, 3)
	p.w[1].setFail("list", errTest)
	if _, err := p.migrate(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "it is tried again") {
		t.Fatal(err)
	}
	p.w[1].mu.Lock()
	if p.w[1].state != control.StateRestoreStart || !p.w[1].vip[""] {
		t.Errorf("not held by the new node: %q", p.w[1].state)
	}
	delete(p.w[1].fail, "list")
	p.w[1].mu.Unlock()
	p.settled(t)
	p.at(t, 0, control.StateRestored)
}

// An application that is not known here is not started while another machine
// has its VIP, and nothing is changed.
func TestStartElsewhere(t *testing.T) {
	p := newPair(t, 0)
	w := p.w[1]
	w.answering = []string{"02:00:00:00:00:99"}
	if _, err := p.a[1].start(t.Context(), "redis"); err == nil || !strings.Contains(err.Error(), "answered for on eth0 by 02:00:00:00:00:99") {
		t.Errorf("error: %v", err)
	}
	if got := w.trace(); got != "" {
		t.Errorf("something was done: %s", got)
	}
	w.answering = nil
	if _, err := p.a[1].start(t.Context(), "redis"); err != nil {
		t.Error(err)
	}
}

// Other nodes that are still owed a release, or a list of them that cannot be
// read, keep no application from moving.
func TestMigrateOwesOthers(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		p := newPair(t, 2)
		if err := p.a[1].owed.add("redis", "node-x"); err != nil {
			t.Fatal(err)
		}
		if damaged {
			writeFile(t, p.a[1].owed.path("redis"), "half of it")
			if err := os.Chmod(p.a[1].owed.path("redis"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := p.migrate(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		want := []string{"node-x"}
		if damaged {
			want = nil
		}
		if nodes, err := p.a[1].owed.nodes("redis"); err != nil || !slices.Equal(nodes, want) {
			t.Errorf("owed: %v, %v, want %v", nodes, err, want)
		}
	}
}

// Aborted at the end of the snapshot: the other node learns nothing of it.
func TestMigrateAbortedBefore(t *testing.T) {
	p := newPair(t, 2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p.w[0].setHook("SNAPSHOTDONE", cancel)
	if _, err := p.migrate(ctx, 0); err == nil || !strings.Contains(err.Error(), "was restored here and runs") {
		t.Errorf("error: %v", err)
	}
	if got := p.w[1].trace(); got != "" {
		t.Errorf("the other node did %s", got)
	}
	p.at(t, 0, control.StateRestored)
}

// The old agent is dead and the addresses never left it: its filter answers
// again as soon as the new node gives up.
func TestGiveBackWithoutAgent(t *testing.T) {
	p := newPair(t, 2)
	p.w[0].mu.Lock()
	p.w[0].away()
	p.w[0].mu.Unlock()
	if _, err := p.w[1].takeOver("node-a"); err != nil {
		t.Fatal(err)
	}
	down := errors.New("down")
	p.a[1].dialAgent = func(string) (nfconnfilterv1connect.AgentClient, func(), error) {
		return unreachable{err: connect.NewError(connect.CodeUnavailable, down)}, func() {}, nil
	}
	if _, err := p.a[1].giveBack(t.Context(), p.a[1].cfg.Apps["redis"], "node-a", true); err == nil || !strings.Contains(err.Error(), "down") {
		t.Errorf("error: %v", err)
	}
	if p.w[0].state != control.StateSnapshotDone || p.w[1].state != "" {
		t.Errorf("states %q and %q", p.w[0].state, p.w[1].state)
	}
}

// unreachable is an agent that nobody can ask.
type unreachable struct {
	nfconnfilterv1connect.AgentClient
	err error
}

func (u unreachable) NodeStatus(context.Context, *connect.Request[pb.AgentNodeStatusRequest]) (*connect.Response[pb.AgentNodeStatusReply], error) {
	return nil, u.err
}

// An application in a network namespace whose connections another node took at
// the last moment: its addresses do not come to this node.
func TestKeepOnNodeOfAnother(t *testing.T) {
	for _, state := range []string{control.StateBlockData, "", control.StateSnapshotDone} {
		w, a := newWorld(t, 1)
		app := *a.cfg.Apps["redis"]
		app.Process.Namespace = "inner"
		w.away()
		w.state, w.vip = state, map[string]bool{}
		a.keepOnNode(&app)
		if here := w.vip[""]; here != (state == control.StateSnapshotDone) {
			t.Errorf("in state %q the VIP is on the node: %v", state, here)
		}
	}
}

// The old node is released by hand too early, and then the restore fails: the
// connections are the new node's own and are restored there.
func TestMigrateForgottenByOld(t *testing.T) {
	p := newPair(t, 3)
	w := p.w[1]
	w.setHook("exec", func() {
		w.setHook("exec", func() { w.setFail("exec", nil) })
		w.setFail("exec", errTest)
		p.w[0].mu.Lock()
		defer p.w[0].mu.Unlock()
		p.w[0].state, p.w[0].takenBy, p.w[0].conns = "", "", nil
	})
	if _, err := p.migrate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	p.settled(t)
	p.at(t, 1, control.StateRestored)
}
