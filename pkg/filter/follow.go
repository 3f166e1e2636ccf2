package filter

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/boundary"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Boundaries of remotes that never wait for an answer: what they say is
// followed from SNAPSHOTSTART on, and their connections freeze where one of
// their requests has ended.

// follower follows what a remote says to local. Numbers are the remote's view.
type follower struct {
	boundary.Scanner
	at    seqnum.Value // next octet that the scanner is to see
	begun bool         // at is known
	seen  bool         // the remote has spoken since SNAPSHOTSTART, or it may have
	high  seqnum.Value // behind the highest octet that local may hold
	holds bool         // high is known

	listed   seqnum.Value // RCV.NXT of local's socket when it was listed
	isListed bool
}

// followAll has the requests of every connection followed, those of new ones
// too; None: of none any more.
func (a *app) followAll(k boundary.Kind) {
	a.boundary = k
	for _, c := range a.conns {
		c.followAnew()
	}
}

// followLate is followAll where SNAPSHOTSTART named another boundary.
func (a *app) followLate(k boundary.Kind) {
	a.followAll(k)
	for _, c := range a.conns {
		if c.scan != nil {
			c.scan.seen = c.lastIn >= a.since
		}
	}
}

func (c *conn) followAnew() {
	c.scan, c.bounded = nil, false
	if k := c.app.boundary; k != boundary.None && c.role == appstate.Passive {
		c.scan = &follower{Scanner: boundary.New(k)}
	}
}

// inNext is the number behind what has passed to local without a hole.
func (c *conn) inNext() seqnum.Value {
	if c.inKnown && c.ep.RcvNxt.Less(c.inEnd) {
		return c.inEnd
	}
	return c.ep.RcvNxt
}

// follow takes s, a segment of the remote, before it passes. It returns the number
// behind the last request that ends in what is new of it; false where none does.
func (c *conn) follow(now Time, s *packet.Segment) (end seqnum.Value, ok bool) {
	f, n := c.scan, s.PayloadLen()
	if n == 0 {
		return 0, false
	}
	if !c.learned {
		f.seen = true
		return 0, false
	}
	in := c.inNext()
	if !c.plausible(s) || s.Seq.Add(uint32(n)).LessEq(in) {
		return 0, false
	}
	f.reach(in)
	rested := !f.seen && c.rests(now)
	f.seen = true
	if in.Less(s.Seq) {
		return 0, false
	}
	if rested || c.handshake && in == c.irs.Add(1) { // the first octet of all begins a request, too
		f.Begin()
	}
	p := s.Payload()[in.Size(s.Seq):]
	n = f.Write(p)
	f.at = in.Add(uint32(len(p)))
	return in.Add(uint32(n)), n > 0
}

// restTime is the silence of a remote that tells that none of its requests is under
// way, where nothing else does. It is much longer than that of boundary "turn":
// a remote that never waits for an answer is silent in the middle of a request, too,
// for as long as its retransmissions take, or when the processors are busy.
const restTime = 1e9

// listedAt notes how far the remote had come when local's socket was listed.
func (c *conn) listedAt(next seqnum.Value) {
	if c.scan != nil {
		c.scan.listed, c.scan.isListed = next, true
	}
}

// rests tells whether the remote has been silent for restTime. What it did before
// SNAPSHOTSTART is local's word, unless octets came since that was given.
func (c *conn) rests(now Time) bool {
	last := max(c.lastIn, c.app.since)
	if f := c.scan; c.lastIn != 0 && f.isListed && f.listed == c.inNext() {
		last = c.lastIn
	}
	return now-last >= restTime
}

// reach tells the scanner that local is to get octet in next: where that is not
// what it expects, octets came to local unseen, or behind a hole that is filled.
func (f *follower) reach(in seqnum.Value) {
	if !f.begun || f.at != in {
		f.Lose()
	}
	f.at, f.begun = in, true
}

// gave notes that s passes to local, maybe behind a hole.
func (f *follower) gave(s *packet.Segment) {
	if n := s.PayloadLen(); n > 0 {
		f.held(s.Seq.Add(uint32(n)))
	}
}

// held notes that local may hold octets up to end.
func (f *follower) held(end seqnum.Value) {
	if !f.holds || f.high.Less(end) {
		f.high, f.holds = end, true
	}
}

// tellsHeld takes from s, a segment of local whose view of the remote's numbers
// differs by in, what local holds behind a hole (RFC 2018).
func (c *conn) tellsHeld(s *packet.Segment, in uint32) {
	if c.scan == nil {
		return
	}
	for i := range s.Opt.SACKBlocks {
		if l, r := s.SACKBlock(i); s.Ack.Less(l) {
			c.scan.held(r.Add(in))
		}
	}
}

// holdsBehind tells whether local may hold octets at or behind number end: it
// would take them as soon as it has those before. Numbers outside its window are
// an outsider's guess.
func (c *conn) holdsBehind(end seqnum.Value) bool {
	f := c.scan
	return f.holds && end.Less(f.high) && f.high.LessEq(c.ep.Edge.Max(c.ep.RcvNxt))
}

// atBoundary tells whether the connection may freeze where it stands.
func (c *conn) atBoundary(now Time) bool {
	f := c.scan
	if f == nil || c.tookFin() || c.owesFin() { // behind its close no request comes any more
		return c.atTurn(now)
	}
	quiet := now-max(c.lastIn, c.lastOut, c.app.froze) >= c.app.quiet
	in := c.inNext()
	if f.begun {
		f.reach(in)
	}
	switch {
	case c.holdsBehind(in):
		return false
	case !f.seen:
		return quiet && c.rests(now)
	case f.Whole(), !f.Synced() && f.Maybe() && c.rests(now) && c.last == localSpoke:
		c.bound, c.bounded = in, true
		return true
	}
	return false
}

// short tells whether local has not acknowledged everything up to the boundary
// at which it was frozen: it still gets that, and nothing behind it.
func (c *conn) short() bool { return c.bounded && c.learned && c.ep.RcvNxt.Less(c.bound) }

// upToBoundary lets the segment pass up to a boundary of its connection, which
// freezes there, and keeps what is behind it. cut: something is. false: it is not
// for local now; its sender sends it again.
func (e *Engine) upToBoundary(now Time, c *conn, fx *Effects) (cut, ok bool) {
	s := &e.seg
	fx.drop(FrozenUnordered)
	switch in := c.inNext(); {
	case !c.learned: // where it belongs is not known
		return false, false
	case s.End().LessEq(c.ep.RcvNxt): // an old one, for which local has an answer
		return false, true
	case !c.plausible(s):
		return false, false
	case !c.frozen && in.Less(s.Seq): // local is to hold nothing behind a hole
		c.lastIn, c.last = now, remoteSpoke
		c.ep.Acked(s.Ack)
		return false, false
	}
	if !c.frozen {
		end, whole := c.follow(now, s)
		if !whole || c.holdsBehind(end) {
			return false, true
		}
		c.bound, c.bounded = end, true
		c.freeze()
	}
	if s.End().LessEq(c.bound) {
		return false, true
	}
	why := HeldData
	if rest := s.Seq.Add(uint32(s.PayloadLen())); c.bound.Less(rest) {
		c.ep.Closed = true
	} else {
		why = HeldFin
	}
	e.keep(c, s)
	e.wakeUp(now, c.app, why, fx)
	s.Trim(int(c.bound.Size(s.Seq)))
	return true, true
}

// missingBoundary says why a connection is not frozen yet.
func (c *conn) missingBoundary() string {
	switch f := c.scan; {
	case c.role == appstate.Active:
		return "not at its boundary: local spoke last and has no reply"
	case f == nil || c.tookFin() || c.owesFin():
		return "not at its boundary: the remote spoke last and local has not answered"
	case c.holdsBehind(c.inNext()):
		return "not at its boundary: octets are missing before others that local may hold"
	case !f.seen:
		return "not at its boundary: it has not been quiet for long enough"
	case f.Synced():
		return "not at its boundary: a request of the remote has not come to its end"
	}
	return "not at its boundary: where the remote's requests begin is not known yet"
}
