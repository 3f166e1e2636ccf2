package filter

import (
	"fmt"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// initial is the remote's initial number towards a new local side: one below the
// next octet that it is to take; where the remote has closed already, one more,
// for the FIN that local is to see again.
func (c *conn) initial() seqnum.Value {
	n := c.base().Add(^uint32(0))
	if c.finIn {
		n = n.Add(^uint32(0))
	}
	return n
}

// startHandshake sends the emulated SYN to the listener of a passive connection.
func (e *Engine) startHandshake(c *conn, fx *Effects) {
	c.hsIRS = c.initial()
	c.hsError = ""
	c.hsOver = false
	c.hsTries++
	if c.state != appstate.Rst {
		c.set(appstate.Restoring)
	}
	c.hsStarted, c.hsClock = true, c.ep.TSRec
	sp := c.ep.Syn(c.hsIRS)
	fx.send(&sp, true)
}

// handshakeOver asks local once more although its SYN-ACK was acknowledged: one
// that answers with SYN cookies (RFC 4987 section 3.6) keeps nothing, and
// repeats nothing when our acknowledgement was lost. One that has the connection
// takes the SYN for an old one and says so (RFC 5961 section 4.2).
func (e *Engine) handshakeOver(c *conn, fx *Effects) {
	c.hsOver, c.hsClock = true, c.ep.TSRec
	sp := c.ep.Syn(c.hsIRS)
	fx.send(&sp, true)
}

// handshakeOut handles what the returning local side sends before RESTORED.
// Its SYN-ACK goes on to connection tracking, which is to see the handshake
// with local's numbers, and is taken behind routing.
func (e *Engine) handshakeOut(c *conn, hook uint8, fx *Effects) {
	s := &e.seg
	switch {
	case c.role == appstate.Active:
		e.caughtOut(c, fx)
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK:
		if hook != HookPostrouting {
			c.forwarded = hook == HookPrerouting
			fx.accept(HandshakePass)
			return
		}
		e.handshakeAck(c, fx)
	case s.Has(packet.RST):
		fx.drop(HandshakeRefused)
		switch {
		case c.hsDone:
			e.turnedAway(c, fx)
		case s.Ack == c.hsIRS.Add(1):
			c.hsError = "local answered RST"
			e.undoHandshake(c)
		}
	default:
		fx.drop(NotOpenYet) // local sends it again
	}
}

// turnedAway is a RST after local had accepted the connection. Once it may be
// a full queue (tcp_abort_on_overflow); again and again it is the
// application's own word, which goes to the remote at RESTORED: one connection
// that the application does not want must not keep all others from coming back.
func (e *Engine) turnedAway(c *conn, fx *Effects) {
	const sure = 3
	c.hsError = "local accepted it and answered RST"
	e.undoHandshake(c)
	if c.hsRsts++; c.hsRsts < sure {
		return
	}
	switch c.state {
	case appstate.ConnectRmt:
		c.turned = true
		c.set(appstate.Closing)
	case appstate.Rst: // the remote does not want it either
		e.remove(c, fx)
	}
}

// undoHandshake puts a connection back to where only its remote side lives.
func (e *Engine) undoHandshake(c *conn) {
	c.hsDone, c.hsStarted = false, false
	if c.state == appstate.Restoring || c.state == appstate.Connect {
		c.set(appstate.ConnectRmt)
	}
}

// handshakeAck completes the handshake with local's SYN-ACK: its number, scale
// and clock become the connection's translation. A repeated one is
// acknowledged again: local's accept queue was full.
func (e *Engine) handshakeAck(c *conn, fx *Effects) {
	s := &e.seg
	fx.drop(HandshakeAck)
	if !c.hsStarted || s.Ack != c.hsIRS.Add(1) {
		fx.drop(HandshakeRefused)
		return
	}
	if lack := c.lacks(s); lack != "" {
		c.hsError = lack
	}
	if c.hsError != "" {
		fx.Reason = HandshakeRefused
		return
	}
	if c.hsDone && !c.hsOver && s.Seq != c.hsISN { // a cookie for an earlier SYN: local has the connection with the other
		fx.Reason = HandshakeRefused
		return
	}
	if !c.hsDone || s.Seq != c.hsISN {
		c.hsISN, c.hsOver = s.Seq, false
		c.hsWindow = s.Window
		c.hsMSS = s.Opt.MSS
		c.tr = translation(c, s)
		c.newClock(c.ep.TSRec)
		c.hsDone = true
		c.hsTS = s.Opt.TSVal
		if c.state == appstate.Restoring {
			c.set(appstate.Connect)
		}
	}
	sp := e.toLocal(c, packet.ACK)
	fx.send(&sp, true)
}

// handshakeAgain acknowledges a SYN-ACK that local repeats although the
// connection is open: our acknowledgement was lost.
func (e *Engine) handshakeAgain(c *conn, fx *Effects) {
	s := &e.seg
	sp := packet.Spec{Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.ACK, Window: c.ep.RemoteField(), Seq: s.Ack, Ack: s.Seq.Add(1)}
	if c.ep.Opt.TS && s.Opt.HasTS {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, c.ep.TSRec-c.tr.TSIn, s.Opt.TSVal
	}
	fx.drop(HandshakeAck)
	fx.send(&sp, true)
}

// translation measures the difference between what the remote knows and the
// local side that answered with SYN-ACK s.
func translation(c *conn, s *packet.Segment) rewrite.Translation {
	t := rewrite.Translation{
		Out:        c.ep.SndNxt.Size(s.Seq.Add(1)),
		ScaleLocal: s.Opt.WScale,
		ScaleSeen:  c.ep.Opt.LocalScale,
	}
	if !c.ep.Opt.WScale {
		t.ScaleLocal, t.ScaleSeen = 0, 0
	}
	// The clock goes on where the remote saw it last. On the same addresses it
	// is mostly the old clock, ahead by the time that passed.
	const sane = 1 << 30
	if d := s.Opt.TSVal - c.ep.TSVal; c.ep.Opt.TS && d >= sane {
		t.TSOut = c.ep.TSVal - s.Opt.TSVal
	}
	return t
}

// toLocal is an empty segment of the remote for the new local side, at the
// number where the handshake ended.
func (e *Engine) toLocal(c *conn, flags uint8) packet.Spec {
	sp := packet.Spec{
		Src: c.id.Remote, Dst: c.localAddr(), Flags: flags, Window: c.ep.RemoteField(),
		Seq: c.hsIRS.Add(1), Ack: c.hsISN.Add(1),
	}
	if c.ep.Opt.TS {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, c.ep.TSRec-c.tr.TSIn, c.hsTS
	}
	return sp
}

// open lets traffic of a re-established connection flow: kept octets first,
// then the window that was closed.
func (e *Engine) open(now Time, c *conn, fx *Effects) {
	c.frozen, c.sealed, c.confirmed, c.localGone, c.inKnown = false, false, false, false, false
	c.fwd, c.asks, c.ep.Behind = false, 0, false
	c.closeWait, c.shut = false, c.ep.Closed || c.reloaded // an earlier filter may have closed it
	c.answered()
	c.opened, c.hsEnd = now, c.ep.SndNxt
	c.newClock(c.ep.TSRec) // its answer to the probe can have come behind the SYN
	c.oldClock = c.ep.Outdated(now)
	c.edge = rewrite.Edge{Right: c.ep.Edge, Known: true}
	if !c.translated {
		e.flow(c, true, fx)
	}
	if c.state == appstate.Rst {
		sp := e.toLocal(c, packet.RST|packet.ACK)
		fx.send(&sp, true)
		e.remove(c, fx)
		return
	}
	if c.finIn { // local is to see the remote's FIN again
		c.finInEnd = c.ep.RcvNxt
		c.remoteFirst = true
		c.set(appstate.Closing)
	}
	e.useHead(c, c.head)
	switch {
	case c.spooled:
		c.shut = c.ep.Closed
		e.deliver(now, c, c.keptAt, c.keptAt.Add(uint32(c.hsWindow)), fx)
		e.redoSoon(now, c)
	case c.finIn || len(c.kept) > 0 || c.keptFin:
		if c.kept == nil {
			c.keptAt = c.ep.RcvNxt
		}
		e.handKept(c, fx)
		e.redoSoon(now, c)
	}
	if c.shut {
		c.ep.Closed, c.reloaded = false, false
		if c.spooled {
			return // local's acknowledgements tell how much room there is behind the spool
		}
		// Where octets are kept local's acknowledgement of them follows.
		sp := c.ep.Ack()
		sp.Window = max(c.tr.Window(c.firstWindow(), c.ep.RcvNxt, &c.edge), 1)
		c.ep.Window = sp.Window
		fx.send(&sp, false)
	}
}

// openAgain does what the end of an earlier filter may have cut off when the
// connection was opened: the remote's FIN is handed to local until it is taken,
// and local says how wide its window is. Whatever of it was done already does no harm.
func (e *Engine) openAgain(now Time, c *conn, fx *Effects) {
	switch {
	case !c.translated:
	case c.spooled:
		c.handshakeEnd()
		e.spoolAgain(now, c, fx)
	case c.finIn && !c.closeWait && c.finInEnd == c.ep.RcvNxt:
		c.keptAt = c.ep.RcvNxt
		c.handshakeEnd()
		e.handKept(c, fx)
		e.redoSoon(now, c)
	case c.shut:
		e.askBlind(c, fx)
	}
}

// handshakeEnd takes what is known now for the numbers at which local's
// handshake ended: what is handed to it acknowledges no more than the remote has,
// nor less than local's first octet, where heartbeats of ours lie before it.
func (c *conn) handshakeEnd() {
	una := c.ep.SndUna
	if len(c.own) > 0 {
		una = una.Max(c.ownEnd)
	}
	c.hsISN = c.localSeqOut(una).Add(^uint32(0))
	c.hsTS = c.ep.TSVal - c.tr.TSOut
}

// acknowledgesNow is handshakeEnd where local's numbers have moved since: a stack
// drops what acknowledges much less than it knows to be acknowledged (RFC 5961
// section 5.2).
func (c *conn) acknowledgesNow() {
	if c.learned && (c.reloaded || c.hsISN.Add(1).Less(c.localSeqOut(c.ep.SndUna))) {
		c.handshakeEnd()
	}
}

// taken is called when local acknowledged something of a connection that has
// kept octets: when all are acknowledged they are forgotten.
func (e *Engine) taken(now Time, c *conn, ack seqnum.Value) {
	if c.finIn {
		if ack == c.ep.RcvNxt {
			c.redoAt = 0
			e.unkeep(c)
		}
		return
	}
	if c.ep.RcvNxt.Less(c.keptEnd()) {
		return
	}
	if c.keptFin {
		c.finIn, c.finInEnd = true, c.keptEnd()
		c.closing(now)
	}
	e.unkeep(c)
	c.redoAt = 0
}

// firstWindow is the window of local's SYN-ACK in units of its scale.
func (c *conn) firstWindow() uint16 { return max(c.hsWindow>>c.tr.ScaleLocal, 1) }

// largest is how many octets an injected segment to local may hold. Towards a
// network namespace it crosses a link, and nobody cuts what is too long for it.
func (c *conn) largest() int {
	const loopback, smallest, timestamps = 16 << 10, 536, 12 // RFC 9293 section 3.7.1, RFC 7323 appendix A
	if !c.forwarded && !c.app.behind && !c.reloaded {        // where local is, a filter that has taken it up does not know yet
		return loopback
	}
	n := int(c.hsMSS)
	if n == 0 {
		n = smallest
	}
	if c.ep.Opt.TS {
		n -= timestamps
	}
	return max(n, 1)
}

// handKept injects what was kept into the local side, in segments that fit the
// remote's options and the way there.
func (e *Engine) handKept(c *conn, fx *Effects) {
	most := c.largest()
	seq := c.localSeqIn(c.keptAt)
	if c.finIn {
		seq = seq.Add(^uint32(0))
		e.handSegment(c, seq, nil, true, fx)
		return
	}
	for p := c.kept; len(p) > 0; {
		n := min(len(p), most)
		e.handSegment(c, seq, p[:n], c.keptFin && n == len(p), fx)
		p = p[n:]
		seq = seq.Add(uint32(n))
	}
	if len(c.kept) == 0 && c.keptFin {
		e.handSegment(c, seq, nil, true, fx)
	}
}

func (e *Engine) handSegment(c *conn, seq seqnum.Value, p []byte, fin bool, fx *Effects) {
	sp := e.toLocal(c, packet.ACK|packet.PSH)
	sp.Seq, sp.Payload = seq, p
	if fin {
		sp.Flags |= packet.FIN
	}
	if ahead := c.localSeqIn(c.keptUrg).Sub(seq); c.urgent && ahead > 0 && ahead <= 65535 {
		sp.Flags |= packet.URG
		sp.Urgent = uint16(ahead)
	}
	fx.send(&sp, true)
}

// redoSoon has what was handed to local now handed over again unless it is acknowledged.
func (e *Engine) redoSoon(now Time, c *conn) {
	c.retries, c.redoAt = 0, now+30e6
	e.atConn(c.redoAt, c)
}

// redeliver hands kept octets over again where local has not acknowledged
// them: a segment to a busy stack can be lost, and the remote would wait long
// before it sends again.
func (e *Engine) redeliver(now Time, c *conn, fx *Effects) {
	c.redoAt = 0
	if c.spooled {
		e.spoolAgain(now, c, fx)
		return
	}
	if c.app.state != appstate.Restored || c.kept == nil && !c.keptFin && !c.finIn {
		return
	}
	if c.retries >= 6 { // the remote's own retransmissions take over
		e.unkeep(c)
		e.unburden(now, c)
		return
	}
	c.retries++
	c.acknowledgesNow()
	e.handKept(c, fx)
	c.redoAt = now + 30e6<<c.retries
	e.atConn(c.redoAt, c)
}

// notRestored lists connections that RESTORED would lose.
func (a *app) notRestored() []string {
	var out []string
	for _, c := range a.conns {
		if c.restorable() {
			why := c.hsError
			if why == "" {
				why = "its handshake with the restored application is not complete"
			}
			out = append(out, fmt.Sprintf("%v %v: %s", c.id.Local, c.id.Remote, why))
		}
	}
	return out
}
