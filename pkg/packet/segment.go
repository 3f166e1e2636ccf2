// Package packet gives checked views over the octets of IPv4, IPv6, TCP and
// ICMP packets, and builds them. It keeps no state and copies nothing: a view
// points into the buffer that it was made from.
package packet

import (
	"encoding/binary"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

const (
	protoICMP   = 1
	protoTCP    = 6
	protoICMPv6 = 58
)

// TCP control bits (RFC 9293 section 3.1).
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// Fault says why octets are not a segment that we work on. The zero value
// means that nothing is wrong.
type Fault uint8

// Faults of Parse, in the words that counters use.
const (
	OK Fault = iota
	Truncated
	BadIPHeader
	NotTCP
	Fragment
	BadTCPHeader
	BadOptions
)

var faultNames = [...]string{"ok", "truncated", "bad-ip-header", "not-tcp", "fragment", "bad-tcp-header", "bad-options"}

func (f Fault) String() string { return faultNames[f] }

// Options are the TCP options of one segment (RFC 9293 section 3.2, RFC 7323,
// RFC 2018). Offsets are from the start of the TCP header, 0 when absent.
type Options struct {
	MSS           uint16 // 0: absent
	WScale        uint8
	HasWScale     bool
	SACKPermitted bool
	HasTS         bool
	TSVal, TSEcr  uint32
	tsOff         int
	sackOff       int
	SACKBlocks    int
	// Refused options: RFC 2385 (MD5), RFC 5925 (AO), RFC 8684 (MPTCP).
	MD5, AO, MPTCP bool
}

// Segment is a checked view over one TCP segment with its IP header.
type Segment struct {
	raw     []byte
	v6      bool
	l4      int // offset of the TCP header
	dataOff int // offset of the payload
	end     int // end of the IP datagram; octets behind it are padding

	Src, Dst netip.AddrPort
	Seq, Ack seqnum.Value
	Flags    uint8
	Window   uint16 // as on the wire, unscaled
	Urgent   uint16
	Opt      Options
}

// Parse makes s a view over b, which begins with the IP header. It allocates
// nothing and never panics; s is to be used only when it returns OK.
func (s *Segment) Parse(b []byte) Fault {
	*s = Segment{raw: b}
	if len(b) < 1 {
		return Truncated
	}
	var f Fault
	var src, dst netip.Addr
	switch b[0] >> 4 {
	case 4:
		src, dst, f = s.parse4(b)
	case 6:
		src, dst, f = s.parse6(b)
	default:
		return BadIPHeader
	}
	if f != OK {
		return f
	}
	return s.parseTCP(src, dst)
}

func (s *Segment) parse4(b []byte) (src, dst netip.Addr, f Fault) {
	if len(b) < 20 {
		return src, dst, Truncated
	}
	ihl := int(b[0]&15) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if ihl < 20 || total < ihl {
		return src, dst, BadIPHeader
	}
	if len(b) < total {
		return src, dst, Truncated
	}
	if b[9] != protoTCP {
		return src, dst, NotTCP
	}
	if binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
		return src, dst, Fragment
	}
	s.l4, s.end = ihl, total
	return netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), OK
}

func (s *Segment) parse6(b []byte) (src, dst netip.Addr, f Fault) {
	if len(b) < 40 {
		return src, dst, Truncated
	}
	end := 40 + int(binary.BigEndian.Uint16(b[4:]))
	if len(b) < end {
		return src, dst, Truncated
	}
	proto, off, f := upper6(b[:end])
	switch {
	case f != OK:
		return src, dst, f
	case proto != protoTCP:
		return src, dst, NotTCP
	}
	s.v6, s.l4, s.end = true, off, end
	return netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), OK
}

// Extension headers of IPv6 (RFC 8200 section 4).
const (
	extHopByHop    = 0
	extRouting     = 43
	extFragment    = 44
	extDestination = 60
	maxExtensions  = 8
)

// upper6 finds the upper-layer header of an IPv6 packet behind extension
// headers that leave it whole: options, a route that has come to its end, and
// a fragment that is the only one (RFC 6946). Other headers count as upper
// layer.
func upper6(b []byte) (proto uint8, off int, f Fault) {
	proto, off = b[6], 40
	for range maxExtensions {
		switch proto {
		case extHopByHop, extRouting, extDestination, extFragment:
		default:
			return proto, off, OK
		}
		if len(b) < off+8 {
			return proto, off, Truncated
		}
		n := 8
		switch {
		case proto == extFragment && binary.BigEndian.Uint16(b[off+2:])&0xfff9 != 0:
			return proto, off, Fragment
		case proto == extRouting && b[off+3] != 0:
			return proto, off, NotTCP // this is not its destination
		case proto != extFragment:
			n += 8 * int(b[off+1])
		}
		proto, off = b[off], off+n
		if off > len(b) {
			return proto, off, Truncated
		}
	}
	return proto, off, BadIPHeader
}

// Ports reads addresses and ports of a TCP packet that need not be whole: of a
// fragment the first one names the ports. It reports false where they are not
// there.
func Ports(b []byte) (src, dst netip.AddrPort, ok bool) {
	var from, to netip.Addr
	l4 := 0
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && b[9] == protoTCP && b[6]&0x1f == 0 && b[7] == 0:
		from, to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		l4 = int(b[0]&15) * 4
	case len(b) >= 40 && b[0]>>4 == 6:
		proto, off, f := upper6(b)
		if f == Fragment && binary.BigEndian.Uint16(b[off+2:])&0xfff8 == 0 {
			proto, off, f = b[off], off+8, OK
		}
		if f != OK || proto != protoTCP {
			return src, dst, false
		}
		from, to, l4 = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), off
	}
	if !from.IsValid() || len(b) < l4+4 {
		return src, dst, false
	}
	return netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[l4:])), netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[l4+2:])), true
}

func (s *Segment) parseTCP(src, dst netip.Addr) Fault {
	h := s.raw[s.l4:s.end]
	if len(h) < 20 {
		return BadTCPHeader
	}
	hl := int(h[12]>>4) * 4
	if hl < 20 || hl > len(h) {
		return BadTCPHeader
	}
	s.dataOff = s.l4 + hl
	s.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(h))
	s.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(h[2:]))
	s.Seq = seqnum.Value(binary.BigEndian.Uint32(h[4:]))
	s.Ack = seqnum.Value(binary.BigEndian.Uint32(h[8:]))
	s.Flags = h[13]
	s.Window = binary.BigEndian.Uint16(h[14:])
	s.Urgent = binary.BigEndian.Uint16(h[18:])
	return s.Opt.parse(h[:hl])
}

// parse walks the options of header h. A length that does not fit ends in
// BadOptions; an unknown option is passed over.
func (o *Options) parse(h []byte) Fault {
	for i := 20; i < len(h); {
		kind := h[i]
		if kind == 0 {
			return OK
		}
		if kind == 1 {
			i++
			continue
		}
		if i+1 >= len(h) {
			return BadOptions
		}
		n := int(h[i+1])
		if n < 2 || i+n > len(h) {
			return BadOptions
		}
		o.one(kind, n, i, h[i:i+n])
		i += n
	}
	return OK
}

func (o *Options) one(kind byte, n, off int, b []byte) {
	switch {
	case kind == 2 && n == 4:
		o.MSS = binary.BigEndian.Uint16(b[2:])
	case kind == 3 && n == 3:
		o.HasWScale, o.WScale = true, min(b[2], 14) // RFC 7323 section 2.3
	case kind == 4 && n == 2:
		o.SACKPermitted = true
	case kind == 5 && n >= 10 && (n-2)%8 == 0:
		o.sackOff, o.SACKBlocks = off+2, (n-2)/8
	case kind == 8 && n == 10:
		o.HasTS, o.tsOff = true, off+2
		o.TSVal, o.TSEcr = binary.BigEndian.Uint32(b[2:]), binary.BigEndian.Uint32(b[6:])
	case kind == 19:
		o.MD5 = true
	case kind == 29:
		o.AO = true
	case kind == 30:
		o.MPTCP = true
	}
}

// Raw returns the datagram, IP header included, without trailing padding.
func (s *Segment) Raw() []byte { return s.raw[:s.end] }

// Payload returns the octets behind the TCP header.
func (s *Segment) Payload() []byte { return s.raw[s.dataOff:s.end] }

// PayloadLen is the number of payload octets.
func (s *Segment) PayloadLen() int { return s.end - s.dataOff }

// Has tells whether all control bits in f are set.
func (s *Segment) Has(f uint8) bool { return s.Flags&f == f }

// Len is SEG.LEN: the sequence space that the segment occupies (RFC 9293
// section 3.4): payload, SYN and FIN.
func (s *Segment) Len() uint32 {
	n := uint32(s.end - s.dataOff)
	if s.Flags&SYN != 0 {
		n++
	}
	if s.Flags&FIN != 0 {
		n++
	}
	return n
}

// End is the sequence number behind the segment.
func (s *Segment) End() seqnum.Value { return s.Seq.Add(s.Len()) }

// SACKBlock returns block i of the SACK option.
func (s *Segment) SACKBlock(i int) (left, right seqnum.Value) {
	b := s.raw[s.l4+s.Opt.sackOff+8*i:]
	return seqnum.Value(binary.BigEndian.Uint32(b)), seqnum.Value(binary.BigEndian.Uint32(b[4:]))
}

// SetSeq, SetAck, SetWindow, SetSrcPort, SetDstPort, SetTS and SetSACKBlock
// write a field and keep the checksum right (RFC 1624).

// SetSeq writes SEG.SEQ.
func (s *Segment) SetSeq(v seqnum.Value) { s.Seq = v; s.set32(4, uint32(v)) }

// SetAck writes SEG.ACK.
func (s *Segment) SetAck(v seqnum.Value) { s.Ack = v; s.set32(8, uint32(v)) }

// SetWindow writes the window field, unscaled.
func (s *Segment) SetWindow(v uint16) { s.Window = v; s.set16(14, v) }

// ClearFIN takes the FIN bit away.
func (s *Segment) ClearFIN() {
	s.Flags &^= FIN
	s.set16(12, binary.BigEndian.Uint16(s.raw[s.l4+12:])&^FIN)
}

// Trim cuts the payload to its first n octets. What is cut away may have held a
// FIN, which goes too. The checksum is computed afresh.
func (s *Segment) Trim(n int) {
	s.end = s.dataOff + n
	s.Flags &^= FIN
	s.raw[s.l4+13] &^= FIN
	if s.v6 {
		binary.BigEndian.PutUint16(s.raw[4:], uint16(s.end-40))
	} else {
		check := binary.BigEndian.Uint16(s.raw[10:])
		check = update16(check, binary.BigEndian.Uint16(s.raw[2:]), uint16(s.end))
		binary.BigEndian.PutUint16(s.raw[2:], uint16(s.end))
		binary.BigEndian.PutUint16(s.raw[10:], check)
	}
	s.FillChecksum()
}

// SetSrcPort writes the source port.
func (s *Segment) SetSrcPort(p uint16) {
	s.Src = netip.AddrPortFrom(s.Src.Addr(), p)
	s.set16(0, p)
}

// SetDstPort writes the destination port.
func (s *Segment) SetDstPort(p uint16) {
	s.Dst = netip.AddrPortFrom(s.Dst.Addr(), p)
	s.set16(2, p)
}

// SetTS writes both timestamps; the option must be there.
func (s *Segment) SetTS(val, ecr uint32) {
	if val != s.Opt.TSVal {
		s.Opt.TSVal = val
		s.set32(s.Opt.tsOff, val)
	}
	if ecr != s.Opt.TSEcr {
		s.Opt.TSEcr = ecr
		s.set32(s.Opt.tsOff+4, ecr)
	}
}

// SetSACKBlock writes block i of the SACK option.
func (s *Segment) SetSACKBlock(i int, left, right seqnum.Value) {
	s.set32(s.Opt.sackOff+8*i, uint32(left))
	s.set32(s.Opt.sackOff+8*i+4, uint32(right))
}
