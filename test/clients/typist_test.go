package clients

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// reader is a server that knows what typist 7 says, and answers it; f may say
// something else, and returns false where it has.
func reader(t *testing.T, f func(n int, c *net.TCPConn, q typed) bool) string {
	return server(t, func(c *net.TCPConn) {
		r, model := bufio.NewReader(c), newTypist(nil, 7)
		for n := 0; ; n++ {
			q := model.next()
			got := make([]byte, len(q.request))
			if _, err := io.ReadFull(r, got); err != nil {
				return
			}
			if !bytes.Equal(got, q.request) {
				t.Errorf("request %d is %.60q, want %.60q", n, got, q.request)
			}
			if f(n, c, q) {
				c.Write(rightly(q))
			}
		}
	})
}

// rightly is the whole reply to q.
func rightly(q typed) []byte {
	b := make([]byte, q.stream)
	Fill(b, q.seed, 0)
	return append([]byte(q.line+"\n"), b...)
}

func oneTypist(t *testing.T, addr string, timeout time.Duration) Typists {
	t.Helper()
	all, err := OpenTypists(direct, addr, 7, 1)
	if err != nil {
		t.Fatal(err)
	}
	all[0].Timeout = timeout
	t.Cleanup(all.Close)
	return all
}

// TestTypistFaults shows each fault of a server to a typist, once.
func TestTypistFaults(t *testing.T) {
	const bad = 29 // a gen
	for _, tc := range []struct {
		name  string
		act   func(c *net.TCPConn, q typed)
		is    error
		wrong int
		on    bool // the typist goes on
	}{
		{"line", func(c *net.TCPConn, q typed) { c.Write(append([]byte("1"), rightly(q)...)) }, ErrWrong, 1, true},
		{"refused", func(c *net.TCPConn, q typed) { c.Write([]byte("! no\n")) }, ErrWrong, 1, true},
		{"octet", func(c *net.TCPConn, q typed) { b := rightly(q); b[len(b)-1]++; c.Write(b) }, ErrWrong, 1, true},
		{"nothing", func(c *net.TCPConn, q typed) {}, nil, 0, false},
		{"lost octet", func(c *net.TCPConn, q typed) { b := rightly(q); c.Write(b[:len(b)-1]) }, nil, 0, false},
		{"close", func(c *net.TCPConn, q typed) { c.Close() }, ErrClosed, 0, false},
		{"reset", func(c *net.TCPConn, q typed) { c.SetLinger(0); c.Close() }, ErrReset, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			addr := reader(t, func(n int, c *net.TCPConn, q typed) bool {
				if n == bad {
					if q.stream == 0 {
						t.Errorf("request %d is %q", n, q.request)
					}
					// What follows a wrong line is not read as the octets.
					if tc.name == "line" {
						q.stream = 0
					}
					tc.act(c, q)
					return false
				}
				return true
			})
			begin := time.Now()
			w := oneTypist(t, addr, 300*time.Millisecond).Type(time.Millisecond, 1)
			select {
			case <-w.Failed():
			case <-time.After(10 * time.Second):
				t.Fatalf("not noticed: %+v", w.Stop())
			}
			if tc.on {
				waitUntil(t, func() bool { return w.Report().Right >= bad+10 })
			}
			r := w.Stop()
			if len(r.Errors) != 1 || r.Wrong != tc.wrong || !tc.on && r.Right != bad || r.Each[0] != r.Right {
				t.Errorf("%+v", r)
			}
			if e := r.Errors[0]; e.ID != 7 || e.At.Before(begin) || e.At.After(time.Now()) || tc.is != nil && !errors.Is(e, tc.is) {
				t.Errorf("error %+v, want %v", e, tc.is)
			}
			if err := r.Err(); err == nil || !strings.Contains(err.Error(), "gen ") {
				t.Errorf("error %v does not name the request", err)
			}
		})
	}
}

// waitUntil polls cond.
func waitUntil(t *testing.T, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come")
		}
	}
}

// TestTypistRepeated: a request that is executed twice shows.
func TestTypistRepeated(t *testing.T) {
	addr := reader(t, func(n int, c *net.TCPConn, q typed) bool {
		if n == 4 {
			c.Write(rightly(q))
		}
		return true
	})
	all := oneTypist(t, addr, 5*time.Second)
	var err error
	for n := 0; n < 20 && err == nil; n++ {
		err = all[0].Type()
	}
	if !errors.Is(err, ErrWrong) {
		t.Errorf("%v", err)
	}
}

// TestTypistAhead: requests go on while replies are held, as many as may be, and
// the wait for them is what Slowest tells.
func TestTypistAhead(t *testing.T) {
	const ahead, hold = 3, 50 * time.Millisecond
	read, answer := make(chan int, 100), make(chan struct{})
	addr := reader(t, func(n int, c *net.TCPConn, q typed) bool {
		if n >= ahead {
			return true
		}
		read <- n
		if n == ahead-1 {
			<-answer
			model := newTypist(nil, 7)
			for range ahead {
				c.Write(rightly(model.next()))
			}
		}
		return false
	})
	w := oneTypist(t, addr, 5*time.Second).Type(time.Millisecond, ahead)
	for range ahead {
		<-read
	}
	time.Sleep(hold) // the time that is measured
	if r := w.Report(); r.Sent != ahead || r.Right != 0 {
		t.Errorf("no reply yet: %+v", r)
	}
	close(answer)
	waitUntil(t, func() bool { return w.Report().Right > 2*ahead })
	r := w.Fresh()
	if r.Slowest < hold || time.Since(r.SlowestAt) < hold {
		t.Errorf("slowest %v at %v", r.Slowest, r.SlowestAt)
	}
	waitUntil(t, func() bool { return w.Report().Right > r.Right })
	if again := w.Report(); again.Slowest <= 0 || !again.SlowestAt.After(r.SlowestAt) {
		t.Errorf("looked for anew: slowest %v at %v", again.Slowest, again.SlowestAt)
	}
	if r = w.Stop(); r.Sent != r.Right || r.Err() != nil {
		t.Errorf("%+v", r)
	}
}

// TestInterpFaults: each check of the client sees what is not right.
func TestInterpFaults(t *testing.T) {
	for _, tc := range []struct {
		name, reply string
		do          func(c *Interp) error
		want        error
	}{
		{"right", "5\n", func(c *Interp) error { return c.Expect("print 5", "5") }, nil},
		{"wrong", "6\n", func(c *Interp) error { return c.Expect("print 5", "5") }, ErrWrong},
		{"refused", "! no\n", func(c *Interp) error { _, err := c.Do("print 5"); return err }, ErrRefused},
		{"cut", "5", func(c *Interp) error { _, err := c.Do("print 5"); return err }, ErrClosed},
		{"extra", "5\n6", func(c *Interp) error { return errors.Join(c.Expect("print 5", "5"), c.Ended()) }, ErrExtra},
		{"ended", "5\n", func(c *Interp) error { return errors.Join(c.Expect("print 5", "5"), c.Ended()) }, nil},
		{"half", "bye s\n", func(c *Interp) error { _, err := c.Half(); return err }, ErrWrong},
		{"half on", "half s\nmore", func(c *Interp) error { _, err := c.Half(); return err }, ErrExtra},
		{"blob", "00 1\n", func(c *Interp) error { return c.Blob([]byte("x"), 1) }, ErrWrong},
		{"halved", "3 00 ended\n", func(c *Interp) error { return c.Halved("s", []byte("abc"), "ended") }, ErrWrong},
		{"gen size", "4\nabcd", func(c *Interp) error { return c.Gen(5, 1) }, ErrWrong},
		{"gen octet", "5\nabcde", func(c *Interp) error { return c.Gen(5, 1) }, ErrWrong},
		{"gen short", "2\n" + string(rightly(typed{stream: 1, seed: 1})[1:]), func(c *Interp) error { return c.Gen(2, 1) }, ErrClosed},
		{"gen", string(rightly(typed{line: "9", stream: 9, seed: 1})), func(c *Interp) error { return c.Gen(9, 1) }, nil},
		{"idle", "5\n6", func(c *Interp) error { return errors.Join(c.Expect("print 5", "5"), c.Idle()) }, ErrExtra},
	} {
		t.Run(tc.name, func(t *testing.T) {
			addr := server(t, func(c *net.TCPConn) {
				bufio.NewReader(c).ReadString('\n')
				fmt.Fprint(c, tc.reply)
				c.CloseWrite()
				io.Copy(io.Discard, c)
			})
			c, err := DialInterp(direct, addr, Strictest)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := tc.do(c); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}
