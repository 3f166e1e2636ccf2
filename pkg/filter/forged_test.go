package filter_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// icmpAbout makes an ICMP error of a router in from's place about segment b, which
// goes from a VIP to a remote.
func icmpAbout(b []byte, from netip.Addr, kind, code uint8) []byte {
	m := append([]byte{kind, code, 0, 0, 0, 0, 2, 0}, b...)
	if b[0]>>4 == 4 {
		ip := make([]byte, 20, 20+len(m))
		ip[0], ip[8], ip[9] = 0x45, 64, 1
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(m)))
		copy(ip[12:], from.AsSlice())
		copy(ip[16:], b[12:16])
		binary.BigEndian.PutUint16(ip[10:], ^packet.Sum(ip, 0))
		binary.BigEndian.PutUint16(m[2:], ^packet.Sum(m, 0))
		return append(ip, m...)
	}
	ip := make([]byte, 40, 40+len(m))
	ip[0], ip[6], ip[7] = 0x60, 58, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(m)))
	copy(ip[8:], from.AsSlice())
	copy(ip[24:], b[8:24])
	binary.BigEndian.PutUint16(m[2:], ^packet.Sum(m, uint32(packet.Sum(ip[8:40], 0))+58+uint32(len(m))))
	return append(ip, m...)
}

// icmpFlood sends n ICMP errors about segments with any number.
func (o *outsider) icmpFlood(n int, took func(v *victim, quoted packet.Segment)) {
	kinds4, kinds6 := [][2]uint8{{3, 4}, {3, 1}, {3, 3}, {11, 0}, {12, 0}}, [][2]uint8{{2, 0}, {1, 0}, {1, 4}, {3, 0}, {4, 1}}
	for range n / slower {
		o.now += 1 + o.r.Int64N(2e5)
		v := &o.victims[o.r.IntN(len(o.victims))]
		o.sp = packet.Spec{Src: v.local, Dst: v.remote, Flags: packet.ACK, Payload: garbage[:20]}
		o.sp.Seq, o.sp.Ack = o.sp.Seq.Add(o.r.Uint32()), o.sp.Ack.Add(o.r.Uint32())
		quote := o.sp.Build(o.local[:])
		var quoted packet.Segment
		if f := quoted.Parse(quote); f != packet.OK {
			o.t.Fatal(f)
		}
		from, k := netip.MustParseAddr("203.0.113.9"), kinds4[o.r.IntN(len(kinds4))]
		if v.local.Addr().Is6() {
			from, k = netip.MustParseAddr("2001:db8::9"), kinds6[o.r.IntN(len(kinds6))]
		}
		o.step(filter.HookPrerouting, icmpAbout(quote, from, k[0], k[1]))
		if len(o.fx.Sends) > 0 {
			o.t.Fatalf("%v: an ICMP error was answered", o.fx.Reason)
		}
		took(v, quoted)
	}
}

// TestForgedICMP: an ICMP error, which anybody can forge, reaches nobody while the
// application is away. Of a translated connection it quotes a number as far from
// local's as it was from the remote's: local's kernel judges it as ever.
func TestForgedICMP(t *testing.T) {
	o := newOutsider(t, 4)
	o.snapshot()
	o.unharmed(false, func() { // the messages are made anew each time
		o.icmpFlood(2e4, func(*victim, packet.Segment) {
			if o.fx.Verdict != filter.Drop || o.fx.Reason != filter.HeldICMP {
				t.Fatalf("verdict %v, %v", o.fx.Verdict, o.fx.Reason)
			}
		})
	})
	o.restore()
	o.unharmed(false, func() {
		var e packet.ICMPError
		o.icmpFlood(2e4, func(v *victim, quoted packet.Segment) {
			if o.fx.Verdict != filter.Modified || o.fx.Reason != filter.ICMPTranslated || !e.Parse(o.fx.Out) {
				t.Fatalf("verdict %v, %v", o.fx.Verdict, o.fx.Reason)
			}
			if e.Seq-v.lnxt != quoted.Seq-v.nxt || e.Dst != v.remote {
				t.Fatalf("%s: %d became %d, the next numbers are %d and %d", v.name, quoted.Seq, e.Seq, v.nxt, v.lnxt)
			}
		})
	})
	o.carries()
}

// TestAnswersOfEachConnection: who uses up the answers to guesses on one connection
// learns nothing of another: no budget is shared (RFC 5961 section 7, and what became
// of the one budget that Linux had).
func TestAnswersOfEachConnection(t *testing.T) {
	w := filtertest.New()
	if err := w.Play(`app redis 10.0.0.100 6379
link c1 10.0.0.2:40000
link c2 10.0.0.2:40001
open c1
open c2
request SNAPSHOTSTART
request SNAPSHOTFREEZE
advance 60ms
request SEAL
request SNAPSHOTDONE s1`); err != nil {
		t.Fatal(err)
	}
	var fx filter.Effects
	answered := func(b []byte) int {
		fx.Reset()
		w.Engine.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
		return len(fx.Sends)
	}
	guess := func(name string) []byte { return w.Segment(name, true, packet.SYN, 12345, nil) }
	n := 0
	for range 1000 {
		n += answered(guess("c1"))
	}
	if n == 0 || n > 32 {
		t.Errorf("%d answers to a thousand guesses in no time, want at most 32", n)
	}
	for i, b := range [][]byte{guess("c2"), w.Segment("c2", true, packet.ACK, -1, nil), w.Segment("c1", true, packet.ACK, -1, nil)} {
		if answered(b) != 1 {
			t.Errorf("segment %d is not answered any more", i)
		}
	}
}

// TestSynsAreSmall: what a SYN that waits takes is bounded, whatever stands in it,
// and it is whole.
func TestSynsAreSmall(t *testing.T) {
	w := filtertest.New()
	if err := w.Play(`app redis 10.0.0.100,fd00::100 6379
request SNAPSHOTSTART
request SNAPSHOTFREEZE
request SEAL
request SNAPSHOTDONE s1`); err != nil {
		t.Fatal(err)
	}
	var fx filter.Effects
	feed := func(b []byte) filter.Reason {
		fx.Reset()
		w.Engine.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPrerouting, Data: b}}, &fx)
		return fx.Reason
	}
	syn := func(remote string, payload int) []byte {
		sp := packet.Spec{Src: netip.MustParseAddrPort(remote), Dst: netip.MustParseAddrPort("10.0.0.100:6379"), Flags: packet.SYN,
			MSS: 1460, HasWScale: true, WScale: 7, SACKPermitted: true, HasTS: true, TSVal: 1, Payload: make([]byte, payload)}
		if sp.Src.Addr().Is6() {
			sp.Dst = netip.MustParseAddrPort("[fd00::100]:6379")
		}
		return sp.Build(make([]byte, sp.Size()))
	}
	const n = 20
	for i := range n {
		for _, b := range [][]byte{syn(fmt.Sprintf("10.0.0.2:%d", 1+i), 60000*(i%2)), syn(fmt.Sprintf("[fd00::2]:%d", 1+i), 60000*(i%2))} {
			for range 2 { // sent again, too
				if r := feed(b); r != filter.HeldSynKept {
					t.Fatal(r)
				}
			}
		}
	}
	long := syn("[fd00::2]:1000", 0) // behind two kilobytes of options for its destination
	opt := make([]byte, 2048)
	opt[0], opt[1] = long[6], 2048/8-1
	for at := 2; at < len(opt); {
		k := min(len(opt)-at, 255)
		opt[at] = 1
		opt[at+1] = uint8(k - 2)
		at += k
	}
	long[6] = 60
	long = append(append(append([]byte(nil), long[:40]...), opt...), long[40:]...)
	binary.BigEndian.PutUint16(long[4:], uint16(len(long)-40))
	if r := feed(long); r != filter.HeldSynLimited {
		t.Errorf("%d octets of headers: %v", len(long), r)
	}
	fx.Reset()
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Handover{App: "redis", To: "b"}}}, &fx)
	st := fx.Replies[0].Body.(*filter.Structures)
	if len(st.Syns) != 2*n {
		t.Fatalf("%d SYNs", len(st.Syns))
	}
	for _, b := range st.Syns {
		var s packet.Segment
		if f := s.Parse(b); f != packet.OK || !s.ChecksumOK() || s.Flags != packet.SYN || s.PayloadLen() > 0 || len(b) > 100 || cap(b) > 4096 || !s.Opt.HasTS {
			t.Fatalf("%d octets: %v, flags %#x, %d octets of payload", len(b), f, s.Flags, s.PayloadLen())
		}
	}
	// Another node does not make this one keep more.
	st.Syns = [][]byte{syn("10.0.0.2:1", 60000), long, syn("10.0.0.2:2", 0)}
	fx.Reset()
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Handback{App: "redis", From: "b", Given: st}}}, &fx)
	if fx.Replies[0].Err != nil {
		t.Fatal(fx.Replies[0].Err)
	}
	for _, l := range w.Engine.Limits() {
		if l.Name == "pending_syns" && l.Used != 1 {
			t.Errorf("%d SYNs of another node wait, want 1", l.Used)
		}
	}
}
