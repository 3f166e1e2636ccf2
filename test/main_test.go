// Package test holds the tests that need root: the two programs, real
// applications and real remotes in network namespaces of their own.
package test

import (
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const (
	vip4, vip6 = "10.77.0.100", "fd77::100"
	// reply is how long a command may take at most; wake-ups are far quicker.
	reply = 20 * time.Second
)

var (
	holdFlag     = flag.Duration("hold", 30*time.Second, "how long the long tests hold connections (5s with -short)")
	capturesFlag = flag.String("captures", "", "`directory` for captures of the node's packets in tests that fail")
	binDir       string // nfconnfilter and ckptctl
	// nextClient numbers clients through all tests.
	nextClient int
	// vip is the application's address in the test that runs; tests run one
	// after another.
	vip     = vip4
	toolDir string // bytecount, demo, interp and pool
	// behindNode has applications run in network namespaces of their own.
	behindNode bool
	// adopted has the filter forget applications and connections before the
	// test goes on with them.
	adopted bool
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	flag.Parse()
	if os.Geteuid() != 0 {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("nfcf-%d-bin-", os.Getpid()))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	toolDir, binDir = dir, os.Getenv("NFCF_BIN")
	if err := harness.Sweep(); err != nil {
		fmt.Fprintln(os.Stderr, "clean-up after an earlier run:", err)
	}
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// build makes the test applications, and the two programs unless the caller has them.
func build(dir string) error {
	tools := []string{"bytecount", "demo", "interp", "pool"}
	var pkgs []string
	for _, tool := range tools {
		pkgs = append(pkgs, "./"+tool)
	}
	if binDir != "" {
		// The caller may be root without the go command on its PATH.
		if !slices.ContainsFunc(tools, func(tool string) bool {
			_, err := os.Stat(filepath.Join(binDir, tool))
			return err != nil
		}) {
			toolDir = binDir
			return nil
		}
	} else {
		binDir = dir
		pkgs = append(pkgs, "../cmd/nfconnfilter", "../cmd/ckptctl")
	}
	cmd := exec.Command("go", append([]string{"build", "-buildvcs=false", "-o", dir + "/"}, pkgs...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// hold is how long the long tests hold connections.
func hold() time.Duration {
	if testing.Short() {
		return min(*holdFlag, 5*time.Second)
	}
	return *holdFlag
}

// at is a port of the VIP, to dial or to listen on.
func at(port int) string { return net.JoinHostPort(vip, strconv.Itoa(port)) }

func overIPv6() bool { return vip == vip6 }

// prefix is the VIP in CIDR form.
func prefix() string {
	if overIPv6() {
		return vip + "/128"
	}
	return vip + "/32"
}

// iptables is the tool of the VIP's family.
func iptables() string {
	if overIPv6() {
		return "ip6tables"
	}
	return "iptables"
}

// newNode makes a node that is removed with the test; when the test has
// failed, the logs are shown.
func newNode(t *testing.T, o harness.Options) *harness.Node {
	t.Helper()
	testnet.RequireRoot(t)
	if o.Name == "" {
		o.Name = "t"
	}
	o.Bin = binDir
	for i := range o.Apps {
		o.Apps[i] = placed(o.Apps[i])
	}
	n, err := harness.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		showLogs(t, n.Logs)
		if err := n.Close(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return n
}

// placed puts an application where the test that runs wants it.
func placed(a harness.App) harness.App {
	a.Namespace = a.Namespace || behindNode
	return a
}

// adopt takes everything from the filter that it knows, where the test that
// runs wants that, and has it adopt the application that runs on with its
// connections.
func adopt(t *testing.T, n *harness.Node, app string) {
	t.Helper()
	if !adopted {
		return
	}
	must(t, n.Filter.Stop(5*time.Second))
	purge(t, n)
	must(t, os.Remove(n.Path("state", "journal.db")))
	must(t, n.StartFilter())
	must(t, n.Ctl("start", app).Err())
}

// purge removes the packet rules and sets.
func purge(t *testing.T, n *harness.Node) {
	t.Helper()
	out, err := n.Net.Node().Command(n.Program("nfconnfilter"), append([]string{"rules", "--purge"}, n.Args()...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("purge: %v\n%s", err, out)
	}
}

// redisUp is a node with a running Redis and n connected clients that have
// each exchanged four commands.
func redisUp(t *testing.T, o harness.Options, n int, mix ...clients.KeepAlive) (*harness.Node, *clients.Load) {
	t.Helper()
	if len(o.Apps) == 0 {
		o.Apps = []harness.App{harness.Redis("redis", vip)}
	}
	node := newNode(t, o)
	must(t, node.Up())
	load := redisClients(t, node, n, mix...)
	adopt(t, node, "redis")
	return node, load
}

func redisClients(t *testing.T, node *harness.Node, n int, mix ...clients.KeepAlive) *clients.Load {
	t.Helper()
	load, err := clients.OpenLoad(node.Dial, at(6379), nextClient, n, mix...)
	must(t, err)
	nextClient += n
	t.Cleanup(load.Close)
	rounds(t, load, 4)
	return load
}

func must(t *testing.T, err error) {
	t.Helper()
	if check(t, err); err != nil {
		t.FailNow()
	}
}

// failedFor are the errors that tests have failed for, by their names.
var failedFor sync.Map

// check fails the test for an error, and lets it go on.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		failedFor.Store(t.Name(), err)
		t.Error(err)
	}
}

// showLogs shows what was logged when the test has failed, and then once more what for:
// of a long output often only the end is kept.
func showLogs(t *testing.T, logs func() string) {
	if !t.Failed() {
		return
	}
	t.Log("logs:\n" + logs())
	if err, ok := failedFor.Load(t.Name()); ok {
		t.Logf("failed for: %v", err)
	}
}

// rounds lets every client send that many commands and checks the replies.
func rounds(t *testing.T, load *clients.Load, n int) {
	t.Helper()
	for range n {
		must(t, clients.Summary(load.Round(reply)))
	}
}

// snapshot takes a snapshot and checks that the process is gone.
func snapshot(t *testing.T, n *harness.Node, app, comm string, flags ...string) string {
	t.Helper()
	start := time.Now()
	id, err := n.Snapshot(app, flags...)
	must(t, err)
	t.Logf("snapshot %s in %v", id, time.Since(start).Round(time.Millisecond))
	gone(t, n, comm)
	return id
}

func gone(t *testing.T, n *harness.Node, comm string) {
	t.Helper()
	pids, err := n.Processes(comm)
	must(t, err)
	if len(pids) != 0 {
		t.Fatalf("%s still runs as %v", comm, pids)
	}
}

// held checks, for a while, that the application stays away and that every
// client stays connected.
func held(t *testing.T, n *harness.Node, app, comm string, load *clients.Load, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); ; {
		must(t, clients.Summary(load.Idle()))
		gone(t, n, comm)
		s, err := n.Status(app)
		must(t, err)
		if s.State != "SNAPSHOTDONE" {
			t.Fatalf("state %q while held, with nobody speaking (%+v)", s.State, s)
		}
		left := time.Until(end)
		if left <= 0 {
			return
		}
		time.Sleep(min(left, time.Second))
	}
}

// wake lets one client speak and checks that the application is back.
func wake(t *testing.T, n *harness.Node, app string, c *clients.Redis) time.Duration {
	t.Helper()
	start := time.Now()
	must(t, c.Command(reply))
	took := time.Since(start)
	s, err := n.Status(app)
	must(t, err)
	if s.State != "RESTORED" {
		t.Fatalf("state %q after the wake-up", s.State)
	}
	return took
}
