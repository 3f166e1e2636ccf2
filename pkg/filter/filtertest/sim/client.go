package sim

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// client is one connection of a remote and the program behind it.
type client struct {
	w    *world
	id   int
	plan *plan
	addr netip.AddrPort // its own
	vip  netip.AddrPort
	r    *rand.Rand

	mss       int
	rcvBuf    int
	keepIdle  time.Duration // 0: no keepalive
	keepEvery time.Duration
	keepCount int
	strip     []byte // options that a middle box takes out of its SYN
	again     bool   // it comes again from the same port when the server has closed

	s *session // the server's side

	sock       *socket
	connected  bool
	cur        int // exchange under way
	asked      bool
	sent, got  uint64 // octets
	allowed    uint64 // octets that may be sent
	pauseTill  int64  // it does not read before then
	shut       bool   // its side is closed
	closed     bool   // the socket is closed
	aborted    bool
	eof        bool   // it has seen the server's close
	failed     bool   // it could not connect
	beat       []byte // heartbeat that is to be written
	beatOwed   bool   // it is not answered
	beatLoud   bool   // and may wake the application
	beatsSent  int
	beatsGot   int
	askLate    bool // the last request waits for the answer to a heartbeat
	parser     parser
	unfinished bool // see openHandshakes
}

// start opens the connection.
func (c *client) start() {
	w := c.w
	wq := &waiter.Queue{}
	ep, err := w.remote.st.NewEndpoint(tcp.ProtocolNumber, netProto(c.addr.Addr()), wq)
	must(err)
	c.sock = &socket{ep, wq}
	if c.mss != 0 {
		must(ep.SetSockOptInt(tcpip.MaxSegOption, c.mss))
	}
	if c.rcvBuf != 0 {
		ep.SocketOptions().SetReceiveBufferSize(int64(c.rcvBuf), true)
	}
	if c.keepIdle != 0 {
		idle, every := tcpip.KeepaliveIdleOption(c.keepIdle), tcpip.KeepaliveIntervalOption(c.keepEvery)
		must(ep.SetSockOpt(&idle))
		must(ep.SetSockOpt(&every))
		must(ep.SetSockOptInt(tcpip.KeepaliveCountOption, c.keepCount))
		ep.SocketOptions().SetKeepAlive(true)
	}
	if err := ep.Bind(fullAddr(c.addr)); err != nil { // the connection before waits in TIME_WAIT
		c.failed = true
		ep.Close()
		return
	}
	w.trace.note("client %d connects from %v", c.id, c.addr)
	if err := ep.Connect(fullAddr(c.vip)); err != nil {
		if _, ok := err.(*tcpip.ErrConnectStarted); !ok {
			panic(err.String())
		}
	}
	if c.plan.end == aborts {
		w.clk.after(time.Duration(c.r.Int64N(int64(20*time.Second))), c.abort)
	}
	w.remote.settle()
}

func (c *client) abort() {
	if c.closed || c.w.hushed() {
		if !c.closed {
			c.w.clk.after(time.Second, c.abort)
		}
		return
	}
	c.w.trace.note("client %d aborts", c.id)
	c.aborted, c.closed = true, true
	c.sock.reset()
	c.w.remote.settle()
}

// over tells that the client's part is done.
func (c *client) over() bool { return c.closed || c.failed }

// pump lets the program do what it can; true when it did something.
func (c *client) pump() bool {
	if c.sock == nil || c.over() {
		return false
	}
	if !c.connected {
		return c.connecting()
	}
	did := c.reads()
	if c.over() {
		return did
	}
	return c.writes() || did
}

func (c *client) connecting() bool {
	switch st := c.sock.state(); st {
	case tcp.StateEstablished, tcp.StateCloseWait:
		c.connected = true
		c.w.trace.note("client %d is connected", c.id)
		if c.w.beats != nil {
			c.w.clk.after(c.w.beats.every, c.beating)
		}
		c.next()
		return true
	case tcp.StateError, tcp.StateClose:
		err := c.sock.ep.LastError()
		c.w.trace.note("client %d could not connect: %v", c.id, err)
		c.failed = true
		c.sock.ep.Close()
		if _, late := err.(*tcpip.ErrTimeout); !late {
			c.w.fail("client %d could not connect: %v", c.id, err)
		}
		return true
	}
	return false
}

// next plans the next request or the end.
func (c *client) next() {
	if c.cur == len(c.plan.exchanges) {
		if c.plan.end != aborts {
			c.finish()
		}
		return
	}
	c.asked = false
	c.w.clk.after(c.plan.exchanges[c.cur].think, c.ask)
}

func (c *client) ask() {
	if c.over() || c.asked {
		return
	}
	if c.w.hushed() {
		c.w.clk.after(100*time.Millisecond+time.Duration(c.r.Int64N(1e9)), c.ask)
		return
	}
	if c.askLate = c.beatOwed && c.cur == len(c.plan.exchanges)-1; c.askLate {
		return // the connection may end behind it
	}
	c.asked = true
	c.allowed = c.plan.ends[c.cur]
	c.w.remote.settle()
}

func (c *client) finish() {
	switch c.plan.end {
	case clientCloses:
		if c.w.hushed() {
			c.w.clk.after(time.Second, func() {
				if !c.over() {
					c.finish()
					c.w.remote.settle()
				}
			})
			return
		}
		c.w.trace.note("client %d closes", c.id)
		c.shut, c.closed = true, true
		c.sock.ep.Close()
	}
}

func (c *client) reads() bool {
	if c.pauseTill > c.w.clk.time() {
		return false
	}
	did := false
	for !c.closed {
		b, err := c.sock.read(1 << 20)
		switch {
		case ended(err):
			if c.eof {
				return did
			}
			c.eof = true
			c.seesEnd()
			return true
		case err != nil && !wouldBlock(err):
			c.closed = true
			if c.turnedDown() {
				c.failed = true
				return true
			}
			c.w.fail("client %d (%v) lost its connection: %v, with %d of %d octets sent and %d of %d received",
				c.id, c.addr, err, c.sent, c.plan.up, c.got, c.plan.down)
			return true
		case err != nil:
			return did
		}
		did = true
		if h := c.w.beats; h != nil {
			var ok bool
			if b, ok = c.parser.data(b, [][]byte{h.reply, h.send}, c.beatGot); !ok {
				c.w.fail("client %d (%v) got a broken heartbeat, or one that it did not ask for, at %d of %d", c.id, c.addr, c.got, c.plan.down)
				c.closed = true
				return true
			}
		}
		if i := c.plan.check(b, downward, c.got); i >= 0 || c.got+uint64(len(b)) > c.plan.down {
			c.w.fail("client %d (%v) got a wrong octet at %d of %d", c.id, c.addr, c.got+uint64(max(i, 0)), c.plan.down)
			c.closed = true
			return true
		}
		c.got += uint64(len(b))
		if c.r.IntN(50) == 0 {
			c.pause()
		}
		if len(b) > 0 && c.cur < len(c.plan.exchanges) && c.got == c.plan.downEnds[c.cur] {
			c.cur++
			c.next()
		}
	}
	return did
}

// turnedDown tells whether the connection may be reset as one that never came
// to be.
func (c *client) turnedDown() bool { return c.unfinished && c.s == nil }

// pause makes the program slow: its buffer fills.
func (c *client) pause() {
	d := logDuration(c.r, time.Millisecond, time.Second)
	c.pauseTill = c.w.clk.time() + int64(d)
	c.w.clk.at(c.pauseTill, c.w.remote.settle)
}

// seesEnd is called when the server has closed.
func (c *client) seesEnd() {
	w := c.w
	w.trace.note("client %d sees the end", c.id)
	if !w.server.hasClosed(c) {
		w.fail("client %d (%v) saw a close that the server did not make", c.id, c.addr)
	}
	if c.got != c.plan.down {
		w.fail("client %d (%v) saw the end after %d of %d octets", c.id, c.addr, c.got, c.plan.down)
	}
	c.closed, c.shut = true, true
	c.sock.ep.Close()
	if c.again && c.plan.end == serverCloses && c.r.IntN(4) != 0 {
		w.clk.after(logDuration(c.r, 200*time.Millisecond, 5*time.Second), c.comeAgain)
	}
}

// comeAgain opens another connection from the same address and port.
func (c *client) comeAgain() {
	w := c.w
	if w.calm || w.hushed() || !c.complete() {
		return
	}
	n := &client{w: w, id: len(w.clients), plan: randomPlan(c.r, &w.opt, w.beats.mask()), r: c.r, addr: c.addr, vip: c.vip, again: true,
		mss: c.mss, rcvBuf: c.rcvBuf, keepIdle: c.keepIdle, keepEvery: c.keepEvery, keepCount: c.keepCount, strip: c.strip}
	w.clients = append(w.clients, n)
	w.byAddr[n.addr] = n
	delete(w.check.conns, n.addr)
	w.rep.Again++
	n.start()
}

func (c *client) writes() bool {
	did := false
	for len(c.beat) > 0 {
		n, err := c.sock.write(c.beat)
		if err != nil {
			c.closed = true
			c.w.fail("client %d (%v) cannot write a heartbeat: %v", c.id, c.addr, err)
			return true
		}
		if n == 0 {
			return did
		}
		did = true
		c.beat = c.beat[n:]
	}
	for c.sent < c.allowed {
		b := make([]byte, min(c.allowed-c.sent, 16<<10))
		c.plan.fill(b, upward, c.sent)
		n, err := c.sock.write(b)
		if err != nil {
			c.closed = true
			if c.turnedDown() {
				c.failed = true
				return true
			}
			c.w.fail("client %d (%v) cannot write: %v", c.id, c.addr, err)
			return true
		}
		if n == 0 {
			break
		}
		did = true
		c.sent += uint64(n)
	}
	if c.plan.end == halfCloses && c.sent == c.plan.up && !c.shut && !c.w.hushed() {
		c.w.trace.note("client %d shuts its side down", c.id)
		c.shut = true
		c.sock.ep.Shutdown(tcpip.ShutdownWrite)
		did = true
	}
	return did
}

// speaks tells whether the client has said something that only the server can
// take: then an application that is away is to come back.
func (c *client) speaks() bool {
	if c.sock == nil || c.failed || c.aborted {
		return false
	}
	s := c.s
	if s == nil {
		return !c.closed
	}
	return c.sent > s.got || c.shut && !s.eof || c.beatLoud
}

// complete tells whether everything of the connection came to its end.
func (c *client) complete() bool {
	if c.failed || c.aborted {
		return true
	}
	s := c.s
	if s == nil || !c.closed || c.got != c.plan.down || s.got != c.plan.up {
		return false
	}
	// Octets that the filter says when the client has closed are answered with RST.
	return s.closed || s.reset && s.sent == c.plan.down && c.w.beats != nil && c.w.beats.sent
}
