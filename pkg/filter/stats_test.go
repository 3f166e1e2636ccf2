package filter_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// connsOf asks for the connections of a world's application.
func connsOf(w *filtertest.World, reasons bool) []filter.ConnInfo {
	var fx filter.Effects
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "redis", Reasons: reasons}}}, &fx)
	return fx.Replies[0].Body.(*filter.ConnList).Conns
}

// counts writes the statistics of the world's only connection in one line.
func counts(t *testing.T, w *filtertest.World) string {
	t.Helper()
	all := connsOf(w, true)
	if len(all) != 1 {
		t.Fatalf("%d connections, want one", len(all))
	}
	c := all[0]
	idle := "-"
	if c.RemoteIdle >= 0 {
		idle = fmt.Sprintf("%d ms", c.RemoteIdle/1e6)
	}
	s := fmt.Sprintf("in %d out %d answered %d sent %d %d kept %d/%d idle %s:", c.SegmentsIn, c.SegmentsOut, c.Answered,
		c.ToRemote, c.ToLocal, c.Kept, c.KeptSegments, idle)
	for _, r := range c.Reasons {
		s += fmt.Sprintf(" %v=%d", r.Reason, r.Count)
	}
	return s
}

// player plays a script and compares what is counted after it.
func player(t *testing.T, w *filtertest.World) func(script, want string) {
	return func(script, want string) {
		t.Helper()
		if err := w.Play(script); err != nil {
			t.Fatal(err)
		}
		if got := counts(t, w); got != want {
			t.Fatalf("after %q\ngot  %s\nwant %s", script, got, want)
		}
	}
}

// One connection through a snapshot and a restore: each step and what is
// counted after it.
func TestStatistics(t *testing.T) {
	play := player(t, filtertest.New())
	for _, step := range []struct{ script, want string }{
		{connected, "in 1 out 1 answered 0 sent 0 0 kept 0/0 idle -: handshake=2"},
		{"request SNAPSHOTSTART", // the ask and its answer; the sockets were listed and nobody has spoken yet
			"in 1 out 2 answered 0 sent 0 1 kept 0/0 idle 0 ms: handshake=2 ask-answer=1"},
		{"remote c1 ACK data \"GET\"\nlocal c1 ACK\nlocal c1 ACK data \"value\"\nremote c1 ACK\nadvance 400ms",
			"in 3 out 4 answered 0 sent 0 1 kept 0/0 idle 400 ms: pass=4 handshake=2 ask-answer=1"},
		{"request SNAPSHOTFREEZE\nadvance 60ms\nrequest SEAL\nrequest SNAPSHOTDONE s1",
			"in 3 out 5 answered 0 sent 0 2 kept 0/0 idle 400 ms: pass=4 handshake=2 ask-answer=2"},
		{"advance 5s\nremote c1 ACK seq -1\nremote c1 ACK seq -1 data \"x\"\nadvance 3s", // two keepalives
			"in 5 out 5 answered 2 sent 2 2 kept 0/0 idle 3000 ms: pass=4 handshake=2 ask-answer=2 held-answered=2"},
		{"remote c1 ACK seq 2000000 data \"evil\"\nremote c1 RST seq 5", // an outsider is answered, and is not the remote
			"in 7 out 5 answered 4 sent 4 2 kept 0/0 idle 3000 ms: pass=4 handshake=2 ask-answer=2 held-answered=2 held-challenged=1 held-out-of-window=1"},
		{"remote c1 ACK data \"one\"\nremote c1 ACK data \"two and more\"", // the newest of each is kept
			"in 9 out 5 answered 6 sent 6 2 kept 15/2 idle 0 ms: pass=4 handshake=2 ask-answer=2 held-answered=2 held-challenged=1 held-out-of-window=1 held-data=2"},
	} {
		play(step.script, step.want)
	}
}

// The restore: what the filter plays to the new local side, what it delivers,
// and the translated connection.
func TestStatisticsOfRestore(t *testing.T) {
	w := filtertest.New()
	play := player(t, w)
	play(heldScript+"remote c1 ACK data \"GET\"\nadvance 700ms",
		"in 2 out 3 answered 1 sent 1 2 kept 3/1 idle 700 ms: handshake=2 ask-answer=2 held-data=1")
	// A SYN, and an ACK that answers the SYN-ACK, which is seen before routing
	// and behind; the remote is probed.
	play("newlocal c1 0x1000 77\nrequest RESTORESTART s1\nrequest RESTORECONN c1\nadvance 20ms",
		"in 2 out 4 answered 2 sent 2 4 kept 3/1 idle 800 ms: handshake=2 ask-answer=2 held-data=1 handshake-ack=1")
	play("request RESTORED", // the kept octets and the window; local acknowledges
		"in 2 out 5 answered 2 sent 3 5 kept 0/0 idle 800 ms: translated=1 handshake=2 ask-answer=2 held-data=1 handshake-ack=1")
}

// While a connection is frozen and local still speaks.
func TestStatisticsOfFreeze(t *testing.T) {
	w := filtertest.New()
	play := player(t, w)
	play(connected+`request SNAPSHOTSTART
silent on
remote c1 ACK data "GET"
request SNAPSHOTFREEZE now
remote c1 ACK seq -3 data "GET"
silent off`, "in 3 out 2 answered 1 sent 1 2 kept 3/1 idle 0 ms: pass=1 handshake=2 ask-answer=1 frozen-kept=1")
	// Local had it already: only what comes now is kept.
	play("local c1 ACK data \"answer\"\nremote c1 ACK ack -6 data \"NEXT\"",
		"in 4 out 3 answered 2 sent 2 2 kept 4/1 idle 0 ms: pass=1 handshake=2 ask-answer=1 frozen-pass=1 frozen-kept=1 held-data=1")
	// What is handed on to local is no answer.
	play("remote c1 ACK seq -4",
		"in 5 out 3 answered 2 sent 2 3 kept 4/1 idle 0 ms: pass=1 handshake=2 ask-answer=1 frozen-pass=1 frozen-stripped=1 frozen-kept=1 held-data=1")
}

// What local heard before everything was captured counts as heard.
func TestRemoteIdle(t *testing.T) {
	w := filtertest.New()
	if err := w.Play(connected + "advance 60s"); err != nil {
		t.Fatal(err)
	}
	sockets := w.Sockets()
	sockets[0].LastRecv, sockets[0].LastSent = 5e9, 4e9
	var fx filter.Effects
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.SnapshotStart{App: "redis", Sockets: sockets}}}, &fx)
	if got := connsOf(w, false)[0].RemoteIdle; got != 5e9 {
		t.Errorf("silent for %d ns, want 5 s", got)
	}
}

// A segment of local that comes by two hooks is one segment; one that is sent
// again is another.
func TestStatisticsOfTwoHooks(t *testing.T) {
	for _, tc := range []struct {
		name, script string
		flags        uint8
		hooks        []uint8
		out          uint64 // more than before
	}{
		{"FIN of an application that runs", connected, packet.FIN | packet.ACK, []uint8{filter.HookOutput, filter.HookPostrouting}, 1},
		{"FIN sent again", connected, packet.FIN | packet.ACK,
			[]uint8{filter.HookOutput, filter.HookPostrouting, filter.HookOutput, filter.HookPostrouting}, 2},
		{"while nothing is captured", connected, packet.FIN | packet.ACK, []uint8{filter.HookOutput, filter.HookOutput}, 2},
		{"from a network namespace", connected, packet.FIN | packet.ACK, []uint8{filter.HookPrerouting, filter.HookPostrouting}, 1},
		{"full capture is behind routing only", connected + "request SNAPSHOTSTART\n", packet.ACK | packet.PSH, []uint8{filter.HookPostrouting, filter.HookPostrouting}, 2},
		{"frozen", connected + "request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\n", packet.ACK | packet.PSH, []uint8{filter.HookOutput}, 1},
		{"translated", restoredScript, packet.ACK | packet.PSH, []uint8{filter.HookOutput, filter.HookPostrouting}, 1},
		{"translated and frozen", restoredScript + "request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\n", packet.ACK | packet.PSH,
			[]uint8{filter.HookOutput, filter.HookPostrouting}, 1},
		{"absorbed", restoredScript + "request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\nadvance 60ms\nrequest SEAL\n", packet.FIN | packet.ACK, []uint8{filter.HookOutput}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := filtertest.New()
			if err := w.Play(tc.script); err != nil {
				t.Fatal(err)
			}
			before := connsOf(w, false)[0].SegmentsOut
			b := w.Segment("c1", false, tc.flags, 0, nil)
			var fx filter.Effects
			for _, h := range tc.hooks {
				w.Engine.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: h, Data: append([]byte(nil), b...)}}, &fx)
			}
			if got := connsOf(w, false)[0].SegmentsOut - before; got != tc.out {
				t.Errorf("%d segments, want %d", got, tc.out)
			}
		})
	}
}

// In every scenario, what the connections count is no more than what their
// application does, reason by reason.
func TestStatisticsAddUp(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	comment := regexp.MustCompile(`(?m)^\s*#.*$`)
	seen := uint64(0)
	for _, f := range files {
		script, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		w := filtertest.New()
		if err := w.Play(comment.ReplaceAllString(string(script), "")); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all := map[string]uint64{}
		for i, n := range w.Engine.Reasons() {
			all[filter.Reason(i).String()] = n
		}
		for _, c := range connsOf(w, true) {
			sum := uint64(0)
			for i, r := range c.Reasons {
				sum += r.Count
				if r.Count == 0 || r.Reason == filter.ReasonNone || i > 0 && r.Reason <= c.Reasons[i-1].Reason {
					t.Errorf("%s: reasons %v", f, c.Reasons)
				}
				// A connection takes its counts to another node, an application does not.
				if name := r.Reason.String(); all[name] < r.Count && !strings.Contains(string(script), "\nnode ") {
					t.Errorf("%s: %s: more than the application has: %+v", f, name, c)
				} else {
					all[name] -= r.Count
				}
			}
			if n := c.SegmentsIn + c.SegmentsOut; sum != n || c.SegmentsIn > n || uint64(c.Answered) > n || c.Kept > 0 && c.KeptSegments == 0 {
				t.Errorf("%s: %d verdicts on %d segments: %+v", f, sum, n, c)
			}
			seen += sum
		}
		if c := connsOf(w, false); len(c) > 0 && c[0].Reasons != nil {
			t.Errorf("%s: reasons that nobody asked for", f)
		}
	}
	if seen == 0 {
		t.Error("nothing was counted")
	}
}

// Octets are recorded with a connection that is held, statistics are not.
func TestStatisticsBeginAnew(t *testing.T) {
	w := filtertest.New()
	script := strings.Replace(heldScript, "request SNAPSHOTSTART\n", "request SNAPSHOTSTART\nremote c1 ACK data \"GET\"\nlocal c1 ACK data \"value\"\nremote c1 ACK\n", 1)
	if err := w.Play(script + "remote c1 ACK seq -1\n"); err != nil {
		t.Fatal(err)
	}
	before := connsOf(w, true)[0]
	if err := w.Play("restart"); err != nil {
		t.Fatal(err)
	}
	if got, want := counts(t, w), "in 0 out 0 answered 0 sent 0 0 kept 0/0 idle -:"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if c := connsOf(w, true)[0]; c.BytesIn != before.BytesIn || c.BytesOut != before.BytesOut || c.BytesIn != 3 || c.BytesOut != 5 {
		t.Errorf("octets: %+v became %+v", before, c)
	}
	if err := w.Play("remote c1 ACK seq -1\nadvance 2s"); err != nil {
		t.Fatal(err)
	}
	if got, want := counts(t, w), "in 1 out 0 answered 1 sent 1 0 kept 0/0 idle 2000 ms: held-answered=1"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
