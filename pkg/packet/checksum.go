package packet

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds the 16-bit words of b to the running one's complement sum (RFC
// 1071). An odd last octet is padded with zero. The result is folded to 16
// bits and not complemented.
func Sum(b []byte, initial uint32) uint16 {
	sum := uint64(initial)
	var carry uint64
	for len(b) >= 32 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), 0)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[8:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[16:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[24:]), carry)
		sum, carry = bits.Add64(sum, 0, carry)
		sum += carry
		b = b[32:]
	}
	for len(b) >= 8 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), 0)
		sum += carry
		b = b[8:]
	}
	if len(b) > 0 {
		var last [8]byte
		copy(last[:], b)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(last[:]), 0)
		sum += carry
	}
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return uint16(sum)
}

// update16 replaces one 16-bit word in a checksum (RFC 1624, equation 3).
func update16(check, old, new uint16) uint16 {
	s := uint32(^check) + uint32(^old) + uint32(new)
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return ^uint16(s)
}

// pseudoSum is the sum of the pseudo header for l4 octets of protocol p (RFC
// 9293 section 3.1, RFC 8200 section 8.1), not complemented.
func (s *Segment) pseudoSum(l4 int) uint32 {
	var sum uint32
	if s.v6 {
		sum = uint32(Sum(s.raw[8:40], 0))
	} else {
		sum = uint32(Sum(s.raw[12:20], 0))
	}
	return sum + protoTCP + uint32(l4>>16) + uint32(l4&0xffff)
}

// ChecksumOK tells whether the TCP checksum is right. It reads the whole
// segment.
func (s *Segment) ChecksumOK() bool {
	l4 := s.raw[s.l4:s.end]
	return Sum(l4, s.pseudoSum(len(l4))) == 0xffff
}

// FillChecksum computes the TCP checksum afresh, as is needed where the kernel
// left a partial one (NFQA_SKB_CSUMNOTREADY) or lengths changed.
func (s *Segment) FillChecksum() {
	l4 := s.raw[s.l4:s.end]
	l4[16], l4[17] = 0, 0
	binary.BigEndian.PutUint16(l4[16:], ^Sum(l4, s.pseudoSum(len(l4))))
}

// set32 writes a 32-bit word at offset off of the TCP header and updates the
// checksum incrementally; off may be odd (options are not aligned).
func (s *Segment) set32(off int, v uint32) {
	l4 := s.raw[s.l4:s.end]
	check := binary.BigEndian.Uint16(l4[16:])
	if off%2 == 0 {
		check = update16(check, binary.BigEndian.Uint16(l4[off:]), uint16(v>>16))
		check = update16(check, binary.BigEndian.Uint16(l4[off+2:]), uint16(v))
		binary.BigEndian.PutUint32(l4[off:], v)
	} else {
		// The word straddles three aligned ones, of which the outer two are
		// half ours.
		for i := range 3 {
			at := off - 1 + 2*i
			old := binary.BigEndian.Uint16(l4[at:])
			var nw uint16
			switch i {
			case 0:
				nw = old&0xff00 | uint16(v>>24)
			case 1:
				nw = uint16(v >> 8)
			default:
				nw = uint16(v)<<8 | old&0x00ff
			}
			check = update16(check, old, nw)
			binary.BigEndian.PutUint16(l4[at:], nw)
		}
	}
	binary.BigEndian.PutUint16(l4[16:], check)
}

func (s *Segment) set16(off int, v uint16) {
	l4 := s.raw[s.l4:s.end]
	check := update16(binary.BigEndian.Uint16(l4[16:]), binary.BigEndian.Uint16(l4[off:]), v)
	binary.BigEndian.PutUint16(l4[off:], v)
	binary.BigEndian.PutUint16(l4[16:], check)
}
