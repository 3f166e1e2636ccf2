package rules

import (
	"fmt"
	"strings"
)

// Engage makes the rules look at everything of active VIPs, or at SYN, FIN and
// RST only: it writes the jumps to the chains that look addresses up in the set,
// and the chain behind routing (NFCF-POST), or takes them away. They are needed
// while something is away or translated. Without them bulk passes one hook less
// on its way out and meets one rule in each that is left, which is what a hook
// costs even when it lets everything pass. Install leaves them in place. A
// chain POSTROUTING that nobody uses is removed too (iptables-nft). Nothing to
// do is no error and starts no process.
func (m *Manager) Engage(on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on == !m.cfg.idle {
		return nil
	}
	return m.ns.do(func() error {
		for _, f := range m.active() {
			if err := engage(f, m.cfg, on); err != nil {
				return err
			}
		}
		m.cfg.idle = !on
		return nil
	})
}

func engage(f *family, cfg Config, on bool) error {
	cfg.idle = false
	text := map[string]string{} // of each table
	all := chains(f, cfg)
	for i := range all {
		c := &all[i]
		post := c.name == ChainPost
		var b strings.Builder
		switch {
		case on && post:
			for _, r := range c.rules {
				fmt.Fprintf(&b, "-A %s %s\n", c.name, r.spec)
			}
			for i, j := range c.jumps() {
				fmt.Fprintf(&b, "-I %s %d %s\n", c.hook, i+1, j)
			}
		case on:
			fmt.Fprintf(&b, "-I %s 2 %s\n", c.hook, c.jumps()[1])
		case post:
			for _, j := range c.jumps() {
				fmt.Fprintf(&b, "-D %s %s\n", c.hook, j)
			}
			fmt.Fprintf(&b, "-X %s\n", c.name)
		default:
			fmt.Fprintf(&b, "-D %s %s\n", c.hook, c.jumps()[1])
		}
		if post {
			text[c.table] = fmt.Sprintf(":%s - [0:0]\n", c.name) + text[c.table]
		}
		text[c.table] += b.String()
	}
	batch := "*raw\n" + text["raw"] + "COMMIT\n*mangle\n" + text["mangle"] + "COMMIT\n"
	if _, err := runTool(cfg, batch, f.iptables+"-restore", "-w", lockWait, "--noflush"); err != nil {
		return err
	}
	if !on {
		// Fails where others have rules in it, and with iptables-legacy: then it stays.
		_, _ = runTool(cfg, "", f.iptables, "-w", lockWait, "-t", "mangle", "-X", "POSTROUTING")
	}
	return nil
}
