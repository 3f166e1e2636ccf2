package clients

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// Pipeline is a Redis client that never waits for a reply before it sends the
// next command: up to Depth commands are on their way at any time. Each write ends in
// the middle of a command, so that the stream never rests between two of them. It
// knows the exact bytes of each reply. Its commands are, in turn, SET of a new
// value of Size bytes, GET of it, and INCR, so that one that is lost or executed
// twice shows in a later reply. The values hold what looks like commands.
type Pipeline struct {
	ID, Depth, Size int

	conn    *net.TCPConn
	replies atomic.Int64
}

// DialPipeline connects client id to the server at addr.
func DialPipeline(d Dialer, addr string, id, depth, size int) (*Pipeline, error) {
	c, err := dial(d, addr, Strictest)
	if err != nil {
		return nil, fmt.Errorf("client %d: %w", id, err)
	}
	return &Pipeline{ID: id, Depth: depth, Size: size, conn: c}, nil
}

// Close closes the connection.
func (p *Pipeline) Close() error { return p.conn.Close() }

// LocalAddr is the socket's address.
func (p *Pipeline) LocalAddr() net.Addr { return p.conn.LocalAddr() }

// Replies is the number of replies that came so far and were right.
func (p *Pipeline) Replies() int64 { return p.replies.Load() }

// Run sends and checks until stop is closed and every command that was sent has
// its reply. It gives up when no reply comes for timeout.
func (p *Pipeline) Run(stop <-chan struct{}, timeout time.Duration) error {
	room := make(chan struct{}, p.Depth) // holds one entry for each command without a reply
	sent := make(chan int, p.Depth)
	written := make(chan error, 1)
	over := make(chan struct{}) // the replies are not read any more
	go func() {
		defer close(sent)
		var rest []byte // of the last command
		for n := 0; ; n++ {
			select {
			case <-stop:
				_, err := p.conn.Write(rest)
				written <- fault(err)
				return
			case <-over:
				written <- nil
				return
			case room <- struct{}{}:
			}
			cmd, _ := p.command(n)
			sent <- n
			half := len(cmd) / 2
			if _, err := p.conn.Write(append(rest, cmd[:half]...)); err != nil {
				written <- fault(err)
				return
			}
			rest = cmd[half:]
		}
	}()
	err := p.check(sent, room, timeout)
	close(over)
	if err != nil {
		p.conn.Close() // the writer may be waiting
		<-written
		return fmt.Errorf("client %d (%v): %w", p.ID, p.conn.LocalAddr(), err)
	}
	if err := <-written; err != nil {
		return fmt.Errorf("client %d (%v): write: %w", p.ID, p.conn.LocalAddr(), err)
	}
	return nil
}

// check reads the reply of every command that is sent.
func (p *Pipeline) check(sent <-chan int, room <-chan struct{}, timeout time.Duration) error {
	r := bufio.NewReaderSize(p.conn, 64<<10)
	buf := make([]byte, 0, p.Size+32)
	for n := range sent {
		_, want := p.command(n)
		buf = buf[:len(want)]
		for at := 0; at < len(want); {
			if err := p.conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
				return err
			}
			k, err := r.Read(buf[at:])
			if more, _ := r.Peek(min(r.Buffered(), 80)); !bytes.Equal(buf[at:at+k], want[at:at+k]) {
				return fmt.Errorf("command %d: byte %d on of the reply is wrong: %.60q and then %q, want %.60q", n, at, buf[at:at+k], more, want[at:])
			}
			if at += k; err != nil && at < len(want) {
				if err == io.EOF {
					err = ErrClosed
				}
				return fmt.Errorf("command %d: %w after %d of %d bytes of the reply", n, fault(err), at, len(want))
			}
		}
		p.replies.Add(1)
		<-room
	}
	return nil
}

// command makes command n and the reply that it must have.
func (p *Pipeline) command(n int) (cmd, want []byte) {
	switch n % 3 {
	case 0:
		return resp("SET", fmt.Sprintf("pipeline:%d", p.ID), p.value(n)), []byte("+OK\r\n")
	case 1:
		return resp("GET", fmt.Sprintf("pipeline:%d", p.ID)), bulk(p.value(n - 1))
	}
	return resp("INCR", fmt.Sprintf("pipelines:%d", p.ID)), fmt.Appendf(nil, ":%d\r\n", n/3+1)
}

// value is what command n sets: lines, of which some look like the beginning of
// a command or like a whole one.
func (p *Pipeline) value(n int) string {
	var b strings.Builder
	b.Grow(p.Size + 100)
	for i := 0; b.Len() < p.Size; i++ {
		switch fmt.Fprintf(&b, "client %d command %d line %d\r\n", p.ID, n, i); i % 5 {
		case 1:
			b.WriteString("*1\r\n$4\r\nPING\r\n")
		case 3:
			b.WriteString("*3\r\n$3\r\nSET\r\n$2\r\n")
		}
	}
	return b.String()[:p.Size]
}
