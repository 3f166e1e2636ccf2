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
		must(t, m.Engage(false))
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
		must(t, m.Engage(true))
	}
	if now := save(); now != before {
		t.Fatalf("came back as\n%s\nwas\n%s", now, before)
	}
	if lines, err := m.Verify(); err != nil || len(lines) != 0 {
		t.Fatalf("with the chain: %v %v", lines, err)
	}
	// Another's rule in POSTROUTING is not touched.
	sh(t, ns, "iptables -t mangle -A POSTROUTING -p udp -j RETURN")
	must(t, m.Engage(false))
	if now := save(); !strings.Contains(now, "-A POSTROUTING -p udp -j RETURN") || strings.Contains(now, ChainPost) {
		t.Fatalf("beside another's rule:\n%s", now)
	}
}
