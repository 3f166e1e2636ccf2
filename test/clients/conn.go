package clients

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dialer opens a TCP connection to addr ("IP:port"). The connection must be a
// *net.TCPConn: keepalive settings and the socket's state are read from it.
type Dialer func(addr string) (net.Conn, error)

// KeepAlive are a socket's keepalive settings; the kernel counts in seconds
// (tcp(7), TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT). The zero value turns
// keepalives off.
type KeepAlive struct {
	Idle     time.Duration // silence before the first probe
	Interval time.Duration // between probes
	Count    int           // unanswered probes that end the connection
}

// Strictest is the keepalive setting that gives up soonest: the kernel takes
// nothing below one second.
var Strictest = KeepAlive{Idle: time.Second, Interval: time.Second, Count: 3}

// Mixed are settings as they are met in the field, the strictest first.
var Mixed = []KeepAlive{
	Strictest,
	{Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3},
	{Idle: 2 * time.Second, Interval: time.Second, Count: 9},
	{}, // no keepalive at all
}

func (k KeepAlive) String() string {
	if k == (KeepAlive{}) {
		return "off"
	}
	return fmt.Sprintf("%gs + %d x %gs", k.Idle.Seconds(), k.Count, k.Interval.Seconds())
}

// Faults that a client's socket can show.
var (
	ErrClosed   = errors.New("the server closed the connection")
	ErrReset    = errors.New("the connection was reset")
	ErrTimedOut = errors.New("the connection timed out (keepalive or user time-out)")
	ErrExtra    = errors.New("bytes arrived that nobody asked for")
)

// dial opens a connection and applies the keepalive settings.
func dial(d Dialer, addr string, k KeepAlive) (*net.TCPConn, error) {
	c, err := d(addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	tc, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("connect to %s: the dialer gave a %T, not a *net.TCPConn", addr, c)
	}
	err = tc.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable:   k != (KeepAlive{}),
		Idle:     k.Idle,
		Interval: k.Interval,
		Count:    k.Count,
	})
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("keepalive settings %v: %w", k, err)
	}
	return tc, nil
}

// fault names an error of a socket in this package's words.
func fault(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ErrClosed
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w (%v)", ErrReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("%w (%v)", ErrTimedOut, err)
	}
	return err
}

// idle reports what is wrong with a connection on which nothing should be
// happening: nil when the socket is ESTABLISHED and nothing waits to be read.
func idle(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var res error
	err = raw.Control(func(fd uintptr) {
		var settled bool
		if res, settled = idleNow(int(fd)); !settled {
			res, _ = idleNow(int(fd)) // what ended it came between the two looks
		}
	})
	if err != nil {
		return fmt.Errorf("%w: %v", ErrClosed, err)
	}
	return res
}

// idleNow looks at data and errors, then at the state; settled is false where
// the state tells of an end that the first look has not seen.
func idleNow(fd int) (res error, settled bool) {
	var b [1]byte
	n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case err == unix.EAGAIN:
	case err != nil:
		return fault(err), true
	case n == 0:
		return ErrClosed, true
	default:
		return fmt.Errorf("%w: %q", ErrExtra, b[:n]), true
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err), true
	}
	const established = 1 // TCP_ESTABLISHED, include/net/tcp_states.h
	if info.State != established {
		return fmt.Errorf("socket in state %d instead of ESTABLISHED", info.State), false
	}
	return nil, true
}
