package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
)

const (
	probeEvery = 5 * time.Millisecond
	// probeConns take turns: Linux answers an empty segment outside of the window
	// once in 500 ms for each connection (tcp_invalid_ratelimit).
	probeConns = 200
)

// prober asks a server that it answers: it sends the keepalive probes of
// connections that say nothing else, one every 5 ms, and captures the answers.
type prober struct {
	ns    *testnet.NS
	conns []*clients.RedisRaw
	specs []packet.Spec
	at    []time.Time // when the timestamp of each was taken
}

// newProber opens the connections and learns their numbers.
func newProber(ns *testnet.NS, dial clients.Dialer, addr string) (p *prober, err error) {
	p = &prober{ns: ns}
	capture, err := ns.Capture(testnet.Iface, "tcp out dst "+vip)
	if err != nil {
		return nil, err
	}
	for range probeConns {
		c, err := clients.DialRaw(dial, addr)
		if err != nil {
			return p, err
		}
		p.conns = append(p.conns, c)
		if err := c.Exchange([]byte("PING\r\n"), []byte("+PONG\r\n")); err != nil {
			return p, err
		}
	}
	last := map[uint16]*layers.TCP{}
	at, sent := map[uint16]time.Time{}, map[uint16]uint32{}
	deadline := time.Now().Add(5 * time.Second)
	for len(last) < probeConns && time.Now().Before(deadline) {
		for _, pk := range capture.Packets() {
			t, ok := pk.Layer(layers.LayerTypeTCP).(*layers.TCP)
			if !ok || t.SYN {
				continue
			}
			port := uint16(t.SrcPort)
			if n := len(t.Payload); n > 0 {
				sent[port] = t.Seq + uint32(n)
			} else if sent[port] != 0 && t.Seq == sent[port] {
				last[port], at[port] = t, pk.Metadata().Timestamp // the acknowledgement of the reply
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	capture.Stop()
	to := netip.MustParseAddrPort(addr)
	for _, c := range p.conns {
		from := c.LocalAddr().(*net.TCPAddr).AddrPort()
		t := last[from.Port()]
		if t == nil {
			return p, fmt.Errorf("the numbers of %s are not known", from)
		}
		s := packet.Spec{Src: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), Dst: to, Seq: seqnum.Value(t.Seq - 1), Ack: seqnum.Value(t.Ack),
			Flags: packet.ACK, Window: t.Window}
		for _, o := range t.Options {
			if o.OptionType == layers.TCPOptionKindTimestamps && len(o.OptionData) == 8 {
				s.HasTS, s.TSVal, s.TSEcr = true, be(o.OptionData), be(o.OptionData[4:])
			}
		}
		p.specs, p.at = append(p.specs, s), append(p.at, at[from.Port()])
	}
	return p, nil
}

func be(b []byte) uint32 {
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func (p *prober) close() {
	for _, c := range p.conns {
		c.Close()
	}
}

// during sends probes until f has returned, and gives the longest time in which
// none was answered.
func (p *prober) during(f func() error) (gap time.Duration, err error) {
	capture, err := p.ns.Capture(testnet.Iface, "tcp in src "+vip+" not syn not data")
	if err != nil {
		return 0, err
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	var perr error
	wg.Go(func() { perr = p.ns.Do(func() error { return p.send(end) }) })
	begin := time.Now()
	if _, err = capture.WaitFor(5*time.Second, p.answer); err != nil {
		err = fmt.Errorf("probes are not answered before anything is done: %w", err)
	} else {
		err = f()
	}
	if err == nil {
		_, err = capture.WaitFor(5*time.Second, p.answer) // it is still, or again, answered
	}
	finish := time.Now()
	close(end)
	wg.Wait()
	packets := capture.Stop()
	if err = errors.Join(err, perr, capture.Err()); err != nil {
		return 0, err
	}
	last := time.Time{}
	for _, pk := range packets {
		at := pk.Metadata().Timestamp
		if !p.answer(pk) || at.Before(begin) {
			continue
		}
		if !last.IsZero() {
			gap = max(gap, at.Sub(last))
		}
		last = at
	}
	return max(gap, finish.Sub(last)), nil
}

// answer tells whether a segment is one to a prober's connection.
func (p *prober) answer(pk gopacket.Packet) bool {
	t, ok := pk.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if !ok {
		return false
	}
	for i := range p.specs {
		if s := &p.specs[i]; s.Src.Port() == uint16(t.DstPort) {
			return t.Ack == uint32(s.Seq)+1
		}
	}
	return false
}

func (p *prober) send(end <-chan struct{}) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	buf := make([]byte, packet.MaxHeader)
	for i := 0; ; i++ {
		select {
		case <-end:
			return nil
		case <-tick.C:
		}
		s := p.specs[i%len(p.specs)]
		s.TSVal += uint32(time.Since(p.at[i%len(p.specs)]).Milliseconds()) // Linux counts ms
		if err := unix.Sendto(fd, s.Build(buf), 0, &unix.SockaddrInet4{Addr: s.Dst.Addr().As4()}); err != nil {
			return err
		}
	}
}
