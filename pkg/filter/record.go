package filter

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// AppRecord is what of an application must outlive the filter.
type AppRecord struct {
	Name                           string
	VIPs                           []netip.Addr
	Include, Exclude, Outgoing     []uint16
	IncludeAddresses, ExcludeAddrs []netip.Prefix
	State                          appstate.App
	SnapshotID                     string
	Listen                         []uint16
	Quiet                          Time
	Sealed, PassCloses, Wake       bool
	BytesIn, BytesOut              uint64 // of connections that ended
}

// ConnRecord is what of a connection must outlive the filter while its
// application is away or the connection is translated. Numbers are the
// remote's view; those of a translated connection are as they were when it was
// re-established.
type ConnRecord struct {
	App   string
	ID    ConnID
	Role  appstate.Role
	State appstate.Conn

	Opt                    tcpemu.Options
	SndUna, SndNxt, RcvNxt seqnum.Value
	Guess                  bool // of SndUna
	Window                 uint16
	Edge                   seqnum.Value
	RemoteWnd              uint32
	RemoteLast             uint16
	RemoteSeen             bool
	TSVal, TSRec           uint32
	TSAt                   Time

	Handshake, AckSeen, Learned, Frozen, Confirmed, Sealed, LocalGone bool
	ISS, IRS                                                          seqnum.Value
	Refused                                                           string
	Created                                                           Time
	BytesIn, BytesOut, Discarded                                      uint64
	FinIn, FinOut, RemoteFirst, FinOwed, Hole                         bool
	FinInEnd, FinOutEnd                                               seqnum.Value

	HsIRS      seqnum.Value
	Translated bool
	Tr         rewrite.Translation
}

// Record is one thing to be kept: an application, a connection, or, where both
// are nil, the end of one: of connection ID, or of application Name when that
// is not "". Records are applied in their order. The end of a connection may
// be kept later than what else a step wants done.
type Record struct {
	App  *AppRecord
	Conn *ConnRecord
	ID   ConnID
	Name string
}

// Lasting tells whether the record must be kept before anything else is done.
func (r *Record) Lasting() bool { return r.App != nil || r.Conn != nil || r.Name != "" }

// mark has the structure written at the end of the step, where it is one that
// must outlive the filter.
func (e *Engine) mark(c *conn) {
	if !c.marked {
		c.marked = true
		e.marked = append(e.marked, c)
	}
}

// mark has the application written at the end of the step.
func (a *app) mark() {
	if !a.marked {
		a.marked = true
		a.engine.markedApps = append(a.engine.markedApps, a)
	}
}

// markAll has the application and all of its connections written.
func (a *app) markAll() {
	a.mark()
	for _, c := range a.conns {
		a.engine.mark(c)
	}
}

// lasting tells whether c is of those that must outlive the filter: others can
// be learned again.
func (c *conn) lasting() bool { return c.translated || c.app.state.Away() }

// gather writes what was marked in this step.
func (e *Engine) gather(fx *Effects) {
	for i, a := range e.markedApps {
		a.marked = false
		e.markedApps[i] = nil
		if a.state == appstate.Unknown {
			fx.Records = append(fx.Records, Record{Name: a.name})
			continue
		}
		fx.Records = append(fx.Records, Record{App: a.record()})
	}
	e.markedApps = e.markedApps[:0]
	for i, c := range e.marked {
		c.marked = false
		e.marked[i] = nil
		if c.state == appstate.Removed {
			continue
		}
		switch lasting := c.lasting(); {
		case lasting:
			c.saved = true
			fx.Records = append(fx.Records, Record{Conn: c.record(), ID: c.id})
		case c.saved:
			c.saved = false
			fx.Records = append(fx.Records, Record{ID: c.id})
		}
	}
	e.marked = e.marked[:0]
}

func (a *app) record() *AppRecord {
	state, id := a.state, a.snapID
	if state == appstate.SnapshotStart { // what it announced can be announced again
		state = a.before
	}
	return &AppRecord{
		Name: a.name, VIPs: a.vips, Include: a.include, Exclude: a.exclude, Outgoing: a.outgoing,
		IncludeAddresses: a.includeNets, ExcludeAddrs: a.excludeNets, State: state, SnapshotID: id,
		Listen: a.listen, Quiet: a.quiet, Sealed: a.sealed, PassCloses: a.passCloses, Wake: a.wake,
		BytesIn: a.bytesIn, BytesOut: a.bytesOut,
	}
}

func (c *conn) record() *ConnRecord {
	ep := &c.ep
	return &ConnRecord{
		App: c.app.name, ID: c.id, Role: c.role, State: c.state,
		Opt: ep.Opt, SndUna: ep.SndUna, Guess: ep.Guess, SndNxt: ep.SndNxt, RcvNxt: ep.RcvNxt,
		Window: ep.Window, Edge: ep.Edge, RemoteWnd: ep.RemoteWnd, RemoteLast: ep.RemoteLast, RemoteSeen: ep.RemoteSeen,
		TSVal: ep.TSVal, TSRec: ep.TSRec, TSAt: ep.TSAt,
		Handshake: c.handshake, AckSeen: c.ackSeen || c.listed, Learned: c.learned,
		Frozen: c.frozen, Confirmed: c.confirmed, Sealed: c.sealed, LocalGone: c.localGone,
		ISS: c.iss, IRS: c.irs, Refused: c.refused, Created: c.created,
		BytesIn: c.bytesIn, BytesOut: c.bytesOut, Discarded: c.discarded,
		FinIn: c.finIn, FinOut: c.finOut, RemoteFirst: c.remoteFirst, FinOwed: c.finOwed, Hole: c.hole, FinInEnd: c.finInEnd, FinOutEnd: c.finOutEnd,
		HsIRS: c.hsIRS, Translated: c.translated, Tr: c.tr,
	}
}

// Load takes up what an earlier engine recorded, in a new one, before its
// first Step. flows tells which translated connections its packet rules still
// knew: the end of one may not have been recorded. rebooted: no local socket
// of that time is left. Effects hold the sets that belong to it. An error
// names records that contradict each other; then nothing is taken up.
func (e *Engine) Load(now Time, apps []AppRecord, conns []ConnRecord, flows func(ConnID) bool, rebooted bool, fx *Effects) error {
	for i := range apps {
		r := &apps[i]
		if r.Name == "" || len(r.VIPs) == 0 || e.apps[r.Name] != nil || r.State == appstate.Unknown || r.State > appstate.BlockData {
			return fmt.Errorf("record of application %q is not valid", r.Name)
		}
		for _, v := range r.VIPs {
			if o := e.byVIP[v]; o != nil {
				return fmt.Errorf("records of applications %q and %q have the same VIP %v", o.name, r.Name, v)
			}
			e.byVIP[v] = nil
		}
	}
	for i := range conns {
		r := &conns[i]
		if !slices.ContainsFunc(apps, func(a AppRecord) bool { return a.Name == r.App }) {
			return fmt.Errorf("record of connection %v %v belongs to application %q, which has none", r.ID.Local, r.ID.Remote, r.App)
		}
		if r.State == appstate.Removed || r.State > appstate.Removed {
			return fmt.Errorf("record of connection %v %v is not valid", r.ID.Local, r.ID.Remote)
		}
	}
	clear(e.byVIP)
	for i := range apps {
		if rebooted && !apps[i].State.Away() {
			fx.Records = append(fx.Records, Record{Name: apps[i].Name}) // its process is gone and nobody is held
			continue
		}
		e.loadApp(&apps[i])
	}
	for i := range conns {
		if a := e.apps[conns[i].App]; a != nil {
			e.loadConn(now, a, &conns[i], flows, fx)
		} else {
			fx.Records = append(fx.Records, Record{ID: conns[i].ID})
		}
	}
	for _, a := range e.order {
		a.allSets(fx)
		e.resume(now, a, rebooted, fx)
	}
	e.gather(fx)
	return nil
}

func (e *Engine) loadApp(r *AppRecord) {
	a := &app{engine: e, name: r.Name, vips: r.VIPs, include: r.Include, exclude: r.Exclude, outgoing: r.Outgoing,
		includeNets: r.IncludeAddresses, excludeNets: r.ExcludeAddrs, snapID: r.SnapshotID, listen: r.Listen,
		quiet: cmp.Or(r.Quiet, 50e6), sealed: r.Sealed, passCloses: r.PassCloses, wake: r.Wake, wakeWhy: HeldData,
		bytesIn: r.BytesIn, bytesOut: r.BytesOut}
	e.enter(a)
	a.state = r.State
	a.before = r.State
}

func (e *Engine) loadConn(now Time, a *app, r *ConnRecord, flows func(ConnID) bool, fx *Effects) {
	if r.Translated && !a.state.Away() && !flows(r.ID) {
		fx.Records = append(fx.Records, Record{ID: r.ID})
		return
	}
	c := e.newConn(now, a, r.ID, r.Role, r.State, fx)
	if c == nil {
		fx.Records = append(fx.Records, Record{ID: r.ID})
		return
	}
	ep := &c.ep
	ep.Opt, ep.SndUna, ep.Guess, ep.SndNxt, ep.RcvNxt = r.Opt, r.SndUna, r.Guess, r.SndNxt, r.RcvNxt
	ep.Window, ep.Edge, ep.RemoteWnd, ep.RemoteLast, ep.RemoteSeen = r.Window, r.Edge, r.RemoteWnd, r.RemoteLast, r.RemoteSeen
	ep.TSVal, ep.TSRec, ep.TSAt = r.TSVal, r.TSRec, r.TSAt
	c.handshake, c.ackSeen, c.frozen, c.confirmed = r.Handshake, r.AckSeen, r.Frozen, r.Confirmed
	c.sealed, c.localGone = r.Sealed, r.LocalGone
	c.learned = r.Learned && a.state.Away()
	c.iss, c.irs, c.refused, c.created = r.ISS, r.IRS, r.Refused, min(r.Created, now)
	c.bytesIn, c.bytesOut, c.discarded = r.BytesIn, r.BytesOut, r.Discarded
	c.finIn, c.finOut, c.remoteFirst, c.finInEnd, c.finOutEnd = r.FinIn, r.FinOut, r.RemoteFirst, r.FinInEnd, r.FinOutEnd
	c.finOwed, c.hole = r.FinOwed, r.Hole
	c.hsIRS, c.tr, c.translated = r.HsIRS, r.Tr, r.Translated
	c.saved, c.reloaded = true, true
	if c.translated {
		a.translated++
	}
}

// resume goes on where the earlier filter stopped.
func (e *Engine) resume(now Time, a *app, rebooted bool, fx *Effects) {
	if rebooted {
		for _, c := range a.conns {
			c.ep.TSAt = now // its clock began anew
		}
	}
	switch a.state {
	case appstate.SnapshotFreeze:
		for _, c := range a.conns {
			if a.sealed || c.sealed {
				continue
			}
			// What passed since is not in the record: local is asked again.
			c.learned, c.confirmed, c.rcvKnown = false, false, true
			c.listed = c.ackSeen
		}
		a.froze, a.since = now, now
		e.tick(now, a, fx)
	case appstate.RestoreStart:
		// Nothing was opened yet. What answered the handshakes, or refused them, is
		// started anew.
		for _, c := range a.conns {
			if c.state == appstate.Restoring || c.state == appstate.Connect && c.ackSeen || c.state == appstate.Closing && !c.finIn && !c.finOut {
				c.set(appstate.ConnectRmt)
			}
		}
		a.wake = true
		a.set(appstate.SnapshotDone, fx, "a restore was cut off by the end of the filter; the connections are held")
		e.requestRestore(now, a, fx)
		return
	case appstate.SnapshotDone:
		e.requestRestore(now, a, fx)
	}
	fx.Notes = append(fx.Notes, Note{App: a.name, State: a.state, Text: fmt.Sprintf("taken up with %d connections", len(a.conns))})
}
