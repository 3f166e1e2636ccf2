package clients

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// Redis is a client that speaks RESP over a connection of its own and knows
// the exact bytes of each reply. Its commands are numbered: the n-th is one of
// INCR, SET, GET, ECHO, in turn, on keys that carry the client's number, so
// that a command that is lost, or executed twice, shows in a later reply.
// A Redis is used by one goroutine at a time.
type Redis struct {
	ID        int
	KeepAlive KeepAlive
	// Piece, when not 0, is the size in bytes of the pieces in which a command
	// is written, each in a segment of its own (TCP_NODELAY is set).
	Piece int

	conn   *net.TCPConn
	n      int    // commands sent
	count  int    // INCRs sent
	value  string // last value SET
	buf    []byte // replies are read into it
	failed error
}

// DialRedis connects client id to the server at addr.
func DialRedis(d Dialer, addr string, id int, k KeepAlive) (*Redis, error) {
	c, err := dial(d, addr, k)
	if err != nil {
		return nil, fmt.Errorf("client %d: %w", id, err)
	}
	return &Redis{ID: id, KeepAlive: k, conn: c}, nil
}

// LocalAddr and RemoteAddr are the socket's addresses.
func (c *Redis) LocalAddr() net.Addr  { return c.conn.LocalAddr() }
func (c *Redis) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// Conn is the client's socket, for tests that close or reset it.
func (c *Redis) Conn() *net.TCPConn { return c.conn }

// Sent is the number of commands sent so far.
func (c *Redis) Sent() int { return c.n }

// Close closes the connection with FIN.
func (c *Redis) Close() error { return c.conn.Close() }

// Reset closes the connection with RST.
func (c *Redis) Reset() error {
	if err := c.conn.SetLinger(0); err != nil {
		return err
	}
	return c.conn.Close()
}

// next makes the next command and the reply that it must have.
func (c *Redis) next() (cmd, want []byte) {
	n := c.n
	c.n++
	switch n % 4 {
	case 0:
		c.count++
		return resp("INCR", fmt.Sprintf("counter:%d", c.ID)), fmt.Appendf(nil, ":%d\r\n", c.count)
	case 1:
		c.value = fmt.Sprintf("client %d command %d", c.ID, n)
		return resp("SET", fmt.Sprintf("value:%d", c.ID), c.value), []byte("+OK\r\n")
	case 2:
		return resp("GET", fmt.Sprintf("value:%d", c.ID)), bulk(c.value)
	default:
		s := fmt.Sprintf("echo %d of client %d", n, c.ID)
		return resp("ECHO", s), bulk(s)
	}
}

func bulk(s string) []byte { return fmt.Appendf(nil, "$%d\r\n%s\r\n", len(s), s) }

// resp encodes a command as an array of bulk strings.
func resp(args ...string) []byte {
	b := append([]byte{'*'}, strconv.Itoa(len(args))...)
	b = append(b, '\r', '\n')
	for _, a := range args {
		b = append(b, bulk(a)...)
	}
	return b
}

// Command sends the next command and checks its reply to the byte. It gives
// up after timeout. After an error the client stays failed: what follows on
// the connection could not be told apart any more.
func (c *Redis) Command(timeout time.Duration) error {
	if c.failed != nil {
		return c.failed
	}
	cmd, want := c.next()
	if err := c.exchange(cmd, want, timeout); err != nil {
		c.failed = fmt.Errorf("client %d (%v, keepalive %v), command %d %q: %w",
			c.ID, c.conn.LocalAddr(), c.KeepAlive, c.n-1, cmd, err)
	}
	return c.failed
}

func (c *Redis) exchange(cmd, want []byte, timeout time.Duration) error {
	if err := idle(c.conn); err != nil {
		return fmt.Errorf("before the command: %w", err)
	}
	if err := c.conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	piece := c.Piece
	if piece <= 0 {
		piece = len(cmd)
	}
	for rest := cmd; len(rest) > 0; rest = rest[min(piece, len(rest)):] {
		if _, err := c.conn.Write(rest[:min(piece, len(rest))]); err != nil {
			return fault(err)
		}
	}
	if cap(c.buf) < len(want) {
		c.buf = make([]byte, len(want))
	}
	got := c.buf[:len(want)]
	n, err := io.ReadFull(c.conn, got)
	if !bytes.HasPrefix(want, got[:n]) {
		return fmt.Errorf("wrong reply: got %q, want %q", got[:n], want)
	}
	if err != nil {
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() && fault(err) == err {
			return fmt.Errorf("no whole reply within %v: got %q, want %q", timeout, got[:n], want)
		}
		return fmt.Errorf("%w after %q of reply %q", fault(err), got[:n], want)
	}
	return nil
}

// Idle reports what is wrong with the connection while nothing should be
// happening on it; nil when it is established and nothing waits to be read.
func (c *Redis) Idle() error {
	if c.failed != nil {
		return c.failed
	}
	if err := idle(c.conn); err != nil {
		return fmt.Errorf("client %d (%v, keepalive %v): %w", c.ID, c.conn.LocalAddr(), c.KeepAlive, err)
	}
	return nil
}
