package scheduler

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

const (
	// Back-off of restores after every node was tried.
	restoreFirst, restoreMost = time.Second, time.Minute
	// askLife is how long a request waits for somebody to hold its
	// application. The filter that holds it repeats the request, and its node
	// says so as well.
	askLife = time.Minute
)

// Scheduler holds what was told, until it is told anew. It is not for several
// goroutines at once.
type Scheduler struct {
	cfg   Config
	nodes map[string]*node
	apps  map[string]*app
	notes []Note
}

// node is what is known of one node.
type node struct {
	status NodeStatus
	seen   bool // status is an answer
	down   bool // it did not answer when it was asked last
	asked  time.Time
	rested time.Time // no move before
	said   string
}

// app is what the scheduler does for one application.
type app struct {
	asked   time.Time // a request that nothing came of yet; zero: none
	running *Action
	ended   time.Time // of the last action; what was seen before does not count

	held    string          // node and snapshot that tried belongs to
	tried   map[string]bool // nodes where the restore failed
	restore Backoff
	sleep   Backoff

	moveFails int
	left      map[string]bool // nodes that it was moved off for their load
	said      string
}

// New makes a scheduler that knows no node's state yet.
func New(cfg Config) *Scheduler {
	s := &Scheduler{nodes: map[string]*node{}, apps: map[string]*app{}}
	s.Configure(cfg)
	return s
}

// Configure takes a new configuration. What is under way goes on.
func (s *Scheduler) Configure(cfg Config) {
	if cfg.Cooldown <= 0 {
		cfg.Cooldown = DefaultCooldown
	}
	s.cfg = cfg
	for _, n := range cfg.Nodes {
		if s.nodes[n] == nil {
			s.nodes[n] = &node{}
		}
	}
	maps.DeleteFunc(s.nodes, func(n string, _ *node) bool { return !slices.Contains(cfg.Nodes, n) })
	for name := range cfg.Apps {
		if s.apps[name] == nil {
			s.apps[name] = &app{tried: map[string]bool{}, left: map[string]bool{}}
		}
	}
	maps.DeleteFunc(s.apps, func(name string, a *app) bool {
		_, there := cfg.Apps[name]
		return !there && a.running == nil
	})
}

// Request takes a restore request for a VIP. The error says that no
// application has it. Repeated while it is being served it changes nothing.
func (s *Scheduler) Request(now time.Time, vip netip.Addr) error {
	for _, name := range s.names() {
		if !slices.ContainsFunc(s.cfg.Apps[name].VIPs, func(v netip.Addr) bool { return v.Unmap() == vip.Unmap() }) {
			continue
		}
		a := s.apps[name]
		if a.asked.IsZero() && (a.running == nil || a.running.Kind != Restore) {
			a.asked = now
		}
		return nil
	}
	return fmt.Errorf("no application has the VIP %s", vip)
}

// Observe takes a node's answer. Answers of nodes that are not configured, and
// those that are older than what is known, are ignored.
func (s *Scheduler) Observe(st NodeStatus) {
	n := s.nodes[st.Node]
	if n == nil || st.At.Before(n.asked) {
		return
	}
	if n.down && n.said != "" {
		s.notes = append(s.notes, Note{Node: st.Node, Text: "the node answers again"})
	}
	n.status, n.seen, n.down, n.asked, n.said = st, true, false, st.At, ""
	for _, p := range st.Apps {
		// Where it is now it is no burden: it may go anywhere again.
		if a := s.apps[p.Name]; a != nil && p.running() && st.Load >= 0 && st.Load < s.cfg.High && !st.At.Before(n.rested) {
			clear(a.left)
		}
	}
}

// Unreachable says that a node did not answer when it was asked at that time.
func (s *Scheduler) Unreachable(name string, at time.Time, why string) {
	n := s.nodes[name]
	if n == nil || at.Before(n.asked) {
		return
	}
	n.down, n.asked = true, at
	if n.said == "" {
		s.notes = append(s.notes, Note{Node: name, Warn: true, Text: "the node does not answer; what it holds is not taken over: " + why})
		n.said = why
	}
}

// Done says that an action ended; failure is "" when it succeeded.
func (s *Scheduler) Done(now time.Time, done Action, failure string) {
	a := s.apps[done.App]
	if a == nil || a.running == nil || *a.running != done {
		return
	}
	a.running, a.ended, a.said = nil, now, ""
	switch done.Kind {
	case Restore:
		if failure != "" {
			a.tried[done.Node] = true
			return
		}
		a.asked = time.Time{}
		clear(a.tried)
		a.restore.Worked()
		a.sleep.Worked()
	case Snapshot:
		if failure != "" {
			a.sleep.Failed(now, SleepFirst, SleepMost)
			return
		}
		a.sleep.Worked()
	case Migrate:
		for _, name := range []string{done.Node, done.To} {
			if n := s.nodes[name]; n != nil {
				n.rested = now.Add(s.cfg.Cooldown)
			}
		}
		if failure != "" {
			a.moveFails++
			return
		}
		a.moveFails = 0
		a.left[done.Node] = true
	}
}

// Step gives the actions that are to begin now. Each is taken for under way
// until Done.
func (s *Scheduler) Step(now time.Time) ([]Action, []Note) {
	var out []Action
	for _, name := range s.names() {
		a := s.apps[name]
		if a.running != nil {
			continue
		}
		act := s.restore(now, name, a)
		if act == nil {
			act = s.hibernate(now, name, a)
		}
		if act != nil {
			a.running = act
			out = append(out, *act)
		}
	}
	for _, act := range s.balance(now) {
		s.apps[act.App].running = &act
		out = append(out, act)
	}
	for name, a := range s.apps { // gone from the configuration meanwhile
		if _, there := s.cfg.Apps[name]; !there && a.running == nil {
			delete(s.apps, name)
		}
	}
	notes := s.notes
	s.notes = nil
	return out, notes
}

// names lists the applications in an order that is always the same.
func (s *Scheduler) names() []string { return slices.Sorted(maps.Keys(s.cfg.Apps)) }

// say notes something of an application, once until it changes.
func (s *Scheduler) say(name string, a *app, warn bool, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if a.said != text {
		a.said = text
		s.notes = append(s.notes, Note{App: name, Text: text, Warn: warn})
	}
}

// place is an application on one node.
type place struct {
	name string
	node *node
	AppStatus
	// fresh: the node answers, and was asked after the last action for the
	// application had ended. Otherwise it is what was known.
	fresh bool
}

// busy tells that something is being done to the application there.
func (p place) busy() bool {
	switch p.State {
	case appstate.SnapshotStart, appstate.SnapshotFreeze, appstate.RestoreStart:
		return true
	}
	return p.Operation != ""
}

// places gives what is known of an application on every node.
func (s *Scheduler) places(name string, a *app) []place {
	out := make([]place, 0, len(s.cfg.Nodes))
	for _, nn := range s.cfg.Nodes {
		n := s.nodes[nn]
		p := place{name: nn, node: n, fresh: n.seen && !n.down && !n.status.At.Before(a.ended)}
		if i := slices.IndexFunc(n.status.Apps, func(x AppStatus) bool { return x.Name == name }); i >= 0 {
			p.AppStatus = n.status.Apps[i]
		} else {
			p.Fault = "the node does not know the application"
		}
		out = append(out, p)
	}
	return out
}

// allowed tells whether the configuration here lets a node run an application.
func (s *Scheduler) allowed(app, node string) bool {
	list := s.cfg.Apps[app].Nodes
	return len(list) == 0 || slices.Contains(list, node)
}

// byLoad orders nodes, the least loaded first, those whose load is not known
// last.
func byLoad(a, b *node) int {
	x, y := a.status.Load, b.status.Load
	switch {
	case x < 0 && y < 0, x == y:
		return 0
	case x < 0 || y >= 0 && x > y:
		return 1
	}
	return -1
}
