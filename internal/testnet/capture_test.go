package testnet

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

func tcpOf(p gopacket.Packet) *layers.TCP {
	t, _ := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	return t
}

func TestCaptureSeesResetAndData(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "cap", NoOffloads: true})
	all, err := n.Client().Capture(Iface, "")
	if err != nil {
		t.Fatal(err)
	}
	defer all.Stop()
	resets, err := n.Node().Capture(Iface, "tcp rst out")
	if err != nil {
		t.Fatal(err)
	}
	defer resets.Stop()
	start := time.Now()
	c, err := n.Client().Dial("tcp", echo(t, n.Node(), "10.77.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	const bulk = 1 << 20
	roundTrip(t, c, bulk)
	_ = c.Close()
	if _, err := all.WaitFor(5*time.Second, func(p gopacket.Packet) bool {
		tcp := tcpOf(p)
		return tcp != nil && tcp.FIN && p.NetworkLayer().NetworkFlow().Src().String() == "10.77.0.1"
	}); err != nil {
		t.Fatal(err)
	}
	if got := resets.Packets(); len(got) != 0 {
		t.Fatalf("a reset in an orderly connection: %v", got)
	}
	if _, err := n.Client().Dial("tcp", "10.77.0.1:9"); err == nil {
		t.Fatal("connected to a closed port")
	}
	got := resets.Stop() // no wait: Stop itself must collect what has passed
	if len(got) != 1 || !tcpOf(got[0]).RST || tcpOf(got[0]).SrcPort != 9 {
		t.Fatalf("resets: %v", got)
	}
	if again := resets.Stop(); len(again) != 1 {
		t.Fatalf("second Stop: %v", again)
	}
	if ts := got[0].Metadata().Timestamp; ts.Before(start) || ts.After(time.Now()) {
		t.Errorf("time stamp %s", ts)
	}
	var payload, arp int
	for _, p := range all.Stop() {
		if tcp := tcpOf(p); tcp != nil && tcp.DstPort != 9 {
			if p.NetworkLayer().NetworkFlow().Src().String() == "10.77.0.2" {
				payload += len(tcp.Payload)
			}
			if p.Metadata().Length > 1514 {
				t.Errorf("a frame of %d bytes without offloads", p.Metadata().Length)
			}
			checkTCPSum(t, p)
		}
		if p.Layer(layers.LayerTypeARP) != nil {
			arp++
		}
	}
	if payload < bulk || arp == 0 {
		t.Errorf("%d payload bytes captured of %d, %d ARP frames", payload, bulk, arp)
	}
	if err := all.Err(); err != nil {
		t.Error(err)
	}
	readBack(t, all)
	if _, err := all.WaitFor(time.Minute, func(gopacket.Packet) bool { return false }); err == nil {
		t.Error("WaitFor found what there is not")
	}
}

func checkTCPSum(t *testing.T, p gopacket.Packet) {
	t.Helper()
	ip := p.NetworkLayer().(*layers.IPv4)
	tcp := tcpOf(p)
	seg := append(append([]byte(nil), tcp.Contents...), tcp.Payload...)
	pseudo := append(append([]byte(nil), ip.SrcIP.To4()...), ip.DstIP.To4()...)
	pseudo = binary.BigEndian.AppendUint16(append(pseudo, 0, 6), uint16(len(seg)))
	b := append(pseudo, seg...)
	if len(b)%2 == 1 {
		b = append(b, 0)
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	if sum != 0xffff {
		t.Fatalf("TCP checksum of %v is wrong", p)
	}
}

func readBack(t *testing.T, c *Capture) {
	t.Helper()
	var buf bytes.Buffer
	n, err := c.WriteTo(&buf)
	if err != nil || n != int64(buf.Len()) {
		t.Fatalf("WriteTo: %d of %d, %v", n, buf.Len(), err)
	}
	r, err := pcapgo.NewReader(&buf)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range c.Packets() {
		data, ci, err := r.ReadPacketData()
		if err != nil || !bytes.Equal(data, p.Data()) || !ci.Timestamp.Equal(p.Metadata().Timestamp) {
			t.Fatalf("packet %d differs: %v", i, err)
		}
	}
	if _, _, err := r.ReadPacketData(); err != io.EOF {
		t.Fatalf("after the last packet: %v", err)
	}
	if err := c.WriteFile(filepath.Join(t.TempDir(), "x.pcap")); err != nil {
		t.Error(err)
	}
}

func TestCaptureOffloadFramesAndLoopback(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "gso"})
	c, err := n.Node().Capture("", "tcp data in")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	for _, host := range []string{"10.77.0.1:0", "127.0.0.1:0"} {
		from := n.Client()
		if strings.HasPrefix(host, "127") {
			from = n.Node()
		}
		conn, err := from.Dial("tcp", echo(t, n.Node(), host))
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, conn, 1<<20)
		_ = conn.Close()
	}
	var big, lo int
	for _, p := range c.Stop() {
		if p.Metadata().Length > 1514 {
			big++
		}
		if p.NetworkLayer().NetworkFlow().Src().String() == "127.0.0.1" {
			lo++
		}
	}
	if big == 0 || lo == 0 {
		t.Errorf("%d large frames, %d of loopback", big, lo)
	}
}

func TestCaptureErrors(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "caperr"})
	for filter, want := range map[string]string{
		"tcp foo x": "unknown word", "port": "missing argument", "port 70000": "range", "host x": "parse", "tcp not": "ends with",
	} {
		if _, err := n.Node().Capture(Iface, filter); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", filter, err, want)
		}
	}
	if _, err := n.Node().Capture("nosuch0", ""); err == nil || !strings.Contains(err.Error(), "nosuch0") {
		t.Errorf("error %v must name the interface", err)
	}
	c, err := n.Node().Capture(Iface, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	if _, err := c.WaitFor(10*time.Millisecond, func(gopacket.Packet) bool { return false }); err == nil {
		t.Error("WaitFor did not time out")
	}
}

func TestFilterTerms(t *testing.T) {
	tcp := func(src, dst string, flags uint8, payload int) []byte {
		s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
		b := make([]byte, 14)
		seg := make([]byte, 20+payload)
		binary.BigEndian.PutUint16(seg, s.Port())
		binary.BigEndian.PutUint16(seg[2:], d.Port())
		seg[12], seg[13] = 5<<4, flags
		if s.Addr().Is4() {
			h := make([]byte, 20)
			h[0], h[9] = 0x45, 6
			binary.BigEndian.PutUint16(h[2:], uint16(20+len(seg)))
			copy(h[12:], s.Addr().AsSlice())
			copy(h[16:], d.Addr().AsSlice())
			return append(append(b, h...), append(seg, make([]byte, 6)...)...) // 6 bytes of padding
		}
		h := make([]byte, 40)
		h[0], h[6] = 0x60, 6
		binary.BigEndian.PutUint16(h[4:], uint16(len(seg)))
		copy(h[8:], s.Addr().AsSlice())
		copy(h[24:], d.Addr().AsSlice())
		return append(append(b, h...), seg...)
	}
	syn4 := tcp("10.0.0.1:1000", "10.0.0.2:80", flagSYN, 0)
	data6 := tcp("[fd00::1]:1000", "[fd00::2]:80", flagACK|flagPSH, 3)
	for _, c := range []struct {
		frame  []byte
		filter string
		want   bool
	}{
		{syn4, "", true}, {syn4, "tcp syn", true}, {syn4, "tcp and not syn", false}, {syn4, "not not syn", true},
		{syn4, "data", false}, {syn4, "ip", true}, {syn4, "ip6", false}, {syn4, "not rst", true}, {syn4, "fin", false},
		{syn4, "host 10.0.0.2", true}, {syn4, "src 10.0.0.2", false}, {syn4, "dst 10.0.0.2", true},
		{syn4, "port 80 port 1000", true}, {syn4, "sport 80", false}, {syn4, "dport 80", true}, {syn4, "arp", false},
		{data6, "ip6 tcp data psh ack", true}, {data6, "syn", false}, {data6, "host fd00::1", true}, {data6, "udp", false},
		{data6, "out", true}, {data6, "in", false},
	} {
		match, err := compileFilter(c.filter)
		if err != nil {
			t.Fatal(err)
		}
		ethertype := uint16(unix.ETH_P_IP)
		if len(c.frame) > 54+20 {
			ethertype = unix.ETH_P_IPV6
		}
		f := parseFrame(c.frame, 14, ethertype)
		f.outgoing = true
		if got := match(&f); got != c.want {
			t.Errorf("%q: %v, want %v (%+v)", c.filter, got, c.want, f)
		}
	}
}

func FuzzParseFrame(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6}, uint16(unix.ETH_P_IP), true)
	f.Add(bytes.Repeat([]byte{0x60}, 80), uint16(unix.ETH_P_IPV6), false)
	f.Fuzz(func(t *testing.T, b []byte, ethertype uint16, ether bool) {
		link := 0
		if ether {
			link = 14
		}
		if fr := parseFrame(b, link, ethertype); fr.payload < 0 || fr.payload > len(b) {
			t.Fatalf("payload %d of %d", fr.payload, len(b))
		}
	})
}
