package nfq

import (
	"errors"
	"net"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bufLen holds the largest message: MaxPayload bytes and under 300 bytes of
// other attributes. The odd 64 bytes keep the heads of neighbouring buffers
// from sharing cache sets.
const bufLen = 66<<10 + 64

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [unsafe.Sizeof(uintptr(0)) - 4]byte
}

// recvState holds the receive buffers and the place in them up to which
// messages have been handed out. The kernel writes through the pointers in
// iovs and hdrs; these are typed, so they keep what they point to alive.
type recvState struct {
	mem  []byte
	iovs []unix.Iovec
	hdrs []mmsghdr

	have int    // datagrams in the buffers
	cur  int    // datagram to take next
	rest []byte // what is left of the datagram before cur

	// Arguments and results of the system call, which runs in closures that
	// are made once so that waiting does not allocate.
	want  int
	got   int
	errno unix.Errno
	try   func(fd uintptr)
	wait  func(fd uintptr) bool
}

func (r *recvState) init(batch int) {
	r.mem = make([]byte, batch*bufLen)
	r.iovs = make([]unix.Iovec, batch)
	r.hdrs = make([]mmsghdr, batch)
	for i := range r.hdrs {
		r.iovs[i].Base = &r.mem[i*bufLen]
		r.iovs[i].SetLen(bufLen)
		r.hdrs[i].hdr.Iov = &r.iovs[i]
		r.hdrs[i].hdr.SetIovlen(1)
	}
	r.try = r.recvmmsg
	r.wait = func(fd uintptr) bool {
		r.recvmmsg(fd)
		return r.errno != unix.EAGAIN
	}
}

// recvmmsg takes what is there, up to r.want datagrams, and does not wait.
func (r *recvState) recvmmsg(fd uintptr) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.hdrs[0])),
			uintptr(r.want), unix.MSG_DONTWAIT, 0, 0)
		r.got, r.errno = int(n), errno
		if errno == 0 {
			return
		}
		r.got = 0
		if errno != unix.EINTR {
			return
		}
	}
}

// next returns the next message that has not been handed out.
func (r *recvState) next() (m message, ok bool, err error) {
	for len(r.rest) == 0 {
		if r.cur >= r.have {
			return message{}, false, nil
		}
		start := r.cur * bufLen
		r.rest = r.mem[start : start+int(r.hdrs[r.cur].len)]
		r.cur++
	}
	m, r.rest, err = nextMessage(r.rest)
	if err != nil {
		r.rest = nil
	}
	return m, true, err
}

// findAnswer looks for the kernel's answer to the request seq and leaves the
// place in the buffers as it is.
func (r *recvState) findAnswer(seq uint32) (errno unix.Errno, found bool) {
	at := *r
	defer func() { r.cur, r.rest = at.cur, at.rest }()
	for {
		m, ok, err := r.next()
		if !ok {
			return 0, false
		}
		if err != nil || m.typ != unix.NLMSG_ERROR || m.seq != seq {
			continue
		}
		if errno, err = parseError(m.body); err == nil {
			return errno, true
		}
	}
}

// Recv waits for packets and fills pkts with at most len(pkts) or Config.Batch
// of them. It returns 0 and no error when the deadline has passed or Wake was
// called; the zero time means no deadline. Packets that wait already are
// returned even when the deadline lies in the past. Verdicts that were not
// flushed are flushed first, because their payloads may lie in the buffers
// that Recv fills. Overruns are counted in Stats and are no error. After Close
// the error is net.ErrClosed.
func (q *Queue) Recv(pkts []Packet, deadline time.Time) (int, error) {
	if len(pkts) == 0 {
		return 0, errors.New("nfq: Recv needs room for at least one packet")
	}
	for {
		if err := q.Flush(); err != nil {
			return 0, err
		}
		if q.takeWake() {
			return 0, nil
		}
		if n := q.collect(pkts); n > 0 {
			q.ctr.received.Add(uint64(n))
			return n, nil
		}
		if err := q.Flush(); err != nil { // packets dropped by collect
			return 0, err
		}
		if err := q.fill(min(len(pkts), q.cfg.Batch), deadline); err != nil {
			return 0, err
		}
		if q.recv.have == 0 {
			q.takeWake()
			return 0, nil
		}
	}
}

// Wake makes the current or the next Recv return at once. It may be called
// from any goroutine; calls before that return count as one.
func (q *Queue) Wake() {
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	q.woken.Store(true)
	if q.waiting {
		_ = q.conn.SetReadDeadline(time.Unix(1, 0)) // fails only when closed
	}
}

func (q *Queue) takeWake() bool { return q.woken.Load() && q.woken.Swap(false) }

// collect hands out messages that are in the buffers.
func (q *Queue) collect(pkts []Packet) int {
	n := 0
	for n < len(pkts) {
		m, ok, err := q.recv.next()
		if !ok {
			break
		}
		switch {
		case err != nil:
			q.ctr.parseErrors.Add(1)
		case m.typ == msgPacket:
			p := &pkts[n]
			hasID, err := parsePacket(m.body, p)
			if err != nil {
				q.ctr.parseErrors.Add(1)
				if hasID { // or it would wait in the kernel for ever
					q.Drop(p.ID)
				}
				continue
			}
			if p.Truncated() {
				q.ctr.truncated.Add(1)
			}
			n++
		case m.typ == unix.NLMSG_ERROR:
			q.noteError(m.body)
		}
	}
	return n
}

// noteError counts a refused verdict. Acknowledgements carry 0.
func (q *Queue) noteError(body []byte) {
	errno, err := parseError(body)
	switch {
	case err != nil:
		q.ctr.parseErrors.Add(1)
	case errno != 0:
		q.ctr.verdictErrors.Add(1)
		q.ctr.lastVerdictErrno.Store(uint32(errno))
	}
}

// dropAll drops the packets in the buffers.
func (q *Queue) dropAll() error {
	pkts := make([]Packet, q.cfg.Batch)
	for n := q.collect(pkts); n > 0; n = q.collect(pkts) {
		for i := range pkts[:n] {
			q.Drop(pkts[i].ID)
		}
	}
	return q.Flush()
}

// fill receives up to want datagrams into the buffers, or none when the
// deadline passes or Wake is called first.
func (q *Queue) fill(want int, deadline time.Time) error {
	r := &q.recv
	r.have, r.cur, r.rest = 0, 0, nil
	r.want = want
	for {
		// The first try skips the deadline, whose timer costs more than the
		// system call when packets are there already.
		if err := q.raw.Control(r.try); err != nil {
			return q.ioError("receive", err)
		}
		if r.errno == unix.EAGAIN {
			timedOut, err := q.await(deadline)
			if timedOut || err != nil {
				return err
			}
		}
		switch r.errno {
		case 0:
			r.have = r.got
			q.ctr.batches.Add(1)
			return nil
		case unix.ENOBUFS, unix.EAGAIN: // an overrun shows in the socket's drop count
			continue
		}
		return q.ioError("receive", r.errno)
	}
}

// await waits until recvmmsg has brought something or failed.
func (q *Queue) await(deadline time.Time) (timedOut bool, err error) {
	q.wakeMu.Lock()
	// A Wake until here is seen in the flag; one from here on finds waiting
	// set and moves the deadline that is set now. None falls between.
	if q.woken.Load() {
		q.wakeMu.Unlock()
		return true, nil
	}
	if q.armed || !deadline.IsZero() {
		if err := q.conn.SetReadDeadline(deadline); err != nil {
			q.wakeMu.Unlock()
			return false, q.ioError("set the deadline", err)
		}
	}
	q.armed = !deadline.IsZero()
	q.waiting = true
	q.wakeMu.Unlock()

	err = q.raw.Read(q.recv.wait)

	q.wakeMu.Lock()
	q.waiting = false
	// Wake may have put its own deadline in place.
	q.armed = q.armed || q.woken.Load()
	q.wakeMu.Unlock()
	switch {
	case err == nil:
		return false, nil
	case q.closed.Load():
		return false, net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return true, nil
	}
	return false, q.ioError("receive", err)
}

// socketDrops reads how many messages the kernel could not put into the
// receive buffer: element SK_MEMINFO_DROPS of SO_MEMINFO. With
// NETLINK_NO_ENOBUFS no error reports them.
func (q *Queue) socketDrops() (uint32, error) {
	var info [unix.SK_MEMINFO_VARS]uint32
	size := uint32(unsafe.Sizeof(info))
	var errno unix.Errno
	err := q.raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info[0])), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil {
		return 0, err
	}
	if errno != 0 {
		return 0, errno
	}
	return info[unix.SK_MEMINFO_DROPS], nil
}
