package filter

import (
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// packet gives one queued packet its verdict.
func (e *Engine) packet(now Time, p *Packet, fx *Effects) {
	fx.accept(NoApp)
	counters, sends := &e.reasons, len(fx.Sends)
	if a := e.judge(now, p, fx); a != nil {
		counters = &a.reasons
	}
	counters[fx.Reason]++
	e.tally(now, p.Hook, fx.Sends[sends:], fx)
}

// judge parses p, finds its application and connection and hands it on. It
// returns the application that the packet belongs to.
func (e *Engine) judge(now Time, p *Packet, fx *Effects) *app {
	s := &e.seg
	if p.Truncated {
		return e.broken(p, TruncatedCopy, fx)
	}
	switch s.Parse(p.Data) {
	case packet.OK:
	case packet.NotTCP:
		return e.icmpError(p, fx)
	case packet.BadOptions:
		return e.broken(p, BadOptions, fx)
	default:
		return e.broken(p, Malformed, fx)
	}
	inbound := e.inbounds(p.Hook, s.Src.Addr(), s.Dst.Addr())
	id := ConnID{Local: s.Src, Remote: s.Dst}
	if inbound {
		id = ConnID{Local: s.Dst, Remote: s.Src}
	}
	if e.ours(id.Local.Addr()) && e.ours(id.Remote.Addr()) {
		fx.accept(SameNode)
		return e.byVIP[id.Local.Addr()]
	}
	a := e.byVIP[id.Local.Addr()]
	if a == nil {
		if e.blocked[id.Local.Addr()] {
			fx.drop(Blocked)
		}
		return nil
	}
	if !a.wants(id) {
		fx.accept(Excluded)
		return a
	}
	if a.state == appstate.BlockData {
		fx.drop(HandedOver)
		return a
	}
	if inbound && p.Info&CsumNotReady == 0 && (p.Info&CsumNotVerified != 0 || a.state.Away()) && !s.ChecksumOK() {
		fx.drop(BadChecksum)
		return a
	}
	if inbound {
		c := e.conns[id]
		e.sees(c, inbound, s)
		e.inbound(now, a, c, id, p, fx)
	} else {
		c := e.bySocket(id)
		if c != nil && c.tr.Port != 0 && s.Flags&(packet.SYN|packet.ACK) == packet.SYN && c.gives(s) {
			e.setPort(c, 0) // its port is used for another connection
			c = nil
		}
		e.sees(c, inbound, s)
		e.outbound(now, a, c, id, p, fx)
	}
	return a
}

// gives tells whether SYN s of local opens another connection from the port of
// c, whose own socket has ended, maybe silently: in FIN_WAIT2 or by a time-out.
func (c *conn) gives(s *packet.Segment) bool {
	return c.closed || !c.app.state.Away() && s.Seq != c.hsISN
}

// ours tells whether addr is a VIP of this node.
func (e *Engine) ours(addr netip.Addr) bool { return e.byVIP[addr] != nil || e.blocked[addr] }

// inbounds tells whether a packet at hook goes from remote to local. Before
// routing both directions meet where local is in a network namespace behind the
// node. A packet from a VIP is queued there only if it came by the device that
// leads to that VIP; a remote that forges the address is dropped by the rules.
func (e *Engine) inbounds(hook uint8, src, dst netip.Addr) bool {
	return hook == HookPrerouting && (e.ours(dst) || !e.ours(src))
}

// broken is for what cannot be read. Where the application runs its kernel
// judges; where it is away nothing broken may reach anyone.
func (e *Engine) broken(p *Packet, r Reason, fx *Effects) *app {
	vip, _ := e.vipOf(p)
	a := e.byVIP[vip]
	if a == nil && e.blocked[vip] {
		fx.drop(Blocked)
		return nil
	}
	if a == nil || !a.state.Captured() && !e.brokenTranslated(p) {
		fx.accept(r)
		return a
	}
	fx.drop(r)
	return a
}

// brokenTranslated tells whether p, which cannot be read whole, belongs to a
// translated connection: its numbers mean nothing to the other side. Of a
// fragment only the first names its ports; without it the rest is thrown away.
func (e *Engine) brokenTranslated(p *Packet) bool {
	from, to, ok := packet.Ports(p.Data)
	if !ok {
		return false
	}
	id := ConnID{Local: from, Remote: to}
	if e.inbounds(p.Hook, from.Addr(), to.Addr()) {
		id = ConnID{Local: to, Remote: from}
	}
	c := e.conns[id]
	return c != nil && c.translated
}

// vipOf reads the address on local's side of a packet that need not be whole,
// and whether it goes to local.
func (e *Engine) vipOf(p *Packet) (vip netip.Addr, inbound bool) {
	b := p.Data
	var src, dst netip.Addr
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	}
	if e.inbounds(p.Hook, src, dst) {
		return dst, true
	}
	return src, false
}

// icmpError handles an ICMP error that quotes a segment of ours: noted and
// kept from everyone while the application is away, translated when its
// connection is.
func (e *Engine) icmpError(p *Packet, fx *Effects) *app {
	m := &e.icmp
	if vip, inbound := e.vipOf(p); !inbound || !m.Parse(p.Data) {
		fx.accept(NotOurs)
		return e.byVIP[vip]
	}
	a := e.byVIP[m.Src.Addr()]
	if a == nil {
		return nil
	}
	if !a.wants(ConnID{Local: m.Src, Remote: m.Dst}) {
		fx.accept(Excluded)
		return a
	}
	if a.state == appstate.BlockData {
		fx.drop(HandedOver)
		return a
	}
	drains := a.state == appstate.SnapshotFreeze && !a.sealed && m.TooBig() // else local's last octets would never get through
	if a.state.Away() && !drains {
		fx.drop(HeldICMP)
		return a
	}
	c := e.conns[ConnID{Local: m.Src, Remote: m.Dst}]
	if c == nil || !c.translated {
		fx.accept(ICMPPass)
		return a
	}
	c.tr.ICMP(m, m.Src.Port())
	fx.modified(ICMPTranslated, p.Data)
	return a
}

// inbound handles a segment from the remote (R→L).
func (e *Engine) inbound(now Time, a *app, c *conn, id ConnID, p *Packet, fx *Effects) {
	s := &e.seg
	switch {
	case c != nil && c.fresh || a.state == appstate.SnapshotFreeze && !a.sealed && c != nil && c.state == appstate.SynSent:
		// local has opened it just now
	case a.state == appstate.SnapshotFreeze && c != nil && c.passes(a, s) && !s.Has(packet.SYN):
		e.letThrough(now, c, p, fx)
		return
	case a.state.Away():
		e.held(now, a, c, id, p, fx)
		return
	}
	if s.Has(packet.SYN) {
		e.synIn(now, a, c, id, fx)
		return
	}
	if c == nil {
		fx.accept(Pass)
		return
	}
	if c.lingersOn() {
		e.heldClosing(now, c, fx)
		return
	}
	gone := s.Has(packet.RST) && c.resets(s)
	if c.scan != nil {
		c.follow(now, s)
		c.scan.gave(s)
	}
	c.observeIn(now, s)
	e.passIn(c, p, fx)
	if gone {
		e.remove(c, fx)
	}
}

// resets tells whether RST s ends the connection for its structure. Where its
// numbers are not known a structure is not worth much and goes, but not while
// a snapshot counts on it.
func (c *conn) resets(s *packet.Segment) bool {
	if c.learned { // local may hold octets that it has not acknowledged yet
		return s.Seq == c.ep.RcvNxt || c.inKnown && s.Seq == c.inEnd && c.ep.RcvNxt.Less(c.inEnd)
	}
	if c.refused != "" && c.handshake || c.translated { // what was seen in its handshake is not to be forgotten for a guess
		return false
	}
	return c.app.state != appstate.SnapshotStart && c.app.state != appstate.SnapshotFreeze
}

// passes tells whether s, a segment of the remote, may reach local in
// SNAPSHOTFREEZE: until the connection is frozen, of what lies before its
// boundary until local has it, and until the seal where local has closed already
// and only its stack still works on the end.
func (c *conn) passes(a *app, s *packet.Segment) bool {
	if c.state == appstate.Closing && c.finOut {
		return !a.sealed && !c.lingers
	}
	again := c.short() && s.PayloadLen() > 0 && !s.Has(packet.RST) && s.Seq.Less(c.bound)
	return !a.sealed && (!c.frozen || again) && !c.sealed && c.alive()
}

// passIn lets a segment of the remote go on to local, translated where the
// connection is.
func (e *Engine) passIn(c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	if !c.translated {
		fx.accept(Pass)
		return
	}
	c.tr.Inbound(s)
	if p.Info&CsumNotReady != 0 {
		s.FillChecksum()
	}
	fx.modified(Translated, s.Raw())
}

// synIn notes a SYN from the remote. It becomes a connection when local answers
// it; a structure that is there stays as it is until then.
func (e *Engine) synIn(now Time, a *app, c *conn, id ConnID, fx *Effects) {
	s := &e.seg
	fx.accept(HandshakePass)
	if s.Has(packet.ACK) {
		if c != nil && c.translated {
			fx.drop(Malformed) // an old one: its connection is open
		} else if c != nil {
			e.synAckIn(now, c, s, fx)
		}
		return
	}
	e.noteSyn(now, a, c, id, s, fx)
}

// noteSyn remembers SYN s; c may be nil.
func (e *Engine) noteSyn(now Time, a *app, c *conn, id ConnID, s *packet.Segment, fx *Effects) {
	if c == nil {
		if c = e.newConn(now, a, id, appstate.Passive, appstate.SynRcvd, fx); c == nil {
			return
		}
		c.expire = (now+75e9)/1e9*1e9 + 1e9
		e.at(c.expire)
	}
	c.syn = pendingSyn{seen: true, irs: s.Seq, end: s.End(), opt: s.Opt, window: s.Window, ecn: s.Has(packet.ECE | packet.CWR)}
}

// pendingSyn is a SYN that the other side has not answered yet.
type pendingSyn struct {
	seen   bool
	irs    seqnum.Value
	end    seqnum.Value // behind its octets (RFC 7413)
	opt    packet.Options
	window uint16
	ecn    bool // it offers ECN (RFC 3168 section 6.1.1)
	out    bool // local's own
}

// synAckOut makes c a new connection when s, a SYN-ACK of local, answers the
// SYN that was noted.
func (e *Engine) synAckOut(now Time, c *conn, s *packet.Segment, fx *Effects) {
	syn := c.syn
	if c.state == appstate.Closing && c.finOut && !c.translated && !syn.seen && (!c.handshake || c.iss != s.Seq) {
		e.remove(c, fx) // it is over, and local has begun another one, whose SYN passed unseen
		return
	}
	if syn.out || !c.answersSyn(s) || c.handshake && c.iss == s.Seq && c.irs == syn.irs {
		return
	}
	// The structure of an earlier connection on these addresses ends here,
	// whatever its state was.
	a, id := c.app, c.id
	e.remove(c, fx)
	if c = e.newConn(now, a, id, appstate.Passive, appstate.SynRcvd, fx); c == nil {
		return
	}
	c.agree(syn.opt, s.Opt)
	c.ep.Opt.ECN = syn.ecn && s.Flags&(packet.ECE|packet.CWR) == packet.ECE
	c.handshake, c.irs, c.iss, c.rcvKnown = true, syn.irs, s.Seq, true
	ep := &c.ep
	ep.SndUna, ep.SndNxt, ep.RcvNxt = s.Seq, s.Seq.Add(1), s.Ack
	ep.TSRec, ep.TSVal = syn.opt.TSVal, s.Opt.TSVal
	ep.RemoteWnd = uint32(syn.window)
	ep.Edge = s.Ack.Add(uint32(s.Window))
	ep.Window = uint16(uint32(s.Window) >> ep.Opt.LocalScale)
	c.set(appstate.Connect)
}

// answersSyn tells whether s, a SYN-ACK of local, answers the SYN that was
// noted, and maybe takes octets of it.
func (c *conn) answersSyn(s *packet.Segment) bool {
	return c.syn.seen && s.Ack.InRange(c.syn.irs.Add(1), c.syn.end.Add(1))
}

// agree takes what both sides announced (RFC 7323 section 2.2, RFC 2018).
func (c *conn) agree(syn, ack packet.Options) {
	o := &c.ep.Opt
	o.MSS, o.TS, o.SACK = syn.MSS, syn.HasTS && ack.HasTS, syn.SACKPermitted && ack.SACKPermitted
	if o.WScale = syn.HasWScale && ack.HasWScale; o.WScale {
		o.RemoteScale, o.LocalScale = syn.WScale, ack.WScale
	}
	switch {
	case syn.MD5 || ack.MD5:
		c.refused = "it uses TCP-MD5 (RFC 2385)"
	case syn.AO || ack.AO:
		c.refused = "it uses TCP-AO (RFC 5925)"
	case syn.MPTCP && ack.MPTCP:
		c.refused = "it is an MPTCP connection (RFC 8684); start the application without MPTCP"
	}
}

// outbound handles a segment of local (L→R).
func (e *Engine) outbound(now Time, a *app, c *conn, id ConnID, p *Packet, fx *Effects) {
	s := &e.seg
	if p.Hook != HookPostrouting {
		a.behind = p.Hook == HookPrerouting
		if a.state.Away() {
			e.awayOut(now, a, c, id, p, fx)
			return
		}
		if c != nil && c.translated {
			fx.accept(Pass) // seen again behind routing
			return
		}
	}
	if c == nil {
		e.unknownOut(now, a, id, fx)
		return
	}
	if a.state == appstate.RestoreStart && c.hsStarted {
		e.handshakeOut(c, p.Hook, fx)
		return
	}
	if c.silentFor(a, s) && a.state != appstate.SnapshotFreeze { // it was on its way behind routing
		e.silentOut(now, a, c, fx)
		return
	}
	if a.sealed && a.state != appstate.SnapshotFreeze && !c.fresh && !s.Has(packet.SYN) {
		e.sealedOut(now, c, fx)
		return
	}
	if s.Has(packet.SYN) {
		fx.accept(HandshakePass)
		switch {
		case !s.Has(packet.ACK):
			e.synOut(now, a, c, id, fx)
		case c.translated && c.hsIRS.Add(1) == s.Ack && s.Seq.Add(1+c.tr.Out) == c.hsEnd:
			e.handshakeAgain(c, fx)
		case c.translated && !c.answersSyn(s):
			fx.drop(Malformed) // local's numbers are not for the remote
		default:
			e.synAckOut(now, c, s, fx)
		}
		return
	}
	if !c.translated {
		if e.isAnswer(now, c, s, fx) {
			fx.drop(AskAnswer)
			return
		}
		c.observeOut(now, s, a.state == appstate.SnapshotStart || a.state == appstate.SnapshotFreeze)
		fx.accept(Pass)
		c.clockless(p, fx)
		if c.aborts(s) {
			e.remove(c, fx)
		}
		return
	}
	e.translateOut(now, c, p, fx)
}

// aborts tells whether s, a segment of local, is the reset of its side. While
// the handshake is open local answers anybody's guess with a RST of that number
// and goes on waiting (RFC 9293 section 3.10.7.4).
func (c *conn) aborts(s *packet.Segment) bool {
	return s.Has(packet.RST) && (s.Has(packet.ACK) || c.ackSeen || c.listed || !c.handshake || s.Seq == c.iss.Add(1))
}

// translateOut gives a segment of a translated connection the remote's view.
func (e *Engine) translateOut(now Time, c *conn, p *Packet, fx *Effects) {
	s := &e.seg
	if e.isAnswer(now, c, s, fx) {
		fx.drop(AskAnswer)
		return
	}
	if c.belowFloor(s) {
		e.tellAgain(c, fx)
		return
	}
	unclocked := c.unclocked(s)
	c.tr.Outbound(s, c.id.Local.Port(), &c.edge)
	if unclocked {
		s.SetTS(s.Opt.TSVal, c.ep.TSRec)
	}
	if c.spooled && s.Has(packet.ACK) && !c.app.sealed {
		e.spoolTaken(now, c, s.Ack, s.Ack.Add(uint32(s.Window)<<c.ep.Opt.LocalScale), fx)
		c.ahead(s)
	}
	if c.app.state.Away() || c.brief { // of a restored socket, what was queued before RESTORED comes behind what was not
		c.refresh(now, s)
	}
	if p.Info&CsumNotReady != 0 {
		s.FillChecksum()
	}
	c.observeOut(now, s, true)
	if c.app.silent && c.app.state == appstate.SnapshotFreeze {
		e.mark(c)
	}
	if c.redoAt != 0 && !c.spooled && s.Has(packet.ACK) {
		e.taken(now, c, s.Ack)
	}
	if c.reopens(s) {
		sp := c.ep.Ack()
		fx.send(&sp, false)
		fx.drop(FrozenPass)
		return
	}
	fx.modified(Translated, s.Raw())
	if s.Has(packet.RST) {
		e.remove(c, fx)
		return
	}
	e.unburden(now, c)
}

// unknownOut notes a connection that local opens, or passes what is not known.
func (e *Engine) unknownOut(now Time, a *app, id ConnID, fx *Effects) {
	fx.accept(Pass)
	if e.seg.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		e.synOut(now, a, nil, id, fx)
	}
}
