package filter

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/boundary"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

func (e *Engine) snapshotStart(now Time, r *Request, b *SnapshotStart, a *app, fx *Effects) (any, error, bool) {
	kind, err := boundaryOf(b.Boundary)
	if err != nil {
		return nil, err, false
	}
	a.oldNode = ""
	a.set(appstate.SnapshotStart, fx, "snapshot announced")
	a.setVIP(fx, true, SetActive, SetFull)
	a.sealed, a.wake, a.wakeAt = false, false, 0
	if b.Listen != nil {
		a.listen = slices.Clone(b.Listen)
	}
	a.asked, a.askNext, a.since, a.restarted = 0, 0, now, false
	a.quiet = cmp.Or(b.Quiet, defaultQuiet)
	a.followAll(kind)
	for _, c := range a.conns {
		c.asking = false
		c.prepare(now)
	}
	for i := range b.Sockets { // those that are there, before room is made, before others come
		if c := e.bySocket(b.Sockets[i].ID); c != nil && c.app == a {
			c.listed = b.Sockets[i].Established || b.Sockets[i].LocalClosed
		}
	}
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		if b.Sockets != nil && !c.listed && (c.state == appstate.Connect || c.state == appstate.SynRcvd) && now-c.created > young {
			e.remove(c, fx) // its end was not seen
		}
	}
	for i := range b.Sockets {
		e.listed(now, a, &b.Sockets[i], b.Silent, fx)
	}
	for _, c := range a.conns { // in TIME_WAIT or gone: local had everything acknowledged
		c.saidAll = c.saidAll || b.Sockets != nil && !c.listed && c.finOut && now-c.created > young
	}
	e.pending = append(e.pending, &pending{id: r.ID, app: a, body: b, deadline: now + cmp.Or(b.Timeout, 2e9)})
	e.tick(now, a, fx)
	e.duePending(now, fx) // it may be that nothing is to be learned
	return nil, nil, true
}

func (e *Engine) snapshotFreeze(now Time, b *SnapshotFreeze, a *app, fx *Effects) (any, error) {
	kind, err := boundaryOf(b.Boundary)
	if err != nil {
		return nil, err
	}
	if kind != a.boundary {
		a.followLate(kind)
	}
	a.set(appstate.SnapshotFreeze, fx, "freezing")
	a.setVIP(fx, true, SetAway)
	a.setVIP(fx, false, SetFull)
	a.quiet = cmp.Or(b.Quiet, defaultQuiet)
	a.froze, a.passCloses, a.abortOnData = now, b.PassCloses, b.AbortOnData
	a.spool, a.wakeFull, a.heartbeats = max(b.Spool, 0), b.WakeFull, slices.Clone(b.Heartbeats)
	switch {
	case b.Silent:
		e.silence(now, a)
	case b.Boundary == boundaryNow:
		a.freezeAll()
	}
	for _, c := range a.conns {
		c.half = c.half && b.Silent
		e.freezeQuiet(now, c)
	}
	a.tickAt = now + 1 // local is asked behind the answer
	e.at(a.tickAt)
	return a.result(), nil
}

const boundaryNow = "now"

// boundaryOf is what of a remote's words has to be followed for a boundary of
// that name.
func boundaryOf(word string) (boundary.Kind, error) {
	k := boundary.Named(word)
	if k == boundary.None && word != "" && word != "turn" && word != boundaryNow {
		return k, fmt.Errorf("%w: boundary %q is none of turn, line, resp and now", ErrInvalid, word)
	}
	return k, nil
}

// defaultQuiet is the silence that counts as finished.
const defaultQuiet = 50e6

// freezeAll freezes what has not reached its boundary.
func (a *app) freezeAll() {
	for _, c := range a.conns {
		if c.learned && c.alive() && !c.frozen {
			c.freeze()
		}
	}
}

func (e *Engine) snapshotDone(now Time, b *SnapshotDone, a *app, fx *Effects) (any, error) {
	if b.ID == "" {
		return nil, fmt.Errorf("%w: SNAPSHOTDONE needs a snapshot ID", ErrInvalid)
	}
	res := a.result()
	for _, c := range a.conns {
		c.settleFin()
		why := c.missing(now)
		if c.sealed && c.discarded == 0 && c.ep.SndUna == c.ep.SndNxt {
			why = ""
		}
		if why != "" {
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: %s", c.id.Local, c.id.Remote, why))
		}
	}
	if len(res.Notes) > 0 && !b.Force {
		return nil, &Error{App: a.name, State: a.state, Text: "SNAPSHOTDONE refused: not everything is accounted for", Conns: res.Notes}
	}
	a.sealed = true
	a.snapID = b.ID
	a.set(appstate.SnapshotDone, fx, "snapshot "+b.ID)
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		if c.refused != "" || c.alive() && !c.learned { // cannot be held, and was named
			e.dismiss(c, fx)
			continue
		}
		c.parked()
		if c.spooled && c.finOut { // nobody takes it any more
			e.endSpool(c, fx)
		}
		e.trimKept(c)
		e.keptBeat(now, c, fx)
		e.spoolKept(c, fx)
		e.openHeld(c, fx)
		e.repeatClose(now, c, fx)
	}
	e.beats(now, a)
	a.followAll(boundary.None)
	a.wake = a.wake && a.keptWakes() || a.anyFin() || a.leftSpool() || a.imageWaits()
	if a.wake {
		a.wakeTries = 0
		e.requestRestore(now, a, fx)
	}
	res.State, res.SnapshotID = a.state, a.snapID
	return res, nil
}

// openHeld sees that a held remote can speak: what it cannot send wakes nobody.
// A window that was closed for octets that local has taken after all is opened,
// and one that local had closed itself, for one segment.
func (e *Engine) openHeld(c *conn, fx *Effects) {
	ep := &c.ep
	tell := ep.Closed && len(c.kept) == 0 && !c.spooled
	if tell {
		ep.Closed = false
	}
	const segment = 1460
	if !ep.Closed && uint32(ep.Window)<<ep.Opt.LocalScale < segment && c.alive() {
		ep.Window = uint16(min((segment>>ep.Opt.LocalScale)+1, 65535))
		ep.Extend()
		tell = true
	}
	if tell {
		sp := ep.Ack()
		fx.send(&sp, false)
	}
}

// keptWakes tells whether what was kept is to wake the application.
func (a *app) keptWakes() bool {
	if a.kept == 0 || a.spool == 0 || !a.wakeFull {
		return a.kept+len(a.syns) > 0
	}
	return len(a.syns) > 0 || slices.ContainsFunc(a.conns, func(c *conn) bool { return len(c.kept) > 0 && (!c.spooled || c.ep.Closed) })
}

// anyFin tells whether a remote's close was kept for local.
func (a *app) anyFin() bool {
	return slices.ContainsFunc(a.conns, func(c *conn) bool { return c.keptFin })
}

// leftSpool tells whether octets that remotes were told to be taken wait for a
// local side that ended before it took them, and are to wake the next one.
func (a *app) leftSpool() bool {
	return !a.wakeFull && slices.ContainsFunc(a.conns, func(c *conn) bool { return c.spooled && c.alive() })
}

// dismiss ends a connection that is left out. A remote that has reset it knows.
func (e *Engine) dismiss(c *conn, fx *Effects) {
	if c.learned && c.state != appstate.Rst {
		sp := c.ep.Rst()
		fx.send(&sp, false)
	}
	e.remove(c, fx)
}

func (e *Engine) snapshotAbort(now Time, a *app, fx *Effects) (any, error) {
	var ended []string
	for _, c := range a.conns {
		if a.sealed && c.localGone && c.state == appstate.ConnectRmt || c.discarded > 0 {
			ended = append(ended, fmt.Sprintf("%v %v", c.id.Local, c.id.Remote))
		}
	}
	if len(ended) > 0 {
		return nil, &Error{App: a.name, State: a.state, Text: "SNAPSHOTABORT refused: local sides have ended already", Conns: ended}
	}
	e.backToRestored(now, a, fx, "snapshot aborted")
	return a.result(), nil
}

// backToRestored lets the application go on after a snapshot that was given
// up: kept octets are handed to the same local side and windows open again.
func (e *Engine) backToRestored(now Time, a *app, fx *Effects, why string) {
	a.silent, a.imaged = false, false
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		c.image, c.half, c.ep.Behind = false, false, false
		if c.localGone && c.state == appstate.ConnectRmt { // local has reset it, the remote has not been told
			e.dismiss(c, fx)
			continue
		}
		if c.state == appstate.Rst { // local has not been told
			sp := packet.Spec{Src: c.id.Remote, Dst: c.localAddr(), Flags: packet.RST | packet.ACK,
				Seq: c.localSeqIn(c.ep.RcvNxt), Ack: c.localSeqOut(c.ep.SndNxt)}
			fx.send(&sp, true)
			e.remove(c, fx)
			continue
		}
		c.answered()
		if c.localGone && c.lostFin() { // behind the seal its FIN was acknowledged to it, and is nobody else's to repeat
			c.lingers, c.frozen, c.sealed, c.fwd, c.asks = true, false, false, false, 0
			e.repeatClose(now, c, fx)
			e.linger(now, c, fx)
			continue
		}
		c.settleFin()
		if (c.ep.Closed || c.reloaded) && !c.lingers {
			c.ep.Closed, c.reloaded = false, false
			if c.learned { // before local can acknowledge more than this does
				sp := c.ep.Ack()
				fx.send(&sp, false)
			} else if c.alive() {
				e.askBlind(c, fx) // what it answers passes
			}
		}
		e.handBack(now, c, fx)
		c.frozen, c.sealed, c.fwd, c.asks = false, false, false, 0
		if !c.translated { // bulk passes unseen from now on
			c.learned, c.rcvKnown = false, false
		}
	}
	a.setVIP(fx, false, SetFull, SetAway)
	a.sealed, a.wake, a.wakeAt = false, false, 0
	a.followAll(boundary.None)
	a.set(appstate.Restored, fx, why)
	a.settle(fx)
	e.handSyns(now, a, fx)
}

// handBack gives what was kept in a snapshot that is given up to the local
// side that was there all the time. It acknowledges no more than the remote
// has. Where the connection is translated it is handed over until it is taken;
// others pass unseen from now on, and the remote, which was told nothing of it,
// sends it again.
func (e *Engine) handBack(now Time, c *conn, fx *Effects) {
	e.trimKept(c)
	e.useHead(c, c.head)
	if len(c.kept) == 0 && !c.keptFin && !c.finOwed {
		return
	}
	if c.finOwed && c.kept == nil { // the FIN alone, which may be known from an earlier filter
		c.keptAt = c.ep.RcvNxt
	}
	c.handshakeEnd()
	e.handKept(c, fx)
	if !c.translated {
		e.unkeep(c)
		return
	}
	c.finOwed = false
	e.redoSoon(now, c)
}

// trimKept drops what of the kept octets local has taken by other ways, and what
// lies behind a hole that nobody fills any more: its remote sends it again.
func (e *Engine) trimKept(c *conn) {
	if c.kept != nil && c.ep.RcvNxt.Less(c.keptAt) && c.app.state == appstate.SnapshotDone {
		e.unkeep(c)
		return
	}
	if c.kept == nil && !c.keptFin || !c.keptAt.Less(c.ep.RcvNxt) || c.finOwed || c.spooled {
		return
	}
	if c.keptEnd().LessEq(c.ep.RcvNxt) {
		e.unkeep(c)
		return
	}
	n := min(int(c.ep.RcvNxt.Size(c.keptAt)), len(c.kept))
	c.kept = append(c.kept[:0], c.kept[n:]...)
	c.keptAt = c.ep.RcvNxt
}

// settle takes the application out of the set of those to be looked at when
// nothing of it is away or translated any more.
func (a *app) settle(fx *Effects) {
	if a.translated == 0 && (a.state == appstate.Restored || a.state == appstate.Connected) {
		a.setVIP(fx, false, SetActive)
	}
}

// handSyns delivers the kept SYNs to local, as connections that begin now.
func (e *Engine) handSyns(now Time, a *app, fx *Effects) {
	for i := range a.syns {
		k := &a.syns[i]
		if c := e.conns[k.id]; c != nil && c.alive() {
			continue // its handshake came to an end after all
		}
		b := fx.arena.alloc(len(k.data))
		copy(b, k.data)
		fx.Sends = append(fx.Sends, Send{Data: b, Tracked: true})
		var s packet.Segment
		if s.Parse(b) == packet.OK {
			e.noteSyn(now, a, e.conns[k.id], k.id, &s, fx)
		}
	}
	a.dropSyns()
}

// belongs tells whether b asks for the snapshot that is there, also when b is
// repeated.
func (a *app) belongs(b *RestoreStart) error {
	if b.OldNode != "" && b.OldNode != a.oldNode {
		return &Error{App: a.name, State: a.state,
			Text: fmt.Sprintf("RESTORESTART refused: the connections of application %q are held on this node, they are not those of node %s", a.name, b.OldNode)}
	}
	if b.IP != (netip.Addr{}) && !slices.Contains(a.vips, b.IP) {
		return fmt.Errorf("%w: %v is not a VIP of application %q", ErrInvalid, b.IP, a.name)
	}
	if b.ID != "" && b.ID != a.snapID {
		return &Error{App: a.name, State: a.state,
			Text: fmt.Sprintf("RESTORESTART refused: the connections of application %q belong to snapshot %s, not %s", a.name, a.snapID, b.ID)}
	}
	return nil
}

func (e *Engine) restoreStart(now Time, b *RestoreStart, a *app, fx *Effects) (any, error) {
	if err := a.belongs(b); err != nil {
		return nil, err
	}
	return e.restoring(now, a, fx), nil
}

// restoring begins a restore. The remotes of an application that was taken over
// are probed later, when its VIPs have followed.
func (e *Engine) restoring(now Time, a *app, fx *Effects) *Result {
	a.set(appstate.RestoreStart, fx, "restoring")
	a.wakeAt, a.probedAt = 0, 0
	for _, c := range a.conns {
		c.hsDone, c.hsStarted, c.hsError, c.hsRsts = false, false, "", 0
		c.activate = false
		if !c.image { // its connection tracking goes on as its socket does
			fx.Untrack = append(fx.Untrack, c.socketID())
		}
	}
	if !a.foreign {
		a.probe(now, fx)
	}
	a.expect()
	return a.result()
}

// probe asks the silent remotes whether they live, once in a restore.
func (a *app) probe(now Time, fx *Effects) {
	if a.probedAt != 0 {
		return
	}
	a.probedAt = now
	for _, c := range a.conns {
		if c.state == appstate.ConnectRmt || c.state == appstate.Connect && c.handshake && !c.hsStarted {
			sp := c.ep.Probe() // also where it is not known whether the remote has an open connection
			fx.send(&sp, false)
		}
	}
}

func (e *Engine) restoreConn(now Time, b *RestoreConn, a *app, fx *Effects) (any, error) {
	activate := b.Kind == "activate"
	if b.Kind != "syn" && b.Kind != "image" && !activate {
		return nil, fmt.Errorf("%w: kind %q of RESTORECONN; it is \"syn\", \"activate\" or \"image\"", ErrInvalid, b.Kind)
	}
	a.probe(now, fx)
	res := a.result()
	if b.Kind == "image" {
		res.Notes = e.imagesBack(a, b.Conns)
		return res, nil
	}
	for _, id := range b.Conns {
		c := e.conns[id]
		switch {
		case c == nil || c.app != a:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: no such connection", id.Local, id.Remote))
		case c.image:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: its socket is in the image, it comes back with that", id.Local, id.Remote))
		case activate && c.role == appstate.Active:
			c.activate = true
		case activate:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: it was accepted by the application, it comes back by \"syn\"", id.Local, id.Remote))
		case c.role == appstate.Active:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: it was opened by the application, which opens it again", id.Local, id.Remote))
		case c.restorable():
			e.startHandshake(c, fx)
		case c.hsDone:
			e.handshakeOver(c, fx)
		}
	}
	return res, nil
}

// probeTime is how long silent remotes have to answer that they are gone.
const probeTime = 20e6

func (e *Engine) restored(now Time, r *Request, b *Restored, a *app, fx *Effects) (any, error, bool) {
	a.probe(now, fx)
	at := a.probedAt + probeTime
	if (b.ResetMissing || len(a.notRestored()) == 0) && e.clocks(now, a, fx) {
		at = max(at, now+1)
	}
	if now < at {
		e.pending = append(e.pending, &pending{id: r.ID, app: a, body: b, deadline: at})
		e.at(at)
		return nil, nil, true
	}
	res, err := e.finishRestore(now, b, a, fx)
	return res, err, false
}

func (e *Engine) finishRestore(now Time, b *Restored, a *app, fx *Effects) (any, error) {
	missing := a.notRestored()
	if len(missing) > 0 && !b.ResetMissing {
		return nil, &Error{App: a.name, State: a.state, Text: "RESTORED refused: connections that are not re-established", Conns: missing}
	}
	res := a.result()
	res.Notes = missing
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		switch {
		case c.fresh:
			c.fresh = false // one that runs
		case c.image && c.hsDone:
			e.openImage(now, c, fx)
		case c.turned:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: reset, the application accepted it and reset it %d times", c.id.Local, c.id.Remote, c.hsRsts))
			e.dismiss(c, fx)
		case c.hsDone && c.hole && c.lost() > 0:
			res.Notes = append(res.Notes, fmt.Sprintf("%v %v: reset, %d octets of the stopped application never reached the remote", c.id.Local, c.id.Remote, c.lost()))
			sp := e.toLocal(c, packet.RST|packet.ACK)
			fx.send(&sp, true)
			e.dismiss(c, fx)
		case c.hsDone:
			e.open(now, c, fx)
		case c.restorable():
			e.dismiss(c, fx)
		case c.owesClose():
			e.linger(now, c, fx)
		case c.expire == 0:
			e.remove(c, fx) // a handshake that never ended
		default:
			c.expire = max(c.expire, now+1e9)
			e.at(c.expire)
		}
	}
	a.setVIP(fx, false, SetAway)
	a.sealed, a.wake, a.wakeAt, a.expected = false, false, 0, nil
	a.foreign, a.from, a.silent, a.imaged = false, 0, false, false
	a.set(appstate.Restored, fx, fmt.Sprintf("%d connections re-established", len(a.conns)))
	a.settle(fx)
	e.handSyns(now, a, fx)
	res.State = a.state
	return res, nil
}

// undoRestore leaves of every connection the remote side alone.
func (e *Engine) undoRestore(a *app, fx *Effects) {
	a.expected = nil
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		if c.fresh { // its process is gone
			e.remove(c, fx)
			continue
		}
		e.undoHandshake(c)
		e.unsay(c)
		c.wasClocked = false
		if c.turned { // the next process may want it
			c.turned = false
			c.set(appstate.ConnectRmt)
		}
	}
}

func (e *Engine) restoreAbort(now Time, a *app, fx *Effects) (any, error) {
	if a.foreign {
		return nil, e.refuse(a, "RESTOREABORT refused: application %q came from node %s and is to be handed back", a.name, a.oldNode)
	}
	e.undoRestore(a, fx)
	a.set(appstate.SnapshotDone, fx, "restore aborted")
	if a.wake {
		e.askLater(now, a, true, fx)
	}
	return a.result(), nil
}
