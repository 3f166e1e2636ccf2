package filter

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/boundary"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// AppRecord is what of an application must outlive the filter. The tags number
// the fields for an encoding that omits what is zero; a number is never used
// for something else.
type AppRecord struct {
	Name             string         `cbor:"1,keyasint,omitempty"`
	VIPs             []netip.Addr   `cbor:"2,keyasint,omitempty"`
	Include          []uint16       `cbor:"3,keyasint,omitempty"`
	Exclude          []uint16       `cbor:"4,keyasint,omitempty"`
	Outgoing         []uint16       `cbor:"5,keyasint,omitempty"`
	IncludeAddresses []netip.Prefix `cbor:"6,keyasint,omitempty"`
	ExcludeAddrs     []netip.Prefix `cbor:"7,keyasint,omitempty"`
	State            appstate.App   `cbor:"8,keyasint,omitempty"`
	SnapshotID       string         `cbor:"9,keyasint,omitempty"`
	Listen           []uint16       `cbor:"10,keyasint,omitempty"`
	Quiet            Time           `cbor:"11,keyasint,omitempty"`
	Sealed           bool           `cbor:"12,keyasint,omitempty"`
	PassCloses       bool           `cbor:"13,keyasint,omitempty"`
	Wake             bool           `cbor:"14,keyasint,omitempty"`
	BytesIn          uint64         `cbor:"15,keyasint,omitempty"` // of connections that ended
	BytesOut         uint64         `cbor:"16,keyasint,omitempty"`
	AbortOnData      bool           `cbor:"17,keyasint,omitempty"`
	Spool            int            `cbor:"18,keyasint,omitempty"`
	WakeFull         bool           `cbor:"19,keyasint,omitempty"`
	Heartbeats       []Heartbeat    `cbor:"20,keyasint,omitempty"`
	Boundary         string         `cbor:"21,keyasint,omitempty"`

	OldNode  string `cbor:"22,keyasint,omitempty"` // that it was taken over from
	TakenBy  string `cbor:"23,keyasint,omitempty"` // in BLOCKDATA
	Foreign  bool   `cbor:"24,keyasint,omitempty"` // taken over and never restored here
	Yielding bool   `cbor:"25,keyasint,omitempty"` // in BLOCKDATA: the taker may not have it yet
	Term     uint64 `cbor:"26,keyasint,omitempty"` // how many handovers led to it
	From     uint64 `cbor:"27,keyasint,omitempty"` // Term of the one that brought it here
	Silent   bool   `cbor:"28,keyasint,omitempty"` // the snapshot is by an image
	Imaged   bool   `cbor:"29,keyasint,omitempty"`
}

// ConnRecord is what of a connection must outlive the filter while its
// application is away or the connection is translated. Numbers are the
// remote's view; those of a translated connection are as they were when it was
// re-established. Tags as in AppRecord.
type ConnRecord struct {
	App   string         `cbor:"1,keyasint,omitempty"`
	ID    ConnID         `cbor:"-"` // in the key
	Role  appstate.Role  `cbor:"3,keyasint,omitempty"`
	State appstate.Conn  `cbor:"4,keyasint,omitempty"`
	Opt   tcpemu.Options `cbor:"5,keyasint,omitempty"`

	SndUna     seqnum.Value `cbor:"6,keyasint,omitempty"`
	Guess      bool         `cbor:"7,keyasint,omitempty"` // of SndUna
	SndNxt     seqnum.Value `cbor:"8,keyasint,omitempty"`
	RcvNxt     seqnum.Value `cbor:"9,keyasint,omitempty"`
	Window     uint16       `cbor:"10,keyasint,omitempty"`
	Edge       seqnum.Value `cbor:"11,keyasint,omitempty"`
	RemoteWnd  uint32       `cbor:"12,keyasint,omitempty"`
	RemoteLast uint16       `cbor:"13,keyasint,omitempty"`
	RemoteSeen bool         `cbor:"14,keyasint,omitempty"`
	TSVal      uint32       `cbor:"15,keyasint,omitempty"`
	TSRec      uint32       `cbor:"16,keyasint,omitempty"`
	TSAt       Time         `cbor:"17,keyasint,omitempty"`

	Handshake bool         `cbor:"18,keyasint,omitempty"`
	AckSeen   bool         `cbor:"19,keyasint,omitempty"`
	Learned   bool         `cbor:"20,keyasint,omitempty"`
	Frozen    bool         `cbor:"21,keyasint,omitempty"`
	Confirmed bool         `cbor:"22,keyasint,omitempty"`
	Sealed    bool         `cbor:"23,keyasint,omitempty"`
	LocalGone bool         `cbor:"24,keyasint,omitempty"`
	ISS       seqnum.Value `cbor:"25,keyasint,omitempty"`
	IRS       seqnum.Value `cbor:"26,keyasint,omitempty"`
	Refused   string       `cbor:"27,keyasint,omitempty"`
	Created   Time         `cbor:"28,keyasint,omitempty"`
	BytesIn   uint64       `cbor:"29,keyasint,omitempty"`
	BytesOut  uint64       `cbor:"30,keyasint,omitempty"`
	Discarded uint64       `cbor:"31,keyasint,omitempty"`

	FinIn       bool         `cbor:"32,keyasint,omitempty"`
	FinOut      bool         `cbor:"33,keyasint,omitempty"`
	RemoteFirst bool         `cbor:"34,keyasint,omitempty"`
	FinOwed     bool         `cbor:"35,keyasint,omitempty"`
	Hole        bool         `cbor:"36,keyasint,omitempty"`
	FinInEnd    seqnum.Value `cbor:"37,keyasint,omitempty"`
	FinOutEnd   seqnum.Value `cbor:"38,keyasint,omitempty"`

	HsIRS      seqnum.Value        `cbor:"39,keyasint,omitempty"`
	Translated bool                `cbor:"40,keyasint,omitempty"`
	Tr         rewrite.Translation `cbor:"41,keyasint,omitempty"`

	CloseWait bool `cbor:"42,keyasint,omitempty"`
	Shut      bool `cbor:"43,keyasint,omitempty"` // its window was closed when it was re-established

	Spooled bool         `cbor:"44,keyasint,omitempty"`
	KeptAt  seqnum.Value `cbor:"45,keyasint,omitempty"`
	KeptFin bool         `cbor:"46,keyasint,omitempty"`
	Closed  bool         `cbor:"47,keyasint,omitempty"` // the window, by a full spool
	Own     []byte       `cbor:"48,keyasint,omitempty"`
	OwnEnd  seqnum.Value `cbor:"49,keyasint,omitempty"`
	Chunks  []Chunk      `cbor:"-"` // of the spool, in entries of their own

	Bound   seqnum.Value `cbor:"50,keyasint,omitempty"`
	Bounded bool         `cbor:"51,keyasint,omitempty"`
	Silent  bool         `cbor:"52,keyasint,omitempty"` // nothing of local was seen since its SYN-ACK

	SendQueue uint32 `cbor:"53,keyasint,omitempty"` // unacknowledged, of a local side that had closed
	SaidAll   bool   `cbor:"54,keyasint,omitempty"` // it had when the snapshot began
	Lingers   bool   `cbor:"55,keyasint,omitempty"` // the filter repeats local's FIN

	Image   bool         `cbor:"71,keyasint,omitempty"` // its socket is in the image
	Half    bool         `cbor:"72,keyasint,omitempty"`
	ImgUna  seqnum.Value `cbor:"73,keyasint,omitempty"`
	ImgSnd  seqnum.Value `cbor:"74,keyasint,omitempty"`
	ImgRcv  seqnum.Value `cbor:"75,keyasint,omitempty"`
	Floored bool         `cbor:"76,keyasint,omitempty"`
	Floor   seqnum.Value `cbor:"77,keyasint,omitempty"`
	Brief   bool         `cbor:"78,keyasint,omitempty"`
	ImgEnd  seqnum.Value `cbor:"79,keyasint,omitempty"`
	Unread  bool         `cbor:"80,keyasint,omitempty"`
	ImgWup  seqnum.Value `cbor:"81,keyasint,omitempty"`

	// What follows is only for the filter of another node.

	Kept     []byte       `cbor:"56,keyasint,omitempty"` // not acknowledged, from KeptAt on
	HeadFin  bool         `cbor:"57,keyasint,omitempty"` // and the FIN behind it
	KeptUrg  seqnum.Value `cbor:"58,keyasint,omitempty"`
	Urgent   bool         `cbor:"59,keyasint,omitempty"`
	Stopped  bool         `cbor:"60,keyasint,omitempty"` // the window is closed for that
	Expire   Time         `cbor:"61,keyasint,omitempty"`
	SpokeAt  Time         `cbor:"62,keyasint,omitempty"` // when TSVal was taken from local
	Reloaded bool         `cbor:"63,keyasint,omitempty"`

	SegmentsIn   uint64   `cbor:"64,keyasint,omitempty"` // statistics
	Answered     uint32   `cbor:"65,keyasint,omitempty"`
	SentToRemote uint32   `cbor:"66,keyasint,omitempty"`
	SentToLocal  uint32   `cbor:"67,keyasint,omitempty"`
	Heard        uint32   `cbor:"68,keyasint,omitempty"`
	KeptSegments uint16   `cbor:"69,keyasint,omitempty"`
	Reasons      []uint64 `cbor:"70,keyasint,omitempty"` // each a reason in the top octet, its count below
}

// Record is one thing to be kept: an application, a connection, or, where both
// are nil, the end of one: of connection ID, or of application Name when that
// is not "". Records are applied in their order. The end of a connection may
// be kept later than what else a step wants done.
//
// Chunk is a piece of connection ID's spool, Unspool the end of all of them.
type Record struct {
	App     *AppRecord
	Conn    *ConnRecord
	Chunk   *Chunk
	Unspool bool
	ID      ConnID
	Name    string
}

// Lasting tells whether the record must be kept before anything else is done.
func (r *Record) Lasting() bool {
	return r.App != nil || r.Conn != nil || r.Chunk != nil || r.Name != ""
}

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
func (c *conn) lasting() bool { return c.translated || c.app.state.Captured() && !c.fresh }

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
		Listen: a.listen, Quiet: a.quiet, Sealed: a.sealed, PassCloses: a.passCloses, Wake: a.wake, AbortOnData: a.abortOnData, Boundary: a.boundary.String(),
		Spool: a.spool, WakeFull: a.wakeFull, Heartbeats: a.heartbeats,
		BytesIn: a.bytesIn, BytesOut: a.bytesOut,
		OldNode: a.oldNode, TakenBy: a.takenBy, Foreign: a.foreign, Yielding: a.yielding, Term: a.term, From: a.from,
		Silent: a.silent, Imaged: a.imaged,
	}
}

func (c *conn) record() *ConnRecord {
	r := new(ConnRecord)
	c.recordIn(r)
	return r
}

// recordIn fills in r.
func (c *conn) recordIn(r *ConnRecord) {
	ep := &c.ep
	*r = ConnRecord{
		App: c.app.name, ID: c.id, Role: c.role, State: c.state,
		Opt: ep.Opt, SndUna: ep.SndUna, Guess: ep.Guess, SndNxt: ep.SndNxt, RcvNxt: ep.RcvNxt,
		Window: ep.Window, Edge: ep.Edge, RemoteWnd: ep.RemoteWnd, RemoteLast: ep.RemoteLast, RemoteSeen: ep.RemoteSeen,
		TSVal: ep.TSVal, TSRec: ep.TSRec, TSAt: ep.TSAt,
		Handshake: c.handshake, AckSeen: c.ackSeen || c.listed, Learned: c.learned,
		Frozen: c.frozen, Confirmed: c.confirmed, Sealed: c.sealed, LocalGone: c.localGone,
		ISS: c.iss, IRS: c.irs, Refused: c.refused, Created: c.created,
		BytesIn: c.bytesIn, BytesOut: c.bytesOut, Discarded: c.discarded,
		FinIn: c.finIn, FinOut: c.finOut, RemoteFirst: c.remoteFirst, FinOwed: c.finOwed, Hole: c.hole, FinInEnd: c.finInEnd, FinOutEnd: c.finOutEnd,
		HsIRS: c.hsIRS, Translated: c.translated, Tr: c.tr, CloseWait: c.closeWait, Shut: c.shut,
		Spooled: c.spooled, KeptAt: c.keptAt, KeptFin: c.spooled && c.keptFin, Closed: c.spooled && ep.Closed, Own: c.own, OwnEnd: c.ownEnd,
		Bound: c.bound, Bounded: c.bounded,
		Image: c.image, Half: c.half, ImgUna: c.imgUna, ImgSnd: c.imgSnd, ImgRcv: c.imgRcv, ImgEnd: c.imgEnd, Unread: c.unread, ImgWup: c.imgWup, Floored: c.floored, Floor: c.floor, Brief: c.brief,
		SaidAll: c.saidAll, Lingers: c.lingers, Silent: c.handshake && c.spokeAt == 0 && (!c.reloaded || c.silent),
	}
	switch {
	case c.saidAll && c.learned:
		r.SendQueue = ep.SndNxt.Size(ep.SndUna)
	case c.saidAll:
		r.SendQueue = c.sendQueue
	}
}

// Load takes up what an earlier engine recorded, in a new one, before its
// first Step. flows tells which translated connections its packet rules still
// knew: the end of one may not have been recorded. rebooted: no local socket
// of that time is left. Effects hold the sets that belong to it. An error
// names records that contradict each other; then nothing is taken up.
func (e *Engine) Load(now Time, apps []AppRecord, conns []ConnRecord, flows func(ConnID) bool, rebooted bool, fx *Effects) error {
	if err := contradiction(apps, conns); err != nil {
		return err
	}
	for i := range apps {
		if rebooted && !apps[i].State.Captured() {
			fx.Records = append(fx.Records, Record{Name: apps[i].Name}) // its process is gone and nobody is held
			continue
		}
		e.loadApp(&apps[i])
	}
	for i := range conns {
		if a := e.apps[conns[i].App]; a != nil {
			e.loadConn(now, a, &conns[i], flows, false, fx)
		} else {
			conns[i].forget(fx)
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
		quiet: cmp.Or(r.Quiet, 50e6), sealed: r.Sealed, passCloses: r.PassCloses, abortOnData: r.AbortOnData, wake: r.Wake, wakeWhy: HeldData,
		bytesIn: r.BytesIn, bytesOut: r.BytesOut, spool: r.Spool, wakeFull: r.WakeFull, heartbeats: r.Heartbeats,
		oldNode: r.OldNode, takenBy: r.TakenBy, foreign: r.Foreign, yielding: r.Yielding, yieldedIn: appstate.SnapshotDone, term: r.Term, from: r.From,
		silent: r.Silent, imaged: r.Imaged}
	e.enter(a)
	a.state = r.State
	a.before = r.State
	if r.State == appstate.SnapshotFreeze {
		a.boundary = boundary.Named(r.Boundary)
	}
}

// loadConn takes up a connection; moved: from another node, in a step.
func (e *Engine) loadConn(now Time, a *app, r *ConnRecord, flows func(ConnID) bool, moved bool, fx *Effects) {
	if r.Translated && !a.state.Captured() && !flows(r.ID) {
		r.forget(fx)
		return
	}
	c := e.newConn(now, a, r.ID, r.Role, r.State, fx)
	if c == nil {
		r.forget(fx)
		return
	}
	ep := &c.ep
	ep.Opt, ep.SndUna, ep.Guess, ep.SndNxt, ep.RcvNxt = r.Opt, r.SndUna, r.Guess, r.SndNxt, r.RcvNxt
	ep.Window, ep.Edge, ep.RemoteWnd, ep.RemoteLast, ep.RemoteSeen = r.Window, r.Edge, r.RemoteWnd, r.RemoteLast, r.RemoteSeen
	ep.TSVal, ep.TSRec, ep.TSAt = r.TSVal, r.TSRec, r.TSAt
	c.handshake, c.ackSeen, c.frozen, c.confirmed = r.Handshake, r.AckSeen, r.Frozen, r.Confirmed
	c.sealed, c.localGone = r.Sealed, r.LocalGone
	c.learned = r.Learned && (a.state.Captured() || r.Lingers)
	c.sendQueue, c.saidAll = r.SendQueue, r.SaidAll
	c.iss, c.irs, c.refused, c.created = r.ISS, r.IRS, r.Refused, min(r.Created, now)
	c.bytesIn, c.bytesOut, c.discarded = r.BytesIn, r.BytesOut, r.Discarded
	c.finIn, c.finOut, c.remoteFirst, c.finInEnd, c.finOutEnd = r.FinIn, r.FinOut, r.RemoteFirst, r.FinInEnd, r.FinOutEnd
	c.finOwed, c.hole = r.FinOwed, r.Hole
	c.hsIRS, c.tr, c.translated, c.closeWait, c.shut = r.HsIRS, r.Tr, r.Translated, r.CloseWait, r.Shut
	c.saved, c.reloaded, c.silent, c.lingers = true, true, r.Silent, r.Lingers
	c.image, c.half, c.imgUna, c.imgSnd, c.imgRcv = r.Image, r.Half, r.ImgUna, r.ImgSnd, r.ImgRcv
	c.imgEnd, c.unread, c.imgWup = r.ImgEnd, r.Unread, r.ImgWup
	c.floored, c.floor, c.brief = r.Floored, r.Floor, r.Brief
	if c.ep.Behind = r.Image; a.silent && a.state == appstate.SnapshotFreeze {
		c.silence()
	}
	if c.state == appstate.SynSent {
		c.opening(now)
	}
	e.setPort(c, r.Tr.Port)
	e.loadSpool(now, c, r)
	if moved {
		c.saved = false
		e.loadMoved(now, c, r)
		e.recordSpool(c, fx)
	}
	if c.scan != nil {
		c.scan.seen = true // nobody knows what passed since
		c.bound, c.bounded = r.Bound, r.Bounded
	}
	if c.translated {
		a.translated++
		e.flows[flowKey{c.id.Remote, c.id.Local.Addr()}]++
	}
	if a.state == appstate.SnapshotFreeze && a.sealed && !a.silent && c.alive() {
		c.localGone = true // an answer to its last words may have left
		c.goneAway()
	}
	switch a.state {
	case appstate.SnapshotDone, appstate.RestoreStart:
		c.parked()
		e.openHeld(c, fx)
	case appstate.BlockData:
		c.parked()
	}
}

// forget has the record, and the spool that belongs to it, kept no longer.
func (r *ConnRecord) forget(fx *Effects) {
	if len(r.Chunks) > 0 {
		fx.Records = append(fx.Records, Record{ID: r.ID, Unspool: true})
	}
	fx.Records = append(fx.Records, Record{ID: r.ID})
}

// loadSpool takes up what a connection's remote was told to be taken, and what it was told.
func (e *Engine) loadSpool(now Time, c *conn, r *ConnRecord) {
	if c.own, c.ownEnd = r.Own, r.OwnEnd; len(c.own) > 0 {
		c.ownAt = now + ownFirst
		e.atConn(c.ownAt, c)
	}
	c.chunks = len(r.Chunks) > 0
	if !r.Spooled {
		return
	}
	c.spooled, c.keptAt, c.keptFin, c.ep.Closed = true, r.KeptAt, r.KeptFin, r.Closed
	c.kept = r.spool()
	c.stats.kept = uint16(min(len(r.Chunks), 65535))
	e.kept += cap(c.kept)
	c.app.kept += cap(c.kept)
}

// spool joins the chunks from KeptAt on; nil where octets are missing.
func (r *ConnRecord) spool() []byte {
	want := int(r.RcvNxt.Size(r.KeptAt))
	if r.KeptFin {
		want--
	}
	have := 0
	for i := range r.Chunks {
		have += len(r.Chunks[i].Data)
	}
	if !r.Spooled || want < 0 || want > have {
		return nil
	}
	out := make([]byte, 0, want)
	for _, c := range r.Chunks { // in the order in which they came
		next := r.KeptAt.Add(uint32(len(out)))
		if skip := next.Sub(c.At); skip >= 0 && int(skip) < len(c.Data) {
			out = append(out, c.Data[skip:]...)
		}
	}
	if len(out) < want {
		return nil
	}
	return out[:want]
}

// resume goes on where the earlier filter stopped.
func (e *Engine) resume(now Time, a *app, rebooted bool, fx *Effects) {
	if rebooted {
		for _, c := range a.conns {
			c.ep.TSAt = now // its clock began anew
		}
	}
	for _, c := range a.conns {
		if a.state == appstate.BlockData {
			break // another node speaks
		}
		if e.repeatClose(now, c, fx); c.lingersOn() {
			e.linger(now, c, fx)
		}
	}
	switch a.state {
	case appstate.SnapshotFreeze:
		for _, c := range a.conns {
			if a.silent && !a.imaged && !c.spooled && !c.sealed && !c.lingers {
				c.learned, c.rcvKnown = false, c.learned || c.rcvKnown // both sides may have spoken before everything was captured
			}
			if a.sealed || c.sealed || c.lingers {
				continue
			}
			if c.spooled { // local still takes it
				c.handshakeEnd()
				e.redoSoon(now, c)
			}
			// What passed since is not in the record: local is asked again.
			c.learned, c.confirmed, c.rcvKnown = false, false, c.learned || !c.saidAll
			c.listed = c.ackSeen
		}
		if a.froze, a.restarted = now, !a.sealed; !a.sealed { // else local is not asked any more
			a.since = now
		}
		e.tick(now, a, fx)
	case appstate.RestoreStart:
		// Nothing was opened yet, and nothing of it is recorded.
		a.wake = true
		e.beats(now, a)
		a.set(appstate.SnapshotDone, fx, "a restore was cut off by the end of the filter; the connections are held")
		e.requestRestore(now, a, fx)
		return
	case appstate.SnapshotDone:
		e.beats(now, a)
		e.requestRestore(now, a, fx)
	case appstate.Restored:
		for _, c := range a.conns {
			e.openAgain(now, c, fx)
		}
	}
	fx.Notes = append(fx.Notes, Note{App: a.name, State: a.state, Text: fmt.Sprintf("taken up with %d connections", len(a.conns))})
}
