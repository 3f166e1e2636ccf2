package filter_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// outsider knows the addresses and ports of every connection, and forges them,
// and knows no number.
type outsider struct {
	t       *testing.T
	w       *filtertest.World
	r       *rand.Rand
	now     filter.Time
	fx      filter.Effects
	pk      filter.Packet
	sp      packet.Spec // the guess of now
	seg     packet.Segment
	buf     [packet.MaxHeader + 1500]byte
	local   [packet.MaxHeader]byte
	victims []victim

	half  bool // one of both numbers is right
	quiet bool // local's connections do not answer
	steps uint64
	lucky int // segments that were not sent: they might be the remote's own
	seen  [filter.NumReasons]uint64
}

// victim is a connection with its true numbers, in the remote's view, as the
// world knows them.
type victim struct {
	name          string
	local, remote netip.AddrPort
	rcv, edge     seqnum.Value // RCV.NXT, and the right edge of the window
	nxt           seqnum.Value // SND.NXT, all acknowledged: SND.UNA too
	maxWnd        uint32       // MAX.SND.WND (RFC 5961 section 5.2)
	window        uint16       // field announced last
	closed        bool         // the remote has closed
	keepalive     []byte       // of the remote
	ack           []byte       // local's, with its own numbers
	lrcv, lnxt    seqnum.Value // in local's view
}

const (
	crowd  = 1000 // connections
	closed = 10   // of so many one was closed by its remote
	scaled = 7    // window scale of the world's connections
)

// newOutsider makes a crowd of connections by handshakes, of both families, with
// and without options, which have said something to each other.
func newOutsider(t *testing.T, seed uint64) *outsider {
	o := &outsider{t: t, w: filtertest.New(), r: rand.New(rand.NewPCG(seed, 961))}
	o.play("app redis 10.0.0.100,fd00::100 6379")
	for i := range crowd {
		addr := fmt.Sprintf("10.1.%d.%d:%d", i/200, 1+i%200, 40000+i)
		if i%4 == 1 {
			addr = fmt.Sprintf("[fd00::1:%x]:%d", i, 40000+i)
		}
		o.play("link c%d %s %s", i, addr, []string{"", "ecn", "plain"}[i%3])
		o.play("open c%d", i)
		o.play("remote c%d ACK data \"hello\"\nlocal c%d ACK data \"welcome\"\nremote c%d ACK\nlocal c%d ACK", i, i, i, i)
		if i%closed == 0 {
			o.play("remote c%d FIN+ACK\nlocal c%d ACK", i, i)
		}
	}
	return o
}

// play runs lines of a script; the world's clock first goes to the outsider's.
func (o *outsider) play(format string, a ...any) {
	o.t.Helper()
	if d := o.now - o.w.Now(); d > 0 {
		o.now = 0
		o.play("advance %dns", d)
	}
	if err := o.w.Play(fmt.Sprintf(format, a...)); err != nil {
		o.t.Fatal(err)
	}
	if f := o.w.Faults(); len(f) > 0 {
		o.t.Fatal(f[0])
	}
	o.now = o.w.Now()
}

// look takes the numbers of all connections from the world.
func (o *outsider) look(held bool) {
	o.victims = o.victims[:0]
	for i := range crowd {
		v := victim{name: fmt.Sprintf("c%d", i), closed: i%closed == 0}
		v.keepalive = o.w.Segment(v.name, true, packet.ACK, -1, nil)
		v.ack = o.w.Segment(v.name, false, packet.ACK, 0, nil)
		o.parse(v.ack)
		v.window, v.lnxt, v.lrcv = o.seg.Window, o.seg.Seq, o.seg.Ack
		scale := scaled
		if !o.seg.Opt.HasTS {
			scale = 0
		}
		o.parse(v.keepalive)
		v.local, v.remote = o.seg.Dst, o.seg.Src
		v.rcv, v.nxt, v.maxWnd = o.seg.Seq.Add(1), o.seg.Ack, uint32(o.seg.Window)<<scale
		if held { // a window that was small is opened for one segment
			v.window = o.keepalive(&v)
		}
		v.edge = v.rcv.Add(uint32(v.window) << scale)
		o.victims = append(o.victims, v)
	}
}

func (o *outsider) parse(b []byte) {
	if f := o.seg.Parse(b); f != packet.OK || !o.seg.ChecksumOK() {
		o.t.Fatalf("a broken segment: %v", f)
	}
}

// step feeds one segment and sees to it that nothing is asked of the driver but
// a verdict and answers.
func (o *outsider) step(hook uint8, b []byte) {
	o.fx.Reset()
	o.pk = filter.Packet{Hook: hook, Data: b}
	o.w.Engine.Step(o.now, filter.Event{Packet: &o.pk}, &o.fx)
	o.steps++
	o.seen[o.fx.Reason]++
	if fx := &o.fx; len(fx.Restores)+len(fx.Records)+len(fx.Sets)+len(fx.Untrack)+len(fx.Replies)+len(fx.Notes) > 0 {
		o.t.Fatalf("%v: restore requests %v, records %v, sets %v, untrack %v, replies %v, notes %v",
			fx.Reason, fx.Restores, fx.Records, fx.Sets, fx.Untrack, fx.Replies, fx.Notes)
	}
}

// answers looks at what was sent for the guess: an acknowledgement with the
// true numbers to a connection's remote, a reset only where none is.
func (o *outsider) answers(v *victim) {
	sp := &o.sp
	if len(o.fx.Sends) > 1 {
		o.t.Fatalf("%d answers to one guess", len(o.fx.Sends))
	}
	for _, a := range o.fx.Sends {
		o.parse(a.Data)
		s := &o.seg
		switch {
		case a.Tracked || s.Src != sp.Dst || s.Dst != sp.Src:
			o.t.Fatalf("a guess from %v to %v was answered from %v to %v", sp.Src, sp.Dst, s.Src, s.Dst)
		case v == nil && (s.Flags != packet.RST|packet.ACK || sp.Flags != packet.SYN):
			o.t.Fatalf("flags %#x without a connection were answered with %#x", sp.Flags, s.Flags)
		case v != nil && (s.Flags != packet.ACK || s.Seq != v.nxt || s.Ack != v.rcv || s.PayloadLen() != 0 || s.Window < v.window):
			o.t.Fatalf("%s: flags %#x seq %d ack %d window %d, want an acknowledgement %d %d %d",
				v.name, s.Flags, s.Seq, s.Ack, s.Window, v.nxt, v.rcv, v.window)
		}
	}
}

// flood sends n guesses (under the race detector a tenth), about one every 0.1 ms, to be dropped. The remotes'
// keepalives come among them and are all answered, or, of one that local still
// listens to, pass.
func (o *outsider) flood(n int, took func(v *victim)) {
	for i := range n / slower {
		o.now += 1 + o.r.Int64N(2e5)
		v := o.draw()
		o.step(filter.HookPrerouting, o.sp.Build(o.buf[:]))
		o.answers(v)
		if took != nil {
			took(v)
		} else if o.fx.Verdict != filter.Drop {
			o.t.Fatalf("a guess passed: %v", o.fx.Reason)
		}
		if i%500 != 499 || took != nil {
			continue
		}
		o.keepalive(&o.victims[o.r.IntN(len(o.victims))])
		o.keepalive(&o.victims[1])
	}
}

// keepalive is one of the remote; it returns the window that the answer tells.
func (o *outsider) keepalive(v *victim) uint16 {
	o.sp.Src, o.sp.Dst = v.remote, v.local
	o.step(filter.HookPrerouting, append(o.buf[:0], v.keepalive...))
	if o.fx.Reason != filter.HeldAnswered && o.fx.Reason != filter.FrozenStripped || len(o.fx.Sends) == 0 {
		o.t.Fatalf("%s: a keepalive met %v with %d answers", v.name, o.fx.Reason, len(o.fx.Sends))
	}
	o.fx.Sends = o.fx.Sends[:1] // behind it the acknowledgement for a frozen local side
	o.answers(v)
	return o.seg.Window
}

// state is everything that the engine shows of its structures.
type state struct {
	conns  []filter.ConnInfo
	limits []filter.Limit
	app    filter.AppStatus
}

func (o *outsider) state() (s state) {
	ask := func(body any) any {
		o.fx.Reset()
		o.w.Engine.Step(o.now, filter.Event{Request: &filter.Request{Body: body}}, &o.fx)
		return o.fx.Replies[0].Body
	}
	s.conns = ask(&filter.GetConnInfo{App: "redis"}).(*filter.ConnList).Conns
	for i := range s.conns {
		s.conns[i].LocalIdle = 0 // time passes
	}
	slices.SortFunc(s.conns, func(a, b filter.ConnInfo) int { return a.ID.Remote.Compare(b.ID.Remote) })
	s.limits = o.w.Engine.Limits()
	s.app = ask(&filter.Status{App: "redis"}).(*filter.StatusList).Apps[0]
	return s
}

// unharmed runs f, a flood, and compares what was there before with what is
// there behind it. Where the application is held nothing may be allocated for a
// guess.
func (o *outsider) unharmed(held bool, f func()) {
	o.t.Helper()
	o.look(held)
	before, reasons, steps, seen := o.state(), o.w.Engine.Reasons(), o.steps, o.seen
	var m0, m1 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m0)
	f()
	runtime.ReadMemStats(&m1)
	allocs := m1.Mallocs - m0.Mallocs
	runtime.GC()
	runtime.ReadMemStats(&m1)
	if grown := int64(m1.HeapAlloc) - int64(m0.HeapAlloc); grown > 1<<20 {
		o.t.Errorf("the heap has grown by %d octets", grown)
	}
	// A structure's list of reasons grows when it meets one for the first time.
	if held && allocs > 2*crowd+(o.steps-steps)/1000 {
		o.t.Errorf("%d allocations for %d segments", allocs, o.steps-steps)
	}
	after := o.state()
	if len(after.conns) != crowd {
		o.t.Fatalf("%d connections are left of %d", len(after.conns), crowd)
	}
	for i := range after.conns {
		before.conns[i].ConnStats, after.conns[i].ConnStats = filter.ConnStats{}, filter.ConnStats{} // they count
		if !reflect.DeepEqual(before.conns[i], after.conns[i]) {
			o.t.Fatalf("a connection has changed:\nfrom %+v\nto   %+v", before.conns[i], after.conns[i])
		}
	}
	if !slices.Equal(before.limits, after.limits) {
		o.t.Errorf("limits %v became %v", before.limits, after.limits)
	}
	if a := after.app; a.State != before.app.State || a.RestoreRequested || a.PendingSyns != 0 || a.Kept != 0 {
		o.t.Errorf("the application became %+v", a)
	}
	counted := uint64(0)
	for r, n := range o.w.Engine.Reasons() {
		if n -= reasons[r]; n != o.seen[r]-seen[r] {
			o.t.Errorf("%v was counted %d times, given %d times", filter.Reason(r), n, o.seen[r]-seen[r])
		}
		counted += n
		if n > 0 {
			o.t.Logf("%8d %v", n, filter.Reason(r))
		}
	}
	if n := o.steps - steps; counted != n || o.seen[filter.ReasonNone] != 0 {
		o.t.Errorf("%d segments, %d counted, %d without a reason", n, counted, o.seen[filter.ReasonNone])
	}
	o.t.Logf("%d segments, %d more would have passed for the remote's own and were not sent; %d allocations", o.steps-steps, o.lucky, allocs)
	o.lucky = 0
}

// want tells that the flood has met all of these.
func (o *outsider) want(reasons ...filter.Reason) {
	o.t.Helper()
	for _, r := range reasons {
		if o.seen[r] == 0 {
			o.t.Errorf("no guess has met %v", r)
		}
	}
}

func (o *outsider) snapshot() {
	o.play("request SNAPSHOTSTART\nadvance 200ms\nrequest SNAPSHOTFREEZE\nadvance 200ms\nrequest SEAL\nrequest SNAPSHOTDONE s1")
}

// names of the connections from one on, every step-th.
func (o *outsider) names(from, step int) string {
	var b strings.Builder
	for i := from; i < crowd; i += step {
		fmt.Fprintf(&b, " c%d", i)
	}
	return b.String()
}

func (o *outsider) newLocals() {
	for i := range crowd {
		o.play("newlocal c%d %d %d", i, o.r.Uint32(), o.r.Uint32())
	}
}

func (o *outsider) restore() {
	o.newLocals()
	o.play("request RESTORESTART s1\nrequest RESTORECONN%s\nadvance 20ms\nrequest RESTORED", o.names(0, 1))
}

// carries sees that every connection takes octets both ways, once and in order.
func (o *outsider) carries() {
	o.t.Helper()
	for i := range crowd {
		name, in, fin := fmt.Sprintf("c%d", i), "hello", 1
		_, had := o.w.Taken(name)
		if i%closed != 0 {
			in, fin = "hello again", 0
			o.play("remote %s ACK data \" again\"", name)
		}
		out := string(had) + fmt.Sprintf(", %d", i)
		o.play("local %s ACK data \", %d\"\nremote %s ACK", name, i, name)
		if local, remote := o.w.Taken(name); string(local) != in || string(remote) != out {
			o.t.Fatalf("%s: local has %q, want %q; the remote has %q, want %q", name, local, in, remote, out)
		}
		if n := o.w.Acknowledged(name); n != len(in)+fin {
			o.t.Fatalf("%s: %d octets are acknowledged to the remote", name, n)
		}
	}
	if s := o.state(); len(s.conns) != crowd {
		o.t.Fatalf("%d connections", len(s.conns))
	}
}

// TestOutsidersHeld: a million blind segments, and a hundred thousand of
// somebody who has guessed one of both numbers, while the application is away.
func TestOutsidersHeld(t *testing.T) {
	o := newOutsider(t, 1)
	o.snapshot()
	o.unharmed(true, func() { o.flood(1e6, nil) })
	o.want(filter.HeldNoted, filter.HeldAnswered, filter.HeldChallenged, filter.HeldLimited, filter.HeldOutOfWindow, filter.HeldBadAck,
		filter.HeldOldTimestamp, filter.HeldNoAck, filter.HeldSynRefused, filter.HeldUnknown)
	o.half = true
	o.unharmed(true, func() { o.flood(1e5, nil) })
	o.restore()
	o.carries()
}

// TestOutsidersFreeze: the same during the snapshot. Connections that have not
// come to their boundary pass, and local judges; guesses do not keep them from it.
func TestOutsidersFreeze(t *testing.T) {
	o := newOutsider(t, 2)
	o.play("request SNAPSHOTSTART\nadvance 200ms")
	const quiet = 20e9 // the flood lasts 10 s
	o.fx.Reset()
	o.w.Engine.Step(o.now, filter.Event{Request: &filter.Request{Body: &filter.SnapshotFreeze{App: "redis", Quiet: quiet}}}, &o.fx)
	o.play("request SNAPSHOTFREEZE") // repeated: the world knows it too
	o.frozen(false)
	o.unharmed(false, func() { o.flood(1e5, o.localTakes) })
	o.frozen(false)
	o.play("advance %dns", int64(quiet-5e9/slower))
	o.frozen(true)
	for i, half := range []bool{false, true} {
		o.half = half
		o.unharmed(true, func() { o.flood([]int{1e5, 2e4}[i], nil) })
	}
	o.want(filter.FrozenPass, filter.HeldAnswered, filter.HeldChallenged, filter.HeldLimited, filter.HeldOutOfWindow, filter.HeldBadAck,
		filter.HeldSynRefused, filter.HeldUnknown)
	o.play("request SEAL\nrequest SNAPSHOTDONE s1")
	o.restore()
	o.carries()
}

// frozen sees that all connections are, or none is.
func (o *outsider) frozen(want bool) {
	o.t.Helper()
	for _, c := range o.state().conns {
		if c.Frozen != want {
			o.t.Fatalf("%v is frozen: %v, %s", c.ID.Remote, c.Frozen, c.Missing)
		}
	}
}

// TestOutsidersRestore: the same while the application is being restored, when
// half of the connections are re-established; then, and when all are
// translated, local's stack judges what passes, as it would without a filter. At
// last a new filter has taken them up, and no local side has spoken yet.
func TestOutsidersRestore(t *testing.T) {
	o := newOutsider(t, 3)
	o.snapshot()
	o.newLocals()
	o.play("request RESTORESTART s1\nrequest RESTORECONN%s\nadvance 20ms", o.names(0, 2))
	o.unharmed(true, func() { o.flood(1e5, nil) })
	o.play("request RESTORECONN%s\nadvance 20ms\nrequest RESTORED", o.names(1, 2))
	for i, half := range []bool{false, true} {
		o.half = half
		o.unharmed(false, func() { o.flood([]int{1e5, 2e4}[i], o.localTakes) })
	}
	o.want(filter.Translated, filter.HandshakePass, filter.Pass, filter.Malformed)
	o.play("restart")
	o.half, o.quiet = false, true
	o.unharmed(false, func() { o.flood(1e5, o.localTakes) })
	o.play("advance 10m")
	o.carries()
}

// localTakes looks at what passed to local: of a connection, it lies as far from
// local's numbers as it did from the remote's, so that local judges it alike.
// Then local's stack answers (RFC 9293 section 3.10.7, RFC 5961): a SYN to a
// closed port with RST, what is not acceptable with an acknowledgement, which
// goes to the remote with the remote's numbers.
func (o *outsider) localTakes(v *victim) {
	sp := &o.sp
	freeze := o.fx.Reason >= filter.FrozenPass
	switch {
	case o.fx.Verdict == filter.Drop && freeze: // the filter speaks for what local does not know
		if v != nil && sp.Flags&packet.SYN == 0 {
			o.t.Fatalf("%s: flags %#x were dropped: %v", v.name, sp.Flags, o.fx.Reason)
		}
		return
	case o.fx.Verdict == filter.Drop:
		if o.fx.Reason != filter.Malformed || sp.Flags&(packet.SYN|packet.ACK) != packet.SYN|packet.ACK {
			o.t.Fatalf("flags %#x were dropped: %v", sp.Flags, o.fx.Reason)
		}
		return
	case v == nil && sp.Flags == packet.SYN:
		rst := packet.Spec{Src: sp.Dst, Dst: sp.Src, Ack: sp.Seq.Add(1), Flags: packet.RST | packet.ACK}
		o.step(filter.HookPostrouting, rst.Build(o.local[:]))
		return
	case v == nil:
		return
	case sp.Flags&packet.SYN == 0:
		s := o.passed()
		if s.Seq-v.lrcv != sp.Seq-v.rcv || s.Has(packet.ACK) && s.Ack-v.lnxt != sp.Ack-v.nxt {
			o.t.Fatalf("%s: seq %d ack %d became %d %d", v.name, sp.Seq, sp.Ack, s.Seq, s.Ack)
		}
	}
	if sp.Flags&packet.RST != 0 || o.quiet {
		return
	}
	hook := uint8(filter.HookPostrouting)
	if freeze {
		hook = filter.HookOutput
	}
	o.step(hook, append(o.local[:0], v.ack...))
	if s := o.passed(); s.Seq != v.nxt || s.Ack != v.rcv || len(o.fx.Sends) != 0 {
		o.t.Fatalf("%s: local's acknowledgement met %v and became %d %d, want %d %d", v.name, o.fx.Reason, s.Seq, s.Ack, v.nxt, v.rcv)
	}
}

// passed is the segment of this step as it went on.
func (o *outsider) passed() *packet.Segment {
	switch o.fx.Verdict {
	case filter.Modified:
		o.parse(o.fx.Out)
	case filter.Accept:
		o.parse(o.pk.Data)
	default:
		o.t.Fatalf("a segment did not pass: %v", o.fx.Reason)
	}
	return &o.seg
}
