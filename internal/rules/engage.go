package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Engage makes the rules look at everything of active VIPs, or at SYN, FIN and
// RST only: it writes the jumps to the chains that look addresses up in the set,
// and the chain behind routing (NFCF-POST), or takes them away. They are needed
// while something is away or translated. Without them bulk passes one hook less
// on its way out and meets one rule in each that is left, which is what a hook
// costs even when it lets everything pass. behind tells whether a VIP is in a
// network namespace behind the node: without it bulk is spared the look-up by
// its source; once written, that one stays while anything is active. Install
// leaves everything in place. A chain POSTROUTING that nobody uses is removed
// too (iptables-nft). Nothing to do is no error and starts no process.
func (m *Manager) Engage(on, behind bool) error {
	m.iptables.Lock()
	defer m.iptables.Unlock()
	to := m.cfg
	to.idle = !on
	to.near = on && !behind && (m.cfg.idle || m.cfg.near)
	if to == m.cfg {
		return nil
	}
	families := m.active()
	errs := make([]error, len(families))
	var wg sync.WaitGroup
	for i, f := range families { // a snapshot waits for it: at once
		wg.Go(func() { errs[i] = m.ns.do(func() error { return engage(f, m.cfg, to) }) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	m.cfg = to
	return nil
}

// engage writes what differs between the rules of two configurations that both
// are ours but for what Engage switches.
func engage(f *family, from, to Config) error {
	full := to
	full.idle, full.near = false, false
	old, now := chains(f, from), chains(f, to)
	text := map[string]string{} // of each table
	for _, c := range chains(f, full) {
		have, want := find(old, c.name), find(now, c.name)
		var b strings.Builder
		if have == nil && want != nil {
			for _, r := range c.rules {
				fmt.Fprintf(&b, "-A %s %s\n", c.name, r.spec)
			}
		}
		for _, j := range have.jumps() {
			if !slices.Contains(want.jumps(), j) {
				fmt.Fprintf(&b, "-D %s %s\n", c.hook, j)
			}
		}
		for i, j := range want.jumps() {
			if !slices.Contains(have.jumps(), j) {
				fmt.Fprintf(&b, "-I %s %d %s\n", c.hook, c.behind+i+1, j)
			}
		}
		if have != nil && want == nil {
			fmt.Fprintf(&b, "-X %s\n", c.name)
		}
		if (have == nil) != (want == nil) {
			text[c.table] = fmt.Sprintf(":%s - [0:0]\n", c.name) + text[c.table]
		}
		text[c.table] += b.String()
	}
	batch := ""
	for _, table := range []string{"raw", "mangle"} {
		if text[table] != "" {
			batch += "*" + table + "\n" + text[table] + "COMMIT\n"
		}
	}
	if _, err := runTool(to, batch, f.iptables+"-restore", "-w", lockWait, "--noflush"); err != nil {
		return err
	}
	if to.idle {
		// Fails where others have rules in it, and with iptables-legacy: then it stays.
		_, _ = runTool(to, "", f.iptables, "-w", lockWait, "-t", "mangle", "-X", "POSTROUTING")
	}
	return nil
}

// find returns the chain of that name, nil where there is none.
func find(list []chain, name string) *chain {
	for i := range list {
		if list[i].name == name {
			return &list[i]
		}
	}
	return nil
}
