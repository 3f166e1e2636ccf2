package nfq

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestWakeAndDeadline(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	pkts := make([]Packet, 4)
	timed := func(name string, deadline time.Time, atLeast, atMost time.Duration) {
		t.Helper()
		start := time.Now()
		n, err := q.Recv(pkts, deadline)
		if took := time.Since(start); n != 0 || err != nil || took < atLeast || took > atMost {
			t.Errorf("%s: %d, %v after %v", name, n, err, took)
		}
	}
	timed("deadline in the past", time.Now().Add(-time.Second), 0, time.Second)
	timed("deadline", time.Now().Add(50*time.Millisecond), 50*time.Millisecond, 5*time.Second)
	q.Wake()
	q.Wake() // both count as one
	timed("woken before", time.Time{}, 0, 5*time.Second)
	timed("wake is used up", time.Now().Add(50*time.Millisecond), 50*time.Millisecond, 5*time.Second)
	for range 3 {
		timer := time.AfterFunc(20*time.Millisecond, q.Wake)
		timed("woken meanwhile", time.Time{}, 15*time.Millisecond, 5*time.Second)
		timer.Stop()
		// The deadline that Wake set must not end the next wait.
		timer = time.AfterFunc(40*time.Millisecond, q.Wake)
		timed("next wait", time.Time{}, 30*time.Millisecond, 5*time.Second)
		timer.Stop()
	}
	time.AfterFunc(20*time.Millisecond, func() { _ = q.Close() })
	if n, err := q.Recv(pkts, time.Time{}); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed meanwhile: %d, %v", n, err)
	}
	if _, err := q.Recv(pkts, time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed before: %v", err)
	}
	q.Accept(1)
	if err := q.Flush(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Flush after Close: %v", err)
	}
	q.Wake()
	if err := q.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// Each work item is announced with Wake; none may be left while Recv sleeps
// without a deadline.
func TestNoLostWake(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	const total = 30_000
	var announced, seen atomic.Int64
	progress := make(chan struct{}, 1)
	quit := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pkts := make([]Packet, 1)
		for seen.Load() < total {
			if _, err := q.Recv(pkts, time.Time{}); err != nil {
				return
			}
			seen.Store(announced.Load())
			select {
			case progress <- struct{}{}:
			default:
			}
		}
	}()
	go func() {
		for i := range total {
			announced.Add(1)
			q.Wake()
			// Half of the time let the receiver go to sleep first.
			for i%2 == 0 && seen.Load() < announced.Load() {
				select {
				case <-progress:
				case <-quit:
					return
				}
			}
		}
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Errorf("a wake-up was lost: %d announced, %d seen", announced.Load(), seen.Load())
	}
	close(quit)
	_ = q.Close()
	<-ended
}

// rawWriter sends datagrams without allocating.
func rawWriter(t testing.TB, c *net.UDPConn) func(msg []byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var msg []byte
	send := func(fd uintptr) bool {
		_, err := syscall.Write(int(fd), msg)
		return err != syscall.EAGAIN // else wait for room in the send buffer
	}
	return func(b []byte) {
		msg = b
		_ = raw.Write(send)
	}
}

func TestNoAllocations(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	_, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 1")
	run(t, "iptables -w -t mangle -A OUTPUT -p udp -j DROP")
	send, msg := rawWriter(t, client), make([]byte, 1001)
	pkts := make([]Packet, 64)
	round := func() {
		for range 8 {
			send(msg)
		}
		for got := 0; got < 8; {
			n, err := q.Recv(pkts, time.Now().Add(patience))
			if err != nil || n == 0 {
				t.Fatal(n, err)
			}
			for i := range pkts[:n] {
				switch p := &pkts[i]; i % 4 {
				case 0:
					q.Drop(p.ID)
				case 1:
					q.AcceptModified(p.ID, p.Payload)
				case 2:
					q.AcceptMark(p.ID, 9)
				default:
					q.Accept(p.ID)
				}
			}
			got += n
			if err := q.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		// A wait that ends with its deadline, and one that ends with Wake.
		if n, err := q.Recv(pkts, time.Now().Add(100*time.Microsecond)); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		q.Wake()
		if n, err := q.Recv(pkts, time.Time{}); n != 0 || err != nil {
			t.Fatal(n, err)
		}
	}
	round()
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations in a round of 8 packets and two waits", n)
	}
}
