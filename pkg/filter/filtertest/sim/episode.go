package sim

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// snapshot takes the application away as the agent does with the restart
// engine; false when it was given up and the application runs on.
func (a *agent) snapshot() bool {
	w := a.w
	w.rep.Snapshots++
	start := &filter.SnapshotStart{App: app, Sockets: []filter.Socket{}, Listen: []uint16{port}}
	if a.chance(4) && w.beats == nil { // the octets of the streams are no lines, but one in 256 ends one; heartbeats end none
		start.Boundary = "line"
	}
	for _, i := range w.server.sockets() {
		if i.state != tcp.StateTimeWait && i.state != tcp.StateSynRecv {
			start.Sockets = append(start.Sockets, i.Socket)
		}
	}
	a.soon()
	had := w.inStep()
	if _, err := a.request(start); err != nil {
		var refused *filter.Error
		if errors.As(err, &refused) && len(refused.Conns) > 0 {
			w.rep.Refused++
		}
		return a.giveUp()
	}
	a.soon()
	freeze := &filter.SnapshotFreeze{App: app, Boundary: start.Boundary, Quiet: 1e6 + a.r.Int64N(50e6), PassCloses: true, AbortOnData: a.chance(10)}
	a.spools(freeze)
	a.beats(freeze)
	if a.giveUpNow() {
		return a.giveUp()
	}
	// A second look: the first list of sockets is older than the capture.
	if err := a.tellSockets(false); err != nil {
		return a.giveUp()
	}
	if _, err := a.insist(freeze); err != nil {
		return a.giveUp()
	}
	if !a.settle() || a.giveUpNow() {
		return a.giveUp()
	}
	if start.Boundary != "" {
		w.rep.AtLines++
		w.atLines(had)
	}
	a.soon() // the snapshot is stored as far as it is known
	if _, err := a.insist(&filter.Seal{App: app}); err != nil {
		return a.giveUp()
	}
	if a.giveUpNow() && a.unseal() {
		return false
	}
	w.openHandshakes()
	a.soon()
	w.server.kill()
	a.soon()
	a.snap++
	w.server.keep()
	done := &filter.SnapshotDone{App: app, ID: fmt.Sprintf("s%d", a.snap)}
	if _, err := a.insist(done); err != nil {
		w.fail("SNAPSHOTDONE after a clean account: %v", err)
	}
	if freeze.Spool > 0 {
		w.rep.Spools++
	}
	return true
}

// spools draws whether octets are spooled while the application is away. With
// WakeFull a client may wait for its answer until the application is brought back
// by hand, at the end of the hold.
func (a *agent) spools(f *filter.SnapshotFreeze) {
	size := int(math.Exp(a.more.Float64() * math.Log(256<<10)))
	full, some := a.more.IntN(2) == 0, a.more.IntN(3) == 0
	if some && !a.w.opt.NoSpool {
		f.Spool, f.WakeFull = max(size, 1), full
		a.w.trace.note("%d octets may be spooled, wake full %v", f.Spool, full)
	}
}

// inStep gives how many octets the server has of each client that it has
// everything of.
func (w *world) inStep() map[*client]uint64 {
	had := map[*client]uint64{}
	for _, c := range w.clients {
		switch {
		case c.s == nil && c.sent == 0:
			had[c] = 0
		case c.s != nil && c.s.got == c.sent:
			had[c] = c.sent
		}
	}
	return had
}

// atLines checks that the server, which is to be ended, has whole lines of each
// client that has spoken since had was taken, but where it was told so by force
// or the client has closed.
func (w *world) atLines(had map[*client]uint64) {
	for _, c := range w.clients {
		s := c.s
		before, ok := had[c]
		if !ok || s == nil || w.agent.cut || c.shut || c.aborted || s.closed || s.got == before {
			continue
		}
		w.rep.Lines++
		if c.plan.octet(upward, s.got-1) != '\n' {
			w.fail("client %d (%v) was frozen in the middle of a line, at octet %d, %d before the snapshot", c.id, c.addr, s.got, before)
		}
	}
}

// openHandshakes notes which handshakes local has not seen the end of, and go
// with the local stack: where everything that the remote has sent was lost, it is
// as without a filter, and its first segment is answered with RST by the server
// that was started anew.
func (w *world) openHandshakes() {
	for _, i := range w.server.sockets() {
		if c := w.byAddr[i.ID.Remote]; c != nil && i.state == tcp.StateSynRecv {
			w.trace.note("the handshake of client %d is unfinished", c.id)
			c.unfinished = true
		}
	}
}

func (a *agent) giveUpNow() bool { return !a.w.opt.NoAborts && a.chance(15) }

// giveUp lets the application run on: the filter first.
func (a *agent) giveUp() bool {
	w := a.w
	w.rep.SnapshotAborts++
	a.soon()
	w.trace.note("the snapshot is given up")
	if w.engine == nil || w.state == appstate.SnapshotStart || w.state == appstate.SnapshotFreeze {
		if _, err := a.insist(&filter.SnapshotAbort{App: app}); err != nil {
			var se *appstate.StateError
			if !errors.As(err, &se) || se.State != appstate.Connected && se.State != appstate.Restored {
				w.fail("SNAPSHOTABORT: %v", err)
			}
		}
	}
	w.server.stopped = false
	w.local.settle()
	return false
}

// unseal gives the snapshot up although it is sealed; false when a local side has
// ended behind the seal: then there is no way back.
func (a *agent) unseal() bool {
	a.soon()
	_, err := a.insist(&filter.SnapshotAbort{App: app})
	var refused *filter.Error
	switch {
	case errors.As(err, &refused) && len(refused.Conns) > 0:
		return false
	case err != nil:
		a.w.fail("SNAPSHOTABORT behind the seal: %v", err)
	}
	a.w.rep.SnapshotAborts++
	a.w.server.stopped = false
	a.w.local.settle()
	return true
}

// settle drains until everything is accounted for with the application
// stopped.
func (a *agent) settle() bool {
	w := a.w
	deadline := w.clk.time() + int64(logDuration(a.r, 50*time.Millisecond, 8*time.Second))
	a.cut = false
	for {
		missing := a.drain(deadline)
		if len(missing) > 0 && !a.cut && !w.opt.NoForce && a.chance(3) {
			w.trace.note("cut")
			a.cut = true
			if _, err := a.insist(&filter.SnapshotFreeze{App: app, Boundary: "now", PassCloses: true}); err != nil {
				return false
			}
			deadline = w.clk.time() + 2e9
			missing = a.drain(deadline)
		}
		if len(missing) > 0 {
			w.trace.note("not drained: %v", missing)
			return false
		}
		w.trace.note("the server is stopped")
		w.server.stopped = true
		a.soon()
		if missing = a.look(); len(missing) == 0 {
			return w.state == appstate.SnapshotFreeze
		}
		w.trace.note("the server runs on: %v", missing)
		w.server.stopped = false
		w.local.settle()
		if w.err != nil {
			return false
		}
	}
}

// drain waits until everything is accounted for and gives what is missing at
// the deadline.
func (a *agent) drain(deadline int64) []string {
	pause := 2 * time.Millisecond
	for {
		missing := a.look()
		if len(missing) == 0 || a.w.clk.time() >= deadline || a.w.err != nil {
			return missing
		}
		a.sleep(pause)
		pause = min(pause*2, 20*time.Millisecond)
	}
}

// look compares what sockets and filter say.
func (a *agent) look() []string {
	var missing []string
	socks := a.w.server.sockets()
	l := a.conns()
	if l.State != appstate.SnapshotFreeze {
		return []string{"the filter is in state " + l.State.String()}
	}
	known := map[filter.ConnID]bool{}
	for _, c := range l.Conns {
		known[c.ID] = true
		if c.Missing != "" {
			missing = append(missing, fmt.Sprintf("%v: %s", c.ID.Remote, c.Missing))
		}
	}
	for _, i := range socks {
		if i.Established && (i.recvQ > 0 || i.sendQ > 0) {
			missing = append(missing, fmt.Sprintf("%v: queues %d %d", i.ID.Remote, i.recvQ, i.sendQ))
		}
		if i.LocalClosed && i.state != tcp.StateFinWait2 && i.sendQ > 1 {
			missing = append(missing, fmt.Sprintf("%v: %d octets unacknowledged", i.ID.Remote, i.sendQ-1))
		}
		if i.Established && !known[i.ID] {
			missing = append(missing, fmt.Sprintf("%v: the filter does not know it", i.ID.Remote))
		}
	}
	return missing
}

// hold leaves the connections to the filter for a while.
func (a *agent) hold() {
	w := a.w
	a.wake = false
	l, err := a.insist(&filter.Status{App: app})
	if err == nil {
		a.wake = l.(*filter.StatusList).Apps[0].RestoreRequested
	}
	d := w.holdTime(a.r)
	if a.chance(3) {
		d = min(d, logDuration(a.r, time.Millisecond, 10*time.Second))
	}
	if a.beatsFor != 0 {
		d = time.Duration(min(int64(d), a.beatsFor))
	}
	w.hush = a.chance(2)
	w.trace.note("held for %v at most, hush %v", time.Duration(d), w.hush)
	if !w.opt.NoCrash && a.chance(8) {
		seed := a.r.Uint64()
		w.clk.after(logDuration(a.r, time.Millisecond, max(d, 2*time.Millisecond)), func() { w.reboot(seed) })
	}
	a.wait(w.clk.time()+int64(d), func() bool { return a.wake })
	w.rep.Held += time.Duration(d)
	w.hush = false
	w.remote.settle()
	a.soon()
}

// restore brings the application back; false when that failed and the
// connections are held.
func (a *agent) restore() bool {
	w := a.w
	w.rep.Restores++
	if _, err := a.insist(&filter.RestoreStart{App: app, ID: fmt.Sprintf("s%d", a.snap)}); err != nil {
		w.fail("RESTORESTART: %v", err)
		return true
	}
	w.clearOld(a.r)
	a.sleep(logDuration(a.r, time.Millisecond, 5*time.Second))
	w.server.start()
	a.dialAgain()
	if !w.opt.NoAborts && a.chance(10) {
		a.soon()
		return a.unrestore()
	}
	for range 5 {
		if !a.reconnect() || !w.opt.NoAborts && a.chance(15) {
			return a.unrestore()
		}
		_, err := a.insist(&filter.Restored{App: app, ResetMissing: a.missing})
		var refused *filter.Error
		var se *appstate.StateError
		switch {
		case err == nil:
			w.trace.note("the application is back")
			return true
		case errors.As(err, &refused) && len(refused.Conns) > 0:
			continue
		case errors.As(err, &se): // the filter has ended meanwhile
			return a.unrestore()
		}
		w.fail("RESTORED: %v", err)
		return true
	}
	return a.unrestore()
}

// unrestore ends the new process; the connections stay held.
func (a *agent) unrestore() bool {
	w := a.w
	w.rep.RestoreAborts++
	w.trace.note("the restore is given up")
	if w.state == appstate.Restored {
		return true
	}
	w.server.kill()
	w.server.back()
	w.remote.settle()
	a.soon()
	if _, err := a.insist(&filter.RestoreAbort{App: app}); err != nil {
		w.fail("RESTOREABORT: %v", err)
	}
	return false
}

// reconnect brings the connections back by handshakes, as many at once as the
// listener's queue takes.
func (a *agent) reconnect() bool {
	w := a.w
	const again = 200e6
	started := map[filter.ConnID]int64{}
	deadline := w.clk.time() + 20e9
	for w.clk.time() < deadline && w.err == nil {
		l := a.conns()
		if l.State != appstate.RestoreStart {
			return false
		}
		room := w.server.backlog / 2
		left := 0
		a.missing = false
		var batch []filter.ConnID
		for _, c := range l.Conns {
			if !c.Restorable && c.State != appstate.Restoring {
				continue
			}
			if w.overAtHome(&c) {
				a.missing = true
				continue
			}
			left++
			if c.Role == appstate.Active {
				continue
			}
			at, ok := started[c.ID]
			switch {
			case ok && w.clk.time()-at < again:
				room--
			case room > 0:
				room--
				batch = append(batch, c.ID)
			}
		}
		for _, i := range w.server.sockets() {
			if i.state == tcp.StateSynRecv {
				left++
			}
		}
		if left == 0 {
			return true
		}
		if len(batch) > 0 {
			for _, id := range batch {
				started[id] = w.clk.time()
			}
			if _, err := a.request(&filter.RestoreConn{App: app, Conns: slices.Clone(batch), Kind: "syn"}); err != nil {
				return false
			}
		}
		a.sleep(2 * time.Millisecond)
	}
	if a.late++; a.late == 10 {
		w.fail("connections do not come back: %+v", a.conns().Conns)
	}
	return false
}
