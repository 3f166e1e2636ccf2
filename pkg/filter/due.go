package filter

import (
	"cmp"
	"slices"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// NextDeadline is the time at which Step wants to be called with an empty
// event, 0 when there is none.
func (e *Engine) NextDeadline() Time {
	if len(e.timers) == 0 {
		return 0
	}
	return e.timers[0]
}

// at asks for a deadline. What is due then is found by looking at everything, so
// that one entry serves everything of one moment.
func (e *Engine) at(t Time) {
	if _, ok := e.asked[t]; !ok {
		e.timers.push(t)
	}
	e.asked[t] = nil
}

// atConn asks for a deadline of c alone. Of these there can be thousands in a
// second, each at a moment of its own, and to look at all connections for each
// would take all of a processor's time.
func (e *Engine) atConn(t Time, c *conn) {
	l, ok := e.asked[t]
	switch {
	case !ok:
		e.timers.push(t)
	case l == nil:
		return
	case len(l) >= max(64, len(e.conns)/16): // to look at all is less than to sort them
		e.asked[t] = nil
		return
	}
	e.asked[t] = append(l, c)
}

// passed does what the deadlines up to now were asked for.
func (e *Engine) passed(now Time, fx *Effects) {
	all := false
	for len(e.timers) > 0 && e.timers[0] <= now {
		l := e.asked[e.timers[0]]
		all = all || l == nil
		e.few = append(e.few, l...)
		delete(e.asked, e.timers[0])
		e.timers.pop()
	}
	if all {
		e.due(now, fx)
	} else {
		e.dueFew(now, fx)
	}
	clear(e.few)
	e.few = e.few[:0]
}

// due does everything whose time has come.
func (e *Engine) due(now Time, fx *Effects) {
	for _, a := range e.order {
		e.dueApp(now, a, fx)
	}
	e.duePending(now, fx)
}

// dueFew does that for the connections of e.few, in the order of due.
func (e *Engine) dueFew(now Time, fx *Effects) {
	slices.SortFunc(e.few, func(x, y *conn) int {
		return cmp.Or(strings.Compare(x.app.name, y.app.name), y.index-x.index)
	})
	for i, c := range e.few {
		if c.state != appstate.Removed && c.app.state != appstate.BlockData && (i == 0 || c != e.few[i-1]) {
			e.dueConn(now, c, fx)
		}
	}
}

func (e *Engine) dueApp(now Time, a *app, fx *Effects) {
	if a.state == appstate.BlockData {
		return // nothing is said, and nothing ends
	}
	if a.tickAt != 0 && a.tickAt <= now {
		a.tickAt = 0
		e.tick(now, a, fx)
	}
	if a.wakeAt != 0 && a.wakeAt <= now {
		e.requestRestore(now, a, fx)
	}
	for i := len(a.conns) - 1; i >= 0; i-- {
		e.dueConn(now, a.conns[i], fx)
	}
}

func (e *Engine) dueConn(now Time, c *conn, fx *Effects) {
	if c.redoAt != 0 && c.redoAt <= now {
		e.redeliver(now, c, fx)
	}
	if c.ownAt != 0 && c.ownAt <= now {
		e.sayAgain(now, c, fx)
	}
	if c.beatAt != 0 && c.beatAt <= now {
		e.beatDue(now, c, fx)
	}
	if c.easeAt != 0 && c.easeAt <= now {
		e.ease(now, c, fx)
	}
	if c.closeAt != 0 && c.closeAt <= now {
		e.repeatClose(now, c, fx)
	}
	a := c.app
	over := a.state == appstate.SnapshotDone && c.learned && c.finIn && c.finOut && !c.owesClose() // no local side waits any more
	if c.expire != 0 && c.expire <= now && (over || !a.state.Away()) {
		e.remove(c, fx)
	}
}

// timers is a heap of deadlines (ns).
type timers []Time

func (t *timers) push(v Time) {
	h := append(*t, v)
	for i := len(h) - 1; i > 0; {
		p := (i - 1) / 2
		if h[p] <= h[i] {
			break
		}
		h[p], h[i] = h[i], h[p]
		i = p
	}
	*t = h
}

func (t *timers) pop() {
	h := *t
	n := len(h) - 1
	h[0] = h[n]
	h = h[:n]
	for i := 0; ; {
		l := 2*i + 1
		if l >= n {
			break
		}
		if r := l + 1; r < n && h[r] < h[l] {
			l = r
		}
		if h[i] <= h[l] {
			break
		}
		h[i], h[l] = h[l], h[i]
		i = l
	}
	*t = h
}
