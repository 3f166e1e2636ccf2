// Package filter is the verdict engine. It follows the connections of the
// applications behind virtual IPs, speaks for an application that is away and
// translates the connections of one that came back.
//
// The engine is pure: packets, requests and the time come in through Step,
// everything that is to be done goes out through Effects. It has no clock, no
// source of randomness but its seed, no lock and no goroutine; the same events
// give the same octets. One goroutine calls it. The caller's duties are in the
// comment of Effects.
package filter

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/boundary"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// Config bounds the engine. Zero values take the defaults in brackets.
type Config struct {
	MaxConns    int    // connection structures in all [1048576]
	ConnsPerApp int    // of one application [MaxConns]
	KeepPerConn int    // octets kept for one connection [60000]
	KeepPerApp  int    // for one application [KeepTotal]
	KeepTotal   int    // octets kept in all [268435456]
	MaxSyns     int    // kept SYNs for one application [4096]
	SynsTotal   int    // kept SYNs in all [65536]
	Seed        uint64 // of the numbers that outsiders must not guess
}

func (c *Config) defaults() {
	c.MaxConns = cmp.Or(c.MaxConns, 1<<20)
	c.ConnsPerApp = cmp.Or(c.ConnsPerApp, c.MaxConns)
	c.KeepPerConn = cmp.Or(c.KeepPerConn, 60000)
	c.KeepTotal = cmp.Or(c.KeepTotal, 256<<20)
	c.KeepPerApp = cmp.Or(c.KeepPerApp, c.KeepTotal)
	c.MaxSyns = cmp.Or(c.MaxSyns, 4096)
	c.SynsTotal = cmp.Or(c.SynsTotal, 65536)
}

// Engine is the verdict engine of one queue.
type Engine struct {
	cfg     Config
	apps    map[string]*app
	order   []*app // sorted by name
	byVIP   map[netip.Addr]*app
	blocked map[netip.Addr]bool // VIPs whose connections were lost while away
	conns   map[ConnID]*conn    // as the remote sees them
	alias   map[ConnID]*conn    // as local sees those whose port is translated
	flows   map[flowKey]int     // translated connections of each entry in the set
	noSpool bool                // records cannot be kept
	kept    int                 // octets of memory for payload
	heads   int                 // and for heads
	syns    int                 // kept, of all applications
	rng     uint64
	timers  timers
	asked   map[Time][]*conn // deadlines in timers: of these connections, nil: of anything
	few     []*conn          // whose deadlines have passed
	pending []*pending
	reasons [NumReasons]uint64 // of packets that belong to no application

	marked     []*conn // to be recorded
	markedApps []*app

	seg   packet.Segment
	icmp  packet.ICMPError
	sight sight // of the packet that is judged
}

// New makes an engine with no applications.
func New(cfg Config) *Engine {
	cfg.defaults()
	return &Engine{
		cfg: cfg, apps: map[string]*app{}, byVIP: map[netip.Addr]*app{}, blocked: map[netip.Addr]bool{}, conns: map[ConnID]*conn{}, alias: map[ConnID]*conn{}, flows: map[flowKey]int{},
		asked: map[Time][]*conn{}, rng: cfg.Seed,
	}
}

// Block drops everything of a VIP until an application is registered on it:
// what was held there before is not known any more.
func (e *Engine) Block(vip netip.Addr) { e.blocked[vip] = true }

// Blocked tells whether vip is blocked.
func (e *Engine) Blocked(vip netip.Addr) bool { return e.blocked[vip] }

// app is one application structure.
type app struct {
	engine *Engine
	name   string
	vips   []netip.Addr
	state  appstate.App
	before appstate.App // where SNAPSHOTSTART came from
	snapID string
	marked bool // to be recorded
	derive bool // changes of connections under way follow from its own record

	include, exclude, outgoing []uint16
	includeNets, excludeNets   []netip.Prefix
	listen                     []uint16 // ports that were listened on at SNAPSHOTSTART

	conns      []*conn
	count      [appstate.Removed + 1]uint32
	translated int // connections
	asked      int // asks without an answer
	askNext    int // index of the connection to ask next
	hand       int // where makeRoom looked last

	behind      bool // it is in a network namespace behind the node
	sealed      bool
	silent      bool // the snapshot is by an image: nothing is told to local
	imaged      bool // and SEAL has compared the two
	restarted   bool // the filter was, in the freeze, and nothing is sealed yet
	passCloses  bool // until the seal
	abortOnData bool
	spool       int  // octets of each connection that are acknowledged while away
	wakeFull    bool // only a full spool, or a FIN, wakes
	heartbeats  []Heartbeat
	boundary    boundary.Kind // in the snapshot under way; None: the turn
	quiet       Time
	since       Time // of SNAPSHOTSTART
	froze       Time
	wake        bool // the restore flag, and from SNAPSHOTDONE on the outstanding request
	wakeWhy     Reason
	wakeAt      Time // when the request goes out again, 0: not outstanding
	wakeTries   uint
	kept        int // octets of memory for payload
	heads       int // and for heads
	syns        []keptSyn
	synIndex    map[ConnID]int // into syns
	synTokens   int
	synTokensAt Time
	expected    map[flowKey][]*conn // in a restore: what local is to open again
	probedAt    Time
	tickAt      Time

	oldNode    string       // that it was taken over from, until the next snapshot
	foreign    bool         // it was taken over and never restored here
	takenBy    string       // the node that has it, in BLOCKDATA
	yielding   bool         // which may not have it yet
	yieldedIn  appstate.App // where it was before
	term, from uint64       // handovers that led to it: in all, up to here

	reasons           [NumReasons]uint64
	bytesIn, bytesOut uint64 // of connections that ended
}

// keptSyn is a SYN for a new connection that waits for RESTORED.
type keptSyn struct {
	id   ConnID
	data []byte
}

// set moves the application to another state: the one door.
func (a *app) set(n appstate.App, fx *Effects, why string) {
	switch n {
	case appstate.SnapshotStart:
		a.before = a.state
	case appstate.SnapshotDone, appstate.RestoreStart, appstate.BlockData: // of connections only what parked derives has changed
		a.mark()
	default:
		a.markAll()
	}
	a.state = n
	fx.Notes = append(fx.Notes, Note{App: a.name, State: n, Text: why})
}

// wants tells whether traffic of local port and remote address is the
// application's, by its lists.
func (a *app) wants(id ConnID) bool {
	p := id.Local.Port()
	if slices.Contains(a.exclude, p) {
		return false
	}
	r := id.Remote.Addr()
	for _, n := range a.excludeNets {
		if n.Contains(r) {
			return false
		}
	}
	if len(a.includeNets) == 0 {
		return true
	}
	for _, n := range a.includeNets {
		if n.Contains(r) {
			return true
		}
	}
	return false
}

// listens tells whether a SYN to port is one for the application's listeners.
func (a *app) listens(port uint16) bool {
	if len(a.include) > 0 && !slices.Contains(a.include, port) {
		return false
	}
	return slices.Contains(a.listen, port)
}

// Step takes one event. It never blocks and, for packets of the steady path,
// allocates nothing.
func (e *Engine) Step(now Time, ev Event, fx *Effects) {
	if ev.Packet != nil {
		e.packet(now, ev.Packet, fx)
	}
	sends := len(fx.Sends)
	if ev.Request != nil {
		e.request(now, ev.Request, fx)
	}
	if len(e.timers) > 0 && e.timers[0] <= now {
		e.passed(now, fx)
	}
	e.tallySends(fx.Sends[sends:])
	if len(e.marked) > 0 || len(e.markedApps) > 0 {
		e.gather(fx)
	}
}

// tick is the beat of an application that is being snapshotted or restored.
func (e *Engine) tick(now Time, a *app, fx *Effects) {
	const beat = 2e6
	switch a.state {
	case appstate.SnapshotStart, appstate.SnapshotFreeze:
		// What is injected into local waits in a short queue of the kernel
		// (net.core.netdev_max_backlog), and answers come through ours: of
		// thousands of asks at once many are lost or answered too late.
		room := maxAsks - a.asked
		n, start := len(a.conns), a.askNext
		for i := range n {
			at := (start + i) % n
			had := room > 0
			e.tickConn(now, a, a.conns[at], &room, fx)
			if had && room <= 0 {
				a.askNext = at + 1
			}
		}
	default:
		return
	}
	a.tickAt = now + beat
	e.at(a.tickAt)
}

// maxAsks bounds how many asks are unanswered.
const maxAsks = 256

func (e *Engine) tickConn(now Time, a *app, c *conn, room *int, fx *Effects) {
	// The end of a handshake can have passed unseen: the socket's answer tells.
	unsure := c.state == appstate.Connect && !c.alive()
	if !c.alive() && !unsure && !c.finOut || c.lingers {
		return
	}
	if a.state == appstate.SnapshotFreeze {
		e.freezeQuiet(now, c)
	}
	if now >= c.askAt {
		c.answered()
	}
	if c.refused != "" || c.sealed || *room <= 0 {
		return
	}
	needs := c.alive() && (!c.learned || c.frozen && !c.confirmed) || (unsure || c.unheard()) && !a.sealed
	if needs && now >= c.askAt {
		e.ask(now, c, fx)
		*room--
	}
	// An acknowledgement of the remote may have passed before everything was
	// captured: it is asked to say it again.
	if (c.frozen || c.finOut) && c.learned && c.ep.SndUna != c.ep.SndNxt && now >= c.probeAt {
		c.probeAt = now + 60e6
		*room--
		sp := c.ep.Probe()
		fx.send(&sp, false)
	}
}

// rand is splitmix64 over the seed.
func (e *Engine) rand() uint64 {
	e.rng += 0x9e3779b97f4a7c15
	z := e.rng
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// newConn makes a connection structure, or nil when the table is full.
func (e *Engine) newConn(now Time, a *app, id ConnID, role appstate.Role, state appstate.Conn, fx *Effects) *conn {
	if e.cfg.ConnsPerApp < e.cfg.MaxConns && len(a.conns) >= e.cfg.ConnsPerApp && !a.giveWay(now, fx) {
		a.reasons[AppTableFull]++
		return nil
	}
	if len(e.conns) >= e.cfg.MaxConns && !e.makeRoom(now, a, fx) {
		a.reasons[TableFull]++
		return nil
	}
	c := &conn{app: a, id: id, role: role, state: state, created: now, index: len(a.conns)}
	c.ep.Local, c.ep.Remote = id.Local, id.Remote
	c.followAnew()
	a.conns = append(a.conns, c)
	a.count[state]++
	e.conns[id] = c
	if a.state.Away() {
		e.mark(c)
	}
	return c
}

// makeRoom has an application give way. The one that needs the room is asked
// first.
func (e *Engine) makeRoom(now Time, a *app, fx *Effects) bool {
	return a.giveWay(now, fx) || slices.ContainsFunc(e.order, func(o *app) bool { return o.giveWay(now, fx) })
}

// giveWay takes a structure away that nothing may depend on: whether its
// handshake ever came to an end is not known, nobody has spoken of it for the
// time that a handshake takes, and at the next snapshot the list of sockets
// tells about it if it lives. A flood costs one look at a few structures for
// each SYN.
func (a *app) giveWay(now Time, fx *Effects) bool {
	const look, handshakeTime = 64, 75e9
	if a.state != appstate.Connected && a.state != appstate.Restored {
		return false
	}
	for range min(look, len(a.conns)) {
		a.hand = (a.hand + 1) % len(a.conns)
		c := a.conns[a.hand]
		if c.state == appstate.Connect && !c.translated && !c.ackSeen && now-c.created > handshakeTime {
			a.engine.remove(c, fx)
			return true
		}
	}
	return false
}

// remove forgets a connection and everything kept for it.
func (e *Engine) remove(c *conn, fx *Effects) {
	a := c.app
	if c.translated {
		e.flow(c, false, fx)
		a.settle(fx)
	}
	if c.chunks {
		c.chunks = false
		fx.Records = append(fx.Records, Record{ID: c.id, Unspool: true})
	}
	if c.saved {
		c.saved = false
		fx.Records = append(fx.Records, Record{ID: c.id})
	}
	e.unkeep(c)
	e.unsay(c)
	e.setPort(c, 0)
	c.answered()
	a.bytesIn += c.bytesIn
	a.bytesOut += c.bytesOut
	c.set(appstate.Removed)
	a.count[appstate.Removed]--
	last := len(a.conns) - 1
	a.conns[c.index] = a.conns[last]
	a.conns[c.index].index = c.index
	a.conns[last] = nil
	a.conns = a.conns[:last]
	delete(e.conns, c.id)
}

// flow puts the connection into the set of translated flows or takes it out. The
// set does not hold local's port: two connections of one remote port to two
// ports of a VIP share an entry, which goes with the last of them.
func (e *Engine) flow(c *conn, add bool, fx *Effects) {
	k := flowKey{c.id.Remote, c.id.Local.Addr()}
	if c.translated = add; add {
		c.app.translated++
		e.flows[k]++
	} else {
		c.app.translated--
		if e.flows[k]--; e.flows[k] > 0 {
			return
		}
		delete(e.flows, k)
	}
	fx.Sets = append(fx.Sets, flowChange(c, add))
}

// flowKey is an entry of the set of translated flows.
type flowKey struct {
	remote netip.AddrPort
	vip    netip.Addr
}

func flowChange(c *conn, add bool) SetChange {
	return SetChange{Set: SetFlow, Add: add, IP: c.id.Remote.Addr(), Port: c.id.Remote.Port(), Peer: c.id.Local.Addr()}
}

// unkeep drops the payload kept for c.
func (e *Engine) unkeep(c *conn) {
	e.kept -= cap(c.kept)
	c.app.kept -= cap(c.kept)
	c.kept, c.keptFin, c.urgent = nil, false, false
	e.dropHead(c)
}

// keepRoom has c.kept hold n octets more, at most most in all, under the budgets
// of memory; false: there is no room.
func (e *Engine) keepRoom(c *conn, n, most int) bool {
	need := len(c.kept) + n
	if need <= cap(c.kept) {
		return true
	}
	left := min(e.cfg.KeepTotal-e.kept, e.cfg.KeepPerApp-c.app.kept)
	grown := max(need, min(2*cap(c.kept), most, cap(c.kept)+left))
	more := grown - cap(c.kept)
	if more > left {
		return false
	}
	e.kept += more
	c.app.kept += more
	k := make([]byte, len(c.kept), grown)
	copy(k, c.kept)
	c.kept = k
	return true
}

// keepUrgent takes note of the urgent pointer of s, octets of which are kept.
func (c *conn) keepUrgent(s *packet.Segment) {
	if u := s.Seq.Add(uint32(s.Urgent)); s.Has(packet.URG) && (!c.urgent || c.keptUrg.Less(u)) {
		c.keptUrg, c.urgent = u, true
	}
}

// keep stores a copy of what s brings at RCV.NXT, under the budgets. It
// reports whether anything of it, or an octet before it, is there. Behind a spool
// that local still takes nothing is kept: it would go to local with it.
func (e *Engine) keep(c *conn, s *packet.Segment) bool {
	if c.spooled {
		return false
	}
	if c.kept == nil {
		c.keptAt = c.ep.RcvNxt
		if c.short() { // what is before it still goes to local
			c.keptAt = c.bound
		}
	}
	have := c.keptAt.Add(uint32(len(c.kept)))
	if have.Less(s.Seq) {
		return false // behind a hole: the remote sends it again
	}
	p := s.Payload()
	if skip := have.Sub(s.Seq); skip > 0 {
		p = p[min(int(skip), len(p)):]
	}
	room := e.cfg.KeepPerConn - len(c.kept)
	whole := len(p) <= room
	if !whole {
		p = p[:room]
	}
	if !e.keepRoom(c, len(p), e.cfg.KeepPerConn) {
		return len(c.kept) > 0
	}
	c.kept = append(c.kept, p...)
	c.keepUrgent(s)
	if s.Has(packet.FIN) && whole && c.keptAt.Add(uint32(len(c.kept))) == s.Seq.Add(uint32(s.PayloadLen())) {
		c.keptFin = true
	}
	return true
}

// askBack is how far below RCV.NXT the octet of an ask lies: far outside any
// window, and not yet ambiguous.
const askBack = 1 << 30
