package rules

import "fmt"

// rule is one rule of a chain: its words as `iptables -S` prints them, and what it is for.
type rule struct {
	spec string
	why  string
}

// chain is one of our chains and the place that calls it.
type chain struct {
	table, hook, name string
	why               string
	edge, active      string // what leads to it: SYN, FIN and RST; everything of active VIPs
	asks              string // and what the filter injects to them
	behind            int    // how many jumps of other chains of ours stand before its own
	idle              bool   // nothing is active
	rules             []rule
}

// jumps are rules of the hook, the first there behind those of other chains of
// ours, in order. Bulk of a node where nothing is active meets one of them only.
func (c *chain) jumps() []string {
	if c == nil {
		return nil
	}
	if c.idle {
		return c.edges()
	}
	jumps := append(c.edges(), c.active+" -j "+c.name)
	if c.asks != "" {
		jumps = append(jumps, c.asks+" -j "+c.name)
	}
	return jumps
}

func (c *chain) edges() []string {
	if c.edge == "" { // called by another chain
		return nil
	}
	return []string{c.edge + "-j " + c.name}
}

// chains returns the rules of one family. Their words are in the order in which iptables prints them, because
// Install compares the two and rewrites a chain that differs.
func chains(f *family, cfg Config) []chain {
	q := fmt.Sprintf("-j NFQUEUE --queue-num %d", cfg.Queue)
	bypass := q + " --queue-bypass"
	set := func(s Set, dir string) string { return "-m set --match-set " + f.setName(s) + " " + dir }
	const edge = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE "

	noTrack := rule{fmt.Sprintf("-m mark --mark 0x%x -j CT --notrack", cfg.Mark|MarkNoTrack),
		"injected by the filter, not for connection tracking"}
	ours := rule{fmt.Sprintf("-m mark --mark 0x%x/0x%x -j RETURN", cfg.Mark, cfg.Mask),
		"our own packets are never queued again"}

	in := chain{table: "raw", hook: "PREROUTING", name: ChainIn, why: "remote to local",
		edge: edge, active: set(Active, "dst"), idle: cfg.idle, rules: []rule{
			noTrack, ours,
			{"-i lo -j RETURN", "the node itself may always talk to the VIP"},
			{set(Skip, "dst,dst") + " -j RETURN", "ports that are never captured"},
			{"-p tcp " + set(Away, "dst") + " " + q, "application away: everything, dropped without a filter"},
			{"-p tcp " + set(Flow, "src,src,dst") + " " + q, "translated flows, dropped without a filter"},
			{"-p tcp " + set(Full, "dst") + " " + bypass, "full capture"},
			{edge + set(VIP, "dst") + " " + bypass, "else only SYN, FIN and RST"},
		}}
	for _, t := range f.errTypes {
		in.rules = append(in.rules, rule{
			fmt.Sprintf("-p %s %s %d %s %s", f.icmp, f.icmpOpt, t.num, set(Active, "dst"), bypass),
			"ICMP errors: " + t.name})
	}
	in.rules = append(in.rules, rule{"-p tcp " + set(VIP, "src") + " -j " + ChainForward,
		"from an application in a network namespace behind the node"})
	forward := chain{table: "raw", hook: "PREROUTING", name: ChainForward,
		why:    "local to remote, from a network namespace behind the node, before connection tracking",
		active: set(Active, "src"), behind: len(in.jumps()), idle: cfg.idle || cfg.near, rules: []rule{
			{"-m rpfilter --invert -j DROP", "it did not come from where the VIP is: a forged address"},
			{"-m addrtype --dst-type LOCAL -j RETURN", "the node itself may always talk to the VIP"},
			{set(Skip, "src,src") + " -j RETURN", "ports that are never captured"},
			{"-p tcp " + set(Away, "src") + " " + q, "application away: sealed or held, dropped without a filter"},
			{edge + set(VIP, "src") + " " + bypass, "else only SYN, FIN and RST"},
		}}
	out := chain{table: "raw", hook: "OUTPUT", name: ChainOut, why: "local to remote, before connection tracking",
		edge: edge, active: set(Active, "src"), asks: set(Active, "dst"), idle: cfg.idle, rules: []rule{
			noTrack, ours,
			{"-o lo -j RETURN", "the node itself may always talk to the VIP"},
			{set(Skip, "src,src") + " -j RETURN", "ports that are never captured"},
			{"-p tcp " + set(Away, "src") + " " + q, "application away: sealed or held, dropped without a filter"},
			{edge + set(VIP, "src") + " " + bypass, "else only SYN, FIN and RST"},
		}}
	reset := chain{table: "raw", hook: "OUTPUT", name: ChainReset,
		why:    "RST of this node, while anything is away or translated: the guard for sets that another program empties",
		active: "-p tcp -m tcp --tcp-flags RST RST", behind: len(out.jumps()), idle: cfg.idle, rules: []rule{
			ours,
			{"-o lo -j RETURN", "the node itself may always talk to the VIP"},
			{"-p tcp " + bypass, "whether it is for a held connection the filter knows without a set"},
		}}
	post := chain{table: "mangle", hook: "POSTROUTING", name: ChainPost, why: "local to remote, after connection tracking",
		edge: edge, active: set(Active, "src"), rules: []rule{
			ours,
			{"-o lo -j RETURN", "the node itself may always talk to the VIP"},
			{set(Skip, "src,src") + " -j RETURN", "ports that are never captured"},
			{"-p tcp " + set(Flow, "dst,dst,src") + " " + q, "translated flows, dropped without a filter"},
			{edge + set(Away, "src") + " " + q, "application away: a SYN-ACK that OUTPUT let by for connection tracking, dropped without a filter"},
			{"-p tcp " + set(Full, "src") + " " + bypass, "full capture"},
			{edge + set(VIP, "src") + " " + bypass, "else only SYN, FIN and RST"},
		}}
	if cfg.idle {
		return []chain{in, forward, out, reset}
	}
	return []chain{in, forward, out, reset, post}
}
