package filter_test

import (
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// belongs is the oracle: nobody can tell such a segment from one of the
// connection's own remote (RFC 9293 section 3.10.7.4, RFC 5961 sections 3.2, 4.2
// and 5.2). PAWS is left out, it would only make fewer of them acceptable. The
// window's right edge counts, as in Linux; for MAX.SND.WND, of which the filter
// has seen only a part, 64 KiB is the least.
func (v *victim) belongs(sp *packet.Spec) bool {
	from := uint32(sp.Seq - v.rcv) // distances, all modulo 2^32
	window := uint32(v.edge - v.rcv)
	n := uint32(len(sp.Payload)) + uint32(sp.Flags&packet.FIN)
	switch {
	case sp.Flags&packet.RST != 0:
		return from == 0
	case sp.Flags&packet.SYN != 0, sp.Flags&packet.ACK == 0:
		return false
	}
	inside := from <= window || -from < n // it begins in the window, or RCV.NXT lies in it
	return inside && uint32(v.nxt-sp.Ack) <= max(v.maxWnd, 1<<16)
}

var garbage [1460]byte

// kinds of a guess: flags, and whether octets come along.
var kinds = []struct {
	flags uint8
	data  bool
}{
	{packet.RST, false}, {packet.RST | packet.ACK, false}, {packet.SYN, false}, {packet.ACK | packet.PSH, true}, {packet.ACK, true},
	{packet.FIN | packet.ACK, false}, {packet.FIN | packet.ACK, true}, {packet.ACK, false}, {packet.ACK | packet.URG, true}, {packet.SYN | packet.ACK, false},
}

// draw makes one guess, o.sp. It returns nil when that is not on the four-tuple of
// a connection: a SYN to a closed port, or anything but a SYN from where none is.
func (o *outsider) draw() *victim {
	for {
		v := o.guess()
		if v == nil || !v.belongs(&o.sp) {
			return v
		}
		o.lucky++
	}
}

func (o *outsider) guess() *victim {
	sp := &o.sp
	r := o.r.Uint64()
	pick := func(n uint64) int {
		x := r % n
		r /= n
		return int(x)
	}
	v := &o.victims[o.r.IntN(len(o.victims))]
	if pick(4) == 0 { // one of them gets a flood of its own
		v = &o.victims[1]
	}
	k := kinds[pick(uint64(len(kinds)))]
	*sp = packet.Spec{Src: v.remote, Dst: v.local, Flags: k.flags, Window: uint16(o.r.Uint32()), Urgent: uint16(pick(1000))}
	sp.Seq, sp.Ack = seqnum.Value(o.r.Uint32()), seqnum.Value(o.r.Uint32())
	if k.data {
		sp.Payload = garbage[:1+pick(uint64(len(garbage)))]
	}
	if pick(16) == 0 {
		sp.Flags = uint8(o.r.Uint32())
	}
	if pick(2) == 0 {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, o.r.Uint32(), o.r.Uint32()
	}
	if sp.Flags&packet.SYN != 0 {
		sp.MSS, sp.HasWScale, sp.WScale, sp.SACKPermitted = 1460, true, uint8(pick(15)), true
	}
	if o.half {
		if pick(2) == 0 {
			sp.Seq = v.rcv.Add(o.r.Uint32() % (v.edge.Size(v.rcv) + 1))
		} else {
			sp.Ack = v.nxt
		}
		return v
	}
	switch pick(8) {
	case 0: // no connection there
		sp.Src = netip.AddrPortFrom(sp.Src.Addr(), uint16(1+pick(30000)))
		sp.Flags |= packet.ACK
		return nil
	case 1:
		sp.Src = netip.AddrPortFrom(sp.Src.Addr(), uint16(1+pick(65535)))
		sp.Dst = netip.AddrPortFrom(sp.Dst.Addr(), uint16(1+pick(6000)))
		sp.Flags, sp.Payload = packet.SYN, nil
		return nil
	}
	return v
}

// TestOracle: what the tests above leave out is what belongs to the remote, and
// no more.
func TestOracle(t *testing.T) {
	v := victim{rcv: 0xfffffff0, edge: 984, nxt: 5000, maxWnd: 1 << 17}
	at := func(flags uint8, from int, n int, back int) packet.Spec {
		return packet.Spec{Flags: flags, Seq: v.rcv.Add(uint32(from)), Ack: v.nxt.Add(-uint32(back)), Payload: garbage[:n]}
	}
	for i, c := range []struct {
		sp   packet.Spec
		want bool
	}{
		{at(packet.RST, 0, 0, 1<<30), true}, {at(packet.RST, 1, 0, 0), false}, {at(packet.RST|packet.ACK, -1, 0, 0), false},
		{at(packet.SYN, 0, 0, 0), false}, {at(packet.SYN|packet.ACK, 0, 0, 0), false}, {at(packet.PSH, 0, 9, 0), false},
		{at(packet.ACK, 0, 0, 0), true}, {at(packet.ACK, 1000, 9, 1<<17), true}, {at(packet.ACK, 1001, 9, 0), false},
		{at(packet.ACK, 5, 9, 1<<17+1), false}, {at(packet.ACK, 5, 9, -1), false},
		{at(packet.ACK, -1, 0, 0), false}, {at(packet.ACK, -9, 9, 0), false}, {at(packet.ACK, -8, 9, 0), true}, {at(packet.ACK|packet.FIN, -1, 1, 0), true},
	} {
		if got := v.belongs(&c.sp); got != c.want {
			t.Errorf("case %d: %v", i, got)
		}
	}
}
