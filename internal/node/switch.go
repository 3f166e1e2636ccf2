package node

import (
	"os"
	"strconv"
	"strings"

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
	}, n.rules.Engage(true)
}

// disengage takes the rules behind routing away when no VIP is active and no
// request is about to make one so.
func (n *Node) disengage() {
	n.engMu.Lock()
	defer n.engMu.Unlock()
	if n.pins > 0 || n.engaged.Load() > 0 {
		return
	}
	if err := n.rules.Engage(false); err != nil {
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
