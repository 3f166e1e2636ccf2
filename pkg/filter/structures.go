package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// StructuresVersion is that of the structures that filters hand over. A filter
// takes only its own: a field that it does not know may be one that matters.
//
// 2: an application may be held by an image (ConnRecord.Image and what belongs to it).
const StructuresVersion = 2

// Structures are everything that the filter of another node needs to speak for an
// application that is held: what a filter that starts anew takes up, and besides what
// only the memory of a running one has.
type Structures struct {
	Version uint32
	At      Time // of the giver's clock; the taker shifts all times
	App     AppRecord
	Conns   []ConnRecord
	Syns    [][]byte // from the IP header on
}

// ErrStructures marks structures that cannot be taken, for what they are.
var ErrStructures = errors.New("the structures cannot be taken over")

// Bounds of what is taken from another node.
const (
	mostName       = 255 // octets, as of a file
	mostHeartbeats = 256
	mostBeat       = 1 << 10 // octets of one that is sent
	leastInterval  = 1e6     // between two that are sent; else nothing else would be done
	mostText       = 1 << 10
	mostReasons    = 256
)

// structures are those of a as they are now; term is the handover they belong to.
func (e *Engine) structures(now Time, a *app, term uint64) *Structures {
	st := &Structures{Version: StructuresVersion, At: now, App: *a.record(), Conns: make([]ConnRecord, len(a.conns))}
	r := &st.App
	r.State, r.Term = appstate.SnapshotDone, term
	r.OldNode, r.TakenBy, r.Foreign, r.Yielding, r.From = "", "", false, false, 0
	n := 0
	for _, c := range a.conns {
		if c.fresh || c.state == appstate.SynSent || c.state == appstate.SynRcvd {
			continue // nobody ends these handshakes; a SYN that is sent again is kept
		}
		c.recordIn(&st.Conns[n])
		c.recordMoved(&st.Conns[n])
		n++
	}
	st.Conns = st.Conns[:n]
	for i := range a.syns {
		st.Syns = append(st.Syns, slices.Clone(a.syns[i].data))
	}
	return st
}

// recordMoved completes the record of c by what a filter that is started anew
// learns in another way.
func (c *conn) recordMoved(r *ConnRecord) {
	r.Own = slices.Clone(r.Own)
	if c.spooled {
		r.Chunks = []Chunk{{At: c.keptAt, Data: slices.Clone(c.kept)}}
	} else {
		r.Kept, r.HeadFin, r.Stopped = slices.Clone(c.kept), c.keptFin, c.ep.Closed
	}
	r.KeptUrg, r.Urgent = c.keptUrg, c.urgent
	r.Expire, r.SpokeAt, r.Reloaded = c.expire, c.spokeAt, c.reloaded
	st := &c.stats
	r.SegmentsIn, r.Answered, r.SentToRemote, r.SentToLocal = st.in, st.answered, st.toRemote, st.toLocal
	r.Heard, r.KeptSegments = st.heard, st.kept
	for _, n := range st.reasons {
		r.Reasons = append(r.Reasons, uint64(n))
	}
}

// loadMoved is the other side of recordMoved.
func (e *Engine) loadMoved(now Time, c *conn, r *ConnRecord) {
	c.reloaded, c.spokeAt = r.Reloaded, min(r.SpokeAt, now)
	if !c.spooled {
		c.keptAt, c.keptFin, c.ep.Closed = r.KeptAt, r.HeadFin, r.Stopped
		if n := min(len(r.Kept), e.cfg.KeepPerConn); n > 0 {
			c.keptFin = c.keptFin && n == len(r.Kept) // the remote sends the rest again
			c.kept = make([]byte, n)
			copy(c.kept, r.Kept)
			e.kept += n
			c.app.kept += n
		}
	}
	c.keptUrg, c.urgent = r.KeptUrg, r.Urgent
	if c.expire = 0; r.Expire != 0 {
		c.expire = max(r.Expire, now+1)
		e.at(c.expire)
	}
	st := &c.stats
	st.in, st.answered, st.toRemote, st.toLocal = r.SegmentsIn, r.Answered, r.SentToRemote, r.SentToLocal
	st.heard, st.kept = r.Heard, r.KeptSegments
	for _, n := range r.Reasons {
		if int(n>>countBits) < NumReasons {
			st.reasons = append(st.reasons, reasonCount(n))
		}
	}
}

// shift puts the times of r into a clock that is d ahead of the giver's. 0 is no time.
func (r *ConnRecord) shift(now, d Time) {
	for _, t := range []*Time{&r.TSAt, &r.SpokeAt, &r.Expire} {
		if *t != 0 {
			if *t += d; *t == 0 {
				*t = -1
			}
		}
	}
	r.Created = min(r.Created+d, now)
	r.TSAt = min(r.TSAt, now)
	if r.TSAt == 0 { // of its handshake
		r.TSAt = r.Created
	}
}

// admissible tells why st cannot be taken for application name, which is there as
// a or unknown (nil). Nothing is changed. Structures come from another node: they
// are not trusted further than to be of that application.
func (e *Engine) admissible(name string, a *app, st *Structures) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrStructures, fmt.Sprintf(format, args...))
	}
	r := &st.App
	switch {
	case st.Version != StructuresVersion:
		return bad("they are of version %d, this filter takes version %d; run the same version of nfconnfilter on both nodes", st.Version, StructuresVersion)
	case r.Name != name:
		return bad("they are of application %q, not %q", r.Name, name)
	case a != nil && !slices.Equal(a.vips, r.VIPs):
		return bad("they are of other VIPs than application %q has here", name)
	}
	if err := r.movable(); err != nil {
		return bad("%v", err)
	}
	if err := contradiction([]AppRecord{*r}, st.Conns); err != nil {
		return bad("%v", err)
	}
	kept := 0
	for i := range st.Conns {
		c := &st.Conns[i]
		if err := c.movable(); err != nil {
			return bad("connection %v %v: %v", c.ID.Local, c.ID.Remote, err)
		}
		kept += c.memory(e.cfg.KeepPerConn)
	}
	for _, v := range r.VIPs {
		if o := e.byVIP[v]; o != nil && o != a {
			return &Error{App: name, Text: fmt.Sprintf("refused: %v is the VIP of application %q on this node", v, o.name)}
		}
	}
	return e.roomFor(name, a, len(st.Conns), kept)
}

// roomFor tells whether the limits allow what is to be taken, in the place of a.
func (e *Engine) roomFor(name string, a *app, conns, kept int) error {
	hadConns, hadKept, state := 0, 0, appstate.Unknown
	if a != nil {
		hadConns, hadKept, state = len(a.conns), a.kept, a.state
	}
	full := func(limit string, need, most int) error {
		return &Error{App: name, State: state, Text: fmt.Sprintf("refused: %d would be more than %s = %d of this node allows; raise it in the node's file", need, limit, most)}
	}
	switch n := len(e.conns) - hadConns + conns; {
	case n > e.cfg.MaxConns:
		return full("queue.max_connections", n, e.cfg.MaxConns)
	case conns > e.cfg.ConnsPerApp:
		return full("limits.connections_per_app", conns, e.cfg.ConnsPerApp)
	case kept > e.cfg.KeepPerApp:
		return full("limits.kept_bytes_per_app", kept, e.cfg.KeepPerApp)
	case e.kept-hadKept+kept > e.cfg.KeepTotal:
		return full("limits.kept_bytes", e.kept-hadKept+kept, e.cfg.KeepTotal)
	}
	return nil
}

// movable tells what of an application's record no filter can have handed over.
func (r *AppRecord) movable() error {
	switch {
	case r.State != appstate.SnapshotDone:
		return fmt.Errorf("the application is not held: its state is %d", r.State)
	case len(r.Name) > mostName, len(r.SnapshotID) > mostName, r.SnapshotID == "":
		return errors.New("name or snapshot ID is not valid")
	case len(r.Heartbeats) > mostHeartbeats:
		return fmt.Errorf("%d heartbeats are too many", len(r.Heartbeats))
	case len(r.VIPs) > 2 || len(r.VIPs) == 2 && r.VIPs[0].Is4() == r.VIPs[1].Is4():
		return errors.New("there is one VIP, or one of each family")
	}
	for _, h := range r.Heartbeats {
		if max(len(h.Reply), len(h.Send)) > mostBeat || len(h.Match) > 1<<16 || h.Interval > 0 && h.Interval < leastInterval {
			return errors.New("a heartbeat is too long, or too frequent")
		}
	}
	for _, l := range [][]uint16{r.Include, r.Exclude, r.Outgoing, r.Listen} {
		if len(l) > 1<<16 {
			return errors.New("there are more ports than there can be")
		}
	}
	for _, v := range r.VIPs {
		if !v.IsValid() || v.Zone() != "" || v.IsUnspecified() || v.IsMulticast() || v == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return fmt.Errorf("%v is no VIP", v)
		}
	}
	return nil
}

// movable tells what of a connection's record no filter can have handed over.
func (r *ConnRecord) movable() error {
	switch r.State {
	case appstate.Connect, appstate.Closing, appstate.ConnectRmt, appstate.Rst:
	default:
		return errors.New("its state is none of a held connection's")
	}
	switch {
	case r.ID.Remote.Addr().Zone() != "" || r.ID.Remote.Port() == 0 || r.ID.Local.Port() == 0:
		return errors.New("its addresses are none that a connection has")
	case len(r.Own) > 4*ownMost:
		return fmt.Errorf("%d octets of heartbeats are too many", len(r.Own))
	case len(r.Refused) > mostText || len(r.Reasons) > mostReasons:
		return errors.New("its record is too long")
	}
	return nil
}

// memory is how many octets the payload of r takes; a head that is not
// acknowledged is cut at most.
func (r *ConnRecord) memory(most int) int {
	if !r.Spooled {
		return min(len(r.Kept), most)
	}
	n := int(r.RcvNxt.Size(r.KeptAt))
	if r.KeptFin {
		n--
	}
	return n
}

// newcomer makes an application that another node has registered.
func (e *Engine) newcomer(r *AppRecord) *app {
	a := &app{engine: e, name: r.Name, vips: slices.Clone(r.VIPs), include: r.Include, exclude: r.Exclude, outgoing: r.Outgoing,
		includeNets: r.IncludeAddresses, excludeNets: r.ExcludeAddrs}
	e.enter(a)
	return a
}

// take makes st, which is admissible, the structures of a, in SNAPSHOTDONE. What
// was there for a is forgotten without a word.
func (e *Engine) take(now Time, a *app, st *Structures, fx *Effects, why string) {
	was := a.clear(fx)
	r := &st.App
	a.snapID, a.listen, a.quiet = r.SnapshotID, r.Listen, max(r.Quiet, 1)
	a.sealed, a.passCloses, a.abortOnData = true, r.PassCloses, r.AbortOnData
	a.silent, a.imaged = r.Silent, r.Imaged
	a.wake, a.wakeWhy, a.wakeAt, a.wakeTries = r.Wake, HeldData, 0, 0
	a.spool, a.wakeFull, a.heartbeats = max(r.Spool, 0), r.WakeFull, r.Heartbeats
	a.bytesIn, a.bytesOut = r.BytesIn, r.BytesOut
	for _, v := range a.vips {
		delete(e.blocked, v)
	}
	a.set(appstate.SnapshotDone, fx, why)
	for i := range st.Conns {
		c := st.Conns[i]
		c.shift(now, now-st.At)
		e.loadConn(now, a, &c, nil, true, fx)
		delete(was.conns, c.ID)
	}
	for _, id := range was.order {
		if was.conns[id] {
			fx.Records = append(fx.Records, Record{ID: id})
		}
	}
	for _, p := range st.Syns {
		e.takeSyn(a, p)
	}
	e.takeSets(a, was, fx)
	for _, c := range a.conns {
		e.rearm(now, c)
	}
	e.beats(now, a)
	a.markAll()
}

// leftover is what an application had before other structures were taken.
type leftover struct {
	conns map[ConnID]bool // recorded
	order []ConnID
	flows map[flowKey]*conn // in the set
	list  []*conn
	known bool // its VIPs are in the sets
}

// clear takes all connections of a out of the engine, but not out of sets and
// records.
func (a *app) clear(fx *Effects) *leftover {
	e := a.engine
	was := &leftover{conns: map[ConnID]bool{}, flows: map[flowKey]*conn{}, known: len(a.conns) > 0 || a.state != appstate.Unknown}
	for _, c := range a.conns {
		if c.chunks {
			c.chunks = false
			fx.Records = append(fx.Records, Record{ID: c.id, Unspool: true})
		}
		if c.saved {
			was.conns[c.id] = true
			was.order = append(was.order, c.id)
		}
		if c.translated {
			k := flowKey{c.id.Remote, c.id.Local.Addr()}
			was.flows[k] = c
			was.list = append(was.list, c)
			if e.flows[k]--; e.flows[k] == 0 {
				delete(e.flows, k)
			}
		}
		e.unkeep(c)
		e.setPort(c, 0)
		c.answered()
		delete(e.conns, c.id)
		c.state = appstate.Removed // it is in no table any more
	}
	a.conns, a.translated, a.expected, a.hand, a.askNext = nil, 0, nil, 0, 0
	a.count = [appstate.Removed + 1]uint32{}
	a.dropSyns()
	return was
}

// takeSets brings the sets from what they held to what belongs there now.
func (e *Engine) takeSets(a *app, was *leftover, fx *Effects) {
	if !was.known {
		a.allSets(fx)
		return
	}
	for _, c := range was.list {
		if k := (flowKey{c.id.Remote, c.id.Local.Addr()}); was.flows[k] == c && e.flows[k] == 0 {
			fx.Sets = append(fx.Sets, flowChange(c, false))
		}
	}
	for _, c := range a.conns {
		if c.translated && was.flows[flowKey{c.id.Remote, c.id.Local.Addr()}] == nil {
			fx.Sets = append(fx.Sets, flowChange(c, true))
		}
	}
}

// takeSyn keeps a SYN that another filter has kept. One that is none, or has no
// room, is left out: its remote sends it again.
func (e *Engine) takeSyn(a *app, p []byte) {
	var s packet.Segment
	if s.Parse(p) != packet.OK || s.Flags&(packet.SYN|packet.ACK|packet.RST|packet.FIN) != packet.SYN || !s.ChecksumOK() {
		return
	}
	id := ConnID{Local: s.Dst, Remote: s.Src}
	if _, ok := a.synIndex[id]; ok || !slices.Contains(a.vips, id.Local.Addr()) || !a.listens(id.Local.Port()) ||
		len(a.syns) >= e.cfg.MaxSyns || e.syns >= e.cfg.SynsTotal || len(s.Raw()) > mostSyn {
		return
	}
	if a.synIndex == nil {
		a.synIndex = map[ConnID]int{}
	}
	a.synIndex[id] = len(a.syns)
	a.syns = append(a.syns, keptSyn{id: id, data: slices.Clone(s.Raw())})
	e.syns++
}
