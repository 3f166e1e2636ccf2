package sim

import (
	"encoding/binary"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// shim stands between the node and the local stack. It makes netstack behave
// as Linux where the filter depends on it, and sees what sock_diag would tell.
//
// Linux answers octets that it has received before with a duplicate SACK (RFC
// 2883), by which the filter knows the answers to what it asks; netstack sends
// none.
type shim struct {
	w     *world
	socks map[netip.AddrPort]*track         // by remote
	syns  map[netip.AddrPort]packet.Options // of the last SYN
	dsack *track
	block [2]seqnum.Value
}

// track is what is known of one local socket from its segments.
type track struct {
	iss             seqnum.Value
	una, nxt, rcv   seqnum.Value
	written         uint32 // octets that the application handed over
	read            uint32 // octets that it took
	opt             packet.Options
	own             packet.Options
	lastIn, lastOut int64
	established     bool
}

// wrote counts octets that the socket has taken from the application.
func (h *shim) wrote(remote netip.AddrPort, n int) {
	if t := h.socks[remote]; t != nil {
		t.written += uint32(n)
	}
}

// read counts those that the application has taken from it.
func (h *shim) read(remote netip.AddrPort, n int) {
	if t := h.socks[remote]; t != nil {
		t.read += uint32(n)
	}
}

// inbound sees b, which goes to the local stack.
func (h *shim) inbound(b []byte) {
	h.dsack = nil
	var s packet.Segment
	if s.Parse(b) != packet.OK {
		return
	}
	if s.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		h.syns[s.Src] = s.Opt
		return
	}
	t := h.socks[s.Src]
	if t == nil || !s.ChecksumOK() {
		return
	}
	if s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK { // of a connection that local opens
		if !t.established && s.Ack == t.nxt {
			t.rcv, t.opt, t.una, t.established = s.Seq.Add(1), s.Opt, s.Ack, true
		}
		return
	}
	const near = 1 << 21 // an acknowledgement in a segment outside the window counts for nothing
	if d := s.Seq.Sub(t.rcv); d > near || d < -near {
	} else if s.Has(packet.ACK) && t.una.Less(s.Ack) && s.Ack.LessEq(t.nxt) {
		t.una = s.Ack
		t.established = true
	}
	if s.PayloadLen() > 0 {
		t.lastIn = h.w.clk.time()
		if t.established && t.opt.SACKPermitted && t.own.SACKPermitted && s.Seq.Add(uint32(s.PayloadLen())).LessEq(t.rcv) {
			h.dsack, h.block = t, [2]seqnum.Value{s.Seq, s.Seq.Add(uint32(s.PayloadLen()))}
		}
	}
}

// done is called when the stack has answered what inbound saw.
func (h *shim) done() { h.dsack = nil }

// outbound sees b, which the local stack sends, and gives what Linux would have
// sent.
func (h *shim) outbound(b []byte) []byte {
	var s packet.Segment
	if s.Parse(b) != packet.OK {
		return b
	}
	t := h.socks[s.Dst]
	if s.Has(packet.SYN) {
		if t == nil || t.iss != s.Seq { // a socket of its own, not a repetition
			h.socks[s.Dst] = &track{iss: s.Seq, una: s.Seq, nxt: s.Seq.Add(1), rcv: s.Ack, opt: h.syns[s.Dst], own: s.Opt}
		}
		return b
	}
	if t == nil || s.Has(packet.RST) {
		return b
	}
	if t.nxt.Less(s.End()) {
		t.nxt = s.End()
	}
	if t.rcv.Less(s.Ack) {
		t.rcv = s.Ack
	}
	if s.PayloadLen() > 0 {
		t.lastOut = h.w.clk.time()
	} else if h.dsack == t && s.Flags == packet.ACK {
		h.dsack = nil
		return withSACK(b, &s, h.block[0], h.block[1])
	}
	return b
}

// tcpAt is where the TCP header of a packet without extension headers begins.
func tcpAt(b []byte) int {
	if b[0]>>4 == 6 {
		return 40
	}
	return 20
}

// withSACK rebuilds b, the empty segment s, with a block in front of those that
// it has.
func withSACK(b []byte, s *packet.Segment, l, r seqnum.Value) []byte {
	blocks := [][2]seqnum.Value{{l, r}}
	most := 4
	if s.Opt.HasTS {
		most = 3
	}
	for i := range min(s.Opt.SACKBlocks, most-1) {
		x, y := s.SACKBlock(i)
		blocks = append(blocks, [2]seqnum.Value{x, y})
	}
	at := tcpAt(b)
	out := append([]byte(nil), b[:at+20]...)
	if s.Opt.HasTS {
		out = append(out, 1, 1, 8, 10)
		out = binary.BigEndian.AppendUint32(out, s.Opt.TSVal)
		out = binary.BigEndian.AppendUint32(out, s.Opt.TSEcr)
	}
	out = append(out, 1, 1, 5, byte(2+8*len(blocks)))
	for _, k := range blocks {
		out = binary.BigEndian.AppendUint32(out, uint32(k[0]))
		out = binary.BigEndian.AppendUint32(out, uint32(k[1]))
	}
	out[at+12] = byte((len(out)-at)/4) << 4
	if at == 20 {
		binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
	} else {
		binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	}
	normalise(out)
	fill(out)
	return out
}

// fill completes the checksum of a segment.
func fill(b []byte) {
	var s packet.Segment
	if s.Parse(b) == packet.OK {
		s.FillChecksum()
	}
}

// plain takes options out of a SYN, as old middle boxes do: neither side uses
// them then.
func plain(b []byte, kinds ...byte) {
	at := tcpAt(b)
	end := at + int(b[at+12]>>4)*4
	for i := at + 20; i < end; {
		n := 1
		if b[i] == 0 {
			break
		}
		if b[i] != 1 {
			n = int(b[i+1])
			for _, k := range kinds {
				if b[i] == k {
					for j := range n {
						b[i+j] = 1
					}
					break
				}
			}
		}
		i += n
	}
	fill(b)
}
