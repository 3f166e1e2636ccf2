package node

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/rules"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// pin has the rules behind routing written, in the caller's goroutine: that
// starts a process, for which packets must not wait. They stay until the answer
// to its request at least.
func (n *Node) pin() (unpin func(), err error) {
	n.engMu.Lock()
	defer n.engMu.Unlock()
	n.pins++
	return func() {
		n.engMu.Lock()
		n.pins--
		n.engMu.Unlock()
		n.disengage()
	}, n.engage()
}

// engage writes the rules, with those for VIPs behind the node where there are
// such. Where that cannot be told they are written.
func (n *Node) engage() error {
	behind, err := n.behind()
	if err != nil {
		n.log.Warn("rules for network namespaces behind the node are written, needed or not", "error", err)
	}
	return n.rules.Engage(true, behind || err != nil)
}

// behind tells whether a VIP is not the node's own address.
func (n *Node) behind() (bool, error) {
	vips, err := n.rules.List(rules.VIP)
	if err != nil {
		return false, err
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	own := map[netip.Addr]bool{}
	for _, a := range all {
		if p, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(p.IP); ok {
				own[ip.Unmap()] = true
			}
		}
	}
	for _, c := range vips {
		if !own[c.IP] {
			return true, nil
		}
	}
	return false, nil
}

// disengage takes the rules behind routing away when no VIP is active and no
// request is about to make one so.
func (n *Node) disengage() {
	n.engMu.Lock()
	defer n.engMu.Unlock()
	if n.pins > 0 || n.engaged.Load() > 0 {
		return
	}
	if err := n.rules.Engage(false, false); err != nil {
		n.log.Warn("the rules behind routing stay; bulk is a little slower", "error", err)
	}
}

// countActive follows the set of active VIPs. It tells whether the last one has
// left it.
func (n *Node) countActive(changes []filter.SetChange) (last bool) {
	was := len(n.active)
	for _, c := range changes {
		switch {
		case c.Set != filter.SetActive:
		case c.Add:
			n.active[c.IP] = true
		default:
			delete(n.active, c.IP)
		}
	}
	n.engaged.Store(int32(len(n.active)))
	return was > 0 && len(n.active) == 0
}

// tracking tells whether connection tracking has any entry here.
func tracking() bool {
	b, err := os.ReadFile("/proc/thread-self/net/stat/nf_conntrack")
	if err != nil {
		return !os.IsNotExist(err)
	}
	return conntrackEntries(b) != 0
}

// conntrackEntries reads the number of entries, in hexadecimal the first word
// of the second line (net/netfilter/nf_conntrack_standalone.c).
func conntrackEntries(stat []byte) int64 {
	_, rows, _ := strings.Cut(string(stat), "\n")
	f := strings.Fields(rows)
	if len(f) == 0 {
		return -1
	}
	n, err := strconv.ParseInt(f[0], 16, 64)
	if err != nil {
		return -1
	}
	return n
}

// applyAgain is the wait before set changes that failed are tried again.
const applyAgain = 200 * time.Millisecond

// apply makes the set changes in n.changes. Those that fail stay there: engine
// and sets must not drift apart.
func (n *Node) apply() error {
	err := n.rules.Apply(n.changes)
	if err != nil {
		n.changes, n.failedAt = latest(n.changes), now()
		n.log.Error("switching the packet rules failed; it is tried again", "changes", len(n.changes), "error", err)
		return fmt.Errorf("switching the packet rules failed, it is tried again: %w", err)
	}
	n.changes = n.changes[:0]
	return nil
}

// latest drops changes that later ones make void.
func latest(changes []rules.Change) []rules.Change {
	last := make(map[rules.Change]int, len(changes))
	key := func(c rules.Change) rules.Change {
		c.Add = false
		return c
	}
	for i, c := range changes {
		last[key(c)] = i
	}
	out := changes[:0]
	for i, c := range changes {
		if last[key(c)] == i {
			out = append(out, c)
		}
	}
	return out
}
