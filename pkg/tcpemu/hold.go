// Package tcpemu emulates TCP endpoints: it holds a remote whose local side is
// away, closes a local side whose remote must not notice, and opens the
// handshake with a local side that came back. All of it is arithmetic on the
// connection's numbers; time and packets come from the caller.
package tcpemu

import (
	"cmp"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Options are what both sides agreed on in the original handshake. The tags
// number them in records.
type Options struct {
	MSS         uint16 `cbor:"1,keyasint,omitempty"` // that the remote announced
	TS          bool   `cbor:"2,keyasint,omitempty"`
	SACK        bool   `cbor:"3,keyasint,omitempty"`
	WScale      bool   `cbor:"4,keyasint,omitempty"`
	RemoteScale uint8  `cbor:"5,keyasint,omitempty"` // that the remote announced, for its own windows
	LocalScale  uint8  `cbor:"6,keyasint,omitempty"` // that the remote was told, for local's windows
	ECN         bool   `cbor:"7,keyasint,omitempty"` // RFC 3168
}

// Endpoint is the local side of a connection as the remote sees it: the send
// and receive variables of RFC 9293 section 3.3.1, in the remote's view.
type Endpoint struct {
	Local, Remote netip.AddrPort
	Opt           Options

	SndUna seqnum.Value // oldest octet that the remote has not acknowledged
	Guess  bool         // SndUna may be ahead: the remote's next acknowledgement counts, whatever it says
	SndNxt seqnum.Value // next octet that the remote expects at most
	RcvNxt seqnum.Value // next octet that the remote is to send; acknowledged up to here
	Window uint16       // field last announced, in units of Opt.LocalScale
	Edge   seqnum.Value // right edge last announced with an open window
	Closed bool         // the window was closed by us
	Behind bool         // what lies between SND.UNA and SND.NXT may have been lost: the remote expects SND.UNA

	RemoteWnd  uint32 // octets, the largest that the remote announced
	RemoteLast uint16 // window field that the remote announced last, in units of Opt.RemoteScale
	RemoteSeen bool   // RemoteLast is known

	TSVal uint32 // last TSval that this side has used
	TSRec uint32 // newest TSval of the remote (TS.Recent, RFC 7323 section 4.3)
	TSAt  int64  // when TSRec was taken, ns
}

// outdated is the age behind which TS.Recent is no longer trusted (RFC 7323
// section 5.5): 24 days.
const outdated = 24 * 24 * 3600 * int64(1e9)

// Outdated tells whether nothing was heard of the remote for so long that its
// clock may have gone half way round.
func (e *Endpoint) Outdated(now int64) bool { return e.Opt.TS && now-e.TSAt >= outdated }

// Verdict of an Endpoint on a segment of the remote.
type Verdict uint8

// Verdicts.
const (
	Ignore       Verdict = iota // nothing to say
	Answer                      // an acknowledgement with current numbers
	Challenge                   // the same, for a segment that pretends (RFC 5961)
	Payload                     // new octets at or behind RCV.NXT, inside the window
	Finish                      // FIN without octets before it, at RCV.NXT
	Reset                       // valid RST
	OutOfWindow                 // acknowledgement for a segment outside the window
	BadAck                      // acknowledgement for an acknowledgement out of range
	OldTimestamp                // acknowledgement for a segment that PAWS refuses
	NoAck                       // a segment without ACK
)

// MayAnswer tells whether v asks for an acknowledgement to the remote.
func (v Verdict) MayAnswer() bool {
	switch v {
	case Answer, Challenge, OutOfWindow, BadAck, OldTimestamp:
		return true
	}
	return false
}

// minWindow is the least receive window that Receive judges by: a remote's
// segments that were under way when a small window was announced still count.
const minWindow = 1 << 16

// Receive judges segment s of the remote for an endpoint that is held (RFC
// 9293 section 3.10.7.4, RFC 5961, RFC 7323 section 5.3) and takes note of its
// acknowledgement and timestamp. It changes neither SND.NXT nor RCV.NXT.
func (e *Endpoint) Receive(now int64, s *packet.Segment) Verdict {
	if s.Has(packet.RST) {
		return e.reset(s)
	}
	if s.Has(packet.SYN) {
		return Challenge
	}
	if !s.Has(packet.ACK) {
		return NoAck
	}
	if e.Opt.TS && s.Opt.HasTS && seqnum.NewerTS(e.TSRec, s.Opt.TSVal) && !e.Outdated(now) {
		return OldTimestamp
	}
	n := s.Len()
	if !e.acceptable(s.Seq, n) {
		return OutOfWindow
	}
	if e.SndNxt.Less(s.Ack) {
		return BadAck
	}
	if s.Ack.Less(e.SndUna.Add(-max(e.RemoteWnd, minWindow))) {
		return BadAck
	}
	if s.End().Less(e.RcvNxt.Add(^uint32(0))) {
		return Answer // an old duplicate, or anybody's guess: nothing of it counts
	}
	e.note(now, s)
	fin := s.Has(packet.FIN)
	if !e.RcvNxt.Less(s.End()) { // nothing new
		if s.Seq == e.RcvNxt && n == 0 {
			return Ignore
		}
		return Answer
	}
	if s.PayloadLen() == 0 && fin && s.Seq == e.RcvNxt {
		return Finish
	}
	if n == 0 { // empty, behind a hole: its sender holds octets that we have not
		return Answer
	}
	return Payload
}

// reset judges a RST (RFC 5961 section 3.2): only the exact number counts.
func (e *Endpoint) reset(s *packet.Segment) Verdict {
	if s.Seq == e.RcvNxt {
		return Reset
	}
	if e.RcvNxt.Less(s.Seq) && s.Seq.LessEq(e.edge()) {
		return Challenge
	}
	return Ignore
}

func (e *Endpoint) edge() seqnum.Value { return e.Edge.Max(e.RcvNxt) }

// acceptable is the test of RFC 9293 section 3.10.7.4 with the edge that was
// last open: closing the window takes nothing back. A segment that lies just
// below RCV.NXT (a keepalive, a probe, a retransmission) is let by, so that it
// is judged by the acknowledgement that it carries.
func (e *Endpoint) acceptable(seq seqnum.Value, n uint32) bool {
	if seq.Less(e.RcvNxt) {
		return e.RcvNxt.Size(seq) <= 1<<30
	}
	return seq.LessEq(e.edge()) || seq == e.RcvNxt
}

// note takes acknowledgement, window and timestamp of an acceptable segment.
func (e *Endpoint) note(now int64, s *packet.Segment) {
	e.Acked(s.Ack)
	e.NoteWindow(s)
	if e.Opt.TS && s.Opt.HasTS && s.Seq.LessEq(e.RcvNxt) {
		e.TSRec, e.TSAt = s.Opt.TSVal, now
	}
}

// Acked takes an acknowledgement of the remote.
func (e *Endpoint) Acked(ack seqnum.Value) {
	if e.Guess || e.SndUna.Less(ack) {
		e.SndUna, e.Guess = ack, false
	}
}

// NoteWindow takes the window that s, a segment of the remote, announces.
func (e *Endpoint) NoteWindow(s *packet.Segment) {
	w := uint32(s.Window)
	if !s.Has(packet.SYN) { // the window of a SYN is never scaled
		w <<= e.Opt.RemoteScale
		e.RemoteLast, e.RemoteSeen = s.Window, true
	}
	e.RemoteWnd = max(e.RemoteWnd, w)
}

// Announced takes the window field that local announces with acknowledgement
// ack. The edge never moves back; first tells that none is known of now.
func (e *Endpoint) Announced(ack seqnum.Value, window uint16, first bool) {
	e.Window = window
	right := ack.Add(uint32(window) << e.Opt.LocalScale)
	if first || e.Edge.Less(right) || !e.Edge.InRange(ack, ack.Add(1<<30)) {
		e.Edge = right
	}
}

// Extend moves the edge to where the window, from RCV.NXT on, ends now.
func (e *Endpoint) Extend() {
	e.Edge = e.Edge.Max(e.RcvNxt.Add(uint32(e.Window) << e.Opt.LocalScale))
}

// Ack describes the acknowledgement with current numbers that a held remote is
// given (behaviour of a quiet, living peer).
func (e *Endpoint) Ack() packet.Spec {
	sp := packet.Spec{
		Src: e.Local, Dst: e.Remote, Seq: e.Next(), Ack: e.RcvNxt,
		Flags: packet.ACK, Window: e.Window,
	}
	if e.Closed {
		sp.Window = 0
	}
	if e.Opt.TS {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, e.TSVal, e.TSRec
	}
	return sp
}

// Next is the number that the remote expects.
func (e *Endpoint) Next() seqnum.Value {
	if e.Behind {
		return e.SndUna
	}
	return e.SndNxt
}

// Probe describes an empty segment below that number: a living remote answers it
// with an acknowledgement, a dead one with RST (RFC 9293 section 3.8.4).
func (e *Endpoint) Probe() packet.Spec {
	sp := e.Ack()
	sp.Seq = sp.Seq.Add(^uint32(0))
	return sp
}

// Rst describes the reset that a held remote accepts.
func (e *Endpoint) Rst() packet.Spec {
	return packet.Spec{
		Src: e.Local, Dst: e.Remote, Seq: e.Next(), Ack: e.RcvNxt,
		Flags: packet.RST | packet.ACK,
	}
}

// defaultMSS holds where a remote announced none (RFC 9293 section 3.7.1).
const defaultMSS = 536

// Syn describes the SYN of the emulated handshake with a local side that came
// back: the remote's original options and numbers, its initial number one
// below the next octet that it will send.
func (e *Endpoint) Syn(irs seqnum.Value) packet.Spec {
	o := e.Opt
	flags := uint8(packet.SYN)
	if o.ECN { // else nobody would tell the remote of congestion on its way
		flags |= packet.ECE | packet.CWR
	}
	return packet.Spec{
		Src: e.Remote, Dst: e.Local, Seq: irs, Flags: flags,
		Window: 65535, MSS: cmp.Or(o.MSS, defaultMSS), HasWScale: o.WScale, WScale: o.RemoteScale,
		SACKPermitted: o.SACK, HasTS: o.TS, TSVal: e.TSRec,
	}
}

// SynAck describes the answer, in the remote's name, to the SYN with which local
// opens an active connection again from its own address local: the remote's
// original options and numbers, as in Syn.
func (e *Endpoint) SynAck(local netip.AddrPort, irs seqnum.Value, syn *packet.Segment) packet.Spec {
	sp := e.Syn(irs)
	sp.Dst = local
	sp.Flags = packet.SYN | packet.ACK
	if e.Opt.ECN {
		sp.Flags |= packet.ECE
	}
	sp.Ack = syn.Seq.Add(1)
	if sp.HasTS {
		sp.TSEcr = syn.Opt.TSVal
	}
	return sp
}

// RemoteField is the window field of the remote for the emulated handshake;
// where the remote was never heard, a small one that its next segment mends.
func (e *Endpoint) RemoteField() uint16 {
	if e.RemoteSeen {
		return e.RemoteLast
	}
	return max(uint16(1<<14>>e.Opt.RemoteScale), 1)
}

// RefuseSyn describes the RST that answers a SYN to a closed port (RFC 9293
// section 3.10.7.1).
func RefuseSyn(s *packet.Segment) packet.Spec {
	return packet.Spec{
		Src: s.Dst, Dst: s.Src, Seq: 0, Ack: s.End(), Flags: packet.RST | packet.ACK,
	}
}
