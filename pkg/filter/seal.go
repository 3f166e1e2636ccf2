package filter

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// awayOut handles a segment that local sends while the application is away or
// frozen.
func (e *Engine) awayOut(now Time, a *app, c *conn, id ConnID, p *Packet, fx *Effects) {
	s := &e.seg
	if c.silentFor(a, s) {
		e.silentOut(now, a, c, fx)
		return
	}
	if c != nil && c.fresh {
		fx.accept(Pass)
		c.observeOut(now, s, false)
		if s.Flags&(packet.SYN|packet.ACK) == packet.SYN {
			e.synOut(now, a, c, id, fx)
		}
		return
	}
	if a.state == appstate.RestoreStart && s.Flags&(packet.SYN|packet.ACK) == packet.SYN && (c == nil || c.role == appstate.Active && !c.hsStarted) {
		e.openedAway(now, a, id, fx)
		return
	}
	if c == nil {
		if a.sealed {
			fx.drop(SealedUnknown)
		} else {
			e.unknownOut(now, a, id, fx)
		}
		return
	}
	if c.hsStarted {
		e.handshakeOut(c, p.Hook, fx)
		return
	}
	if s.Has(packet.SYN) {
		e.synAway(now, a, c, fx)
		return
	}
	if !a.sealed && !c.sealed {
		if a.passCloses || s.Flags&(packet.FIN|packet.RST) == 0 || !c.alive() {
			e.frozenOut(now, c, p, fx)
			return
		}
		if s.Has(packet.FIN) && s.PayloadLen() > 0 {
			e.finalWords(now, c, p, fx)
			return
		}
		if s.Has(packet.FIN) {
			fx.drop(FinHeldBack) // local sends it again: to the remote after an abort, to us after the seal
			return
		}
		c.sealed = true // a reset of its own, or of a dying process: not for the remote
		e.mark(c)
	}
	e.sealedOut(now, c, fx)
}

// synAway is a SYN or SYN-ACK of local for a connection whose handshake was
// under way at the freeze.
func (e *Engine) synAway(now Time, a *app, c *conn, fx *Effects) {
	s := &e.seg
	if a.sealed {
		fx.drop(SealedUnknown)
		return
	}
	fx.accept(HandshakePass)
	if s.Has(packet.ACK) {
		e.synAckOut(now, c, s, fx)
	}
}

// frozenOut passes what local still says before the seal.
func (e *Engine) frozenOut(now Time, c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	if e.isAnswer(now, c, s, fx) {
		fx.drop(AskAnswer)
		return
	}
	fx.accept(FrozenPass)
	if c.translated {
		return // seen again behind routing, where it is translated and noted
	}
	if c.refresh(now, s) {
		if p.Info&CsumNotReady != 0 {
			s.FillChecksum()
		}
		fx.modified(FrozenPass, s.Raw())
	}
	c.observeOut(now, s, true)
	if c.aborts(s) {
		e.remove(c, fx)
		return
	}
	if c.reopens(s) {
		sp := c.ep.Ack()
		fx.send(&sp, false)
		fx.drop(FrozenPass)
	}
	if c.last == localSpoke && !c.frozen && c.role == appstate.Passive && c.scan == nil {
		c.freeze()
	}
}

// refresh gives s, a segment of local that was overtaken by an answer to us,
// the timestamp of that answer: the remote has seen it in a word of ours, and
// would take s for an old duplicate (PAWS, RFC 7323 section 5.3).
func (c *conn) refresh(now Time, s *packet.Segment) bool {
	const overtaken = 1e9
	if !c.learned || !s.Opt.HasTS || now-c.spokeAt > overtaken || !seqnum.NewerTS(c.ep.TSVal, s.Opt.TSVal) {
		return false
	}
	s.SetTS(c.ep.TSVal, s.Opt.TSEcr)
	return true
}

// reopens tells whether s, local's own acknowledgement in the freeze, would
// open the window that the filter closed.
func (c *conn) reopens(s *packet.Segment) bool {
	return c.ep.Closed && c.alive() && c.app.state.Away() && s.Flags&(packet.SYN|packet.FIN|packet.RST) == 0 && s.PayloadLen() == 0 && s.Window != 0
}

// finalWords passes the octets that come with local's FIN and holds the FIN
// back: local sends it again, alone, when they are acknowledged.
func (e *Engine) finalWords(now Time, c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	s.ClearFIN()
	if p.Info&CsumNotReady != 0 {
		s.FillChecksum()
	}
	if !c.translated {
		c.observeOut(now, s, true)
	}
	fx.modified(FrozenPass, s.Raw())
}

// goneAway leaves the remote side alone where local is gone. It is not
// recorded: who takes up a sealed application takes every local side for gone.
func (c *conn) goneAway() {
	if c.localGone && (c.state == appstate.Connect && c.alive() || c.state == appstate.Closing && !c.finOut) {
		c.app.derive = true
		c.set(appstate.ConnectRmt)
		c.app.derive = false
	}
}

// sealedOut closes the local side without the remote: FIN is answered with FIN
// and ACK, octets are acknowledged, discarded and counted, RST and the last ACK
// are absorbed.
func (e *Engine) sealedOut(now Time, c *conn, fx *Effects) {
	s := &e.seg
	n := s.PayloadLen()
	switch {
	case s.Has(packet.RST):
		c.localGone = true
		fx.drop(SealedRst)
	case s.Has(packet.FIN):
		c.localGone = true
		fx.drop(SealedFin)
	case n > 0:
		fx.drop(SealedData)
	default:
		fx.drop(SealedAck)
	}
	c.goneAway()
	if fx.Reason != SealedFin && fx.Reason != SealedData {
		return
	}
	if c.app.state == appstate.SnapshotFreeze {
		ack := s.Ack.Add(c.tr.In)
		if c.spooled && c.keptEnd().LessEq(ack) {
			e.spoolTaken(now, c, ack, ack, fx)
		}
		if c.ep.RcvNxt.Less(ack) {
			c.bytesIn += uint64(ack.Size(c.ep.RcvNxt))
			c.ep.RcvNxt = ack
			e.mark(c)
		}
		// Octets up to SND.NXT were on the wire before: only what is behind
		// them would be lost.
		if d := s.Seq.Add(uint32(n)).Sub(c.localSeqOut(c.ep.SndNxt)); d > 0 && uint64(d) > c.discarded {
			c.discarded = uint64(d)
			e.mark(c)
		}
	}
	sp := packet.Spec{
		Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.ACK, Window: 65535,
		Seq: c.localSeqIn(c.ep.RcvNxt), Ack: s.End(),
	}
	if !c.learned {
		sp.Seq = s.Ack
	}
	if c.ep.Opt.TS && s.Opt.HasTS {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, c.ep.TSRec-c.tr.TSIn, s.Opt.TSVal
	}
	if s.Has(packet.FIN) && !c.finIn {
		sp.Flags |= packet.FIN
	}
	fx.send(&sp, false)
}
