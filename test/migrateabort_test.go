package test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// TestMigrateAbortPhases aborts migrations that stand before the hand over,
// before the application listens and before its handshakes: by either agent, by
// Ctrl-C and by --timeout. All is given back each time.
func TestMigrateAbortPhases(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "abortin", Holdpoint: true}, 60)
	unnoticed := watchMoves(t, c, vip)
	b := c.Nodes[1]
	rounds(t, load, 1)
	for _, phase := range []string{"hand over", "listen", "reconnect"} {
		for _, by := range []string{"old", "new", "signal", "timeout"} {
			before := agentFiles(t, c)
			must(t, b.Hold("restore/"+phase))
			talk, stop := talk(t, load, 20*time.Millisecond)
			everybody(t, talk, 1)
			talk.Commands()
			code, said := abortedBy(t, c, by, phase)
			ended := time.Now()
			if want := map[string]int{"timeout": 4}[by]; code != max(want, 1) {
				t.Errorf("in %s by %s: exit %d: %s", phase, by, code, said)
			}
			for _, words := range []string{"aborted by request;", "; node node-a holds its connections again; it was restored here and runs"} {
				if (by == "old" || by == "new") && !strings.Contains(said, words) {
					t.Errorf("in %s by %s it says %q, want %q", phase, by, said, words)
				}
			}
			if node, err := c.Settled("redis", vip, reply); err != nil || node != 0 {
				t.Fatalf("in %s by %s: it runs on node %d, %v: %s", phase, by, node, err, said)
			}
			back := time.Since(ended)
			everybody(t, talk, 2)
			must(t, stop())
			must(t, b.Hold())
			noRecords(t, c)
			unchanged(t, c, before, "redis.json") // another process
			gone(t, b, "redis-server")
			_, slowest := talk.Commands()
			t.Logf("%-9s by %-7s exit %d, runs %v later, slowest reply %v: %s", phase, by, code,
				back.Round(time.Millisecond), slowest.Round(time.Millisecond), strings.ReplaceAll(said, "\n", " | "))
		}
	}
	_, err := c.Migrate("redis", 0, 1)
	must(t, err)
	rounds(t, load, 2)
	unnoticed(1, 2*8+1) // what is aborted at hand over has not moved
}

// abortedBy begins a migration, aborts it in a phase of the new node, where that
// is held, and returns the exit code of ckptctl migrate and what it said.
func abortedBy(t *testing.T, c *harness.Cluster, by, phase string) (code int, said string) {
	t.Helper()
	a, b := c.Nodes[0], c.Nodes[1]
	args := []string{"--node", a.Path("node.toml"), "migrate", "redis", "--to", b.Name()}
	if by == "timeout" {
		args = append(args, "--timeout", "2s")
	}
	var stderr bytes.Buffer
	cmd := a.Net.Node().Command(a.Program("ckptctl"), args...)
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	must(t, inPhase(b, "restore", phase))
	switch by {
	case "old":
		must(t, a.Ctl("abort", "redis").Err())
	case "new":
		must(t, b.Ctl("abort", "redis").Err())
	case "signal":
		must(t, syscall.Kill(signalTarget(t, a.Program("ckptctl"), cmd.Process.Pid), syscall.SIGINT))
	}
	_ = cmd.Wait() // its exit code is looked at
	return cmd.ProcessState.ExitCode(), strings.TrimSpace(stderr.String())
}

// agentFiles are the contents of all files of the agents' state, by node and name.
func agentFiles(t *testing.T, c *harness.Cluster) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, n := range c.Nodes {
		files, err := filepath.Glob(n.Path("state", "agent", "*"))
		must(t, err)
		for _, f := range files {
			b, err := os.ReadFile(f)
			must(t, err)
			all[n.Name()+"/"+filepath.Base(f)] = string(b)
		}
	}
	return all
}

// unchanged compares the files of the agents' state with what they were, those
// of the names in except by their presence alone.
func unchanged(t *testing.T, c *harness.Cluster, before map[string]string, except ...string) {
	t.Helper()
	after := agentFiles(t, c)
	for _, m := range []map[string]string{before, after} {
		for k := range m {
			if slices.Contains(except, filepath.Base(k)) {
				m[k] = ""
			}
		}
	}
	if !maps.Equal(before, after) {
		t.Errorf("the agents' files are %q, they were %q", after, before)
	}
}

// fault is something that is wrong with one node alone.
type fault struct {
	name string
	node int
	view string // for its agent's mount namespace, S being the shared directory
	set  func(t *testing.T) (mend func())
	want string
}

// TestMigrateRefusedBySide: what is wrong on one of the nodes alone is told
// before anything is changed, of an application that runs and of one that is
// held. Clients go on, or stay held; the agents' files stay as they were.
func TestMigrateRefusedBySide(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "side"}, 30)
	a, b := c.Nodes[0], c.Nodes[1]
	must(t, os.MkdirAll(c.Path("shared", "snapshots"), 0o700))
	tls, day := c.Path("tls"), 24*time.Hour
	const (
		readOnly = "mount --bind $S $S; mount -o remount,bind,ro $S"
		full     = "mount -t tmpfs -o size=64k,mode=700 nfcf $S/snapshots; ! dd if=/dev/zero of=$S/snapshots/filler bs=4k 2>/dev/null"
	)
	cert := func(n *harness.Node, name string, from time.Time) func(t *testing.T) func() {
		return func(t *testing.T) func() {
			addr := n.Net.NodeAddr()
			issue(t, tls, name, addr, from, day)
			if name != n.Name() {
				for _, ext := range []string{".crt", ".key"} {
					copyFile(t, filepath.Join(tls, name+ext), filepath.Join(tls, n.Name()+ext))
				}
			}
			return func() { issue(t, tls, n.Name(), addr, time.Now(), day) }
		}
	}
	faults := []fault{
		{name: "shared directory read-only on the new node", node: 1, view: readOnly, want: "read-only file system; make it writable"},
		{name: "shared directory read-only on the old node", node: 0, view: readOnly, want: "read-only file system; make it writable"},
		{name: "store full on the new node", node: 1, view: full, want: "no space left on device; make it writable"},
		{name: "store full on the old node", node: 0, view: full, want: "no space left on device; make it writable"},
		{name: "another store on the new node", node: 1, view: "mount -t tmpfs -o mode=700 nfcf $S/snapshots",
			want: "is not seen here; see that all nodes have the same directory there; nothing was changed"},
		{name: "another file of the application on the new node", node: 1,
			view: "mount -t tmpfs nfcf $S/../other; cp $S/apps/redis.toml $S/../other; echo 'drain_timeout = \"7s\"' >>$S/../other/redis.toml; mount --bind $S/../other $S/apps",
			want: "its configuration is not the one that node node-a has read"},
		{name: "certificate of an unknown name on the new node", node: 1, set: cert(b, "node-x", time.Now()), want: `answers the certificate of ["node-x"`},
		{name: "certificate expired on the old node", node: 0, set: cert(a, "node-a", time.Now().Add(-10*day)), want: "the certificate of node-a expired on"},
		{name: "agent of the new node down", node: 1, set: func(t *testing.T) func() {
			must(t, b.Agent.Stop(5*time.Second))
			return func() { must(t, b.StartAgent()) }
		}, want: "the agent of node node-b cannot be asked"},
		{name: "VIP of a third machine", node: 1, set: func(t *testing.T) func() {
			ns, err := c.Net.Attach("third", prefix())
			must(t, err)
			return func() { must(t, ns.Close()) }
		}, want: "which is not node node-a; find that machine"},
		{name: "port taken on the new node", node: 1, set: func(t *testing.T) func() {
			l, err := b.Net.Node().Listen("tcp", "0.0.0.0:6379")
			must(t, err)
			return func() { must(t, l.Close()) }
		}, want: "is listened on already by another process"},
	}
	must(t, os.MkdirAll(c.Path("other"), 0o700))
	for _, held := range []bool{false, true} {
		command := []string{"migrate", "redis", "--to", "node-b"}
		if held {
			snapshot(t, a, "redis", "redis-server")
			command = []string{"restore", "redis", "--to", "node-b"}
		}
		for _, f := range faults {
			refusedWith(t, c, load, f, held, command)
		}
		if held {
			must(t, a.Ctl(command...).Err())
			rounds(t, load, 2)
			if node, err := c.Settled("redis", vip, reply); err != nil || node != 1 {
				t.Errorf("with all mended it runs on node %d, %v", node, err)
			}
		}
	}
}

// refusedWith has a command refused for a fault, which is mended afterwards.
func refusedWith(t *testing.T, c *harness.Cluster, load *clients.Load, f fault, held bool, command []string) {
	t.Helper()
	a, n := c.Nodes[0], c.Nodes[f.node]
	again := func(view string) {
		must(t, n.Agent.Stop(5*time.Second))
		n.View = view
		must(t, n.StartAgent())
	}
	mend := func() { again("") }
	if f.set != nil {
		mend = f.set(t)
	} else {
		again(fmt.Sprintf("S=%s; %s", c.Path("shared"), f.view))
	}
	was, err := a.Status("redis")
	must(t, err)
	before := agentFiles(t, c)
	r := a.Ctl(command...)
	if r.Code != 1 || !strings.Contains(r.Stderr, f.want) {
		t.Errorf("%s, held %v: %v\nwant exit 1 and %q", f.name, held, r, f.want)
	} else {
		t.Logf("%s, held %v, after %v: %s", f.name, held, r.Took.Round(time.Millisecond), strings.TrimSpace(r.Stderr))
	}
	if s, err := a.Status("redis"); err != nil || s.State != was.State || s.SnapshotID != was.SnapshotID {
		t.Fatalf("%s: it is %q %s, it was %q %s; %v", f.name, s.State, s.SnapshotID, was.State, was.SnapshotID, err)
	}
	unchanged(t, c, before)
	if held {
		must(t, clients.Summary(load.Idle()))
	} else {
		rounds(t, load, 1)
	}
	mend()
	noRecords(t, c)
}
