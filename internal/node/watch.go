package node

import (
	"context"
	"strings"
	"time"
)

// watchRules looks after the packet rules until ctx ends: those that another
// program took away are written again, and what belongs into the sets is added.
func (n *Node) watchRules(ctx context.Context) {
	every := func() time.Duration {
		if n.engaged.Load() > 0 {
			return 10 * time.Second
		}
		return time.Minute
	}
	err := n.rules.Watch(ctx, every, func() bool { return n.repair(ctx) })
	if err != nil {
		n.log.Warn("packet rules that others change are not repaired", "error", err)
	}
}

const (
	// setsActive is the time between two looks at the sets while something is
	// away or translated: a remote with a keepalive of 1 s x 3 must not give up.
	setsActive = time.Second
	setsIdle   = time.Minute
)

// watchSets looks after the contents of the sets until ctx ends: the kernel
// tells nobody of changes in them.
func (n *Node) watchSets(ctx context.Context) {
	last := time.Now()
	tick := time.NewTicker(setsActive)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n.engaged.Load() > 0 || time.Since(last) >= setsIdle {
			n.repairSets(ctx)
			last = time.Now()
		}
	}
}

func (n *Node) repairSets(ctx context.Context) {
	found, err := n.rules.RepairSets()
	if len(found) > 0 {
		n.repairedSets.Add(1)
		n.log.Error("another program changed the sets of the packet rules; they are as they should be again, what passed meanwhile was not filtered", "found", strings.Join(found, "; "))
	}
	if err != nil && ctx.Err() == nil {
		n.log.Error("the sets of the packet rules cannot be looked at or repaired", "error", err)
	}
}

// repair tells whether anything was amiss.
func (n *Node) repair(ctx context.Context) bool {
	found, err := n.rules.Repair()
	if err != nil {
		n.log.Error("the packet rules cannot be looked at", "error", err)
		return false
	}
	if len(found) == 0 {
		return false
	}
	n.repairedRules.Add(1)
	n.log.Error("another program changed the packet rules; they are written again, what passed meanwhile was not filtered", "found", strings.Join(found, "; "))
	n.repairSets(ctx) // those that had to be made are empty
	return true
}
