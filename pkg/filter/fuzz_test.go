package filter_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

var (
	fuzzVIPs    = []netip.Addr{netip.MustParseAddr("10.0.0.100"), netip.MustParseAddr("fd00::100")}
	fuzzRemotes = []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
)

// FuzzStep feeds the engine with events made of octets: segments of three
// connections, one of them of IPv6, with any flags and numbers near the right
// ones, requests in any order, ADOPT among them, time up to the next deadline and
// beyond, new filters that take up the records. Nothing may panic, every packet has
// a reason, what is sent or rewritten is whole, the bounds hold, and the same
// octets give the same effects.
func FuzzStep(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 2, 1, 3, 2, 4, 50, 2, 3, 2, 4, 0, 0x10, 0, 1, 0, 0, 2, 5, 4, 200, 2, 7})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 0, 0x11, 0, 1, 0, 1, 2, 1, 2, 2, 1, 0x11, 0, 1, 0, 1, 2, 3, 2, 4, 2, 5, 2, 6, 1, 0x12, 0, 0, 0, 0, 2, 7, 2, 8})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 2, 1, 3, 2, 4, 50, 249, 0, 2, 3, 249, 0, 2, 4, 249, 0, 0, 0x10, 0, 1, 0, 0, 2, 5, 249, 0, 2, 5, 4, 200, 2, 7, 249, 0, 249, 8})
	f.Add([]byte{2, 13, 7, 2, 1, 0, 0x18, 0, 1, 0, 0, 2, 0, 0, 1, 1, 2, 15, 2, 15, 2, 14, 3, 2, 15, 249, 0, 2, 3, 2, 4, 2, 13, 0x45, 2, 9, 2, 13, 0x80, 3, 255, 2, 15})
	f.Add([]byte{0, 2, 2, 0, 0, 0, 1, 0x12, 2, 0, 0, 0, 2, 13, 0x4f, 2, 14, 0x83, 32, 0x11, 2, 1, 0, 2, 0, 2, 15, 2, 9, 2, 0, 249, 9, 2, 13, 0})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 1, 0, 1, 0, 0x10, 0, 1, 1, 1, 2, 1, 1, 0x10, 0, 1, 1, 1, 2, 15, 2, 14, 9, 0xa0, 2, 15, 2, 3, 2, 132, 2, 15, 160, 0x18, 0, 1, 1, 1, 0, 0x11, 0, 1, 6, 1, 249, 0, 3, 255,
		2, 5, 2, 6, 66, 0x12, 0, 1, 50, 1, 3, 30, 2, 7, 66, 0x10, 0, 1, 51, 3, 2, 15, 2, 1, 2, 15, 2, 14, 9, 0x20, 2, 15, 0, 4, 0, 1, 7, 1, 249, 0, 2, 9})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 2, 1, 3, 2, 4, 50, 2, 3, 2, 4, 0, 0x18, 0, 1, 0, 0, 2, 0, 0, 0x18, 0, 1, 0, 0, 2, 0x50, 0, 0x18, 0, 1, 0, 0, 2, 6, 2, 0x30, 249, 0, 2, 0x40, 2, 5, 2, 6, 3, 30, 2, 7})
	f.Add([]byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 2, 1, 3, 2, 4, 50, 2, 3, 2, 4, 2, 0, 249, 0, 2, 0, 2, 0x10, 2, 0, 2, 0x20, 2, 0x50, 2, 0x20, 2, 8})
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 4096 {
			return
		}
		a, b := play(t, in), play(t, in)
		if a != b {
			t.Fatalf("two runs of the same events differ: %d, %d", a, b)
		}
	})
}

// play runs the events of in and returns a sum over the effects.
func play(t *testing.T, in []byte) uint64 {
	cfg := filter.Config{Seed: 7, MaxConns: 8, MaxSyns: 2, KeepPerConn: 64, KeepTotal: 100}
	e := filter.New(cfg)
	var fx filter.Effects
	var store filtertest.Store
	now, sum, id := filter.Time(1), uint64(0), uint64(0)
	var parcel *filter.Structures // handed over last
	step := func(ev filter.Event) {
		e.Step(now, ev, &fx)
		if ev.Packet != nil {
			sum = sum*31 + uint64(fx.Verdict)<<8 + uint64(fx.Reason)
			if fx.Reason == filter.ReasonNone {
				t.Fatal("a packet without a reason")
			}
		}
		for _, s := range fx.Sends {
			sum = sum*31 + uint64(packet.Sum(s.Data, 0))
			whole(t, s.Data)
		}
		for _, l := range e.Limits() {
			if l.Used > l.Max {
				t.Fatalf("%s: %d of %d", l.Name, l.Used, l.Max)
			}
		}
		sum = sum*31 + uint64(len(fx.Sets)+len(fx.Replies)<<8+len(fx.Restores)<<16)
		for _, r := range fx.Replies {
			if st, ok := r.Body.(*filter.Structures); ok {
				parcel = st
			}
		}
		store.Apply(fx.Records)
		fx.Reset()
	}
	restart := func(op byte) { // flows by a bit of op, as if some had ended
		e = filter.New(cfg)
		apps, conns := store.Records()
		if err := e.Load(now, apps, conns, func(id filter.ConnID) bool { return op>>(id.Remote.Port()%3)&1 == 0 }, op&8 != 0, &fx); err != nil {
			panic(err) // what an engine recorded does not contradict itself
		}
		sum = sum*31 + uint64(len(fx.Sets)+len(fx.Restores)<<16)
		store.Apply(fx.Records)
		fx.Reset()
	}
	req := func(b any) {
		id++
		step(filter.Event{Request: &filter.Request{ID: id, Body: b}})
	}
	req(&filter.Register{App: "a", VIPs: fuzzVIPs, Include: []uint16{80}})
	next := func() byte {
		if len(in) == 0 {
			return 0
		}
		b := in[0]
		in = in[1:]
		return b
	}
	conn := func(n byte) filter.ConnID {
		n %= 3
		return filter.ConnID{Local: netip.AddrPortFrom(fuzzVIPs[n/2], 80), Remote: netip.AddrPortFrom(fuzzRemotes[n/2], 1000+uint16(n))}
	}
	for len(in) > 0 {
		switch op := next(); op % 5 {
		case 0, 1:
			flags, c := next(), conn(next())
			sp := packet.Spec{Src: c.Remote, Dst: c.Local, Flags: flags, Window: uint16(next()),
				HasTS: op&8 == 0, TSVal: uint32(op), MSS: uint16(op>>6) * 1000, SACKPermitted: op&16 == 0, HasWScale: op&32 == 0, WScale: 3}
			hook := uint8(filter.HookPrerouting)
			if op%5 == 1 {
				sp.Src, sp.Dst = sp.Dst, sp.Src
				hook = []uint8{filter.HookOutput, filter.HookPostrouting, filter.HookPrerouting, filter.HookPostrouting}[op>>6]
			}
			sp.Seq = sp.Seq.Add(uint32(int8(next())))
			sp.Ack = sp.Ack.Add(uint32(int8(next())))
			sp.Payload = in[:min(len(in), int(op>>5))]
			data := sp.Build(make([]byte, sp.Size()))
			if op == 250 {
				data = in
			}
			step(filter.Event{Packet: &filter.Packet{Hook: hook, Data: data}})
		case 2:
			switch op := next(); op % 16 {
			case 13:
				adopt(now, next(), conn, req)
			case 14:
				op := next()
				b := &filter.SnapshotFreeze{App: "a", Boundary: []string{"turn", "now"}[op&1], Quiet: int64(op>>4) * 1e7, PassCloses: op&2 != 0, AbortOnData: op&4 != 0}
				if op&8 != 0 {
					speaks(b, next())
				}
				req(b)
			case 15:
				now = max(now, e.NextDeadline())
				step(filter.Event{})
			case 0:
				between(op, parcel, req)
			default:
				request(op, conn, req)
			}
		case 3:
			now += int64(next()) * 1e6
			step(filter.Event{})
		default:
			if op >= 240 {
				restart(next())
				continue
			}
			if op >= 200 {
				byImage(e, now, &store, next, conn, req)
				continue
			}
			now += int64(binary.LittleEndian.Uint16([]byte{next(), next()})) * 1e9
			step(filter.Event{})
		}
	}
	return sum
}

// speaks has the filter take octets, and speak heartbeats, by the bits of op.
func speaks(b *filter.SnapshotFreeze, op byte) {
	b.Spool, b.WakeFull = int(op&0x3f), op&0x40 != 0
	if op&0x80 != 0 {
		h := filter.Heartbeat{Match: []byte{op}, Reply: []byte("ok"), Send: []byte("beat"), Interval: 1e9, OnlyClosed: op&1 != 0}
		for _, r := range fuzzRemotes {
			h.Remote = netip.PrefixFrom(r, 8)
			b.Heartbeats = append(b.Heartbeats, h)
		}
	}
}

// whole fails where b is not a segment that a receiver takes.
func whole(t *testing.T, b []byte) {
	t.Helper()
	var s packet.Segment
	if f := s.Parse(b); f != packet.OK || !s.ChecksumOK() {
		t.Fatalf("a sent segment is broken: %v, %x", f, b)
	}
}

// adopt lists sockets of the connections by two bits of op each.
func adopt(now filter.Time, op byte, conn func(byte) filter.ConnID, req func(any)) {
	b := &filter.Adopt{App: "a", Listen: []uint16{80}, At: now}
	if op&0x80 != 0 {
		b.At -= 3e9
	}
	for i := range byte(3) {
		k := filter.Socket{ID: conn(i), Passive: op&0x40 != 0, HasInfo: op&0x40 != 0, TS: true, SACK: true, WScale: true, RemoteScale: 3, BytesReceived: uint64(op), LastRecv: 1}
		switch op >> (2 * i) & 3 {
		case 0: // in TIME_WAIT or gone
			continue
		case 1:
			k.Established = true
		case 2:
			k.Established, k.CloseWait = true, true
		case 3:
			k.LocalClosed, k.RemoteClosed = true, op&0x80 != 0
		}
		b.Sockets = append(b.Sockets, k)
	}
	req(b)
}

// between are the requests that filters have for each other.
func between(op byte, given *filter.Structures, req func(any)) {
	node := []string{"b", "c"}[op>>7]
	switch op >> 4 & 7 {
	case 0, 7:
		req(&filter.Handover{App: "a", To: node})
	case 1:
		req(&filter.Handback{App: "a", From: node, Given: given})
	case 2:
		req(&filter.Release{App: "a", Force: node == "c"})
	case 3:
		req(&filter.Yield{App: "a"})
	case 4:
		req(&filter.Unyield{App: "a"})
	default:
		req(&filter.RestoreStart{App: "a", OldNode: node, Given: given})
	}
}

var boundaries = [...]string{"", "line", "resp", "now"}

func request(n byte, conn func(byte) filter.ConnID, req func(any)) {
	force := n&128 != 0
	switch n % 16 {
	case 1:
		var socks []filter.Socket
		for i := range n >> 4 & 3 {
			socks = append(socks, filter.Socket{ID: conn(i), Established: true, Passive: true, CloseWait: force, HasInfo: true, TS: true, SACK: true})
		}
		req(&filter.SnapshotStart{App: "a", Sockets: socks, Listen: []uint16{80}, LeaveOut: force, Boundary: boundaries[n>>5&3]})
	case 2:
		req(&filter.SnapshotFreeze{App: "a", Boundary: boundaries[n>>5&3]})
	case 3:
		req(&filter.Seal{App: "a"})
	case 4:
		req(&filter.SnapshotDone{App: "a", ID: "s", Force: force})
	case 5:
		req(&filter.RestoreStart{App: "a", ID: "s"})
	case 6:
		req(&filter.RestoreConn{App: "a", Kind: "syn", Conns: []filter.ConnID{conn(0), conn(1), conn(2)}})
	case 7:
		req(&filter.Restored{App: "a", ResetMissing: force})
	case 8:
		req(&filter.RestoreAbort{App: "a"})
	case 9:
		req(&filter.SnapshotAbort{App: "a"})
	case 10:
		req(&filter.Unregister{App: "a", Force: force})
	case 11:
		req(&filter.Register{App: "a", VIPs: fuzzVIPs, Include: []uint16{80}})
	case 12:
		req(&filter.GetConnInfo{App: "a"})
	default:
		req(&filter.Status{})
	}
}
