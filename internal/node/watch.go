package node

import (
	"context"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
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
	n.log.Error("another program changed the packet rules; they are written again, what passed meanwhile was not filtered", "found", strings.Join(found, "; "))
	if _, err := n.do(ctx, &filter.AllSets{}); err != nil && ctx.Err() == nil {
		n.log.Error("the sets of the packet rules may lack entries", "error", err)
	}
	return true
}
