package sim

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// checker looks at packets for what must never be.
type checker struct {
	w     *world
	conns map[netip.AddrPort]*seen // by remote
}

// seen is what left the node for one remote.
type seen struct {
	iss   seqnum.Value
	nxt   seqnum.Value // behind everything
	ack   seqnum.Value // acknowledged to it
	known bool
	ts    uint32
	hasTS bool
	echo  uint32 // newest timestamp that the client echoed, at the node
}

// wellFormed checks a packet of the engine.
func (k *checker) wellFormed(b []byte) {
	var s packet.Segment
	if f := s.Parse(b); f != packet.OK || !s.ChecksumOK() {
		k.w.fail("the engine made a broken segment: %v", f)
	}
}

// leaves checks a packet that leaves the node for a remote.
func (k *checker) leaves(b []byte) {
	w := k.w
	if w.opt.Capture != nil {
		w.opt.Capture.packet(w.clk.time(), b)
	}
	var s packet.Segment
	if s.Parse(b) != packet.OK {
		return
	}
	w.trace.packet("leaves", "", b)
	if d := w.byDial[s.Dst]; d != nil {
		if s.Flags&(packet.SYN|packet.ACK) == packet.SYN && d.sent > 0 {
			w.fail("a SYN for connection %d of the application (%v), which is open, leaves the node", d.id, d.to)
		}
		if s.PayloadLen() > 0 {
			d.port = s.Src.Port() // an attempt that was given up may have had another one
		}
	}
	c := w.byAddr[s.Dst]
	if c == nil {
		return
	}
	if s.Has(packet.SYN) {
		if n := k.conns[s.Dst]; n != nil && n.known && n.iss != s.Seq && c.connected && c.s != nil && !c.over() && !w.server.hasClosed(c) {
			w.fail("client %d (%v) is sent a second SYN-ACK with another number", c.id, c.addr)
		}
		k.conns[s.Dst] = &seen{iss: s.Seq, nxt: s.Seq.Add(1), ack: s.Ack, known: true, ts: s.Opt.TSVal, hasTS: s.Opt.HasTS}
		return
	}
	n := k.conns[s.Dst]
	gone := c.aborted || c.closed || w.server.hasClosed(c) || c.turnedDown()
	const near = 1 << 17
	if s.Has(packet.RST) {
		if d := s.Seq.Sub(nextOf(n)); !gone && c.connected && d > -near && d < near { // others answer an outsider's guess
			w.fail("client %d (%v) is reset, and nobody wanted that", c.id, c.addr)
		}
		return
	}
	if d := s.Seq.Sub(nextOf(n)); s.Has(packet.FIN) && !w.server.hasClosed(c) && !c.aborted && d > -near && d < near {
		w.fail("client %d (%v) is sent FIN, and the server has not closed", c.id, c.addr)
	}
	if n == nil || gone {
		return
	}
	if n.nxt.Less(s.End()) {
		n.nxt = s.End()
	}
	if n.ack.Less(s.Ack) {
		n.ack = s.Ack
	}
	if n.hasTS {
		if !s.Opt.HasTS {
			w.fail("client %d (%v) is sent a segment without timestamp", c.id, c.addr)
			return
		}
		if !seqnum.NewerTS(n.ts, s.Opt.TSVal) {
			n.ts = s.Opt.TSVal
			return
		}
		// To a handshake that was open, local may have said more before anything
		// was captured; then the echo of the client tells.
		if open := c.unfinished || c.s == nil; !open || seqnum.NewerTS(n.echo, s.Opt.TSVal) {
			w.fail("client %d (%v) is sent timestamp %d after %d", c.id, c.addr, s.Opt.TSVal, n.ts)
		}
	}
}

// arrives sees a packet of a client that arrives at the node.
func (k *checker) arrives(b []byte) {
	var s packet.Segment
	if s.Parse(b) != packet.OK || !s.Opt.HasTS || !s.ChecksumOK() {
		return
	}
	if n := k.conns[s.Src]; n != nil && (n.echo == 0 || seqnum.NewerTS(s.Opt.TSEcr, n.echo)) {
		n.echo = s.Opt.TSEcr
	}
}

func nextOf(n *seen) seqnum.Value {
	if n == nil {
		return 0
	}
	return n.nxt
}

// flowKeys lists the set of translated flows.
func (w *world) flowKeys() []flowKey {
	return slices.SortedFunc(maps.Keys(w.node.flows), func(a, b flowKey) int { return a.remote.Compare(b.remote) })
}

// atEnd checks that nothing is left when everything has ended.
func (w *world) atEnd() {
	for _, d := range w.dials {
		if !d.complete() {
			w.fail("did not come to its end: %v", d)
			return
		}
	}
	for _, c := range w.clients {
		if !c.complete() {
			s := c.s
			if s == nil {
				s = &session{}
			}
			w.fail("client %d (%v) did not come to its end: connected %v, %d of %d sent, %d of %d received, closed %v; server: %d received, %d of %d sent, end seen %v, closed %v",
				c.id, c.addr, c.connected, c.sent, c.plan.up, c.got, c.plan.down, c.closed, s.got, s.sent, s.ready, s.eof, s.closed)
			return
		}
	}
	if w.engine == nil {
		w.fail("no filter runs at the end")
		return
	}
	if len(w.replies) > 0 {
		w.fail("%d replies are left over at the end", len(w.replies))
	}
	l, _ := w.ask(&filter.GetConnInfo{App: app}).(*filter.ConnList)
	if l == nil {
		w.fail("the application is not known at the end")
		return
	}
	there := map[filter.ConnID]bool{} // a reset that was lost leaves the socket too
	for _, i := range w.server.sockets() {
		there[i.ID] = true
	}
	for _, c := range l.Conns {
		if there[c.ID] {
			continue
		}
		w.fail("connection %v is left over at the end: %v, translated %v, FIN of the remote %v", c.ID.Remote, c.State, c.Translated, c.RemoteClosed)
	}
	for _, m := range w.engine.Limits() {
		if m.Used != 0 && len(there) == 0 {
			w.fail("%d %s are left over at the end", m.Used, m.Name)
		}
	}
	if len(there) > 0 {
		return
	}
	if n := w.store.Spools(); n > 0 {
		w.fail("spools of %d connections are recorded at the end", n)
	}
	if len(w.node.flows) > 0 {
		w.fail("%d translated flows are left over at the end", len(w.node.flows))
	}
	for _, s := range []filter.Set{filter.SetFull, filter.SetAway, filter.SetActive} {
		if len(w.node.sets[s]) > 0 {
			w.fail("set %d is not empty at the end", s)
		}
	}
}

// ask gives the engine a request that it answers at once.
func (w *world) ask(body any) any {
	w.reqs++
	id := w.reqs
	w.step(filter.Event{Request: &filter.Request{ID: id, Body: body}}, nil)
	r := w.replies[id]
	delete(w.replies, id)
	return r.Body
}
