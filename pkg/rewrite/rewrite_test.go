package rewrite

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

var (
	local  = netip.MustParseAddrPort("10.0.0.100:6379")
	remote = netip.MustParseAddrPort("10.0.0.2:40000")
)

// withSACK is a segment with timestamps and SACK blocks, the latter at an odd
// offset when shift is 1.
func withSACK(from, to netip.AddrPort, shift int, blocks ...seqnum.Value) []byte {
	sp := packet.Spec{Src: from, Dst: to, Seq: 0xfffffff0, Ack: 0x7fffffff, Flags: packet.ACK, Window: 1000, Payload: []byte("odd"), HasTS: true, TSVal: 0xffffff00, TSEcr: 0x10}
	b := sp.Build(make([]byte, sp.Size()))
	opt := bytes.Repeat([]byte{1}, shift)
	opt = append(opt, 5, byte(2+4*len(blocks)))
	for _, v := range blocks {
		opt = append(opt, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	for len(opt)%4 != 0 {
		opt = append(opt, 1)
	}
	out := append(bytes.Clone(b[:52]), opt...)
	out = append(out, b[52:]...)
	out[32] += byte(len(opt)/4) << 4
	out[2], out[3] = byte(len(out)>>8), byte(len(out))
	var s packet.Segment
	if f := s.Parse(out); f != packet.OK {
		panic(f)
	}
	s.FillChecksum()
	return out
}

// A segment that goes out and whose numbers come back the other way is what it
// was: Outbound and Inbound are inverse, for every combination of differences.
func TestInverse(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		tr := Translation{Out: r.Uint32(), In: r.Uint32() * (r.Uint32() & 1), TSOut: r.Uint32() * (r.Uint32() & 1), TSIn: r.Uint32() * (r.Uint32() & 1)}
		b := withSACK(local, remote, int(r.Uint32()%3), 100, 200, 0xfffffffe, 5)
		var s packet.Segment
		s.Parse(b)
		var e Edge
		tr.Outbound(&s, local.Port(), &e)
		if !s.ChecksumOK() {
			t.Fatalf("%+v: wrong checksum outbound", tr)
		}
		if s.Seq != seqnum.Value(0xfffffff0).Add(tr.Out) || s.Ack != seqnum.Value(0x7fffffff).Add(tr.In) {
			t.Fatalf("%+v: seq %d ack %d", tr, s.Seq, s.Ack)
		}
		if l, _ := s.SACKBlock(0); l != seqnum.Value(100).Add(tr.In) {
			t.Fatalf("%+v: SACK %d", tr, l)
		}
		if s.Opt.TSVal != 0xffffff00+tr.TSOut || s.Opt.TSEcr != 0x10+tr.TSIn {
			t.Fatalf("%+v: timestamps %d %d", tr, s.Opt.TSVal, s.Opt.TSEcr)
		}
		// The other way, with the roles of the two sides exchanged.
		back := Translation{Out: tr.In, In: tr.Out, TSOut: tr.TSIn, TSIn: tr.TSOut}
		back.Inbound(&s)
		if !s.ChecksumOK() || s.Seq != 0xfffffff0 || s.Ack != 0x7fffffff || s.Opt.TSVal != 0xffffff00 || s.Opt.TSEcr != 0x10 {
			t.Fatalf("%+v: not restored: %+v", tr, s)
		}
		if l, rt := s.SACKBlock(1); l != 0xfffffffe || rt != 5 {
			t.Fatalf("%+v: SACK %d %d", tr, l, rt)
		}
	}
}

// Two restores in a row are one translation with the sum of the differences.
func TestComposed(t *testing.T) {
	a, b := Translation{Out: 0x90000000, TSOut: 7}, Translation{Out: 0x80000123, TSOut: 0xfffffff0}
	sum := Translation{Out: a.Out + b.Out, TSOut: a.TSOut + b.TSOut}
	x, y := withSACK(local, remote, 1, 1, 2), withSACK(local, remote, 1, 1, 2)
	var s1, s2 packet.Segment
	s1.Parse(x)
	s2.Parse(y)
	var e Edge
	a.Outbound(&s1, local.Port(), &e)
	b.Outbound(&s1, local.Port(), &e)
	sum.Outbound(&s2, local.Port(), &e)
	if !bytes.Equal(x, y) {
		t.Fatalf("%x\n%x", x, y)
	}
}

func TestPort(t *testing.T) {
	tr := Translation{Port: 50001}
	mine := netip.AddrPortFrom(local.Addr(), 50001)
	sp := packet.Spec{Src: mine, Dst: remote, Flags: packet.ACK}
	var s packet.Segment
	s.Parse(sp.Build(make([]byte, sp.Size())))
	var e Edge
	tr.Outbound(&s, local.Port(), &e)
	if s.Src != local || !s.ChecksumOK() {
		t.Fatalf("%v", s.Src)
	}
	sp = packet.Spec{Src: remote, Dst: local, Flags: packet.ACK}
	s.Parse(sp.Build(make([]byte, sp.Size())))
	tr.Inbound(&s)
	if s.Dst != mine || !s.ChecksumOK() {
		t.Fatalf("%v", s.Dst)
	}
}

func TestWindow(t *testing.T) {
	for _, c := range []struct {
		name        string
		local, seen uint8
		field, want uint16
	}{
		{"same scale", 7, 7, 500, 500},
		{"zero stays zero", 0, 10, 0, 0},
		{"rounds up, never to zero", 0, 10, 1, 1},
		{"rounds up", 0, 10, 1025, 2},
		{"finer", 10, 0, 3, 3072},
		{"clamps", 10, 0, 1000, 65535},
	} {
		tr := Translation{ScaleLocal: c.local, ScaleSeen: c.seen}
		var e Edge
		if got := tr.Window(c.field, 1000, &e); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// However a stream advances, the remote reads at least what local granted, less
// than a unit more, and never an edge that is a whole unit behind the last.
func TestEdge(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		tr := Translation{ScaleLocal: uint8(r.Uint32() % 8), ScaleSeen: uint8(r.Uint32() % 15)}
		unit, own := uint32(1)<<tr.ScaleSeen, uint32(1)<<tr.ScaleLocal
		ack := seqnum.Value(r.Uint32())
		right := ack.Add(30000)
		var e Edge
		var last seqnum.Value
		for i := range 200 {
			ack = ack.Add(r.Uint32() % 900)
			right = right.Max(ack.Add(2000)).Add(r.Uint32() % 1500)
			field := right.Size(ack) >> tr.ScaleLocal
			if field > 65535 || uint64(right.Size(ack)) > 65535<<tr.ScaleSeen {
				break
			}
			granted := ack.Add(field << tr.ScaleLocal)
			edge := ack.Add(uint32(tr.Window(uint16(field), ack, &e)) << tr.ScaleSeen)
			if edge.Less(granted) || edge.Size(granted) >= unit+own {
				t.Fatalf("scales %d %d: the remote reads %d more than local granted", tr.ScaleLocal, tr.ScaleSeen, edge.Sub(granted))
			}
			if i > 0 && edge.Less(last) && last.Size(edge) >= unit {
				t.Fatalf("scales %d %d: the edge went back by %d", tr.ScaleLocal, tr.ScaleSeen, last.Size(edge))
			}
			last = edge
		}
	}
}

func TestICMP(t *testing.T) {
	inner := packet.Spec{Src: local, Dst: remote, Seq: 5000, Flags: packet.ACK}
	q := inner.Build(make([]byte, inner.Size()))
	b := make([]byte, 28+len(q))
	b[0], b[3], b[9], b[20] = 0x45, byte(len(b)), 1, 3
	copy(b[28:], q)
	var m packet.ICMPError
	if !m.Parse(b) {
		t.Fatal("not parsed")
	}
	tr := Translation{Out: 4000, Port: 99}
	tr.ICMP(&m, local.Port())
	if m.Parse(b); m.Seq != 1000 || m.Src.Port() != 99 {
		t.Fatalf("%+v", m)
	}
}

func TestNoAllocations(t *testing.T) {
	b := withSACK(local, remote, 1, 1, 2, 3, 4)
	tr := Translation{Out: 1, In: 2, TSOut: 3, TSIn: 4, ScaleLocal: 3, ScaleSeen: 7}
	var s packet.Segment
	var e Edge
	if n := testing.AllocsPerRun(100, func() {
		s.Parse(b)
		tr.Outbound(&s, local.Port(), &e)
		tr.Inbound(&s)
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func FuzzTranslate(f *testing.F) {
	f.Add(withSACK(local, remote, 0, 1, 2), uint32(1), uint32(2), uint32(3), uint8(4))
	f.Add(withSACK(local, remote, 1, 1, 2, 3, 4), uint32(0), uint32(1<<31), uint32(3), uint8(0x7a))
	f.Fuzz(func(t *testing.T, b []byte, out, in, ts uint32, scales uint8) {
		var s packet.Segment
		if s.Parse(b) != packet.OK {
			return
		}
		s.FillChecksum()
		tr := Translation{Out: out, In: in, TSOut: ts, TSIn: ^ts, ScaleLocal: scales & 15 % 15, ScaleSeen: scales >> 4 % 15, Port: uint16(out)}
		var e Edge
		tr.Outbound(&s, uint16(in), &e)
		if !s.ChecksumOK() {
			t.Fatalf("outbound: wrong checksum: %x", b)
		}
		tr.Inbound(&s)
		if !s.ChecksumOK() {
			t.Fatalf("inbound: wrong checksum: %x", b)
		}
	})
}
