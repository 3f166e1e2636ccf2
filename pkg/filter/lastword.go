package filter

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// The last word: a FIN of local that the remote had not acknowledged when
// local's stack went away with its application. Nobody else repeats it, and the
// remote, which has every octet before it, would wait and in the end be reset.

// lostFin tells whether the remote has acknowledged everything of local but its
// FIN. Where octets are missing too the stream has a hole, and no end.
func (c *conn) lostFin() bool {
	return c.state == appstate.Closing && c.finOut && c.learned && c.finOutEnd == c.ep.SndNxt && c.ep.SndUna.Add(1) == c.ep.SndNxt
}

// owesClose tells whether the filter has to see that local's FIN arrives.
func (c *conn) owesClose() bool { return c.lingers && c.lostFin() }

// lastWord is the answer to the remote of a connection that local has closed:
// an acknowledgement, with the FIN until that is acknowledged.
func (c *conn) lastWord() packet.Spec {
	sp := c.ep.Ack()
	if c.owesClose() {
		sp.Seq = c.ep.SndNxt.Add(^uint32(0))
		sp.Flags |= packet.FIN
	}
	return sp
}

// repeatClose sends local's FIN and plans the next with back-off (RFC 6298
// section 5.5, RFC 9293 section 3.8.1).
func (e *Engine) repeatClose(now Time, c *conn, fx *Effects) {
	const first, last, seldom, tries = Time(1e9), Time(60e9), Time(3600e9), 30
	c.closeAt = 0
	if !c.owesClose() {
		return
	}
	sp := c.lastWord()
	fx.send(&sp, false)
	c.closeAt = now + min(first<<min(c.closeTries, 6), last)
	if c.closeTries == tries { // for half an hour: it may be gone, and a hold takes any time
		c.closeAt = now + seldom
	} else {
		c.closeTries++
	}
	e.atConn(c.closeAt, c)
}

// linger goes on with the last word when the application is back: the
// connection stays in the set of translated flows, for local's new stack does not
// know it. A remote that says nothing is given up in the time that a stack gives
// its last segments (RFC 9293 section 3.8.3, R2).
func (e *Engine) linger(now Time, c *conn, fx *Effects) {
	const patience = 120e9
	if !c.translated {
		e.flow(c, true, fx)
	}
	c.expireIn(now, patience)
}

// lingersOn tells whether the filter, and not local, answers the remote
// although the application runs.
func (c *conn) lingersOn() bool { return c.lingers && c.translated }

// closeTaken is called when the remote has acknowledged local's FIN: the
// structure stays for the remote's own, as long as a stack waits for that.
func (c *conn) closeTaken(now Time) {
	const finWait = 60e9
	c.app.engine.mark(c)
	c.closeAt, c.expire = 0, 0
	switch {
	case c.finIn:
		c.closing(now)
	case !c.app.state.Away():
		c.expireIn(now, finWait)
	}
}

// expireIn has the structure forgotten after d.
func (c *conn) expireIn(now, d Time) {
	c.expire = (now+d)/1e9*1e9 + 1e9 // whole seconds: one look for many
	c.app.engine.at(c.expire)
}

// unheard tells whether local has closed and may have something to repeat of
// which the numbers are not known; to a filter that started anew in a freeze those of
// before are old.
func (c *conn) unheard() bool {
	return c.finOut && !c.learned && (c.saidAll && c.sendQueue > 0 || c.reloaded && c.app.restarted)
}

// unheardFor is how long a snapshot waits for their numbers.
const unheardFor = 1e9
