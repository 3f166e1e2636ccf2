package filter

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// letThrough passes a remote's segment in SNAPSHOTFREEZE while its connection
// has not reached its boundary.
func (e *Engine) letThrough(now Time, c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	cut := false
	if c.scan != nil && s.Len() > 0 && !s.Has(packet.RST) && c.alive() {
		var ok bool
		if cut, ok = e.upToBoundary(now, c, fx); !ok {
			return
		}
	}
	gone := s.Has(packet.RST) && c.resets(s)
	c.observeIn(now, s)
	switch e.passIn(c, p, fx); {
	case cut:
		fx.modified(FrozenCut, s.Raw())
	case fx.Reason == Pass:
		fx.Reason = FrozenPass
	}
	if gone {
		e.remove(c, fx)
	}
}

// freezeQuiet freezes a connection that stands at its boundary. With "turn" that
// is where local spoke last, or nobody has sent for the quiet time.
func (e *Engine) freezeQuiet(now Time, c *conn) {
	if !c.frozen && c.learned && c.alive() && c.atBoundary(now) {
		c.freeze()
	}
}

// freeze: from now on no payload of the remote reaches local. The next beat asks
// local once more, for what passed before.
func (c *conn) freeze() {
	c.frozen, c.confirmed = true, false
	c.askFrom, c.askAt = c.asks, 0
	c.app.engine.mark(c) // a filter that starts anew lets nothing through to it either
}

// held handles a remote's segment while the filter speaks for the application
// (behaviour: remote segments while the application is away).
func (e *Engine) held(now Time, a *app, c *conn, id ConnID, p *Packet, fx *Effects) {
	s := &e.seg
	if c != nil && s.Flags&(packet.SYN|packet.ACK|packet.RST) == packet.SYN {
		open := c.state == appstate.Connect && !c.alive() && s.Seq == c.irs
		if open && !a.sealed { // local still answers its handshakes
			fx.accept(HandshakePass)
			return
		}
		// Both sides and acknowledged, or before anything was captured; but not while local still works on its end.
		ended := c.state == appstate.Closing && c.finOut && !c.half && (c.learned && c.finIn && c.finOutEnd.LessEq(c.ep.SndUna) || !c.learned && a.sealed)
		switch {
		case c.state == appstate.Rst && c.image: // the restored socket is told of the reset before it gets the SYN
			e.heldUnknown(now, a, id, p, fx)
			return
		case c.state == appstate.Rst && c.hsStarted:
			fx.drop(HeldRstIgnored) // local is to be told first; it comes again
			return
		case open || c.state == appstate.Rst || ended: // a connection that begins anew
			e.remove(c, fx)
			c = nil
		}
	}
	if c == nil || c.state == appstate.SynRcvd && s.Has(packet.SYN) {
		e.heldUnknown(now, a, id, p, fx)
		return
	}
	switch c.state {
	case appstate.SynRcvd:
		e.heldSynRcvd(now, c, fx)
		return
	case appstate.Rst:
		fx.drop(HeldRstIgnored)
		return
	case appstate.SynSent:
		fx.drop(HeldUnknown)
		return
	}
	if !c.learned && (!c.handshake || c.alive()) { // its numbers are not known, or not any more
		fx.drop(HeldUnknown)
		return
	}
	if c.state == appstate.Closing && c.finOut && !c.half {
		e.heldClosing(now, c, fx)
		return
	}
	e.heldConn(now, a, c, p, fx)
}

func (e *Engine) heldConn(now Time, a *app, c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	v := c.ep.Receive(now, s)
	if c.ep.SndUna == s.Ack { // else Receive has not taken its word
		c.ownAcked(s)
	}
	if c.hole && c.lost() == 0 { // the remote has everything after all
		c.hole = false
		e.mark(c)
	}
	guess := s.Has(packet.RST) || s.End().Less(c.ep.RcvNxt.Add(^uint32(0))) // an old duplicate, or anybody's
	if !guess && (v == tcpemu.Ignore || v == tcpemu.Answer || v == tcpemu.Payload || v == tcpemu.Finish) {
		c.echoed(s)
	}
	if !c.ackSeen && s.Has(packet.ACK) && s.Ack == c.ep.SndNxt && (v == tcpemu.Ignore || v == tcpemu.Answer || v == tcpemu.Payload || v == tcpemu.Finish) {
		c.ackSeen = true // a handshake that local does not see the end of
		c.learned, c.frozen, c.confirmed, c.sealed = true, true, true, true
		if a.state != appstate.SnapshotFreeze && c.state == appstate.Connect {
			c.set(appstate.ConnectRmt)
		}
		e.mark(c)
	}
	fx.drop(heldReason[v])
	switch v {
	case tcpemu.Reset:
		e.heldReset(c, fx)
		return
	case tcpemu.Payload, tcpemu.Finish:
		e.heldNews(now, a, c, v, fx)
		return
	}
	if v.MayAnswer() && c.ackSeen { // an open handshake has no current numbers
		if !c.token(now, s) {
			fx.Reason = HeldLimited
			return
		}
		sp := c.ep.Ack()
		fx.send(&sp, false)
	}
	if !guess && (v == tcpemu.Ignore || v == tcpemu.Answer) {
		e.strip(now, a, c, p, fx)
	}
}

// echoed takes local's clock from what the remote echoes where nothing of local
// was seen since its SYN-ACK, or maybe by an earlier filter, before the remote
// ended the handshake: the remote would refuse an older timestamp.
func (c *conn) echoed(s *packet.Segment) {
	if c.handshake && c.spokeAt == 0 && (!c.reloaded || !c.ackSeen || c.silent) && s.Ack == c.ep.SndNxt &&
		c.ep.Opt.TS && s.Opt.HasTS && seqnum.NewerTS(s.Opt.TSEcr, c.ep.TSVal) {
		c.ep.TSVal = s.Opt.TSEcr
		c.app.engine.mark(c)
	}
}

var heldReason = [...]Reason{
	tcpemu.Ignore: HeldNoted, tcpemu.Answer: HeldAnswered, tcpemu.Challenge: HeldChallenged,
	tcpemu.Payload: HeldData, tcpemu.Finish: HeldFin, tcpemu.Reset: HeldRst,
	tcpemu.OutOfWindow: HeldOutOfWindow, tcpemu.BadAck: HeldBadAck,
	tcpemu.OldTimestamp: HeldOldTimestamp, tcpemu.NoAck: HeldNoAck,
}

// heldNews is data or a FIN that only the application can take: data closes
// the window, both are kept and wake the application.
func (e *Engine) heldNews(now Time, a *app, c *conn, v tcpemu.Verdict, fx *Effects) {
	s := &e.seg
	if v == tcpemu.Payload && e.heartbeat(now, c, fx) {
		return
	}
	if c.spools() {
		e.spoolNews(now, a, c, v, fx)
		return
	}
	e.trimKept(c)
	kept := e.keep(c, s)
	if v == tcpemu.Payload && s.PayloadLen() > 0 {
		c.ep.Closed = true
		if !kept {
			fx.Reason = HeldDataDropped
			e.keepHead(c, s)
		}
		if c.token(now, s) {
			sp := c.ep.Ack()
			fx.send(&sp, false)
		}
	}
	reason := fx.Reason
	e.wakeUp(now, a, reason, fx)
	if a.state == appstate.SnapshotFreeze {
		e.forwardAck(now, a, c, fx)
		if kept && fx.Reason == FrozenStripped {
			fx.Reason = FrozenKept
		}
	}
}

// heldReset ends the remote side. Local is told when it is back, at the number
// where it stands.
func (e *Engine) heldReset(c *conn, fx *Effects) {
	c.own, c.ownAt = nil, 0
	if c.spooled && c.keptFin {
		// It has closed, everything was acknowledged, and it knows nothing of the
		// connection any more: local still gets what it said.
		fx.Reason = HeldRstIgnored
		return
	}
	if c.spooled {
		c.ep.RcvNxt = c.keptAt
		e.endSpool(c, fx)
	}
	e.unkeep(c)
	c.answered()
	switch c.state {
	case appstate.Closing:
		if c.finOut && !c.half || c.turned { // local has ended its side, too
			e.remove(c, fx)
			return
		}
		c.set(appstate.Rst)
	case appstate.Connect, appstate.ConnectRmt, appstate.Restoring:
		c.set(appstate.Rst)
	}
}

// strip lets the acknowledgement of a frozen connection's segment reach local,
// so that its buffers drain; octets never do.
func (e *Engine) strip(now Time, a *app, c *conn, p *Packet, fx *Effects) {
	if a.state == appstate.SnapshotFreeze {
		e.forwardAck(now, a, c, fx)
	}
}

// forwardAck injects the newest acknowledgement of the remote to a local side
// that is frozen and not sealed. It stands at local's RCV.NXT, so that local
// has nothing to answer.
func (e *Engine) forwardAck(now Time, a *app, c *conn, fx *Effects) {
	s := &e.seg
	if a.sealed || c.sealed || c.localGone || !s.Has(packet.ACK) {
		return
	}
	const again = 25e6 // it may have been lost, and two that disagree must not answer each other at the speed of the wire
	una := c.ep.SndUna
	if una == c.fwdAck && s.Window == c.fwdWnd && c.fwd && now-c.fwdAt < again {
		return
	}
	c.fwd, c.fwdAck, c.fwdWnd, c.fwdAt = true, una, s.Window, now
	sp := packet.Spec{
		Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.ACK, Window: s.Window,
		Seq: c.localSeqIn(c.ep.RcvNxt), Ack: c.localSeqOut(una),
	}
	if c.ep.Opt.TS && s.Opt.HasTS {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, c.ep.TSRec-c.tr.TSIn, s.Opt.TSEcr-c.tr.TSOut
	}
	fx.send(&sp, false)
	fx.Reason = FrozenStripped
}

// heldSynRcvd is a segment for a handshake that local had answered when it was
// stopped: with the remote's acknowledgement the connection is one to be held.
func (e *Engine) heldSynRcvd(now Time, c *conn, fx *Effects) {
	s := &e.seg
	fx.drop(HeldNoted)
	if s.Has(packet.RST) {
		e.remove(c, fx)
	}
}

// heldClosing is a segment for a connection that local had closed already: the
// remote's FIN is acknowledged and the connection ends.
func (e *Engine) heldClosing(now Time, c *conn, fx *Effects) {
	s := &e.seg
	fx.drop(HeldNoted)
	if !c.learned { // closed before anything was captured: its numbers are the remote's word
		if s.Has(packet.FIN|packet.ACK) && c.token(now, s) {
			sp := packet.Spec{Src: c.id.Local, Dst: c.id.Remote, Seq: s.Ack, Ack: s.End(), Flags: packet.ACK, Window: c.ep.Window}
			if s.Opt.HasTS {
				sp.HasTS, sp.TSVal, sp.TSEcr = true, s.Opt.TSEcr, s.Opt.TSVal
			}
			fx.send(&sp, false)
			fx.Reason = HeldFinAcked
		}
		return
	}
	octets := s.Seq.Add(uint32(s.PayloadLen()))
	owed := c.owesClose()
	v := c.ep.Receive(now, s)
	if owed && !c.owesClose() {
		c.closeTaken(now)
	}
	switch {
	case v == tcpemu.Reset:
		e.remove(c, fx)
	case v == tcpemu.Payload && c.ep.RcvNxt.Less(octets): // local, which has closed, would refuse them
		sp := c.ep.Rst()
		fx.send(&sp, false)
		e.remove(c, fx)
	case c.spooled && s.Has(packet.FIN): // local is to take the spool first, or the snapshot to end
	case s.Has(packet.FIN) && c.ep.RcvNxt.LessEq(s.End()) && (v == tcpemu.Finish || v == tcpemu.Payload || v == tcpemu.Answer) && c.token(now, s):
		if news := c.ep.RcvNxt.Less(s.End()) || !c.finIn; news && s.Seq.LessEq(c.ep.RcvNxt) {
			c.ep.RcvNxt = s.End()
			c.finIn = true
			c.closing(now)
			e.mark(c)
		}
		sp := c.lastWord()
		fx.send(&sp, false)
		fx.Reason = HeldFinAcked
	case v.MayAnswer() && c.token(now, s):
		sp := c.lastWord()
		fx.send(&sp, false)
		fx.Reason = HeldAnswered
	}
}

// mostSyn bounds a SYN that is kept, from its IP header on, which anybody can send: what
// both headers take, and the octets of a fast open (RFC 7413) in an Ethernet frame.
const mostSyn = 2048

// heldUnknown is a segment without a connection structure.
func (e *Engine) heldUnknown(now Time, a *app, id ConnID, p *Packet, fx *Effects) {
	s := &e.seg
	if s.Flags&(packet.SYN|packet.ACK|packet.RST|packet.FIN) != packet.SYN {
		fx.drop(HeldUnknown)
		return
	}
	if !a.listens(id.Local.Port()) {
		fx.drop(HeldSynRefused)
		if a.synToken(now) {
			sp := tcpemu.RefuseSyn(s)
			fx.send(&sp, false)
		}
		return
	}
	if len(s.Raw()) > mostSyn && s.PayloadLen() > 0 { // its octets come again behind the handshake
		s.Trim(0)
	}
	if len(s.Raw()) > mostSyn {
		fx.drop(HeldSynLimited)
		return
	}
	if i, ok := a.synIndex[id]; ok { // sent again: the newest is delivered
		a.syns[i].data = append(a.syns[i].data[:0], s.Raw()...)
		fillPartial(p, a.syns[i].data)
		fx.drop(HeldSynKept)
		return
	}
	if len(a.syns) >= e.cfg.MaxSyns || e.syns >= e.cfg.SynsTotal || !a.synToken(now) {
		fx.drop(HeldSynLimited)
		return
	}
	k := keptSyn{id: id, data: append([]byte(nil), s.Raw()...)}
	fillPartial(p, k.data)
	if a.synIndex == nil {
		a.synIndex = map[ConnID]int{}
	}
	a.synIndex[id] = len(a.syns)
	a.syns = append(a.syns, k)
	e.syns++
	fx.drop(HeldSynKept)
	e.wakeUp(now, a, HeldSynKept, fx)
}

// dropSyns forgets the kept SYNs.
func (a *app) dropSyns() {
	a.engine.syns -= len(a.syns)
	a.syns, a.synIndex = nil, nil
}

// fillPartial completes the checksum of a kept copy of p where the kernel had
// left that to the device.
func fillPartial(p *Packet, data []byte) {
	var full packet.Segment
	if p.Info&CsumNotReady != 0 && full.Parse(data) == packet.OK {
		full.FillChecksum()
	}
}

// synToken limits how many SYNs outsiders may have kept or answered.
func (a *app) synToken(now Time) bool {
	const burst, every = 1024, 4e6
	if n := (now - a.synTokensAt) / every; n > 0 || a.synTokensAt == 0 {
		a.synTokens = int(min(int64(a.synTokens)+n, burst))
		if a.synTokensAt == 0 {
			a.synTokens = burst
		}
		a.synTokensAt = now
	}
	if a.synTokens == 0 {
		return false
	}
	a.synTokens--
	return true
}

// wakeUp sets the restore flag; after SNAPSHOTDONE it asks for the restore.
func (e *Engine) wakeUp(now Time, a *app, why Reason, fx *Effects) {
	if a.wake {
		return
	}
	a.wake, a.wakeWhy, a.wakeTries = true, why, 0
	a.mark()
	if a.state == appstate.SnapshotDone {
		e.requestRestore(now, a, fx)
	}
}

// requestRestore sends the one outstanding restore request, and plans the next
// with back-off until the state leaves SNAPSHOTDONE.
func (e *Engine) requestRestore(now Time, a *app, fx *Effects) {
	a.wakeAt = 0
	if a.state != appstate.SnapshotDone || !a.wake {
		return
	}
	fx.Restores = append(fx.Restores, RestoreRequest{App: a.name, IP: a.vips[0]})
	a.wakeAt = now + min(Time(1e9)<<min(a.wakeTries, 5), 30e9)
	a.wakeTries++
	e.at(a.wakeAt)
}
