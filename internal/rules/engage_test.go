package rules

import (
	"strings"
	"testing"
)

// The chain behind routing goes without a trace and comes back as it was.
func TestEngage(t *testing.T) {
	ns := newNS(t)
	var m *Manager
	in(t, ns, func() (err error) {
		m, err = Install(Config{Queue: 64})
		return err
	})
	defer m.Close()
	save := func() string { return sh(t, ns, "iptables -t mangle -S; iptables -t raw -S") }
	before := save()
	if !strings.Contains(before, ChainPost) {
		t.Fatalf("no %s after Install:\n%s", ChainPost, before)
	}
	for range 2 { // a second time changes nothing
		must(t, m.Engage(false, false))
	}
	if now := save(); strings.Contains(now, ChainPost) {
		t.Fatalf("%s is still there:\n%s", ChainPost, now)
	}
	if now := save(); strings.Contains(now, "nfcf4-active dst -j NFCF-IN") || !strings.Contains(now, "RST NONE -j NFCF-IN") {
		t.Fatalf("the jumps of an idle node:\n%s", now)
	}
	if hooks := sh(t, ns, "nft list ruleset"); strings.Contains(hooks, "hook postrouting") {
		t.Fatalf("the hook is still there:\n%s", hooks)
	}
	if lines, err := m.Verify(); err != nil || len(lines) != 0 {
		t.Fatalf("without the chain: %v %v", lines, err)
	}
	for range 2 {
		must(t, m.Engage(true, true))
	}
	if now := save(); now != before {
		t.Fatalf("came back as\n%s\nwas\n%s", now, before)
	}
	if lines, err := m.Verify(); err != nil || len(lines) != 0 {
		t.Fatalf("with the chain: %v %v", lines, err)
	}
	// Without a VIP behind the node one jump less, until there is one.
	must(t, m.Engage(false, false))
	for range 2 {
		must(t, m.Engage(true, false))
	}
	const forward = "-A PREROUTING -m set --match-set nfcf4-active src -j NFCF-FWD\n"
	if now := save(); now != strings.Replace(before, forward, "", 1) || now == before {
		t.Fatalf("without a VIP behind the node\n%s\nwith one\n%s", now, before)
	}
	for _, behind := range []bool{true, false} { // what is there stays
		if lines, err := m.Verify(); err != nil || len(lines) != 0 {
			t.Fatalf("%v %v", lines, err)
		}
		must(t, m.Engage(true, behind))
		if now := save(); now != before {
			t.Fatalf("became\n%s\nwas\n%s", now, before)
		}
	}
	// Another's rule in POSTROUTING is not touched.
	sh(t, ns, "iptables -t mangle -A POSTROUTING -p udp -j RETURN")
	must(t, m.Engage(false, false))
	if now := save(); !strings.Contains(now, "-A POSTROUTING -p udp -j RETURN") || strings.Contains(now, ChainPost) {
		t.Fatalf("beside another's rule:\n%s", now)
	}
}
