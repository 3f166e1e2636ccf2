package rules

import (
	"fmt"
	"strings"
)

// Engage writes the chain behind routing (NFCF-POST and its jump), or takes it
// away. It is needed while something is away or translated. Without it bulk
// passes one hook less on its way out, which is what a hook costs even when it
// lets everything pass; SYN, FIN and RST are then queued in raw OUTPUT. Install
// leaves the chain in place. A chain POSTROUTING that nobody uses is removed
// too (iptables-nft). Nothing to do is no error and starts no process.
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
	var decl, body strings.Builder
	hooks := map[string]string{} // table by hook
	for _, c := range chains(f, cfg) {
		if c.name != ChainPost {
			continue
		}
		hooks[c.hook] = c.table
		fmt.Fprintf(&decl, "*%s\n:%s - [0:0]\n", c.table, c.name)
		if !on {
			fmt.Fprintf(&body, "-D %s %s\n-X %s\n", c.hook, c.jump(), c.name)
			continue
		}
		for _, r := range c.rules {
			fmt.Fprintf(&body, "-A %s %s\n", c.name, r.spec)
		}
		fmt.Fprintf(&body, "-I %s 1 %s\n", c.hook, c.jump())
	}
	if _, err := runTool(cfg, decl.String()+body.String()+"COMMIT\n", f.iptables+"-restore", "-w", lockWait, "--noflush"); err != nil {
		return err
	}
	if !on {
		for hook, table := range hooks {
			// Fails where others have rules in it, and with iptables-legacy: then it stays.
			_, _ = runTool(cfg, "", f.iptables, "-w", lockWait, "-t", table, "-X", hook)
		}
	}
	return nil
}
