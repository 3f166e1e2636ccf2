package rules

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
}

var nsCount atomic.Int32

// newNS makes a network namespace that is removed at the test's end, and returns its name.
func newNS(t *testing.T) string {
	t.Helper()
	needRoot(t)
	name := fmt.Sprintf("nfcfrules%d-%d", os.Getpid(), nsCount.Add(1))
	sh(t, "", "ip netns add "+name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("removing %s: %v %s", name, err, out)
		}
	})
	sh(t, name, "ip link set lo up")
	return name
}

// sh runs a shell script in a namespace and returns its output.
func sh(t *testing.T, ns, script string) string {
	t.Helper()
	args := []string{"sh", "-ec", script}
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// in runs fn on a thread in the namespace. fn must not call t.Fatal.
func in(t *testing.T, ns string, fn func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		f, err := os.Open(filepath.Join("/run/netns", ns))
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func install(t *testing.T, ns string, cfg Config) *Manager {
	t.Helper()
	var m *Manager
	in(t, ns, func() (err error) {
		m, err = Install(cfg)
		return err
	})
	t.Cleanup(func() { m.Close() })
	return m
}

var volatile = regexp.MustCompile(`(?m)^#.*\n| (?:bucketsize \d+|initval 0x[0-9a-f]+)|\[\d+:\d+\]`)

// state is all rules and sets of a namespace, without what changes by itself.
func state(t *testing.T, ns string) string {
	t.Helper()
	out := sh(t, ns, "iptables-save -t raw; iptables-save -t mangle; ip6tables-save -t raw; ip6tables-save -t mangle; ipset save")
	return volatile.ReplaceAllString(out, "")
}

// hits returns the packet count of the one rule of an IPv4 chain that holds all words.
func hits(t *testing.T, ns, table, chain string, words ...string) int {
	t.Helper()
	return hitsOf(t, &family4, ns, table, chain, words...)
}

func hitsOf(t *testing.T, f *family, ns, table, chain string, words ...string) int {
	t.Helper()
	found, count := 0, 0
	for line := range strings.Lines(sh(t, ns, f.iptables+" -t "+table+" -v -S "+chain)) {
		ok := strings.HasPrefix(line, "-A")
		for _, w := range words {
			ok = ok && strings.Contains(line, w)
		}
		if !ok {
			continue
		}
		found++
		f := strings.Fields(line)
		for i := range f {
			if f[i] == "-c" && i+1 < len(f) {
				count, _ = strconv.Atoi(f[i+1])
			}
		}
	}
	if found != 1 {
		t.Fatalf("%d rules of %s hold %q", found, chain, words)
	}
	return count
}
