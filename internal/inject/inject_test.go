package inject

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	nfqueue "github.com/florianl/go-nfqueue/v2"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// newNamespace puts the rest of the test into a network namespace of its own.
// It has no name and goes with the test's thread, which is never unlocked.
func newNamespace(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare: %v", err)
	}
	run(t, "ip link set lo up")
}

func run(t testing.TB, cmd string) string {
	t.Helper()
	f := strings.Fields(cmd)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

func sysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
		t.Fatal(err)
	}
}

// newTun makes a device whose outgoing packets the test reads, with the
// addresses 10.9.0.1 and fd09::1 and every other address behind it.
func newTun(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs a TUN device: %v", err)
	}
	ifr, _ := unix.NewIfreq("out0")
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		_ = unix.Close(fd)
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tun")
	t.Cleanup(func() { _ = f.Close() })
	run(t, "ip addr add 10.9.0.1/24 dev out0")
	run(t, "ip -6 addr add fd09::1/64 dev out0 nodad")
	run(t, "ip link set out0 up")
	run(t, "ip route add default dev out0")
	run(t, "ip -6 route add default dev out0")
	return f
}

// readMatch returns the next packet on the device that match accepts.
func readMatch(t testing.TB, f *os.File, match func(p []byte) bool) []byte {
	t.Helper()
	_ = f.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 70000)
	for {
		n, err := f.Read(buf)
		if err != nil {
			t.Fatalf("no such packet left the host: %v", err)
		}
		if match(buf[:n]) {
			return bytes.Clone(buf[:n])
		}
	}
}

func open(t testing.TB) *Injector {
	t.Helper()
	i, err := Open(Config{Mark: 0x11, TrackedMark: 0x80000022})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = i.Close() })
	return i
}

func sum(seed uint32, b []byte) uint16 {
	for n := 0; n+1 < len(b); n += 2 {
		seed += uint32(binary.BigEndian.Uint16(b[n:]))
	}
	if len(b)%2 == 1 {
		seed += uint32(b[len(b)-1]) << 8
	}
	for seed > 0xffff {
		seed = seed&0xffff + seed>>16
	}
	return ^uint16(seed)
}

// ipPacket puts an IP header before a transport segment and sets the checksum
// at sumAt in it.
func ipPacket(src, dst string, proto byte, seg []byte, sumAt int) []byte {
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	pseudo := append(s.AsSlice(), d.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(seg)))
	pseudo = append(pseudo, 0, 0, 0, proto)
	binary.BigEndian.PutUint16(seg[sumAt:], sum(0, append(pseudo, seg...)))
	var h []byte
	if s.Is4() {
		h = make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(seg)))
		copy(h[12:], s.AsSlice())
		copy(h[16:], d.AsSlice())
	} else {
		h = make([]byte, 40)
		h[0], h[6], h[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(seg)))
		copy(h[8:], s.AsSlice())
		copy(h[24:], d.AsSlice())
	}
	return append(h, seg...)
}

func udp(src, dst string, dport uint16, data string) []byte {
	seg := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(seg, 4000)
	binary.BigEndian.PutUint16(seg[2:], dport)
	binary.BigEndian.PutUint16(seg[4:], uint16(8+len(data)))
	return ipPacket(src, dst, unix.IPPROTO_UDP, append(seg, data...), 6)
}

func syn(src, dst string, sport, dport uint16, seq uint32) []byte {
	seg := make([]byte, 20)
	binary.BigEndian.PutUint16(seg, sport)
	binary.BigEndian.PutUint16(seg[2:], dport)
	binary.BigEndian.PutUint32(seg[4:], seq)
	seg[12], seg[13] = 5<<4, 0x02
	binary.BigEndian.PutUint16(seg[14:], 64240)
	return ipPacket(src, dst, unix.IPPROTO_TCP, seg, 16)
}

func flush(t testing.TB, i *Injector, want int) {
	t.Helper()
	if n, err := i.Flush(); n != want || err != nil {
		t.Fatalf("Flush: %d, %v; want %d", n, err, want)
	}
}

// A SYN from a foreign address reaches a local listener whatever rp_filter
// says, and the answer leaves towards that address.
func TestForeignSYN(t *testing.T) {
	newNamespace(t)
	tun := newTun(t)
	for _, n := range []string{"all", "default", "lo", "out0"} {
		sysctl(t, "net/ipv4/conf/"+n+"/rp_filter", "1")
	}
	i := open(t)
	for _, tc := range []struct{ name, src, dst, ipt string }{
		{"ipv4", "192.0.2.7", "10.9.0.1", "iptables"},
		{"ipv6", "2001:db8::7", "fd09::1", "ip6tables"},
	} {
		run(t, tc.ipt+" -w -t raw -A OUTPUT -m mark --mark 0x11 -p tcp")
		run(t, tc.ipt+" -w -t raw -A OUTPUT -m mark --mark 0x80000022 -p tcp")
		ln, err := net.Listen("tcp", net.JoinHostPort(tc.dst, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		port := uint16(ln.Addr().(*net.TCPAddr).Port)
		for k, tracked := range []bool{false, true} {
			seq := uint32(0xfffffff0 + k*15) // wraps for the second
			i.Add(syn(tc.src, tc.dst, 40000+uint16(k), port, seq), tracked)
			flush(t, i, 1)
			head := 20
			if tc.name == "ipv6" {
				head = 40
			}
			readMatch(t, tun, func(p []byte) bool {
				return len(p) >= head+20 && p[0]>>4 == byte(4+(head-20)/10) &&
					binary.BigEndian.Uint16(p[head:]) == port &&
					binary.BigEndian.Uint16(p[head+2:]) == 40000+uint16(k) &&
					p[head+13] == 0x12 && binary.BigEndian.Uint32(p[head+8:]) == seq+1
			})
		}
		out := run(t, tc.ipt+" -w -t raw -L OUTPUT -v -n -x")
		if strings.Count(out, "\n       1 ") != 2 {
			t.Errorf("%s: not one packet with each mark:\n%s", tc.name, out)
		}
	}
	if s := i.Stats(); s.Sent != 4 || s.Failed != 0 || s.Calls != 4 || len(s.ByErrno) != 0 {
		t.Errorf("%+v", s)
	}
}

// Order is kept across marks and more packets than one call takes, and bytes
// leave as they were given.
func TestOrderAndBytes(t *testing.T) {
	newNamespace(t)
	tun := newTun(t)
	run(t, "ip link set out0 txqueuelen 5000")
	i := open(t)
	const n = 3*batch + 50
	var pkts [][]byte
	for k := range n {
		p := udp("192.0.2.7", "198.51.100.9", uint16(k+1), strings.Repeat("d", k%50))
		pkts = append(pkts, p)
		i.Add(p, k%300 > 280)
	}
	flush(t, i, n)
	for k := range n {
		got := readMatch(t, tun, func(p []byte) bool { return p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP })
		want := bytes.Clone(pkts[k])
		copy(want[4:6], got[4:6])     // identification,
		copy(want[10:12], got[10:12]) // checksum: by the kernel
		if !bytes.Equal(got, want) {
			t.Fatalf("packet %d:\ngot  % x\nwant % x", k, got, want)
		}
		if sum(0, got[:20]) != 0 {
			t.Fatalf("packet %d: wrong header checksum", k)
		}
	}
	if s := i.Stats(); s.Sent != n || s.Calls > 8 {
		t.Errorf("%+v", s)
	}
	flush(t, i, 0)
}

func TestFailuresDoNotStopTheRest(t *testing.T) {
	newNamespace(t)
	tun := newTun(t)
	run(t, "ip route add unreachable 203.0.113.0/24")
	i := open(t)
	good := func(port uint16) []byte { return udp("192.0.2.7", "198.51.100.9", port, "ok") }
	lies := good(9)
	lies[0] = 0x4f // a header longer than the packet
	for _, p := range [][]byte{
		good(1), nil, {0x45}, good(2), udp("192.0.2.7", "203.0.113.1", 9, "x"), lies, good(3),
		udp("192.0.2.7", "198.51.100.9", 9, strings.Repeat("x", 1500)), {0x60, 1, 2}, bytes.Repeat([]byte{0x70}, 60), good(4),
	} {
		i.Add(p, false)
	}
	n, err := i.Flush()
	if n != 4 || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "7 of 11") {
		t.Errorf("%d, %v", n, err)
	}
	for port := uint16(1); port <= 4; port++ {
		p := readMatch(t, tun, func(p []byte) bool { return p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP })
		if got := binary.BigEndian.Uint16(p[22:]); got != port {
			t.Errorf("port %d, want %d", got, port)
		}
	}
	s := i.Stats()
	if s.Sent != 4 || s.Failed != 7 || s.ByErrno[unix.EINVAL] != 5 || s.ByErrno[unix.EHOSTUNREACH] != 1 || s.ByErrno[unix.EMSGSIZE] != 1 {
		t.Errorf("%+v", s)
	}
	flush(t, i, 0) // the error is reported once
}

// Without IPv6 in the kernel its packets fail and IPv4 goes on.
func TestNoIPv6(t *testing.T) {
	newNamespace(t)
	i := open(t)
	for _, kind := range []int{plain6, tracked6} {
		_ = unix.Close(i.fds[kind])
		i.fds[kind] = -1
	}
	i.Add(udp("::1", "::1", 9, "x"), true)
	i.Add(udp("127.0.0.1", "127.0.0.1", 9, "x"), true)
	if n, err := i.Flush(); n != 1 || !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("%d, %v", n, err)
	}
}

func TestClosed(t *testing.T) {
	newNamespace(t)
	i := open(t)
	i.Add(udp("127.0.0.1", "127.0.0.1", 9, "x"), false)
	for range 2 {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	}
	flush(t, i, 0)
	i.Add(udp("127.0.0.1", "127.0.0.1", 9, "x"), false)
	if n, err := i.Flush(); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("%d, %v", n, err)
	}
}

// Packets that nobody takes further must not stop the caller. They wait in a
// queue whose reader gives no verdict.
func TestFullBuffer(t *testing.T) {
	newNamespace(t)
	newTun(t)
	nf, err := nfqueue.Open(&nfqueue.Config{NfQueue: 4, MaxQueueLen: 1000, Copymode: nfqueue.NfQnlCopyMeta})
	if err != nil {
		t.Fatal(err)
	}
	defer nf.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err = nf.RegisterWithErrorFunc(ctx, func(nfqueue.Attribute) int { return 0 }, func(error) int { return 1 })
	if err != nil {
		t.Fatal(err)
	}
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 4")
	i := open(t)
	for _, fd := range i.fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1); err != nil {
			t.Fatal(err)
		}
	}
	const n = 100
	for range n {
		i.Add(udp("192.0.2.7", "198.51.100.9", 9, strings.Repeat("x", 1000)), false)
	}
	start := time.Now()
	sent, err := i.Flush()
	took := time.Since(start)
	if sent == 0 || sent == n || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%d, %v", sent, err)
	}
	if took < waitMs*time.Millisecond || took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestNoAllocations(t *testing.T) {
	newNamespace(t)
	i := open(t)
	p4, p6 := udp("192.0.2.7", "127.0.0.1", 9, "x"), udp("2001:db8::1", "::1", 9, "x")
	round := func() {
		for k := range 40 {
			i.Add(p4, k > 20)
			i.Add(p6, k > 20)
		}
		flush(t, i, 80)
	}
	run(t, "iptables -w -t raw -A PREROUTING -p udp -j DROP")
	run(t, "ip6tables -w -t raw -A PREROUTING -p udp -j DROP")
	round()
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations for 80 packets", n)
	}
	if s := i.Stats(); s.Failed != 0 || s.Sent != 52*80 {
		t.Errorf("%+v", s)
	}
}

func TestLayout(t *testing.T) {
	// struct mmsghdr: a msghdr, a 32-bit count, padding to the pointer size.
	if got, want := unsafe.Sizeof(mmsghdr{}), unsafe.Sizeof(unix.Msghdr{})+unsafe.Sizeof(uintptr(0)); got != want {
		t.Errorf("size %d, want %d", got, want)
	}
}

func BenchmarkFlush(b *testing.B) {
	newNamespace(b)
	i := open(b)
	run(b, "iptables -w -t raw -A PREROUTING -p udp -j DROP")
	p := udp("192.0.2.7", "127.0.0.1", 9, strings.Repeat("x", 100))
	b.ReportAllocs()
	for b.Loop() {
		for range 64 {
			i.Add(p, false)
		}
		if n, err := i.Flush(); n != 64 || err != nil {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/packet")
}
