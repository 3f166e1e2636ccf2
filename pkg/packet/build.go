package packet

import (
	"encoding/binary"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Spec describes a segment to build.
type Spec struct {
	Src, Dst netip.AddrPort // of one family
	Seq, Ack seqnum.Value
	Flags    uint8
	Window   uint16 // unscaled, as on the wire
	Urgent   uint16
	Payload  []byte

	MSS           uint16 // 0: no option
	HasWScale     bool
	WScale        uint8
	SACKPermitted bool
	HasTS         bool
	TSVal, TSEcr  uint32
}

// MaxHeader is the room that headers of a built segment take at most: IPv6
// and TCP with the options above.
const MaxHeader = 40 + 20 + 40

// Size returns the octets that Build writes for sp.
func (sp *Spec) Size() int {
	ip := 20
	if sp.Src.Addr().Is6() {
		ip = 40
	}
	return ip + 20 + sp.optLen() + len(sp.Payload)
}

func (sp *Spec) optLen() int {
	n := 0
	if sp.MSS != 0 {
		n += 4
	}
	if sp.HasTS {
		n += 12 // SACK-permitted takes the place of the two octets of padding
	} else if sp.SACKPermitted {
		n += 4
	}
	if sp.HasWScale {
		n += 4
	}
	return n
}

// Build writes the segment of sp into b, which must have Size octets, with
// right checksums, and returns b cut to its length. The IPv4 identification is
// 0 with DF set (RFC 6864 section 4.1), the hop limit 64.
func (sp *Spec) Build(b []byte) []byte {
	n := sp.Size()
	b = b[:n]
	s := Segment{raw: b, end: n, l4: 20}
	if sp.Src.Addr().Is6() {
		s.v6, s.l4 = true, 40
		src, dst := sp.Src.Addr().As16(), sp.Dst.Addr().As16()
		clear(b[:40])
		b[0] = 0x60
		binary.BigEndian.PutUint16(b[4:], uint16(n-40))
		b[6], b[7] = protoTCP, 64
		copy(b[8:], src[:])
		copy(b[24:], dst[:])
	} else {
		src, dst := sp.Src.Addr().As4(), sp.Dst.Addr().As4()
		clear(b[:20])
		b[0] = 0x45
		binary.BigEndian.PutUint16(b[2:], uint16(n))
		b[6] = 0x40
		b[8], b[9] = 64, protoTCP
		copy(b[12:], src[:])
		copy(b[16:], dst[:])
		binary.BigEndian.PutUint16(b[10:], ^Sum(b[:20], 0))
	}
	h := b[s.l4:]
	ol := sp.optLen()
	binary.BigEndian.PutUint16(h, sp.Src.Port())
	binary.BigEndian.PutUint16(h[2:], sp.Dst.Port())
	binary.BigEndian.PutUint32(h[4:], uint32(sp.Seq))
	binary.BigEndian.PutUint32(h[8:], uint32(sp.Ack))
	h[12], h[13] = byte((20+ol)/4)<<4, sp.Flags
	binary.BigEndian.PutUint16(h[14:], sp.Window)
	binary.BigEndian.PutUint16(h[18:], sp.Urgent)
	sp.options(h[20 : 20+ol])
	copy(h[20+ol:], sp.Payload)
	s.FillChecksum()
	return b
}

func (sp *Spec) options(o []byte) {
	if sp.MSS != 0 {
		o[0], o[1] = 2, 4
		binary.BigEndian.PutUint16(o[2:], sp.MSS)
		o = o[4:]
	}
	if sp.HasTS {
		if sp.SACKPermitted {
			o[0], o[1] = 4, 2
		} else {
			o[0], o[1] = 1, 1
		}
		o[2], o[3] = 8, 10
		binary.BigEndian.PutUint32(o[4:], sp.TSVal)
		binary.BigEndian.PutUint32(o[8:], sp.TSEcr)
		o = o[12:]
	} else if sp.SACKPermitted {
		o[0], o[1], o[2], o[3] = 1, 1, 4, 2
		o = o[4:]
	}
	if sp.HasWScale {
		o[0], o[1], o[2], o[3] = 1, 3, 3, sp.WScale
	}
}
