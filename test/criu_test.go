package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// criuCommand is a CRIU that works on this kernel; make deps-test has brought it.
var criuCommand = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("../scripts/criu.sh").Output()
	return strings.TrimSpace(string(out)), err
})

// imaged has an application dumped with CRIU.
func imaged(a harness.App) harness.App {
	a.Checkpoint += "engine = \"criu\"\n"
	a.Before = nil
	return a
}

// memoryRedis keeps its data in memory alone and tells a digest of it.
func memoryRedis() harness.App {
	a := imaged(harness.Redis("redis", vip))
	a.Start = append(a.Start, "--enable-debug-command", "yes")
	return a
}

func withCRIU(t *testing.T, o harness.Options) harness.Options {
	t.Helper()
	command, err := criuCommand()
	must(t, err)
	o.CRIU = command
	return o
}

// digest asks Redis, over a connection that stays, for the digest of its data.
func digest(t *testing.T, c *clients.RedisRaw) string {
	t.Helper()
	const form = "+0123456789012345678901234567890123456789\r\n"
	must(t, c.SetDeadline(time.Now().Add(reply)))
	_, err := c.Write([]byte("DEBUG DIGEST\r\n"))
	must(t, err)
	b := make([]byte, len(form))
	_, err = io.ReadFull(c, b)
	must(t, err)
	return string(b)
}

// TestCRIURedis: a Redis with its data in memory alone, 1,000 clients, one of which has
// written half of a command of 16 MiB, is away for a minute and woken by one command.
func TestCRIURedis(t *testing.T) {
	t.Parallel()
	const whole = 16 << 20
	away := 2 * hold()
	n, load := redisUp(t, withCRIU(t, harness.Options{Name: "criu", Apps: []harness.App{memoryRedis()}}), 999, clients.Mixed...)
	writer, err := clients.DialRaw(n.Dial, at(6379))
	must(t, err)
	t.Cleanup(func() { writer.Close() })
	must(t, writer.SetDeadline(time.Now().Add(away+time.Minute)))
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)

	value := make([]byte, whole)
	clients.Fill(value, 1, 0)
	request := fmt.Appendf(nil, "*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n$%d\r\n%s\r\n", whole, value)
	half := len(request) / 2
	_, err = writer.Write(request[:half])
	must(t, err)
	time.Sleep(6 * time.Second) // a remote that has spoken just before waits for an answer, and wakes
	operator, err := clients.DialRaw(n.Dial, at(6379))
	must(t, err)
	t.Cleanup(func() { operator.Close() })
	before := digest(t, operator)

	snapshot(t, n, "redis", "redis-server")
	held(t, n, "redis", "redis-server", load, away)
	began := time.Now()
	if after := digest(t, operator); after != before {
		t.Errorf("digest %q, before the snapshot %q", after, before)
	}
	took := time.Since(began)
	if s, err := n.Status("redis"); err != nil || s.State != "RESTORED" {
		t.Errorf("after the wake-up: %+v, %v", s, err)
	}
	rounds(t, load, 4)
	t.Logf("1,000 clients, away for %v: the waking command took %v", away, took.Round(100*time.Microsecond))
	must(t, writer.Exchange(request[half:], []byte("+OK\r\n")))
	must(t, writer.Exchange([]byte("GET big\r\n"), fmt.Appendf(nil, "$%d\r\n%s\r\n", whole, value)))

	if after := digest(t, operator); after == before {
		t.Error("the digest does not tell that 16 MiB were written")
	}

	// At full speed: what is on its way when it is stopped wakes it at once.
	fast, err := clients.DialPipeline(n.Dial, at(6379), nextClient, 16, whole/16)
	must(t, err)
	nextClient++
	t.Cleanup(func() { fast.Close() })
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- fast.Run(stop, reply) }()
	must(t, harness.Wait(reply, "replies to the fast writer", func() bool { return fast.Replies() > 20 }))
	for range 3 {
		_, err := n.Snapshot("redis")
		must(t, err)
		must(t, n.WaitState("redis", "RESTORED", reply))
		seen := fast.Replies()
		must(t, harness.Wait(reply, "more replies to the fast writer", func() bool { return fast.Replies() > seen+20 }))
	}
	close(stop)
	must(t, <-done)
	rounds(t, load, 4)
	must(t, clients.Summary(load.Idle()))
	unnoticed()
	t.Logf("the same client under CRIU's own lock: %v", underLock(t, n, max(away, 10*time.Second)))
}

// underLock dumps a Redis with CRIU alone, whose own lock drops every packet of its
// connections, and tells how the strictest client fares.
func underLock(t *testing.T, n *harness.Node, most time.Duration) error {
	t.Helper()
	command, err := criuCommand()
	must(t, err)
	dir := n.Path("alone")
	must(t, os.MkdirAll(dir, 0o700))
	addr := net.JoinHostPort(n.Net.NodeAddr().String(), "6380")
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(t, err)
	defer log.Close()
	cmd := n.Net.Node().Command("setsid", "--fork", "redis-server", "--bind", n.Net.NodeAddr().String(), "--port", "6380", "--save", "",
		"--dir", dir, "--protected-mode", "no", "--pidfile", filepath.Join(dir, "pid"), "--daemonize", "no")
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Run())
	var c *clients.Redis
	must(t, harness.Wait(10*time.Second, "redis answers", func() bool {
		c, err = clients.DialRedis(n.Dial, addr, 1, clients.Strictest)
		return err == nil
	}))
	defer c.Close()
	must(t, c.Command(reply))
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	must(t, err)
	images := filepath.Join(dir, "images")
	must(t, os.Mkdir(images, 0o700))
	if out, err := n.Net.Node().Command(command, "dump", "-t", strings.TrimSpace(string(pid)), "-D", images, "--tcp-established", "--network-lock", "nftables").CombinedOutput(); err != nil {
		t.Fatalf("criu dump: %v\n%s", err, out)
	}
	began := time.Now()
	if err := harness.Wait(most, "", func() bool { err = c.Idle(); return err != nil }); err != nil {
		t.Errorf("the client lives after %v under CRIU's own lock: it is no test of this one", most)
		return nil
	}
	if !errors.Is(err, clients.ErrTimedOut) && !errors.Is(err, clients.ErrReset) {
		t.Errorf("the client under CRIU's own lock: %v", err)
	}
	return fmt.Errorf("dead after %v: %w", time.Since(began).Round(100*time.Millisecond), err)
}
