package clients

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func direct(addr string) (net.Conn, error) { return net.Dial("tcp", addr) }

// server accepts one connection on loopback and hands it to f.
func server(t *testing.T, f func(c *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		f(c.(*net.TCPConn))
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

// skipCommand reads one command of the client.
func skipCommand(r *bufio.Reader) {
	line, _ := r.ReadString('\n')
	for n := 2 * int(line[1]-'0'); n > 0; n-- {
		r.ReadString('\n')
	}
}

// TestRedisFaults shows each fault of a server to the client.
func TestRedisFaults(t *testing.T) {
	for _, tc := range []struct {
		name string
		act  func(c *net.TCPConn)
		want string
		is   error
	}{
		{"right", func(c *net.TCPConn) { c.Write([]byte(":1\r\n")) }, "", nil},
		{"repeated command", func(c *net.TCPConn) { c.Write([]byte(":2\r\n")) }, "wrong reply", nil},
		{"lost byte", func(c *net.TCPConn) { c.Write([]byte("1\r\n")) }, "wrong reply", nil},
		{"half a reply", func(c *net.TCPConn) { c.Write([]byte(":1")) }, "no whole reply", nil},
		{"close", func(c *net.TCPConn) { c.Close() }, "closed", ErrClosed},
		{"half and close", func(c *net.TCPConn) { c.Write([]byte(":1")); c.Close() }, "closed", ErrClosed},
		{"reset", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, "reset", ErrReset},
	} {
		t.Run(tc.name, func(t *testing.T) {
			end := make(chan struct{})
			addr := server(t, func(c *net.TCPConn) {
				skipCommand(bufio.NewReader(c))
				tc.act(c)
				<-end
			})
			defer close(end)
			c, err := DialRedis(direct, addr, 7, Strictest)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			err = c.Command(300 * time.Millisecond)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("Command: %v, want %q", err, tc.want)
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Fatalf("Command: %v is not %v", err, tc.is)
			}
			if tc.want == "" {
				if err := c.Idle(); err != nil {
					t.Fatalf("Idle: %v", err)
				}
			} else if c.Command(time.Second) != err {
				t.Error("a failed client went on")
			}
		})
	}
}

// TestRedisIdle: bytes, a close and a reset that nobody asked for show.
func TestRedisIdle(t *testing.T) {
	for _, tc := range []struct {
		name string
		act  func(c *net.TCPConn)
		want error
	}{
		{"extra", func(c *net.TCPConn) { c.Write([]byte("x")) }, ErrExtra},
		{"close", func(c *net.TCPConn) { c.CloseWrite() }, ErrClosed},
		{"reset", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, ErrReset},
	} {
		t.Run(tc.name, func(t *testing.T) {
			connected, end := make(chan struct{}), make(chan struct{})
			addr := server(t, func(c *net.TCPConn) { <-connected; tc.act(c); <-end })
			defer close(end)
			c, err := DialRedis(direct, addr, 1, KeepAlive{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			close(connected)
			deadline := time.Now().Add(2 * time.Second)
			for err = c.Idle(); err == nil && time.Now().Before(deadline); err = c.Idle() {
				time.Sleep(time.Millisecond)
			}
			if !errors.Is(err, tc.want) {
				t.Fatalf("Idle: %v, want %v", err, tc.want)
			}
		})
	}
}

// TestRedisSequence checks the expected replies against a small model server.
func TestRedisSequence(t *testing.T) {
	c := &Redis{ID: 3}
	var got []string
	for range 8 {
		_, want := c.next()
		got = append(got, string(want))
	}
	want := []string{":1\r\n", "+OK\r\n", "$20\r\nclient 3 command 1\r\n", "$18\r\necho 3 of client 3\r\n",
		":2\r\n", "+OK\r\n", "$18\r\nclient 3 command 5\r\n", "$18\r\necho 7 of client 3\r\n"}
	want[2] = "$18\r\nclient 3 command 1\r\n"
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("reply %d: %q, want %q", i, got[i], want[i])
		}
	}
	if cmd, _ := c.next(); string(cmd) != "*2\r\n$4\r\nINCR\r\n$9\r\ncounter:3\r\n" {
		t.Errorf("command: %q", cmd)
	}
}

func TestStream(t *testing.T) {
	whole := make([]byte, 4096)
	Fill(whole, 40000, 0)
	for _, cut := range []int{0, 1, 7, 8, 9, 1000} {
		part := make([]byte, 100)
		Fill(part, 40000, uint64(cut))
		if !bytes.Equal(part, whole[cut:cut+100]) {
			t.Errorf("Fill from %d differs from the whole", cut)
		}
	}
	if n := Match(whole, 40000, 0); n != len(whole) {
		t.Errorf("Match: %d", n)
	}
	for _, at := range []int{0, 1, 511, 512, 513, 4095} {
		bad := bytes.Clone(whole)
		bad[at] ^= 1
		if n := Match(bad, 40000, 0); n != at {
			t.Errorf("Match with a wrong byte at %d: %d", at, n)
		}
	}
	// A byte lost or repeated must show soon.
	if n := Match(whole[1:], 40000, 0); n > 8 {
		t.Errorf("a lost byte shows only after %d", n)
	}
	other := make([]byte, 64)
	Fill(other, 40001, 0)
	if n := Match(other, 40000, 0); n > 8 {
		t.Errorf("streams of two seeds agree in %d bytes", n)
	}
}

// TestCountFile reads in odd pieces and dies at each place where a process
// can: after the read, before the bookkeeping.
func TestCountFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts")
	const port = 50000
	var pos uint64
	for i := range 40 {
		f, err := OpenCountFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r, err := f.Claim(port)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Count(); got != pos {
			t.Fatalf("run %d: count %d, want %d", i, got, pos)
		}
		for _, size := range []int{1, 5000 + 37*i, recordBuf} {
			n, err := r.Receive(func(b []byte) (int, error) {
				b = b[:min(size, len(b))]
				Fill(b, port, pos)
				return len(b), nil
			})
			if err != nil {
				t.Fatal(err)
			}
			pos += uint64(n)
			if got := r.Count(); got != pos {
				t.Fatalf("run %d: count %d, want %d", i, got, pos)
			}
		}
		// The bytes arrive and the process is gone before Receive returns.
		func() {
			defer func() { recover() }()
			r.Receive(func(b []byte) (int, error) {
				n := min(len(b), []int{0, 1, 777, recordBuf}[i%4])
				Fill(b[:n], port, pos)
				pos += uint64(n)
				panic("killed")
			})
		}()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCountFileWrong(t *testing.T) {
	dir := t.TempDir()
	f, err := OpenCountFile(filepath.Join(dir, "counts"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := f.Claim(9)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Receive(func(b []byte) (int, error) {
		Fill(b[:10], 9, 0)
		b[4] ^= 0x10
		return 10, nil
	})
	if err == nil || r.Wrong() == 0 || r.Count() != 4 {
		t.Errorf("a wrong byte: error %v, wrong %d, count %d", err, r.Wrong(), r.Count())
	}
	for p := range uint16(recordCount - 1) {
		if _, err := f.Claim(p + 100); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Claim(5000); err == nil {
		t.Error("more records than there are")
	}
	bad := filepath.Join(dir, "short")
	if err := os.WriteFile(bad, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCountFile(bad); err == nil {
		t.Error("a damaged file was taken")
	}
}
