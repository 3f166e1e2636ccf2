package filter

import (
	"bytes"
	"fmt"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// The way back from an image: sockets are there again with their own numbers, before
// anything may pass.

// restoredSays keeps a segment of a restored socket until RESTORED: nobody has told
// it that anything arrived, so that it would wait for its retransmission time-out.
func (e *Engine) restoredSays(c *conn, fx *Effects) {
	s := &e.seg
	const most = 64 // segments of one connection
	fx.drop(NotOpenYet)
	if s.Has(packet.RST) {
		return // of a restore that fails
	}
	data := s.Raw()
	if len(c.said) >= most || e.kept+len(data) > e.cfg.KeepTotal || c.app.kept+len(data) > e.cfg.KeepPerApp {
		return // it sends it again
	}
	fx.drop(RestoredKept)
	e.kept += len(data)
	c.app.kept += len(data)
	c.said = append(c.said, bytes.Clone(data))
}

// unsay forgets what a restored socket has said.
func (e *Engine) unsay(c *conn) {
	for _, b := range c.said {
		e.kept -= len(b)
		c.app.kept -= len(b)
	}
	c.said = nil
}

// back notes that the socket of c was restored.
func (c *conn) back() {
	c.hsDone = true
	if c.state == appstate.ConnectRmt {
		c.set(appstate.Connect)
	}
}

// clock tells a restored socket the remote's newest acknowledgement and its clock: neither
// is in the image, and until it knows them it would say so. It comes before anything is
// let through.
func (e *Engine) clock(c *conn, fx *Effects) {
	out := c.ep.SndNxt.Size(c.imgSnd)
	if out != c.tr.Out { // else it is as it was, maybe since a moment ago
		c.floored, c.floor = c.imgUna != c.imgSnd, c.imgSnd
	}
	c.tr.Out, c.tr.In = out, c.base().Size(c.imgRcv)
	c.handshakeEnd()
	if c.state == appstate.Rst || c.clocked == c.hsISN && c.wasClocked {
		return
	}
	c.wasClocked, c.clocked = true, c.hsISN
	if !c.ep.Opt.TS && c.imgUna == c.hsISN.Add(1) {
		return
	}
	// It takes a clock at the number that it acknowledged last (RFC 7323 section 4.3): what the
	// image says, or, once it has said anything, where it stands. Which of it is true nobody
	// knows while that may be in the queue.
	for _, at := range []seqnum.Value{c.imgRcv, c.imgWup} {
		sp := e.toLocal(c, packet.ACK)
		sp.Seq = at
		fx.send(&sp, true)
		if c.imgWup == c.imgRcv {
			break
		}
	}
}

// clocks does so for every socket that is back, and lets out what they have said: behind
// the first segment that passes unseen it would be older than that. true: there was one.
func (e *Engine) clocks(now Time, a *app, fx *Effects) (any bool) {
	for _, c := range a.conns {
		if c.image && c.hsDone && !c.wasClocked {
			e.clock(c, fx)
			c.edge = rewrite.Edge{Right: c.ep.Edge, Known: true}
			e.sayKept(now, c, fx)
			any = true
		}
	}
	return any
}

// openImage lets traffic of a connection flow whose socket was restored: it goes on
// where the image left it, and learns what its remote has said meanwhile.
func (e *Engine) openImage(now Time, c *conn, fx *Effects) {
	e.clock(c, fx)
	c.frozen, c.sealed, c.confirmed, c.localGone, c.inKnown = false, false, false, false, false
	c.fwd, c.asks, c.image, c.opened, c.wasClocked = false, 0, false, now, false
	c.shut = c.ep.Closed || c.reloaded
	c.ep.Closed, c.reloaded = false, false
	c.answered()
	c.edge = rewrite.Edge{Right: c.ep.Edge, Known: true}
	if c.state == appstate.Rst {
		sp := packet.Spec{Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.RST | packet.ACK, Seq: c.imgRcv, Ack: c.hsISN.Add(1)}
		fx.send(&sp, true)
		e.unsay(c)
		e.remove(c, fx)
		return
	}
	if c.finIn || c.half {
		c.set(appstate.Closing)
	}
	e.useHead(c, c.head)
	hands := c.spooled || len(c.kept) > 0 || c.keptFin
	if brief := c.tr == (rewrite.Translation{}); !c.translated && (!brief || hands || len(c.own) > 0) {
		e.flow(c, true, fx)
		c.brief = brief
	}
	e.handImage(now, c, hands, fx)
	e.sayKept(now, c, fx)
	c.half, c.ep.Behind = false, false
	if !c.translated { // bulk passes unseen from now on
		c.learned, c.rcvKnown = false, false
	}
	e.unburden(now, c)
}

// handImage hands over what was kept and opens the window that was closed for it.
func (e *Engine) handImage(now Time, c *conn, hands bool, fx *Effects) {
	if hands {
		if c.spooled {
			e.deliver(now, c, c.keptAt, c.ep.Edge, fx)
		} else {
			e.handKept(c, fx)
		}
		e.redoSoon(now, c)
	}
	if c.shut && !c.spooled {
		sp := c.ep.Ack()
		fx.send(&sp, false)
	}
}

// sayKept sends to the remote what the restored socket has said before.
func (e *Engine) sayKept(now Time, c *conn, fx *Effects) {
	for _, b := range c.said {
		var s packet.Segment
		if s.Parse(b) != packet.OK || c.belowFloor(&s) {
			continue
		}
		unclocked := c.unclocked(&s)
		c.tr.Outbound(&s, c.id.Local.Port(), &c.edge)
		c.ahead(&s)
		if unclocked {
			s.SetTS(s.Opt.TSVal, c.ep.TSRec)
		}
		if s.Opt.HasTS {
			if seqnum.NewerTS(c.ep.TSVal, s.Opt.TSVal) { // its clock began anew, and a restore that failed had shown more of it
				s.SetTS(c.ep.TSVal, s.Opt.TSEcr)
			}
			c.noteClock(now, s.Opt.TSVal)
		}
		if end := s.End(); c.ep.SndNxt.Less(end) { // the remote may acknowledge it before RESTORED
			c.imgSnd = c.imgSnd.Add(end.Size(c.ep.SndNxt))
			c.ep.SndNxt = end
		}
		e.mark(c)
		e.sayInPieces(c, &s, fx)
	}
	e.unsay(c)
}

// sayInPieces sends a segment of local, which may be longer than a packet of the wire:
// the device cuts what a stack sends, but not what we inject.
func (e *Engine) sayInPieces(c *conn, s *packet.Segment, fx *Effects) {
	most := int(max(c.ep.Opt.MSS, 536))
	sp := packet.Spec{Src: c.id.Local, Dst: c.id.Remote, Seq: s.Seq, Ack: s.Ack, Flags: s.Flags, Window: s.Window,
		HasTS: s.Opt.HasTS, TSVal: s.Opt.TSVal, TSEcr: s.Opt.TSEcr}
	if sp.HasTS {
		most -= 12
	}
	p := s.Payload()
	for {
		n := min(len(p), most)
		sp.Payload = p[:n]
		if sp.Flags = s.Flags; n < len(p) {
			sp.Flags &^= packet.FIN | packet.PSH
		}
		fx.send(&sp, false)
		if p = p[n:]; len(p) == 0 {
			return
		}
		sp.Seq = sp.Seq.Add(uint32(n))
	}
}

// belowFloor tells whether s, a segment of the restored local side in its own numbers,
// brings octets that the remote had acknowledged before heartbeats moved the numbers:
// translated they would stand in the place of these.
func (c *conn) belowFloor(s *packet.Segment) bool {
	const far = 1 << 29
	if !c.floored || s.Len() == 0 {
		return false
	}
	if s.Seq.Less(c.floor) {
		return true
	}
	if s.Seq.Size(c.floor) > far { // before the numbers wrap round
		c.floored = false
	}
	return false
}

// tellAgain answers local in the remote's name: everything up to the floor has arrived.
func (e *Engine) tellAgain(c *conn, fx *Effects) {
	c.acknowledgesNow()
	sp := e.toLocal(c, packet.ACK)
	sp.Seq, sp.Ack = c.localSeqIn(c.base()), c.floor
	fx.send(&sp, true)
	fx.drop(SealedSilent)
}

// unburden plans the end of a translation that changes nothing: the connection was
// captured only until local had what was kept.
func (e *Engine) unburden(now Time, c *conn) {
	const quiet = 200e6
	if c.easeAt == 0 && c.brief && c.translated && !c.spooled && c.redoAt == 0 && len(c.own) == 0 {
		c.easeAt, c.easeBy = now+quiet, now+25*quiet
		e.atConn(c.easeAt, c)
	}
}

// ease ends it in a moment of silence: what the filter still has would be overtaken by
// what it does not see any more.
func (e *Engine) ease(now Time, c *conn, fx *Effects) {
	const quiet = 200e6
	c.easeAt = 0
	if !c.brief || !c.translated || c.spooled || c.redoAt != 0 || len(c.own) > 0 || c.app.state != appstate.Restored || c.tr != (rewrite.Translation{}) {
		return
	}
	if now-max(c.lastIn, c.lastOut, c.spokeAt) < quiet && now < c.easeBy {
		c.easeAt = now + quiet
		e.atConn(c.easeAt, c)
		return
	}
	c.brief, c.learned, c.rcvKnown = false, false, false
	e.flow(c, false, fx)
	c.app.settle(fx)
	e.mark(c)
}

// unclocked tells whether a segment of local is one that a restored socket had sent before
// RESTORED, and before it heard the remote's clock.
func (c *conn) unclocked(s *packet.Segment) bool {
	return s.Opt.HasTS && s.Opt.TSEcr == 0 && s.Has(packet.ACK) && c.ep.TSRec != 0
}

// clockless gives such a segment that clock.
func (c *conn) clockless(p *Packet, fx *Effects) {
	s := &c.app.engine.seg
	if p.Hook == HookPostrouting || !c.unclocked(s) {
		return
	}
	s.SetTS(s.Opt.TSVal, c.ep.TSRec)
	if p.Info&CsumNotReady != 0 {
		s.FillChecksum()
	}
	fx.modified(Pass, s.Raw())
}

// imagesBack notes that the sockets of these connections are there again.
func (e *Engine) imagesBack(a *app, ids []ConnID) (notes []string) {
	for _, id := range ids {
		c := e.conns[id]
		if c == nil || c.app != a || !c.image {
			notes = append(notes, fmt.Sprintf("%v %v: it is in no image", id.Local, id.Remote))
			continue
		}
		c.back()
	}
	return notes
}
