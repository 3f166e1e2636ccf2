package scheduler

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

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
