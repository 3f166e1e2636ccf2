package nfq

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// Packet is one queued packet. It and its Payload are valid until the next
// Recv on the same queue.
type Packet struct {
	ID       uint32 // names the packet in its verdict
	Hook     uint8  // 0 PREROUTING, 1 INPUT, 2 FORWARD, 3 OUTPUT, 4 POSTROUTING
	Protocol uint16 // ethertype, host order: 0x0800 or 0x86dd
	Mark     uint32 // the packet's mark, 0 when it has none
	InDev    uint32 // index of the input device, 0 when there is none
	OutDev   uint32 // index of the output device, 0 when there is none
	OrigLen  uint32 // bytes of the whole packet; more than len(Payload) when the copy was cut
	SkbInfo  uint32 // SkbCsumNotReady, SkbGSO, SkbCsumNotVerified
	Payload  []byte // from the IP header on; the caller may modify it in place
}

// Truncated reports whether the kernel copied only a part of the packet, which
// it does beyond MaxPayload bytes. Such a packet must not be written back with
// AcceptModified: the kernel would cut it to the length given.
func (p *Packet) Truncated() bool { return p.OrigLen > uint32(len(p.Payload)) }

var (
	errShortMessage = errors.New("nfq: netlink message shorter than its header or longer than its datagram")
	errShortHeader  = errors.New("nfq: packet message without a complete nfgenmsg header")
	errAttr         = errors.New("nfq: attribute longer than its message or shorter than its type")
	errNoPacketHdr  = errors.New("nfq: packet message without a packet header")
	errNoPayload    = errors.New("nfq: packet message without a payload")
)

// message is one netlink message inside a datagram.
type message struct {
	typ   uint16
	flags uint16
	seq   uint32
	body  []byte
}

// nextMessage cuts the first message off b, RFC 3549 section 2.2. The kernel
// sends each queued packet in its own datagram, yet more than one is accepted.
func nextMessage(b []byte) (m message, rest []byte, err error) {
	if len(b) < nlmsgHdrLen {
		return message{}, nil, errShortMessage
	}
	n := binary.NativeEndian.Uint32(b)
	if n < nlmsgHdrLen || uint64(n) > uint64(len(b)) {
		return message{}, nil, errShortMessage
	}
	m.typ = binary.NativeEndian.Uint16(b[4:])
	m.flags = binary.NativeEndian.Uint16(b[6:])
	m.seq = binary.NativeEndian.Uint32(b[8:])
	m.body = b[nlmsgHdrLen:n:n]
	// The last message of a datagram may lack its padding.
	return m, b[min(align4(int(n)), len(b)):], nil
}

// parsePacket reads the body of a msgPacket message into p. On an error
// p.ID is set if the packet header was read, and hasID says so: the packet
// still waits in the kernel for a verdict.
func parsePacket(body []byte, p *Packet) (hasID bool, err error) {
	*p = Packet{}
	if len(body) < nfgenLen {
		return false, errShortHeader
	}
	var capLen uint32
	b := body[nfgenLen:]
	for len(b) >= nlaHdrLen {
		n := int(binary.NativeEndian.Uint16(b))
		if n < nlaHdrLen || n > len(b) {
			return hasID, errAttr
		}
		v := b[nlaHdrLen:n:n]
		typ := binary.NativeEndian.Uint16(b[2:]) & nlaTypeMask
		b = b[min(align4(n), len(b)):]
		switch typ {
		case attrPayload:
			p.Payload = v
			continue
		case attrPacketHdr: // packed: be32 id, be16 ethertype, u8 hook
			if len(v) < 7 {
				return hasID, errAttr
			}
			p.ID = binary.BigEndian.Uint32(v)
			p.Protocol = binary.BigEndian.Uint16(v[4:])
			p.Hook = v[6]
			hasID = true
			continue
		case attrMark, attrInDev, attrOutDev, attrCapLen, attrSkbInfo:
		default:
			continue
		}
		if len(v) < 4 {
			return hasID, errAttr
		}
		u := binary.BigEndian.Uint32(v)
		switch typ {
		case attrMark:
			p.Mark = u
		case attrInDev:
			p.InDev = u
		case attrOutDev:
			p.OutDev = u
		case attrCapLen:
			capLen = u
		case attrSkbInfo:
			p.SkbInfo = u
		}
	}
	if !hasID {
		return false, errNoPacketHdr
	}
	if len(p.Payload) == 0 {
		return true, errNoPayload
	}
	p.OrigLen = max(capLen, uint32(len(p.Payload)))
	return true, nil
}

// parseError reads the body of an NLMSG_ERROR message: 0 for an
// acknowledgement, else the error with which the kernel refused a request.
func parseError(body []byte) (unix.Errno, error) {
	if len(body) < 4 {
		return 0, errShortMessage
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code > 0 || code < -4095 { // MAX_ERRNO, include/linux/err.h
		return unix.EPROTO, nil
	}
	return unix.Errno(-code), nil
}
