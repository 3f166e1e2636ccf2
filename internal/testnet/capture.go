package testnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

const (
	captureBuffer = 64 << 20 // bytes of socket buffer
	maxFrame      = 256 << 10
	arphrdNone    = 0xfffe // ARPHRD_NONE of include/uapi/linux/if_arp.h: a TUN device, frames start with the IP header
)

type captured struct {
	at        time.Time
	data      []byte
	ethertype uint16
	raw       bool // no link header
	outgoing  bool
	ifindex   int
	length    int
}

// Capture records the frames of an interface from the moment it was made until Stop.
type Capture struct {
	file    *os.File
	conn    syscall.RawConn
	match   predicate
	done    chan struct{}
	mu      sync.Mutex
	changed *sync.Cond
	frames  []captured
	drops   uint32
	err     error
	stopped bool // Stop was called
	ended   bool // nothing more comes
}

// Capture starts to record the frames that pass an interface of the namespace, or every interface when iface is
// empty. filter is a list of terms that must all hold, each optionally after "not"; "and" between them is allowed:
// ip ip6 arp tcp udp; syn ack fin rst psh data (a TCP or UDP payload); in out; host, src or dst with an address; port,
// sport or dport with a number. Example: "tcp rst out port 6379". Extension headers of IPv6 and fragments after the
// first are not looked into.
func (ns *NS) Capture(iface, filter string) (*Capture, error) {
	match, err := compileFilter(filter)
	if err != nil {
		return nil, err
	}
	var fd int
	err = ns.Do(func() (err error) {
		fd, err = openPacket(iface)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("testnet: capture on %q in %s: %w", iface, ns.name, err)
	}
	c := &Capture{file: os.NewFile(uintptr(fd), "capture"), match: match, done: make(chan struct{})}
	c.changed = sync.NewCond(&c.mu)
	if c.conn, err = c.file.SyscallConn(); err != nil {
		_ = c.file.Close()
		return nil, fmt.Errorf("testnet: capture: %w", err)
	}
	go c.run()
	return c, nil
}

func openPacket(iface string) (int, error) {
	// Protocol 0 receives nothing until bind names one, so no frame of another interface slips in.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	sa := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}
	if iface != "" {
		ifi, err := net.InterfaceByName(iface)
		if err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
		sa.Ifindex = ifi.Index
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.Bind(fd, sa),
	)
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// run reads until the deadline that Stop sets, and then what is still queued.
func (c *Capture) run() {
	defer close(c.done)
	buf, oob := make([]byte, maxFrame), make([]byte, 128)
	drain := func(fd uintptr) (empty bool) {
		for {
			// MSG_TRUNC makes n the frame's full length.
			n, oobn, _, from, err := unix.Recvmsg(int(fd), buf, oob, unix.MSG_TRUNC)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return false
			case err != nil:
				c.fail(err)
				return true
			default:
				c.add(buf[:min(n, len(buf))], oob[:oobn], from, n)
			}
		}
	}
	err := c.conn.Read(drain)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = c.conn.Control(func(fd uintptr) {
			drain(fd)
			if stats, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
				c.mu.Lock()
				c.drops = stats.Drops
				c.mu.Unlock()
			}
		})
	}
	if err != nil {
		c.fail(err)
	}
}

func (c *Capture) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	c.changed.Broadcast()
}

func (c *Capture) add(data, oob []byte, from unix.Sockaddr, length int) {
	f := captured{length: length, at: time.Now(), ethertype: 0}
	link := 14
	if ll, ok := from.(*unix.SockaddrLinklayer); ok {
		f.ethertype = htons(ll.Protocol)
		f.outgoing = ll.Pkttype == unix.PACKET_OUTGOING
		f.ifindex = ll.Ifindex
		if f.raw = ll.Hatype == arphrdNone; f.raw {
			link = 0
		}
	}
	fr := parseFrame(data, link, f.ethertype)
	fr.outgoing = f.outgoing
	if !c.match(&fr) {
		return
	}
	if msgs, err := unix.ParseSocketControlMessage(oob); err == nil {
		for _, m := range msgs {
			// struct timespec, two native words
			if m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
				f.at = time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
			}
		}
	}
	f.data = append([]byte(nil), data...)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = append(c.frames, f)
	c.changed.Broadcast()
}

// Stop ends the capture and returns its packets, oldest first. All frames that passed the interface before the call are
// in it. It may be called again.
func (c *Capture) Stop() []gopacket.Packet {
	c.mu.Lock()
	first := !c.stopped
	c.stopped = true
	c.mu.Unlock()
	if first {
		if err := c.file.SetReadDeadline(time.Unix(1, 0)); err != nil {
			c.fail(err)
			_ = c.file.Close() // ends the reader in any case
		}
	}
	<-c.done
	if first {
		_ = c.file.Close()
		c.mu.Lock()
		c.ended = true
		c.changed.Broadcast()
		c.mu.Unlock()
	}
	return c.Packets()
}

// Err tells whether the record may be incomplete: frames were lost for want of buffer, or the socket failed (such as
// when its interface went down). It is final after Stop.
func (c *Capture) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return fmt.Errorf("testnet: capture: %w", c.err)
	}
	if c.drops > 0 {
		return fmt.Errorf("testnet: capture lost %d frames", c.drops)
	}
	return nil
}

// Packets returns the packets so far, decoded. Metadata holds the kernel's time stamp and the interface index. A TCP
// checksum of a frame with offloads is not filled in.
func (c *Capture) Packets() []gopacket.Packet {
	c.mu.Lock()
	frames := c.frames[:len(c.frames):len(c.frames)]
	c.mu.Unlock()
	packets := make([]gopacket.Packet, len(frames))
	for i := range frames {
		packets[i] = frames[i].decode()
	}
	return packets
}

func (f *captured) info() gopacket.CaptureInfo {
	return gopacket.CaptureInfo{
		Timestamp: f.at, CaptureLength: len(f.data), Length: f.length, InterfaceIndex: f.ifindex,
	}
}

func (f *captured) decode() gopacket.Packet {
	var first gopacket.Decoder = layers.LayerTypeEthernet
	if f.raw {
		first = layers.EthernetType(f.ethertype)
	}
	p := gopacket.NewPacket(f.data, first, gopacket.DecodeOptions{NoCopy: true})
	p.Metadata().CaptureInfo = f.info()
	return p
}

// WaitFor waits until a packet, past or coming, satisfies match, and returns it. The error names the time-out or why
// the capture ended.
func (c *Capture) WaitFor(timeout time.Duration, match func(gopacket.Packet) bool) (gopacket.Packet, error) {
	expired := false
	timer := time.AfterFunc(timeout, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		expired = true
		c.changed.Broadcast()
	})
	defer timer.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for seen := 0; ; {
		for ; seen < len(c.frames); seen++ {
			f := c.frames[seen]
			c.mu.Unlock()
			p := f.decode()
			ok := match(p)
			c.mu.Lock()
			if ok {
				return p, nil
			}
		}
		switch {
		case c.err != nil:
			return nil, fmt.Errorf("testnet: capture: %w", c.err)
		case c.ended:
			return nil, errors.New("testnet: capture stopped before the packet came")
		case expired:
			return nil, fmt.Errorf("testnet: no such packet in %s; %d others", timeout, len(c.frames))
		}
		c.changed.Wait()
	}
}

// WriteTo writes the packets so far as a pcap file (Ethernet link type; nanoseconds). Frames of devices without link
// headers get an empty one.
func (c *Capture) WriteTo(w io.Writer) (int64, error) {
	c.mu.Lock()
	frames := c.frames[:len(c.frames):len(c.frames)]
	c.mu.Unlock()
	counter := &countingWriter{w: w}
	pw := pcapgo.NewWriterNanos(counter)
	if err := pw.WriteFileHeader(maxFrame, layers.LinkTypeEthernet); err != nil {
		return counter.n, err
	}
	for i := range frames {
		f := frames[i]
		if f.raw {
			header := make([]byte, 14)
			binary.BigEndian.PutUint16(header[12:], f.ethertype)
			f.data = append(header, f.data...)
			f.length += len(header)
		}
		if err := pw.WritePacket(f.info(), f.data); err != nil {
			return counter.n, err
		}
	}
	return counter.n, nil
}

// WriteFile writes the packets so far to a pcap file.
func (c *Capture) WriteFile(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = c.WriteTo(file)
	return errors.Join(err, file.Close())
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
