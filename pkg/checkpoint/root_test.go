package checkpoint

import (
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// listenEnv makes the test binary play an echo server on its address.
const listenEnv = "CHECKPOINT_TEST_LISTEN"

func playServer(addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		slog.Error("listen", "err", err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go io.Copy(c, c)
	}
}

// Real processes, sockets and addresses in a namespace, with a filter that
// only keeps states.
func TestRealNamespace(t *testing.T) {
	testnet.RequireRoot(t)
	n := testnet.New(t, testnet.Options{Name: "ckpt"})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w, a := newWorld(t, 0)
	w.state = ""
	a.cfg.Node.Interface = "lo" // eth0 leads to the application
	app := a.cfg.Apps["redis"]
	app.Process.Namespace = n.Client().Path()
	app.Process.Start = []string{self}
	app.Process.Environment = []string{listenEnv + "=192.0.2.100:6379"}
	app.Process.ReadyTimeout = config.Duration(10 * time.Second)
	app.Checkpoint.Before = nil
	app.Checkpoint.DrainTimeout = config.Duration(time.Second)
	l := &osLauncher{stateDir: t.TempDir(), log: a.log}
	t.Cleanup(l.children.Wait)
	a.launch, a.addrs = l, osAddresses{log: a.log, host: n.Node().Path()}
	a.sysctl = func(_, name string) string {
		var b []byte
		_ = n.Node().Do(func() (err error) {
			b, err = os.ReadFile("/proc/sys/" + name)
			return err
		})
		return string(b)
	}
	a.openSockets = func(ns string) (sockets, error) { return sockdiag.OpenIn(namespacePath(ns)) }
	// Without the node's help nobody would reach it.
	wantError := func(want string) {
		t.Helper()
		if _, err := a.start(t.Context(), "redis"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("start: %v, want %q", err, want)
		}
		if _, ok, _ := a.addrs.has(app.Process.Namespace, testVIP); ok {
			t.Error("a start that failed left the VIP")
		}
	}
	wantError("no route to 192.0.2.100")
	if err := n.Node().AddRoute(testnet.Iface, "192.0.2.100/32", n.ClientAddr()); err != nil {
		t.Fatal(err)
	}
	if err := n.Node().Sysctl("net/ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	wantError("sysctl -w net.ipv4.ip_forward=1")
	if err := n.Node().Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.start(t.Context(), "redis"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p, _ := a.processOf(app); p != nil {
			_ = p.stop(9, 0)
		}
	})
	if iface, ok, err := a.addrs.has(app.Process.Namespace, testVIP); err != nil || !ok || iface != "lo" {
		t.Errorf("VIP on %q, %v, %v", iface, ok, err)
	}
	// A connection within the node is named and left out.
	c, err := n.Client().Dial("tcp", "192.0.2.100:6379")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, err := snapshotOnce(t.Context(), a, false)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(w.trace(), "sockets=0,ports=[6379]") || w.state != control.StateSnapshotDone {
		t.Errorf("steps %s", w.trace())
	}
	if p, err := a.processOf(app); p != nil || err != nil {
		t.Errorf("it still runs: %v, %v", p, err)
	}
	if iface, err := a.addrs.route(testVIP); err != nil || iface != "" {
		t.Errorf("while it is away the VIP is not the node's: %q %v", iface, err)
	}
	if _, err := a.restore(t.Context(), "redis", r.SnapshotId); err != nil {
		t.Fatal(err)
	}
	if iface, err := a.addrs.route(testVIP); err != nil || iface != testnet.Iface {
		t.Errorf("when it is back the VIP is reached by %q %v", iface, err)
	}
	if _, err := a.stop(t.Context(), "redis", false); err != nil {
		t.Fatal(err)
	}
	if _, ok, _ := a.addrs.has(app.Process.Namespace, testVIP); ok {
		t.Error("the VIP is left")
	}
	// A port that is taken, and a command that fails at once.
	app.Process.Environment = []string{listenEnv + "=203.0.113.1:6379"}
	began := time.Now()
	if _, err := a.start(t.Context(), "redis"); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("an address that is not here: %v", err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the end of the process was noticed after %s", d)
	}
}
