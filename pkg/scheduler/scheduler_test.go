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

func TestRestoreWhereHeld(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "b", false)
	b.nodes["b"].Load = 9 // it is there already
	b.want(b.look(), "")
	for range 100 {
		b.ask(redisVIP)
	}
	b.want(b.step(), "restore redis on b")
	if act := b.s.apps["redis"].running; act.SnapshotID != "id-redis" || act.Reason == "" {
		t.Errorf("%+v", act)
	}
	b.ask(redisVIP)
	b.on("redis", "b").Operation = "restore"
	b.want(b.look(), "")
	b.done("redis", "")
	b.ask(redisVIP)      // late
	b.want(b.step(), "") // what is known of b is older than the restore
	*b.on("redis", "b") = AppStatus{Name: "redis", MayRun: true, State: appstate.Restored, Idle: 0}
	b.want(b.look(), "")
	b.hold("redis", "b", false)
	b.want(b.look(), "") // the late request was for the time before
	if err := b.s.Request(b.now, netip.MustParseAddr("192.0.2.9")); err == nil || !strings.Contains(err.Error(), "192.0.2.9") {
		t.Errorf("an unknown VIP: %v", err)
	}
}

// A request that was lost, or a scheduler that is new: the node says it.
func TestRestoreWithoutRequest(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "b", true)
	b.want(b.look(), "restore redis on b")
}

func TestRestoreWhileUnderWay(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "b", true)
	for _, busy := range []func(*AppStatus){
		func(p *AppStatus) { p.State = appstate.RestoreStart },
		func(p *AppStatus) { p.Operation = "migrate" },
		func(p *AppStatus) { p.State = appstate.SnapshotFreeze },
	} {
		p := b.on("redis", "c")
		busy(p)
		b.want(b.look(), "")
		*p = AppStatus{Name: "redis", MayRun: true}
	}
	b.want(b.look(), "restore redis on b")
}

func TestRestoreElsewhere(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "a", true)
	b.on("redis", "a").MayRun = false
	b.nodes["b"].Load, b.nodes["c"].Load = 0.9, 0.2
	b.want(b.look(), "restore redis on c held on a")
	b.done("redis", "port taken")
	b.want(b.step(), "") // is it held still?
	b.want(b.look(), "restore redis on b held on a")
	b.done("redis", "port taken")
	b.want(b.look(), "")
	b.noted("failed on every node")
	b.now = b.now.Add(restoreFirst)
	b.want(b.look(), "restore redis on c held on a")
	b.done("redis", "port taken")
	b.want(b.look(), "restore redis on b held on a")
	b.done("redis", "port taken")
	for i := range 2 { // twice as long
		if got := b.look(); got != "" {
			t.Fatalf("%q after %d s", got, i)
		}
	}
	b.want(b.look(), "restore redis on c held on a")
}

func TestRestoreChoice(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		do         func(*bench)
	}{
		{"the holder failed", "restore redis on b held on a", func(b *bench) { b.s.apps["redis"].tried["a"] = true; b.s.apps["redis"].held = "a\x00id-redis" }},
		{"equal loads: the first", "restore redis on b held on a", func(b *bench) { b.on("redis", "a").MayRun = false }},
		{"a load that is not known comes last", "restore redis on c held on a", func(b *bench) {
			b.on("redis", "a").MayRun = false
			b.nodes["b"].Load, b.nodes["c"].Load = -1, 7
		}},
		{"nodes of the configuration", "restore redis on c held on a", func(b *bench) {
			b.cfg.Apps["redis"] = App{VIPs: []netip.Addr{redisVIP}, Nodes: []string{"c"}}
			b.s.Configure(b.cfg)
		}},
		{"no node may", "", func(b *bench) {
			for _, n := range b.cfg.Nodes {
				b.on("redis", n).MayRun, b.on("redis", n).Fault = false, "broken file"
			}
		}},
		{"a node that swallows for it", "restore redis on b held on a", func(b *bench) {
			b.on("redis", "a").MayRun = false
			b.on("redis", "b").State, b.on("redis", "b").TakenBy = appstate.BlockData, "a"
		}},
		{"held twice", "", func(b *bench) { b.hold("redis", "b", true) }},
		{"held and running", "", func(b *bench) { b.on("redis", "b").State = appstate.Connected }},
		{"a node that does not know it", "restore redis on c held on a", func(b *bench) {
			b.on("redis", "a").MayRun = false
			b.nodes["b"].Apps = b.nodes["b"].Apps[:1]
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			b.hold("redis", "a", true)
			tc.do(b)
			b.want(b.look(), tc.want)
			if tc.want == "" && len(b.notes) == 0 {
				t.Error("nothing says why")
			}
		})
	}
}

func TestHolderUnreachable(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "a", true)
	b.on("redis", "a").MayRun = false
	b.on("redis", "b").MayRun, b.on("redis", "c").MayRun = false, false
	b.want(b.look(), "") // known, and nobody can take it
	b.notes = nil
	b.on("redis", "b").MayRun, b.on("redis", "c").MayRun = true, true
	for range 5 {
		b.ask(redisVIP)
		b.want(b.look("a"), "")
		b.now = b.now.Add(time.Minute)
	}
	b.noted("does not answer, and not taken over")
	b.noted("what it holds is not taken over: connection refused")
	b.want(b.look(), "restore redis on b held on a")
	b.noted("answers again")
}

// In the middle of a restore elsewhere the taker vanishes: the old node has
// given the connections away, nobody else gets them.
func TestTakerUnreachable(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "a", true)
	b.on("redis", "a").MayRun = false
	b.want(b.look(), "restore redis on b held on a")
	*b.on("redis", "a") = AppStatus{Name: "redis", MayRun: true, State: appstate.BlockData, TakenBy: "b"}
	b.done("redis", "connection reset")
	for range 3 {
		b.want(b.look("b"), "")
	}
	b.noted("handed over to node b, which does not answer")
	b.hold("redis", "b", true)
	b.want(b.look(), "restore redis on b")
}

// A new scheduler waits until it has found the holder, and no longer.
func TestUnheard(t *testing.T) {
	b := newBench(t)
	b.hold("redis", "b", true)
	b.ask(redisVIP)
	b.want(b.step(), "")
	st := *b.nodes["a"]
	st.At = b.now
	b.s.Observe(st)
	b.want(b.step(), "")
	st = *b.nodes["b"]
	st.At = b.now
	b.s.Observe(st)
	b.want(b.step(), "restore redis on b")
}

func TestRequestForNobody(t *testing.T) {
	b := newBench(t)
	b.ask(redisVIP)
	b.want(b.look("c"), "") // c may hold it
	b.ask(redisVIP)
	b.want(b.look(), "")
	b.noted("no node holds it")
	b.hold("redis", "a", false)
	b.want(b.look(), "")
}

// A request that comes while the snapshot is being taken is for its end.
func TestRequestDuringSnapshot(t *testing.T) {
	b := newBench(t)
	b.on("redis", "a").State = appstate.Connected
	b.want(b.look(), "")
	b.ask(redisVIP)
	b.on("redis", "a").State, b.on("redis", "a").Operation = appstate.SnapshotFreeze, "snapshot"
	b.want(b.look(), "")
	b.on("redis", "a").Operation = ""
	b.hold("redis", "a", false)
	b.want(b.look(), "restore redis on a")
}

func TestHibernate(t *testing.T) {
	b := newBench(t)
	b.cfg.Apps["redis"] = App{VIPs: []netip.Addr{redisVIP}, HibernateAfter: time.Minute}
	b.s.Configure(b.cfg)
	p := b.on("redis", "a")
	for _, st := range []AppStatus{
		{State: appstate.Connected, Idle: time.Minute - 1}, {State: appstate.Connected, Idle: -1},
		{State: appstate.Connected, Idle: time.Hour, Operation: "stop"}, {State: appstate.SnapshotDone, Idle: time.Hour},
		{State: appstate.Restored, Idle: time.Hour, RestoreRequested: true},
	} {
		st.Name, st.MayRun = "redis", true
		*p = st
		if got := b.look(); strings.Contains(got, "snapshot") {
			t.Errorf("%+v: %s", st, got)
		}
	}
	b = newBench(t)
	b.s.Configure(Config{Nodes: b.cfg.Nodes, Apps: map[string]App{"redis": {HibernateAfter: time.Minute}}})
	p = b.on("redis", "a")
	p.State, p.Idle = appstate.Restored, time.Minute
	b.on("nginx", "b").State, b.on("nginx", "b").Idle = appstate.Connected, time.Hour
	b.want(b.look(), "snapshot redis on a")
	b.want(b.look(), "")
	b.done("redis", "clients speak")
	b.want(b.look(), "")
	b.now = b.now.Add(SleepFirst)
	b.want(b.look(), "snapshot redis on a")
	b.done("redis", "clients speak")
	b.now = b.now.Add(SleepFirst)
	b.want(b.look(), "") // twice as long
	b.now = b.now.Add(SleepFirst)
	b.want(b.look(), "snapshot redis on a")
	b.done("redis", "")
	b.want(b.step(), "") // what is known is older
	b.hold("redis", "a", false)
	b.want(b.look(), "")
}

// Remotes that speak keep it awake, also where the node has not seen it yet.
func TestHibernateAsked(t *testing.T) {
	b := newBench(t)
	b.s.Configure(Config{Nodes: b.cfg.Nodes, Apps: map[string]App{"redis": {VIPs: []netip.Addr{redisVIP}, HibernateAfter: time.Minute}}})
	b.on("redis", "a").State, b.on("redis", "a").Idle = appstate.Restored, time.Minute
	for _, n := range b.cfg.Nodes {
		st := *b.nodes[n]
		st.At = b.now
		b.s.Observe(st)
	}
	b.now = b.now.Add(time.Millisecond)
	b.ask(redisVIP)
	b.want(b.step(), "")
	b.want(b.look(), "snapshot redis on a") // it has not, the node says
}

func (b *bench) balance(high, low float64, cooldown time.Duration) {
	b.cfg.Balance = Balance{High: high, Low: low, Cooldown: cooldown}
	b.s.Configure(b.cfg)
}

func TestBalance(t *testing.T) {
	b := newBench(t)
	for _, app := range []string{"nginx", "redis"} {
		b.on(app, "a").State = appstate.Connected
	}
	b.on("nginx", "a").Connections, b.on("redis", "a").Connections = 20, 10
	b.nodes["a"].Load, b.nodes["b"].Load, b.nodes["c"].Load = 2, 0.2, 0.1
	b.want(b.look(), "")
	b.balance(1, 0.3, 10*time.Second)
	b.want(b.look(), "migrate redis on a to c") // fewest connections, least loaded
	b.want(b.look(), "")
	b.done("redis", "")
	b.on("redis", "a").State, b.on("redis", "c").State = appstate.BlockData, appstate.Restored
	b.want(b.look(), "") // cooldown
	b.nodes["a"].Load = 0.9
	b.now = b.now.Add(10 * time.Second)
	b.want(b.look(), "") // below high
	b.nodes["a"].Load = 1
	b.want(b.look(), "migrate nginx on a to c")
	b.done("nginx", "no memory there")
	b.want(b.look(), "") // cooldown also after a failure
	b.now = b.now.Add(10 * time.Second)
	b.want(b.look(), "migrate nginx on a to c")
}

// An application does not go back while any node is loaded.
func TestNoPingPong(t *testing.T) {
	b := newBench(t)
	b.cfg.Nodes = []string{"a", "b"}
	b.balance(1, 0.3, time.Second)
	move := func(from, to string) {
		*b.on("redis", from) = AppStatus{Name: "redis", MayRun: true}
		*b.on("redis", to) = AppStatus{Name: "redis", MayRun: true, State: appstate.Restored}
	}
	move("b", "a")
	b.nodes["a"].Load, b.nodes["b"].Load = 2, 0
	b.want(b.look(), "migrate redis on a to b")
	b.done("redis", "")
	move("a", "b")
	b.nodes["a"].Load, b.nodes["b"].Load = 0, 2 // the load has come with it
	for range 20 {
		b.want(b.look(), "")
	}
	b.nodes["b"].Load = 0.9
	b.want(b.look(), "")
	b.nodes["b"].Load = 2 // for another reason
	b.want(b.look(), "migrate redis on b to a")
}

func TestBalanceRefrains(t *testing.T) {
	for name, do := range map[string]func(*bench){
		"nobody is low":       func(b *bench) { b.nodes["b"].Load, b.nodes["c"].Load = 0.4, 0.31 },
		"a load is not known": func(b *bench) { b.nodes["b"].Load, b.nodes["c"].Load = -1, -1 },
		"not allowed there":   func(b *bench) { b.on("redis", "b").MayRun, b.on("redis", "c").MayRun = false, false },
		"held":                func(b *bench) { b.hold("redis", "a", false) },
		"an operation":        func(b *bench) { b.on("redis", "a").Operation = "snapshot" },
		"a move by hand":      func(b *bench) { b.on("nginx", "a").Operation = "migrate" },
		"moves by hand there": func(b *bench) { b.on("nginx", "b").Operation, b.on("nginx", "c").Operation = "migrate", "migrate" },
		"it is swallowed there": func(b *bench) {
			b.on("redis", "b").State, b.on("redis", "c").State = appstate.BlockData, appstate.BlockData
		},
		"a request": func(b *bench) { b.ask(redisVIP) },
	} {
		b := newBench(t)
		b.balance(1, 0.3, 10*time.Second)
		b.on("redis", "a").State = appstate.Connected
		b.nodes["a"].Load, b.nodes["b"].Load, b.nodes["c"].Load = 2, 0.1, 0.1
		do(b)
		got := b.look()
		if name == "a request" { // it runs, so that it is settled by now
			b.want(got, "migrate redis on a to b")
			continue
		}
		if got != "" {
			t.Errorf("%s: %s", name, got)
		}
	}
	b := newBench(t)
	b.balance(1, 0.3, 10*time.Second)
	b.on("redis", "a").State = appstate.Connected
	b.nodes["a"].Load, b.nodes["b"].Load, b.nodes["c"].Load = 2, 0.1, 0.2
	b.want(b.look("b"), "migrate redis on a to c")
}

// With loads that follow the applications every row of moves ends, and while
// it lasts no node takes part in two moves.
func TestBalanceSettles(t *testing.T) {
	for seed := range uint64(120) {
		r := rand.New(rand.NewPCG(seed, 1))
		cfg := Config{Apps: map[string]App{}, Balance: Balance{High: 0.8, Low: 0.2 + 0.6*r.Float64(), Cooldown: 3 * time.Second}}
		for i := range 2 + r.IntN(4) {
			cfg.Nodes = append(cfg.Nodes, fmt.Sprint("node", i))
		}
		weight, at := map[string]float64{}, map[string]string{}
		for i := range 1 + r.IntN(8) {
			name := fmt.Sprint("app", i)
			cfg.Apps[name] = App{}
			weight[name], at[name] = r.Float64(), cfg.Nodes[r.IntN(len(cfg.Nodes))]
		}
		s := New(cfg)
		now := time.Unix(0, 0)
		var under []Action
		moves, last := 0, 0
		for tick := range 1000 {
			now = now.Add(time.Second)
			for _, n := range cfg.Nodes {
				st := NodeStatus{Node: n, At: now}
				for name := range cfg.Apps {
					p := AppStatus{Name: name, MayRun: true}
					if at[name] == n {
						p.State = appstate.Restored
						st.Load += weight[name]
					}
					st.Apps = append(st.Apps, p)
				}
				s.Observe(st)
			}
			for i := 0; i < len(under); {
				if act := under[i]; r.IntN(2) == 0 {
					failure := ""
					if r.IntN(8) == 0 && tick < 300 {
						failure = "made to fail"
					} else {
						at[act.App] = act.To
					}
					s.Done(now, act, failure)
					under = slices.Delete(under, i, i+1)
					continue
				}
				i++
			}
			actions, _ := s.Step(now)
			for _, act := range actions {
				moves, last = moves+1, tick
				for _, o := range under {
					if o.Node == act.Node || o.Node == act.To || o.To == act.Node || o.To == act.To {
						t.Fatalf("seed %d: %s beside %s", seed, word(act), word(o))
					}
				}
				under = append(under, act)
			}
		}
		if last > 800 {
			t.Errorf("seed %d: %d moves of %d applications on %d nodes, and no end", seed, moves, len(cfg.Apps), len(cfg.Nodes))
		}
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
