package filter

import (
	"bytes"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// Heartbeats of the application's protocol, which the filter speaks while the
// application is away. Their octets move the connection's numbers for good: the
// numbers of the handshake with the next local side, and so its translation, begin
// behind them.

// Heartbeat is one message of a protocol that needs no application.
type Heartbeat struct {
	Remote     netip.Prefix `cbor:"1,keyasint,omitempty"` // of which remotes
	Match      []byte       `cbor:"2,keyasint,omitempty"` // answered when it is the whole segment
	Reply      []byte       `cbor:"3,keyasint,omitempty"` // may be empty: then an acknowledgement is the answer
	Send       []byte       `cbor:"4,keyasint,omitempty"` // sent every Interval
	Interval   Time         `cbor:"5,keyasint,omitempty"`
	OnlyClosed bool         `cbor:"6,keyasint,omitempty"` // Send only while the window is closed
}

// ownMost bounds the octets of ours that a remote has not acknowledged yet.
const ownMost = 16 << 10

// beats tells whether the filter speaks heartbeats on c now: once its next local
// side has begun its handshake the numbers stay as they are.
func (c *conn) beats() bool {
	s := c.app.state
	return len(c.app.heartbeats) > 0 && !c.hsStarted && (s == appstate.SnapshotDone || s == appstate.RestoreStart) &&
		c.state == appstate.ConnectRmt && c.learned && !c.hole && (!c.image || !c.half && c.lost() == 0)
}

// heartbeat takes the segment at hand, octets at RCV.NXT, if it is a whole
// heartbeat of this remote, and answers it. false: it is something else.
func (e *Engine) heartbeat(now Time, c *conn, fx *Effects) bool {
	s := &e.seg
	if !c.beats() || s.Seq != c.ep.RcvNxt || s.Has(packet.FIN) || s.Has(packet.URG) || len(c.kept) > 0 || c.keptFin {
		return false
	}
	h := c.matching(s.Payload())
	if h == nil {
		return false
	}
	fx.drop(HeldHeartbeat)
	if !e.answerBeat(now, c, h, fx) {
		fx.drop(HeldHeartbeatLate)
	}
	return true
}

// matching finds the heartbeat of c's remote that p is, nil for none.
func (c *conn) matching(p []byte) *Heartbeat {
	for i := range c.app.heartbeats {
		h := &c.app.heartbeats[i]
		if len(h.Match) > 0 && h.Remote.Contains(c.id.Remote.Addr()) && bytes.Equal(h.Match, p) {
			return h
		}
	}
	return nil
}

// answerBeat takes heartbeat h, which is next in order, and answers it; false: the
// answer has no room, and the remote has to send again.
func (e *Engine) answerBeat(now Time, c *conn, h *Heartbeat, fx *Effects) bool {
	if !c.canSay(len(h.Reply)) {
		return false
	}
	n := uint32(len(h.Match))
	c.ep.RcvNxt = c.ep.RcvNxt.Add(n)
	c.ep.Extend()
	c.bytesIn += uint64(n)
	if len(h.Reply) > 0 {
		e.say(now, c, h.Reply, fx)
		return true
	}
	e.mark(c)
	sp := c.ep.Ack()
	fx.send(&sp, false)
	return true
}

// keptBeat answers at SNAPSHOTDONE a heartbeat that came during the snapshot: until
// then local lived, with numbers of its own.
func (e *Engine) keptBeat(now Time, c *conn, fx *Effects) {
	if !c.beats() || c.keptFin || c.finOwed || len(c.kept) == 0 || c.keptAt != c.ep.RcvNxt {
		return
	}
	h := c.matching(c.kept)
	if h == nil {
		return
	}
	closed := c.ep.Closed
	c.ep.Closed = false
	if !e.answerBeat(now, c, h, fx) {
		c.ep.Closed = closed
		return
	}
	e.unkeep(c)
}

// lost is how many octets of local the remote has not acknowledged, while the
// application is away: nobody sends them again.
func (c *conn) lost() uint32 {
	return c.ep.SndNxt.Size(c.ep.SndUna) - min(uint32(len(c.own)), c.ep.SndNxt.Size(c.ep.SndUna))
}

// canSay tells whether n more octets of ours fit the remote's window.
func (c *conn) canSay(n int) bool {
	if n == 0 {
		return true
	}
	unacked := int(c.ep.SndNxt.Size(c.ep.SndUna))
	window := ownMost
	if c.ep.RemoteSeen {
		window = min(window, int(c.ep.RemoteLast)<<c.ep.Opt.RemoteScale)
	}
	return unacked+n <= window
}

// say sends octets of ours to the remote; they are sent again until it has
// acknowledged them.
func (e *Engine) say(now Time, c *conn, p []byte, fx *Effects) {
	if len(c.own) == 0 {
		c.ownTries = 0
		c.ownAt = now + ownFirst
		e.atConn(c.ownAt, c)
	}
	sp := c.ep.Ack()
	sp.Flags |= packet.PSH
	sp.Seq, sp.Payload = c.ep.SndNxt, p
	fx.send(&sp, false)
	c.own = append(c.own, p...)
	c.ep.SndNxt = c.ep.SndNxt.Add(uint32(len(p)))
	c.ownEnd = c.ep.SndNxt
	c.bytesOut += uint64(len(p))
	e.mark(c)
}

// ownFirst and ownLast are the first and the longest wait for the
// acknowledgement of what we have said (RFC 6298 section 2, without a round-trip
// time that is known).
const (
	ownFirst Time = 1e9
	ownLast  Time = 60e9
)

// sayAgain sends what of ours the remote has not acknowledged.
func (e *Engine) sayAgain(now Time, c *conn, fx *Effects) {
	c.ownAt = 0
	if len(c.own) == 0 {
		return
	}
	if !c.learned && !c.app.state.Away() {
		// Behind a restart local's clock is not known, and the remote refuses one that
		// is older than what local has said since.
		c.ownTries = min(c.ownTries+1, 16)
		c.ownAt = now + min(ownFirst<<c.ownTries, ownLast)
		e.atConn(c.ownAt, c)
		e.askBlind(c, fx)
		return
	}
	sp := c.ep.Ack()
	sp.Flags |= packet.PSH
	most := int(max(c.ep.Opt.MSS, 536)) - 12
	for p, seq := c.own, c.ownEnd.Add(-uint32(len(c.own))); len(p) > 0; {
		n := min(len(p), most)
		sp.Seq, sp.Payload = seq, p[:n]
		fx.send(&sp, false)
		p, seq = p[n:], seq.Add(uint32(n))
	}
	c.ownTries = min(c.ownTries+1, 16)
	c.ownAt = now + min(ownFirst<<c.ownTries, ownLast)
	e.atConn(c.ownAt, c)
}

// ownAcked takes the acknowledgement of s, which passed all checks, for what we
// have said.
func (c *conn) ownAcked(s *packet.Segment) {
	if len(c.own) == 0 || !s.Has(packet.ACK) {
		return
	}
	first := c.ownEnd.Add(-uint32(len(c.own)))
	if !first.Less(s.Ack) || c.ownEnd.Less(s.Ack) && c.ep.SndNxt.Less(s.Ack) {
		return
	}
	n := min(int(s.Ack.Size(first)), len(c.own))
	if c.own = c.own[n:]; len(c.own) == 0 {
		c.own, c.ownAt = nil, 0
	}
	c.app.engine.mark(c)
}

// beats plans those of every connection of a.
func (e *Engine) beats(now Time, a *app) {
	for _, c := range a.conns {
		e.beat(now, c)
	}
}

// beat plans the periodic heartbeats of c from now on.
func (e *Engine) beat(now Time, c *conn) {
	c.beatAt = 0
	for i := range c.app.heartbeats {
		h := &c.app.heartbeats[i]
		if len(h.Send) > 0 && h.Interval > 0 && h.Remote.Contains(c.id.Remote.Addr()) && (c.beatAt == 0 || now+h.Interval < c.beatAt) {
			c.beatAt, c.beatOf = now+h.Interval, uint8(i)
		}
	}
	if c.beatAt != 0 {
		e.atConn(c.beatAt, c)
	}
}

// beatDue sends the periodic heartbeat whose time has come.
func (e *Engine) beatDue(now Time, c *conn, fx *Effects) {
	c.beatAt = 0
	s := c.app.state
	if s != appstate.SnapshotDone && s != appstate.RestoreStart || int(c.beatOf) >= len(c.app.heartbeats) {
		return
	}
	h := &c.app.heartbeats[c.beatOf]
	over := c.finIn || c.keptFin // a remote that reads no more answers octets with RST
	if c.beats() && !over && len(c.own) == 0 && (c.ep.Closed || !h.OnlyClosed) && c.canSay(len(h.Send)) {
		e.say(now, c, h.Send, fx)
	}
	e.beat(now, c)
}
