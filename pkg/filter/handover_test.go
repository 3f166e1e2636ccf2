package filter_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

const heldBySpool = `app redis 10.0.0.100 6379
	link c1 10.0.0.2:40000
	link c2 10.0.0.2:40001
	open c1
	open c2
	request SNAPSHOTSTART
	request SNAPSHOTFREEZE spool=64 wake=full
	advance 60ms
	request SEAL
	request SNAPSHOTDONE s1
	remote c1 ACK data "some octets"
`

func played(t *testing.T, script string) *filtertest.World {
	t.Helper()
	w := filtertest.New()
	playOn(t, w, script)
	return w
}

func playOn(t *testing.T, w *filtertest.World, script string) {
	t.Helper()
	if err := w.Play(script); err != nil {
		t.Fatal(err)
	}
	if f := w.Faults(); len(f) > 0 {
		t.Fatal(f)
	}
}

// asked steps a request and returns its error.
func asked(w *filtertest.World, body any) error {
	var fx filter.Effects
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: body}}, &fx)
	return fx.Replies[0].Err
}

// What was on its way when the other node asked anew is void: it would be taken in
// the place of what that node has now.
func TestLateHandback(t *testing.T) {
	w := played(t, heldBySpool+"request HANDOVER b\n")
	late := w.Parcel()
	playOn(t, w, "request HANDOVER b\n")
	if err := asked(w, &filter.Handback{App: "redis", From: "b", Given: late}); err == nil || !strings.Contains(err.Error(), "earlier handover") {
		t.Errorf("an old answer: %v", err)
	}
	if err := asked(w, &filter.Handback{App: "redis", From: "b", Given: w.Parcel()}); err != nil {
		t.Error(err)
	}
}

// A filter that starts anew in BLOCKDATA does not repeat local's FIN: another node does.
func TestSilentStart(t *testing.T) {
	vip := netip.MustParseAddr("10.0.0.100")
	apps := []filter.AppRecord{{Name: "a", VIPs: []netip.Addr{vip}, State: appstate.BlockData, TakenBy: "b", SnapshotID: "s"}}
	conns := []filter.ConnRecord{{App: "a", State: appstate.Closing, FinOut: true, Lingers: true, Learned: true, SndUna: 5, SndNxt: 6, FinOutEnd: 6, RcvNxt: 9,
		Own: []byte("beat"), OwnEnd: 6, ID: filter.ConnID{Local: netip.AddrPortFrom(vip, 80), Remote: netip.MustParseAddrPort("10.0.0.2:4000")}}}
	for state, silent := range map[appstate.App]bool{appstate.BlockData: true, appstate.SnapshotDone: false} {
		apps[0].State = state
		e := filter.New(filter.Config{})
		var fx filter.Effects
		if err := e.Load(1, apps, conns, nil, true, &fx); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			e.Step(max(e.NextDeadline(), 1), filter.Event{}, &fx)
		}
		if (len(fx.Sends) == 0) != silent {
			t.Errorf("%v: %d segments were sent", state, len(fx.Sends))
		}
	}
}

// The remote's clock is as old on the new node as it was on the old one, however
// different their own clocks are: an old duplicate stays one.
func TestTimesAreShifted(t *testing.T) {
	for _, skew := range []string{"900h", "-900h"} {
		w := played(t, heldBySpool+"request HANDOVER b\nnode b "+skew+"\nrequest RESTORESTART s1 from a\n")
		var s packet.Segment
		b := w.Segment("c1", true, packet.ACK, -1, nil)
		if s.Parse(b) != packet.OK {
			t.Fatal("no segment")
		}
		s.SetTS(s.Opt.TSVal-100, s.Opt.TSEcr)
		var fx filter.Effects
		w.Engine.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
		if fx.Reason != filter.HeldOldTimestamp {
			t.Errorf("clock ahead by %s: %v", skew, fx.Reason)
		}
	}
}

// What was replaced, and has ended on the other node, leaves nothing in the journal:
// neither of a connection nor of its spool.
func TestNothingIsLeft(t *testing.T) {
	w := played(t, heldBySpool+`remote c2 ACK data "more"
		request HANDOVER b
		node b 5s
		request RESTORESTART s1 from a
		restart
		remote c2 RST
		remote c2 SYN
		newlocal c1 0x1000 77
		request RESTORESTART s1
		request YIELD
		node a
		request HANDBACK b
		restart
	`)
	var l filter.ConnList
	conns := func() []filter.ConnInfo {
		var fx filter.Effects
		w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "redis"}}}, &fx)
		l = *fx.Replies[0].Body.(*filter.ConnList)
		return l.Conns
	}
	if c := conns(); len(c) != 1 || c[0].Kept != 11 {
		t.Fatalf("%+v", c)
	}
	if w.Spools() != 1 {
		t.Errorf("%d spools are recorded", w.Spools())
	}
	playOn(t, w, `newlocal c1 0x2000 77
		request RESTORESTART s1
		request RESTORECONN c1
		advance 20ms
		request RESTORED
		advance 1s
	`)
	if local, _ := w.Taken("c1"); string(local) != "some octets" {
		t.Errorf("local has %q", local)
	}
	if w.Spools() != 0 {
		t.Errorf("%d spools are left", w.Spools())
	}
	w.Node("b")
	if playOn(t, w, "request RELEASE --force\n"); w.Spools() != 0 {
		t.Errorf("%d spools are left on the other node", w.Spools())
	}
}

// The limits of the taker hold for what it is given, and flows that both have stay
// in the set.
func TestTakenTwiceSets(t *testing.T) {
	w := played(t, heldBySpool+`newlocal c1 0x1000 77
		newlocal c2 0x1000 77
		request RESTORESTART s1
		request RESTORECONN c1 c2
		advance 20ms
		request RESTORED
		advance 1s
		remote c1 ACK
		request SNAPSHOTSTART
		request SNAPSHOTFREEZE
		advance 60ms
		request SEAL
		request SNAPSHOTDONE s2
		request HANDOVER b
	`)
	st := *w.Parcel()
	st.Conns = slices.DeleteFunc(slices.Clone(st.Conns), func(c filter.ConnRecord) bool { return c.ID.Remote.Port() == 40001 })
	var fx filter.Effects
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Handback{App: "redis", From: "b", Given: &st}}}, &fx)
	if len(fx.Sets) != 1 || fx.Sets[0].Add || fx.Sets[0].Set != filter.SetFlow || fx.Sets[0].Port != 40001 {
		t.Errorf("sets: %+v, %v", fx.Sets, fx.Replies[0].Err)
	}
}
