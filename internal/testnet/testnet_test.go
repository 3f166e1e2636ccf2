package testnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func netns(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// echo serves one connection at a time in ns until the test ends.
func echo(t *testing.T, ns *NS, addr string) string {
	t.Helper()
	ln, err := ns.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return ln.Addr().String()
}

func roundTrip(t *testing.T, c net.Conn, n int) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, n))
		sent <- err
	}()
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatalf("read: %v", err)
	}
	if err := <-sent; err != nil {
		t.Fatalf("write: %v", err)
	}
}

func TestDialListenBothFamilies(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "dial"})
	if err := errors.Join(n.Node().AddAddr(Iface, "fd77::1/64"), n.Client().AddAddr(Iface, "fd77::2/64")); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"10.77.0.1", "fd77::1", "127.0.0.1"} {
		from := n.Client()
		if host == "127.0.0.1" {
			from = n.Node()
		}
		c, err := from.Dial("tcp", echo(t, n.Node(), net.JoinHostPort(host, "0")))
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, c, 100_000)
		_ = c.Close()
	}
	if _, err := n.Client().Dial("tcp", "127.0.0.1:1"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("dial of a closed port: %v", err)
	}
	if _, err := n.Client().Dial("tcp", "localhost:1"); err == nil || !strings.Contains(err.Error(), "not a name") {
		t.Fatalf("dial of a name: %v", err)
	}
}

func TestAddAddrs(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "addrs"})
	if err := n.Client().AddAddrs(Iface, netip.MustParsePrefix("10.77.0.250/16"), 10); err != nil {
		t.Fatal(err)
	}
	if err := n.Node().AddRoute(Iface, "10.77.0.0/16", netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	addr := echo(t, n.Node(), "10.77.0.1:0")
	for _, from := range []string{"10.77.0.250", "10.77.1.3"} {
		c, err := n.Client().DialFrom("tcp", from+":0", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.LocalAddr().(*net.TCPAddr).IP.String(); got != from {
			t.Errorf("local address %s, want %s", got, from)
		}
		roundTrip(t, c, 10)
		_ = c.Close()
	}
	if _, err := n.Client().DialFrom("tcp", "10.77.1.4:0", addr); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Fatalf("an address too many: %v", err)
	}
	if err := n.Client().AddAddr("nosuch0", "10.1.1.1/32"); err == nil || !strings.Contains(err.Error(), "nosuch0") {
		t.Fatalf("error %v must name the interface", err)
	}
}

func TestDoRestoresThreads(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "do"})
	own := netns(t)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			ns := n.Node()
			if i%2 == 0 {
				ns = n.Client()
			}
			sentinel := errors.New("e")
			var inside, again string
			err := ns.Do(func() error {
				inside = netns(t)
				time.Sleep(time.Millisecond)
				again = netns(t)
				return sentinel
			})
			if err != sentinel || inside == own || inside != again {
				t.Errorf("err %v, inside %s then %s, own %s", err, inside, again, own)
			}
			if s := netns(t); s != own {
				t.Errorf("caller moved to %s", s)
			}
		})
	}
	wg.Wait()
	for range 200 { // no pooled thread may have stayed inside
		wg.Go(func() {
			if s := netns(t); s != own {
				t.Errorf("a thread was left in %s", s)
			}
		})
	}
	wg.Wait()
}

func TestDoPassesOnPanicAndGoexit(t *testing.T) {
	RequireRoot(t)
	n := New(t, Options{Name: "panic"})
	func() {
		defer func() {
			if r := recover(); r != "boom" {
				t.Errorf("recovered %v", r)
			}
		}()
		_ = n.Node().Do(func() error { panic("boom") })
		t.Error("went on after a panic")
	}()
	done := make(chan bool)
	go func() {
		defer close(done)
		_ = n.Node().Do(func() error { runtime.Goexit(); return nil })
		done <- true
	}()
	if <-done {
		t.Error("went on after Goexit")
	}
}

func TestCommand(t *testing.T) {
	RequireRoot(t)
	n, err := Setup(Options{Name: "cmd"})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			_ = n.Close()
		}
	}()
	out, err := n.Node().Command("ip", "-4", "-o", "addr").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "10.77.0.1/24") {
		t.Fatalf("%v: %s", err, out)
	}
	if err := n.Node().Command("no-such-program-here").Start(); !errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("a missing program: %v", err)
	}
	const script = "echo ready; exec sleep 1000"
	killed, left := n.Node().Command("sh", "-c", script), n.Node().Command("sh", "-c", script)
	for _, cmd := range []*exec.Cmd{killed, left} {
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil { // the command itself runs, not nsenter on its way in
			_, err = io.ReadFull(out, make([]byte, len("ready\n")))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Kill(killed.Process.Pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := killed.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Fatalf("killed command: %v", err)
	}
	closed = true
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- left.Wait() }()
	select {
	case err := <-waited:
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("command left at Close: %v", err)
		}
	case <-time.After(10 * time.Second):
		_ = left.Process.Kill()
		<-waited
		t.Fatal("the command outlived its namespace")
	}
	for _, ns := range []*NS{n.Node(), n.Client()} {
		if _, err := os.Stat(ns.Path()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", ns.Path(), err)
		}
	}
}

func TestSweepTakesOnlyDeadOwners(t *testing.T) {
	RequireRoot(t)
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	n := New(t, Options{Name: "sweep"})
	dead := filepath.Join(nsDir, fmt.Sprintf("%s%d-1-x", nsPrefix, cmd.Process.Pid))
	other := filepath.Join(nsDir, fmt.Sprintf("nfcfother-%d-1-x", cmd.Process.Pid))
	for _, p := range []string{dead, other} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(p)
	}
	if err := bindNewNS(dead); err != nil {
		t.Fatal(err)
	}
	sweep()
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace of a dead process is left: %v", err)
	}
	for _, p := range []string{other, n.Node().Path()} {
		if _, err := os.Stat(p); err != nil {
			t.Error(err)
		}
	}
}

func TestOffloadsAndSysctl(t *testing.T) {
	RequireRoot(t)
	on, off := New(t, Options{Name: "on"}), New(t, Options{Name: "off", NoOffloads: true})
	for _, c := range []struct {
		ns   *NS
		want bool
	}{{on.Node(), true}, {on.Client(), true}, {off.Node(), false}, {off.Client(), false}} {
		if tx, gso, err := c.ns.offloads(Iface); err != nil || tx != c.want || gso != c.want {
			t.Errorf("%s: tx checksum %v, gso %v, want %v (%v)", c.ns.Name(), tx, gso, c.want, err)
		}
	}
	if err := on.Node().Sysctl("net.ipv4.tcp_timestamps", "0"); err != nil {
		t.Fatal(err)
	}
	read := func(ns *NS) (v string) {
		_ = ns.Do(func() error {
			b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_timestamps")
			v = strings.TrimSpace(string(b))
			return err
		})
		return v
	}
	if a, b := read(on.Node()), read(on.Client()); a != "0" || b != "1" {
		t.Errorf("tcp_timestamps: node %q, client %q", a, b)
	}
}
