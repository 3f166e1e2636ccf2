package filter

import (
	"fmt"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// Handing over: the structures of an application that is held go to the filter
// of another node. From then on this one says nothing for it and swallows what
// comes, until they come back or are released. Of all filters that know an
// application at most one is in another state than BLOCKDATA.

type (
	// Handover gives the structures to node To; the answer is *Structures. ID: the
	// snapshot that it has, "": any.
	Handover struct{ App, To, ID string }
	// Handback takes them back from node From, as they are now.
	Handback struct {
		App, From string
		Given     *Structures
	}
	// Release forgets what was handed over. From: only if that node has it. Force:
	// also what is being handed back. In RESTORED it forgets the old node's name.
	Release struct {
		App, From string
		Force     bool
	}
	// Yield is the first step of RESTOREABORT for an application that was taken
	// over and never restored here: it is silent from now on, and the answer is
	// *Structures, for the old node.
	Yield struct{ App string }
	// Unyield goes back: the old node has certainly not taken them. Own: nor will
	// it ever, for it has forgotten the application, which is this node's alone now.
	Unyield struct {
		App string
		Own bool
	}
)

// between carries out the requests that two filters have to agree on, repeated
// ones too; ok: b is one of these.
func (e *Engine) between(now Time, r *Request, a *app, fx *Effects) (res any, err error, ok bool) {
	ok = true
	switch b := r.Body.(type) {
	case *RestoreStart:
		if ok = b.OldNode != ""; ok {
			res, err = e.restoreTaken(now, b, a, fx)
		}
	case *Handover:
		res, err = e.handover(now, b, a, fx)
	case *Handback:
		res, err = e.handback(now, b, a, fx)
	case *Release:
		if a == nil {
			return &Result{App: b.App}, nil, true
		}
		res, err = e.release(b, a, fx)
	case *Yield:
		res, err = e.yield(now, a, fx)
	case *Unyield:
		res, err = e.unyield(now, b, a, fx)
	default:
		ok = false
	}
	return res, err, ok
}

func (e *Engine) refuse(a *app, format string, args ...any) error {
	return &Error{App: a.name, State: a.state, Text: fmt.Sprintf(format, args...)}
}

// handover answers HANDOVER. One node takes the structures: it may ask again,
// another one is refused.
func (e *Engine) handover(now Time, b *Handover, a *app, fx *Effects) (any, error) {
	switch {
	case b.To == "":
		return nil, fmt.Errorf("%w: HANDOVER needs the node that takes over", ErrInvalid)
	case a.yielding:
		return nil, e.refuse(a, "HANDOVER refused: application %q is being handed back to node %s; ask that one", a.name, a.takenBy)
	case a.state == appstate.BlockData && a.takenBy != b.To:
		return nil, e.refuse(a, "HANDOVER refused: application %q was handed over to node %s already", a.name, a.takenBy)
	case b.ID != "" && b.ID != a.snapID:
		return nil, e.refuse(a, "HANDOVER refused: the connections of application %q belong to snapshot %s, not %s", a.name, a.snapID, b.ID)
	}
	a.term++ // each time: what the taker has sent before its question is void
	if a.mark(); a.state != appstate.BlockData {
		a.takenBy = b.To
		a.wakeAt = 0
		a.set(appstate.BlockData, fx, "handed over to node "+b.To)
	}
	return e.structures(now, a, a.term), nil
}

// handback answers HANDBACK: the application is held here again.
func (e *Engine) handback(now Time, b *Handback, a *app, fx *Effects) (any, error) {
	switch {
	case a.state == appstate.SnapshotDone: // a repetition; what has come since stays
		return a.result(), nil
	case a.yielding:
		return nil, e.refuse(a, "HANDBACK refused: application %q is itself being handed back to node %s", a.name, a.takenBy)
	case a.takenBy != b.From:
		return nil, e.refuse(a, "HANDBACK refused: application %q was handed over to node %s, not %s", a.name, a.takenBy, b.From)
	}
	st := b.Given
	switch {
	case st == nil:
		return nil, fmt.Errorf("%w: HANDBACK needs the structures", ErrInvalid)
	case st.App.Term != a.term:
		return nil, e.refuse(a, "HANDBACK refused: these structures of application %q are of an earlier handover", a.name)
	}
	if err := e.admissible(a.name, a, st); err != nil {
		return nil, fmt.Errorf("HANDBACK: %w", err)
	}
	asked := a.wake
	a.takenBy = ""
	e.take(now, a, st, fx, "handed back by node "+b.From)
	news := a.keptWakes() || a.anyFin() || a.leftSpool()
	if a.wake = a.wake || news; a.wake {
		e.askLater(now, a, asked, fx)
	}
	return a.result(), nil
}

// askLater has the restore requested, not at once where that was done before:
// what failed is not mended in a moment.
func (e *Engine) askLater(now Time, a *app, asked bool, fx *Effects) {
	if !asked {
		a.wakeTries = 0
		e.requestRestore(now, a, fx)
		return
	}
	a.wakeTries = max(a.wakeTries, 3)
	a.wakeAt = now + min(Time(1e9)<<min(a.wakeTries, 5), 30e9)
	e.at(a.wakeAt)
}

// release answers RELEASE.
func (e *Engine) release(b *Release, a *app, fx *Effects) (any, error) {
	switch {
	case b.From != "" && b.From != a.takenBy:
		return nil, e.refuse(a, "RELEASE refused: application %q was handed over to node %s, not %s", a.name, a.takenBy, b.From)
	case a.yielding && !b.Force:
		return nil, e.refuse(a, "RELEASE refused: application %q is being handed back to node %s, which may not have it yet; force forgets it", a.name, a.takenBy)
	}
	for i := len(a.conns) - 1; i >= 0; i-- {
		e.remove(a.conns[i], fx)
	}
	e.forget(a, fx, "released")
	return &Result{App: a.name}, nil
}

// oldNodeReleased forgets the name of the old node: nothing is left there.
func (e *Engine) oldNodeReleased(a *app) *Result {
	a.oldNode = ""
	a.mark()
	return a.result()
}

// yield stops everything for an application that came from another node.
func (e *Engine) yield(now Time, a *app, fx *Effects) (any, error) {
	switch {
	case a.state == appstate.BlockData && !a.yielding:
		return nil, &appstate.StateError{App: a.name, Request: appstate.ReqYield, State: a.state}
	case !a.foreign:
		return nil, e.refuse(a, "RESTOREABORT: application %q is not one that another node has handed over", a.name)
	}
	if a.state != appstate.BlockData {
		e.undoRestore(a, fx)
		a.yielding, a.yieldedIn, a.takenBy = true, a.state, a.oldNode
		a.wakeAt = 0
		a.set(appstate.BlockData, fx, "being handed back to node "+a.oldNode)
	}
	return e.structures(now, a, a.from), nil
}

// unyield goes on where yield stopped.
func (e *Engine) unyield(now Time, b *Unyield, a *app, fx *Effects) (any, error) {
	if a.state != appstate.BlockData {
		return a.result(), nil
	}
	if !a.yielding {
		return nil, &appstate.StateError{App: a.name, Request: appstate.ReqUnyield, State: a.state}
	}
	in := a.yieldedIn
	a.yielding, a.takenBy = false, ""
	for _, c := range a.conns {
		e.rearm(now, c)
	}
	if b.Own {
		in, a.foreign, a.oldNode, a.from = appstate.SnapshotDone, false, "", 0
	}
	if in == appstate.RestoreStart {
		return e.restoring(now, a, fx), nil
	}
	a.set(appstate.SnapshotDone, fx, "held here still")
	e.beats(now, a)
	a.wake = true
	e.askLater(now, a, true, fx)
	return a.result(), nil
}

// rearm plans again what c waits for: in BLOCKDATA nothing is due.
func (e *Engine) rearm(now Time, c *conn) {
	if len(c.own) > 0 {
		c.ownAt = now + ownFirst
		e.atConn(c.ownAt, c)
	}
	if c.owesClose() {
		c.closeAt = now + ownFirst
		e.atConn(c.closeAt, c)
	}
	if c.expire != 0 {
		c.expire = max(c.expire, now+1)
		e.at(c.expire)
	}
}

// restoreTaken is RESTORESTART with the name of an old node.
func (e *Engine) restoreTaken(now Time, b *RestoreStart, a *app, fx *Effects) (any, error) {
	if a != nil && a.state != appstate.BlockData {
		if err := a.belongs(b); err != nil {
			return nil, err
		}
		if a.state == appstate.RestoreStart {
			return a.result(), nil
		}
		return e.restoring(now, a, fx), nil
	}
	switch {
	case a != nil && a.yielding:
		return nil, e.refuse(a, "RESTORESTART refused: application %q is being handed back to node %s; repeat it when that is done", a.name, a.takenBy)
	case a != nil && a.takenBy != b.OldNode:
		return nil, e.refuse(a, "RESTORESTART refused: application %q was handed over to node %s, not %s", a.name, a.takenBy, b.OldNode)
	case b.Given == nil:
		return nil, fmt.Errorf("%w: RESTORESTART with an old node needs that node's structures", ErrInvalid)
	case b.ID != "" && b.ID != b.Given.App.SnapshotID:
		return nil, &Error{App: b.App, Text: fmt.Sprintf("RESTORESTART refused: the connections of application %q belong to snapshot %s, not %s", b.App, b.Given.App.SnapshotID, b.ID)}
	case b.IP.IsValid() && !slices.Contains(b.Given.App.VIPs, b.IP):
		return nil, fmt.Errorf("%w: %v is not a VIP of application %q", ErrInvalid, b.IP, b.App)
	}
	if err := e.admissible(b.App, a, b.Given); err != nil {
		return nil, fmt.Errorf("RESTORESTART: %w", err)
	}
	if a == nil {
		a = e.newcomer(&b.Given.App)
	}
	a.oldNode, a.foreign, a.takenBy = b.OldNode, true, ""
	a.from = b.Given.App.Term
	a.term = max(a.term, a.from)
	e.take(now, a, b.Given, fx, "taken over from node "+b.OldNode)
	return e.restoring(now, a, fx), nil
}
