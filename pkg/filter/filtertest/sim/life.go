package sim

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// makeClients draws the clients and the stack that they share.
func (w *world) makeClients(r *rand.Rand) {
	most := w.opt.Clients
	if most == 0 {
		most = 6
	}
	n := 1 + r.IntN(most)
	conf := hostConfig{mtu: 1280 + uint32(r.IntN(221)), sack: r.IntN(4) != 0, rcvBuf: 8<<10 + r.IntN(1<<19), sndBuf: 16<<10 + r.IntN(1<<19),
		maxRetries: 1 << 30, outOfWin: 500 * time.Millisecond, cubic: r.IntN(2) == 0}
	w.cubic = conf.cubic
	for i := range n {
		c := &client{w: w, id: i, plan: randomPlan(r, &w.opt, w.beats.mask()), r: w.rand(uint64(1000 + i))}
		v6 := r.IntN(3) == 0
		a, vip := netip.MustParseAddr(fmt.Sprintf("10.0.1.%d", 1+i)), w.vips[0]
		if v6 {
			a, vip = netip.MustParseAddr(fmt.Sprintf("fd01::%d", 1+i)), w.vips[1]
		}
		c.addr, c.vip = netip.AddrPortFrom(a, uint16(20000+r.IntN(10000))), netip.AddrPortFrom(vip, port)
		conf.addrs = append(conf.addrs, a)
		c.again = r.IntN(5) == 0
		if r.IntN(3) == 0 {
			c.mss = 536 + r.IntN(900)
		}
		if r.IntN(2) == 0 {
			c.rcvBuf = 4096 + r.IntN(1<<18)
		}
		if !w.opt.NoPlain {
			c.strip = randomStrip(r)
		}
		if !w.opt.NoKeep && r.IntN(3) != 0 {
			c.keepIdle, c.keepEvery, c.keepCount = time.Second, time.Second, 3
			if r.IntN(3) != 0 {
				c.keepIdle, c.keepEvery = logDuration(r, time.Second, time.Hour), logDuration(r, time.Second, time.Minute)
				c.keepCount = 3 + r.IntN(8)
			}
		}
		if c.keepIdle != 0 && c.keepEvery < 10*time.Second {
			w.impatient = true
		}
		at := r.Int64N(int64(time.Second))
		if !w.opt.NoLate && r.IntN(3) == 0 {
			at = int64(logDuration(r, time.Second, 20*time.Second))
		}
		w.clk.after(time.Duration(at), c.start)
		w.clients = append(w.clients, c)
		w.byAddr[c.addr] = c
	}
	conf.addrs = append(conf.addrs, w.makeDials(w.rand(11))...)
	w.rep.Clients, w.rep.Dials = n, len(w.dials)
	w.remote = newHost(&hostClock{w.clk, func() *host { return w.remote }}, r.Uint64(), conf, func(b []byte) {
		w.remoteSends(b)
	})
	w.remote.pump = func() bool {
		did := false
		for _, c := range w.clients {
			did = c.pump() || did
		}
		for _, d := range w.dials {
			did = d.pumpFar() || did
		}
		return did
	}
	w.listen()
}

// randomStrip draws the options that a middle box takes away.
func randomStrip(r *rand.Rand) []byte {
	const wscale, sackPermitted, timestamps = 3, 4, 8
	switch r.IntN(8) {
	case 0:
		return []byte{wscale, sackPermitted, timestamps}
	case 1:
		return []byte{timestamps}
	case 2:
		return []byte{sackPermitted}
	case 3:
		return []byte{wscale}
	}
	return nil
}

// remoteSends puts a packet of the remotes on the link.
func (w *world) remoteSends(b []byte) {
	s := src(b)
	const syn = 2
	if at := tcpAt(b); b[at+13]&syn != 0 {
		for _, c := range w.clients {
			if c.addr.Addr() == s && len(c.strip) > 0 {
				plain(b, c.strip...)
			}
		}
	}
	if w.opt.Capture != nil {
		w.opt.Capture.packet(w.clk.time(), b)
	}
	w.up.send(b)
}

func src(b []byte) netip.Addr {
	if b[0]>>4 == 6 {
		return netip.AddrFrom16([16]byte(b[8:24]))
	}
	return netip.AddrFrom4([4]byte(b[12:16]))
}

// newLocal makes a local stack that knows nothing of an earlier one.
func (w *world) newLocal(seed uint64) {
	if w.local != nil {
		w.local.destroy()
	}
	var h *host
	h = newHost(&hostClock{w.clk, func() *host { return h }}, seed, w.localConf, w.fromLocal)
	h.pump = w.server.pump
	w.local = h
	clear(w.shim.socks)
}

// clearOld removes the old sockets, or the old stack with all of them: the node
// was started anew, or the application has another network namespace.
func (w *world) clearOld(r *rand.Rand) {
	for _, i := range w.server.sockets() {
		i.ep.Abort()
	}
	w.local.settle()
	if r.IntN(2) == 0 {
		w.trace.note("a new local stack")
		w.localConf.rcvBuf = 16<<10 + r.IntN(1<<20)
		w.newLocal(r.Uint64())
	}
}

// holdTime draws how long the application stays away at most. Keepalives bound
// it: each costs packets. So does CUBIC of the remotes: the cube of the time since
// the last loss overflows in netstack after some weeks, and then they send
// nothing any more.
func (w *world) holdTime(r *rand.Rand) time.Duration {
	const probes, cubic = 300, 20 * 24 * time.Hour
	d := logDuration(r, time.Millisecond, 70*24*time.Hour)
	if w.cubic {
		d = min(d, max(cubic-time.Duration(w.clk.time()), time.Second))
	}
	for _, c := range w.clients {
		if c.keepIdle != 0 && !c.over() && c.sock != nil {
			d = min(d, probes*c.keepIdle)
		}
	}
	return d
}

// healthy repairs the link and lets everybody come to the end.
func (w *world) healthy() {
	w.trace.note("the link is healthy from now on")
	for _, l := range []*link{w.up, w.down} {
		l.q.loss, l.q.dup, l.q.reorder, l.q.corruption = 0, 0, 0, 0
	}
	w.calm = true
	w.calmAt = w.clk.time()
}

// calmFor is how seldom the sockets are looked at when nothing else happens.
func (w *world) calmFor() time.Duration {
	if w.calm {
		return time.Minute
	}
	return 0
}

// play runs the simulation to its end.
func (w *world) play() {
	w.engine = filter.New(filter.Config{Seed: w.seed << 8})
	w.server.start()
	w.server.dials = true
	w.agent.run(w.agent.script)
	w.plagues()
	const stall, linger = int64(5 * time.Minute), int64(6 * time.Minute)
	limit := int64(1000 * 24 * time.Hour)
	for w.err == nil && !w.calm {
		if !w.clk.step(limit) {
			w.fail("the run does not come to an end")
		}
	}
	if !w.allComplete() {
		w.complete(stall)
	}
	if w.err != nil {
		return
	}
	limit = w.clk.time() + linger
	for w.err == nil && w.clk.step(limit) {
	}
	if w.err == nil {
		w.atEnd()
	}
}

// complete lets the streams come to their end over the healthy link. Something
// has to move within stall; an hour is the limit in all: netstack backs its
// retransmissions off to two minutes, and after a time-out it repeats two
// segments before the next one.
func (w *world) complete(stall int64) {
	moved, at := w.moved(), w.clk.time()
	end := at + int64(time.Hour)
	for w.err == nil && !w.allComplete() {
		if !w.clk.step(min(at+stall, end)) {
			w.atEnd()
			w.fail("stalled")
			return
		}
		if m := w.moved(); m != moved {
			moved, at = m, w.clk.time()
		}
	}
}

// moved is a measure of what has come about.
func (w *world) moved() uint64 {
	n := uint64(0)
	for _, d := range w.dials {
		n += d.sent + d.got + d.farGot
	}
	for _, c := range w.clients {
		n += c.sent + c.got + uint64(c.beatsGot)
		if c.closed || c.failed {
			n++
		}
		if c.s != nil {
			n += c.s.got + c.s.sent
		}
	}
	return n
}

func (w *world) allComplete() bool {
	for _, d := range w.dials {
		if !d.complete() {
			return false
		}
	}
	for _, c := range w.clients {
		if !c.complete() {
			return false
		}
	}
	return true
}
