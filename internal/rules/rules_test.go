package rules

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv(asNobody) != "" {
		os.Exit(nobodyMain())
	}
	goleak.VerifyTestMain(m)
}

func TestConfigFaults(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"two queues", Config{Count: 2}, "only one is supported"},
		{"negative count", Config{Count: -1}, "only one is supported"},
		{"mark alone", Config{Mark: 0x10000}, "mark_mask"},
		{"mask alone", Config{Mask: 0xff0000}, "mark_mask"},
		{"mark outside mask", Config{Mark: 0x110000, Mask: 0xf0000}, "outside"},
		{"mask covers our bits", Config{Mark: 0x10000, Mask: 0xffffffff}, "lowest bits"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Install(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Install: %v, want an error with %q", err, c.want)
			}
			if err := Print(&bytes.Buffer{}, c.cfg); err == nil {
				t.Error("Print took it")
			}
		})
	}
	if err := (Config{}).withDefaults().validate(); err != nil {
		t.Error(err)
	}
}

func TestChangeNormalize(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	mapped := netip.AddrFrom16(v4.As16())
	good := []Change{
		{Set: VIP, IP: v4}, {Set: Away, IP: v6}, {Set: Full, IP: mapped}, {Set: Skip, IP: v4, Port: 22},
		{Set: Flow, IP: v4, Port: 1, Peer: mapped}, {Set: Flow, IP: v6, Port: 65535, Peer: v6},
	}
	for _, c := range good {
		n, err := c.normalize()
		if err != nil || n.IP.Is4In6() || n.Peer.Is4In6() {
			t.Errorf("%+v: %+v, %v", c, n, err)
		}
	}
	bad := []Change{
		{}, {Set: VIP}, {Set: numSets, IP: v4}, {Set: 255, IP: v4}, {Set: VIP, IP: v4, Port: 1}, {Set: Active, IP: v4, Peer: v4},
		{Set: Flow, IP: v4, Port: 1}, {Set: Flow, IP: v4, Port: 1, Peer: v6}, {Set: Flow, IP: v6.WithZone("lo"), Peer: v6},
		{Set: Flow, IP: v6, Peer: v6.WithZone("lo")}, {Set: VIP, IP: netip.IPv4Unspecified()},
	}
	for _, c := range bad {
		if n, err := c.normalize(); err == nil {
			t.Errorf("%+v was taken as %+v", c, n)
		}
	}
}

func TestEntryRoundTrip(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, c := range []Change{
		{Set: VIP, Add: true, IP: v4}, {Set: VIP, Add: true, IP: v6}, {Set: Skip, Add: true, IP: v4, Port: 0x1234},
		{Set: Flow, Add: true, IP: v4, Port: 40000, Peer: netip.MustParseAddr("198.51.100.9")}, {Set: Flow, Add: true, IP: v6, Port: 1, Peer: v6},
	} {
		b := putEntry(nil, &c)
		n := 0
		for a := range attrs(b, 0) {
			n++
			if got := parseEntry(c.Set, a.data); a.typ != attrData || got != c {
				t.Errorf("%+v came back as %+v", c, got)
			}
		}
		if n != 1 {
			t.Errorf("%+v: %d attributes", c, n)
		}
	}
}

// FuzzParseList reads what the kernel answers to a listing, and to a change of its
// rules. What it says of an entry comes back as it was written.
func FuzzParseList(f *testing.F) {
	for _, c := range []Change{
		{Set: Flow, Add: true, IP: netip.MustParseAddr("192.0.2.1"), Port: 1, Peer: netip.MustParseAddr("192.0.2.2")},
		{Set: Flow, Add: true, IP: netip.MustParseAddr("2001:db8::1"), Port: 65535, Peer: netip.MustParseAddr("2001:db8::2")},
		{Set: Skip, Add: true, IP: netip.MustParseAddr("192.0.2.1"), Port: 22},
		{Set: VIP, Add: true, IP: netip.MustParseAddr("2001:db8::1")},
	} {
		b, at := openNest([]byte{2, 0, 0, 0}, attrADT)
		b = putEntry(putEntry(b, &c), &c)
		closeNest(b, at)
		f.Add(uint8(c.Set), b)
	}
	f.Add(uint8(Flow), []byte{0, 0, 0, 0, 3, 0, 1, 0, 255, 255, 1, 0, 4, 0, 4, 0})
	f.Add(uint8(Flow), []byte{0, 0, 0, 0, 8, 0, unix.NFTA_GEN_PROC_PID, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, set uint8, b []byte) {
		byOthers(netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN}, Data: b})
		for _, c := range parseList(Set(set), b) {
			if !c.IP.IsValid() || c.Set == Flow && c.Peer.BitLen() != c.IP.BitLen() || c.Set > Flow {
				continue // nothing that was ever in a set of ours
			}
			m, at := openNest([]byte{2, 0, 0, 0}, attrADT)
			m = putEntry(m, &c)
			closeNest(m, at)
			if c.Set != Flow { // what is written of the others
				c.Peer = netip.Addr{}
			}
			if c.Set != Flow && c.Set != Skip {
				c.Port = 0
			}
			if got := parseList(c.Set, m); len(got) != 1 || got[0] != c {
				t.Fatalf("%+v came back as %+v", c, got)
			}
		}
	})
}

// FuzzParseTable reads any text as the output of iptables -S.
func FuzzParseTable(f *testing.F) {
	f.Add("-P PREROUTING ACCEPT\n-N NFCF-IN\n-A PREROUTING -j NFCF-IN\n-A NFCF-IN\n")
	f.Add("-A  x\n-P\n\n-N a b c")
	all := chains(&family4, Config{}.withDefaults())
	f.Fuzz(func(t *testing.T, out string) {
		table := parseTable(out)
		n := 0
		for name, rules := range table {
			if n += len(rules); strings.ContainsAny(name, " \n") || !table.has(name, rules) {
				t.Fatalf("chain %q: %q", name, rules)
			}
		}
		if lines := strings.Count(out, "\n") + 1; n > lines {
			t.Fatalf("%d rules in %d lines", n, lines)
		}
		for i := range all {
			table.jumps(&all[i])
		}
	})
}

// A rule without bypass must come before every rule with it, else a held packet could pass.
func TestNoBypassComesFirst(t *testing.T) {
	for _, f := range families() {
		for _, c := range chains(f, Config{}.withDefaults()) {
			bypass := false
			for _, r := range c.rules {
				if !strings.Contains(r.spec, "-j NFQUEUE") {
					continue
				}
				b := strings.HasSuffix(r.spec, "--queue-bypass")
				held := strings.Contains(r.spec, f.setName(Away)) || strings.Contains(r.spec, f.setName(Flow))
				if b == held {
					t.Errorf("%s %s: bypass is %t in %q", f.name(), c.name, b, r.spec)
				}
				if bypass && !b {
					t.Errorf("%s %s: %q comes after a rule with bypass", f.name(), c.name, r.spec)
				}
				bypass = bypass || b
			}
		}
	}
}

func TestRestoreInput(t *testing.T) {
	all := chains(&family4, Config{}.withDefaults())
	in := &all[0]
	toIn, toForward, toOut, toReset := in.jumps(), all[1].jumps(), all[2].jumps(), all[3].jumps()
	full := tableRules{"PREROUTING": slices.Concat(toIn, toForward), "OUTPUT": slices.Concat(toOut, toReset),
		ChainIn: specs(in), ChainForward: specs(&all[1]), ChainOut: specs(&all[2]), ChainReset: specs(&all[3])}
	clone := func(change func(tableRules)) tableRules {
		c := tableRules{}
		for k, v := range full {
			c[k] = slices.Clone(v)
		}
		change(c)
		return c
	}
	for _, c := range []struct {
		name string
		have tableRules
		want []string
		not  []string
	}{
		{"all there", full, nil, []string{"*raw"}},
		{"empty table", tableRules{}, []string{":NFCF-IN", ":NFCF-OUT", "-I PREROUTING 1", "-I PREROUTING 3 " + toForward[0], "-I OUTPUT 1", "-I OUTPUT 4 " + toReset[0], "COMMIT"}, []string{"-D ", "NFCF-POST"}},
		{"not first", clone(func(r tableRules) { r["PREROUTING"] = slices.Concat([]string{"-j ACCEPT"}, toIn, toForward) }),
			[]string{"-D PREROUTING " + toIn[0] + "\n-D PREROUTING " + toIn[1] + "\n-I PREROUTING 1 " + toIn[0] + "\n-I PREROUTING 2 " + toIn[1],
				"-D PREROUTING " + toForward[0] + "\n-I PREROUTING 3 " + toForward[0]}, []string{":NFCF", "OUTPUT"}},
		{"other words", clone(func(r tableRules) { r["PREROUTING"] = []string{"-j NFCF-IN"} }),
			[]string{"-D PREROUTING -j NFCF-IN\n-I PREROUTING 1 " + toIn[0]}, []string{":NFCF", "OUTPUT"}},
		{"the third alone", clone(func(r tableRules) { r["PREROUTING"] = slices.Concat(toIn, []string{"-j ACCEPT"}, toForward) }),
			[]string{"*raw\n-D PREROUTING " + toForward[0] + "\n-I PREROUTING 3 " + toForward[0] + "\nCOMMIT"}, []string{":NFCF", "OUTPUT"}},
		{"twice", clone(func(r tableRules) { r["OUTPUT"] = append(r["OUTPUT"], toOut[1]) }),
			[]string{"-D OUTPUT " + toOut[1] + "\n-D OUTPUT " + toOut[2] + "\n-D OUTPUT " + toOut[1] + "\n-I OUTPUT 1"}, []string{":NFCF"}},
		{"changed", clone(func(r tableRules) { r[ChainIn][4] = "-j ACCEPT" }), []string{":NFCF-IN", "-A NFCF-IN -i lo"}, []string{"-I ", "NFCF-OUT"}},
		{"longer", clone(func(r tableRules) { r[ChainIn] = append(r[ChainIn], "-j ACCEPT") }), []string{":NFCF-IN"}, []string{"-I ", "NFCF-OUT"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := restoreInput("raw", all, c.have)
			for _, w := range c.want {
				if !strings.Contains(got, w) {
					t.Errorf("lacks %q:\n%s", w, got)
				}
			}
			for _, w := range c.not {
				if strings.Contains(got, w) {
					t.Errorf("holds %q:\n%s", w, got)
				}
			}
		})
	}
}

func TestExplain(t *testing.T) {
	input := "*raw\n-A NFCF-IN -p tcp -j NFQUEUE --queue-num 64\nCOMMIT\n"
	fail := errors.New("exit status 1")
	for _, c := range []struct{ stderr, want string }{
		{"iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)", "CAP_NET_ADMIN"},
		{"line 2: RULE_APPEND failed (No such file or directory): rule in chain NFCF-IN", "CONFIG_NETFILTER_XT_TARGET_NFQUEUE"},
		{"Error occurred at line: 2", "-A NFCF-IN -p tcp -j NFQUEUE"},
		{"Error occurred at line: 99", "line: 99"},
		{"Another app is currently holding the xtables lock.", "holds the lock"},
		{"Fatal: can't open lock file /run/xtables.lock: Permission denied", "state_dir"},
		{"", "exit status 1"},
	} {
		if err := explain("iptables-restore", []string{"--noflush"}, input, c.stderr, fail); !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q became %q, want %q in it", c.stderr, err, c.want)
		}
	}
	if err := explain("iptables", nil, "", "Permission denied", fail); !errors.Is(err, os.ErrPermission) {
		t.Errorf("%v does not unwrap to ErrPermission", err)
	}
}

func TestIptablesMissing(t *testing.T) {
	if _, err := lookTool("nfcf-no-such-tool"); err == nil || !strings.Contains(err.Error(), "install the package iptables") {
		t.Errorf("got %v", err)
	}
}
