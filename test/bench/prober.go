package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

const (
	// probeAddr is the prober's own address in the client namespace.
	probeAddr = "10.77.0.3"
	// probeEvery is the time between two probes of one connection.
	probeEvery = 10 * time.Millisecond
)

// prober is a remote of its own making: it has a few connections over raw
// sockets and asks on each, every probeEvery, whether the other side is there.
// The kernel never sees the answers, so it does not reset what it does not know.
//
// A probe is an empty segment below SND.NXT, as keepalives are (RFC 9293 section
// 3.8.4). The nodes' kernels have to answer every one (unlimited).
type prober struct {
	raw, packets int
	start        time.Time
	stop, ended  chan struct{}

	mu    sync.Mutex
	conns map[uint16]*probed
	err   error
}

// probed is one connection of a prober.
type probed struct {
	local, remote netip.AddrPort
	next          seqnum.Value // SND.NXT
	theirs        seqnum.Value // RCV.NXT
	ts, open      bool
	tsRecent      uint32
	waiting       []time.Time // when unanswered probes were sent, oldest first
	longest       time.Duration
	answers       int
}

// unlimited has the kernel of a node answer every segment outside of a window; it
// would answer empty ones of a connection only twice a second.
func unlimited(node *testnet.NS) error { return node.Sysctl("net/ipv4/tcp_invalid_ratelimit", "0") }

// newProber opens so many connections from ns to a server, every other one with
// timestamps, and probes them until close.
func newProber(ns *testnet.NS, server netip.AddrPort, n int) (p *prober, err error) {
	p = &prober{raw: -1, packets: -1, start: time.Now(), stop: make(chan struct{}), ended: make(chan struct{}), conns: map[uint16]*probed{}}
	defer func() {
		if err != nil {
			p.closeSockets()
		}
	}()
	if err := ns.AddAddr(testnet.Iface, probeAddr+"/24"); err != nil {
		return nil, err
	}
	// Packet sockets see the frames before this rule does.
	rule := ns.Command("iptables", "-w", "-t", "raw", "-A", "PREROUTING", "-d", probeAddr, "-p", "tcp", "-j", "DROP")
	if out, err := rule.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("iptables: %w: %s", err, out)
	}
	if err := ns.Do(p.openSockets); err != nil {
		return nil, fmt.Errorf("prober: %w", err)
	}
	own := netip.MustParseAddr(probeAddr)
	for i := range n {
		c := &probed{local: netip.AddrPortFrom(own, uint16(20000+i)), remote: server, next: seqnum.Value(1e9 * (i + 1)), ts: i%2 == 0}
		p.conns[c.local.Port()] = c
		if err := p.connect(c); err != nil {
			return nil, err
		}
	}
	go p.run()
	return p, nil
}

func (p *prober) openSockets() (err error) {
	if p.raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
		return err
	}
	if p.packets, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return err
	}
	ifi, err := interfaceIndex(testnet.Iface)
	if err != nil {
		return err
	}
	dst := netip.MustParseAddr(probeAddr).As4()
	// The destination of an IPv4 header, by classic BPF (linux/filter.h): the
	// other clients' segments are not read.
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: binary.BigEndian.Uint32(dst[:])},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return errors.Join(
		unix.SetsockoptSockFprog(p.packets, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}),
		unix.SetsockoptInt(p.packets, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		unix.SetsockoptInt(p.packets, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.Bind(p.packets, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_IP), Ifindex: ifi}))
}

func networkOrder(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

func (p *prober) closeSockets() {
	for _, fd := range []int{p.raw, p.packets} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// close ends the probing; the connections are left as they are.
func (p *prober) close() error {
	close(p.stop)
	<-p.ended
	p.closeSockets()
	return p.err
}

// clock is the prober's timestamp clock, in ms.
func (p *prober) clock(at time.Time) uint32 { return uint32(at.Sub(p.start).Milliseconds()) + 1 }

func (p *prober) send(c *probed, at time.Time, sp packet.Spec) error {
	sp.Src, sp.Dst, sp.Window = c.local, c.remote, 0xffff
	if c.ts {
		sp.HasTS, sp.TSVal, sp.TSEcr = true, p.clock(at), c.tsRecent
	}
	err := unix.Sendto(p.raw, sp.Build(make([]byte, sp.Size())), 0, &unix.SockaddrInet4{Addr: c.remote.Addr().As4()})
	if errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENOBUFS) {
		return nil // as good as lost on the way; it stays unanswered
	}
	return err
}

// connect does a handshake.
func (p *prober) connect(c *probed) error {
	const tries = 20
	for range tries {
		at := time.Now()
		if err := p.send(c, at, packet.Spec{Seq: c.next, Flags: packet.SYN, MSS: 1460}); err != nil {
			return err
		}
		for time.Since(at) < 500*time.Millisecond {
			if err := p.receive(500*time.Millisecond - time.Since(at)); err != nil {
				return err
			}
			if c.open {
				return nil
			}
		}
	}
	return fmt.Errorf("prober: %v does not answer a SYN", c.remote)
}

// run probes and reads the answers until stop.
func (p *prober) run() {
	defer close(p.ended)
	for next := time.Now(); ; {
		select {
		case <-p.stop:
			return
		default:
		}
		var err error
		if now := time.Now(); !now.Before(next) {
			err = p.round()
			if next = next.Add(probeEvery); next.Before(now) {
				next = now.Add(probeEvery)
			}
		}
		if err = errors.Join(err, p.receive(time.Until(next))); err != nil {
			p.mu.Lock()
			p.err = errors.Join(p.err, err)
			p.mu.Unlock()
			return
		}
	}
}

// round sends a probe on every connection.
func (p *prober) round() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		at := time.Now()
		c.waiting = append(c.waiting, at)
		if err := p.send(c, at, packet.Spec{Seq: c.next.Add(^uint32(0)), Ack: c.theirs, Flags: packet.ACK}); err != nil {
			return err
		}
	}
	return nil
}

// receive waits so long for segments and takes those that are there.
func (p *prober) receive(wait time.Duration) error {
	ts := unix.NsecToTimespec(max(wait, 0).Nanoseconds())
	if _, err := unix.Ppoll([]unix.PollFd{{Fd: int32(p.packets), Events: unix.POLLIN}}, &ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	buf, oob := make([]byte, 64<<10), make([]byte, 128)
	for {
		n, oobn, _, _, err := unix.Recvmsg(p.packets, buf, oob, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return err
		}
		var s packet.Segment
		if s.Parse(buf[:n]) != packet.OK {
			continue
		}
		if err := p.take(&s, stamp(oob[:oobn])); err != nil {
			return err
		}
	}
}

// stamp is the time at which the kernel got a packet.
func stamp(oob []byte) time.Time {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 { // struct timespec, two native words
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Now()
}

// take handles one segment of the server. What is not an answer to a probe is a
// fault: a living server sends nothing that ends or changes the connection.
func (p *prober) take(s *packet.Segment, at time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.conns[s.Dst.Port()]
	if c == nil || s.Src != c.remote {
		return nil
	}
	if s.Opt.HasTS {
		c.tsRecent = s.Opt.TSVal
	}
	switch {
	case s.Flags&(packet.RST|packet.FIN) != 0, s.PayloadLen() > 0:
		return fmt.Errorf("prober: %v got flags %#x with %d octets instead of an answer", c.local, s.Flags, s.PayloadLen())
	case s.Has(packet.SYN | packet.ACK):
		if c.open = true; s.Ack != c.next.Add(1) && s.Ack != c.next {
			return fmt.Errorf("prober: %v got a SYN that acknowledges %d instead of %d", c.local, s.Ack, c.next.Add(1))
		}
		c.next, c.theirs, c.ts = s.Ack, s.Seq.Add(1), c.ts && s.Opt.HasTS
		return p.send(c, time.Now(), packet.Spec{Seq: c.next, Ack: c.theirs, Flags: packet.ACK})
	case !s.Has(packet.ACK) || s.Ack != c.next:
		return fmt.Errorf("prober: %v got flags %#x that acknowledge %d instead of %d", c.local, s.Flags, s.Ack, c.next)
	}
	c.answers++
	// All that went out before. The timestamp echoed is not a probe's: what lies
	// outside of the window does not count as the remote's clock (RFC 7323 section 4.3).
	for len(c.waiting) > 0 && !at.Before(c.waiting[0]) {
		c.longest = max(c.longest, at.Sub(c.waiting[0]))
		c.waiting = c.waiting[1:]
	}
	return nil
}

// reset forgets what was measured so far, and the longest begins anew.
func (p *prober) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.longest, c.answers = 0, 0
	}
}

// longest waits until every connection was answered after the call, and returns
// the longest time that a probe waited since reset.
func (p *prober) longest(timeout time.Duration) (time.Duration, error) {
	called := time.Now()
	for {
		worst, settled, err := p.look(called)
		switch {
		case err != nil:
			return 0, err
		case settled:
			return worst, nil
		case time.Since(called) > timeout:
			return 0, fmt.Errorf("prober: not every connection was answered within %v", timeout)
		}
		time.Sleep(probeEvery) // the next round
	}
}

func (p *prober) look(since time.Time) (worst time.Duration, settled bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	settled = time.Since(since) > 2*probeEvery // probes went out meanwhile
	for _, c := range p.conns {
		worst = max(worst, c.longest)
		settled = settled && c.answers > 0 && (len(c.waiting) == 0 || c.waiting[0].After(since))
	}
	return worst, settled, p.err
}
