package rules

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// How long, in seconds, iptables-legacy waits for another program that holds its lock. The nftables variant
// retries its transaction by itself.
const lockWait = "10"

const defaultLock = "/run/xtables.lock"

// lookTool finds a command on PATH or in the directories for system programs, which an unprivileged user's
// PATH often leaves out.
func lookTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("rules: the command %s is not there: install the package iptables (%w)", name, exec.ErrNotFound)
}

// runTool runs one iptables command with input and returns its standard output. It does its own exec because
// the lock file's place goes in by environment.
func runTool(cfg Config, input, name string, args ...string) (string, error) {
	path, err := lookTool(name)
	if err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(input)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if cfg.LockDir != "" && !canOpenLock() {
		cmd.Env = append(cmd.Env, "XTABLES_LOCKFILE="+filepath.Join(cfg.LockDir, "xtables.lock"))
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := children.run(cmd); err != nil {
		return "", explain(name, args, input, errOut.String(), err)
	}
	return out.String(), nil
}

// canOpenLock is false for a process without the right to use the common lock file, the only case in which
// another one is taken: a lock that the other programs do not share protects less.
func canOpenLock() bool {
	err := unix.Access(defaultLock, unix.R_OK|unix.W_OK)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Access(filepath.Dir(defaultLock), unix.W_OK)
	}
	return err == nil
}

var failedLine = regexp.MustCompile(`line:? (\d+)`)

// features says what the kernel needs for the words of a rule.
var features = []struct{ word, feature string }{
	{"-j NFQUEUE", "the NFQUEUE target (CONFIG_NETFILTER_XT_TARGET_NFQUEUE)"},
	{"-j CT", "the CT target (CONFIG_NETFILTER_XT_TARGET_CT)"},
	{"-m set", "the set match (CONFIG_NETFILTER_XT_SET)"},
	{"-m rpfilter", "the reverse path match (CONFIG_IP_NF_MATCH_RPFILTER, CONFIG_IP6_NF_MATCH_RPFILTER)"},
	{"-m addrtype", "the address type match (CONFIG_NETFILTER_XT_MATCH_ADDRTYPE)"},
	{"-m mark", "the mark match (CONFIG_NETFILTER_XT_MARK)"},
	{"*raw", "the raw table (CONFIG_IP_NF_RAW, CONFIG_IP6_NF_RAW)"},
	{"*mangle", "the mangle table (CONFIG_IP_NF_MANGLE, CONFIG_IP6_NF_MANGLE)"},
}

// explain turns iptables' complaint into an error that names the remedy.
func explain(name string, args []string, input, stderr string, err error) error {
	msg := strings.Join(strings.Fields(stderr), " ")
	if msg == "" {
		msg = err.Error()
	}
	text := fmt.Sprintf("rules: %s: %s", strings.Join(append([]string{name}, args...), " "), msg)
	low := strings.ToLower(stderr)
	switch {
	case strings.Contains(low, "xtables lock"), strings.Contains(low, "xtables.lock"):
		return fmt.Errorf("%s (another program holds the lock of iptables, or state_dir is not writable)", text)
	case strings.Contains(low, "permission denied"), strings.Contains(low, "operation not permitted"),
		strings.Contains(low, "can't open socket to ipset"):
		return fmt.Errorf("%s (needs CAP_NET_ADMIN and CAP_NET_RAW): %w", text, os.ErrPermission)
	}
	line := ""
	if m := failedLine.FindStringSubmatch(stderr); m != nil {
		n, _ := strconv.Atoi(m[1])
		if lines := strings.Split(input, "\n"); n >= 1 && n <= len(lines) {
			line = lines[n-1]
		}
	}
	if line != "" {
		text += fmt.Sprintf(" (line: %s)", line)
	}
	var need []string
	for _, f := range features {
		if strings.Contains(line, f.word) {
			need = append(need, f.feature)
		}
	}
	if len(need) > 0 {
		text += "; the kernel may lack " + strings.Join(need, " or ")
	}
	return errors.New(text)
}

// tableRules is what `iptables -S` says about one table: chain name to its rules, without the chain's name.
// A chain that exists has an entry, if only an empty one.
type tableRules map[string][]string

func readTable(f *family, cfg Config, table string) (tableRules, error) {
	out, err := runTool(cfg, "", f.iptables, "-w", lockWait, "-t", table, "-S")
	if err != nil {
		return nil, err
	}
	return parseTable(out), nil
}

func parseTable(out string) tableRules {
	t := tableRules{}
	for line := range strings.Lines(out) {
		w := strings.SplitN(strings.TrimSpace(line), " ", 3)
		if len(w) < 2 {
			continue
		}
		switch w[0] {
		case "-P", "-N":
			t[w[1]] = append(t[w[1]], []string{}...)
		case "-A":
			spec := ""
			if len(w) == 3 {
				spec = w[2]
			}
			t[w[1]] = append(t[w[1]], spec)
		}
	}
	return t
}

// has tells whether the chain holds exactly these rules.
func (t tableRules) has(name string, want []string) bool {
	got, ok := t[name]
	if !ok || len(got) != len(want) {
		return false
	}
	for i := range got {
		if got[i] != want[i] {
			return false
		}
	}
	return true
}

// jumps finds the rules of a hook that lead to c, in any words, and tells
// whether they are ours and in their place.
func (t tableRules) jumps(c *chain) (have []string, right bool) {
	for _, spec := range t[c.hook] {
		if strings.HasSuffix(" "+spec, " -j "+c.name) {
			have = append(have, spec)
		}
	}
	want := c.jumps()
	end := c.behind + len(want)
	right = len(have) == len(want) && (len(want) == 0 || len(t[c.hook]) >= end && slices.Equal(t[c.hook][c.behind:end], want))
	return have, right
}

// wantKey names a chain of a family in Manager.want.
func wantKey(f *family, c *chain) string { return f.prefix + c.name }

func specs(c *chain) []string {
	out := make([]string, len(c.rules))
	for i, r := range c.rules {
		out[i] = r.spec
	}
	return out
}

// installRules writes the chains of a family that are missing or differ and puts their jumps in the first
// place, a table in one transaction. What iptables then prints goes into want, for Verify: another version of
// iptables may print the same rule in other words.
func installRules(f *family, cfg Config, want map[string][]string) error {
	all := chains(f, cfg)
	for _, table := range []string{"raw", "mangle"} {
		have, err := readTable(f, cfg, table)
		if err != nil {
			return err
		}
		if batch := restoreInput(table, all, have); batch != "" {
			if _, err := runTool(cfg, batch, f.iptables+"-restore", "-w", lockWait, "--noflush"); err != nil {
				return err
			}
			if have, err = readTable(f, cfg, table); err != nil {
				return err
			}
		}
		for i := range all {
			c := &all[i]
			if c.table != table {
				continue
			}
			if len(have[c.name]) != len(c.rules) {
				return fmt.Errorf("rules: %s chain %s in table %s has %d rules after it was written, expected %d: another program changes it",
					f.name(), c.name, table, len(have[c.name]), len(c.rules))
			}
			want[wantKey(f, c)] = have[c.name]
		}
	}
	return nil
}

// restoreInput returns what iptables-restore --noflush must read to bring a table to our chains, "" when
// nothing is to be done.
func restoreInput(table string, all []chain, have tableRules) string {
	var decl, body strings.Builder
	for i := range all {
		c := &all[i]
		if c.table != table {
			continue
		}
		if !have.has(c.name, specs(c)) {
			// A declared chain is emptied, also with --noflush.
			fmt.Fprintf(&decl, ":%s - [0:0]\n", c.name)
			for _, r := range c.rules {
				fmt.Fprintf(&body, "-A %s %s\n", c.name, r.spec)
			}
		}
		if old, right := have.jumps(c); !right {
			for _, spec := range old {
				fmt.Fprintf(&body, "-D %s %s\n", c.hook, spec)
			}
			for i, spec := range c.jumps() {
				fmt.Fprintf(&body, "-I %s %d %s\n", c.hook, c.behind+i+1, spec)
			}
		}
	}
	if decl.Len() == 0 && body.Len() == 0 {
		return ""
	}
	return "*" + table + "\n" + decl.String() + body.String() + "COMMIT\n"
}

func verifyRules(f *family, cfg Config, want map[string][]string) ([]string, error) {
	var out []string
	say := func(format string, args ...any) { out = append(out, f.name()+": "+fmt.Sprintf(format, args...)) }
	all := chains(f, cfg)
	for _, table := range []string{"raw", "mangle"} {
		have, err := readTable(f, cfg, table)
		if err != nil {
			return nil, err
		}
		for i := range all {
			c := &all[i]
			if c.table != table {
				continue
			}
			_, there := have[c.name]
			switch {
			case !there:
				say("chain %s in table %s is missing", c.name, table)
			case !have.has(c.name, want[wantKey(f, c)]):
				say("chain %s in table %s was changed", c.name, table)
			}
			switch found, right := have.jumps(c); {
			case len(found) < len(c.jumps()):
				say("a jump to %s in table %s, chain %s is missing", c.name, table, c.hook)
			case !right:
				say("the jumps to %s in table %s are no longer the first rules of %s", c.name, table, c.hook)
			}
		}
	}
	return out, nil
}

// purgeRules removes our jumps and chains of a family.
func purgeRules(f *family, cfg Config) error {
	all := chains(f, cfg)
	for _, table := range []string{"raw", "mangle"} {
		have, err := readTable(f, cfg, table)
		if err != nil {
			return err
		}
		var decl, body strings.Builder
		for i := range all {
			c := &all[i]
			if c.table != table {
				continue
			}
			found, _ := have.jumps(c)
			for _, spec := range found {
				fmt.Fprintf(&body, "-D %s %s\n", c.hook, spec)
			}
			if _, there := have[c.name]; there {
				fmt.Fprintf(&decl, ":%s - [0:0]\n", c.name)
				fmt.Fprintf(&body, "-X %s\n", c.name)
			}
		}
		if body.Len() == 0 {
			continue
		}
		batch := "*" + table + "\n" + decl.String() + body.String() + "COMMIT\n"
		if _, err := runTool(cfg, batch, f.iptables+"-restore", "-w", lockWait, "--noflush"); err != nil {
			return err
		}
	}
	return nil
}
