package scheduler

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

var (
	redisVIP = netip.MustParseAddr("192.0.2.100")
	nginxVIP = netip.MustParseAddr("2001:db8::1")
)

// bench is a scheduler with three nodes, and what it was told.
type bench struct {
	t     *testing.T
	s     *Scheduler
	cfg   Config
	now   time.Time
	nodes map[string]*NodeStatus
	notes []Note
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, now: time.Unix(1000, 0), nodes: map[string]*NodeStatus{}}
	b.cfg = Config{Nodes: []string{"a", "b", "c"}, Apps: map[string]App{
		"redis": {VIPs: []netip.Addr{redisVIP}},
		"nginx": {VIPs: []netip.Addr{nginxVIP}},
	}}
	for _, n := range b.cfg.Nodes {
		b.nodes[n] = &NodeStatus{Node: n, Load: 0.5}
		for _, app := range []string{"nginx", "redis"} {
			b.nodes[n].Apps = append(b.nodes[n].Apps, AppStatus{Name: app, MayRun: true, Idle: -1})
		}
	}
	b.s = New(b.cfg)
	return b
}

// on gives an application on a node, to be changed.
func (b *bench) on(app, node string) *AppStatus {
	list := b.nodes[node].Apps
	return &list[slices.IndexFunc(list, func(a AppStatus) bool { return a.Name == app })]
}

func (b *bench) hold(app, node string, requested bool) {
	p := b.on(app, node)
	p.State, p.SnapshotID, p.RestoreRequested = appstate.SnapshotDone, "id-"+app, requested
}

// look lets every node but the named answer, and gives what is begun.
func (b *bench) look(silent ...string) string {
	b.now = b.now.Add(time.Second)
	for _, n := range b.cfg.Nodes {
		if slices.Contains(silent, n) {
			b.s.Unreachable(n, b.now, "connection refused")
			continue
		}
		st := *b.nodes[n]
		st.At, st.Apps = b.now, slices.Clone(st.Apps)
		b.s.Observe(st)
	}
	return b.step()
}

func (b *bench) step() string {
	actions, notes := b.s.Step(b.now)
	b.notes = append(b.notes, notes...)
	var out []string
	for _, a := range actions {
		out = append(out, word(a))
	}
	return strings.Join(out, ", ")
}

func word(a Action) string {
	w := fmt.Sprintf("%s %s on %s", a.Kind, a.App, a.Node)
	if a.Holder != "" {
		w += " held on " + a.Holder
	}
	if a.To != "" {
		w += " to " + a.To
	}
	return w
}

// done ends what is under way for an application.
func (b *bench) done(app, failure string) {
	b.t.Helper()
	act := b.s.apps[app].running
	if act == nil {
		b.t.Fatalf("nothing is under way for %s", app)
	}
	b.now = b.now.Add(100 * time.Millisecond)
	b.s.Done(b.now, *act, failure)
}

func (b *bench) want(got, want string) {
	b.t.Helper()
	if got != want {
		b.t.Fatalf("%q is begun, want %q; notes %v", got, want, b.notes)
	}
}

func (b *bench) ask(vip netip.Addr) {
	b.t.Helper()
	if err := b.s.Request(b.now, vip); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) noted(text string) {
	b.t.Helper()
	n := 0
	for _, note := range b.notes {
		if strings.Contains(note.Text, text) {
			n++
		}
	}
	if n != 1 {
		b.t.Errorf("%q is noted %d times: %v", text, n, b.notes)
	}
}

// Whatever nodes say, an application has one action at a time, and none is
// begun at, or for what is held at, a node that does not answer.
func TestRandom(t *testing.T) {
	states := []appstate.App{appstate.Unknown, appstate.Connected, appstate.SnapshotStart, appstate.SnapshotFreeze,
		appstate.SnapshotDone, appstate.RestoreStart, appstate.Restored, appstate.BlockData}
	begun := map[Kind]int{}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		b := newBench(t)
		b.cfg.Apps["redis"] = App{VIPs: []netip.Addr{redisVIP}, HibernateAfter: time.Minute, Nodes: []string{"a", "b"}}
		b.balance(0.8, 0.4, time.Second)
		under, down := map[string]Action{}, map[string]bool{}
		for range 200 {
			b.now = b.now.Add(time.Duration(r.IntN(1500)) * time.Millisecond)
			switch n := b.cfg.Nodes[r.IntN(3)]; r.IntN(6) {
			case 0:
				down[n] = true
				b.s.Unreachable(n, b.now, "gone")
			case 1, 2:
				for i := range b.nodes[n].Apps {
					b.nodes[n].Apps[i] = AppStatus{Name: b.nodes[n].Apps[i].Name, State: states[r.IntN(len(states))], SnapshotID: fmt.Sprint(r.IntN(2)),
						MayRun: r.IntN(4) > 0, Idle: time.Duration(r.IntN(120)-1) * time.Second, RestoreRequested: r.IntN(2) == 0, TakenBy: b.cfg.Nodes[r.IntN(3)]}
				}
				b.nodes[n].Load = r.Float64()*1.2 - 0.1
				fallthrough
			case 3:
				st := *b.nodes[n]
				st.At, st.Apps = b.now, slices.Clone(st.Apps)
				b.s.Observe(st)
				down[n] = false
			case 4:
				b.ask([]netip.Addr{redisVIP, nginxVIP}[r.IntN(2)])
			case 5:
				for _, app := range []string{"nginx", "redis"} {
					if act, there := under[app]; there {
						b.s.Done(b.now, act, []string{"", "failed"}[r.IntN(2)])
						delete(under, app)
						break
					}
				}
			}
			actions, _ := b.s.Step(b.now)
			for _, act := range actions {
				begun[act.Kind]++
				if other, there := under[act.App]; there {
					t.Fatalf("seed %d: %s beside %s", seed, word(act), word(other))
				}
				if down[act.Node] || down[act.Holder] || down[act.To] {
					t.Fatalf("seed %d: %s, and one of them does not answer", seed, word(act))
				}
				target := act.Node
				if act.Kind == Migrate {
					target = act.To
				}
				if act.App == "redis" && target == "c" && act.Kind != Snapshot {
					t.Fatalf("seed %d: %s is not allowed", seed, word(act))
				}
				under[act.App] = act
			}
		}
	}
	if begun[Restore] == 0 || begun[Snapshot] == 0 || begun[Migrate] == 0 {
		t.Errorf("begun: %v", begun)
	}
}

func TestConfigure(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "b", true)
	b.want(b.look(), "restore redis on b")
	b.s.Configure(Config{Nodes: []string{"a"}, Apps: map[string]App{}})
	if err := b.s.Request(b.now, redisVIP); err == nil {
		t.Error("a request for an application that is gone")
	}
	act := *b.s.apps["redis"].running
	b.s.Done(b.now, act, "")
	b.s.Done(b.now, act, "") // once more
	b.want(b.step(), "")
	if len(b.s.apps) != 0 || len(b.s.nodes) != 1 {
		t.Errorf("%v %v", b.s.apps, b.s.nodes)
	}
	b.s.Observe(NodeStatus{Node: "x"})
	b.s.Unreachable("x", b.now, "")
}

func TestOlderAnswers(t *testing.T) {
	b := newBench(t)
	b.look()
	old := *b.nodes["a"]
	old.At = b.now.Add(-time.Minute)
	old.Apps = []AppStatus{{Name: "redis", MayRun: true, State: appstate.SnapshotDone, RestoreRequested: true}}
	b.s.Observe(old)
	b.want(b.step(), "")
	b.s.Unreachable("a", b.now.Add(-time.Minute), "late")
	if b.s.nodes["a"].down {
		t.Error("an older failure counts")
	}
}
