package test

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// wireEnd is what one end of a connection has sent so far.
type wireEnd struct {
	fin   bool
	known bool
	end   seqnum.Value // behind everything sent
	acked bool
	ack   seqnum.Value
	ackAt time.Time // when it came to be
	tsval uint32
	tsSet bool
}

type wireConn struct {
	remote, local wireEnd
	hole          error        // a segment with a hole before it
	holeEnd       seqnum.Value // and where that ended
	holeAt        time.Time
}

// overtaking is for how long packets may wait in the kernel's queues while
// others overtake them, on a machine that does many things at once (each CPU has one of
// its own); less than a retransmission takes. reordered: by how many ms a timestamp then moves back.
const (
	overtaking = 100 * time.Millisecond
	reordered  = 100
)

// wireFaults reads a capture of the node's side towards its clients and names
// every segment from the VIP that no quiet, living peer would send: RST, FIN
// before the remote's, an acknowledgement of what was never sent or that moves back, a number
// behind what was sent, a timestamp that moves back or echoes one that was
// never sent.
func wireFaults(vip string, packets []gopacket.Packet) error {
	return wireFaultsLosing(vip, packets, overtaking)
}

// wireFaultsLosing is wireFaults where what the node was about to send may be lost, which is seen as a
// hole, and is sent again within a time.
func wireFaultsLosing(vip string, packets []gopacket.Packet, within time.Duration) error {
	conns := map[netip.AddrPort]*wireConn{}
	var faults []error
	for i, p := range packets {
		tcp, _ := p.TransportLayer().(*layers.TCP)
		if tcp == nil {
			continue
		}
		src, dst := p.NetworkLayer().NetworkFlow().Endpoints()
		local := src.String() == vip
		remote := netip.MustParseAddr(src.String())
		port := uint16(tcp.SrcPort)
		if local {
			remote, port = netip.MustParseAddr(dst.String()), uint16(tcp.DstPort)
		}
		id := netip.AddrPortFrom(remote, port)
		c := conns[id]
		if c == nil || !local && tcp.SYN {
			c = &wireConn{}
			conns[id] = c
		}
		if !local {
			c.remote.sent(tcp, p.Metadata().Timestamp)
			continue
		}
		at := p.Metadata().Timestamp
		f := c.judge(tcp, at)
		if f != "" {
			faults = append(faults, fmt.Errorf("segment %d, to %v: %s: %v", i, id, f, p))
		}
		seq := seqnum.Value(tcp.Seq)
		switch end := seq.Add(uint32(len(tcp.Payload))); {
		case c.local.known && c.local.end.Less(seq) && c.hole == nil:
			c.hole = fmt.Errorf("segment %d, to %v: a hole of %d octets before it: %v", i, id, seq.Size(c.local.end), p)
			c.holeEnd, c.holeAt = seq, at
		case c.hole != nil && seq.Less(c.holeEnd) && c.holeEnd.LessEq(end) && at.Sub(c.holeAt) < within:
			c.hole = nil // it was only overtaken
		}
		c.local.sent(tcp, at)
	}
	for _, c := range conns {
		if c.hole != nil {
			faults = append(faults, c.hole)
		}
	}
	if len(faults) > 3 {
		faults = append(faults[:3], fmt.Errorf("and %d more", len(faults)-3))
	}
	return errors.Join(faults...)
}

func timestamps(tcp *layers.TCP) (val, ecr uint32, ok bool) {
	for _, o := range tcp.Options {
		if d := o.OptionData; o.OptionType == layers.TCPOptionKindTimestamps && len(d) == 8 {
			be := func(b []byte) uint32 {
				return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
			}
			return be(d), be(d[4:]), true
		}
	}
	return 0, 0, false
}

// sent takes note of a segment of this end.
func (e *wireEnd) sent(tcp *layers.TCP, at time.Time) {
	end := seqnum.Value(tcp.Seq).Add(uint32(len(tcp.Payload)))
	if tcp.SYN || tcp.FIN {
		end = end.Add(1)
	}
	e.fin = e.fin || tcp.FIN
	if !e.known || e.end.Less(end) {
		e.known, e.end = true, end
	}
	if tcp.ACK && (!e.acked || e.ack.Less(seqnum.Value(tcp.Ack))) {
		e.acked, e.ack, e.ackAt = true, seqnum.Value(tcp.Ack), at
	}
	if v, _, ok := timestamps(tcp); ok && (!e.tsSet || int32(v-e.tsval) > 0) {
		e.tsSet, e.tsval = true, v
	}
}

// judge names what is wrong with a segment of the VIP's, "" when nothing is.
func (c *wireConn) judge(tcp *layers.TCP, at time.Time) string {
	ack := seqnum.Value(tcp.Ack)
	val, ecr, ts := timestamps(tcp)
	switch l, r := &c.local, &c.remote; {
	case tcp.RST, tcp.FIN && !r.fin: // whose remote has closed may close too
		return "FIN or RST"
	case r.known && r.end.Less(ack):
		return fmt.Sprintf("acknowledges %d octets that were never sent", ack.Size(r.end))
	case l.acked && ack.Less(l.ack) && at.Sub(l.ackAt) > overtaking:
		return fmt.Sprintf("its acknowledgement moves back by %d", l.ack.Size(ack))
	case ts && l.tsSet && int32(val-l.tsval) < -reordered:
		return fmt.Sprintf("its timestamp moves back by %d", l.tsval-val)
	case ts && r.tsSet && int32(ecr-r.tsval) > 0:
		return "echoes a timestamp that was never sent"
	}
	return ""
}

// saveCapture keeps what passes in a namespace until the test has failed, when
// captures are asked for.
func saveCapture(t *testing.T, ns *testnet.NS) {
	t.Helper()
	if *capturesFlag == "" {
		return
	}
	all, err := ns.Capture("", "tcp") // lo too, where the filter speaks to the application
	must(t, err)
	t.Cleanup(func() {
		all.Stop()
		if t.Failed() {
			must(t, all.WriteFile(filepath.Join(*capturesFlag, strings.ReplaceAll(t.Name(), "/", "-")+".pcap")))
		}
	})
}

// watch captures everything between the node and its clients; what it returns
// ends the capture and fails the test for every segment that a client could
// notice.
func watch(t *testing.T, net *testnet.Net, vip string) func() {
	t.Helper()
	capture, err := net.Node().Capture(testnet.Iface, "tcp")
	must(t, err)
	saveCapture(t, net.Node())
	return func() {
		t.Helper()
		packets := capture.Stop()
		must(t, capture.Err())
		if len(packets) == 0 {
			t.Error("the capture saw nothing")
		}
		check(t, wireFaults(vip, packets))
	}
}

// TestWireFaults shows that the check can fail.
func TestWireFaults(t *testing.T) {
	clock := time.Unix(1, 0)
	segment := func(out bool, seq, ack, val, ecr uint32, payload string, change func(*layers.TCP)) gopacket.Packet {
		src, dst := "10.77.0.2", vip
		tcp := layers.TCP{SrcPort: 40000, DstPort: 6379, Seq: seq, Ack: ack, ACK: true, Window: 500}
		if out {
			src, dst, tcp.SrcPort, tcp.DstPort = dst, src, 6379, 40000
		}
		b := []byte{byte(val >> 24), byte(val >> 16), byte(val >> 8), byte(val), byte(ecr >> 24), byte(ecr >> 16), byte(ecr >> 8), byte(ecr)}
		tcp.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: b}}
		if change != nil {
			change(&tcp)
		}
		s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
		ip := layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: s.AsSlice(), DstIP: d.AsSlice()}
		must(t, tcp.SetNetworkLayerForChecksum(&ip))
		buf := gopacket.NewSerializeBuffer()
		must(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, &ip, &tcp, gopacket.Payload(payload)))
		p := gopacket.NewPacket(buf.Bytes(), layers.LayerTypeIPv4, gopacket.Default)
		clock = clock.Add(time.Second)
		p.Metadata().Timestamp = clock
		return p
	}
	good := []gopacket.Packet{
		segment(false, 100, 0xfffffff0, 7, 3, "PING", nil),
		segment(true, 0xfffffff0, 104, 4, 7, "0123456789abcdefgh", nil), // wraps
		segment(false, 103, 2, 8, 4, "", nil),
		segment(true, 2, 104, 4, 8, "", nil),
		segment(true, 0xfffffff0, 104, 4, 8, "0123", nil), // again
	}
	must(t, wireFaults(vip, good))
	fin := func(s *layers.TCP) { s.FIN = true }
	must(t, wireFaults(vip, append(good[:len(good):len(good)], segment(false, 104, 2, 9, 4, "", fin), segment(true, 2, 105, 4, 9, "", fin))))
	// A segment that is overtaken by the next acknowledgement on its way out.
	reorder := []gopacket.Packet{segment(true, 6, 104, 5, 8, "", nil), segment(true, 2, 104, 5, 8, "0123", nil)}
	reorder[1].Metadata().Timestamp = reorder[0].Metadata().Timestamp.Add(time.Millisecond)
	must(t, wireFaults(vip, append(good[:len(good):len(good)], reorder...)))
	reorder[1].Metadata().Timestamp = reorder[0].Metadata().Timestamp.Add(time.Second)
	if err := wireFaults(vip, append(good[:len(good):len(good)], reorder...)); err == nil || !strings.Contains(err.Error(), "a hole of 4") {
		t.Errorf("a hole that is filled late: %v", err)
	}
	for want, p := range map[string]gopacket.Packet{
		"FIN or RST":                      segment(true, 2, 104, 4, 8, "", func(s *layers.TCP) { s.FIN = true }),
		"acknowledges 1 octets":           segment(true, 2, 105, 4, 8, "", nil),
		"acknowledgement moves back":      segment(true, 2, 103, 4, 8, "", nil),
		"a hole of 1 octets":              segment(true, 3, 104, 4, 8, "", nil),
		"its timestamp moves back by 101": segment(true, 2, 104, 0xffffff9f, 8, "", nil),
		"a timestamp that was never":      segment(true, 2, 104, 4, 9, "", nil),
		"segment 5, to 10.77.0.2:40000:":  segment(true, 2, 104, 4, 8, "", func(s *layers.TCP) { s.RST = true }),
	} {
		if err := wireFaults(vip, append(good[:len(good):len(good)], p)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want a fault %q, got %v", want, err)
		}
	}
}
