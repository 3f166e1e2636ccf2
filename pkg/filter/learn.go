package filter

import (
	"fmt"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Learning: what sock_diag tells of the connections at SNAPSHOTSTART, and what
// local says when it is asked.

// young connections may be missing in the list of sockets, which is older.
const young = 2e9

// prepare readies a structure for a snapshot. What bulk traffic has changed
// unseen is not known any more.
func (c *conn) prepare(now Time) {
	if !c.translated {
		c.learned, c.inKnown, c.rcvKnown = false, false, c.handshake && now-c.created <= young
	}
	c.listed, c.frozen, c.sealed, c.confirmed, c.localGone = false, false, false, false, false
	c.half, c.image, c.floored, c.ep.Behind = false, false, false, false
	c.asks, c.askFrom, c.askAt, c.discarded, c.fwd = 0, 0, 0, 0, false
	c.sendQueue, c.saidAll, c.ackedOK = 0, false, false
	c.last, c.lastIn, c.lastOut = nobody, 0, 0
	c.hsDone, c.hsStarted, c.hsError = false, false, ""
	c.ep.Closed, c.hole = false, false
	if !c.spooled {
		c.app.engine.dropHead(c)
	}
	if c.redoAt != 0 && !c.spooled { // a spool is handed on until the seal
		c.redoAt = 0
		c.finOwed = c.finIn && c.translated // the remote was told that it is taken and does not send it again
		c.app.engine.unkeep(c)
	}
}

// listed takes what sock_diag tells of one connection.
func (e *Engine) listed(now Time, a *app, s *Socket, silent bool, fx *Effects) {
	if !s.Established && !s.LocalClosed || !a.wants(s.ID) || e.byVIP[s.ID.Local.Addr()] != a {
		return
	}
	c := e.bySocket(s.ID)
	if c == nil {
		role := appstate.Active
		if s.Passive {
			role = appstate.Passive
		} else if !a.opens(s.ID.Remote.Port()) {
			return
		}
		if c = e.newConn(now, a, s.ID, role, appstate.Connect, fx); c == nil {
			return
		}
	}
	switch c.state {
	case appstate.SynRcvd, appstate.SynSent:
		c.set(appstate.Connect)
	}
	const listAge = 1e9 // the list may be older than a FIN just seen
	if s.Established && c.finOut && now-c.finOutAt < listAge {
		c.listed = true
		return
	}
	if s.LocalClosed { // its FIN may wait behind octets, unsent and unseen
		c.listed, c.half = true, silent && s.Owned && !s.RemoteClosed
		c.closedQueue(s)
		switch {
		case !c.translated: // of those every FIN that was sent is known
			c.finOut, c.finIn = true, s.RemoteClosed
			c.closing(now)
		case c.reloaded && !c.finOut: // but not to a filter that started since; nor its number
			const never = 1 << 30
			c.finOut, c.finOutEnd = true, c.ep.SndNxt.Add(never)
			if s.RemoteClosed && !c.finIn {
				c.finIn, c.finInEnd = true, c.ep.RcvNxt.Add(never)
			}
			c.closing(now)
		}
		return
	}
	// The socket knows whether a FIN was taken; one that was only seen may have
	// been an outsider's.
	if c.closeWait != s.CloseWait && c.translated {
		e.mark(c)
	}
	c.closeWait = s.CloseWait
	c.finOwed = c.finOwed && !s.CloseWait
	c.finIn, c.finOut, c.closed = s.CloseWait || c.owesFin() || c.finIn && c.finAt != 0 && now-c.finAt < listAge, false, false
	switch {
	case c.finIn && c.state == appstate.Connect:
		c.set(appstate.Closing)
		c.remoteFirst = true
	case !c.finIn && c.state == appstate.Closing:
		c.set(appstate.Connect)
	}
	c.expire = 0
	c.listed, c.ackSeen = true, true
	c.sendQueue = s.SendQueue
	if s.HasInfo {
		c.info(now, s)
	}
}

// info takes options and counters from tcp_info where the handshake was not
// seen, and an estimate of local's RCV.NXT where it was.
func (c *conn) info(now Time, s *Socket) {
	if s.LastRecv != 0 || s.LastSent != 0 {
		c.lastIn, c.lastOut = max(now-s.LastRecv, 1), max(now-s.LastSent, 1)
		c.last = localSpoke
		if s.LastRecv < s.LastSent {
			c.last = remoteSpoke
		}
		switch silent := s.BytesAcked <= 1 && s.SendQueue == 0; { // local has never said anything
		case silent && s.BytesReceived == 0:
			c.last = nobody
		case silent: // whatever the milliseconds say: its first request may have come with its handshake
			c.last = remoteSpoke
		}
	}
	if c.translated {
		next := c.acknowledges(c.hsIRS.Add(1 + uint32(s.BytesReceived)).Add(c.tr.In))
		if !c.learned { // an earlier filter opened it
			c.rcvKnown = true
			if !c.spooled { // else the record tells
				c.ep.RcvNxt = next
			}
		}
		c.listedAt(next)
		return
	}
	if !c.handshake {
		c.options(s)
	}
	if c.learned { // the socket's own word is there
		return
	}
	c.bytesIn, c.bytesOut = s.BytesReceived, s.BytesAcked
	if c.handshake {
		c.ep.RcvNxt = c.irs.Add(1 + uint32(s.BytesReceived))
		c.rcvKnown = true
		c.listedAt(c.ep.RcvNxt)
		c.acked, c.ackedOK = c.iss.Add(1+uint32(s.BytesAcked)), s.Passive // the other side's SYN counts too
	}
}

// options takes what both sides agreed on from tcp_info, also when the socket
// has spoken before: what it said did not tell them.
func (c *conn) options(s *Socket) {
	o := &c.ep.Opt
	o.TS, o.SACK, o.WScale = s.TS, s.SACK, s.WScale
	o.RemoteScale, o.LocalScale = s.RemoteScale, s.LocalScale
	mss := s.SndMSS
	if s.TS {
		mss += 12 // tcp_info counts without the option
	}
	o.MSS = uint16(min(mss, 65535))
}

// duePending answers requests that waited.
func (e *Engine) duePending(now Time, fx *Effects) {
	e.pending = slices.DeleteFunc(e.pending, func(p *pending) bool {
		switch b := p.body.(type) {
		case *SnapshotStart:
			return e.learnedAll(now, p, b, fx)
		case *Seal:
			return e.sealedAgain(now, p, fx)
		case *Restored:
			if now < p.deadline {
				return false
			}
			res, err := e.finishRestore(now, b, p.app, fx)
			fx.Replies = append(fx.Replies, Reply{ID: p.id, Body: res, Err: err})
			return true
		}
		return true
	})
}

// learnedAll answers SNAPSHOTSTART when every connection is learned or the
// time is over.
func (e *Engine) learnedAll(now Time, p *pending, b *SnapshotStart, fx *Effects) bool {
	a := p.app
	learned := 0
	var lacking []string
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		switch {
		case !c.alive():
		case c.refused != "":
			lacking = append(lacking, fmt.Sprintf("%v %v: %s", c.id.Local, c.id.Remote, c.refused))
		case !c.learned && b.Silent: // the image tells
		case !c.learned:
			if now < p.deadline {
				return false
			}
			lacking = append(lacking, fmt.Sprintf("%v %v: local did not tell its numbers in time", c.id.Local, c.id.Remote))
		default:
			learned++
		}
	}
	res := a.result()
	res.Learned = learned
	var err error
	if len(lacking) > 0 && !b.LeaveOut {
		e.backToRestored(now, a, fx, "snapshot refused")
		err = &Error{App: a.name, State: a.state, Text: "SNAPSHOTSTART refused: connections that cannot be held", Conns: lacking}
	} else {
		res.Notes = lacking
	}
	fx.Replies = append(fx.Replies, Reply{ID: p.id, Body: res, Err: err})
	return true
}

// ask makes local tell its numbers: a segment outside its window is answered
// with a duplicate ACK (RFC 9293 section 3.10.7.4). One octet of garbage is
// answered every time; where local's RCV.NXT is not known, two empty segments
// half the number space apart are sent instead: one of them is outside, and
// an empty one does no harm inside.
func (e *Engine) ask(now Time, c *conn, fx *Effects) {
	const again = 50e6
	sp := packet.Spec{Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.ACK}
	c.askAt = now + again
	if !c.asking {
		c.asking = true
		c.app.asked++
	}
	if c.learned || c.rcvKnown {
		if c.asks == 0 {
			c.askBase = c.localSeqIn(c.ep.RcvNxt).Add(^uint32(askBack) + 1)
		}
		c.asks++
		sp.Seq = c.askBase.Add(-c.asks)
		una := c.ep.SndUna
		if c.handshake && una == c.iss {
			una = una.Add(1) // an unfinished handshake would be answered with RST
		}
		sp.Ack = c.localSeqOut(una)
		sp.Payload = askPayload[:]
		fx.send(&sp, false)
		return
	}
	c.askAt = now + 10*again // local answers two empty ones a second
	e.askBlind(c, fx)
}

// askBlind makes local say its numbers where nothing of them is known.
func (e *Engine) askBlind(c *conn, fx *Effects) {
	sp := packet.Spec{Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.ACK, Seq: seqnum.Value(e.rand())}
	fx.send(&sp, false)
	sp.Seq = sp.Seq.Add(1 << 31)
	fx.send(&sp, false)
}

var askPayload = [1]byte{0}

// isAnswer tells whether s, an empty segment in local's view, answers an ask,
// and learns from it. Such a segment is for us alone.
func (e *Engine) isAnswer(now Time, c *conn, s *packet.Segment, fx *Effects) bool {
	if c.asking && c.handshake && !c.ackSeen && !c.learned && s.Flags&(packet.RST|packet.ACK) == packet.RST && s.Seq == c.iss.Add(1) {
		c.answered() // local has answered the SYN with a cookie and knows no connection yet
		return true
	}
	if c.asks == 0 || s.Flags&^(packet.ECE|packet.CWR) != packet.ACK || s.PayloadLen() != 0 {
		return false
	}
	serial := uint32(0)
	for i := range s.Opt.SACKBlocks {
		if l, _ := s.SACKBlock(i); l.InRange(c.askBase.Add(-c.asks), c.askBase) {
			serial = c.askBase.Size(l)
		}
	}
	seq, ack := s.Seq.Add(c.tr.Out), s.Ack.Add(c.tr.In)
	if serial == 0 { // no SACK: then nothing but a plain repetition is an answer, of which there is one
		if !c.asking || c.ep.Opt.SACK || !c.learned || seq != c.ep.SndNxt || ack != c.ep.RcvNxt {
			return false
		}
		serial = c.asks
	}
	c.answered()
	c.tellsHeld(s, c.tr.In)
	if c.ep.Opt.SACK || ack != c.irs.Add(1) {
		c.ackSeen = true // a socket with an unfinished handshake sends no DSACK
	}
	if c.spooled && !c.app.sealed { // it may be local's only word of it
		e.spoolTaken(now, c, ack, ack.Add(uint32(s.Window)<<c.tr.ScaleLocal), fx)
	}
	c.learn(now, s, seq, ack)
	if c.frozen && serial > c.askFrom {
		c.confirmed = true
	}
	return true
}

// learn takes local's numbers from the answer to an ask.
func (c *conn) learn(now Time, s *packet.Segment, seq, ack seqnum.Value) {
	ep := &c.ep
	fresh := !c.learned
	if fresh {
		c.learned = true
		ep.SndNxt, ep.RcvNxt = seq, c.acknowledges(ack)
		if !c.reloaded || c.saidAll || c.app.state == appstate.SnapshotStart {
			c.firstUna(seq)
			c.closedAt(seq)
		}
	}
	if ep.RcvNxt.Less(ack) {
		c.bytesIn += uint64(ack.Size(ep.RcvNxt))
		ep.RcvNxt = ack
	}
	if ep.SndNxt.Less(seq) {
		ep.SndNxt = seq
	}
	if s.Opt.HasTS {
		tsval, tsecr := s.Opt.TSVal+c.tr.TSOut, s.Opt.TSEcr+c.tr.TSIn
		if fresh {
			ep.TSVal, c.spokeAt = tsval, now
		}
		c.noteClock(now, tsval)
		if fresh || ep.TSAt == 0 || seqnum.NewerTS(tsecr, ep.TSRec) {
			ep.TSRec, ep.TSAt = tsecr, now // what local took for the remote's clock
			if fresh && c.lastIn != 0 {
				ep.TSAt = c.lastIn // it may be long ago: then it does not count as a clock
			}
		}
	}
	w := s.Window
	if c.translated {
		w = c.tr.Window(w, ack, &c.edge)
	}
	ep.Announced(ack, w, fresh)
}

// closedQueue takes what the socket s of a local side that has closed tells.
func (c *conn) closedQueue(s *Socket) {
	c.sendQueue, c.saidAll = s.SendQueue, true
	if s.HasInfo && !c.handshake && !c.translated {
		c.options(s)
	}
	switch {
	case c.translated:
	case c.learned && !c.finOut: // it passed before anything was captured, and behind the first list
		if c.ep.Guess {
			c.firstUna(c.ep.SndNxt)
		}
		c.closedAt(c.ep.SndNxt)
	case !c.learned && c.handshake && s.HasInfo:
		c.ep.RcvNxt, c.rcvKnown = c.irs.Add(1+uint32(s.BytesReceived)), true
	}
}

// closedAt takes the end of what local, which had closed, has sent for that of its
// FIN, which may have passed while no filter was there. A translation must not end
// too early: there only SNAPSHOTDONE does that.
func (c *conn) closedAt(next seqnum.Value) {
	if c.saidAll && !c.translated {
		c.finOutEnd = next
	}
}

// firstUna sets SND.UNA when local's numbers become known: what was
// acknowledged when the sockets were listed. Where only the length of the send
// queue is known from then, what local has said since seems to be acknowledged
// and may not be: then only the remote's own word is handed on to local. One
// that had closed has said nothing since: there no old acknowledgement counts.
func (c *conn) firstUna(next seqnum.Value) {
	c.ep.SndUna, c.ep.Guess = next.Add(-c.sendQueue), !c.saidAll
	if c.ackedOK && c.acked.LessEq(next) {
		c.ep.SndUna, c.ep.Guess = c.acked, false
	}
}
