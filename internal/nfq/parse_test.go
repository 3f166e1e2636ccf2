package nfq

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// body encodes a packet message's body with mdlayher/netlink.
func body(t testing.TB, family uint8, fill func(e *netlink.AttributeEncoder)) []byte {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	fill(e)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte{family, 0, 0, 7}, b...)
}

func fullBody(t testing.TB, payload []byte) []byte {
	return body(t, unix.AF_INET, func(e *netlink.AttributeEncoder) {
		e.Bytes(attrPacketHdr, []byte{0x01, 0x02, 0x03, 0x04, 0x86, 0xdd, 3})
		e.Uint32(attrInDev, 11)
		e.Uint32(attrOutDev, 12)
		e.Uint32(attrMark, 0xdeadbeef)
		e.Bytes(9, []byte{0, 6, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0}) // NFQA_HWADDR: skipped
		e.Uint32(attrCapLen, 70000)
		e.Uint32(attrSkbInfo, SkbCsumNotReady|SkbGSO)
		e.Bytes(attrPayload, payload)
	})
}

func datagram(typ uint16, seq uint32, bodies ...[]byte) []byte {
	var b []byte
	for _, body := range bodies {
		b = append(b, make([]byte, align4(len(b))-len(b))...)
		b = binary.NativeEndian.AppendUint32(b, uint32(nlmsgHdrLen+len(body)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		b = binary.NativeEndian.AppendUint16(b, 0)
		b = binary.NativeEndian.AppendUint32(b, seq)
		b = binary.NativeEndian.AppendUint32(b, 0)
		b = append(b, body...)
	}
	return b
}

func TestParsePacket(t *testing.T) {
	payload := []byte("12345")
	var p Packet
	hasID, err := parsePacket(fullBody(t, payload), &p)
	if err != nil || !hasID {
		t.Fatalf("hasID %v, err %v", hasID, err)
	}
	want := Packet{ID: 0x01020304, Hook: 3, Protocol: 0x86dd, Mark: 0xdeadbeef, InDev: 11, OutDev: 12,
		OrigLen: 70000, SkbInfo: SkbCsumNotReady | SkbGSO, Payload: payload}
	if !bytes.Equal(p.Payload, want.Payload) {
		t.Errorf("payload %q, want %q", p.Payload, want.Payload)
	}
	if !p.Truncated() {
		t.Error("a packet with a longer original is not reported as truncated")
	}
	if cap(p.Payload) != len(p.Payload) {
		t.Error("an append to the payload would run into the attribute that follows")
	}
	p.Payload, want.Payload = nil, nil
	if !equal(p, want) {
		t.Errorf("got %+v\nwant %+v", p, want)
	}
}

func equal(a, b Packet) bool {
	return a.ID == b.ID && a.Hook == b.Hook && a.Protocol == b.Protocol && a.Mark == b.Mark &&
		a.InDev == b.InDev && a.OutDev == b.OutDev && a.OrigLen == b.OrigLen && a.SkbInfo == b.SkbInfo &&
		bytes.Equal(a.Payload, b.Payload)
}

func TestParsePacketErrors(t *testing.T) {
	hdr := []byte{0, 0, 0, 9, 8, 0, 1}
	short := body(t, 2, func(e *netlink.AttributeEncoder) {
		e.Bytes(attrPacketHdr, hdr)
		e.Bytes(attrMark, []byte{1, 2, 3})
	})
	long := body(t, 2, func(e *netlink.AttributeEncoder) { e.Bytes(attrPacketHdr, hdr) })
	long = append(long, 200, 0, attrPayload, 0, 1, 2, 3, 4)
	tiny := append([]byte{2, 0, 0, 7}, 3, 0, attrPayload, 0)
	for _, tc := range []struct {
		name  string
		body  []byte
		hasID bool
		err   error
	}{
		{"empty", nil, false, errShortHeader},
		{"no attributes", []byte{2, 0, 0, 7}, false, errNoPacketHdr},
		{"no header", body(t, 2, func(e *netlink.AttributeEncoder) { e.Bytes(attrPayload, []byte{1}) }), false, errNoPacketHdr},
		{"no payload", body(t, 2, func(e *netlink.AttributeEncoder) { e.Bytes(attrPacketHdr, hdr) }), true, errNoPayload},
		{"header of 6 bytes", body(t, 2, func(e *netlink.AttributeEncoder) { e.Bytes(attrPacketHdr, hdr[:6]) }), false, errAttr},
		{"mark of 3 bytes", short, true, errAttr},
		{"attribute beyond the end", long, true, errAttr},
		{"attribute shorter than its header", tiny, false, errAttr},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var p Packet
			hasID, err := parsePacket(tc.body, &p)
			if hasID != tc.hasID || !errors.Is(err, tc.err) {
				t.Errorf("got %v, %v; want %v, %v", hasID, err, tc.hasID, tc.err)
			}
			if hasID && p.ID != 9 {
				t.Errorf("ID %d, want 9", p.ID)
			}
		})
	}
}

func TestNextMessage(t *testing.T) {
	b := datagram(msgPacket, 5, []byte("abcde"), []byte("fgh"))
	m, rest, err := nextMessage(b)
	if err != nil || string(m.body) != "abcde" || m.typ != msgPacket || m.seq != 5 {
		t.Fatalf("first: %+v, %v", m, err)
	}
	m, rest, err = nextMessage(rest)
	if err != nil || string(m.body) != "fgh" || len(rest) != 0 {
		t.Fatalf("second: %+v, rest %d, %v", m, len(rest), err)
	}
	for _, bad := range [][]byte{nil, b[:15], b[:20], append([]byte{15, 0, 0, 0}, b[4:]...), append([]byte{0xff, 0xff, 0xff, 0xff}, b[4:]...)} {
		if _, _, err := nextMessage(bad); err == nil {
			t.Errorf("%d bytes, length field % x: accepted", len(bad), bad[:min(4, len(bad))])
		}
	}
}

func TestParseError(t *testing.T) {
	for code, want := range map[int32]unix.Errno{0: 0, -2: unix.ENOENT, 5: unix.EPROTO, -1 << 31: unix.EPROTO} {
		got, err := parseError(binary.NativeEndian.AppendUint32(nil, uint32(code)))
		if err != nil || got != want {
			t.Errorf("code %d: %v, %v; want %v", code, got, err, want)
		}
	}
	if _, err := parseError([]byte{1}); err == nil {
		t.Error("one byte accepted")
	}
}

// oracle decodes a packet body with mdlayher/netlink's AttributeDecoder.
// ok is false where that finds the attributes malformed, and where one has no
// room for its own header: the decoder takes a length of 0 for an empty
// attribute, the kernel does not (nla_ok in include/net/netlink.h).
func oracle(b []byte) (p Packet, ok bool) {
	if len(b) < nfgenLen {
		return p, false
	}
	for a := b[nfgenLen:]; len(a) >= nlaHdrLen; {
		n := int(binary.NativeEndian.Uint16(a))
		if n < nlaHdrLen {
			return p, false
		}
		a = a[min(align4(n), len(a)):]
	}
	d, err := netlink.NewAttributeDecoder(b[nfgenLen:])
	if err != nil {
		return p, false
	}
	d.ByteOrder = binary.BigEndian
	hasID := false
	var capLen uint32
	num := func() uint32 {
		if v := d.Bytes(); len(v) >= 4 {
			return binary.BigEndian.Uint32(v)
		}
		ok = false
		return 0
	}
	ok = true
	for d.Next() {
		switch d.Type() {
		case attrPacketHdr:
			v := d.Bytes()
			if len(v) < 7 {
				return p, false
			}
			p.ID, p.Protocol, p.Hook = binary.BigEndian.Uint32(v), binary.BigEndian.Uint16(v[4:]), v[6]
			hasID = true
		case attrMark:
			p.Mark = num()
		case attrInDev:
			p.InDev = num()
		case attrOutDev:
			p.OutDev = num()
		case attrCapLen:
			capLen = num()
		case attrSkbInfo:
			p.SkbInfo = num()
		case attrPayload:
			p.Payload = d.Bytes()
		}
	}
	p.OrigLen = max(capLen, uint32(len(p.Payload)))
	return p, ok && d.Err() == nil && hasID && len(p.Payload) > 0
}

// FuzzParse feeds a datagram to the parser and holds each packet against the
// oracle.
func FuzzParse(f *testing.F) {
	full := fullBody(f, bytes.Repeat([]byte{0x45}, 61))
	f.Add(datagram(msgPacket, 0, full))
	f.Add(datagram(msgPacket, 0, full, full[:40]))
	f.Add(datagram(unix.NLMSG_ERROR, 9, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Add(datagram(msgPacket, 0, full)[:70])
	f.Add(datagram(msgPacket, 0, append(append(bytes.Clone(full[:nfgenLen]), 0, 0, 0, 0), full[nfgenLen:]...))) // an attribute of no length
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			m, rest, err := nextMessage(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("the parser does not advance")
			}
			b = rest
			switch m.typ {
			case unix.NLMSG_ERROR:
				_, _ = parseError(m.body)
			case msgPacket:
				var got Packet
				_, err := parsePacket(m.body, &got)
				want, ok := oracle(m.body)
				if ok && err != nil {
					t.Fatalf("refused (%v) what the oracle reads as %+v", err, want)
				}
				if err == nil && ok && !equal(got, want) {
					t.Fatalf("got %+v\nwant %+v", got, want)
				}
			}
		}
	})
}

func TestParseDoesNotAllocate(t *testing.T) {
	d := datagram(msgPacket, 0, fullBody(t, make([]byte, 1500)))
	var p Packet
	n := testing.AllocsPerRun(100, func() {
		m, _, err := nextMessage(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parsePacket(m.body, &p); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

func TestConfigLimits(t *testing.T) {
	for _, c := range []Config{{Batch: -1}, {Batch: maxBatch + 1}, {RecvBuf: -1}, {MaxLen: -5}} {
		if _, err := Open(c); err == nil {
			t.Errorf("%+v accepted", c)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	d := datagram(msgPacket, 0, fullBody(b, make([]byte, 1500)))
	b.Run("nfq", func(b *testing.B) {
		b.ReportAllocs()
		var p Packet
		for b.Loop() {
			m, _, _ := nextMessage(d)
			if _, err := parsePacket(m.body, &p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("AttributeDecoder", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var m netlink.Message
			// UnmarshalBinary insists on an aligned length.
			if err := m.UnmarshalBinary(d[:align4(len(d))&^3]); err != nil {
				b.Fatal(err)
			}
			if _, ok := oracle(m.Data); !ok {
				b.Fatal("not decoded")
			}
		}
	})
}
