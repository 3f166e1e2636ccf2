package sim

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"time"
)

// link is one direction of the network between the remotes and the node.
type link struct {
	w       *world
	r       *rand.Rand
	q       quality
	deliver func([]byte)
	last    int64 // when the newest packet that keeps its place arrives
}

// quality is how badly a link treats packets; probabilities.
type quality struct {
	delay, jitter                  time.Duration
	loss, dup, reorder, corruption float64
}

// send carries b to the other end, or loses it.
func (l *link) send(b []byte) {
	n := 1
	fragile := l.w.emptyLost[l.client(b)]
	if l.loses(b) {
		l.w.rep.Lost++
		l.w.trace.packet("lost", "", b)
		return
	}
	if l.r.Float64() < l.q.dup {
		l.w.rep.Duplicated++
		n = 2
	}
	for range n {
		at := l.w.clk.time() + int64(l.q.delay)
		if l.q.jitter > 0 {
			at += l.r.Int64N(int64(l.q.jitter) + 1)
		}
		if l.r.Float64() < l.q.reorder {
			l.w.rep.Reordered++
			at += l.r.Int64N(int64(4*l.q.delay) + int64(time.Millisecond))
		} else {
			at = max(at, l.last+1000)
			l.last = at
		}
		c := append([]byte(nil), b...)
		if l.r.Float64() < l.q.corruption && n == 1 && !fragile {
			if l.empty(b) {
				l.w.emptyLost[l.client(b)] = true
			}
			l.w.rep.Corrupted++
			c[l.r.IntN(len(c))] ^= byte(1 + l.r.IntN(255))
		}
		l.w.clk.at(at, func() { l.deliver(c) })
	}
}

// loses tells whether b is lost. Of the empty segments of one client none is
// until it has heard something again: three lost keepalives end a connection on
// any network.
func (l *link) loses(b []byte) bool {
	lost, key := l.r.Float64() < l.q.loss, l.client(b)
	if l.empty(b) {
		if lost = lost && !l.w.emptyLost[key]; lost {
			l.w.emptyLost[key] = true
		}
	}
	if !lost && l == l.w.down {
		l.w.emptyLost[key] = false // the client has heard something
	}
	return lost
}

// empty tells whether b holds no octets; an ICMP message does not either.
func (l *link) empty(b []byte) bool {
	at := tcpAt(b)
	return len(b) < at+20 || len(b) <= at+int(b[at+12]>>4)*4
}

// client is the address of the remote of b.
func (l *link) client(b []byte) netip.Addr {
	if l == l.w.down {
		return dst(b)
	}
	return src(b)
}

// randomQuality draws the quality of a link.
func randomQuality(r *rand.Rand, o *Options) quality {
	q := quality{delay: logDuration(r, 50*time.Microsecond, 40*time.Millisecond)}
	if r.IntN(3) == 0 {
		q.jitter = q.delay / 4
	}
	some := func(most float64) float64 {
		if r.IntN(2) == 0 {
			return 0
		}
		return most * r.Float64() * r.Float64()
	}
	q.loss, q.dup, q.reorder, q.corruption = some(0.1), some(0.05), some(0.1), some(0.02)
	if o.NoLoss {
		q.loss, q.corruption = 0, 0
	}
	if o.NoReorder {
		q.reorder, q.dup = 0, 0
	}
	return q
}

// logDuration draws a duration whose logarithm is spread evenly.
func logDuration(r *rand.Rand, least, most time.Duration) time.Duration {
	return time.Duration(float64(least) * math.Exp(r.Float64()*math.Log(float64(most)/float64(least))))
}
