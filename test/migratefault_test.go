package test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// storeOf puts the snapshot store of a cluster on a file system of its own.
func storeOf(t *testing.T, c *harness.Cluster) (path string) {
	t.Helper()
	path = c.Path("shared", "snapshots")
	must(t, os.MkdirAll(path, 0o700))
	must(t, syscall.Mount("nfcf", path, "tmpfs", 0, "size=256k,mode=700"))
	t.Cleanup(func() { must(t, syscall.Unmount(path, syscall.MNT_DETACH)) })
	return path
}

// issue makes a node's certificate anew.
func issue(t *testing.T, ca, name string, addr netip.Addr, now time.Time, lifetime time.Duration) {
	t.Helper()
	a, err := control.OpenAuthority(ca, time.Now(), 100*24*time.Hour)
	must(t, err)
	must(t, a.Issue(name, []netip.Addr{addr}, now, lifetime, true))
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o600))
}

// TestMigrateRefused: whatever can be told beforehand is told before anything
// is changed, with and without --dry-run, and the clients go on.
func TestMigrateRefused(t *testing.T) {
	c := newCluster(t, harness.ClusterOptions{Name: "refuse", Apps: []harness.App{harness.Redis("redis", vip)}})
	store := storeOf(t, c)
	must(t, c.Up())
	load := clusterClients(t, c, 30)
	a, b := c.Nodes[0], c.Nodes[1]
	tls, addr := c.Path("tls"), b.Net.NodeAddr()
	day := 24 * time.Hour
	renew := func(t *testing.T) { issue(t, tls, "node-b", addr, time.Now(), day) }
	for _, f := range []struct {
		name, to, want string
		code           int
		set            func(t *testing.T) (undo func())
	}{
		{"unknown node", "node-x", `no node "node-x" in cluster.toml; there is ["node-a" "node-b"]`, 2, nil},
		{"itself", "node-a", "node-a is this node", 2, nil},
		{"agent down", "node-b", "the agent of node node-b cannot be asked", 1, func(t *testing.T) func() {
			must(t, b.Agent.Stop(5*time.Second))
			return func() { must(t, b.StartAgent()) }
		}},
		{"filter down", "node-b", "the filter is not reachable", 1, func(t *testing.T) func() {
			must(t, b.Filter.Stop(5*time.Second))
			return func() { must(t, b.StartFilter()) }
		}},
		{"certificate expired", "node-b", "the certificate of node-b expired on", 1, func(t *testing.T) func() {
			issue(t, tls, "node-b", addr, time.Now().Add(-10*day), day)
			return func() { renew(t) }
		}},
		{"another authority", "node-b", "was signed by another authority", 1, func(t *testing.T) func() {
			other := c.Path("other")
			issue(t, other, "node-b", addr, time.Now(), day)
			copyFile(t, filepath.Join(other, "node-b.crt"), filepath.Join(tls, "node-b.crt"))
			copyFile(t, filepath.Join(other, "node-b.key"), filepath.Join(tls, "node-b.key"))
			return func() { renew(t) }
		}},
		{"another node's certificate", "node-b", `answers the certificate of ["node-a"`, 1, func(t *testing.T) func() {
			copyFile(t, filepath.Join(tls, "node-a.crt"), filepath.Join(tls, "node-b.crt"))
			copyFile(t, filepath.Join(tls, "node-a.key"), filepath.Join(tls, "node-b.key"))
			return func() { renew(t) }
		}},
		{"port taken", "node-b", "is listened on already by another process", 1, func(t *testing.T) func() {
			other := b.Net.Node().Command("redis-server", "--port", "6379", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no")
			must(t, other.Start())
			must(t, harness.Wait(reply, "somebody listens", func() bool {
				return b.Net.Node().Command("redis-cli", "ping").Run() == nil
			}))
			return func() { _ = other.Process.Kill(); _ = other.Wait() }
		}},
		{"VIP on the new node", "node-b", "is on interface", 1, func(t *testing.T) func() {
			must(t, b.Net.Node().Command("ip", "address", "add", prefix(), "dev", "lo").Run())
			return func() { must(t, b.Net.Node().Command("ip", "address", "del", prefix(), "dev", "lo").Run()) }
		}},
		{"VIP of a stranger", "node-b", "which is not node node-a; find that machine", 1, func(t *testing.T) func() {
			ns, err := c.Net.Attach("stranger", prefix())
			must(t, err)
			return func() { must(t, ns.Close()) }
		}},
		{"store read-only", "node-b", "read-only file system; make it writable", 1, func(t *testing.T) func() {
			must(t, syscall.Mount("", store, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
			return func() { must(t, syscall.Mount("", store, "", syscall.MS_REMOUNT, "size=256k")) }
		}},
		{"store full", "node-b", "no space left on device; make it writable", 1, func(t *testing.T) func() {
			filler := filepath.Join(store, "filler")
			_ = os.WriteFile(filler, bytes.Repeat([]byte("x"), 1<<20), 0o600) // as much as there is room for
			return func() { must(t, os.Remove(filler)) }
		}},
	} {
		undo := func() {}
		if f.set != nil {
			undo = f.set(t)
		}
		for _, flags := range [][]string{{"--dry-run"}, nil} {
			r := a.Ctl(append([]string{"migrate", "redis", "--to", f.to}, flags...)...)
			if r.Code != f.code || !strings.Contains(r.Stderr, f.want) {
				t.Errorf("%s %v: %v\nwant exit %d and %q", f.name, flags, r, f.code, f.want)
			} else if flags == nil {
				t.Logf("%-28s %s", f.name, strings.TrimSpace(r.Stderr))
			}
		}
		if s, err := a.Status("redis"); err != nil || !harness.Running(s.State) {
			t.Fatalf("%s: it is in state %q, %v", f.name, s.State, err)
		}
		undo()
		rounds(t, load, 1)
		noRecords(t, c)
	}
	if r := a.Ctl("migrate", "redis", "--to", "node-b", "--dry-run"); r.Err() != nil || !strings.Contains(r.Stdout, "can be moved from node-a to node-b") {
		t.Errorf("with all mended: %v", r)
	}
	damaged(t, c, store)
	_, err := c.Migrate("redis", 0, 1)
	must(t, err)
	rounds(t, load, 1)
}

// damaged tries to restore elsewhere what has a damaged snapshot, or one of another version;
// the connections stay held.
func damaged(t *testing.T, c *harness.Cluster, store string) {
	t.Helper()
	a := c.Nodes[0]
	id, err := a.Snapshot("redis")
	must(t, err)
	manifest := filepath.Join(store, "redis", id, "manifest.json")
	if _, err := os.Stat(manifest); err != nil {
		entries, _ := os.ReadDir(filepath.Dir(manifest))
		t.Fatalf("%v; there is %v", err, entries)
	}
	whole, err := os.ReadFile(manifest)
	must(t, err)
	for want, text := range map[string]string{
		"is damaged":                           string(whole[:len(whole)/2]),
		"has version 99, this program reads 1": strings.Replace(string(whole), `"version": 1`, `"version": 99`, 1),
	} {
		must(t, os.WriteFile(manifest, []byte(text), 0o600))
		if r := a.Ctl("restore", "redis", "--to", "node-b"); r.Code != 1 || !strings.Contains(r.Stderr, want) {
			t.Errorf("%v, want %q", r, want)
		}
		if s, err := a.Status("redis"); err != nil || s.State != "SNAPSHOTDONE" {
			t.Fatalf("it is in state %q, %v", s.State, err)
		}
	}
	must(t, os.WriteFile(manifest, whole, 0o600))
	must(t, a.Ctl("restore", "redis").Err())
}

// gatedRedis is Redis that waits, on the node whose address is in a file's name,
// until that file is gone.
func gatedRedis() harness.App {
	app := harness.Redis("redis", vip)
	app.Start = append([]string{"sh", "-c", `me=$(ip -4 -o address show dev eth0 | awk 'NR == 1 { print $4 }' | cut -d/ -f1)
while [ -e "$0/closed-$me" ]; do sleep 0.02; done
exec "$@"`, "@app"}, app.Start...)
	app.Process += "ready_timeout = \"60s\"\n"
	return app
}

// TestMigrateAborted aborts a migration while the application starts on the new
// node: by either agent, by Ctrl-C and by --timeout. All of it is given back.
func TestMigrateAborted(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "abort", Apps: []harness.App{gatedRedis()}}, 30)
	unnoticed := watchMoves(t, c, vip)
	a, b := c.Nodes[0], c.Nodes[1]
	gate := c.Path("app", fmt.Sprintf("closed-%s", b.Net.NodeAddr()))
	for _, by := range []string{"old", "new", "signal", "timeout"} {
		must(t, os.WriteFile(gate, nil, 0o644))
		talk, stop := talk(t, load, 20*time.Millisecond)
		everybody(t, talk, 1)
		args := []string{"--node", a.Path("node.toml"), "migrate", "redis", "--to", "node-b"}
		if by == "timeout" {
			args = append(args, "--timeout", "2s")
		}
		var stderr bytes.Buffer
		cmd := a.Net.Node().Command(a.Program("ckptctl"), args...)
		cmd.Stderr = &stderr
		must(t, cmd.Start())
		must(t, inPhase(b, "restore", "listen"))
		code := 1
		switch by {
		case "old":
			must(t, a.Ctl("abort", "redis").Err())
		case "new":
			must(t, b.Ctl("abort", "redis").Err())
		case "signal":
			pid := signalTarget(t, a.Program("ckptctl"), cmd.Process.Pid)
			must(t, syscall.Kill(pid, syscall.SIGINT))
		case "timeout":
			code = 4
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("aborted by %s: exit %d, want %d: %s", by, got, code, stderr.String())
		}
		if node, err := c.Settled("redis", vip, 20*time.Second); err != nil || node != 0 {
			t.Fatalf("aborted by %s: it runs on node %d, %v: %s", by, node, err, stderr.String())
		}
		everybody(t, talk, 2)
		must(t, stop())
		noRecords(t, c)
		t.Logf("aborted by %s: %s", by, strings.TrimSpace(stderr.String()))
		must(t, os.Remove(gate))
	}
	_, err := c.Migrate("redis", 0, 1)
	must(t, err)
	rounds(t, load, 1)
	unnoticed(1, 9)
}

// signalTarget is the process of program that runs as pid, or below it.
func signalTarget(t *testing.T, program string, pid int) int {
	t.Helper()
	for {
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if exe == program {
			return pid
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		must(t, err)
		f := strings.Fields(string(children))
		if len(f) == 0 {
			t.Fatalf("process %d runs %s and not %s", pid, exe, program)
		}
		_, err = fmt.Sscan(f[0], &pid)
		must(t, err)
	}
}
