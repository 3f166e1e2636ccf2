// Package node drives the verdict engine of one node: it owns the clock and the
// loop, orders effects and joins the edges. All packets and requests go
// through one goroutine, so the engine needs no lock.
package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/inject"
	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/internal/nfq"
	"github.com/nfconnfilter/nfconnfilter/internal/rules"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// Node is the filter of one node.
type Node struct {
	log   *slog.Logger
	cfg   atomic.Pointer[config.Config]
	queue *nfq.Queue
	inj   *inject.Injector
	rules *rules.Manager

	journal   *journal.Journal
	unsaved   []journal.Entry
	unsavedAt filter.Time // when the first of them came
	chunks    uint64      // pieces of spools that were recorded, ever
	owed      bool        // they should be on the disk already

	instance string // another one for each start
	ends     *failpoint.Points

	engine *filter.Engine
	fx     filter.Effects
	sent   int   // of fx.Sends
	failed error // while doing what fx holds

	mu      sync.Mutex
	inbox   []*call
	states  map[string]string // of applications that are not unknown
	changed chan struct{}     // closed and replaced when a state changes
	stopped bool

	engMu   sync.Mutex // guards pins and the writing of the rules behind routing
	pins    int        // requests under way that need them
	engaged atomic.Int32

	repairedRules, repairedSets atomic.Uint64 // what other programs had changed

	signs *signs
	gap   atomic.Pointer[Gap] // before this filter

	active     map[netip.Addr]bool // VIPs in the set of that name; their number is in engaged
	calls      map[uint64]*call    // of the loop's goroutine
	nextID     uint64
	flows      []rules.TCPFlow
	changes    []rules.Change // not made yet
	failedAt   filter.Time    // when making them failed last
	wg         sync.WaitGroup
	background context.Context // ends with Run
	leave      context.CancelFunc

	foreign foreign
}

// call is a request on its way to the engine and back.
type call struct {
	body  any
	gone  <-chan struct{} // closed when its caller has gone away
	done  chan result
	after func() // called in the loop's background when it is answered, may be nil
}

type result struct {
	body any
	err  error
}

// errStopping answers requests that come while the filter ends.
var errStopping = errors.New("the filter is stopping")

// Open installs the rules and opens the queue and the raw sockets, in the
// calling thread's network namespace. Errors name what is missing. ends are where tests of
// crashes have the process end; nil: nowhere.
func Open(cfg *config.Config, log *slog.Logger, ends *failpoint.Points) (*Node, error) {
	q := cfg.Node.Queue
	var seed [8]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return nil, err
	}
	n := &Node{log: log, ends: ends, states: map[string]string{}, changed: make(chan struct{}),
		active: map[netip.Addr]bool{}, calls: map[uint64]*call{}}
	n.background, n.leave = context.WithCancel(context.Background())
	n.cfg.Store(cfg)
	n.instance = strconv.FormatUint(binary.LittleEndian.Uint64(seed[:]), 36)
	l := cfg.Node.Limits
	n.engine = filter.New(filter.Config{
		MaxConns: q.MaxConnections, ConnsPerApp: l.ConnectionsPerApp,
		KeepPerConn: int(l.KeptBytesPerConnection), KeepPerApp: int(l.KeptBytesPerApp), KeepTotal: int(l.KeptBytes),
		MaxSyns: l.PendingSYNsPerApp, SynsTotal: l.PendingSYNs,
		Seed: binary.LittleEndian.Uint64(seed[:]),
	})
	var err error
	if n.queue, err = nfq.Open(nfq.Config{Queue: q.First, RecvBuf: 64 << 20}); err != nil {
		return nil, err
	}
	left, err := n.openJournal(cfg.Node.StateDir)
	if err != nil {
		n.Close()
		return nil, err
	}
	if n.signs, err = openSigns(cfg.Node.StateDir, left.boot); err != nil {
		log.Warn("the next filter will not know how long nobody filtered", "error", err)
	}
	mark := q.Mark
	if n.inj, err = inject.Open(inject.Config{Mark: mark | rules.MarkNoTrack, TrackedMark: mark | rules.MarkTracked}); err != nil {
		n.Close()
		return nil, err
	}
	// The queue is open before any rule sends packets into it.
	if n.rules, err = rules.Install(RulesConfig(cfg)); err != nil {
		n.Close()
		return nil, err
	}
	if err := n.rules.IPv6(); err != nil {
		log.Info("no IPv6 rules on this node", "reason", err)
	}
	if err := n.takeUp(left); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// RulesConfig is the part of the configuration that the packet rules need.
func RulesConfig(cfg *config.Config) rules.Config {
	q := cfg.Node.Queue
	return rules.Config{Queue: q.First, Count: int(q.Count), Mark: q.Mark, Mask: q.MarkMask,
		MaxElem: uint32(q.MaxConnections), LockDir: cfg.Node.StateDir}
}

// registerApp is the REGISTER request for application a.
func registerApp(cfg *config.Config, a *config.App) *filter.Register {
	f := cfg.Cluster.Filter
	return &filter.Register{
		App: a.Name, VIPs: a.VIPs, Include: append(append([]uint16(nil), f.IncludePorts...), a.IncludePorts...),
		Outgoing: a.OutgoingPorts, Exclude: append(append([]uint16(nil), f.ExcludePorts...), a.ExcludePorts...),
		IncludeAddresses: f.IncludeAddresses, ExcludeAddrs: f.ExcludeAddresses,
	}
}

// Close lets go of the edges. Rules and sets stay: an application that runs is
// passed by, one that is away stays silent.
func (n *Node) Close() {
	n.leave()
	if n.rules != nil {
		_ = n.rules.Close()
	}
	if n.inj != nil {
		_ = n.inj.Close()
	}
	if n.queue != nil {
		_ = n.queue.Close()
	}
	if n.journal != nil {
		if err := n.save(); err != nil {
			n.log.Error("the last records are lost", "error", err)
		}
		_ = n.journal.Close()
	}
	if n.signs != nil {
		n.signs.close()
	}
}

// Config is the configuration in force; it is not changed.
func (n *Node) Config() *config.Config { return n.cfg.Load() }

// SetConfig makes a configuration that was read again the one in force.
func (n *Node) SetConfig(cfg *config.Config) {
	cfg.Generation = n.cfg.Load().Generation + 1
	n.cfg.Store(cfg)
}

// now is CLOCK_BOOTTIME in ns: it goes on while the machine is suspended.
func now() filter.Time {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return ts.Nano()
}

// Run filters until ctx ends. What else asks of n should have ended by then:
// nobody filters from there on.
func (n *Node) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, n.queue.Wake)
	defer stop()
	defer n.wg.Wait()
	defer n.stop()
	watch := n.background
	defer n.leave()
	n.wg.Go(func() { n.watchRules(watch) })
	n.wg.Go(func() { n.watchSets(watch) })
	n.wg.Go(func() { service{n, n.do}.resumeYields(watch) })
	n.wg.Go(func() { n.signLife(watch) })
	defer n.foreign.close()
	defer func() { n.signs.sign(now(), true) }()
	pkts := make([]nfq.Packet, 64)
	var fp filter.Packet
	for ctx.Err() == nil {
		n.takeCalls()
		n.flush()
		var deadline time.Time
		if d := n.engine.NextDeadline(); d != 0 {
			left := d - now()
			if left <= 0 {
				n.step(filter.Event{})
				n.flush()
				left = max(n.engine.NextDeadline()-now(), 1)
			}
			// Packets that wait are taken even when the deadline is past: a
			// slow beat must not keep the queue from being read.
			deadline = time.Now().Add(time.Duration(left))
		}
		if len(n.changes) > 0 { // they failed
			if at := time.Now().Add(applyAgain); deadline.IsZero() || at.Before(deadline) {
				deadline = at
			}
			if now()-n.failedAt >= int64(applyAgain) {
				_ = n.apply()
			}
		}
		if len(n.unsaved) > 0 {
			left := time.Duration(n.unsavedAt + int64(lazyFor) - now())
			if left <= 0 {
				if err := n.save(); err != nil {
					n.log.Error(err.Error())
				}
				left = lazyFor
			}
			if at := time.Now().Add(left); deadline.IsZero() || at.Before(deadline) {
				deadline = at
			}
		}
		k, err := n.queue.Recv(pkts, deadline)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("receive from the packet queue: %w", err)
		}
		n.batch(pkts[:k], &fp)
	}
	return nil
}

// batch steps through packets that came together. Their verdicts leave
// together, then what they made us send.
func (n *Node) batch(pkts []nfq.Packet, fp *filter.Packet) {
	if len(pkts) == 0 {
		return
	}
	t := now()
	ev := filter.Event{Packet: fp}
	for i := range pkts {
		p := &pkts[i]
		*fp = filter.Packet{Hook: p.Hook, Info: p.SkbInfo, Truncated: p.Truncated(), Data: p.Payload}
		before := len(n.fx.Sends)
		n.engine.Step(t, ev, &n.fx)
		if before > n.sent && n.fx.Verdict != filter.Drop {
			// What passes must not overtake what earlier packets made us send: to
			// the remote an acknowledgement with an older timestamp is none (PAWS).
			n.act(before)
		}
		switch n.fx.Verdict {
		case filter.Accept:
			n.queue.Accept(p.ID)
		case filter.Modified:
			n.queue.AcceptModified(p.ID, n.fx.Out)
		default:
			n.queue.Drop(p.ID)
		}
		if n.fx.Heavy() {
			n.flush()
		}
	}
	n.flush()
}

func (n *Node) step(ev filter.Event) { n.engine.Step(now(), ev, &n.fx) }

// flush does what the engine wants done, in the order of filter.Effects.
func (n *Node) flush() {
	n.act(len(n.fx.Sends))
	n.tell(n.failed)
	n.fx.Reset()
	n.sent, n.failed = 0, nil
}

// act does what comes before replies, with the sends up to the given one.
// Errors gather in n.failed.
func (n *Node) act(sends int) {
	fx := &n.fx
	if err := n.record(fx.Records); err != nil {
		n.log.Error(err.Error())
		n.failed = errors.Join(n.failed, err)
	}
	clear(fx.Records)
	fx.Records = fx.Records[:0]
	if err := n.payOwed(); err != nil {
		n.failed = errors.Join(n.failed, err)
	}
	if len(fx.Untrack) > 0 && tracking() {
		n.flows = n.flows[:0]
		for _, f := range fx.Untrack {
			n.flows = append(n.flows, rules.TCPFlow{Local: f.Local, Remote: f.Remote})
		}
		if _, err := n.rules.DeleteConntrack(n.flows); err != nil {
			n.log.Warn("connection tracking entries are still there", "error", err)
		}
		n.reach(failpoint.Untracked)
	}
	fx.Untrack = fx.Untrack[:0]
	if len(fx.Sets) > 0 {
		last := n.countActive(fx.Sets)
		for _, c := range fx.Sets {
			n.changes = append(n.changes, rules.Change{Set: setOf[c.Set], Add: c.Add, IP: c.IP, Port: c.Port, Peer: c.Peer})
		}
		n.reach(failpoint.Sets)
		if err := n.apply(); err != nil {
			n.failed = errors.Join(n.failed, err)
		}
		n.reach(failpoint.Switched)
		if last {
			n.wg.Go(n.disengage)
		}
		fx.Sets = fx.Sets[:0]
	}
	n.reach(failpoint.Verdicts)
	if err := n.queue.Flush(); err != nil {
		n.log.Error("verdicts were refused", "error", err)
	}
	n.reach(failpoint.Judged)
	if sends > n.sent {
		for _, s := range fx.Sends[n.sent:sends] {
			n.inj.Add(s.Data, s.Tracked)
		}
		n.sent = sends
		n.reach(failpoint.Send)
		if _, err := n.inj.Flush(); err != nil {
			n.log.Warn("packets were not sent", "error", err)
		}
		n.reach(failpoint.Sent)
	}
}

var setOf = [...]rules.Set{
	filter.SetVIP: rules.VIP, filter.SetFull: rules.Full, filter.SetAway: rules.Away,
	filter.SetActive: rules.Active, filter.SetSkip: rules.Skip, filter.SetFlow: rules.Flow,
}

// reach is called at each boundary of an effect.
func (n *Node) reach(boundary string) {
	n.ends.Here(boundary, func() []string {
		n.mu.Lock()
		defer n.mu.Unlock()
		return slices.Collect(maps.Values(n.states))
	})
}

// tell hands on notes, replies and restore requests.
func (n *Node) tell(failed error) {
	fx := &n.fx
	if len(fx.Notes) > 0 {
		n.mu.Lock()
		for _, x := range fx.Notes {
			if s := x.State.String(); s == "" {
				delete(n.states, x.App)
			} else {
				n.states[x.App] = s
			}
		}
		close(n.changed)
		n.changed = make(chan struct{})
		n.mu.Unlock()
		for _, x := range fx.Notes {
			n.log.Info(x.Text, "app", x.App, "state", x.State.String())
		}
	}
	for _, r := range fx.Replies {
		c := n.calls[r.ID]
		if c == nil {
			if r.Err != nil {
				n.log.Error("request failed", "error", r.Err)
			}
			continue
		}
		delete(n.calls, r.ID)
		if r.Err == nil {
			r.Err = failed
		}
		n.reach(failpoint.Reply)
		n.answer(c, result{r.Body, r.Err})
		n.reach(failpoint.Replied)
	}
	for _, r := range fx.Restores {
		n.reach(failpoint.Call)
		n.wg.Go(func() { n.requestRestore(n.background, r) })
	}
}

// takeCalls steps through the requests that wait.
func (n *Node) takeCalls() {
	n.mu.Lock()
	in := n.inbox
	n.inbox = nil
	n.mu.Unlock()
	for _, c := range in {
		select {
		case <-c.gone: // it has been told that this did not happen
			n.answer(c, result{nil, context.Canceled})
			continue
		default:
		}
		n.nextID++
		n.calls[n.nextID] = c
		n.step(filter.Event{Request: &filter.Request{ID: n.nextID, Body: c.body}})
		n.flush()
	}
}

func (n *Node) stop() {
	n.mu.Lock()
	n.stopped = true
	in := n.inbox
	n.inbox = nil
	n.mu.Unlock()
	for _, c := range in {
		n.answer(c, result{nil, errStopping})
	}
	for id, c := range n.calls {
		delete(n.calls, id)
		n.answer(c, result{nil, errStopping})
	}
}

// answer gives c its result. The caller may have gone away.
func (n *Node) answer(c *call, r result) {
	c.done <- r
	if c.after != nil {
		n.wg.Go(c.after)
	}
}

// do has the loop carry out one request and waits for its answer.
func (n *Node) do(ctx context.Context, body any) (any, error) {
	c := &call{body: body, gone: ctx.Done(), done: make(chan result, 1)}
	switch body.(type) {
	case *filter.SnapshotStart, *filter.RestoreStart: // a restored application may be in another place
		unpin, err := n.pin()
		if err != nil {
			unpin()
			return nil, err
		}
		c.after = unpin
	}
	n.mu.Lock()
	if n.stopped {
		n.mu.Unlock()
		if c.after != nil {
			c.after()
		}
		return nil, errStopping
	}
	n.inbox = append(n.inbox, c)
	n.mu.Unlock()
	n.queue.Wake()
	select {
	case r := <-c.done:
		return r.body, r.err
	case <-ctx.Done():
		return nil, ctx.Err() // the request still takes effect; repeating it is safe
	}
}

// waitState blocks until the application is in state, or ctx ends.
func (n *Node) waitState(ctx context.Context, app, state string) error {
	for {
		n.mu.Lock()
		s, ch := n.states[app], n.changed
		n.mu.Unlock()
		if s == state {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (n *Node) state(app string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.states[app]
}
