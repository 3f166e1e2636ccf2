package filter

import (
	"fmt"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// speaker tells whose payload was seen last.
type speaker uint8

const (
	nobody speaker = iota
	remoteSpoke
	localSpoke
)

// conn is one connection structure. Numbers in ep are the remote's view.
type conn struct {
	app   *app
	index int // in app.conns
	id    ConnID
	role  appstate.Role
	state appstate.Conn
	ep    tcpemu.Endpoint

	handshake bool         // SYN and SYN-ACK were seen: iss, irs and options are exact
	iss, irs  seqnum.Value // initial numbers, remote's view
	ackSeen   bool         // the remote is known to have completed the handshake
	syn       pendingSyn
	listed    bool   // found by sock_diag at SNAPSHOTSTART
	learned   bool   // ep's numbers are current
	refused   string // why this connection cannot be held, "" when it can
	created   Time

	stats             connStats
	bytesIn, bytesOut uint64
	inEnd             seqnum.Value // behind the last octet that passed to local
	inKnown           bool         // inEnd is of now
	lastIn, lastOut   Time         // of payload
	spokeAt           Time         // when ep.TSVal was taken from local
	last              speaker

	finIn, finOut       bool // FIN passed to local, to the remote
	finInEnd, finOutEnd seqnum.Value
	closeWait           bool // sock_diag showed CLOSE_WAIT, of the socket of now
	finAt               Time // when a remote's FIN was seen without its number being known
	finOutAt            Time // when a FIN of local went to the remote
	remoteFirst, closed bool // the remote closed first; both closes were acknowledged
	expire              Time // when a closed connection is forgotten, 0: not
	lingers             bool // local's FIN is the filter's to repeat
	closeAt             Time // when it is repeated, 0: not
	closeTries          uint8

	// The snapshot under way, and the hold.
	frozen    bool
	sealed    bool
	confirmed bool         // local told its numbers after the freeze
	rcvKnown  bool         // ep.RcvNxt is near enough for an ask, though ep is not learned
	asks      uint32       // asks sent in this snapshot
	askFrom   uint32       // asks up to here were sent before the freeze
	asking    bool         // an ask is not answered yet
	askBase   seqnum.Value // number that asks count down from, local's view
	probeAt   Time         // not before then is the remote asked
	askAt     Time         // not before then is local asked again
	sendQueue uint32       // octets that sock_diag showed unacknowledged at SNAPSHOTSTART
	saidAll   bool         // local had closed by then
	acked     seqnum.Value // what it showed acknowledged
	ackedOK   bool         // acked is known
	localGone bool
	fwd       bool // fwdAck and fwdWnd were handed to local
	fwdAt     Time
	fwdAck    seqnum.Value
	fwdWnd    uint16
	discarded uint64
	hole      bool         // at SNAPSHOTDONE the remote had not acknowledged everything
	finOwed   bool         // the remote's FIN was acknowledged to it and not taken by local yet
	kept      []byte       // payload from keptAt on
	keptAt    seqnum.Value // RCV.NXT of the hold
	keptFin   bool
	head      []byte       // payload from headAt on for which there was no room
	headAt    seqnum.Value // then RCV.NXT
	spooled   bool         // what is kept was acknowledged to the remote
	chunks    bool         // and is recorded
	sentTo    seqnum.Value // of it, handed to local
	own       []byte       // what we have said and the remote has not acknowledged
	ownEnd    seqnum.Value // behind it
	ownAt     Time         // when it is said again
	ownTries  uint8
	beatOf    uint8        // the periodic heartbeat that is due
	beatAt    Time         // then
	keptUrg   seqnum.Value // behind the urgent octets of it (RFC 9293 section 3.8.5)
	urgent    bool         // keptUrg is known
	scan      *follower    // of the remote's requests, nil with boundary "turn"
	bound     seqnum.Value // the boundary at which it was frozen: local gets nothing from there on
	bounded   bool         // bound is known
	exact     bucket       // for answers to segments that only the remote can send
	strange   bucket       // for answers to all others

	// The handshake with the returning local side.
	activate  bool // local's next SYN to this remote is for this one
	fresh     bool // local opened it while it was restored: it passes
	hsIRS     seqnum.Value
	hsISN     seqnum.Value
	hsTS      uint32 // TSval of its SYN-ACK
	hsClock   uint32 // and of our SYN
	hsStarted bool
	hsDone    bool
	hsOver    bool // a SYN was sent behind that
	hsTries   uint32
	hsError   string
	hsRsts    uint8 // how often local accepted and reset it in this restore
	turned    bool  // local does not want it: reset at RESTORED
	retries   uint8
	redoAt    Time
	hsWindow  uint16
	hsEnd     seqnum.Value // SND.NXT at which it was opened, remote's view
	hsMSS     uint16       // that local announced, 0: none
	forwarded bool         // local is in a network namespace behind the node

	// In an image.
	half       bool         // local has closed its side alone, and its socket is a process's
	image      bool         // its socket is in the image
	imgUna     seqnum.Value // local's own numbers: acknowledged,
	imgSnd     seqnum.Value // at what the remote expects next,
	imgRcv     seqnum.Value // next to be received,
	imgWup     seqnum.Value // acknowledged last,
	imgEnd     seqnum.Value // behind all that the process has written
	unread     bool         // the image holds octets that the process has not read
	said       [][]byte     // by the restored socket before RESTORED
	clocked    seqnum.Value // hsISN of what it was told before that
	wasClocked bool
	floored    bool         // floor is known
	floor      seqnum.Value // local's octets below it are not to be translated
	brief      bool         // it is translated only until local has what was kept
	easeAt     Time         // when that may end, 0: not planned
	easeBy     Time         // when it does in any case

	marked, saved bool // to be recorded at the end of the step; recorded
	reloaded      bool // taken up from an earlier filter, and not opened since
	silent        bool // which had seen nothing of local since its SYN-ACK
	shut          bool // the remote was told of a closed window until it was opened

	oldClock   bool // the remote has not spoken since the clock that local was told is outdated
	translated bool
	opened     Time // when it was
	tr         rewrite.Translation
	edge       rewrite.Edge
}

// set moves the connection to another state: the one door. An impossible
// transition is an error of ours, never of a packet.
func (c *conn) set(n appstate.Conn) {
	if !c.state.CanFollow(n) {
		panic(fmt.Sprintf("filter: connection %v: %v cannot become %v", c.id, c.state, n))
	}
	if c.state == n {
		return
	}
	c.app.count[c.state]--
	c.state = n
	c.app.count[n]++
	if c.app.state.Away() && c.app.state != appstate.RestoreStart && !c.app.derive {
		c.app.engine.mark(c)
	}
}

// parked makes c one whose application is away for good. It is not recorded:
// it follows from the application's state.
func (c *conn) parked() {
	c.app.derive = true
	defer func() { c.app.derive = false }()
	c.frozen, c.sealed = true, true
	c.hole = !c.image && c.lost() > 0                                                       // only by force
	if c.translated && c.saidAll && c.sendQueue == 1 && c.ep.SndUna.Add(1) == c.ep.SndNxt { // what is missing is the FIN
		c.finOutEnd = c.ep.SndNxt
	}
	c.lingers = c.lingers || !c.half && c.lostFin()
	if c.state == appstate.Connect && c.alive() || c.state == appstate.Closing && (!c.finOut || c.half) {
		c.set(appstate.ConnectRmt)
	}
}

// toLocal and toRemote translate numbers between the two views.
func (c *conn) localSeqIn(v seqnum.Value) seqnum.Value  { return v.Add(-c.tr.In) }
func (c *conn) localSeqOut(v seqnum.Value) seqnum.Value { return v.Add(-c.tr.Out) }

// localAddr is the address of local's own socket.
func (c *conn) localAddr() netip.AddrPort {
	if c.tr.Port != 0 {
		return netip.AddrPortFrom(c.id.Local.Addr(), c.tr.Port)
	}
	return c.id.Local
}

// alive tells whether the connection has a remote that must be kept.
func (c *conn) alive() bool {
	switch c.state {
	case appstate.Connect:
		return c.ackSeen || c.listed // else the handshake has no end yet
	case appstate.ConnectRmt, appstate.Restoring:
		return true
	case appstate.Closing: // the remote closed, local still speaks
		return c.finIn && !c.finOut || c.half
	}
	return false
}

// restorable tells whether RESTORECONN has to bring the connection back.
func (c *conn) restorable() bool {
	switch c.state {
	case appstate.ConnectRmt, appstate.Rst, appstate.Restoring:
		return c.ackSeen && !c.hsDone
	}
	return false
}

// bucket limits acknowledgements: two held ends that disagree must not answer
// each other at the speed of the wire.
type bucket struct {
	spent uint8 // tokens that are not there
	at    Time
}

func (b *bucket) take(now Time) bool {
	const burst, every = 32, 10e6
	if n := (now - b.at) / every; n > 0 {
		b.spent -= uint8(min(int64(b.spent), n))
		b.at = now
	}
	if b.spent == burst {
		return false
	}
	b.spent++
	return true
}

// token takes one of the acknowledgements that a remote may be given in short
// order. Who cannot know the connection's numbers has a budget of its own, so
// that a flood of guesses does not use up the answers to keepalives.
func (c *conn) token(now Time, s *packet.Segment) bool {
	if s.Ack == c.ep.Next() && s.Seq.InRange(c.ep.RcvNxt.Add(^uint32(0)), c.ep.Edge.Max(c.ep.RcvNxt).Add(1)) {
		return c.exact.take(now)
	}
	return c.strange.take(now)
}

// observeIn takes note of a remote's segment that passes to local; numbers
// are the remote's view.
func (c *conn) observeIn(now Time, s *packet.Segment) {
	if s.Has(packet.SYN) {
		return
	}
	speaks := s.PayloadLen() > 0
	if speaks && !c.learned { // anybody's, for the time being
		c.lastIn, c.last = now, remoteSpoke
	}
	if s.Has(packet.FIN) && !c.learned {
		c.finInEnd, c.finAt = s.End(), now
		if !c.translated { // a guess: sock_diag tells at SNAPSHOTSTART. Others do not end by one: local's answer tells
			c.finIn = true
			c.closing(now)
		}
	}
	if !s.Has(packet.ACK) {
		return
	}
	if !c.learned {
		c.ownAcked(s)
		c.ackSeen = c.ackSeen || c.handshake && s.Ack == c.ep.SndNxt
		return
	}
	// Only a segment that local takes tells anything: outsiders send others.
	if !c.plausible(s) {
		return
	}
	c.ackSeen = true
	if speaks && c.ep.RcvNxt.Less(s.End()) { // a keepalive may hold an octet that local has
		c.lastIn, c.last = now, remoteSpoke
	}
	if !c.inKnown || !c.ep.RcvNxt.Less(c.inEnd) {
		c.inEnd, c.inKnown = c.ep.RcvNxt, true
	}
	if s.Seq.LessEq(c.inEnd) && c.inEnd.Less(s.End()) { // nothing that is ahead of a hole
		c.inEnd = s.End()
	}
	c.ep.NoteWindow(s)
	c.ep.Acked(s.Ack)
	c.ownAcked(s)
	if c.oldClock && s.Opt.HasTS {
		c.oldClock = false
		c.newClock(s.Opt.TSVal)
	}
	// RFC 7323 section 4.3: up to the last acknowledgement that local sent.
	if s.Opt.HasTS && s.Seq.LessEq(c.ep.RcvNxt) && (seqnum.NewerTS(s.Opt.TSVal, c.ep.TSRec) || c.ep.Outdated(now)) {
		c.ep.TSRec, c.ep.TSAt = s.Opt.TSVal, now
	}
	if s.Has(packet.FIN) && !c.tookFin() { // the last word counts until local has taken one
		c.finIn, c.finInEnd = true, s.End()
	}
	c.closing(now)
}

// newClock has local see the remote's clock tsval go on from the one that the
// SYN brought, if it has gone half way round since: local would take everything
// for old duplicates (RFC 7323 section 5.5).
func (c *conn) newClock(tsval uint32) {
	if c.ep.Opt.TS && seqnum.NewerTS(c.hsClock, tsval-c.tr.TSIn) {
		c.tr.TSIn = tsval - c.hsClock
		c.ep.TSRec = tsval
		c.app.engine.mark(c)
	}
}

// tookFin tells whether local has taken the remote's FIN: nothing can come
// behind it.
func (c *conn) tookFin() bool {
	return c.finIn && c.learned && (c.closeWait || c.finInEnd == c.ep.RcvNxt)
}

// owesFin tells whether the remote's FIN was acknowledged to it and is still to
// be taken by local.
func (c *conn) owesFin() bool { return c.finOwed || c.finIn && c.redoAt != 0 }

// acknowledges gives what ack, which local says when its numbers were not known,
// means to the remote: a FIN or a spool that it was told to be taken is not taken back.
func (c *conn) acknowledges(ack seqnum.Value) seqnum.Value {
	if c.spooled {
		return ack.Max(c.keptEnd())
	}
	if c.owesFin() && ack.Add(1) == c.finInEnd {
		return c.finInEnd
	}
	return ack
}

// settleFin makes finIn what local's confirmed numbers say: a FIN that was only
// seen came ahead of octets that were lost, or from an outsider.
func (c *conn) settleFin() {
	if !c.finIn || c.tookFin() || c.owesFin() {
		return
	}
	c.finIn = false
	c.app.engine.mark(c)
	if c.state == appstate.Closing && !c.finOut {
		c.set(appstate.Connect)
	}
}

// plausible tells whether s lies in the window, or just below it as a
// keepalive does, and acknowledges something that local may have sent (RFC 9293
// section 3.10.7.4, RFC 5961 section 5.2). Everything of local was seen before
// the remote can answer it.
func (c *conn) plausible(s *packet.Segment) bool {
	const most = 1 << 20 // the largest window of a remote that old acknowledgements may lie in
	ep := &c.ep
	return ep.RcvNxt.LessEq(s.End().Add(1)) && s.Seq.LessEq(ep.Edge.Max(ep.RcvNxt)) &&
		s.Ack.InRange(ep.SndUna.Add(^uint32(most)+1), ep.SndNxt.Add(1))
}

// observeOut takes note of a segment of local that goes to the remote;
// numbers are the remote's view. exact: everything of the connection is
// captured, so that numbers that were unknown are now known.
func (c *conn) observeOut(now Time, s *packet.Segment, exact bool) {
	if s.Has(packet.SYN) || !s.Has(packet.ACK) {
		return
	}
	n := uint32(s.PayloadLen())
	end := s.End()
	c.tellsHeld(s, 0)
	if exact && c.handshake && !c.translated && (end != c.iss.Add(1) || s.Ack != c.irs.Add(1)) {
		c.ackSeen = true // an unfinished handshake has neither taken nor sent octets
	}
	fresh := !c.learned
	if fresh {
		if !exact {
			c.finish(now, s)
			return
		}
		c.ep.SndNxt, c.ep.RcvNxt = end, c.acknowledges(s.Ack)
		if !c.reloaded || c.saidAll || c.app.state == appstate.SnapshotStart { // else what was recorded is the remote's own word
			next := s.Seq
			if c.saidAll && s.Has(packet.FIN) {
				next = end // the queue counts all of it
			}
			if c.firstUna(next); n == 0 {
				c.closedAt(next)
			}
		}
		if s.Opt.HasTS {
			if c.ep.TSAt == 0 || c.reloaded && seqnum.NewerTS(s.Opt.TSEcr, c.ep.TSRec) {
				c.ep.TSRec, c.ep.TSAt = s.Opt.TSEcr, now
			}
			c.ep.TSVal, c.spokeAt = s.Opt.TSVal, now
		}
		c.learned = true
		if c.translated && c.finAt != 0 && s.Ack == c.finInEnd { // it was the remote's
			c.finIn = true
			c.closing(now)
		}
		c.bytesOut += uint64(n)
		if c.translated {
			c.settleFin()
		}
	} else {
		if c.ep.SndNxt.Less(end) {
			c.bytesOut += uint64(end.Size(c.ep.SndNxt))
			c.ep.SndNxt = end
		}
		if c.ep.RcvNxt.Less(s.Ack) {
			c.bytesIn += uint64(s.Ack.Size(c.ep.RcvNxt))
			c.ep.RcvNxt = s.Ack
		}
		if s.Opt.HasTS {
			c.noteClock(now, s.Opt.TSVal)
		}
	}
	if n > 0 {
		c.lastOut, c.last = now, localSpoke
		c.askedAgain()
	}
	if (s.Ack == c.ep.RcvNxt || fresh) && !s.Has(packet.RST) {
		c.ep.Announced(s.Ack, s.Window, fresh)
	}
	c.finish(now, s)
}

// noteClock takes local's timestamp. One that seems to be older comes of a
// segment that was overtaken, or, after a long silence, of a clock that has
// gone half way round (RFC 7323 section 5.5).
func (c *conn) noteClock(now Time, tsval uint32) {
	const halfWay = 24 * 24 * 3600e9
	if seqnum.NewerTS(tsval, c.ep.TSVal) || now-c.spokeAt > halfWay {
		c.ep.TSVal = tsval
	}
	c.spokeAt = now
}

func (c *conn) finish(now Time, s *packet.Segment) {
	if s.Has(packet.FIN) {
		c.finOut, c.finOutEnd, c.finOutAt = true, s.End(), now
		if c.app.state == appstate.SnapshotFreeze { // local's stack goes on with the remote by itself
			if !c.spooled { // that is local's alone
				c.app.engine.unkeep(c)
			}
			c.ep.Closed = false
		}
	}
	c.closing(now)
}

// closing moves a connection that one side or both have closed. The structure
// of a translated one goes when the close was acknowledged and whoever waits in
// TIME_WAIT needs it no more; of others nothing depends.
func (c *conn) closing(now Time) {
	if !c.finIn && !c.finOut {
		return
	}
	if c.state == appstate.Connect || c.state == appstate.SynRcvd {
		c.set(appstate.Closing)
		c.remoteFirst = c.finIn && !c.finOut
	}
	if !c.finIn || !c.finOut {
		return
	}
	linger := Time(5e9)
	if c.translated {
		linger = 130e9
		if c.finOutEnd.LessEq(c.ep.SndUna) && c.finInEnd.LessEq(c.ep.RcvNxt) {
			if c.closed {
				return
			}
			c.closed = true
			linger = 65e9 // local waits 60 s
			if c.remoteFirst {
				linger = 2e9
			}
			c.expire = 0
		}
	}
	if c.expire == 0 {
		c.expireIn(now, linger)
	}
}

// keptEnd is the number behind everything kept.
func (c *conn) keptEnd() seqnum.Value {
	end := c.keptAt.Add(uint32(len(c.kept)))
	if c.keptFin {
		end = end.Add(1)
	}
	return end
}

// answered frees the place of an ask, by its answer or because it is lost.
func (c *conn) answered() {
	if c.asking {
		c.asking = false
		c.app.asked--
	}
}

// unsureFor is how long after SNAPSHOTSTART a snapshot waits for connections
// that were opened between the list of sockets and the request: time for
// several asks.
const unsureFor = 200e6

// missing names what keeps a frozen connection from being accounted for.
func (c *conn) missing(now Time) string {
	switch {
	case c.refused != "":
		return c.refused
	case c.app.silent && c.app.imaged:
		return "" // SEAL has compared it
	case c.app.silent && c.alive():
		return "it was not compared with the image yet"
	case c.app.silent:
		return ""
	case c.spooled && !c.sealed && c.learned:
		return fmt.Sprintf("%d octets that came while local was away are not taken by it yet", len(c.kept))
	case c.state == appstate.Closing && c.finOut:
		// A FIN alone may stay unanswered; octets may not.
		if c.unheard() && !c.app.sealed && now-c.app.since < unheardFor {
			return "local has closed and its numbers are not learned yet"
		}
		if c.reloaded && !c.app.sealed && now-c.app.since >= unheardFor {
			return "" // its remote does not say what an earlier filter may have seen acknowledged
		}
		if n := c.ep.SndNxt.Size(c.ep.SndUna); c.learned && n > 1 {
			return fmt.Sprintf("local has closed and %d octets are not acknowledged by the remote", n-1)
		}
		return ""
	case c.state == appstate.SynRcvd && c.learned: // local spoke, and did not answer that SYN
		return "local has a connection there that is not known yet"
	case c.state == appstate.SynSent && c.reloaded && !c.app.sealed: // an earlier filter saw the SYN, maybe its answer too
		return "it is not known whether local has a connection there"
	case c.state == appstate.Connect && !c.alive():
		if !c.listed && c.handshake && now-c.app.since < unsureFor {
			return "it is not known yet whether its handshake has come to an end"
		}
		return ""
	case !c.alive():
		return ""
	case !c.learned:
		return "its numbers are not learned yet"
	case c.discarded > 0:
		return fmt.Sprintf("%d octets from local after the seal were discarded", c.discarded)
	case !c.frozen && !c.sealed:
		return c.missingBoundary()
	case c.ep.SndUna != c.ep.SndNxt:
		return fmt.Sprintf("%d octets sent are not acknowledged by the remote", c.ep.SndNxt.Size(c.ep.SndUna))
	case c.sealed:
		return ""
	case c.short():
		return fmt.Sprintf("local has not taken the last %d octets before its boundary", c.bound.Size(c.ep.RcvNxt))
	case c.bounded && c.bound.Less(c.ep.RcvNxt):
		return fmt.Sprintf("local has taken %d octets behind its boundary", c.ep.RcvNxt.Size(c.bound))
	case !c.confirmed:
		return "local has not confirmed its numbers"
	case c.lastOut != 0 && now-c.lastOut < c.app.quiet:
		return "local is still speaking"
	case c.scan != nil && c.lastIn != 0 && now-c.lastIn < c.app.quiet:
		return "local may still answer"
	}
	return ""
}
