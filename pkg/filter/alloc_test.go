package filter_test

import (
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// steady brings a world to a state by a script and returns the engine and a
// segment of c1 in that state.
func steady(tb testing.TB, script string, fromRemote bool, flags uint8, dseq int64, data []byte) (*filter.Engine, []byte, filter.Time) {
	tb.Helper()
	w := filtertest.New()
	if err := w.Play(script); err != nil {
		tb.Fatal(err)
	}
	return w.Engine, w.Segment("c1", fromRemote, flags, dseq, data), w.Now()
}

const connected = `app redis 10.0.0.100 6379
link c1 10.0.0.2:40000
open c1
`

const heldScript = connected + `request SNAPSHOTSTART
request SNAPSHOTFREEZE
advance 60ms
request SEAL
request SNAPSHOTDONE s1
`

const restoredScript = heldScript + `newlocal c1 0x1000 77
request RESTORESTART s1
request RESTORECONN c1
advance 20ms
request RESTORED
`

var paths = []struct {
	name   string
	script string
	remote bool
	hook   uint8
	flags  uint8
	dseq   int64
	data   int
	want   filter.Reason
}{
	{"connected", connected, true, filter.HookPrerouting, packet.ACK, 0, 1000, filter.Pass},
	{"translated-in", restoredScript, true, filter.HookPrerouting, packet.ACK, 0, 1448, filter.Translated},
	{"translated-out", restoredScript, false, filter.HookPostrouting, packet.ACK, 0, 1448, filter.Translated},
	{"translated-gso", restoredScript, false, filter.HookPostrouting, packet.ACK, 0, 60000, filter.Translated},
	{"held-keepalive", heldScript, true, filter.HookPrerouting, packet.ACK, -1, 0, filter.HeldAnswered},
	{"held-ack", heldScript, true, filter.HookPrerouting, packet.ACK, 0, 0, filter.HeldNoted},
}

// TestSteadyPathAllocatesNothing holds what architecture promises.
func TestSteadyPathAllocatesNothing(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			e, seg, now := steady(t, p.script, p.remote, p.flags, p.dseq, make([]byte, p.data))
			var fx filter.Effects
			work := make([]byte, len(seg))
			ev := filter.Event{Packet: &filter.Packet{Hook: p.hook}}
			step := func() {
				copy(work, seg)
				ev.Packet.Data = work
				now += 1e9
				e.Step(now, ev, &fx)
				fx.Reset()
			}
			step()
			if fx.Reason != p.want {
				t.Fatalf("the packet met %v, want %v", fx.Reason, p.want)
			}
			if n := testing.AllocsPerRun(200, step); n != 0 {
				t.Errorf("%v allocations a packet", n)
			}
		})
	}
}

// TestFollowingAllocatesNothing: where requests end is found without memory, before
// the freeze and in it.
func TestFollowingAllocatesNothing(t *testing.T) {
	for _, boundary := range []string{"line", "resp"} {
		for _, freeze := range []string{"", "request SNAPSHOTFREEZE " + boundary + "\n"} {
			w := filtertest.New()
			head := `"*2\r\n$4\r\nECHO\r\n$99999999\r\nvalue"`
			if err := w.Play(connected + "request SNAPSHOTSTART " + boundary + "\nremote c1 ACK data " + head + "\nlocal c1 ACK\n" + freeze); err != nil {
				t.Fatal(err)
			}
			want := filter.Pass
			if freeze != "" {
				want = filter.FrozenPass
			}
			const size, n = 100, 400 // in local's window
			seg := make([][]byte, n+2)
			for i := range seg {
				seg[i] = w.Segment("c1", true, packet.ACK, int64(i*size), make([]byte, size))
			}
			var fx filter.Effects
			ev := filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting}}
			step := func() {
				ev.Packet.Data, seg = seg[0], seg[1:]
				w.Engine.Step(w.Now(), ev, &fx)
				fx.Reset()
				if fx.Reason != want {
					t.Fatalf("%s: the packet met %v, want %v", boundary, fx.Reason, want)
				}
			}
			step()
			if a := testing.AllocsPerRun(n, step); a != 0 {
				t.Errorf("%s: %v allocations a packet", boundary, a)
			}
		}
	}
}

func BenchmarkStep(b *testing.B) {
	for _, p := range paths {
		b.Run(p.name, func(b *testing.B) {
			e, seg, now := steady(b, p.script, p.remote, p.flags, p.dseq, make([]byte, p.data))
			var fx filter.Effects
			work := make([]byte, len(seg))
			ev := filter.Event{Packet: &filter.Packet{Hook: p.hook}}
			b.ReportAllocs()
			for b.Loop() {
				copy(work, seg)
				ev.Packet.Data = work
				now += 1e9
				e.Step(now, ev, &fx)
				fx.Reset()
			}
		})
	}
}
