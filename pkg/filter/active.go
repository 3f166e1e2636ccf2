package filter

import (
	"cmp"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// Active connections: local opened them, with the VIP as its address. They are
// held like passive ones. The restored application opens them again by itself:
// its SYN is caught, never leaves the node, and is answered in the remote's
// name; its port is translated from then on.

// oneWay is after how many quiet times an active connection on which local
// spoke last counts as one that is not answered. Until then local waits for a reply.
const oneWay = 20

// opens tells whether connections that local opens to a remote port are followed.
func (a *app) opens(remote uint16) bool {
	return len(a.outgoing) == 0 || slices.Contains(a.outgoing, remote)
}

// socketID is the connection as local's own socket has it.
func (c *conn) socketID() ConnID { return ConnID{Local: c.localAddr(), Remote: c.id.Remote} }

// bySocket finds the connection of one of local's sockets.
func (e *Engine) bySocket(id ConnID) *conn {
	if c := e.alias[id]; c != nil {
		return c
	}
	if c := e.conns[id]; c != nil && c.socketID() == id {
		return c
	}
	return nil
}

// setPort gives the connection's local side a port of its own; 0: the one
// that the remote knows.
func (e *Engine) setPort(c *conn, port uint16) {
	if id := c.socketID(); e.alias[id] == c {
		delete(e.alias, id)
	}
	if c.tr.Port = port; port != 0 {
		e.alias[c.socketID()] = c
	}
}

// synOut notes a SYN of local for a connection that it opens. It becomes one
// when the remote answers it; c may be nil.
func (e *Engine) synOut(now Time, a *app, c *conn, id ConnID, fx *Effects) {
	s := &e.seg
	fx.accept(HandshakePass)
	if o := e.conns[id]; c == nil && o != nil && !o.alive() {
		e.remove(o, fx) // its end is not everybody's knowledge yet
	} else if c == nil && o != nil {
		// The remote has a connection with this port of ours, local has another
		// port for it: a SYN would end that one (RFC 5961 section 4.2). Local
		// takes another port when it tries again.
		fx.drop(PortTaken)
		sp := tcpemu.RefuseSyn(s)
		fx.send(&sp, true)
		return
	}
	if c == nil {
		if a.listens(id.Local.Port()) || !a.opens(id.Remote.Port()) {
			return
		}
		if c = e.newConn(now, a, id, appstate.Active, appstate.SynSent, fx); c == nil {
			return
		}
		c.opening(now)
	}
	c.syn = pendingSyn{seen: true, out: true, irs: s.Seq, end: s.End(), opt: s.Opt, window: s.Window, ecn: s.Has(packet.ECE | packet.CWR)}
}

// opening has a connection that no remote answers forgotten when local has given up.
func (c *conn) opening(now Time) {
	c.expire = (now+200e9)/1e9*1e9 + 1e9
	c.app.engine.at(c.expire)
}

// synAckIn makes c a new connection when s, a SYN-ACK of the remote, answers
// the SYN of local that was noted.
func (e *Engine) synAckIn(now Time, c *conn, s *packet.Segment, fx *Effects) {
	syn := c.syn
	if !syn.out || !c.answersSyn(s) || c.handshake && c.iss == syn.irs && c.irs == s.Seq {
		return
	}
	a, id, fresh := c.app, c.id, c.fresh
	e.remove(c, fx)
	if c = e.newConn(now, a, id, appstate.Active, appstate.SynSent, fx); c == nil {
		return
	}
	c.fresh, c.syn.out = fresh, false
	c.agree(s.Opt, syn.opt)
	c.ep.Opt.ECN = syn.ecn && s.Flags&(packet.ECE|packet.CWR) == packet.ECE
	c.handshake, c.irs, c.iss, c.rcvKnown = true, s.Seq, syn.irs, true
	c.ackSeen = true // local acknowledges it by itself, whatever gets lost
	ep := &c.ep
	ep.SndUna, ep.SndNxt, ep.RcvNxt = s.Ack, s.Ack, s.Seq.Add(1)
	ep.TSRec, ep.TSVal, ep.TSAt = s.Opt.TSVal, syn.opt.TSVal, now
	ep.RemoteWnd = uint32(s.Window)
	ep.Edge = ep.RcvNxt.Add(uint32(syn.window))
	ep.Window = uint16(uint32(syn.window) >> ep.Opt.LocalScale)
	c.set(appstate.Connect)
}

// expect lists what waits for local's SYNs in a restore: by the remote's
// address and port, the oldest connection first.
func (a *app) expect() {
	a.expected = map[flowKey][]*conn{}
	for _, c := range a.conns {
		if c.role == appstate.Active && c.restorable() && !c.image {
			k := flowKey{c.id.Remote, c.id.Local.Addr()}
			a.expected[k] = append(a.expected[k], c)
		}
	}
	for _, list := range a.expected {
		slices.SortFunc(list, func(x, y *conn) int {
			return cmp.Or(cmp.Compare(x.created, y.created), cmp.Compare(x.id.Local.Port(), y.id.Local.Port()))
		})
	}
}

// waiting picks the connection that a SYN of local brings back: one that the
// helper has marked, else the oldest.
func (a *app) waiting(id ConnID) *conn {
	list := a.expected[flowKey{id.Remote, id.Local.Addr()}]
	var first *conn
	for _, c := range list {
		if c.state == appstate.Removed || !c.restorable() || c.hsStarted {
			continue
		}
		if c.activate {
			return c
		}
		if first == nil {
			first = c
		}
	}
	return first
}

// openedAway is a SYN of local in a restore: it brings a held connection back,
// or opens a new one, which passes.
func (e *Engine) openedAway(now Time, a *app, id ConnID, fx *Effects) {
	if c := a.waiting(id); c != nil {
		e.setPort(c, id.Local.Port())
		e.catchSyn(c, fx)
		return
	}
	e.synOut(now, a, nil, id, fx)
	if c := e.conns[id]; c != nil && c.state == appstate.SynSent && fx.Verdict != Drop {
		c.fresh = true
	}
}

// catchSyn answers local's SYN, the segment at hand, in the name of c's remote:
// with the original options.
func (e *Engine) catchSyn(c *conn, fx *Effects) {
	s := &e.seg
	fx.drop(SynCaught)
	if c.hsError = c.lacks(s); c.hsError != "" {
		sp := tcpemu.RefuseSyn(s)
		fx.send(&sp, false)
		return
	}
	c.hsIRS = c.initial()
	port := c.tr.Port
	c.hsTries++
	c.hsStarted, c.hsDone, c.hsClock = true, false, c.ep.TSRec
	c.hsISN, c.hsWindow, c.hsMSS, c.hsTS = s.Seq, s.Window, s.Opt.MSS, s.Opt.TSVal
	c.tr = translation(c, s)
	c.tr.Port = port
	if c.state != appstate.Rst {
		c.set(appstate.Restoring)
	}
	sp := c.ep.SynAck(c.localAddr(), c.hsIRS, s)
	fx.send(&sp, false)
}

// caughtOut handles what local sends on a connection that it has opened again,
// before RESTORED.
func (e *Engine) caughtOut(c *conn, fx *Effects) {
	s := &e.seg
	switch {
	case s.Has(packet.RST): // it has changed its mind
		fx.drop(HandshakeRefused)
		if s.Seq == c.hsISN.Add(1) || s.Ack == c.hsIRS.Add(1) {
			c.hsError = "local opened it and reset it"
			e.undoHandshake(c)
		}
	case s.Has(packet.SYN): // our SYN-ACK was lost, or another socket has the port
		e.undoHandshake(c)
		e.catchSyn(c, fx)
	default:
		fx.drop(NotOpenYet) // local sends it again
		if s.Has(packet.ACK) && s.Ack == c.hsIRS.Add(1) && !c.hsDone {
			c.hsDone = true
			if c.state == appstate.Restoring {
				c.set(appstate.Connect)
			}
		}
	}
}

// atTurn tells whether the connection stands between two requests: where local
// accepted it, local has spoken last; where local opened it, it has its reply. Or
// nobody has sent for the quiet time.
func (c *conn) atTurn(now Time) bool {
	idle := now - max(c.lastIn, c.lastOut, c.app.froze)
	switch {
	case c.role == appstate.Passive:
		return c.last == localSpoke || idle >= c.app.quiet
	case c.last == localSpoke:
		return idle >= oneWay*c.app.quiet
	}
	return idle >= c.app.quiet
}

// askedAgain lets a frozen connection go on on which local, before the seal,
// has sent another request: its reply is for the same process.
func (c *conn) askedAgain() {
	if c.frozen && c.role == appstate.Active && len(c.kept) == 0 && !c.keptFin && c.app.state == appstate.SnapshotFreeze && !c.app.sealed && !c.sealed {
		c.frozen, c.confirmed = false, false
		c.app.engine.mark(c)
	}
}

// lacks names what the connection uses and s, the SYN or SYN-ACK of its new
// local side, does not offer: options are never inserted.
func (c *conn) lacks(s *packet.Segment) string {
	o := &c.ep.Opt
	switch {
	case o.TS && !s.Opt.HasTS:
		return "the new stack does not use timestamps, the connection does"
	case o.SACK && !s.Opt.SACKPermitted:
		return "the new stack does not use SACK, the connection does"
	case o.WScale && !s.Opt.HasWScale:
		return "the new stack does not scale windows, the connection does"
	}
	return ""
}
