// Package rewrite translates the segments of a connection whose local side was
// replaced by a new one: the remote goes on with the numbers that it knows,
// the new local stack with its own.
package rewrite

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Translation is the difference between the remote's view of a connection and
// the local stack's. Differences are taken modulo 2^32 and mean
// remote view = local view + difference.
type Translation struct {
	Out   uint32 `cbor:"1,keyasint,omitempty"` // of local's sequence numbers: SEG.SEQ outbound, SEG.ACK and SACK inbound
	In    uint32 `cbor:"2,keyasint,omitempty"` // of the remote's sequence numbers: SEG.SEQ inbound, SEG.ACK and SACK outbound
	TSOut uint32 `cbor:"3,keyasint,omitempty"` // of local's timestamp clock: TSval outbound, TSecr inbound
	TSIn  uint32 `cbor:"4,keyasint,omitempty"` // of the remote's timestamp clock: TSval inbound, TSecr outbound

	Port uint16 `cbor:"5,keyasint,omitempty"` // local's own port; 0: the one that the remote sees

	// Window scale that local announced in its present handshake and the one
	// that the remote was told in the original handshake (RFC 7323 section 2).
	ScaleLocal uint8 `cbor:"6,keyasint,omitempty"`
	ScaleSeen  uint8 `cbor:"7,keyasint,omitempty"`
}

// Edge is the right window edge that local granted last, in the remote's view
// and before rounding to the remote's units.
type Edge struct {
	Right seqnum.Value
	Known bool
}

// Outbound rewrites s, a segment of the local stack, into the remote's view.
// seenPort is the local port that the remote knows. e keeps the announced edge.
func (t *Translation) Outbound(s *packet.Segment, seenPort uint16, e *Edge) {
	if t.Out != 0 {
		s.SetSeq(s.Seq.Add(t.Out))
	}
	if s.Has(packet.ACK) && t.In != 0 {
		s.SetAck(s.Ack.Add(t.In))
		for i := range s.Opt.SACKBlocks {
			l, r := s.SACKBlock(i)
			s.SetSACKBlock(i, l.Add(t.In), r.Add(t.In))
		}
	}
	if s.Opt.HasTS && (t.TSOut != 0 || t.TSIn != 0) {
		ecr := s.Opt.TSEcr
		if ecr != 0 || s.Has(packet.ACK) {
			ecr += t.TSIn
		}
		s.SetTS(s.Opt.TSVal+t.TSOut, ecr)
	}
	if t.Port != 0 && t.Port != seenPort {
		s.SetSrcPort(seenPort)
	}
	if t.ScaleLocal != t.ScaleSeen && !s.Has(packet.RST) {
		if w := t.Window(s.Window, s.Ack, e); w != s.Window {
			s.SetWindow(w)
		}
	}
}

// Inbound rewrites s, a segment of the remote, into the local stack's view.
func (t *Translation) Inbound(s *packet.Segment) {
	if t.In != 0 {
		s.SetSeq(s.Seq.Add(-t.In))
	}
	if s.Has(packet.ACK) && t.Out != 0 {
		s.SetAck(s.Ack.Add(-t.Out))
		for i := range s.Opt.SACKBlocks {
			l, r := s.SACKBlock(i)
			s.SetSACKBlock(i, l.Add(-t.Out), r.Add(-t.Out))
		}
	}
	if s.Opt.HasTS && (t.TSOut != 0 || t.TSIn != 0) {
		ecr := s.Opt.TSEcr
		if ecr != 0 || s.Has(packet.ACK) {
			ecr -= t.TSOut
		}
		s.SetTS(s.Opt.TSVal-t.TSIn, ecr)
	}
	if t.Port != 0 && t.Port != s.Dst.Port() {
		s.SetDstPort(t.Port)
	}
}

// Window turns window field w of a segment that acknowledges ack (remote's
// view) into the field that the remote reads with the scale it was told. A
// window that is not zero rounds up: it never becomes zero, and the remote
// never reads less than local granted, also before, where local's own rounding
// took a little back. Between two segments the edge that the remote reads can
// step back by less than one of its units; rounding from the edge read before
// would instead drift ever farther from what local takes. Values end at 65535.
// Zero stays zero: local sends the update that opens it.
func (t *Translation) Window(w uint16, ack seqnum.Value, e *Edge) uint16 {
	if w == 0 {
		return 0
	}
	unit := uint32(1)<<t.ScaleSeen - 1
	right := ack.Add(uint32(w) << t.ScaleLocal)
	if e.Known && right.Less(e.Right) && e.Right.Size(right) < uint32(1)<<t.ScaleLocal {
		right = e.Right
	}
	e.Right, e.Known = right, true
	field := (uint64(right.Size(ack)) + uint64(unit)) >> t.ScaleSeen
	return uint16(min(field, 65535))
}

// ICMP rewrites the segment quoted in an ICMP error, which the remote side of
// the network saw, into what local sent (RFC 5508 section 4.2 does the same
// for address translation).
func (t *Translation) ICMP(e *packet.ICMPError, localPort uint16) {
	port := localPort
	if t.Port != 0 {
		port = t.Port
	}
	e.Rewrite(port, e.Seq.Add(-t.Out))
}
