package packet

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

var (
	src4 = netip.MustParseAddrPort("10.0.0.2:40000")
	dst4 = netip.MustParseAddrPort("192.0.2.100:6379")
	src6 = netip.MustParseAddrPort("[2001:db8::2]:40000")
	dst6 = netip.MustParseAddrPort("[2001:db8::100]:6379")
)

// naive is RFC 1071 by the letter.
func naive(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
		s = s>>16 + s&0xffff
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		if got, want := Sum(b, 0), naive(b); got != want && got^want != 0xffff {
			t.Fatalf("%d octets: %#x, want %#x", n, got, want)
		}
	}
	for _, n := range []int{65531, 65535, 65536} {
		b := bytes.Repeat([]byte{0xff}, n)
		if got, want := Sum(b, 0), naive(b); got != want {
			t.Errorf("%d octets of 0xff: %#x, want %#x", n, got, want)
		}
	}
}

// specs cover families, options and odd lengths.
func specs() []Spec {
	var out []Spec
	for _, ends := range [][2]netip.AddrPort{{src4, dst4}, {src6, dst6}} {
		for _, n := range []int{0, 1, 7, 536, 1447, 1448} {
			for opts := range 16 {
				sp := Spec{Src: ends[0], Dst: ends[1], Seq: 0xfffffffe, Ack: 0x80000001, Flags: ACK | PSH, Window: 501,
					Payload: bytes.Repeat([]byte{0xab, 0x01, 0xfe}, n)[:n]}
				if opts&1 != 0 {
					sp.MSS = 1460
				}
				sp.SACKPermitted = opts&2 != 0
				if opts&4 != 0 {
					sp.HasTS, sp.TSVal, sp.TSEcr = true, 0xfffffff0, 0x12345678
				}
				if opts&8 != 0 {
					sp.HasWScale, sp.WScale = true, 10
				}
				out = append(out, sp)
			}
		}
	}
	return out
}

// What Build makes gopacket reads back, with the same checksums, and Parse too.
func TestBuildAgainstGopacket(t *testing.T) {
	for _, sp := range specs() {
		b := sp.Build(make([]byte, sp.Size()))
		first := gopacket.LayerType(layers.LayerTypeIPv4)
		if sp.Src.Addr().Is6() {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(b, first, gopacket.Default)
		tcp, _ := p.TransportLayer().(*layers.TCP)
		if tcp == nil || p.ErrorLayer() != nil {
			t.Fatalf("%+v: gopacket: %v", sp, p.ErrorLayer())
		}
		if tcp.Seq != uint32(sp.Seq) || tcp.Ack != uint32(sp.Ack) || tcp.Window != sp.Window || !bytes.Equal(tcp.Payload, sp.Payload) {
			t.Fatalf("%+v: gopacket reads %+v", sp, tcp)
		}
		if err := tcp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
			t.Fatal(err)
		}
		buf := gopacket.NewSerializeBuffer()
		if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true}, tcp, gopacket.Payload(tcp.Payload)); err != nil {
			t.Fatal(err)
		}
		if got, want := tcp.Checksum, binary.BigEndian.Uint16(buf.Bytes()[16:]); got != want {
			t.Fatalf("%+v: checksum %#x, gopacket computes %#x", sp, got, want)
		}
		var s Segment
		if f := s.Parse(b); f != OK {
			t.Fatalf("%+v: %v", sp, f)
		}
		if !s.ChecksumOK() || s.Src != sp.Src || s.Dst != sp.Dst || s.Seq != sp.Seq || s.Ack != sp.Ack || s.Opt.MSS != sp.MSS ||
			s.Opt.HasTS != sp.HasTS || s.Opt.TSVal != sp.TSVal || s.Opt.TSEcr != sp.TSEcr || s.Opt.SACKPermitted != sp.SACKPermitted ||
			s.Opt.HasWScale != sp.HasWScale || s.Opt.WScale != sp.WScale || !bytes.Equal(s.Payload(), sp.Payload) {
			t.Fatalf("%+v: parsed as %+v", sp, s)
		}
	}
}

func TestParseFaults(t *testing.T) {
	sp := Spec{Src: src4, Dst: dst4, Flags: ACK, HasTS: true, Payload: []byte("hello")}
	good := sp.Build(make([]byte, sp.Size()))
	for _, c := range []struct {
		name string
		want Fault
		edit func([]byte) []byte
	}{
		{"as it is", OK, func(b []byte) []byte { return b }},
		{"padding behind the datagram", OK, func(b []byte) []byte { return append(b, 0, 0, 0) }},
		{"empty", Truncated, func([]byte) []byte { return nil }},
		{"19 octets", Truncated, func(b []byte) []byte { return b[:19] }},
		{"one octet short", Truncated, func(b []byte) []byte { return b[:len(b)-1] }},
		{"version 5", BadIPHeader, func(b []byte) []byte { b[0] = 0x55; return b }},
		{"header length 16", BadIPHeader, func(b []byte) []byte { b[0] = 0x44; return b }},
		{"total length below header", BadIPHeader, func(b []byte) []byte { b[2], b[3] = 0, 10; return b }},
		{"UDP", NotTCP, func(b []byte) []byte { b[9] = 17; return b }},
		{"first fragment", Fragment, func(b []byte) []byte { b[6] = 0x20; return b }},
		{"later fragment", Fragment, func(b []byte) []byte { b[7] = 1; return b }},
		{"no room for TCP", BadTCPHeader, func(b []byte) []byte { b[2], b[3] = 0, 30; return b }},
		{"data offset 4", BadTCPHeader, func(b []byte) []byte { b[32] = 0x40; return b }},
		{"data offset behind the end", BadTCPHeader, func(b []byte) []byte { b[32] = 0xf0; return b }},
		{"option of length 1", BadOptions, func(b []byte) []byte { b[40], b[41] = 8, 1; return b }},
		{"option past the header", BadOptions, func(b []byte) []byte { b[42], b[43] = 8, 40; return b }},
		{"kind without a length", BadOptions, func(b []byte) []byte { copy(b[40:52], bytes.Repeat([]byte{1}, 12)); b[51] = 8; return b }},
		{"end of options", OK, func(b []byte) []byte { b[40], b[41] = 0, 99; return b }},
		{"timestamp of a wrong length", OK, func(b []byte) []byte { b[43] = 9; b[51] = 1; return b }},
		{"IPv6 truncated", Truncated, func([]byte) []byte { return []byte{0x60, 0, 0} }},
		{"IPv6 fragment", Fragment, func([]byte) []byte { b := make([]byte, 48); b[0], b[5], b[6], b[43] = 0x60, 8, 44, 1; return b }},
		{"IPv6 hop by hop without end", BadIPHeader, func([]byte) []byte { b := make([]byte, 140); b[0], b[5] = 0x60, 100; return b }},
		{"IPv6 hop by hop cut", Truncated, func([]byte) []byte { b := make([]byte, 44); b[0], b[5] = 0x60, 4; return b }},
		{"IPv6 hop by hop longer than all", Truncated, func([]byte) []byte { b := make([]byte, 48); b[0], b[5], b[41] = 0x60, 8, 9; return b }},
		{"IPv6 UDP behind options", NotTCP, func([]byte) []byte { b := make([]byte, 60); b[0], b[5], b[40] = 0x60, 20, 17; return b }},
		{"IPv6 ESP", NotTCP, func([]byte) []byte { b := make([]byte, 60); b[0], b[5], b[6] = 0x60, 20, 50; return b }},
		{"IPv6 on its way", NotTCP, func([]byte) []byte {
			b := make([]byte, 60)
			b[0], b[5], b[6], b[40], b[43] = 0x60, 20, 43, 6, 1
			return b
		}},
	} {
		var s Segment
		if got := s.Parse(c.edit(bytes.Clone(good))); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// Every setter leaves the checksum that a full computation gives, also where
// options stand at odd offsets.
// extended puts extension headers between the IPv6 header and the rest.
func extended(b []byte, headers ...[]byte) []byte {
	next := b[6]
	var ext []byte
	for i, h := range headers {
		kind := h[0]
		h = append([]byte(nil), h[1:]...)
		h[0] = next
		if i+1 < len(headers) {
			h[0] = headers[i+1][0]
		}
		if i == 0 {
			b[6] = kind
		}
		ext = append(ext, h...)
	}
	out := append(append(append([]byte(nil), b[:40]...), ext...), b[40:]...)
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

var (
	hopByHop    = append([]byte{0, 0, 0, 1, 4}, make([]byte, 4)...)
	destination = append([]byte{60, 0, 1, 1, 12}, make([]byte, 12)...)
	routeEnded  = append([]byte{43, 0, 0, 4, 0}, make([]byte, 4)...)
	atomic      = append([]byte{44, 0, 0, 0, 0}, make([]byte, 4)...)
	firstPiece  = append([]byte{44, 0, 0, 0, 1}, make([]byte, 4)...)
	laterPiece  = append([]byte{44, 0, 0, 0, 9}, make([]byte, 4)...)
)

// Extension headers that leave a segment whole are passed over, and the
// segment behind them is read and written as any other.
func TestExtensionHeaders(t *testing.T) {
	sp := Spec{Src: netip.MustParseAddrPort("[fd00::2]:4000"), Dst: netip.MustParseAddrPort("[fd00::100]:80"), Seq: 7, Ack: 9,
		Flags: ACK, Window: 500, HasTS: true, TSVal: 3, TSEcr: 4, Payload: []byte("abc")}
	plain := sp.Build(make([]byte, sp.Size()))
	for name, ext := range map[string][][]byte{
		"hop by hop": {hopByHop}, "destination": {destination}, "route": {routeEnded}, "atomic fragment": {atomic},
		"all": {hopByHop, destination, routeEnded, atomic, destination},
	} {
		b := extended(append([]byte(nil), plain...), ext...)
		var s Segment
		if f := s.Parse(b); f != OK || s.Src != sp.Src || s.Dst != sp.Dst || s.Seq != 7 || string(s.Payload()) != "abc" || !s.ChecksumOK() {
			t.Errorf("%s: %v, %v > %v seq %d, %q", name, f, s.Src, s.Dst, s.Seq, s.Payload())
			continue
		}
		s.SetSeq(1 << 31)
		s.SetDstPort(81)
		s.SetTS(77, 78)
		if f := s.Parse(b); f != OK || s.Seq != 1<<31 || s.Dst.Port() != 81 || s.Opt.TSVal != 77 || !s.ChecksumOK() {
			t.Errorf("%s: after writing: %v, seq %d, port %d, ts %d, checksum %v", name, f, s.Seq, s.Dst.Port(), s.Opt.TSVal, s.ChecksumOK())
		}
		g := gopacket.NewPacket(b, layers.LayerTypeIPv6, gopacket.Default)
		if tcp, _ := g.TransportLayer().(*layers.TCP); (name == "hop by hop" || name == "destination") && (tcp == nil || tcp.Seq != 1<<31 || tcp.DstPort != 81) {
			t.Errorf("%s: gopacket reads %v", name, g)
		}
	}
	for name, ext := range map[string][][]byte{"first": {hopByHop, firstPiece}, "later": {laterPiece}} {
		b := extended(append([]byte(nil), plain...), ext...)
		var s Segment
		if f := s.Parse(b); f != Fragment {
			t.Errorf("%s fragment: %v", name, f)
		}
		src, dst, ok := Ports(b)
		if ok != (name == "first") || ok && (src != sp.Src || dst != sp.Dst) {
			t.Errorf("%s fragment: ports %v %v %v", name, src, dst, ok)
		}
	}
}

func TestSettersKeepChecksum(t *testing.T) {
	for _, sp := range specs() {
		b := sp.Build(make([]byte, sp.Size()))
		var s Segment
		s.Parse(b)
		s.SetSeq(0x01020304)
		s.SetAck(0xfffefdfc)
		s.SetWindow(7)
		s.SetSrcPort(1)
		s.SetDstPort(65535)
		s.ClearFIN()
		if s.Opt.HasTS {
			s.SetTS(1, 0xffffffff)
		}
		if !s.ChecksumOK() {
			t.Fatalf("%+v: wrong checksum after setters", sp)
		}
		var again Segment
		if f := again.Parse(b); f != OK || again.Seq != s.Seq || again.Ack != s.Ack || again.Opt.TSEcr != s.Opt.TSEcr || again.Src.Port() != 1 {
			t.Fatalf("%+v: reads back as %+v", sp, again)
		}
	}
}

func TestTrim(t *testing.T) {
	for _, sp := range specs() {
		whole := sp.Build(make([]byte, sp.Size()))
		for n := range len(sp.Payload) + 1 {
			b := bytes.Clone(whole)
			var s, again Segment
			s.Parse(b)
			s.Trim(n)
			if f := again.Parse(s.Raw()); f != OK || !again.ChecksumOK() || !bytes.Equal(again.Payload(), sp.Payload[:n]) ||
				again.Flags != sp.Flags&^FIN || again.Seq != sp.Seq || again.Ack != sp.Ack || s.PayloadLen() != n || s.Flags != again.Flags {
				t.Fatalf("%+v cut to %d: %v, reads back as %+v", sp, n, f, again)
			}
			if again.v6 {
				continue
			}
			if sum := Sum(b[:again.l4], 0); sum != 0xffff {
				t.Errorf("%+v cut to %d: wrong checksum of the IPv4 header", sp, n)
			}
		}
	}
}

// odd is a segment with a one-octet NOP before timestamps and SACK, so that
// both stand at odd offsets.
func odd() []byte {
	sp := Spec{Src: src4, Dst: dst4, Seq: 5, Ack: 6, Flags: ACK, Payload: []byte("abc")}
	plain := sp.Build(make([]byte, sp.Size()))
	opt := []byte{1, 8, 10, 0, 0, 1, 0, 0, 0, 2, 0, 5, 18, 0, 0, 0, 9, 0, 0, 0, 12, 255, 255, 255, 255, 0, 0, 0, 3, 1, 1, 1}
	opt[11-1] = 1 // a NOP between the two
	b := append(bytes.Clone(plain[:40]), opt...)
	b = append(b, "abc"...)
	b[32] = byte((20+len(opt))/4) << 4
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	var s Segment
	s.Parse(b)
	s.FillChecksum()
	return b
}

func TestOddOptions(t *testing.T) {
	b := odd()
	var s Segment
	if f := s.Parse(b); f != OK || !s.Opt.HasTS || s.Opt.SACKBlocks != 2 || !s.ChecksumOK() {
		t.Fatalf("%v %+v", f, s.Opt)
	}
	s.SetTS(0xdeadbeef, 0x00ff00ff)
	s.SetSACKBlock(0, 100, 200)
	s.SetSACKBlock(1, 0xffffff00, 0x10)
	if !s.ChecksumOK() {
		t.Fatal("wrong checksum")
	}
	var again Segment
	again.Parse(b)
	l, r := again.SACKBlock(1)
	if again.Opt.TSVal != 0xdeadbeef || l != 0xffffff00 || r != 0x10 {
		t.Fatalf("%+v %v %v", again.Opt, l, r)
	}
}

func TestLen(t *testing.T) {
	sp := Spec{Src: src4, Dst: dst4, Seq: 0xffffffff, Flags: SYN | FIN | ACK, Payload: []byte("ab")}
	var s Segment
	s.Parse(sp.Build(make([]byte, sp.Size())))
	if s.Len() != 4 || s.End() != seqnum.Value(3) {
		t.Fatalf("%d %d", s.Len(), s.End())
	}
}

func TestICMP(t *testing.T) {
	inner := Spec{Src: dst4, Dst: src4, Seq: 1000, Flags: ACK, Payload: []byte("x")}
	q := inner.Build(make([]byte, inner.Size()))
	for _, quoted := range [][]byte{q, q[:28]} { // the whole, and the least that RFC 792 asks for
		b := make([]byte, 28+len(quoted))
		b[0], b[9] = 0x45, 1
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[20], b[21] = 3, 4
		copy(b[28:], quoted)
		var e ICMPError
		if !e.Parse(b) || e.Src != dst4 || e.Dst != src4 || e.Seq != 1000 {
			t.Fatalf("%+v", e)
		}
		e.Rewrite(77, 0xffffffff)
		if naive(b[20:]) != 0xffff {
			t.Fatal("wrong ICMP checksum")
		}
		var again ICMPError
		if !again.Parse(b) || again.Src.Port() != 77 || again.Seq != 0xffffffff {
			t.Fatalf("%+v", again)
		}
		for n := range b {
			e.Parse(b[:n]) // never panics
		}
		b[20] = 8 // an echo request quotes nothing
		if e.Parse(b) {
			t.Fatal("an echo request was taken for an error")
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(odd())
	for _, sp := range specs()[:20] {
		f.Add(sp.Build(make([]byte, sp.Size())))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var e ICMPError
		if e.Parse(b) {
			e.Rewrite(1, 2)
		}
		var s Segment
		if s.Parse(b) != OK {
			return
		}
		s.FillChecksum()
		s.SetSeq(s.Seq.Add(7))
		s.SetAck(s.Ack.Add(9))
		s.SetWindow(s.Window + 1)
		if s.Opt.HasTS {
			s.SetTS(s.Opt.TSVal+3, s.Opt.TSEcr-3)
		}
		for i := range s.Opt.SACKBlocks {
			l, r := s.SACKBlock(i)
			s.SetSACKBlock(i, l.Add(1), r.Add(1))
		}
		// Options may lie over one another only in what a fuzzer makes; then
		// the view and the octets differ, but the sum must still be right.
		if !s.ChecksumOK() {
			t.Fatalf("wrong checksum after setters: %x", b)
		}
	})
}

func TestNoAllocations(t *testing.T) {
	sp := Spec{Src: src6, Dst: dst6, Flags: ACK, HasTS: true, Payload: make([]byte, 1400)}
	b := sp.Build(make([]byte, sp.Size()))
	var s Segment
	ok := true
	if n := testing.AllocsPerRun(100, func() {
		ok = ok && s.Parse(b) == OK && s.ChecksumOK()
		s.SetSeq(s.Seq.Add(1))
		s.SetTS(s.Opt.TSVal+1, 5)
		sp.Build(b)
	}); n != 0 || !ok {
		t.Fatalf("%v allocations, %v", n, ok)
	}
}

func BenchmarkSum64K(b *testing.B) {
	buf := make([]byte, 65536)
	b.SetBytes(65536)
	for b.Loop() {
		Sum(buf, 0)
	}
}
