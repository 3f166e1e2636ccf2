package filter

import (
	"bytes"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// Spooling: octets that come while the application is away are acknowledged to
// the remote, at most a.spool of each connection, and handed to the restored
// local side in order. They are the filter's to keep: recorded before they are
// acknowledged, and until local has taken them.
//
// c.kept holds them from c.keptAt on, the number at which local stands; of a
// spooled connection ep.RcvNxt is behind all of them, and behind the FIN.

// Chunk is a piece of a spool: octets of the connection from At on.
type Chunk struct {
	At   seqnum.Value
	Data []byte
}

// Spool tells whether records can be kept. While they cannot, nothing more is
// acknowledged into spools: remotes wait with their data.
func (e *Engine) Spool(on bool) { e.noSpool = !on }

// spools tells whether octets of c are acknowledged while its application is away.
func (c *conn) spools() bool {
	s := c.app.state
	return c.app.spool > 0 && (s == appstate.SnapshotDone || s == appstate.RestoreStart) && c.state != appstate.Rst
}

// base is the number of the next octet that local is to take.
func (c *conn) base() seqnum.Value {
	if c.spooled {
		return c.keptAt
	}
	return c.ep.RcvNxt
}

// spoolNews takes the octets and the FIN of the segment at hand into the spool.
func (e *Engine) spoolNews(now Time, a *app, c *conn, v tcpemu.Verdict, fx *Effects) {
	s := &e.seg
	reason := HeldSpooled
	if took := e.spool(c, s, fx); !took {
		reason = HeldDataDropped
		if v == tcpemu.Finish {
			reason = HeldFin
		}
	}
	e.keepHead(c, s)
	fx.drop(reason)
	if c.token(now, s) || reason == HeldSpooled {
		sp := c.ep.Ack()
		fx.send(&sp, false)
	}
	if !a.wakeFull || c.ep.Closed || c.keptFin {
		e.wakeUp(now, a, reason, fx)
	}
}

// spool takes what of s is next in order and has room, and reports whether it
// was anything.
func (e *Engine) spool(c *conn, s *packet.Segment, fx *Effects) bool {
	if c.ep.RcvNxt.Less(s.Seq) || c.keptFin {
		return false // behind a hole: the remote sends it again
	}
	if e.noSpool {
		c.ep.Closed = true
		return false
	}
	p := s.Payload()
	p = p[min(int(c.ep.RcvNxt.Size(s.Seq)), len(p)):]
	room := max(c.app.spool-len(c.kept), 0)
	whole := len(p) <= room
	if !whole {
		p = p[:room]
	}
	fin := whole && s.Has(packet.FIN)
	if len(p) > 0 && !e.spoolOctets(c, p, fx) {
		return false
	}
	if fin {
		c.keptFin = true
		c.spooled = true
		if len(c.kept) == 0 {
			c.keptAt = c.ep.RcvNxt
		}
		c.ep.RcvNxt = c.ep.RcvNxt.Add(1)
	}
	c.keepUrgent(s)
	c.spoolWindow()
	if len(p) == 0 && !fin {
		return false
	}
	e.mark(c)
	return true
}

// spoolOctets appends p to the spool, under the budgets of memory.
func (e *Engine) spoolOctets(c *conn, p []byte, fx *Effects) bool {
	if !c.spooled && len(c.kept) == 0 {
		c.keptAt = c.ep.RcvNxt
	}
	if !e.keepRoom(c, len(p), c.app.spool) {
		c.ep.Closed = true
		return false
	}
	fx.Records = append(fx.Records, Record{ID: c.id, Chunk: &Chunk{At: c.keptAt.Add(uint32(len(c.kept))), Data: bytes.Clone(p)}})
	c.kept = append(c.kept, p...)
	c.spooled, c.chunks = true, true
	c.ep.RcvNxt = c.ep.RcvNxt.Add(uint32(len(p)))
	c.bytesIn += uint64(len(p))
	e.dropHead(c)
	return true
}

// spoolWindow announces no more than the spool takes. A window of less than a
// segment is none (RFC 9293 section 3.8.6.2.2).
func (c *conn) spoolWindow() {
	const segment = 1460
	room := c.app.spool - len(c.kept)
	if room < min(segment, c.app.spool) || c.keptFin {
		c.ep.Closed = !c.keptFin // whoever has closed sends no more
		return
	}
	field := min(uint32(room)>>c.ep.Opt.LocalScale, 65535)
	c.ep.Window = max(uint16(field), 1)
	c.ep.Closed = false
	c.ep.Extend()
}

// spoolKept acknowledges at SNAPSHOTDONE what was only kept until then. What an
// earlier local side left of its spool was acknowledged before.
func (e *Engine) spoolKept(c *conn, fx *Effects) {
	if !c.spools() || c.spooled || c.finOwed || c.state != appstate.ConnectRmt || len(c.kept) == 0 && !c.keptFin {
		return
	}
	p, fin := c.kept, c.keptFin
	if len(p) > c.app.spool {
		return
	}
	c.kept, c.keptFin = p[:0], false
	if len(p) > 0 && !e.spoolOctets(c, p, fx) {
		c.kept, c.keptFin = p, fin
		return
	}
	if c.keptFin = fin; fin {
		c.spooled = true
		c.ep.RcvNxt = c.ep.RcvNxt.Add(1)
	}
	c.spoolWindow()
	e.mark(c)
	sp := c.ep.Ack()
	fx.send(&sp, false)
}

// deliver hands the spool to local, as far as local's window goes.
func (e *Engine) deliver(now Time, c *conn, from, edge seqnum.Value, fx *Effects) {
	most := c.largest()
	at := int(from.Size(c.keptAt))
	room := int(max(edge.Sub(from), 0))
	for at < len(c.kept) && room > 0 {
		n := min(len(c.kept)-at, most, room)
		seq := c.keptAt.Add(uint32(at))
		e.handSegment(c, c.localSeqIn(seq), c.kept[at:at+n], c.keptFin && at+n == len(c.kept), fx)
		at, room = at+n, room-n
	}
	if at == len(c.kept) && c.keptFin && (len(c.kept) == 0 || from == c.keptAt.Add(uint32(at))) {
		e.handSegment(c, c.localSeqIn(c.keptAt.Add(uint32(at))), nil, true, fx)
	}
	c.sentTo = c.keptAt.Add(uint32(at))
}

// spoolTaken is called with local's acknowledgement ack and right edge, in the remote's
// numbers: what is acknowledged is forgotten, and what has room is handed over.
func (e *Engine) spoolTaken(now Time, c *conn, ack, edge seqnum.Value, fx *Effects) {
	end := c.keptEnd()
	if end.LessEq(ack) {
		if c.keptFin {
			c.finIn, c.finInEnd, c.remoteFirst = true, end, !c.finOut
			c.closing(now)
		}
		head := c.head
		e.endSpool(c, fx)
		if s := c.app.state; s == appstate.Restored || s == appstate.SnapshotStart {
			e.handHead(now, c, head, fx)
		}
		return
	}
	news := ack.Sub(c.keptAt)
	if news > 0 {
		e.unspool(c, min(int(news), len(c.kept)))
		c.keptAt = ack
		c.retries = 0
	}
	from := c.sentTo
	if from.Less(c.keptAt) {
		from = c.keptAt
	}
	if from.Less(edge) && from.Less(c.keptAt.Add(uint32(len(c.kept)))) {
		c.acknowledgesNow()
		e.deliver(now, c, from, edge, fx)
	}
	if news > 0 || c.redoAt == 0 { // else local, which may speak all the time, still lacks what it was handed
		c.redoAt = now + 200e6
		e.atConn(c.redoAt, c)
	}
}

// handHead hands a head to local, which has taken the spool before it.
func (e *Engine) handHead(now Time, c *conn, head []byte, fx *Effects) {
	if e.useHead(c, head); len(c.kept) == 0 {
		return
	}
	c.acknowledgesNow()
	e.handKept(c, fx)
	e.redoSoon(now, c)
}

// unspool forgets the first n octets, which local has taken.
func (e *Engine) unspool(c *conn, n int) {
	before := cap(c.kept)
	c.kept = c.kept[n:]
	e.kept -= before - cap(c.kept)
	c.app.kept -= before - cap(c.kept)
}

// spoolAgain hands over again what local has not acknowledged in time.
func (e *Engine) spoolAgain(now Time, c *conn, fx *Effects) {
	if s := c.app.state; s != appstate.Restored && s != appstate.SnapshotStart && (s != appstate.SnapshotFreeze || c.app.sealed) {
		return
	}
	c.acknowledgesNow()
	// One segment always: local may have no window, or its update was lost.
	e.deliver(now, c, c.keptAt, c.keptAt.Add(uint32(c.largest())), fx)
	c.retries = min(c.retries+1, 8)
	c.redoAt = now + 30e6<<c.retries
	e.atConn(c.redoAt, c)
}

// recordSpool has the whole spool recorded, in pieces that a journal likes.
func (e *Engine) recordSpool(c *conn, fx *Effects) {
	const piece = 64 << 10
	if !c.spooled {
		return
	}
	for at := 0; at < len(c.kept); at += piece {
		p := c.kept[at:min(at+piece, len(c.kept))]
		fx.Records = append(fx.Records, Record{ID: c.id, Chunk: &Chunk{At: c.keptAt.Add(uint32(at)), Data: bytes.Clone(p)}})
	}
}

// endSpool forgets the spool, which local has taken.
func (e *Engine) endSpool(c *conn, fx *Effects) {
	if c.chunks {
		fx.Records = append(fx.Records, Record{ID: c.id, Unspool: true})
	}
	c.spooled, c.chunks, c.redoAt = false, false, 0
	e.unkeep(c)
	e.mark(c)
}

// ahead makes s, a segment of local to the remote, say what the remote knows
// already where local has not taken the spool yet: its acknowledgement does not go
// back, and its window counts from there.
func (c *conn) ahead(s *packet.Segment) {
	told := c.ep.RcvNxt
	if !c.spooled || !s.Has(packet.ACK) || !s.Ack.Less(told) {
		return
	}
	edge := s.Ack.Add(uint32(s.Window) << c.ep.Opt.LocalScale)
	room := uint32(max(edge.Sub(told), 0))
	s.SetAck(told)
	s.SetWindow(uint16(min(room>>c.ep.Opt.LocalScale, 65535)))
}
