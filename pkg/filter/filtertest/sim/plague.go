package sim

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// plagues lets filters end and outsiders guess at random times.
func (w *world) plagues() {
	r := w.rand(6)
	if !w.opt.NoCrash && r.IntN(2) == 0 {
		mean := logDuration(r, 20*time.Millisecond, 20*time.Second)
		w.repeat(r, mean, w.endFilter)
	}
	r = w.rand(7)
	if !w.opt.NoOutsiders && r.IntN(2) == 0 {
		mean := logDuration(r, 10*time.Millisecond, 5*time.Second)
		w.repeat(r, mean, w.outsider)
	}
}

// repeat calls f at random times, some hundred times at most, until the link is
// healthy.
func (w *world) repeat(r *rand.Rand, mean time.Duration, f func(*rand.Rand)) {
	left := 300
	var again func()
	again = func() {
		if w.calm || w.err != nil {
			return
		}
		f(r)
		if left--; left > 0 {
			w.clk.after(time.Duration(float64(mean)*r.ExpFloat64()), again)
		}
	}
	w.clk.after(time.Duration(float64(mean)*r.ExpFloat64()), again)
}

// endFilter ends the filter, mostly in the middle of its next step.
func (w *world) endFilter(r *rand.Rand) {
	if w.engine == nil || w.dies != lives {
		return
	}
	if w.waited() {
		return
	}
	if r.IntN(4) == 0 {
		w.crash()
		return
	}
	w.dies = stage(1 + r.IntN(int(stages)-1))
}

// waited tells whether a client has lost a keepalive or its answer and heard
// nothing since. One in a row may be lost, to a filter or on the link: three
// end a connection whatever the filter does.
func (w *world) waited() bool {
	for _, c := range w.clients {
		if c.keepIdle != 0 && c.connected && !c.over() && w.emptyLost[c.addr.Addr()] {
			return true
		}
	}
	return false
}

// outsider sends what somebody sends who knows the addresses of a connection
// and not its numbers.
func (w *world) outsider(r *rand.Rand) {
	c := w.clients[r.IntN(len(w.clients))]
	w.rep.Outsiders++
	sp := packet.Spec{Src: c.addr, Dst: c.vip, Seq: seqnum.Value(r.Uint32()), Ack: seqnum.Value(r.Uint32()), Window: uint16(r.Uint32())}
	sp.Flags = []uint8{packet.ACK, packet.ACK | packet.PSH, packet.RST, packet.RST | packet.ACK, packet.FIN | packet.ACK,
		packet.SYN, packet.SYN | packet.ACK, 0, packet.FIN}[r.IntN(9)]
	if r.IntN(2) == 0 && sp.Flags&packet.RST == 0 {
		sp.Payload = make([]byte, 1+r.IntN(100))
	}
	if r.IntN(2) == 0 {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, r.Uint32(), r.Uint32()
	}
	if sp.Flags == packet.SYN {
		// Who begins anew on a client's addresses wakes an application, as
		// anybody may; here it only hits connections that are there.
		if !c.connected || c.over() || w.server.hasClosed(c) {
			return
		}
		sp.Payload = nil
	}
	if n := w.check.conns[c.addr]; n != nil && n.known && w.state == appstate.SnapshotDone && r.IntN(3) == 0 {
		// It has guessed where the connection is, if not the number itself. Before the
		// seal netstack would take its octets: it does not look at the acknowledgement (RFC 5961 section 5).
		sp.Seq = n.ack.Add(1 + r.Uint32N(20000))
		if r.IntN(3) == 0 {
			sp.Seq = n.ack.Add(-(200 + r.Uint32N(60000)))
		}
	}
	if r.IntN(8) == 0 { // not even the port
		sp.Src = netip.AddrPortFrom(c.addr.Addr(), uint16(1+r.IntN(1<<14)))
		sp.Flags &^= packet.SYN
	}
	b := sp.Build(make([]byte, sp.Size()))
	if r.IntN(4) == 0 {
		b[tcpAt(b)+16] ^= byte(1 + r.IntN(255))
	}
	w.trace.packet("outsider", "", b)
	w.fromRemote(b)
}
