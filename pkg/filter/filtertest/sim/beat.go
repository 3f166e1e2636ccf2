package sim

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// beats is the heartbeat of the protocol that all clients of a run speak. Octets
// of heartbeats have the highest bit, those of data have not, so that each side
// can tell them apart wherever they stand in its stream.
type beats struct {
	ask   []byte        // of a client
	reply []byte        // to it, by whoever speaks for the application; may be empty
	send  []byte        // of the filter; clients skip it
	every time.Duration // of a client that is idle
	told  bool          // the filter knows ask, since the snapshot under way
	sent  bool          // some filter was told of send
}

const (
	tagAsk, tagReply, tagSend = 0xf0, 0xe0, 0xd0
	beatMost                  = 60 // of one client
)

// beatMessage makes a message of n octets.
func beatMessage(tag byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0x80 | byte(i)%0x40
	}
	b[0] = tag
	return b
}

// drawBeats draws the heartbeat of a run, nil for none.
func drawBeats(r *rand.Rand, o *Options) *beats {
	if r.IntN(3) != 0 || o.NoBeats {
		return nil
	}
	size := func(most int) int { return 1 + r.IntN(1+r.IntN(most)) }
	b := &beats{ask: beatMessage(tagAsk, size(500)), send: beatMessage(tagSend, size(536)), every: logDuration(r, 100*time.Millisecond, time.Hour)}
	if n := size(536); r.IntN(4) != 0 {
		b.reply = beatMessage(tagReply, n)
	}
	return b
}

// mask is of what octets of data may hold.
func (b *beats) mask() byte {
	if b == nil {
		return 0xff
	}
	return 0x7f
}

// beats draws which heartbeats the filter speaks while the application is away.
func (a *agent) beats(f *filter.SnapshotFreeze) {
	w := a.w
	b := w.beats
	if b == nil {
		return
	}
	some, periodic, closed := a.more.IntN(4) != 0, a.more.IntN(2) == 0, a.more.IntN(3) == 0
	interval := logDuration(a.more, 5*time.Second, time.Hour)
	b.told, a.beatsFor = false, 0
	for _, p := range []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd01::/64")} {
		if some {
			f.Heartbeats = append(f.Heartbeats, filter.Heartbeat{Remote: p, Match: b.ask, Reply: b.reply})
			b.told = true
		}
		if periodic {
			f.Heartbeats = append(f.Heartbeats, filter.Heartbeat{Remote: p, Send: b.send, Interval: int64(interval), OnlyClosed: closed})
			a.beatsFor = 100 * int64(interval)
			b.sent = true
		}
	}
	w.trace.note("heartbeats: answered %v, sent %v every %v, only when closed %v", some, periodic, interval, closed)
}

// parser takes the heartbeats out of one direction of a connection.
type parser struct {
	in []byte // message that has begun
	at int    // octets of it so far
}

// data gives what of b is data. Every whole message is given to whole; false: an
// octet stands where it cannot.
func (p *parser) data(b []byte, kinds [][]byte, whole func(tag byte) bool) ([]byte, bool) {
	var out []byte
	for _, x := range b {
		if p.in == nil {
			if x < 0x80 {
				out = append(out, x)
				continue
			}
			i := slices.IndexFunc(kinds, func(m []byte) bool { return len(m) > 0 && m[0] == x })
			if i < 0 {
				return out, false
			}
			p.in, p.at = kinds[i], 0
		}
		if p.in[p.at] != x {
			return out, false
		}
		if p.at++; p.at == len(p.in) {
			tag := p.in[0]
			if p.in = nil; !whole(tag) {
				return out, false
			}
		}
	}
	return out, true
}

// beating lets the client ask whether the server is there, when it is idle.
func (c *client) beating() {
	w := c.w
	if c.over() || c.shut || c.beatsSent == beatMost || w.calm {
		return
	}
	w.clk.after(w.beats.every, c.beating)
	idle := c.connected && !c.asked && c.cur < len(c.plan.exchanges) && c.sent == c.allowed && len(c.beat) == 0 && !c.beatOwed
	if !idle || w.hushed() && !c.quietly() {
		return
	}
	c.beatsSent++
	w.rep.Beats++
	c.beat, c.beatOwed, c.beatLoud = w.beats.ask, len(w.beats.reply) > 0, !w.hushed()
	w.remote.settle()
}

// quietly tells whether a heartbeat of the client wakes nobody: the filter knows
// it, and both sides have everything of each other.
func (c *client) quietly() bool {
	return c.w.beats.told && len(c.w.beats.reply) > 0 && c.s != nil && c.s.got == c.sent && c.s.sent == c.got && len(c.s.owed) == 0
}

// beatGot takes a heartbeat that the client got; false: nobody should have said it.
func (c *client) beatGot(tag byte) bool {
	if tag == tagSend {
		c.w.rep.Sends++
		return c.w.beats.sent
	}
	ok := c.beatOwed
	c.beatOwed, c.beatLoud = false, false
	c.beatsGot++
	if c.askLate {
		c.askLate = false
		c.w.clk.at(c.w.clk.time(), c.ask)
	}
	return ok
}
