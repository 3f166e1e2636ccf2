package nfq

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"

	nfqueue "github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
)

// peerQueue opens a queue with go-nfqueue, with the same settings as ours.
func peerQueue(t testing.TB, queue uint16, fn func(nf *nfqueue.Nfqueue, a nfqueue.Attribute)) {
	t.Helper()
	nf, err := nfqueue.Open(&nfqueue.Config{
		NfQueue: queue, MaxPacketLen: 0xffff, MaxQueueLen: 65536,
		Copymode: nfqueue.NfQnlCopyPacket, Flags: nfqueue.NfQaCfgFlagGSO,
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = nf.SetOption(netlink.NoENOBUFS, true)
	_ = nf.Con.SetReadBuffer(16 << 20)
	ctx, cancel := context.WithCancel(context.Background())
	err = nf.RegisterWithErrorFunc(ctx, func(a nfqueue.Attribute) int { fn(nf, a); return 0 }, func(err error) int {
		if ctx.Err() != nil {
			return 1
		}
		return 0
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = nf.Close() })
}

// Each packet goes through a queue read by go-nfqueue and then, at the same
// hook, through ours: both must say the same about it.
func TestAgainstGoNfqueue(t *testing.T) {
	newNamespace(t)
	facts := make(chan Packet, 64)
	peerQueue(t, 11, func(nf *nfqueue.Nfqueue, a nfqueue.Attribute) {
		f := Packet{Hook: *a.Hook, Protocol: *a.HwProtocol, Payload: *a.Payload}
		for _, v := range []struct{ to, from *uint32 }{
			{&f.Mark, a.Mark}, {&f.InDev, a.InDev}, {&f.OutDev, a.OutDev}, {&f.OrigLen, a.CapLen},
		} {
			if v.from != nil {
				*v.to = *v.from
			}
		}
		if a.SkbInfo != nil {
			f.SkbInfo = binary.BigEndian.Uint32(*a.SkbInfo)
		}
		facts <- f
		_ = nf.SetVerdict(*a.PacketID, nfqueue.NfAccept)
	})
	q := openQueue(t, Config{Queue: 12})
	_, c4 := udpPair(t, "127.0.0.1")
	_, c6 := udpPair(t, "::1")
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, chain := range []string{"OUTPUT", "PREROUTING"} {
			run(t, ipt+" -w -t raw -A "+chain+" -p udp -m length --length 0:200 -j MARK --set-mark 0x77")
			run(t, ipt+" -w -t raw -A "+chain+" -p udp -j NFQUEUE --queue-num 11")
			run(t, ipt+" -w -t mangle -A "+chain+" -p udp -j NFQUEUE --queue-num 12")
		}
	}
	for i, size := range []int{0, 1, 2, 3, 1000, 40000, 65507, 5} {
		c := c4
		if i%2 == 1 {
			c = c6
		}
		if size > 65000 {
			c = c4
		}
		write(t, c, string(bytes.Repeat([]byte{byte(i)}, size)))
		for _, hook := range []uint8{3, 0} {
			got := receive(t, q, 1)[0]
			want := <-facts
			if want.OrigLen == 0 {
				want.OrigLen = uint32(len(want.Payload))
			}
			q.Accept(got.ID)
			flush(t, q)
			got.ID = 0
			if !equal(got, want) || got.Hook != hook {
				t.Errorf("size %d: at hook %d (want %d) ours and go-nfqueue's differ:\n%s\n%s", size, got.Hook, hook, brief(got), brief(want))
			}
		}
	}
}

func brief(p Packet) string {
	n := len(p.Payload)
	p.Payload = nil
	return fmt.Sprintf("%d bytes, %+v", n, p)
}

// benchDatagrams measures how fast a queue gives verdicts on small datagrams.
// A sender may outrun the queue, so what counts is the verdicts each second
// and the share of packets that was not lost.
func benchDatagrams(b *testing.B, seen *atomic.Int64) {
	run(b, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 5")
	server, client := udpPair(b, "127.0.0.1")
	run(b, "iptables -w -t mangle -A OUTPUT -p udp -j DROP")
	_ = server
	send, msg := rawWriter(b, client), make([]byte, 100)
	b.ReportAllocs()
	for b.Loop() {
		send(msg) // blocks while too many wait in the queue
	}
	n := float64(seen.Load())
	b.ReportMetric(n/b.Elapsed().Seconds(), "verdicts/s")
	b.ReportMetric(100*n/float64(b.N), "%seen")
}

// benchStream measures a TCP stream of which both directions are queued.
func benchStream(b *testing.B, _ *atomic.Int64) {
	run(b, "ip link set lo mtu 1500")
	run(b, "iptables -w -t raw -A OUTPUT -p tcp -j NFQUEUE --queue-num 5")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	buf := make([]byte, 128<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	read := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{s}); close(read) }()
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = c.Close()
	<-read
}

// BenchmarkQueue compares with go-nfqueue on the same traffic in one run. Of a
// stream only GSO packets are written back, as they came: the kernel accepts
// their unfinished checksums and would drop small packets with such.
func BenchmarkQueue(b *testing.B) {
	traffic := map[string]func(b *testing.B, seen *atomic.Int64){"datagrams": benchDatagrams, "stream": benchStream}
	for _, name := range []string{"datagrams", "stream"} {
		for _, modify := range []bool{false, true} {
			kind := name + "/accept"
			if modify {
				kind = name + "/modify"
			}
			b.Run(kind+"/nfq", func(b *testing.B) {
				newNamespace(b)
				var seen atomic.Int64
				q := openQueue(b, Config{Queue: 5})
				done := serve(q, func(p *Packet) {
					seen.Add(1)
					if modify && (name != "stream" || len(p.Payload) > 1500) {
						q.AcceptModified(p.ID, p.Payload)
					} else {
						q.Accept(p.ID)
					}
				})
				b.Cleanup(func() { _ = q.Close(); <-done })
				traffic[name](b, &seen)
			})
			b.Run(kind+"/go-nfqueue", func(b *testing.B) {
				newNamespace(b)
				var seen atomic.Int64
				peerQueue(b, 5, func(nf *nfqueue.Nfqueue, a nfqueue.Attribute) {
					seen.Add(1)
					if modify && (name != "stream" || len(*a.Payload) > 1500) {
						_ = nf.SetVerdictWithOption(*a.PacketID, nfqueue.NfAccept, nfqueue.WithAlteredPacket(*a.Payload))
					} else {
						_ = nf.SetVerdict(*a.PacketID, nfqueue.NfAccept)
					}
				})
				traffic[name](b, &seen)
			})
		}
	}
}
