package sim

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// host is one TCP stack with one network device.
//
// The stack handles segments in goroutines of its own. A run stays
// deterministic because every call into the stack is followed by settle, which
// waits until these goroutines have nothing left to do: at any moment at most
// one goroutine of a run works.
type host struct {
	st   *stack.Stack
	dev  *device
	out  func([]byte) // takes what the stack sends
	pump func() bool  // lets the programs do what they can; true when they did something
	busy bool
}

// hostConfig is what differs between stacks.
type hostConfig struct {
	addrs      []netip.Addr
	mtu        uint32
	sack       bool
	rcvBuf     int // default receive buffer, decides on the window scale
	sndBuf     int
	maxRetries uint64
	outOfWin   time.Duration // least time between two acknowledgements for empty segments outside the window
	cubic      bool
}

// source is a seeded generator that serves a stack as both of its sources of
// randomness.
type source struct {
	mu sync.Mutex
	r  *rand.PCG
}

func (s *source) Int63() int64 { return int64(s.Uint64() >> 1) }
func (s *source) Seed(int64)   {}
func (s *source) Uint64() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.r.Uint64()
}

// Read implements io.Reader.
func (s *source) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(s.Uint64() >> 32)
	}
	return len(b), nil
}

// device takes the packets that a stack sends, for settle to hand on.
type device struct {
	*channel.Endpoint
	mu   sync.Mutex
	sent [][]byte
}

// WritePackets implements stack.LinkEndpoint.
func (d *device) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, p := range pkts.AsSlice() {
		v := p.ToView()
		d.sent = append(d.sent, append([]byte(nil), v.AsSlice()...))
		v.Release()
		n++
	}
	return n, nil
}

const (
	nic      = 1
	localMTU = 1500
)

func newHost(clock tcpip.Clock, seed uint64, c hostConfig, out func([]byte)) *host {
	src := &source{r: rand.NewPCG(seed, 0x5eed)}
	factory := tcp.NewProtocol
	if c.cubic {
		factory = tcp.NewProtocolCUBIC
	}
	h := &host{out: out, dev: &device{Endpoint: channel.New(1, c.mtu, "")}}
	h.st = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{factory},
		Clock:              clock, RandSource: src, SecureRNG: src,
	})
	must(h.st.CreateNIC(nic, h.dev))
	for _, a := range c.addrs {
		must(h.st.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol: netProto(a),
			AddressWithPrefix: tcpip.AddressWithPrefix{
				Address: tcpip.AddrFromSlice(a.AsSlice()), PrefixLen: a.BitLen(),
			},
		}, stack.AddressProperties{}))
	}
	h.st.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	sack := tcpip.TCPSACKEnabled(c.sack)
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: c.rcvBuf, Max: max(4<<20, c.rcvBuf)}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: 4096, Default: c.sndBuf, Max: max(4<<20, c.sndBuf)}
	retries := tcpip.TCPMaxRetriesOption(c.maxRetries)
	var recovery tcpip.TCPRecovery // no RACK: behind a tail loss probe that is lost netstack repeats a FIN no more
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &rcv, &snd, &retries, &recovery} {
		must(h.st.SetTransportProtocolOption(tcp.ProtocolNumber, o))
	}
	must(h.st.SetOption(stack.TCPInvalidRateLimitOption(c.outOfWin)))
	return h
}

func must(err tcpip.Error) {
	if err != nil {
		panic(err.String())
	}
}

func netProto(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is6() {
		return ipv6.ProtocolNumber
	}
	return ipv4.ProtocolNumber
}

func fullAddr(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	x, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(x, port)
}

// inject gives the stack a packet from its device and waits until it is done
// with it.
func (h *host) inject(b []byte) {
	proto := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
	if b[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	h.dev.InjectInbound(proto, p)
	p.DecRef()
	h.settle()
}

// settle waits until the stack has nothing left to do and hands on what it has
// sent.
func (h *host) settle() {
	if h.busy {
		return
	}
	h.busy = true
	for {
		h.st.Pause()
		h.st.Resume()
		h.dev.mu.Lock()
		sent := h.dev.sent
		h.dev.sent = nil
		h.dev.mu.Unlock()
		for _, b := range sent {
			normalise(b)
			h.out(b)
		}
		if h.pump == nil || !h.pump() {
			break
		}
	}
	h.busy = false
}

// hostClock is the clock of one stack: what a timer makes it do is seen to the
// end at once.
type hostClock struct {
	*scheduler
	h func() *host
}

// AfterFunc implements tcpip.Clock.
func (c *hostClock) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	return c.scheduler.AfterFunc(d, func() {
		f()
		if h := c.h(); h != nil {
			h.settle()
		}
	})
}

// destroy ends the stack's goroutines.
func (h *host) destroy() {
	h.out, h.pump, h.busy = func([]byte) {}, nil, true
	h.st.Destroy()
}

// normalise clears the IPv4 identification, which the stack draws from a
// source that is not seeded.
func normalise(b []byte) {
	if b[0]>>4 != 4 {
		return
	}
	h := header.IPv4(b)
	h.SetID(0)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}
