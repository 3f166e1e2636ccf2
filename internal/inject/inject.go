// Package inject sends whole IP packets, marked so that the filter's own rules
// let them pass.
//
// Packets are gathered with Add and sent with Flush, many per system call and
// in the order in which they were added. There are two marks: one for packets
// that connection tracking must not see and one for those that it must.
//
// The kernel routes each packet by its destination and mark. It sends a packet
// as it is, but fills in the header checksum, the total length, a zero
// identification and a zero source address of IPv4 (raw(7)). Transport
// checksums are the caller's. A packet longer than the device's MTU is refused
// with EMSGSIZE; none is cut into segments. A link-local IPv6 destination has
// no device here and is refused.
//
// An Injector belongs to one goroutine; only Stats may be called from others.
package inject

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	batch   = 256      // messages of one sendmmsg, at most UIO_MAXIOV
	sendBuf = 8 << 20  // bytes that may wait in each socket
	waitMs  = 10       // milliseconds that one Flush waits at most for a full send buffer
	ipv4Min = 20       // bytes of an IPv4 header without options, RFC 791 section 3.1
	ipv6Min = 40       // bytes of an IPv6 header, RFC 8200 section 3
	errnos  = 134      // Linux error numbers end at EHWPOISON, 133
	keepCap = 64 << 10 // packets up to which a grown list is kept
)

// Config holds the two marks (SO_MARK).
type Config struct {
	Mark        uint32 // for packets that are not to be tracked
	TrackedMark uint32 // for packets that connection tracking must see
}

// Kinds of socket: address family and mark.
const (
	plain4 = iota
	tracked4
	plain6
	tracked6
	kinds
)

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [unsafe.Sizeof(uintptr(0)) - 4]byte
}

type entry struct {
	pkt  []byte
	kind uint8
}

// Injector sends raw packets in the network namespace in which it was opened.
type Injector struct {
	fds  [kinds]int
	list []entry

	// One slot for each message of a call. The pointers between them are set
	// once, those to the packets at each call.
	hdrs  [batch]mmsghdr
	iovs  [batch]unix.Iovec
	addr4 [batch]unix.RawSockaddrInet4
	addr6 [batch]unix.RawSockaddrInet6

	pollfd [1]unix.PollFd
	waited bool // this Flush has waited for room already

	failures int
	firstErr error

	sent, failed, calls atomic.Uint64
	byErrno             [errnos]atomic.Uint64
}

// Stats counts what an Injector has done.
type Stats struct {
	Sent    uint64 // packets that the kernel took
	Failed  uint64 // packets that it refused, or that were no IP packets
	Calls   uint64 // sendmmsg calls
	ByErrno map[syscall.Errno]uint64
}

// Open makes the raw sockets in the network namespace of the calling thread.
// It needs CAP_NET_RAW, and CAP_NET_ADMIN for the mark. A kernel without IPv6
// is tolerated; IPv6 packets are then refused with EAFNOSUPPORT.
func Open(cfg Config) (*Injector, error) {
	i := &Injector{fds: [kinds]int{-1, -1, -1, -1}}
	for kind := range i.fds {
		mark := cfg.Mark
		if kind == tracked4 || kind == tracked6 {
			mark = cfg.TrackedMark
		}
		v6 := kind == plain6 || kind == tracked6
		fd, err := openRaw(v6, mark)
		if v6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT)) {
			continue
		}
		if err != nil {
			_ = i.Close()
			return nil, fmt.Errorf("inject: %w", err)
		}
		i.fds[kind] = fd
	}
	for n := range i.hdrs {
		h := &i.hdrs[n].hdr
		h.Iov = &i.iovs[n]
		h.SetIovlen(1)
		i.addr4[n].Family = unix.AF_INET
		i.addr6[n].Family = unix.AF_INET6
	}
	return i, nil
}

func openRaw(v6 bool, mark uint32) (int, error) {
	family, level, opt, name := unix.AF_INET, unix.IPPROTO_IP, unix.IP_HDRINCL, "IPv4"
	if v6 {
		family, level, opt, name = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, "IPv6"
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		if err == unix.EPERM {
			return -1, fmt.Errorf("open a raw %s socket: %w; CAP_NET_RAW in this network namespace is needed", name, err)
		}
		return -1, fmt.Errorf("open a raw %s socket: %w", name, err)
	}
	fail := func(what string, err error) (int, error) {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("raw %s socket: %s: %w", name, what, err)
	}
	if err := unix.SetsockoptInt(fd, level, opt, 1); err != nil {
		return fail("include headers", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(int32(mark))); err != nil {
		return fail("set the mark (CAP_NET_ADMIN is needed)", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuf) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuf); err != nil {
			return fail("set the send buffer", err)
		}
	}
	return fd, nil
}

// Add gathers a whole IPv4 or IPv6 packet for the next Flush, with TrackedMark
// if tracked is true, else with Mark. The destination is read from its header.
// pkt must stay valid until Flush. A packet that is too short, or of a family
// that is not there, is counted as failed and reported by Flush.
func (i *Injector) Add(pkt []byte, tracked bool) {
	kind := uint8(plain4)
	errno := unix.Errno(0)
	switch {
	case len(pkt) >= ipv4Min && pkt[0]>>4 == 4:
	case len(pkt) >= ipv6Min && pkt[0]>>4 == 6:
		kind = plain6
	default:
		errno = unix.EINVAL
	}
	if errno == 0 && i.fds[kind] < 0 {
		errno = unix.EAFNOSUPPORT
	}
	if errno != 0 {
		i.fail(errno)
		return
	}
	if tracked {
		kind++
	}
	i.list = append(i.list, entry{pkt, kind})
}

// Flush sends the gathered packets in order. A packet that the kernel refuses
// is counted by its error and skipped; the rest still goes. sent is the number
// that it took. err is nil if all went, else it wraps the first error, a
// syscall.Errno, and says how many failed; net.ErrClosed after Close. When a
// socket's send buffer is full Flush waits 10 ms at most for room, then lets
// the packets fail with EAGAIN.
func (i *Injector) Flush() (sent int, err error) {
	i.waited = false
	list := i.list
	for len(list) > 0 {
		n := 1
		for n < len(list) && n < batch && list[n].kind == list[0].kind {
			n++
		}
		sent += i.sendRun(list[:n])
		list = list[n:]
	}
	clear(i.list) // let go of the packets
	if cap(i.list) > keepCap {
		i.list = nil
	}
	i.list = i.list[:0]
	if i.failures > 0 {
		err = fmt.Errorf("inject: %d of %d packets failed, the first with: %w", i.failures, i.failures+sent, i.firstErr)
		i.failures, i.firstErr = 0, nil
	}
	return sent, err
}

// sendRun sends packets of one kind, at most batch of them.
func (i *Injector) sendRun(run []entry) (sent int) {
	kind := run[0].kind
	for n := range run {
		i.fill(n, run[n])
	}
	fd := i.fds[kind]
	for at := 0; at < len(run); {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&i.hdrs[at])),
			uintptr(len(run)-at), unix.MSG_DONTWAIT, 0, 0)
		i.calls.Add(1)
		switch {
		case errno == 0:
			// Fewer than asked: the next call starts at the one that failed
			// and returns its error.
			at += int(n)
			sent += int(n)
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && i.waitRoom(fd):
		default:
			i.fail(errno)
			at++
		}
	}
	for n := range run {
		i.iovs[n].Base = nil
	}
	i.sent.Add(uint64(sent))
	return sent
}

// fill prepares message n of a call.
func (i *Injector) fill(n int, e entry) {
	i.iovs[n].Base = &e.pkt[0]
	i.iovs[n].SetLen(len(e.pkt))
	h := &i.hdrs[n].hdr
	if e.kind == plain4 || e.kind == tracked4 {
		a := &i.addr4[n]
		copy(a.Addr[:], e.pkt[16:20]) // RFC 791 section 3.1
		h.Name = (*byte)(unsafe.Pointer(a))
		h.Namelen = unix.SizeofSockaddrInet4
		return
	}
	a := &i.addr6[n]
	copy(a.Addr[:], e.pkt[24:40]) // RFC 8200 section 3
	h.Name = (*byte)(unsafe.Pointer(a))
	h.Namelen = unix.SizeofSockaddrInet6
}

// waitRoom waits for room in the send buffer, once a Flush so that a stuck
// device cannot stop the caller, and reports whether to try again.
func (i *Injector) waitRoom(fd int) bool {
	if i.waited {
		return false
	}
	i.waited = true
	i.pollfd[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	n, err := unix.Poll(i.pollfd[:], waitMs)
	return n > 0 || err == unix.EINTR
}

func (i *Injector) fail(errno unix.Errno) {
	i.failures++
	i.failed.Add(1)
	if int(errno) < len(i.byErrno) {
		i.byErrno[errno].Add(1)
	}
	if i.firstErr == nil {
		i.firstErr = errno
		if i.closed() {
			i.firstErr = net.ErrClosed
		}
	}
}

// Stats returns the counters.
func (i *Injector) Stats() Stats {
	s := Stats{Sent: i.sent.Load(), Failed: i.failed.Load(), Calls: i.calls.Load(), ByErrno: map[syscall.Errno]uint64{}}
	for n := range i.byErrno {
		if v := i.byErrno[n].Load(); v > 0 {
			s.ByErrno[syscall.Errno(n)] = v
		}
	}
	return s
}

func (i *Injector) closed() bool { return i.fds[plain4] < 0 }

// Close closes the sockets; gathered packets that were not flushed are thrown
// away. Closing twice is harmless.
func (i *Injector) Close() error {
	var err error
	for kind, fd := range i.fds {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
			i.fds[kind] = -1
		}
	}
	clear(i.list)
	i.list = i.list[:0]
	return err
}
