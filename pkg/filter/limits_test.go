package filter_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// A flood of guesses neither uses up the answers to keepalives, nor wakes the
// application, nor grows its state; and its answers are limited.
func TestFloodOfGuesses(t *testing.T) {
	w := filtertest.New()
	if err := w.Play(heldScript); err != nil {
		t.Fatal(err)
	}
	keepalive := w.Segment("c1", true, packet.ACK, -1, nil)
	var fx filter.Effects
	now, answers, seq := w.Now(), 0, uint32(1)
	feed := func(b []byte) filter.Reason {
		w.Engine.Step(now, filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
		answers += len(fx.Sends)
		if len(fx.Restores) > 0 {
			t.Fatal("an outsider woke the application")
		}
		fx.Reset()
		return fx.Reason
	}
	flags := []uint8{packet.RST, packet.SYN, packet.ACK, packet.ACK | packet.PSH, packet.FIN | packet.ACK, packet.RST | packet.ACK, 0}
	guess := packet.Spec{Src: netip.MustParseAddrPort("10.0.0.2:40000"), Dst: netip.MustParseAddrPort("10.0.0.100:6379"), Payload: []byte("x")}
	for i := range 100000 {
		seq = seq*1664525 + 1013904223
		guess.Flags = flags[i%len(flags)]
		guess.Seq = guess.Seq.Add(seq)
		guess.Ack = guess.Ack.Add(seq >> 3)
		feed(guess.Build(make([]byte, guess.Size())))
		if now += 1e5; i%10000 == 9999 { // every second
			if r := feed(keepalive); r != filter.HeldAnswered {
				t.Fatalf("a keepalive in the flood met %v", r)
			}
		}
	}
	if most := 10 + 32 + 10*100 + 1; answers > most {
		t.Errorf("%d answers in 10 s, want at most %d", answers, most)
	}
	w.Engine.Step(now, filter.Event{Request: &filter.Request{ID: 1, Body: &filter.Status{App: "redis"}}}, &fx)
	st := fx.Replies[0].Body.(*filter.StatusList).Apps[0]
	if st.Connections["CONNECTRMT"] != 1 || len(st.Connections) != 1 || st.Kept != 0 || st.PendingSyns != 0 || st.RestoreRequested {
		t.Errorf("after the flood: %+v", st)
	}
}

// Payload and SYNs that wait are bounded, per connection and in all.
func TestBudgets(t *testing.T) {
	e := filter.New(filter.Config{MaxConns: 3, KeepPerConn: 1000, KeepTotal: 1500, MaxSyns: 2})
	w := filtertest.With(e)
	script := "app redis 10.0.0.100 6379\n"
	for _, l := range []string{"a 10.0.0.2:1", "b 10.0.0.2:2", "c 10.0.0.2:3", "d 10.0.0.2:4"} {
		script += "link " + l + "\nopen " + l[:1] + "\n"
	}
	script += "request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\nadvance 60ms\nrequest SEAL\nrequest SNAPSHOTDONE s --force\n"
	if err := w.Play(script); err != nil {
		t.Fatal(err)
	}
	var fx filter.Effects
	status := func() filter.AppStatus {
		fx.Reset()
		e.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Status{App: "redis"}}}, &fx)
		return fx.Replies[0].Body.(*filter.StatusList).Apps[0]
	}
	if st := status(); st.Connections["CONNECTRMT"] != 3 || st.Reasons["table-full"] == 0 {
		t.Fatalf("%+v", st)
	}
	for _, n := range []string{"a", "b", "c"} {
		b := w.Segment(n, true, packet.ACK, 0, make([]byte, 1400))
		e.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
	}
	if st := status(); st.Kept > 1500 || st.Kept < 1000 || st.Reasons["held-data-dropped"] == 0 {
		t.Fatalf("kept %d, %v", st.Kept, st.Reasons)
	}
	for port := range uint16(5) {
		sp := packet.Spec{Src: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), 100+port), Dst: netip.MustParseAddrPort("10.0.0.100:6379"), Flags: packet.SYN}
		e.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: sp.Build(make([]byte, sp.Size()))}}, &fx)
	}
	if st := status(); st.PendingSyns != 2 || st.Reasons["held-syn-limited"] != 3 {
		t.Fatalf("%d SYNs, %v", st.PendingSyns, st.Reasons)
	}
}

// The bounds of one application and those of all hold at once, and STATUS
// tells how much of each is used.
func TestLimitsOfApps(t *testing.T) {
	e := filter.New(filter.Config{MaxConns: 5, ConnsPerApp: 3, KeepPerConn: 1000, KeepPerApp: 1500, KeepTotal: 2500, MaxSyns: 3, SynsTotal: 2})
	w := filtertest.With(e)
	var fx filter.Effects
	syn := func(local string, from uint16) {
		sp := packet.Spec{Src: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), from), Dst: netip.MustParseAddrPort(local), Flags: packet.SYN}
		e.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: sp.Build(make([]byte, sp.Size()))}}, &fx)
	}
	e.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Register{App: "a", VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.101")}, Include: []uint16{80}}}}, &fx)
	for i := range uint16(4) {
		syn("10.0.0.101:80", 1+i)
	}
	script := "app b 10.0.0.100 6379\n"
	for i := range 4 {
		l := "b" + string(rune('0'+i))
		script += "link " + l + " 10.0.0.2:" + string(rune('1'+i)) + "\nopen " + l + "\n"
	}
	script += "request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\nadvance 60ms\nrequest SEAL\nrequest SNAPSHOTDONE s --force\n"
	if err := w.Play(script); err != nil {
		t.Fatal(err)
	}
	ask := func() (apps map[string]filter.AppStatus, limits map[string]filter.Limit) {
		fx.Reset()
		e.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Status{}}}, &fx)
		l := fx.Replies[0].Body.(*filter.StatusList)
		apps, limits = map[string]filter.AppStatus{}, map[string]filter.Limit{}
		for _, a := range l.Apps {
			apps[a.Name] = a
		}
		for _, x := range l.Limits {
			limits[x.Name] = x
		}
		return apps, limits
	}
	want := func(name string, used, most uint64) {
		t.Helper()
		if _, l := ask(); l[name].Used != used || l[name].Max != most {
			t.Errorf("%s: %d of %d, want %d of %d", name, l[name].Used, l[name].Max, used, most)
		}
	}
	want("connections", 5, 5)
	want("connections_per_app", 3, 3)
	apps, _ := ask()
	if apps["a"].Reasons["app-table-full"] != 1 || apps["b"].Reasons["table-full"] == 0 {
		t.Errorf("counted: a %v, b %v", apps["a"].Reasons, apps["b"].Reasons)
	}
	for _, l := range []string{"b0", "b1"} { // b is away
		b := w.Segment(l, true, packet.ACK, 0, make([]byte, 1000))
		e.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
	}
	want("kept_bytes", 1000, 2500)
	want("kept_bytes_per_app", 1000, 1500)
	want("kept_bytes_per_connection", 1000, 1000)
	for i := range uint16(6) {
		syn("10.0.0.100:6379", 100+i)
	}
	want("pending_syns", 2, 2)
	want("pending_syns_per_app", 2, 3)
	// What is forgotten is free again.
	for _, app := range []string{"a", "b"} {
		fx.Reset()
		e.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Unregister{App: app, Force: true}}}, &fx)
	}
	for _, name := range []string{"connections", "kept_bytes", "pending_syns"} {
		if _, l := ask(); l[name].Used != 0 {
			t.Errorf("%s: %d are used by nobody", name, l[name].Used)
		}
	}
}

// A full table makes room for a new connection by one of which nobody has
// spoken since its handshake; one that was heard of in a snapshot stays.
func TestRoom(t *testing.T) {
	e := filter.New(filter.Config{MaxConns: 2})
	w := filtertest.With(e)
	if err := w.Play(`app redis 10.0.0.100 6379
link heard 10.0.0.2:1
link silent 10.0.0.2:2
link new 10.0.0.2:3
open heard
request SNAPSHOTSTART
request SNAPSHOTABORT
advance 80s
open silent
open new`); err != nil {
		t.Fatal(err)
	}
	remotes := func() (out []uint16) {
		var fx filter.Effects
		e.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "redis"}}}, &fx)
		for _, c := range fx.Replies[0].Body.(*filter.ConnList).Conns {
			out = append(out, c.ID.Remote.Port())
		}
		slices.Sort(out)
		return out
	}
	if got := remotes(); !slices.Equal(got, []uint16{1, 2}) {
		t.Fatalf("connections %v, want 1 and 2: a young one must not give way", got)
	}
	if err := w.Play("advance 80s\nopen new"); err != nil {
		t.Fatal(err)
	}
	if got := remotes(); !slices.Equal(got, []uint16{1, 3}) {
		t.Fatalf("connections %v, want 1 and 3", got)
	}
}

// What local takes of its spool piece by piece is free for others again.
func TestSpoolBudget(t *testing.T) {
	w := filtertest.With(filter.New(filter.Config{KeepPerConn: 8}))
	kept := func() (used uint64) {
		for _, l := range w.Engine.Limits() {
			if l.Used > l.Max {
				t.Errorf("%s: %d of %d", l.Name, l.Used, l.Max)
			}
			if l.Name == "kept_bytes" || l.Name == "kept_bytes_per_app" {
				used += l.Used
			}
		}
		return used
	}
	if err := w.Play(heldSpool); err != nil {
		t.Fatal(err)
	}
	if kept() != 2*16 {
		t.Fatalf("%d octets count as kept, want 32", kept())
	}
	if err := w.Play("local c1 ACK ack +3\nlocal c1 ACK ack +7"); err != nil {
		t.Fatal(err)
	}
	if kept() != 2*9 {
		t.Errorf("%d octets count as kept, want 18", kept())
	}
	if err := w.Play("local c1 ACK ack +16"); err != nil {
		t.Fatal(err)
	}
	if kept() != 0 {
		t.Errorf("%d octets count as kept when all are taken", kept())
	}
}

const heldSpool = `app redis 10.0.0.100 6379
link c1 10.0.0.2:40000
open c1
request SNAPSHOTSTART
request SNAPSHOTFREEZE spool=100
advance 60ms
request SEAL
request SNAPSHOTDONE s1
remote c1 ACK data "abcdefghijklmnop"
newlocal c1 0x11110000 65100
request RESTORESTART s1
request RESTORECONN c1
advance 20ms
silent on
request RESTORED`

// While records cannot be kept nothing is acknowledged into a spool: the remote
// waits, and the application is woken.
func TestSpoolWithoutRecords(t *testing.T) {
	w := filtertest.New()
	held, _, _ := strings.Cut(heldSpool, "newlocal")
	if err := w.Play(held); err != nil {
		t.Fatal(err)
	}
	had := w.Acknowledged("c1")
	w.Engine.Spool(false)
	if err := w.Play(`remote c1 ACK data "more"`); err != nil {
		t.Fatal(err)
	}
	if got := w.Acknowledged("c1"); got != had {
		t.Errorf("%d octets were acknowledged with nothing on the disk", got-had)
	}
	w.Engine.Spool(true)
	if err := w.Play(`remote c1 ACK seq -4 data "more"`); err != nil {
		t.Fatal(err)
	}
	if got := w.Acknowledged("c1"); got != had+4 {
		t.Errorf("%d octets were acknowledged, want 4", got-had)
	}
}

// A filter that has taken up a spool does not know yet whether local is behind the
// node: nobody cuts what is too long for the link there.
func TestSpoolAfterRestart(t *testing.T) {
	script := strings.Replace(heldSpool, "spool=100", "spool=4000", 1)
	script = strings.Replace(script, "abcdefghijklmnop", strings.Repeat("x", 1400)+`"`+"\nremote c1 ACK data \""+strings.Repeat("x", 1400), 1)
	trace, err := filtertest.RunBehind(script + "\nrestart\nadvance 1s")
	if err != nil {
		t.Fatal(err)
	}
	_, trace, _ = strings.Cut(trace, "> restart")
	n := 0
	for line := range strings.Lines(trace) {
		if strings.Contains(line, "to local") && strings.Contains(line, "xx") {
			if n++; strings.Count(line, "x") > 536 {
				t.Fatalf("%d octets in one segment", strings.Count(line, "x"))
			}
		}
	}
	if n == 0 {
		t.Error("nothing was handed over")
	}
}

// What has no room may have some for the first octets of a remote, up to an eighth of
// the budget, which local gets when it is back, or when the snapshot is given up; then
// nothing counts as kept.
func TestHeads(t *testing.T) {
	const begin = "app redis 10.0.0.100 6379\nlink a 10.0.0.2:1\nlink b 10.0.0.2:2\nlink c 10.0.0.2:3\nopen a\nopen b\nopen c\n" +
		"request SNAPSHOTSTART\nrequest SNAPSHOTFREEZE\nadvance 60ms\n"
	for name, script := range map[string]string{
		"restored": begin + "request SEAL\nrequest SNAPSHOTDONE s\nOCTETS\nnewlocal a 1 1\nnewlocal b 2 1\nnewlocal c 3 1\n" +
			"request RESTORESTART s\nrequest RESTORECONN a b c\nadvance 20ms\nrequest RESTORED\nadvance 1s",
		"aborted": begin + "OCTETS\nrequest SNAPSHOTABORT\nadvance 1s",
	} {
		t.Run(name, func(t *testing.T) {
			e := filter.New(filter.Config{KeepPerConn: 8000, KeepTotal: 8000})
			w := filtertest.With(e)
			octets := ""
			for _, s := range []string{"a 8000", "b 700", "b 700", "c 700"} {
				name, n, _ := strings.Cut(s, " ")
				length, _ := strconv.Atoi(n)
				octets += fmt.Sprintf("remote %s ACK data %q\nremote %[1]s ACK seq -%[3]d\n", name, strings.Repeat("x", length), length)
			}
			if err := w.Play(strings.Replace(script, "OCTETS", octets, 1)); err != nil {
				t.Fatal(err)
			}
			for name, want := range map[string]int{"a": 8000, "b": 700, "c": 0} {
				if got, _ := w.Taken(name); len(got) != want {
					t.Errorf("local has %d octets of %s, want %d", len(got), name, want)
				}
			}
			for _, l := range e.Limits() {
				if l.Name == "kept_bytes" && l.Used != 0 {
					t.Errorf("%d octets count as kept when all are taken", l.Used)
				}
			}
			if n := e.Heads(); n != 0 {
				t.Errorf("%d octets count as heads when all are taken", n)
			}
		})
	}
}
