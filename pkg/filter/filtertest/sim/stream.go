package sim

import (
	"bytes"
	"io"
	"math/rand/v2"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// exchange is one request and its reply.
type exchange struct {
	up, down int           // octets
	think    time.Duration // of the client before it
	work     time.Duration // of the server before the reply
	lazy     time.Duration // of the server before it reads on
}

// ending is how a connection ends.
type ending uint8

const (
	clientCloses ending = iota // the client, after the last reply
	halfCloses                 // the client shuts its side down after the last request and reads on
	serverCloses               // the server, after the last reply
	aborts                     // the client, by RST, at a time that has nothing to do with its requests
	endings
)

// plan is what one client does on one connection.
type plan struct {
	exchanges []exchange
	end       ending
	up, down  uint64   // octets in all
	ends      []uint64 // of requests, in the upward stream
	downEnds  []uint64 // of replies
	salt      byte
	mask      byte // of data
}

func (p *plan) add(x exchange) {
	p.exchanges = append(p.exchanges, x)
	p.up += uint64(x.up)
	p.down += uint64(x.down)
	p.ends = append(p.ends, p.up)
	p.downEnds = append(p.downEnds, p.down)
}

// The two streams of a connection.
const upward, downward = 0, 1

// octet is the one that belongs at offset off of a stream.
func (p *plan) octet(stream byte, off uint64) byte {
	return (byte(off) ^ byte(off>>8)*31 ^ byte(off>>16)*7 ^ (p.salt + stream)) & p.mask
}

func (p *plan) fill(b []byte, stream byte, off uint64) {
	for i := range b {
		b[i] = p.octet(stream, off+uint64(i))
	}
}

// check gives the index of the first wrong octet, -1 when there is none.
func (p *plan) check(b []byte, stream byte, off uint64) int {
	for i := range b {
		if b[i] != p.octet(stream, off+uint64(i)) {
			return i
		}
	}
	return -1
}

// randomPlan draws a plan.
func randomPlan(r *rand.Rand, o *Options, mask byte) *plan {
	p := &plan{salt: byte(r.Uint32()), mask: mask}
	size := func(most int) int { return 1 + r.IntN(1+r.IntN(1+r.IntN(most))) }
	n := 1 + r.IntN(40)
	bulk := !o.NoBulk && r.IntN(4) == 0
	if bulk {
		n = 1 + r.IntN(3)
	}
	for range n {
		x := exchange{up: size(4000), down: size(8000), think: logDuration(r, 100*time.Microsecond, 3*time.Second)}
		switch {
		case bulk && r.IntN(2) == 0:
			x.up = size(150_000)
		case bulk:
			x.down = size(150_000)
		}
		if r.IntN(4) == 0 {
			x.work = logDuration(r, 100*time.Microsecond, 300*time.Millisecond)
		}
		if r.IntN(20) == 0 {
			x.lazy = logDuration(r, time.Millisecond, time.Second)
		}
		p.add(x)
	}
	p.end = ending(r.IntN(int(endings)))
	if o.NoAborts && p.end == aborts {
		p.end = clientCloses
	}
	return p
}

// socket is one connected socket of a stack.
type socket struct {
	ep tcpip.Endpoint
	wq *waiter.Queue
}

// read takes what there is, at most most octets.
func (s *socket) read(most int) ([]byte, tcpip.Error) {
	var out bytes.Buffer
	for out.Len() < most {
		_, err := s.ep.Read(&limited{&out, most - out.Len()}, tcpip.ReadOptions{})
		if err != nil {
			if out.Len() > 0 {
				break
			}
			return nil, err
		}
	}
	return out.Bytes(), nil
}

// limited is an io.Writer that takes n octets.
type limited struct {
	w io.Writer
	n int
}

func (l *limited) Write(b []byte) (int, error) {
	short := len(b) > l.n
	if short {
		b = b[:l.n]
	}
	n, err := l.w.Write(b)
	l.n -= n
	if short {
		err = io.ErrShortWrite
	}
	return n, err
}

// write hands octets over and gives how many were taken.
func (s *socket) write(b []byte) (int, tcpip.Error) {
	n, err := s.ep.Write(bytes.NewReader(b), tcpip.WriteOptions{})
	if _, full := err.(*tcpip.ErrWouldBlock); full {
		err = nil
	}
	return int(n), err
}

// reset closes with RST.
func (s *socket) reset() {
	s.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	s.ep.Close()
}

func (s *socket) state() tcp.EndpointState { return s.ep.(*tcp.Endpoint).EndpointState() }

func wouldBlock(err tcpip.Error) bool {
	_, ok := err.(*tcpip.ErrWouldBlock)
	return ok
}

func ended(err tcpip.Error) bool {
	_, ok := err.(*tcpip.ErrClosedForReceive)
	return ok
}
