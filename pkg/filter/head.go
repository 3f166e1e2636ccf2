package filter

import (
	"bytes"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// A remote whose octets were dropped because there was no room for them is in its
// time-out when the application is back, the longer the longer that was away, and no
// window update ends it: only an acknowledgement of its first octets does. So a copy of
// these has room of its own. It is not acknowledged, and handed to local behind
// everything else.

// Most octets of a head, which is whole segments of what links carry, and which part of
// the budgets heads have besides.
const (
	mostHead  = 9000
	headShare = 8
)

// keepHead takes note of the octets of s at RCV.NXT, where that has some.
func (e *Engine) keepHead(c *conn, s *packet.Segment) {
	p, skip := s.Payload(), c.ep.RcvNxt.Sub(s.Seq)
	if skip < 0 || int(skip) >= len(p) || c.keptFin || s.Has(packet.URG) { // the mark would be lost
		return
	}
	p = p[skip:][:min(len(p)-int(skip), mostHead)]
	if c.headAt == c.ep.RcvNxt && len(p) <= len(c.head) {
		return
	}
	e.dropHead(c)
	if e.heads+len(p) > e.cfg.KeepTotal/headShare || c.app.heads+len(p) > e.cfg.KeepPerApp/headShare {
		return
	}
	e.heads += len(p)
	c.app.heads += len(p)
	c.head, c.headAt = bytes.Clone(p), c.ep.RcvNxt
}

// dropHead forgets it.
func (e *Engine) dropHead(c *conn) {
	e.heads -= len(c.head)
	c.app.heads -= len(c.head)
	c.head = nil
}

// useHead makes the head of a connection whose local side is to be handed what was kept, and
// which has nothing of it but maybe this, payload that was kept.
func (e *Engine) useHead(c *conn, head []byte) {
	if c.spooled { // local is to take that first
		return
	}
	e.dropHead(c)
	if len(head) == 0 || c.headAt != c.ep.RcvNxt || c.finIn || len(c.kept) > 0 || c.keptFin {
		return
	}
	c.keptAt, c.kept = c.ep.RcvNxt, head
	e.kept += cap(head)
	c.app.kept += cap(head)
}
