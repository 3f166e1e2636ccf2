package clients

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// What a reply can be instead of right.
var (
	ErrRefused = errors.New("refused")
	ErrWrong   = errors.New("wrong reply")
)

// Interp is a client of test/interp, whose requests are described there. One
// goroutine may send while another one reads.
type Interp struct {
	// Timeout is how long each reply may take; none when zero.
	Timeout time.Duration

	conn *net.TCPConn
	r    *bufio.Reader
}

// DialInterp connects to the interpreter at addr.
func DialInterp(d Dialer, addr string, k KeepAlive) (*Interp, error) {
	c, err := dial(d, addr, k)
	if err != nil {
		return nil, err
	}
	return &Interp{Timeout: 20 * time.Second, conn: c, r: bufio.NewReader(c)}, nil
}

// Close closes the connection.
func (c *Interp) Close() error { return c.conn.Close() }

// CloseWrite ends the stream of requests; replies can still be read.
func (c *Interp) CloseWrite() error { return c.conn.CloseWrite() }

// LocalAddr is the socket's address, which is the session's first name.
func (c *Interp) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// Conn is the socket.
func (c *Interp) Conn() *net.TCPConn { return c.conn }

// Idle reports what is wrong with a connection on which nothing should be happening.
func (c *Interp) Idle() error {
	if n := c.r.Buffered(); n > 0 {
		b, _ := c.r.Peek(n)
		return fmt.Errorf("%w: %q", ErrExtra, b)
	}
	return idle(c.conn)
}

// Do sends one request and returns its reply. One that is refused is
// ErrRefused, with the reply.
func (c *Interp) Do(request string) (string, error) {
	if err := c.Send(request); err != nil {
		return "", err
	}
	reply, err := c.Reply()
	if err != nil {
		return reply, fmt.Errorf("%.60s: %w", request, err)
	}
	return reply, nil
}

// Expect is Do for a request that has only one right reply.
func (c *Interp) Expect(request, want string) error {
	got, err := c.Do(request)
	if err == nil && got != want {
		err = fmt.Errorf("%.60s: %w %.100q, want %.100q", request, ErrWrong, got, want)
	}
	return err
}

// Send sends a request whose reply is read later, or what belongs to one.
func (c *Interp) Send(request string) error { return c.Write([]byte(request + "\n")) }

// Write sends octets.
func (c *Interp) Write(b []byte) error {
	if err := c.conn.SetWriteDeadline(c.deadline()); err != nil {
		return err
	}
	_, err := c.conn.Write(b)
	return fault(err)
}

// Reply reads the next reply.
func (c *Interp) Reply() (string, error) {
	if err := c.conn.SetReadDeadline(c.deadline()); err != nil {
		return "", err
	}
	line, err := c.r.ReadString('\n')
	if err != nil {
		return line, fault(err)
	}
	line = strings.TrimSuffix(line, "\n")
	if why, ok := strings.CutPrefix(line, "! "); ok {
		return line, fmt.Errorf("%w: %s", ErrRefused, why)
	}
	return line, nil
}

// deadline is for what begins now.
func (c *Interp) deadline() time.Time {
	if c.Timeout == 0 {
		return time.Time{}
	}
	return time.Now().Add(c.Timeout)
}

// Ended waits until the server has ended its stream, and says what comes instead.
func (c *Interp) Ended() error {
	if err := c.conn.SetReadDeadline(c.deadline()); err != nil {
		return err
	}
	b, err := c.r.ReadByte()
	switch {
	case err == io.EOF:
		return nil
	case err != nil:
		return fault(err)
	}
	c.r.UnreadByte()
	more, _ := c.r.Peek(c.r.Buffered())
	return fmt.Errorf("%w: %.60q (%q first)", ErrExtra, more, b)
}

// Blob sends b, and checks its hash and that the session has had so many octets
// with it.
func (c *Interp) Blob(b []byte, total uint64) error {
	if err := c.Send(fmt.Sprintf("blob %d", len(b))); err != nil {
		return err
	}
	if err := c.Write(b); err != nil {
		return err
	}
	got, err := c.Reply()
	if want := fmt.Sprintf("%x %d", sha256.Sum256(b), total); err == nil && got != want {
		err = fmt.Errorf("%w %.100q, want %q", ErrWrong, got, want)
	}
	if err != nil {
		return fmt.Errorf("blob of %d octets: %w", len(b), err)
	}
	return nil
}

// Gen asks for n octets and checks each. The time-out is for every piece of them.
func (c *Interp) Gen(n int, seed uint64) error {
	if err := c.Expect(fmt.Sprintf("gen %d %d", n, seed), fmt.Sprint(n)); err != nil {
		return err
	}
	if err := c.Stream(n, seed); err != nil {
		return fmt.Errorf("gen %d %d: %w", n, seed, err)
	}
	return nil
}

// Stream reads and checks the octets that follow the reply to gen, all of them
// also when some are wrong.
func (c *Interp) Stream(n int, seed uint64) (wrong error) {
	buf := make([]byte, min(n, 64<<10))
	for pos := 0; pos < n; {
		if err := c.conn.SetReadDeadline(c.deadline()); err != nil {
			return err
		}
		k, err := c.r.Read(buf[:min(len(buf), n-pos)])
		if good := Match(buf[:k], seed, uint64(pos)); good != k && wrong == nil {
			wrong = fmt.Errorf("%w at octet %d of %d", ErrWrong, pos+good, n)
		}
		if pos += k; err != nil && pos < n {
			return fmt.Errorf("%w after %d of %d octets", fault(err), pos, n)
		}
	}
	return wrong
}

// Identity is what pid says: the same for as long as the process lives, also
// when it was taken away and brought back.
func (c *Interp) Identity() (string, error) { return c.Do("pid") }

// Half has the server shut down its sending side, and waits for that. It returns
// the session's name.
func (c *Interp) Half() (name string, err error) {
	reply, err := c.Do("half")
	if err != nil {
		return "", err
	}
	name, ok := strings.CutPrefix(reply, "half ")
	if !ok {
		return "", fmt.Errorf("half: %w %.100q", ErrWrong, reply)
	}
	return name, c.Ended()
}

// Halved asks, in another session, for what a half-closed one has received: this
// and nothing more. While state is "open" it waits until as much has come, otherwise,
// for "ended" or "failed", until the end.
func (c *Interp) Halved(name string, sent []byte, state string) error {
	until := "end"
	if state == "open" {
		until = strconv.Itoa(len(sent))
	}
	return c.Expect("halved "+name+" "+until, fmt.Sprintf("%d %x %s", len(sent), sha256.Sum256(sent), state))
}
