package sim

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

// world is one run.
type world struct {
	opt   Options
	seed  uint64
	clk   *scheduler
	trace *trace
	rep   Report
	err   error

	vips       []netip.Addr
	remote     *host
	local      *host
	localConf  hostConfig
	localDelay int64
	localLoss  float64 // of what is injected into the local stack
	behind     bool    // the application is in a network namespace behind the node
	cubic      bool    // of the remotes
	booted     int64   // when the node's clock began
	rebooted   bool    // no filter has run since the node was started anew
	offload    bool    // checksums of local are left to the device
	injects    *rand.Rand
	up, down   *link
	node       *node
	shim       *shim
	check      *checker
	clients    []*client
	byAddr     map[netip.AddrPort]*client
	dials      []*dial
	byDial     map[netip.AddrPort]*dial
	server     *server
	agent      *agent
	beats      *beats // nil: none

	engine      *filter.Engine // nil: no filter runs
	fx          filter.Effects
	deadline    *event
	engines     uint64 // how many there were
	store       filtertest.Store
	unsaved     []filter.Record
	saveAt      *event
	dies        stage               // where the filter ends in its next step
	impatient   bool                // a client's keepalive gives up within seconds
	emptyLost   map[netip.Addr]bool // see link.loses
	state       appstate.App
	hush        bool
	calm        bool // the link is healthy, and nothing is done any more
	calmAt      int64
	outsiderSyn bool // a SYN of an outsider may wake the application
	reqs        uint64
	replies     map[uint64]filter.Reply
	rand        func(purpose uint64) *rand.Rand
}

// stage is a boundary between two effects of a step.
type stage uint8

const (
	lives stage = iota
	beforeRecords
	afterRecords
	afterSets
	afterVerdict
	afterSends
	stages
)

// fail notes the first violated invariant.
func (w *world) fail(format string, a ...any) {
	if w.err != nil {
		return
	}
	what := fmt.Sprintf(format, a...)
	w.trace.note("VIOLATION %s", what)
	w.err = &Violation{Seed: w.seed, What: what, At: w.clk.time(), Trace: w.trace.last(w.opt.traceLines())}
}

// hushed tells that remotes are to say nothing new.
func (w *world) hushed() bool { return w.hush }

// step gives the engine one event and does what it wants done. on takes the
// packet of the event when it goes on.
func (w *world) step(ev filter.Event, on func([]byte)) {
	w.fx.Reset()
	w.engine.Step(w.nodeTime(), ev, &w.fx)
	w.effects(ev.Packet, on)
	if w.engine != nil {
		w.planDeadline()
	}
}

func (w *world) planDeadline() {
	at := w.engine.NextDeadline()
	if at != 0 {
		at += w.booted
	}
	if w.deadline != nil && w.deadline.index >= 0 {
		if at == w.deadline.at {
			return
		}
		w.clk.cancel(w.deadline)
	}
	w.deadline = nil
	if at != 0 {
		w.deadline = w.clk.at(at, func() {
			if w.engine != nil {
				w.step(filter.Event{}, nil)
			}
		})
	}
}

// effects does what the engine wants done, in the order that Effects asks for.
// An engine that is to end ends between two of them.
func (w *world) effects(p *filter.Packet, on func([]byte)) {
	fx := &w.fx
	if w.endsAt(beforeRecords) {
		return
	}
	w.record(fx.Records)
	if w.endsAt(afterRecords) {
		return
	}
	for _, c := range fx.Sets {
		w.node.change(c)
	}
	for _, n := range fx.Notes {
		w.trace.note("%s %s: %s", n.App, n.State, n.Text)
		w.state = n.State
	}
	if w.endsAt(afterSets) {
		return
	}
	if p != nil {
		w.verdict(p, on)
	}
	if w.endsAt(afterVerdict) {
		return
	}
	for _, s := range fx.Sends {
		w.inject(s.Data)
	}
	if w.endsAt(afterSends) {
		return
	}
	for _, r := range fx.Replies {
		w.replies[r.ID] = r
		w.clk.at(w.clk.time(), w.agent.resume)
	}
	for range fx.Restores {
		w.agent.wanted()
	}
}

func (w *world) verdict(p *filter.Packet, on func([]byte)) {
	fx := &w.fx
	w.rep.Reasons[fx.Reason]++
	switch fx.Verdict {
	case filter.Drop:
		w.rep.Dropped++
		w.trace.packet("dropped", fx.Reason.String(), p.Data)
	case filter.Accept:
		w.trace.add(line{where: "accepted", text: fx.Reason.String()})
		on(p.Data)
	case filter.Modified:
		b := append([]byte(nil), fx.Out...)
		w.trace.packet("modified", fx.Reason.String(), b)
		w.check.wellFormed(b)
		// What passes the next hook comes as a packet of its own.
		on(b)
	}
}

// inject sends a packet of the engine.
func (w *world) inject(b []byte) {
	b = append([]byte(nil), b...)
	w.rep.Injected++
	w.check.wellFormed(b)
	for _, v := range w.vips {
		if dst(b) == v {
			w.trace.packet("injected", "to local", b)
			if w.behind && len(b) > localMTU {
				w.fail("a packet of %d octets is injected into a link that takes %d", len(b), localMTU)
			}
			if w.injects.Float64() < w.localLoss {
				w.trace.note("and lost") // a busy queue
				return
			}
			w.toLocal(b)
			return
		}
	}
	w.trace.packet("injected", "to remote", b)
	w.toRemote(b)
}

func dst(b []byte) netip.Addr {
	if b[0]>>4 == 6 {
		return netip.AddrFrom16([16]byte(b[24:40]))
	}
	return netip.AddrFrom4([4]byte(b[16:20]))
}

// record keeps records as the driver does: the end of a connection waits for
// the next lasting record, at most a second.
func (w *world) record(rs []filter.Record) {
	lasting := false
	for _, r := range rs {
		lasting = lasting || r.Lasting()
		w.unsaved = append(w.unsaved, r)
	}
	if lasting {
		w.save()
	} else if len(w.unsaved) > 0 && w.saveAt == nil {
		w.saveAt = w.clk.after(1e9, w.save)
	}
}

func (w *world) save() {
	w.store.Apply(w.unsaved)
	w.unsaved = nil
	w.clk.cancel(w.saveAt)
	w.saveAt = nil
}

// endsAt lets the filter end at a stage, if it is to and may.
func (w *world) endsAt(s stage) bool {
	if w.dies != s {
		return false
	}
	if w.dies = lives; w.waited() { // since this end was planned
		return false
	}
	w.crash()
	return true
}

// crash ends the filter: what it knew is lost, what it recorded is there.
func (w *world) crash() {
	w.trace.note("the filter ends")
	w.rep.Crashes++
	w.dies = lives
	w.engine = nil
	for _, c := range w.clients {
		w.emptyLost[c.addr.Addr()] = true
	}
	w.unsaved = nil
	w.clk.cancel(w.saveAt)
	w.clk.cancel(w.deadline)
	w.saveAt, w.deadline = nil, nil
	r := w.rand(100 + w.engines)
	most := time.Duration(4e9)
	if w.impatient {
		most = 500e6
	}
	w.clk.after(logDuration(r, 1e6, most), w.newFilter)
	w.clk.at(w.clk.time(), w.agent.resume)
}

// nodeTime is CLOCK_BOOTTIME of the node.
func (w *world) nodeTime() filter.Time { return w.clk.time() - w.booted }

// reboot starts the node anew while the application is away: its clock, sockets
// and sets begin anew, and it hears nothing until the filter runs.
func (w *world) reboot(seed uint64) {
	if w.state != appstate.SnapshotDone || w.server.up || w.err != nil || w.waited() {
		return
	}
	w.trace.note("the node is started anew")
	w.rep.Reboots++
	if w.engine != nil {
		w.crash()
	}
	w.rebooted, w.booted = true, w.clk.time()-int64(5*time.Second)
	w.node = newNode()
	w.newLocal(seed)
}

// newFilter starts a filter that takes up what an earlier one recorded.
func (w *world) newFilter() {
	w.engines++
	w.trace.note("a filter starts")
	w.engine = filter.New(filter.Config{Seed: w.seed<<8 + w.engines})
	apps, conns := w.store.Records()
	known := func(id filter.ConnID) bool { // as internal/node reckons it
		return w.node.flows[flowKey{id.Remote, id.Local.Addr()}] || w.node.sets[filter.SetAway][id.Local.Addr()]
	}
	w.fx.Reset()
	if err := w.engine.Load(w.nodeTime(), apps, conns, known, w.rebooted, &w.fx); err != nil {
		w.fail("records are refused: %v", err)
		return
	}
	w.rebooted = false
	for _, a := range apps {
		w.state = a.State
	}
	w.clearSets()
	w.effects(nil, nil)
	if w.engine != nil {
		w.planDeadline()
	}
}

// clearSets has everything taken out of the sets that no record explains.
func (w *world) clearSets() {
	wanted := map[filter.SetChange]bool{}
	for _, c := range w.fx.Sets {
		wanted[c] = true
	}
	for _, s := range []filter.Set{filter.SetFull, filter.SetAway, filter.SetActive} {
		for _, v := range w.vips {
			c := filter.SetChange{Set: s, Add: true, IP: v}
			if w.node.sets[s][v] && !wanted[c] {
				c.Add = false
				w.fx.Sets = append(w.fx.Sets, c)
			}
		}
	}
	for _, k := range w.flowKeys() {
		c := filter.SetChange{Set: filter.SetFlow, Add: true, IP: k.remote.Addr(), Port: k.remote.Port(), Peer: k.vip}
		if !wanted[c] {
			c.Add = false
			w.fx.Sets = append(w.fx.Sets, c)
			w.trace.note("the flow of %v is not recorded", k.remote)
		}
	}
}
