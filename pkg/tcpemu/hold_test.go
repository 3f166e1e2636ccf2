package tcpemu

import (
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

var (
	local  = netip.MustParseAddrPort("10.0.0.100:6379")
	remote = netip.MustParseAddrPort("10.0.0.2:40000")
)

// held is an endpoint whose next number in and out are rcv and snd; 100 octets
// towards the remote are not acknowledged, the window is 64 units of 128.
func held(rcv, snd seqnum.Value) Endpoint {
	return Endpoint{
		Local: local, Remote: remote, Opt: Options{MSS: 1460, TS: true, SACK: true, WScale: true, RemoteScale: 7, LocalScale: 7},
		SndUna: snd.Add(^uint32(99)), SndNxt: snd, RcvNxt: rcv, Window: 64, Edge: rcv.Add(64 << 7),
		RemoteWnd: 1 << 16, TSVal: 500, TSRec: 1000, TSAt: 1,
	}
}

// One row a rule; seq and ack are relative to RCV.NXT and SND.NXT.
var rows = []struct {
	name     string // with the source of the rule
	flags    uint8
	seq, ack int64
	n        int
	ts       int64 // relative to TS.Recent
	want     Verdict
}{
	{"keepalive (RFC 9293 3.8.4)", packet.ACK, -1, 0, 0, 0, Answer},
	{"keepalive of one octet", packet.ACK, -1, 0, 1, 0, Answer},
	{"zero-window probe of one new octet (3.8.6.1)", packet.ACK, 0, 0, 1, 0, Payload},
	{"plain ACK is not answered", packet.ACK, 0, 0, 0, 0, Ignore},
	{"plain ACK of old octets", packet.ACK, 0, -50, 0, 0, Ignore},
	{"data at RCV.NXT", packet.ACK | packet.PSH, 0, 0, 100, 0, Payload},
	{"data behind a hole, in the window", packet.ACK, 500, 0, 100, 0, Payload},
	{"data that begins below and ends above", packet.ACK, -10, 0, 100, 0, Payload},
	{"retransmission", packet.ACK, -100, 0, 100, 0, Answer},
	{"far below: old duplicate", packet.ACK, -1 << 29, 0, 10, 0, Answer},
	{"too far below to be old", packet.ACK, -1<<30 - 5, 0, 10, 0, OutOfWindow},
	{"empty, ahead: the remote has sent what we have not", packet.ACK, 5, 0, 0, 0, Answer},
	{"data at the edge", packet.ACK, 64 << 7, 0, 1, 0, Payload},
	{"data behind the edge (3.10.7.4)", packet.ACK, 64<<7 + 1, 0, 1, 0, OutOfWindow},
	{"FIN alone", packet.FIN | packet.ACK, 0, 0, 0, 0, Finish},
	{"FIN with data", packet.FIN | packet.ACK, 0, 0, 3, 0, Payload},
	{"FIN below RCV.NXT", packet.FIN | packet.ACK, -1, 0, 0, 0, Answer},
	{"FIN behind the edge", packet.FIN | packet.ACK, 1 << 20, 0, 0, 0, OutOfWindow},
	{"RST exact (RFC 5961 3.2)", packet.RST, 0, 0, 0, 0, Reset},
	{"RST exact with ACK", packet.RST | packet.ACK, 0, 12345, 0, 0, Reset},
	{"RST in the window", packet.RST, 1, 0, 0, 0, Challenge},
	{"RST below", packet.RST, -1, 0, 0, 0, Ignore},
	{"RST behind the window", packet.RST, 64<<7 + 1, 0, 0, 0, Ignore},
	{"SYN on a live connection (RFC 5961 4.2)", packet.SYN, 77, 0, 0, 0, Challenge},
	{"SYN-ACK", packet.SYN | packet.ACK, 0, 0, 0, 0, Challenge},
	{"no ACK bit (3.10.7.4)", packet.PSH, 0, 0, 10, 0, NoAck},
	{"acknowledges what was not sent (RFC 5961 5.2)", packet.ACK, 0, 1, 10, 0, BadAck},
	{"acknowledges from long ago", packet.ACK, 0, -1<<16 - 101, 10, 0, BadAck},
	{"the oldest acknowledgement that counts", packet.ACK, 0, -1<<16 - 100, 10, 0, Payload},
	{"PAWS (RFC 7323 5.3)", packet.ACK, 0, 0, 10, -1, OldTimestamp},
	{"keepalive with the same timestamp", packet.ACK, -1, 0, 0, 0, Answer},
	{"timestamp ahead", packet.ACK, 0, 0, 10, 1 << 20, Payload},
}

func TestReceive(t *testing.T) {
	for _, base := range []seqnum.Value{0, 5, 0x7ffffff0, 0xfffffff0, 0xffffffff} {
		for _, r := range rows {
			e := held(base, base.Add(0x1000))
			s := segment(&e, r.flags, r.seq, r.ack, r.n, r.ts)
			nxt, rcv := e.SndNxt, e.RcvNxt
			if got := e.Receive(2, s); got != r.want {
				t.Errorf("numbers from %#x: %s: verdict %d, want %d", uint32(base), r.name, got, r.want)
			}
			if e.SndNxt != nxt || e.RcvNxt != rcv {
				t.Errorf("%s: moved SND.NXT or RCV.NXT", r.name)
			}
			if bad := r.want == OutOfWindow || r.want == BadAck || r.want == OldTimestamp || r.want == NoAck || r.want == Challenge; bad && (e.TSRec != 1000 || e.SndUna != nxt.Add(^uint32(99))) {
				t.Errorf("%s: a refused segment was taken note of", r.name)
			}
		}
	}
}

func segment(e *Endpoint, flags uint8, seq, ack int64, n int, ts int64) *packet.Segment {
	sp := packet.Spec{Src: remote, Dst: local, Seq: e.RcvNxt.Add(uint32(seq)), Ack: e.SndNxt.Add(uint32(ack)),
		Flags: flags, Window: 100, Payload: make([]byte, n), HasTS: true, TSVal: e.TSRec + uint32(ts)}
	s := new(packet.Segment)
	if f := s.Parse(sp.Build(make([]byte, sp.Size()))); f != packet.OK {
		panic(f)
	}
	return s
}

func TestTakesNote(t *testing.T) {
	e := held(100, 5000)
	e.Receive(9, segment(&e, packet.ACK, 0, -20, 0, 50))
	if e.SndUna != 4980 || e.TSRec != 1050 || e.TSAt != 9 || e.RemoteLast != 100 || !e.RemoteSeen || e.RemoteField() != 100 {
		t.Fatalf("%+v", e)
	}
	e.Receive(10, segment(&e, packet.ACK, 0, -60, 0, 0)) // older: SND.UNA stays
	if e.SndUna != 4980 {
		t.Fatalf("SND.UNA went back to %d", e.SndUna)
	}
}

// After 24 days without a word TS.Recent is not trusted (RFC 7323 5.5).
func TestOutdatedTimestamp(t *testing.T) {
	e := held(1, 1)
	if v := e.Receive(e.TSAt+outdated-1, segment(&e, packet.ACK, 0, 0, 1, -5)); v != OldTimestamp {
		t.Fatal(v)
	}
	if v := e.Receive(e.TSAt+outdated, segment(&e, packet.ACK, 0, 0, 1, -5)); v != Payload {
		t.Fatal(v)
	}
}

// A window that we closed takes nothing back of what was announced.
func TestClosedWindowKeepsEdge(t *testing.T) {
	e := held(1, 1)
	e.Closed = true
	if v := e.Receive(2, segment(&e, packet.ACK, 8000, 0, 10, 0)); v != Payload {
		t.Fatal(v)
	}
	if sp := e.Ack(); sp.Window != 0 {
		t.Fatalf("window %d", sp.Window)
	}
}

func TestSpecs(t *testing.T) {
	e := held(0xffffffff, 0)
	a := e.Ack()
	if a.Seq != 0 || a.Ack != 0xffffffff || a.Flags != packet.ACK || a.Window != 64 || a.TSVal != 500 || a.TSEcr != 1000 || a.Src != local || a.Dst != remote {
		t.Errorf("ACK %+v", a)
	}
	if p := e.Probe(); p.Seq != 0xffffffff || p.Ack != 0xffffffff {
		t.Errorf("probe %+v", p)
	}
	if r := e.Rst(); r.Seq != 0 || r.Flags&packet.RST == 0 {
		t.Errorf("RST %+v", r)
	}
	s := e.Syn(e.RcvNxt.Add(^uint32(0)))
	if s.Seq != 0xfffffffe || s.Flags != packet.SYN || s.Src != remote || s.MSS != 1460 || s.WScale != 7 || !s.HasWScale || !s.SACKPermitted || s.TSVal != 1000 {
		t.Errorf("SYN %+v", s)
	}
	e.Opt = Options{}
	if s := e.Syn(1); s.HasTS || s.SACKPermitted || s.HasWScale || s.MSS != 536 {
		t.Errorf("SYN without options %+v", s)
	}
	if e.RemoteField() == 0 {
		t.Error("a remote that was never heard has no window")
	}
	sp := packet.Spec{Src: remote, Dst: local, Seq: 9, Flags: packet.SYN}
	var syn packet.Segment
	syn.Parse(sp.Build(make([]byte, sp.Size())))
	if r := RefuseSyn(&syn); r.Seq != 0 || r.Ack != 10 || r.Flags != packet.RST|packet.ACK || r.Dst != remote {
		t.Errorf("refused SYN %+v", r)
	}
}

// An edge that was announced before counts as long as it is of this window; what
// is known from another time, or not at all, does not.
func TestAnnounced(t *testing.T) {
	const ack = 0x90000000
	e := Endpoint{Opt: Options{LocalScale: 7}, Edge: ack + 0x10000000}
	if e.Announced(ack, 500, true); e.Edge != ack+500<<7 || e.Window != 500 {
		t.Errorf("edge %#x, window %d", e.Edge, e.Window)
	}
	if e.Announced(ack, 100, false); e.Edge != ack+500<<7 || e.Window != 100 {
		t.Errorf("the edge moved back to %#x", e.Edge)
	}
	if e.Announced(ack+0x50000000, 100, false); e.Edge != seqnum.Value(ack+0x50000000).Add(100<<7) {
		t.Errorf("an old edge counts: %#x", e.Edge)
	}
}
