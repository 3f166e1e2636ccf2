// Package filtertest plays scenarios against the verdict engine: text scripts
// of what remotes, local stacks, helpers and the clock do, and the trace of
// what the engine makes of it. The language is described at Run.
package filtertest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// end is one end of a connection as a scenario describes it.
type end struct {
	iss, nxt seqnum.Value // its own numbers
	rcv      seqnum.Value // next expected of the other side, in this end's view
	base     seqnum.Value // of a remote: the first number that it saw of local
	told     seqnum.Value // of a remote: what was acknowledged to it
	got      []byte       // what it has taken
	ts       uint32
	seenAt   filter.Time
	at       filter.Time    // when it took octets last, or began
	ahead    []seqnum.Value // the edges of what came last behind a hole
	seen     uint32         // newest TSval that it took (TS.Recent), which it echoes
	win      uint16
	fin      bool // it has closed

	una       seqnum.Value // of local: what it knows to be acknowledged
	peerFin   bool         // of local: it has taken the remote's FIN
	clockless bool         // restored, and what it acknowledged last is wup
	wup       seqnum.Value
}

// link is a connection of a scenario: a remote, and the local socket of the
// moment (a restored application brings a new one).
type link struct {
	name          string
	raddr, laddr  netip.AddrPort
	own           netip.AddrPort // of local's socket, where its port is another
	active        bool           // local opened it
	remote, local end
	ts            bool
	mss           uint16
	scale         int // of the remote, -1: none
	sack          bool
	lscale        uint8
	ecn           bool   // ECN was agreed on, and local echoes congestion (RFC 3168)
	option        []byte // one more in SYN and SYN-ACK
	lacks         string // what the new local side's SYN-ACK does not have
	tfo           bool   // local takes octets of a SYN (RFC 7413)

	override []string            // words of the image
	imaged   *filter.ImageSocket // what the last image says
}

// World is an engine with everything around it.
type World struct {
	Engine *filter.Engine
	fx     filter.Effects
	now    filter.Time
	links  map[string]*link
	order  []*link
	byID   map[filter.ConnID]*link
	byOwn  map[filter.ConnID]*link // by local's own address
	out    strings.Builder
	app    string
	away   bool  // local's segments come from the hook before routing
	before uint8 // that hook
	replay uint64
	lose   bool // the segment of this line is lost
	silent bool // the local stack does not answer by itself
	takes  bool // remotes take what the filter says
	errs   []string
	store  Store                   // what was recorded
	flows  map[netip.AddrPort]bool // remotes in the set of translated flows
	passed []byte                  // the last segment, as it went on; nil when it did not

	node   string // of which engine and what belongs to it are those above
	skew   filter.Time
	others map[string]*nodeOf
	parcel *filter.Structures // handed over last
}

// New makes an empty world.
func New() *World { return With(filter.New(filter.Config{Seed: 1})) }

// With makes a world around an engine.
func With(e *filter.Engine) *World {
	return &World{
		Engine: e, before: filter.HookOutput,
		links: map[string]*link{}, flows: map[netip.AddrPort]bool{}, byID: map[filter.ConnID]*link{}, byOwn: map[filter.ConnID]*link{}, now: 1e9, node: "a",
	}
}

func (w *World) printf(format string, a ...any) { fmt.Fprintf(&w.out, format, a...) }

// request hands one request to the engine.
func (w *World) request(body any) {
	w.replay++
	w.engineStep(filter.Event{Request: &filter.Request{ID: w.replay, Body: body}}, false)
}

// advance lets time pass, stopping at every deadline of the engine.
func (w *World) advance(d time.Duration) {
	until := w.now + int64(d)
	for {
		at := w.Engine.NextDeadline()
		if at == 0 || at-w.skew > until {
			break
		}
		w.now = max(at-w.skew, w.now)
		w.engineStep(filter.Event{}, false)
	}
	w.now = until
	w.engineStep(filter.Event{}, false)
	w.advanceOthers()
}

// deliver gives the engine a queued packet and prints its verdict.
func (w *World) deliver(hook uint8, data []byte) {
	w.engineStep(filter.Event{Packet: &filter.Packet{Hook: hook, Data: data}}, true)
}

// deliverLocal sends a segment of local through the hooks as the rules do: a
// translated flow is seen again behind routing.
func (w *World) deliverLocal(l *link, b []byte) {
	h := w.hook()
	w.deliver(h, b)
	synAck := w.away && packet.SYN&b[ipLen(b)+13] != 0 // connection tracking sees it on its way
	if h == w.before && w.passed != nil && (w.flows[l.raddr] || synAck) {
		w.deliver(filter.HookPostrouting, append([]byte(nil), w.passed...))
	}
}

// engineStep runs one event, prints what comes of it, and lets the local stack
// answer what was injected into it.
func (w *World) engineStep(ev filter.Event, verdict bool) {
	w.Engine.Step(w.now+w.skew, ev, &w.fx)
	if verdict {
		w.verdict(ev.Packet.Data)
	}
	w.effects()
}

// restart puts a new engine in the place of the old one, with what was
// recorded.
func (w *World) restart(rebooted bool) error {
	w.Engine = filter.New(filter.Config{Seed: 2})
	apps, conns := w.store.Records()
	known := func(id filter.ConnID) bool { return w.flows[id.Remote] }
	if rebooted {
		clear(w.flows)
		w.skew = 1e9 - w.now // the clock begins anew
		if len(w.others) == 0 {
			w.now, w.skew = 1e9, 0
		}
	}
	if err := w.Engine.Load(w.now+w.skew, apps, conns, known, rebooted, &w.fx); err != nil {
		return err
	}
	w.printf("    %d applications, %d connections\n", len(apps), len(conns))
	w.away = false
	w.effects()
	return nil
}

// effects prints what comes of a step.
func (w *World) effects() {
	w.store.Apply(w.fx.Records)
	for _, u := range w.fx.Untrack {
		w.printf("    untrack %v\n", u.Remote)
	}
	for _, s := range w.fx.Sets {
		what := s.IP.String()
		if s.Port != 0 {
			what = netip.AddrPortFrom(s.IP, s.Port).String()
		}
		w.printf("    set %s %v %s\n", setNames[s.Set], map[bool]string{true: "+", false: "-"}[s.Add], what)
		if s.Set == filter.SetFlow {
			w.flows[netip.AddrPortFrom(s.IP, s.Port)] = s.Add
		}
	}
	for _, n := range w.fx.Notes {
		w.printf("    state %s %q\n", n.App, n.State.String())
		w.away = n.State.Captured()
	}
	for _, r := range w.fx.Replies {
		w.reply(r)
	}
	for _, r := range w.fx.Restores {
		w.printf("    restore request for %v\n", r.IP)
	}
	sends := make([][]byte, 0, len(w.fx.Sends))
	for _, s := range w.fx.Sends {
		sends = append(sends, append([]byte(nil), s.Data...))
	}
	w.fx.Reset()
	var taken []func()
	for i, b := range sends { // what local says to them comes behind all of them
		if f := w.sent(b, sends[i+1:]); f != nil {
			taken = append(taken, f)
		}
	}
	for _, f := range taken {
		f()
	}
}

// isFor tells whether segment b is for the remote of l.
func (w *World) isFor(l *link, b []byte) bool {
	var s packet.Segment
	return s.Parse(b) == packet.OK && s.Src == l.laddr && s.Dst == l.raddr
}

var setNames = [...]string{"vip", "full", "away", "active", "skip", "flow"}

func (w *World) verdict(data []byte) {
	w.passed = nil
	if w.fx.Verdict == filter.Accept {
		w.passed = data
	}
	w.printf("    %s %s\n", [...]string{"drop", "accept", "modified"}[w.fx.Verdict], w.fx.Reason)
	if w.fx.Verdict != filter.Modified {
		return
	}
	w.passed = append([]byte(nil), w.fx.Out...)
	var s packet.Segment
	if f := s.Parse(w.fx.Out); f == packet.NotTCP {
		return // an ICMP error
	} else if f != packet.OK {
		w.fail(fmt.Sprintf("modified into %v", f))
		return
	}
	w.printf("    as %s\n", w.describe(&s))
	if !s.ChecksumOK() {
		w.fail("a rewritten segment has a wrong checksum")
	}
}

func (w *World) reply(r filter.Reply) {
	if r.Err != nil {
		w.printf("    refused: %v\n", r.Err)
		return
	}
	if list, ok := r.Body.(*filter.ConnList); ok {
		w.conns(list)
	}
	if st, ok := r.Body.(*filter.Structures); ok {
		w.parcel = st
		w.printf("    gives %d connections, %d SYNs\n", len(st.Conns), len(st.Syns))
	}
	if list, ok := r.Body.(*filter.StatusList); ok {
		w.statuses(list)
	}
	if res, ok := r.Body.(*filter.Result); ok {
		w.printf("    done %q", res.State.String())
		if res.Adopted+res.Forgotten > 0 {
			w.printf(" %d new, %d forgotten", res.Adopted, res.Forgotten)
		}
		for _, n := range res.Notes {
			w.printf(" (%s)", n)
		}
		w.printf("\n")
	}
}

// sent prints an injected segment, and returns how the local stack takes one
// that is for it. An ask is answered at once if none of the later segments is for
// its connection's remote.
func (w *World) sent(b []byte, later [][]byte) func() {
	var s packet.Segment
	if f := s.Parse(b); f != packet.OK || !s.ChecksumOK() {
		w.fail(fmt.Sprintf("a sent segment is broken: %v", f))
		return nil
	}
	if l := w.byOwn[filter.ConnID{Local: s.Dst, Remote: s.Src}]; l != nil {
		if ask := s.PayloadLen() == 1 && l.local.rcv.Size(s.Seq) > 1<<29; ask {
			w.printf("    ask %s\n", l.name)
			switch {
			case w.silent:
			case slices.ContainsFunc(later, func(b []byte) bool { return w.isFor(l, b) }):
				return func() { w.answerAsk(l, s.Seq) }
			default:
				w.answerAsk(l, s.Seq)
			}
			return nil
		}
		w.printf("    to local  %s\n", w.describe(&s))
		if s.Has(packet.SYN) && !l.active {
			l.local.heard(w.now, &s)
			if l.local.rcv = s.Seq.Add(1); l.tfo {
				l.local.rcv = s.End()
			}
		}
		if w.silent {
			return nil
		}
		return func() { w.localTakes(l, &s) }
	}
	if l := w.byID[filter.ConnID{Local: s.Src, Remote: s.Dst}]; l != nil && l.remote.base != 0 {
		w.consistent(&l.remote, &s)
		l.remote.heard(w.now, &s)
		if w.takes && s.Seq == l.remote.rcv && s.Len() > 0 {
			l.remote.got, l.remote.rcv = append(l.remote.got, s.Payload()...), s.End()
		}
	}
	w.printf("    to remote %s\n", w.describe(&s))
	return nil
}

// consistent checks what every segment of ours to a remote must fulfil: it would
// take an older clock for an old duplicate (PAWS), and an acknowledgement that goes
// back tells that a number was lost.
func (w *World) consistent(e *end, s *packet.Segment) {
	if s.Opt.HasTS && seqnum.NewerTS(e.seen, s.Opt.TSVal) && w.now-e.seenAt < 24*24*3600e9 {
		w.fail(fmt.Sprintf("TSval %d, the remote has seen %d", s.Opt.TSVal, e.seen))
	}
	if s.Ack.Less(e.told) {
		w.fail(fmt.Sprintf("the acknowledgement goes back by %d", e.told.Size(s.Ack)))
	}
	e.told = s.Ack
}

// answerAsk plays local's duplicate ACK with a DSACK for the octet of an ask.
func (w *World) answerAsk(l *link, left seqnum.Value) {
	flags := uint8(packet.ACK)
	if l.ecn {
		flags |= packet.ECE
	}
	b := w.segment(l, false, flags, 0, 0, nil, nil)
	if l.sack {
		blocks := []seqnum.Value{left, left.Add(1)}
		if a := l.local.ahead; a != nil && l.local.rcv.Less(a[0]) { // RFC 2018 section 4
			blocks = append(blocks, a...)
		}
		b = withSACK(b, blocks...)
	}
	w.deliver(w.hook(), b)
}

// heard takes the clock of the other side from a segment that is acceptable
// (RFC 7323 section 4.3).
func (e *end) heard(now filter.Time, s *packet.Segment) {
	const outdated = 24 * 24 * 3600e9 // section 5.5
	e.acked(s)
	fits := s.Seq.LessEq(e.rcv) && e.rcv.LessEq(s.End().Add(1))
	if e.clockless {
		fits = s.Seq.LessEq(e.wup) && e.wup.LessEq(s.End().Add(1))
	}
	if s.Opt.HasTS && (s.Has(packet.SYN) || fits && (!seqnum.NewerTS(e.seen, s.Opt.TSVal) || now-e.seenAt >= outdated)) {
		e.seen, e.seenAt = s.Opt.TSVal, now
	}
}

// localTakes lets the model of the local stack take an injected segment: SYN
// is answered, octets in order are acknowledged.
func (w *World) localTakes(l *link, s *packet.Segment) {
	l.local.noteFin(s)
	l.local.heard(w.now, s)
	switch {
	case l.active && s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK && s.Ack == l.local.nxt:
		l.local.rcv = s.Seq.Add(1)
		w.deliver(w.hook(), w.segment(l, false, packet.ACK, 0, 0, nil, nil))
	case s.Has(packet.SYN) && l.local.nxt != l.local.iss: // it has the connection (RFC 5961 section 4.2)
		w.deliver(w.hook(), w.segment(l, false, packet.ACK, 0, 0, nil, nil))
	case s.Has(packet.SYN):
		b := w.segment(l, false, packet.SYN|packet.ACK, 0, 0, nil, nil)
		l.local.nxt = l.local.iss.Add(1)
		w.deliver(w.before, append([]byte(nil), b...))
		if w.deliver(filter.HookPostrouting, b); w.passed != nil { // it is a new connection
			l.remote.rcv, l.remote.base, l.remote.told, l.remote.seen = l.local.nxt, l.local.iss, l.remote.iss.Add(1), l.local.ts
		}
	case s.Len() == 0 && min(l.local.rcv.Size(s.Seq), s.Seq.Size(l.local.rcv)) > 1<<20: // far outside its window
		w.deliver(w.hook(), w.segment(l, false, packet.ACK, 0, 0, nil, nil))
	case s.Len() > 0 && s.Seq.Less(l.local.rcv) && s.End().LessEq(l.local.rcv): // it has all of it
		w.deliver(w.hook(), w.segment(l, false, packet.ACK, 0, 0, nil, nil))
	case s.Len() > 0 && s.Seq == l.local.rcv:
		l.local.rcv, l.local.got = s.End(), append(l.local.got, s.Payload()...)
		w.deliver(w.hook(), w.segment(l, false, packet.ACK, 0, 0, nil, nil))
	}
}

func (w *World) hook() uint8 {
	if w.away {
		return w.before
	}
	return filter.HookPostrouting
}

func (w *World) fail(what string) {
	w.errs = append(w.errs, what)
	w.printf("    FAULT: %s\n", what)
}

// segment builds a segment of one end. dseq and dack shift its numbers.
func (w *World) segment(l *link, fromRemote bool, flags uint8, dseq, dack int64, data []byte, win *uint16) []byte {
	e, src, dst := &l.local, l.own, l.raddr
	scale := int(l.lscale)
	if fromRemote {
		e, src, dst, scale = &l.remote, l.raddr, l.laddr, l.scale
	}
	if l.ecn && flags&packet.SYN != 0 { // RFC 3168 section 6.1.1
		flags |= packet.ECE
		if flags&packet.ACK == 0 {
			flags |= packet.CWR
		}
	}
	sp := packet.Spec{Src: src, Dst: dst, Seq: e.nxt.Add(uint32(dseq)), Flags: flags, Window: e.win, Payload: data}
	if flags&packet.ACK != 0 {
		sp.Ack = e.rcv.Add(uint32(dack))
		e.clockless = false
	}
	if win != nil {
		sp.Window = *win
	}
	if l.ts {
		sp.HasTS, sp.TSVal = true, e.ts
		if flags&packet.ACK != 0 {
			sp.TSEcr = e.seen
		}
	}
	if flags&packet.SYN != 0 {
		sp.MSS, sp.SACKPermitted = l.mss, l.sack
		if l.scale >= 0 {
			sp.HasWScale, sp.WScale = true, uint8(scale)
		}
	}
	if !fromRemote {
		switch l.lacks {
		case "ts":
			sp.HasTS = false
		case "sack":
			sp.SACKPermitted = false
		case "scale":
			sp.HasWScale = false
		}
	}
	b := sp.Build(make([]byte, sp.Size()))
	if l.option != nil && flags&packet.SYN != 0 {
		b = withOption(b, l.option)
	}
	return b
}

// describe prints a segment with numbers relative to those of the two ends:
// to and from a remote in the remote's view, to local in local's.
func (w *World) describe(s *packet.Segment) string {
	l := w.byID[filter.ConnID{Local: s.Src, Remote: s.Dst}]
	seq, ack := seqnum.Value(0), seqnum.Value(0)
	name := fmt.Sprintf("%v>%v", s.Src, s.Dst)
	if l != nil { // towards the remote: relative to what it saw first
		name, seq, ack = l.name, l.remote.rcvBase(), l.remote.iss
	} else if l = w.byOwn[filter.ConnID{Local: s.Dst, Remote: s.Src}]; l != nil {
		name, seq, ack = l.name, l.remote.iss, l.local.iss
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s seq %d", name, flagNames(s.Flags), s.Seq.Sub(seq))
	if s.Has(packet.ACK) {
		fmt.Fprintf(&b, " ack %d", s.Ack.Sub(ack))
	}
	fmt.Fprintf(&b, " win %d", s.Window)
	if l != nil && s.Dst == l.own && l.own != l.laddr {
		fmt.Fprintf(&b, " to port %d", s.Dst.Port())
	}
	if s.Opt.HasTS {
		fmt.Fprintf(&b, " ts %d/%d", s.Opt.TSVal, s.Opt.TSEcr)
	}
	if s.Has(packet.URG) {
		fmt.Fprintf(&b, " urg %d", s.Urgent)
	}
	for i := range s.Opt.SACKBlocks {
		x, y := s.SACKBlock(i)
		fmt.Fprintf(&b, " sack %d-%d", x.Sub(ack), y.Sub(ack))
	}
	if s.PayloadLen() > 0 {
		fmt.Fprintf(&b, " %q", s.Payload())
	}
	return b.String()
}

func flagNames(f uint8) string {
	var n []string
	for i, s := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"} {
		if f&(1<<i) != 0 && s != "PSH" {
			n = append(n, s)
		}
	}
	return strings.Join(n, "+")
}
