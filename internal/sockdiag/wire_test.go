package sockdiag

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestStateNames(t *testing.T) {
	for s, want := range map[State]string{
		1: "ESTABLISHED", 2: "SYN_SENT", 3: "SYN_RECEIVED", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 6: "TIME_WAIT", 7: "CLOSED",
		8: "CLOSE_WAIT", 9: "LAST_ACK", 10: "LISTEN", 11: "CLOSING", 12: "SYN_RECEIVED", 0: "STATE_0", 200: "STATE_200",
	} {
		if got := s.String(); got != want {
			t.Errorf("%d: %s, want %s", uint8(s), got, want)
		}
	}
}

func TestStateMask(t *testing.T) {
	for _, c := range []struct {
		states []State
		want   uint32
	}{
		{nil, 0b1_1011_0111_1110},
		{[]State{Established, Listen}, 1<<1 | 1<<10},
		{[]State{SynReceived}, 1<<3 | 1<<12},
		{[]State{0, 40, TimeWait}, 1 << 6},
	} {
		if got := stateMask(c.states); got != c.want {
			t.Errorf("%v: %b, want %b", c.states, got, c.want)
		}
	}
}

// The offsets are those of the C structure, which x/sys generates from the kernel's headers.
func TestParseInfoOffsets(t *testing.T) {
	want := unix.TCPInfo{
		State: 1, Retransmits: 2, Probes: 3, Backoff: 4, Options: 5, Rto: 1000, Snd_mss: 1400, Rcv_mss: 536, Unacked: 7,
		Sacked: 8, Lost: 9, Retrans: 10, Last_data_sent: 11, Last_data_recv: 12, Last_ack_recv: 13, Pmtu: 1500, Rtt: 14,
		Rttvar: 15, Advmss: 1460, Rcv_space: 16, Total_retrans: 17, Bytes_acked: 1 << 40, Bytes_received: 1 << 41,
		Segs_out: 18, Segs_in: 19, Notsent_bytes: 20, Bytes_sent: 1 << 42, Bytes_retrans: 1 << 43, Snd_wnd: 21, Rcv_wnd: 22,
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&want)), unsafe.Sizeof(want))
	raw = append([]byte(nil), raw...)
	raw[6] = 7 | 10<<4 // little-endian layout
	var got TCPInfo
	parseInfo(raw, &got)
	if ne.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bit fields above are laid out for little-endian machines")
	}
	if got != (TCPInfo{
		State: 1, Retransmits: 2, Probes: 3, Backoff: 4, Options: Options{Timestamps: true, WScale: true},
		SndWScale: 7, RcvWScale: 10, RTO: time.Millisecond, SndMSS: 1400, RcvMSS: 536, Unacked: 7, Sacked: 8, Lost: 9,
		Retrans: 10, LastDataSent: 11 * time.Millisecond, LastDataRecv: 12 * time.Millisecond,
		LastAckRecv: 13 * time.Millisecond, PMTU: 1500, RTT: 14 * time.Microsecond, RTTVar: 15 * time.Microsecond,
		AdvMSS: 1460, RcvSpace: 16, TotalRetrans: 17, BytesAcked: 1 << 40, BytesReceived: 1 << 41, SegsOut: 18, SegsIn: 19,
		NotSent: 20, BytesSent: 1 << 42, BytesRetrans: 1 << 43, SndWnd: 21, RcvWnd: 22,
	}) {
		t.Errorf("%+v", got)
	}
	// A kernel of before 5.4 ends at 224 bytes.
	got = TCPInfo{}
	parseInfo(raw[:224], &got)
	if got.BytesSent != 1<<42 || got.SndWnd != 0 {
		t.Errorf("short: %+v", got)
	}
}

// runBytecode is the kernel's interpreter for the two operations used, with the checks of its audit.
func runBytecode(t *testing.T, program []byte, family uint8, addr []byte) bool {
	t.Helper()
	at := 0
	for steps := 0; at < len(program); steps++ {
		if steps > len(program) || len(program)-at < bcOpLen || at%4 != 0 {
			t.Fatalf("program loops or ends inside an operation at %d", at)
		}
		op := program[at:]
		yes, no := int(op[1]), int(ne.Uint16(op[2:]))
		if no < 4 || yes < 4 || at+no > len(program)+4 {
			t.Fatalf("jumps %d and %d at %d of %d", yes, no, at, len(program))
		}
		ok := false
		if op[0] == bcSourceCond {
			cond := op[bcOpLen:]
			width := int(cond[1]) / 8
			want := cond[hostcondLen : hostcondLen+width]
			switch {
			case cond[0] == family:
				ok = string(addr) == string(want)
			case cond[0] == unix.AF_INET && family == unix.AF_INET6:
				ok = string(addr[:12]) == "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff" && string(addr[12:]) == string(want)
			}
		}
		if at += no; ok {
			at += yes - no
		}
	}
	return at == len(program)
}

func TestLocalBytecode(t *testing.T) {
	addr := netip.MustParseAddr
	addrs := []netip.Addr{addr("10.0.0.1"), addr("fd00::1"), addr("10.0.0.2"), addr("::"), addr("fd00::2")}
	for n := 1; n <= len(addrs); n++ {
		program := localBytecode(addrs[:n])
		for i, a := range addrs {
			family := uint8(unix.AF_INET6)
			if a.Is4() {
				family = unix.AF_INET
			}
			if got := runBytecode(t, program, family, a.AsSlice()); got != (i < n) {
				t.Errorf("%d addresses: %s %v", n, a, got)
			}
			if mapped := a.As16(); a.Is4() && runBytecode(t, program, unix.AF_INET6, mapped[:]) != (i < n) {
				t.Errorf("%d addresses: mapped %s", n, a)
			}
		}
	}
	if localBytecode(nil) != nil {
		t.Error("a program for no address")
	}
}

func TestDumpInterruptedIsRetried(t *testing.T) {
	d := decoder{seen: map[[2]uint32]struct{}{}}
	for cookie := range uint32(3) {
		if err := d.add(report(unix.AF_INET, cookie)); err != nil {
			t.Fatal(err)
		}
	}
	d.truncate(1)
	for cookie := range uint32(3) { // the first is known still, the others are new again
		if err := d.add(report(unix.AF_INET, cookie)); err != nil {
			t.Fatal(err)
		}
	}
	if len(d.sockets) != 3 || len(d.seen) != 3 {
		t.Errorf("%d sockets", len(d.sockets))
	}
	if err := d.add(report(77, 9)); err == nil {
		t.Error("an unknown family passed")
	}
}

func report(family uint8, cookie uint32) []byte {
	b := make([]byte, msgLen)
	b[0], b[1] = family, byte(Established)
	binary.BigEndian.PutUint16(b[4:], 80)
	ne.PutUint32(b[44:], cookie)
	return b
}

func attr(kind uint16, value []byte) []byte {
	b := ne.AppendUint16(nil, uint16(nlaHeaderLen+len(value)))
	b = append(ne.AppendUint16(b, kind), value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func TestDecodeAttributes(t *testing.T) {
	b := report(unix.AF_INET6, 1)
	b = append(b, attr(8, []byte{0})...)
	b = append(b, attr(attrV6Only, []byte{1})...)
	b = append(b, attr(attrULPInfo|0x8000, attr(attrULPName, []byte("mptcp\x00")))...)
	b = append(b, attr(attrInfo, make([]byte, 280))...)
	d := decoder{seen: map[[2]uint32]struct{}{}}
	if err := d.add(b); err != nil {
		t.Fatal(err)
	}
	if s := d.sockets[0]; !s.V6Only || s.Info == nil || s.Info.ULP != "mptcp" {
		t.Errorf("%+v %+v", s, s.Info)
	}
	d = decoder{seen: map[[2]uint32]struct{}{}}
	if err := d.add(append(b, 200, 0, 1, 0)); err == nil {
		t.Error("an attribute longer than its message passed")
	}
}

func TestSplitMessages(t *testing.T) {
	two := appendHeader(nil, unix.NLMSG_DONE, 0, 7)
	ne.PutUint32(two, 18)
	two = append(two, 1, 2, 0, 0)
	second := appendHeader(nil, unix.NLMSG_ERROR, 0, 8)
	ne.PutUint32(second, 20)
	two = append(append(two, second...), 0xfe, 0xff, 0xff, 0xff) // -2
	var got []message
	if done, err := splitMessages(two, func(m message) (bool, error) { got = append(got, m); return false, nil }); done || err != nil {
		t.Fatal(done, err)
	}
	if len(got) != 2 || got[0].seq != 7 || len(got[0].data) != 2 || got[0].errno() != nil || !errors.Is(got[1].errno(), unix.ENOENT) {
		t.Errorf("%+v", got)
	}
	for _, cut := range []int{1, 15, 17, 21, 39} {
		if _, err := splitMessages(two[:cut], func(message) (bool, error) { return false, nil }); err == nil {
			t.Errorf("%d bytes passed", cut)
		}
	}
}

func FuzzReceive(f *testing.F) {
	b := appendHeader(nil, unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_MULTI, 1)
	b = append(b, report(unix.AF_INET6, 3)...)
	b = append(b, attr(attrInfo, make([]byte, 240))...)
	b = append(b, attr(attrULPInfo, attr(attrULPName, []byte("tls\x00")))...)
	ne.PutUint32(b, uint32(len(b)))
	f.Add(b)
	f.Add(b[:90])
	f.Add(appendDestroy(nil, 4, Socket{Local: netip.MustParseAddrPort("10.0.0.1:80")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := decoder{seen: map[[2]uint32]struct{}{}}
		_, _ = splitMessages(b, func(m message) (bool, error) {
			_ = m.errno()
			if m.kind == unix.SOCK_DIAG_BY_FAMILY {
				_ = d.add(m.data)
			}
			return m.kind == unix.NLMSG_DONE, nil
		})
		for _, s := range d.sockets {
			if !s.Local.IsValid() || !s.Remote.IsValid() || s.Local.Addr().Is4In6() {
				t.Fatalf("%+v", s)
			}
			_ = s.String()
		}
	})
}

func FuzzDestroyRequest(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4}, uint8(0), uint16(80))
	f.Add(make([]byte, 16), uint8(10), uint16(80))
	f.Fuzz(func(t *testing.T, addr []byte, family uint8, port uint16) {
		a, ok := netip.AddrFromSlice(addr)
		if !ok {
			t.Skip()
		}
		s := Socket{Family: family, Local: netip.AddrPortFrom(a, port), Remote: netip.AddrPortFrom(a, uint16(rand.Uint32()))}
		if b := appendDestroy(nil, 1, s); len(b) != nlmsgHeaderLen+reqLen || int(ne.Uint32(b)) != len(b) {
			t.Fatalf("%d bytes", len(b))
		}
	})
}
