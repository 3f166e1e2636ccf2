package rules

import (
	"fmt"
	"io"
	"strings"
)

// Print writes the rules of cfg as a shell script that an operator can read, and run as root with the same
// result as Install. It needs no privileges itself. The only errors are a faulty cfg and those of w.
func Print(w io.Writer, cfg Config) error {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString("#!/bin/sh\n# Packet rules of nfconnfilter. Sets say for whom they work; the filter fills and empties these.\n")
	b.WriteString("# Packets in a queue without --queue-bypass are dropped while no filter runs.\n" +
		"# For a first set-up and for reading: a second run empties the chains for a moment, the filter itself does not.\nset -e\n")
	for _, f := range families() {
		fmt.Fprintf(&b, "\n# ---- %s ----\n", f.name())
		if f.v6 {
			fmt.Fprintf(&b, "%s -t raw -S >/dev/null 2>&1 || exit 0   # no IPv6 here\n", f.iptables)
		}
		printSets(&b, f, cfg)
		all := chains(f, cfg)
		b.WriteString("\n")
		for i := range all {
			cmd := f.iptables + " -w -t " + all[i].table
			fmt.Fprintf(&b, "%s -N %s 2>/dev/null || %s -F %s\n", cmd, all[i].name, cmd, all[i].name)
		}
		for i := range all {
			printChain(&b, f, &all[i])
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

var setHelp = [numSets]string{
	VIP:    "VIPs: SYN, FIN, RST are queued",
	Full:   "VIPs with full capture",
	Away:   "VIPs whose application is away: full capture, no bypass",
	Active: "VIPs with anything away or translated: looked at, ICMP errors queued",
	Skip:   "VIP and port that are never captured",
	Flow:   "remote, remote port, VIP of translated flows",
}

func printSets(b *strings.Builder, f *family, cfg Config) {
	inet := "inet"
	if f.v6 {
		inet = "inet6"
	}
	for _, s := range AllSets() {
		line := fmt.Sprintf("ipset create -exist %s %s family %s maxelem %d", f.setName(s), s.typeName(), inet, s.maxElem(cfg))
		fmt.Fprintf(b, "%-79s # %s\n", line, setHelp[s])
	}
}

func printChain(b *strings.Builder, f *family, c *chain) {
	cmd := f.iptables + " -w -t " + c.table
	fmt.Fprintf(b, "\n# %s: %s\n", c.name, c.why)
	for _, r := range c.rules {
		fmt.Fprintf(b, "# %s\n%s -A %s %s\n", r.why, cmd, c.name, r.spec)
	}
	fmt.Fprintf(b, "# first in %s\n", c.hook)
	for i, j := range c.jumps() {
		fmt.Fprintf(b, "while %s -D %s %s 2>/dev/null; do :; done\n%s -I %s %d %s\n", cmd, c.hook, j, cmd, c.hook, c.behind+i+1, j)
	}
}
