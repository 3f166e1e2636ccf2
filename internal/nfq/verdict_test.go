package nfq

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// decoded is a verdict message as an independent decoder reads it.
type decoded struct {
	queue         uint16
	code, id      uint32
	mark          uint32
	hasMark       bool
	payload       []byte
	flags, seq    uint32
	messageType   uint16
	messageLength uint32
}

func decodeVerdicts(t *testing.T, b []byte) []decoded {
	t.Helper()
	var out []decoded
	for len(b) > 0 {
		n := binary.NativeEndian.Uint32(b)
		if n%4 != 0 || int(n) > len(b) {
			t.Fatalf("message length %d of %d bytes", n, len(b))
		}
		var m netlink.Message
		if err := m.UnmarshalBinary(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[n:]
		v := decoded{messageType: uint16(m.Header.Type), flags: uint32(m.Header.Flags), seq: m.Header.Sequence, messageLength: n}
		v.queue = binary.BigEndian.Uint16(m.Data[2:])
		d, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			t.Fatal(err)
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			switch d.Type() {
			case 2:
				v.code, v.id = binary.BigEndian.Uint32(d.Bytes()), binary.BigEndian.Uint32(d.Bytes()[4:])
			case 3:
				v.mark, v.hasMark = d.Uint32(), true
			case 10:
				v.payload = d.Bytes()
			default:
				t.Errorf("unknown attribute %d", d.Type())
			}
		}
		if d.Err() != nil {
			t.Fatal(d.Err())
		}
		out = append(out, v)
	}
	return out
}

func TestVerdictEncoding(t *testing.T) {
	q := &Queue{cfg: Config{Queue: 258}}
	payload := []byte("seven b")
	q.Accept(1)
	q.AcceptModified(2, payload)
	q.Drop(3)
	q.AcceptMark(4, 0xa0b0c0d0)
	q.AcceptModifiedMark(5, payload[:4], 0)
	q.AcceptModified(6, nil)
	q.AcceptModified(7, make([]byte, MaxPayload+1))
	q.Accept(8)

	q.send.vectors(q.send.list)
	var wire []byte
	for _, v := range q.send.iovs {
		wire = append(wire, sliceOf(v)...)
	}
	want := []decoded{
		{code: 1, id: 1}, {code: 1, id: 2, payload: payload}, {code: 0, id: 3},
		{code: 1, id: 4, mark: 0xa0b0c0d0, hasMark: true}, {code: 1, id: 5, hasMark: true, payload: payload[:4]},
		{code: 0, id: 6}, {code: 0, id: 7}, {code: 1, id: 8},
	}
	got := decodeVerdicts(t, wire)
	if len(got) != len(want) {
		t.Fatalf("%d verdicts, want %d", len(got), len(want))
	}
	for i, g := range got {
		w := want[i]
		if g.messageType != 0x301 || g.queue != 258 || g.flags != uint32(netlink.Request) {
			t.Errorf("verdict %d: type %#x, queue %d, flags %#x", i, g.messageType, g.queue, g.flags)
		}
		if g.code != w.code || g.id != w.id || g.mark != w.mark || g.hasMark != w.hasMark || !bytes.Equal(g.payload, w.payload) {
			t.Errorf("verdict %d: got %+v\nwant %+v", i, g, w)
		}
	}
	// Two payloads: head, payload, heads, payload, heads.
	if len(q.send.iovs) != 5 {
		t.Errorf("%d parts, want 5", len(q.send.iovs))
	}
	if e := q.ctr.verdictErrors.Load(); e != 2 {
		t.Errorf("%d verdict errors, want 2 for the payloads that cannot be sent", e)
	}
}

// Open must leave packets that come before the kernel's answer for Recv.
func TestPacketsBeforeTheAnswer(t *testing.T) {
	q := &Queue{cfg: Config{Batch: 4}}
	q.recv.init(4)
	put := func(b []byte) {
		n := q.recv.have
		q.recv.hdrs[n].len = uint32(copy(q.recv.mem[n*bufLen:], b))
		q.recv.have++
	}
	put(datagram(msgPacket, 0, fullBody(t, []byte("early"))))
	put(datagram(unix.NLMSG_ERROR, 76, []byte{1, 0, 0, 0}))
	if _, found := q.recv.findAnswer(77); found {
		t.Error("an answer to another request taken for ours")
	}
	put(datagram(unix.NLMSG_ERROR, 77, []byte{0, 0, 0, 0}))
	put(datagram(msgPacket, 0, fullBody(t, []byte("late"))))
	if errno, found := q.recv.findAnswer(77); !found || errno != 0 {
		t.Errorf("answer: %v, %v", errno, found)
	}
	pkts := make([]Packet, 4)
	if n := q.collect(pkts); n != 2 || string(pkts[0].Payload) != "early" || string(pkts[1].Payload) != "late" {
		t.Errorf("%d packets: %q, %q", n, pkts[0].Payload, pkts[1].Payload)
	}
}
