package rules

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	vip4 = netip.MustParseAddr("192.0.2.100")
	vip6 = netip.MustParseAddr("2001:db8::100")
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestInstallIsIdempotent(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	if err := m.IPv6(); err != nil {
		t.Errorf("no IPv6: %v", err)
	}
	first := state(t, ns)
	must(t, m.Apply([]Change{{Set: Away, Add: true, IP: vip4}, {Set: VIP, Add: true, IP: vip6}}))
	// A counter survives only when the chain is not written again.
	sh(t, ns, "iptables-restore --noflush --counters <<E\n*raw\n[7:700] -A NFCF-OUT -j RETURN\nCOMMIT\nE\niptables -t raw -D NFCF-OUT -j RETURN")
	withEntries := state(t, ns)
	handle := sh(t, ns, "nft -a list table ip raw; nft -a list table ip6 mangle")

	m2 := install(t, ns, Config{Queue: 64})
	if got := state(t, ns); got != withEntries {
		t.Errorf("a second Install changed something:\n%s\nwas\n%s", got, withEntries)
	}
	if got := sh(t, ns, "nft -a list table ip raw; nft -a list table ip6 mangle"); got != handle {
		t.Errorf("a second Install wrote the rules again:\n%s\nwas\n%s", got, handle)
	}
	for _, s := range []Set{Away, VIP} {
		list, err := m2.List(s)
		if err != nil || len(list) != 1 {
			t.Errorf("set %s holds %v, %v after a second Install", s, list, err)
		}
	}
	must(t, m2.Clear(AllSets()...))
	if got := state(t, ns); got != first {
		t.Errorf("after Clear:\n%s\nwas\n%s", got, first)
	}
}

func TestInstallReplacesOtherConfig(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64, MaxElem: 1000})
	flow := Change{Set: Flow, Add: true, IP: netip.MustParseAddr("198.51.100.1"), Port: 4000, Peer: vip4}
	must(t, m.Apply([]Change{flow}))
	sh(t, ns, "iptables -t raw -I PREROUTING 1 -p udp -j ACCEPT; iptables -t raw -A OUTPUT -j NFCF-OUT")

	m2 := install(t, ns, Config{Queue: 65, MaxElem: 5000})
	if list, err := m2.List(Flow); err != nil || !slices.Equal(list, []Change{flow}) {
		t.Errorf("the flows are %v, %v after a change of size", list, err)
	}
	got := state(t, ns)
	if strings.Contains(got, "queue-num 64") || !strings.Contains(got, "nfcf4-flow hash:ip,port,ip family inet hashsize 1024 maxelem 5000") {
		t.Errorf("old values are left:\n%s", got)
	}
	if strings.Contains(got, "-new") {
		t.Errorf("a temporary set is left:\n%s", got)
	}
	pre := sh(t, ns, "iptables -t raw -S PREROUTING; iptables -t raw -S OUTPUT")
	if !strings.Contains(pre, " src -j NFCF-FWD\n-A PREROUTING -p udp -j ACCEPT\n") || strings.Count(pre, "NFCF-OUT") != 3 {
		t.Errorf("the jumps are not right:\n%s", pre)
	}
}

func TestVerifyAndRepair(t *testing.T) {
	for _, c := range []struct{ name, harm, want string }{
		{"flush raw", "iptables -t raw -F", "chain NFCF-IN in table raw was changed"},
		{"flush jumps", "iptables -t raw -F PREROUTING", "jump to NFCF-IN"},
		{"flush forwarded", "iptables -t raw -F NFCF-FWD", "chain NFCF-FWD in table raw was changed"},
		{"flush mangle", "iptables -t mangle -F; iptables -t mangle -X", "chain NFCF-POST in table mangle is missing"},
		{"flush IPv6", "ip6tables -t raw -F", "IPv6: chain NFCF-IN"},
		{"rule altered", "iptables -t raw -R NFCF-IN 5 -j ACCEPT", "NFCF-IN in table raw was changed"},
		{"rule before ours", "iptables -t raw -I OUTPUT -j ACCEPT", "no longer the first rules of OUTPUT"},
		{"everything by nft", "nft flush ruleset; for i in 1 2 3 4 5 6 7 8 9 10; do ipset destroy 2>/dev/null && break; sleep 0.1; done", "set nfcf4-away is missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := newNS(t)
			m := install(t, ns, Config{Queue: 64})
			if lines, err := m.Verify(); err != nil || len(lines) > 0 {
				t.Fatalf("right after Install: %q, %v", lines, err)
			}
			sh(t, ns, c.harm)
			lines, err := m.Verify()
			if err != nil || !strings.Contains(strings.Join(lines, "\n"), c.want) {
				t.Errorf("got %q, %v; want %q", lines, err, c.want)
			}
			if found, err := m.Repair(); err != nil || strings.Join(found, "") != strings.Join(lines, "") {
				t.Errorf("repaired: %q, %v; want %q", found, err, lines)
			}
			m2 := install(t, ns, Config{Queue: 64})
			if lines, err := m2.Verify(); err != nil || len(lines) > 0 {
				t.Errorf("not repaired: %q, %v", lines, err)
			}
			if lines, err := m.Verify(); err != nil || len(lines) > 0 {
				t.Errorf("the first manager sees: %q, %v", lines, err)
			}
		})
	}
}

func TestApplyAndList(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	remote4, remote6 := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:1::7")
	add := []Change{
		{Set: VIP, Add: true, IP: vip4}, {Set: VIP, Add: true, IP: vip6}, {Set: Full, Add: true, IP: vip4}, {Set: Away, Add: true, IP: vip4},
		{Set: Active, Add: true, IP: vip6}, {Set: Skip, Add: true, IP: vip4, Port: 22},
		{Set: Flow, Add: true, IP: remote4, Port: 40000, Peer: vip4}, {Set: Flow, Add: true, IP: remote6, Port: 40000, Peer: vip6},
	}
	del := slices.Clone(add)
	for i := range del {
		del[i].Add = false
	}
	list := func() (all []Change) {
		for _, s := range AllSets() {
			l, err := m.List(s)
			must(t, err)
			all = append(all, l...)
		}
		return all
	}
	for range 2 { // the second time everything is there already
		must(t, m.Apply(add))
		if got := list(); !slices.Equal(got, add) {
			t.Errorf("got  %+v\nwant %+v", got, add)
		}
	}
	// ipset itself must read the entries as we mean them.
	saved := sh(t, ns, "ipset save")
	for _, w := range []string{"add nfcf4-skip 192.0.2.100,tcp:22\n", "add nfcf4-flow 198.51.100.7,tcp:40000,192.0.2.100\n",
		"add nfcf6-flow 2001:db8:1::7,tcp:40000,2001:db8::100\n", "add nfcf4-away 192.0.2.100\n", "add nfcf6-active 2001:db8::100\n"} {
		if !strings.Contains(saved, w) {
			t.Errorf("ipset save lacks %q", w)
		}
	}
	for range 2 {
		must(t, m.Apply(del))
		if got := list(); len(got) != 0 {
			t.Errorf("left: %+v", got)
		}
	}
	// Order counts: a move from one set to another and back.
	must(t, m.Apply([]Change{add[3], del[3], add[3], del[0]}))
	if got := list(); !slices.Equal(got, add[3:4]) {
		t.Errorf("got %+v", got)
	}
	if err := m.Apply([]Change{{Set: VIP, Add: true}}); err == nil {
		t.Error("an invalid address was taken")
	}
	must(t, m.Apply(nil))
	sh(t, ns, "iptables -t raw -F; iptables -t mangle -F; for i in 1 2 3 4 5; do ipset destroy nfcf4-vip && break; sleep 0.1; done")
	if err := m.Apply(add); err == nil || !strings.Contains(err.Error(), "install the rules again") {
		t.Errorf("a set that is gone: %v", err)
	}
}

func manyFlows(n int, add bool) []Change {
	out := make([]Change, n)
	for i := range out {
		out[i] = Change{Set: Flow, Add: add, IP: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Port: uint16(1024 + i%60000), Peer: vip4}
	}
	return out
}

func TestApplyManyFlows(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	const n = 10000
	start := time.Now()
	must(t, m.Apply(manyFlows(n, true)))
	added := time.Since(start)
	l, err := m.List(Flow)
	if err != nil || len(l) != n {
		t.Fatalf("%d flows are in the set: %v", len(l), err)
	}
	start = time.Now()
	must(t, m.Apply(manyFlows(n, false)))
	deleted := time.Since(start)
	if l, err := m.List(Flow); err != nil || len(l) != 0 {
		t.Fatalf("%d flows are left: %v", len(l), err)
	}
	t.Logf("%d flows: added in %v (%v each), deleted in %v (%v each)", n, added, added/n, deleted, deleted/n)
	if added/n > 100*time.Microsecond {
		t.Errorf("adding took %v a flow", added/n)
	}
}

func TestSetFull(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64, MaxElem: 100})
	if err := m.Apply(manyFlows(5000, true)); err == nil || !strings.Contains(err.Error(), "max_connections") {
		t.Errorf("got %v", err)
	}
}

func TestPurge(t *testing.T) {
	ns := newNS(t)
	before := volatile.ReplaceAllString(sh(t, ns, "iptables-save; ip6tables-save; ipset save"), "")
	purge := func() error { return Purge(Config{}) }
	in(t, ns, purge)
	m := install(t, ns, Config{Queue: 64})
	must(t, m.Apply(manyFlows(10, true)))
	sh(t, ns, "iptables -t raw -A OUTPUT -j NFCF-OUT") // a second jump does not stop it
	in(t, ns, purge)
	got := volatile.ReplaceAllString(sh(t, ns, "iptables-save; ip6tables-save; ipset save"), "")
	if strings.Contains(strings.ToLower(got), "nfcf") {
		t.Errorf("left:\n%s\nbefore:\n%s", got, before)
	}
	in(t, ns, purge)
}

// A set that a rule of somebody else's still names is waited for, and not for ever.
func TestPurgeWaitsForReferences(t *testing.T) {
	ns := newNS(t)
	install(t, ns, Config{Queue: 64})
	sh(t, ns, "iptables -A FORWARD -m set --match-set nfcf4-away src -j DROP")
	var err error
	in(t, ns, func() error {
		err = Purge(Config{})
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "a rule still refers to the set") {
		t.Errorf("a set in use: %v", err)
	}
	cmd := exec.Command("ip", "netns", "exec", ns, "sh", "-c", "sleep 0.3; iptables -F FORWARD")
	must(t, cmd.Start())
	in(t, ns, func() error { return Purge(Config{}) })
	must(t, cmd.Wait())
	if got := sh(t, ns, "ipset save"); got != "" {
		t.Errorf("left:\n%s", got)
	}
}

// What Print prints and what the script does must be what Install does.
func TestScriptsAgree(t *testing.T) {
	script, err := filepath.Abs("../../scripts/iptables/nfcf-rules.sh")
	must(t, err)
	for _, cfg := range []Config{{Queue: 64}, {Queue: 7, Mark: 0x120000, Mask: 0xff0000, MaxElem: 777}} {
		full := cfg.withDefaults()
		newNS := func(t *testing.T) string {
			ns := newNS(t)
			sh(t, ns, "iptables -t raw -A PREROUTING -p udp -j ACCEPT; ip6tables -t mangle -A POSTROUTING -p udp -j ACCEPT")
			return ns
		}
		ns := newNS(t)
		install(t, ns, cfg)
		want := state(t, ns)

		run := fmt.Sprintf("%s --queue %d --mark %#x --mask %d --maxelem %d", script, full.Queue, full.Mark, full.Mask, full.MaxElem)
		nsScript := newNS(t)
		for range 2 {
			sh(t, nsScript, run)
			if got := state(t, nsScript); got != want {
				t.Errorf("the script gives\n%s\nInstall gives\n%s", got, want)
			}
		}
		sh(t, nsScript, script+" --purge")
		if got := sh(t, nsScript, "iptables-save; ip6tables-save; ipset save"); strings.Contains(strings.ToLower(got), "nfcf") {
			t.Errorf("the script's purge left\n%s", got)
		}

		var b bytes.Buffer
		must(t, Print(&b, cfg))
		nsPrint := newNS(t)
		file := filepath.Join(t.TempDir(), "rules.sh")
		must(t, os.WriteFile(file, b.Bytes(), 0o600))
		for range 2 {
			sh(t, nsPrint, "sh "+file)
			if got := state(t, nsPrint); got != want {
				t.Errorf("Print's script gives\n%s\nInstall gives\n%s", got, want)
			}
		}
		// The program takes over what a script has written without writing anything.
		handle := sh(t, nsPrint, "nft -a list ruleset")
		install(t, nsPrint, cfg)
		if got := sh(t, nsPrint, "nft -a list ruleset"); got != handle {
			t.Errorf("Install wrote over Print's rules:\n%s\nwas\n%s", got, handle)
		}
	}
	for _, bad := range []string{"--queue", "--queue x", "--frob", "--mark 12;id"} {
		cmd := exec.Command("sh", append([]string{script}, strings.Fields(bad)...)...)
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
			t.Errorf("%s: %v, want exit code 2", bad, err)
		}
	}
}

// linkTools makes a directory with the given commands in it, for PATH.
func linkTools(t *testing.T, tools map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, target := range tools {
		p, err := lookTool(target)
		if err != nil {
			t.Skipf("the command %s is not there", target)
		}
		must(t, os.Symlink(p, filepath.Join(dir, name)))
	}
	return dir
}

func legacyTools(t *testing.T) string {
	t.Helper()
	return linkTools(t, map[string]string{
		"iptables": "iptables-legacy", "iptables-restore": "iptables-legacy-restore", "iptables-save": "iptables-legacy-save",
		"ip6tables": "ip6tables-legacy", "ip6tables-restore": "ip6tables-legacy-restore", "ip6tables-save": "ip6tables-legacy-save",
	})
}

func TestLegacyIptables(t *testing.T) {
	needRoot(t)
	dir := legacyTools(t)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	first := state(t, ns)
	if strings.Count(first, "nfcf6-vip") < 3 || !strings.Contains(sh(t, ns, "iptables --version"), "legacy") {
		t.Fatalf("not the legacy iptables, or no IPv6 rules:\n%s", first)
	}
	install(t, ns, Config{Queue: 64})
	if got := state(t, ns); got != first {
		t.Errorf("a second Install gives\n%s\nwas\n%s", got, first)
	}
	sh(t, ns, "iptables -t raw -F")
	if lines, err := m.Verify(); err != nil || len(lines) == 0 {
		t.Errorf("Verify after a flush: %q, %v", lines, err)
	}
	install(t, ns, Config{Queue: 64})
	if lines, err := m.Verify(); err != nil || len(lines) > 0 {
		t.Errorf("Verify after the repair: %q, %v", lines, err)
	}
	in(t, ns, func() error { return Purge(Config{}) })
	if got := state(t, ns); strings.Contains(strings.ToLower(got), "nfcf") {
		t.Errorf("left:\n%s", got)
	}
}

// A node without IPv6 rules still gets those of IPv4.
func TestWithoutIP6tables(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, name := range []string{"ip6tables", "ip6tables-restore"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho no IPv6 here >&2\nexit 3\n"), 0o700))
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	if err := m.IPv6(); err == nil || !strings.Contains(err.Error(), "no IPv6 here") {
		t.Errorf("IPv6: %v", err)
	}
	must(t, m.Apply([]Change{{Set: VIP, Add: true, IP: vip4}}))
	if err := m.Apply([]Change{{Set: VIP, Add: true, IP: vip6}}); err == nil || !strings.Contains(err.Error(), "no IPv6 here") {
		t.Errorf("Apply: %v", err)
	}
	if lines, err := m.Verify(); err != nil || len(lines) > 0 {
		t.Errorf("Verify: %q, %v", lines, err)
	}
	in(t, ns, func() error { return Purge(Config{}) })
	if got := sh(t, ns, "ipset save"); got != "" {
		t.Errorf("left:\n%s", got)
	}
}

// The filter runs as an ordinary user with two capabilities.
const asNobody = "NFCF_RULES_TEST_AS_NOBODY"

func nobodyMain() int {
	m, err := Install(Config{Queue: 64, LockDir: os.Getenv(asNobody)})
	if err == nil {
		err = m.Apply([]Change{{Set: Away, Add: true, IP: vip4}})
	}
	if err == nil {
		var lines []string
		if lines, err = m.Verify(); err == nil && len(lines) > 0 {
			err = errors.New(strings.Join(lines, "; "))
		}
	}
	if err == nil {
		_, err = m.DeleteConntrack([]TCPFlow{{Local: netip.AddrPortFrom(vip4, 1), Remote: netip.AddrPortFrom(vip4, 2)}})
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	exe, err := os.Executable()
	must(t, err)
	self := filepath.Join(t.TempDir(), "self")
	data, err := os.ReadFile(exe)
	must(t, err)
	must(t, os.WriteFile(self, data, 0o755))
	for d := filepath.Dir(self); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	path := "/usr/bin:/bin" // without the directories for system programs, as ordinary users often have it
	lockDir := filepath.Join(filepath.Dir(self), "state")
	must(t, os.Mkdir(lockDir, 0o700))
	must(t, os.Chown(lockDir, 65534, 65534))
	run := func(ns string, caps ...uintptr) (string, error) {
		cmd := exec.Command(self)
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), asNobody+"="+lockDir, "PATH="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: caps}
		var out []byte
		var err error
		in(t, ns, func() error {
			out, err = cmd.CombinedOutput()
			return nil
		})
		return string(out), err
	}
	const capNetAdmin, capNetRaw = 12, 13
	ns := newNS(t)
	if out, err := run(ns, capNetAdmin, capNetRaw); err != nil {
		t.Errorf("with both capabilities: %v: %s", err, out)
	}
	if got := state(t, ns); !strings.Contains(got, "NFCF-POST") || !strings.Contains(got, "add nfcf4-away 192.0.2.100") {
		t.Errorf("rules are missing:\n%s", got)
	}
	for _, caps := range [][]uintptr{nil, {capNetRaw}} {
		if out, err := run(newNS(t), caps...); err == nil || !strings.Contains(out, "CAP_NET_ADMIN") {
			t.Errorf("capabilities %v: %v: %s", caps, err, out)
		}
	}
	t.Run("legacy", func(t *testing.T) {
		dir := legacyTools(t)
		must(t, os.Chmod(filepath.Dir(dir), 0o755))
		must(t, os.Chmod(dir, 0o755))
		path = dir + ":" + path
		if out, err := run(newNS(t), capNetAdmin, capNetRaw); err != nil {
			t.Errorf("with both capabilities: %v: %s", err, out)
		}
		if _, err := os.Stat(filepath.Join(lockDir, "xtables.lock")); err != nil {
			t.Errorf("the lock is elsewhere: %v", err)
		}
	})
}

// A change by others is told at once, one of our own leads to no look that
// others wait for.
func TestWatch(t *testing.T) {
	ns := newNS(t)
	m := install(t, ns, Config{Queue: 64})
	ctx, cancel := context.WithCancel(t.Context())
	looks := make(chan time.Time, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- m.Watch(ctx, func() time.Duration { return time.Hour }, func() bool {
			found, err := m.Repair()
			if err != nil {
				t.Error(err)
			}
			looks <- time.Now()
			return len(found) > 0
		})
	}()
	// Watch may not listen yet when the first change is made.
	deadline := time.After(20 * time.Second)
	for heard := false; !heard; {
		sh(t, ns, "iptables -t raw -F NFCF-IN")
		select {
		case <-looks:
			heard = true
		case <-time.After(100 * time.Millisecond):
		case <-deadline:
			t.Fatal("a flush was not told")
		}
	}
	for settled := false; !settled; { // looks that what came meanwhile leads to
		select {
		case <-looks:
		case <-time.After(2*watchBetween + 200*time.Millisecond):
			settled = true
		}
	}
	for _, on := range []bool{false, true, false} {
		must(t, m.Engage(on, on))
	}
	select {
	case <-looks:
		t.Error("a change of our own was taken for one by others")
	case <-time.After(2*watchBetween + 200*time.Millisecond):
	}
	began := time.Now()
	sh(t, ns, "iptables -t raw -F")
	select {
	case at := <-looks:
		t.Logf("repaired %v after the flush", at.Sub(began))
	case <-deadline:
		t.Fatal("a second flush was not told")
	}
	if lines, err := m.Verify(); err != nil || len(lines) > 0 {
		t.Errorf("not repaired: %q, %v", lines, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
