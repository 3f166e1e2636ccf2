// Package scheduler decides what the application scheduler routine does: which
// node restores an application that is held, which application hibernates, and
// which one moves off a loaded node.
//
// It is pure. The driver tells it what the nodes' agents answer (Observe,
// Unreachable), which restore requests arrive (Request) and how actions ended
// (Done), each with the time; Step gives the actions to begin now and notes for
// the log. The same calls give the same actions. All that it knows comes from
// the configuration and from the nodes, so that nothing is lost with it.
//
// What it never does: take over what a node holds that does not answer; act
// twice at the same time for one application; believe what a node said before
// the last action for the application ended.
package scheduler

import (
	"net/netip"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// Config is what the decisions depend on besides the nodes' state.
type Config struct {
	Nodes []string // in the order of cluster.toml
	Apps  map[string]App
	Balance
}

// App is one application of the configuration.
type App struct {
	VIPs []netip.Addr
	// Nodes may run it; empty: every node.
	Nodes []string
	// HibernateAfter is the time without payload before a snapshot; 0: never.
	HibernateAfter time.Duration
}

// Balance says when applications move by load. A High of 0 is off.
type Balance struct {
	High, Low float64 // of one CPU on the average
	// Cooldown is the least time between two moves of a node; 0: DefaultCooldown.
	Cooldown time.Duration
}

// DefaultCooldown is the time that load averages of a minute need to show a move.
const DefaultCooldown = time.Minute

// NodeStatus is what a node's agent answered.
type NodeStatus struct {
	Node string
	// At is when it was asked, by the clock of the other times.
	At time.Time
	// Load is of one CPU on the average, 1 fully used; negative: not known.
	Load float64
	Apps []AppStatus
}

// AppStatus is one application on one node.
type AppStatus struct {
	Name       string
	State      appstate.App
	SnapshotID string
	// Operation is what the agent does with it right now, "" when nothing.
	Operation string
	// MayRun tells that its file is valid there and allows the node; Fault why not.
	MayRun bool
	Fault  string
	// Idle is the time since payload was seen, heartbeats aside; negative: not known.
	Idle             time.Duration
	RestoreRequested bool
	Connections      int
	OldNode, TakenBy string
}

// running tells that the application serves its remotes there.
func (a AppStatus) running() bool {
	return a.State == appstate.Connected || a.State == appstate.Restored
}

// Kind is what an action does.
type Kind string

// Kinds of actions.
const (
	Restore  Kind = "restore"
	Snapshot Kind = "snapshot"
	Migrate  Kind = "migrate"
)

// Action is one request to a node's agent.
type Action struct {
	Kind Kind
	App  string
	Node string // whose agent is asked
	// SnapshotID and Holder are of a restore: the snapshot, and the node that
	// holds the connections where that is another.
	SnapshotID, Holder string
	To                 string // of a migration
	Reason             string
}

// Note is a line for the log. It is given once until it changes.
type Note struct {
	App, Node string
	Text      string
	Warn      bool
}

// Backoff spaces repetitions of what fails.
type Backoff struct {
	next time.Time
	wait time.Duration
}

// Due tells whether it may be tried again.
func (b *Backoff) Due(now time.Time) bool { return !now.Before(b.next) }

// Failed puts the next try off: by first, then twice as long each time, by
// most at the most.
func (b *Backoff) Failed(now time.Time, first, most time.Duration) {
	b.wait = min(max(2*b.wait, first), most)
	b.next = now.Add(b.wait)
}

// Worked ends the row of failures.
func (b *Backoff) Worked() { *b = Backoff{} }
