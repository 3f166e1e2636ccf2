package scheduler

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

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
