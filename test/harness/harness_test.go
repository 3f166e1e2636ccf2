package harness

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"go.uber.org/goleak"
)

// TestMain lets the test binary stand in for the two programs.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "nfconnfilter":
		stubFilter()
	case "ckptctl":
		stubCtl()
	default:
		goleak.VerifyTestMain(m)
	}
}

// stubFilter says READY=1 and starts a grandchild that outlives it.
func stubFilter() {
	if os.Getenv("STUB") == "broken" {
		fmt.Fprintln(os.Stderr, "the stub is broken")
		os.Exit(3)
	}
	child := exec.Command("sleep", "1000")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		os.Exit(1)
	}
	if os.Getenv("STUB") == "stubborn" {
		signal.Ignore(syscall.SIGTERM)
	}
	c, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err == nil {
		_, err = c.Write([]byte("READY=1"))
	}
	if err != nil {
		os.Exit(1)
	}
	time.Sleep(time.Hour)
}

func stubCtl() {
	fmt.Println("progress")
	fmt.Println("20260101T000000Z-abcd")
	fmt.Fprintln(os.Stderr, strings.Join(os.Args[1:], " "))
	if os.Args[len(os.Args)-1] == "--fail" {
		os.Exit(4)
	}
	os.Exit(0)
}

func stub(t *testing.T, apps ...App) *Node {
	t.Helper()
	testnet.RequireRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for _, name := range []string{"nfconnfilter", "ckptctl"} {
		if err := os.Symlink(self, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	n, err := New(Options{Name: "stub", Bin: bin, Apps: apps})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestDaemons(t *testing.T) {
	n := stub(t, Redis("redis", "10.77.0.100"))
	if err := n.StartFilter(); err != nil {
		t.Fatal(err)
	}
	if err := Wait(5*time.Second, "the grandchild runs", func() bool {
		pids, err := n.Processes("sleep")
		return err == nil && len(pids) == 1
	}); err != nil {
		t.Error(err)
	}
	if id, err := n.Snapshot("redis"); err != nil || id != "20260101T000000Z-abcd" {
		t.Errorf("Snapshot: %q, %v", id, err)
	}
	r := n.Ctl("status", "--fail")
	if r.Code != 4 || r.Err() == nil || !strings.Contains(r.Stderr, "--node "+n.Path("node.toml")+" status") {
		t.Errorf("Ctl: %+v", r)
	}
	n.Filter.Kill()
	if n.Filter.Running() {
		t.Error("running after Kill")
	}
	dir, space := n.Dir, n.Net.Node().Path()
	if pids, err := inside(space); err != nil || len(pids) != 1 {
		t.Errorf("the grandchild alone is left: %v, %v", pids, err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	for _, p := range []string{dir, space} {
		if _, err := os.Stat(p); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
}

func TestBrokenDaemon(t *testing.T) {
	n := stub(t)
	t.Setenv("STUB", "broken")
	if err := n.StartFilter(); err == nil || !strings.Contains(err.Error(), "the stub is broken") {
		t.Errorf("StartFilter: %v, want the program's own words", err)
	}
	t.Setenv("STUB", "stubborn")
	if err := n.StartFilter(); err != nil {
		t.Fatal(err)
	}
	if err := n.Filter.Stop(200 * time.Millisecond); err == nil {
		t.Error("a daemon that ignores SIGTERM was not reported")
	}
}

// TestSweep: what a dead process left is ended and removed, what a live one
// has is not touched.
func TestSweep(t *testing.T) {
	n := stub(t)
	if err := n.StartFilter(); err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(os.TempDir(), fmt.Sprintf("nfcf-%d-left", dead.Process.Pid))
	if err := os.MkdirAll(filepath.Join(left, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("%s is still there", left)
	}
	if _, err := os.Stat(n.Dir); err != nil || !n.Filter.Running() {
		t.Errorf("a live node was swept: %v", err)
	}
}

func TestScheduler(t *testing.T) {
	n := stub(t)
	s, err := n.StartScheduler("127.0.0.1:7400")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := n.Net.Node().Dial("tcp", "127.0.0.1:7400")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "Restore 010.077.000.100\r\n")
	buf := make([]byte, 16)
	k, _ := c.Read(buf)
	if got := s.Requests(); string(buf[:k]) != "OK\r\n" || len(got) != 1 || got[0] != "Restore 010.077.000.100\r\n" {
		t.Errorf("answer %q, requests %q", buf[:k], got)
	}
}

func TestWait(t *testing.T) {
	if err := Wait(10*time.Millisecond, "never", func() bool { return false }); err == nil {
		t.Error("a condition that never holds was met")
	}
}
