package filter

import (
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// adopt makes connections known that are older than the filter: role, options
// and counters, the numbers are learned when they are needed. A structure
// whose local socket is gone, and whose end was not seen, is forgotten; of a
// translated one the flow too, so that whatever its remote still sends is
// answered by the stack, with numbers that this remote knows.
func (e *Engine) adopt(now Time, b *Adopt, a *app, fx *Effects) *Result {
	there := make(map[ConnID]bool, len(b.Sockets))
	for i := range b.Sockets {
		there[b.Sockets[i].ID] = true
	}
	res := a.result()
	at := min(b.At, now)
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		if there[c.socketID()] || c.expire != 0 || c.state == appstate.SynSent || at <= max(c.created, c.opened) {
			continue
		}
		if c.handshake && !c.ackSeen && now-c.created <= young {
			continue // local may have answered with a cookie, and has no socket yet (RFC 4987 section 3.6)
		}
		e.remove(c, fx)
		res.Forgotten++
	}
	if b.Listen != nil {
		a.listen = slices.Clone(b.Listen)
	}
	before := len(a.conns)
	for i := range b.Sockets {
		e.listed(now, a, &b.Sockets[i], false, fx)
	}
	res.Adopted = len(a.conns) - before
	return res
}
