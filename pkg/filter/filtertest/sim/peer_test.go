package sim

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// keepalive is how the kernel of a peer looks after an idle connection, as on Linux:
// tcp_keepalive_time, tcp_keepalive_intvl, tcp_keepalive_probes, and
// TCP_USER_TIMEOUT, which takes the place of the last one.
type keepalive struct {
	idle, every time.Duration
	probes      int
	user        time.Duration
}

// persist is how a peer asks for a window that is shut.
type persist uint8

const (
	silentPersist persist = iota
	resends               // Linux, where the window was shut behind its octets: all of them, up to 120 s
	oneOctet              // BSD: the first octet, every 5 to 60 s
	emptyProbe            // Linux, where nothing is on its way: empty, below what is acknowledged
)

// profile is what peers of one sort do.
type profile struct {
	name        string
	share       int // of 10,000
	keep        keepalive
	persist     persist
	say         int  // octets that it sends early in the hold
	halfClosed  bool // it has closed its side before
	localClosed bool // local has, in the snapshot
	ping        bool // heartbeats of its own
	reply       bool // which are answered with octets
	noop        bool // the filter speaks heartbeats to it
}

const (
	pingEvery = time.Minute
	pingWord  = "PING\r\n"
	pongWord  = "+PONG\r\n"
	noopWord  = "\r\n"
)

// peer is a client of the held application: a TCP that notices every answer which is
// missing, late or wrong.
type peer struct {
	h     *hours
	i     int
	place int // in the timetable
	name  string
	prof  *profile

	filtertest.Remote
	una     seqnum.Value // acknowledged of its own octets
	ack     seqnum.Value // what the filter may acknowledge, and no less
	clock0  uint32
	spoke   uint32 // TSval that reached the filter last
	heardAt int64
	early   int64 // when it sends its octets

	keepAt    int64
	probesOut int
	persistAt int64
	rto       time.Duration
	shut      bool
	pending   []byte // sent and not acknowledged

	pingAt, ackAt int64
	pinged        bool // and not answered
	ackLost       bool // the filter says it again
	noopAt        int64
	octetsAt      int64        // when it heard octets last
	againAt       int64        // when it sends its heartbeat again
	top           seqnum.Value // behind all octets of the filter, heard or not
	dueBy         int64        // when they must have come, 0: they have
	lostOne       bool         // what was sent last, to it or by it, was lost on the way
	mayMiss       bool

	delivered, answered uint64 // segments to the filter, from it
	beats               int
	records             int
}

// tsval is its clock of 1 kHz, which goes past the wrap-around in the hold.
func (p *peer) tsval() uint32 { return p.clock0 + uint32((p.h.now-p.h.began)/1e6) }

// next is when it does something, 0: never.
func (p *peer) next() int64 {
	var t int64
	for _, x := range [...]int64{p.keepAt, p.persistAt, p.pingAt, p.ackAt, p.early, p.againAt, p.dueBy} {
		if x != 0 && (t == 0 || x < t) {
			t = x
		}
	}
	return t
}

// act does what is due.
func (p *peer) act() {
	now := p.h.now
	if p.early != 0 && p.early <= now {
		p.early = 0
		p.speak()
	}
	if p.ackAt != 0 && p.ackAt <= now {
		p.ackAt = 0
		p.ackLost = !p.send(packet.ACK, p.Next, nil, 0, p.h.r.IntN(20) == 0)
	}
	if p.dueBy != 0 && p.dueBy <= now {
		p.h.fail(p, "gives up: %d octets that the filter has said do not come", p.top.Size(p.Expects))
	}
	if p.againAt != 0 && p.againAt <= now { // it is acknowledged, not taken for another one
		p.againAt = 0
		p.send(packet.ACK|packet.PSH, p.una.Add(^uint32(len(pingWord)-1)), []byte(pingWord), 1, false)
	}
	if p.persistAt != 0 && p.persistAt <= now {
		p.asksForWindow()
	}
	if p.pingAt != 0 && p.pingAt <= now {
		p.pings()
	}
	if p.keepAt != 0 && p.keepAt <= now {
		p.keeps()
	}
}

// send has a segment on its way to the filter, which owes answers of them at once.
// false: it was lost.
func (p *peer) send(flags uint8, seq seqnum.Value, data []byte, answers int, lose bool) bool {
	h := p.h
	if lose && !p.lostOne {
		p.lostOne = true
		h.lost++
		return false
	}
	p.mayMiss = !p.lostOne
	p.lostOne, p.ackLost = false, false
	sp := packet.Spec{Src: p.Addr, Dst: p.Local, Seq: seq, Ack: p.Expects, Flags: flags, Window: p.Window, Payload: data}
	if p.TS {
		p.spoke = p.tsval()
		sp.HasTS, sp.TSVal, sp.TSEcr = true, p.spoke, p.Seen
	}
	p.delivered++
	before := p.answered
	h.step(filter.Event{Packet: h.packet(&sp)})
	if got := int(p.answered - before); got != answers {
		h.fail(p, "%d answers to a segment, want %d (%v)", got, answers, h.reason)
	}
	return true
}

// keeps is tcp_keepalive_timer.
func (p *peer) keeps() {
	k, now := &p.prof.keep, p.h.now
	elapsed := time.Duration(now - p.heardAt)
	switch {
	case len(p.pending) > 0 || p.pinged: // alive without
		p.keepAt = now + int64(k.idle)
		return
	case elapsed < k.idle:
		p.keepAt = p.heardAt + int64(k.idle)
		return
	}
	if k.user != 0 && elapsed >= k.user && p.probesOut > 0 || k.user == 0 && p.probesOut >= k.probes {
		p.h.fail(p, "gives up: nothing was heard for %v", elapsed)
	}
	p.probesOut++
	p.keepAt = now + int64(k.every)
	var octet []byte
	if p.i%7 == 0 && !p.prof.halfClosed { // stacks of old send one that was acknowledged
		octet = []byte{0}
	}
	p.send(packet.ACK, p.Next.Add(^uint32(0)), octet, 1, p.h.r.IntN(50) == 0)
}

// speak sends octets that only the application can take.
func (p *peer) speak() {
	p.pending = fmt.Appendf(nil, "%0*d", p.prof.say, p.i)
	room := min(len(p.pending), p.h.spool)
	p.shut = room == p.h.spool
	p.LocalWindow = uint16((p.h.spool - room) >> p.LocalScale)
	p.ack = p.una.Add(uint32(room))
	p.lostOne = true // the acknowledgement is not
	p.send(packet.ACK|packet.PSH, p.una, p.pending, 1, false)
	p.pending, p.una = p.pending[room:], p.ack
	if p.Next = p.una.Add(uint32(len(p.pending))); len(p.pending) > 0 {
		p.rto = 200 * time.Millisecond
		if p.prof.persist == oneOctet {
			p.rto = 5 * time.Second
		}
		p.persistAt = p.h.now + int64(p.rto)
	}
}

// asksForWindow is tcp_retransmit_timer or tcp_probe_timer.
func (p *peer) asksForWindow() {
	const patience = 240 * time.Second // twice the longest time-out
	now := p.h.now
	if quiet := time.Duration(now - p.heardAt); quiet > patience {
		p.h.fail(p, "gives up: nobody answered its probes of the window for %v", quiet)
	}
	most := 120 * time.Second
	seq, data := p.una, p.pending
	switch p.prof.persist {
	case oneOctet:
		most, data = 60*time.Second, data[:1]
	case emptyProbe:
		seq, data = seq.Add(^uint32(0)), nil
	}
	p.rto = min(2*p.rto, most)
	p.persistAt = now + int64(p.rto)
	p.send(packet.ACK, seq, data, 1, p.h.r.IntN(50) == 0)
}

// pings asks by the protocol whether the application is there; the answer is due
// before the next one.
func (p *peer) pings() {
	p.pingAt = p.h.now + int64(pingEvery)
	p.pinged = true
	p.ack = p.Next.Add(uint32(len(pingWord)))
	if !p.send(packet.ACK|packet.PSH, p.Next, []byte(pingWord), 1, p.h.r.IntN(50) == 0) {
		p.ack = p.una
		p.pingAt = p.h.now + 1e9 // its time-out
		return
	}
	p.una, p.Next, p.pinged = p.ack, p.ack, false
	p.beats++
}

// takes judges a segment of the filter as a TCP does, and more strictly where the
// filter has no choice.
func (p *peer) takes(s *packet.Segment) {
	h := p.h
	p.answered++
	if s.Dst != p.Addr || s.Src != p.Local || !s.ChecksumOK() {
		h.fail(p, "a segment that is not for it, or broken")
	}
	if flags := s.Flags &^ packet.PSH; flags != packet.ACK {
		h.fail(p, "flags %#x", s.Flags)
	}
	if s.Opt.HasTS != p.TS || s.Opt.SACKBlocks != 0 {
		h.fail(p, "options %+v", s.Opt)
	}
	if p.TS {
		if seqnum.NewerTS(p.Seen, s.Opt.TSVal) {
			h.fail(p, "TSval %d after %d: refused (PAWS)", s.Opt.TSVal, p.Seen)
		}
		if s.Opt.TSEcr != p.spoke {
			h.fail(p, "the echo is %d, it has sent %d last", s.Opt.TSEcr, p.spoke)
		}
	}
	if s.Ack != p.ack {
		h.fail(p, "acknowledgement %d behind what is to be acknowledged", s.Ack.Sub(p.ack))
	}
	p.window(s)
	p.says(s)
	if p.mayMiss && h.r.IntN(50) == 0 {
		p.misses()
		return
	}
	if p.TS && s.Seq.LessEq(p.Expects) {
		p.Seen = s.Opt.TSVal
	}
	p.Told = s.Ack
	p.heardAt, p.probesOut = h.now, 0
	switch {
	case s.PayloadLen() == 0:
	case p.Expects.Less(s.Seq): // behind a hole, it asks for what is missing
		p.ackAt = h.now + 1
	default:
		p.Expects, p.octetsAt, p.dueBy = p.Expects.Max(s.End()), h.now, 0
		p.ackAt = h.now + 40e6 // a delayed acknowledgement
	}
}

// misses has a segment of the filter lost on its way.
func (p *peer) misses() {
	p.lostOne, p.mayMiss = true, false
	p.h.missed++
	if p.pinged {
		p.againAt = p.h.now + 300e6
	}
	if p.Expects != p.top && p.dueBy == 0 {
		p.dueBy = p.h.now + 8e9 // the filter repeats them after 1 s, 2 s and 4 s
	}
}

// window checks the one that s announces: the one that local had, what the spool has
// room for, or none where octets wait.
func (p *peer) window(s *packet.Segment) {
	want := p.LocalWindow
	if p.shut {
		want = 0
	}
	if s.Window != want {
		p.h.fail(p, "window %d, want %d", s.Window, want)
	}
}

// says checks where s stands, and the octets in it.
func (p *peer) says(s *packet.Segment) {
	h := p.h
	switch word := string(s.Payload()); {
	case word == "":
		if s.Seq != p.top || p.pinged && p.prof.reply && p.againAt == 0 && p.Expects == p.top {
			h.fail(p, "no octets, at %d; it stands at %d, and an answer to its heartbeat is owed: %v", s.Seq, p.top, p.pinged)
		}
		return
	case s.End().LessEq(p.top): // again
		if p.top == p.Expects && !p.ackLost {
			h.fail(p, "octets that it has acknowledged")
		}
		return
	case s.Seq != p.top:
		h.fail(p, "octets %d behind what it was told", s.Seq.Sub(p.top))
	case word == pongWord && p.pinged && p.prof.reply:
	case word == noopWord && p.prof.noop:
		p.noops()
	default:
		h.fail(p, "octets %q", word)
	}
	p.top = s.End()
	p.beats++
}

// noops checks that the filter's heartbeats come at their time. They are left out
// where octets of the filter, which are as good, have just been on their way.
func (p *peer) noops() {
	const underWay = 5 * time.Second
	now := p.h.now
	late := time.Duration(now-p.noopAt) - pingEvery
	spoke := time.Duration(now - p.octetsAt)
	if late%pingEvery != 0 || late != 0 && (!p.prof.ping || spoke > pingEvery+underWay) {
		p.h.fail(p, "a heartbeat that is %v late, nothing was said for %v", late, spoke)
	}
	p.noopAt = now
}

// prefix is of the peers of its profile, for heartbeats.
func prefix(profile int, six bool) netip.Prefix {
	if six {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 1, 7: byte(profile)}), 64)
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(profile)}), 24)
}
