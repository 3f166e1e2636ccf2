package packet

import (
	"encoding/binary"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// ICMPError is a view over an ICMPv4 or ICMPv6 error that quotes a TCP segment
// (RFC 792, RFC 4443): at least the ports and the sequence number are there.
type ICMPError struct {
	raw      []byte
	v6       bool
	icmp     int // offset of the ICMP header
	end      int
	q        int            // offset of the quoted TCP header
	Src, Dst netip.AddrPort // of the quoted segment
	Seq      seqnum.Value   // of the quoted segment
}

// Parse makes e a view over b. It reports false for anything else.
func (e *ICMPError) Parse(b []byte) bool {
	*e = ICMPError{raw: b}
	if len(b) < 1 {
		return false
	}
	if b[0]>>4 == 6 {
		return e.parse6(b)
	}
	return e.parse4(b)
}

func (e *ICMPError) parse4(b []byte) bool {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != protoICMP {
		return false
	}
	ihl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if ihl < 20 || total > len(b) || total < ihl+8+20 || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
		return false
	}
	if t := b[ihl]; t != 3 && t != 11 && t != 12 {
		return false
	}
	q := b[ihl+8 : total]
	qhl := int(q[0]&15) * 4
	if q[0]>>4 != 4 || qhl < 20 || len(q) < qhl+8 || q[9] != protoTCP {
		return false
	}
	e.icmp, e.end, e.q = ihl, total, ihl+8+qhl
	e.ports(netip.AddrFrom4([4]byte(q[12:16])), netip.AddrFrom4([4]byte(q[16:20])))
	return true
}

func (e *ICMPError) parse6(b []byte) bool {
	if len(b) < 40 {
		return false
	}
	end := 40 + int(binary.BigEndian.Uint16(b[4:]))
	if end > len(b) {
		return false
	}
	proto, at, f := upper6(b[:end])
	if f != OK || proto != protoICMPv6 || end < at+8+40+8 || b[at] < 1 || b[at] > 4 {
		return false
	}
	q := b[at+8 : end]
	qproto, qat, f := upper6(q)
	if q[0]>>4 != 6 || f != OK || qproto != protoTCP || len(q) < qat+8 {
		return false
	}
	e.v6, e.icmp, e.end, e.q = true, at, end, at+8+qat
	e.ports(netip.AddrFrom16([16]byte(q[8:24])), netip.AddrFrom16([16]byte(q[24:40])))
	return true
}

// TooBig tells whether the quoted segment did not fit the path (RFC 1191, RFC 8201).
func (e *ICMPError) TooBig() bool {
	m := e.raw[e.icmp:]
	return e.v6 && m[0] == 2 || !e.v6 && m[0] == 3 && m[1] == 4
}

func (e *ICMPError) ports(src, dst netip.Addr) {
	t := e.raw[e.q:]
	e.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(t))
	e.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:]))
	e.Seq = seqnum.Value(binary.BigEndian.Uint32(t[4:]))
}

// Rewrite gives the quoted segment another source port and sequence number,
// and the message its checksum.
func (e *ICMPError) Rewrite(srcPort uint16, seq seqnum.Value) {
	t := e.raw[e.q:]
	binary.BigEndian.PutUint16(t, srcPort)
	binary.BigEndian.PutUint32(t[4:], uint32(seq))
	m := e.raw[e.icmp:e.end]
	m[2], m[3] = 0, 0
	var pseudo uint32
	if e.v6 {
		pseudo = uint32(Sum(e.raw[8:40], 0)) + protoICMPv6 + uint32(len(m))
	}
	binary.BigEndian.PutUint16(m[2:], ^Sum(m, pseudo))
}
