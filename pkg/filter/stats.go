package filter

import (
	"math"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Statistics of a connection: what the filter saw of it, said for it, and why
// its segments got their verdicts. Nothing is decided by them and nothing of
// them is recorded: an engine that is started anew counts from 0, other than
// octets, which are recorded with the connection.

// connStats are the counters of one connection. There may be a million, so it
// is 56 octets, and a reason takes room once it was met.
type connStats struct {
	in                uint64        // segments of the remote; all others that reasons count are local's
	answered          uint32        // segments of both sides, answered by us; buckets limit the rate
	toRemote, toLocal uint32        // segments that we sent
	heard             uint32        // when the remote was heard last, in ticks behind the conn's creation, plus 1; 0: never
	passedSeq         seqnum.Value  // of the SYN, FIN or RST of local that passed before routing
	kept              uint16        // segments that the kept octets came in, while there are any
	passed            bool          // passedSeq is known, and it did not come by behind routing yet
	reasons           []reasonCount // in the order in which they were met
}

// heardTick is the resolution of connStats.heard: it lasts for 13 years.
const heardTick = 100e6

// reasonCount is a reason in the top octet and its count below.
type reasonCount uint64

const countBits = 56

func (r reasonCount) reason() Reason { return Reason(r >> countBits) }
func (r reasonCount) count() uint64  { return uint64(r & (1<<countBits - 1)) }

// add counts a verdict.
func (st *connStats) add(r Reason) {
	for i := range st.reasons {
		if st.reasons[i].reason() == r {
			st.reasons[i]++
			return
		}
	}
	if len(st.reasons) == cap(st.reasons) {
		st.reasons = slices.Grow(st.reasons, 4)
	}
	st.reasons = append(st.reasons, reasonCount(r)<<countBits|1)
}

// sight is what is noted of a segment before it is judged: the verdict can
// translate it, and end its connection.
type sight struct {
	noted   bool
	inbound bool
	edge    bool // SYN, FIN or RST: queued in any state
	opening bool // conn is a SYN that local has not answered
	kept    bool // conn has kept octets or a FIN, up to keptEnd
	keptEnd seqnum.Value
	seq     seqnum.Value
	conn    *conn // nil: none yet
}

// sees notes segment s of connection c before it is judged; c may be nil.
func (e *Engine) sees(c *conn, inbound bool, s *packet.Segment) {
	v := &e.sight
	v.noted, v.inbound, v.seq, v.conn = true, inbound, s.Seq, c
	v.edge = s.Flags&(packet.SYN|packet.FIN|packet.RST) != 0
	v.opening, v.kept = false, false
	if c != nil {
		v.opening = c.state == appstate.SynRcvd
		if v.kept = c.keeps(); v.kept {
			v.keptEnd = c.keptEnd()
		}
	}
}

func (c *conn) keeps() bool { return len(c.kept) > 0 || c.keptFin }

// tally counts the packet that fx has the verdict on, and what was sent because
// of it, for its connection. What ended the connection is counted for the
// application only.
func (e *Engine) tally(now Time, hook uint8, sends []Send, fx *Effects) {
	v := &e.sight
	if !v.noted {
		return
	}
	c := v.conn
	v.noted, v.conn = false, nil
	if c == nil || c.state == appstate.Removed {
		if c = e.next(c, v); c == nil {
			return
		}
	}
	st := &c.stats
	answered := false
	for i := range sends {
		from, _, _ := packet.Ports(sends[i].Data)
		toRemote := from == c.id.Local
		st.sent(toRemote)
		answered = answered || toRemote == v.inbound
	}
	if !v.first(c, hook, fx.Verdict) {
		return
	}
	st.add(fx.Reason)
	if answered && fx.Verdict == Drop {
		st.answered++
	}
	if !v.inbound {
		return
	}
	st.in++
	if fits(fx.Reason) {
		st.heard = uint32((now-c.created)/heardTick) + 1
	}
	switch {
	case !c.keeps():
	case !v.kept || v.keptEnd.LessEq(c.keptAt): // local has taken what was kept before
		st.kept = 1
	case c.keptEnd() != v.keptEnd && st.kept < math.MaxUint16:
		st.kept++
	}
}

// next finds the connection that began with the segment of e.seg, if one did; it
// may follow on another with the same addresses.
func (e *Engine) next(was *conn, v *sight) *conn {
	if was == nil {
		id := ConnID{Local: e.seg.Src, Remote: e.seg.Dst}
		if v.inbound {
			id = ConnID{Local: e.seg.Dst, Remote: e.seg.Src}
		}
		return e.conns[id]
	}
	c := e.conns[was.id]
	if c != nil && v.opening { // local has answered: the SYN belongs to the connection
		c.stats = was.stats
	}
	return c
}

// first tells whether the segment is to be counted now. A segment of local can
// be queued before routing and again behind it: one of a connection that is
// translated, or has its handshake with the new local side, gets its verdict
// behind it. Of others SYN, FIN and RST come twice while any application of the
// node is captured, and once when none is.
func (v *sight) first(c *conn, hook uint8, verdict Verdict) bool {
	if v.inbound {
		return true
	}
	st := &c.stats
	if hook != HookPostrouting {
		if verdict != Drop && (c.translated || c.hsStarted) {
			return false
		}
		if v.edge {
			st.passed, st.passedSeq = verdict != Drop, v.seq
		}
		return true
	}
	again := v.edge && st.passed && v.seq == st.passedSeq
	if v.edge {
		st.passed = false
	}
	return !again
}

// sent counts a segment of ours.
func (st *connStats) sent(toRemote bool) {
	if toRemote {
		st.toRemote++
	} else {
		st.toLocal++
	}
}

// tallySends counts what a request or a deadline had us send.
func (e *Engine) tallySends(sends []Send) {
	for i := range sends {
		from, to, _ := packet.Ports(sends[i].Data)
		if c := e.conns[ConnID{Local: from, Remote: to}]; c != nil {
			c.stats.sent(true)
		} else if c := e.bySocket(ConnID{Local: to, Remote: from}); c != nil {
			c.stats.sent(false)
		}
	}
}

// fits tells whether a segment with this verdict can be the remote's own word;
// others can be anybody's.
func fits(r Reason) bool {
	switch r {
	case HeldChallenged, HeldLimited, HeldOutOfWindow, HeldBadAck, HeldOldTimestamp, HeldNoAck, HeldRstIgnored, HeldUnknown:
		return false
	}
	return true
}

// ConnStats are the statistics of a connection as GETCONNINFO shows them: of
// segments that reached the filter. Bulk of a connection that is neither held
// nor translated stays in the kernel and is not among them. They begin anew
// with the filter.
type ConnStats struct {
	SegmentsIn, SegmentsOut uint64 // seen from the remote, from local
	Answered                uint32 // of these, answered by the filter in the place of the other side
	ToRemote, ToLocal       uint32 // segments that the filter sent
	KeptSegments            uint32 // that the kept octets came in; not more than 65535 are counted
	// RemoteIdle is the time since the remote was heard, to a tenth of a
	// second; -1 where it speaks without the filter, or was not heard yet.
	RemoteIdle Time
	// Reasons are the verdicts on these segments, one each, sorted. Only when
	// they were asked for.
	Reasons []ReasonCount
}

// ReasonCount is how often a reason was met.
type ReasonCount struct {
	Reason Reason
	Count  uint64
}

func (c *conn) statistics(now Time, reasons bool) ConnStats {
	st := &c.stats
	s := ConnStats{SegmentsIn: st.in, Answered: st.answered, ToRemote: st.toRemote, ToLocal: st.toLocal, RemoteIdle: c.remoteIdle(now)}
	for _, r := range st.reasons {
		s.SegmentsOut += r.count()
	}
	s.SegmentsOut -= st.in
	if c.keeps() {
		s.KeptSegments = uint32(st.kept)
	}
	if reasons {
		s.Reasons = make([]ReasonCount, 0, len(st.reasons))
		for _, r := range st.reasons {
			s.Reasons = append(s.Reasons, ReasonCount{r.reason(), r.count()})
		}
		slices.SortFunc(s.Reasons, func(a, b ReasonCount) int { return int(a.Reason) - int(b.Reason) })
	}
	return s
}

// remoteIdle is the time since the remote was heard, by us or, when the
// sockets were listed, by local.
func (c *conn) remoteIdle(now Time) Time {
	if a := c.app; !c.translated && !a.state.Captured() && a.state != appstate.SnapshotStart {
		return -1
	}
	last := c.lastIn
	if c.stats.heard != 0 {
		last = max(last, c.created+Time(c.stats.heard-1)*heardTick)
	}
	if last == 0 {
		return -1
	}
	return (now - last) / heardTick * heardTick
}
