package test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// exhaust leaves a running daemon no file descriptor; what it returns gives it back
// what it had.
func exhaust(t *testing.T, d *harness.Daemon) (restore func()) {
	t.Helper()
	free := 0
	for {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", d.PID(), free)); os.IsNotExist(err) {
			break
		}
		free++
	}
	var old unix.Rlimit
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, nil, &old))
	// Numbers from the limit on that are open stay open.
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: old.Max}, nil))
	return func() {
		t.Helper()
		must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, &old, nil))
	}
}

// TestNoDescriptors: filter and agent have no file descriptor left. Packets go on,
// requests wait or fail, and a client that speaks to an application that is away is
// kept waiting. It goes on by itself as soon as there are descriptors.
func TestNoDescriptors(t *testing.T) {
	t.Parallel()
	n, away, back, unnoticed := besides(t, "nofile", 30, clients.Strictest)
	talk := back.Talk(200*time.Millisecond, reply)
	filter, agent := exhaust(t, n.Filter), exhaust(t, n.Agent)
	for _, cmd := range [][]string{{"status"}, {"snapshot", "second"}} {
		r := n.Ctl(append(cmd, "--timeout", "1s")...)
		if r.Code == 0 || r.Took > 5*time.Second {
			t.Errorf("%v: exit %d after %v: %s%s", cmd, r.Code, r.Took, r.Stdout, r.Stderr)
		}
	}
	talk.Commands()
	woken := make(chan error, 1)
	go func() { woken <- away.Clients[0].Command(reply) }()
	time.Sleep(3 * time.Second) // the length of the outage
	must(t, clients.Summary((&clients.Load{Clients: away.Clients[1:]}).Idle()))
	if k, slowest := talk.Commands(); k < 100 || slowest > time.Second {
		t.Errorf("%d commands without descriptors, the slowest in %v", k, slowest)
	}
	filter()
	began := time.Now()
	must(t, harness.Wait(3*time.Second, "the filter answers", func() bool {
		return n.FilterAPI(time.Second, "Status", map[string]string{}, nil) == nil
	}))
	agent()
	must(t, <-woken)
	t.Logf("woken %v after the daemons had descriptors again", time.Since(began).Round(time.Millisecond))
	must(t, clients.Summary(talk.Stop()))
	rounds(t, away, 1)
	must(t, n.Ctl("snapshot", "second").Err())
	wake(t, n, "second", back.Clients[0])
	unnoticed()
}

// stuck opens connections to a daemon's socket and goes no further than text.
func stuck(t *testing.T, n *harness.Node, socket, text string, count int) (list []net.Conn) {
	t.Helper()
	for range count {
		c, err := net.Dial("unix", n.Path(socket))
		must(t, err)
		t.Cleanup(func() { c.Close() })
		must(t, c.SetWriteDeadline(time.Now().Add(20*time.Millisecond))) // who reads nothing may be read no further
		_, _ = io.WriteString(c, text)
		list = append(list, c)
	}
	return list
}

// TestStuckClients: a hundred clients of each daemon say nothing, stop in the
// middle of a request, or take no reply. Others are served; those who have not
// said what they want after ten seconds are cut off; and nobody keeps the filter from being
// restarted.
func TestStuckClients(t *testing.T) {
	t.Parallel()
	n, away, _, unnoticed := besides(t, "stuck", 20, clients.Strictest)
	var silent []net.Conn
	began := time.Now()
	for socket, method := range map[string]string{"control.sock": "Filter/Status", "agent.sock": "Agent/Snapshots"} {
		head := "POST /nfconnfilter.v1." + method + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
		silent = append(silent, stuck(t, n, socket, "", 25)...)
		silent = append(silent, stuck(t, n, socket, head, 25)...)
		stuck(t, n, socket, head+"Content-Length: 100\r\n\r\n{", 25)
		stuck(t, n, socket, strings.Repeat(head+"Content-Length: 15\r\n\r\n{\"app\":\"redis\"}", 1000), 25)
	}
	serve := func() {
		t.Helper()
		for _, cmd := range [][]string{{"status"}, {"snapshots", "redis"}, {"conns", "redis"}} {
			r := n.Ctl(cmd...)
			must(t, r.Err())
			if r.Took > 2*time.Second {
				t.Errorf("%v took %v", cmd, r.Took)
			}
		}
	}
	serve()
	wake(t, n, "redis", away.Clients[0])
	snapshot(t, n, "redis", "nothing")
	for i, c := range silent {
		must(t, c.SetReadDeadline(began.Add(15*time.Second)))
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Fatalf("client %d, who has asked nothing, is not cut off within %v: %v", i, time.Since(began), err)
		}
	}
	t.Logf("clients who have asked nothing are cut off after %v", time.Since(began).Round(time.Millisecond))
	serve()

	began = time.Now()
	must(t, n.Filter.Stop(4*time.Second))
	took := time.Since(began)
	must(t, n.StartFilter())
	gap, _ := gapOf(t, n.Filter)
	t.Logf("stopped in %v beside stuck clients, a gap of %v", took.Round(time.Millisecond), gap)
	if gap > time.Second {
		t.Errorf("nobody filtered for %v", gap)
	}
	wake(t, n, "redis", away.Clients[1])
	rounds(t, away, 1)
	unnoticed()
}
