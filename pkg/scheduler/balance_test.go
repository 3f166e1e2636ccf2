package scheduler

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

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
