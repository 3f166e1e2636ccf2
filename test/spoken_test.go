package test

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// What the filter says and takes for an application that is away: heartbeats
// and spooled data.

// beating is Redis with heartbeats of its clients' prefix.
func beating(lines string) harness.App {
	a := harness.Redis("redis", vip)
	prefix := "10.77.0.0/16"
	if overIPv6() {
		prefix = "fd77::/64"
	}
	a.Checkpoint = fmt.Sprintf("[[heartbeat]]\nremote = %q\n%s", prefix, lines)
	return a
}

// said sends p and reads want.
func said(c net.Conn, p, want string, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(p)); err != nil {
		return err
	}
	got := make([]byte, len(want))
	for n := 0; n < len(got); {
		k, err := c.Read(got[n:])
		if n += k; err != nil {
			return fmt.Errorf("after %q: %w", got[:n], err)
		}
	}
	if string(got) != want {
		return fmt.Errorf("%q was answered with %q, want %q", p, got, want)
	}
	return nil
}

// TestHeartbeats: clients ask every half second whether the server lives, and are
// answered without waking it; the next request is answered right.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	heartbeats(t)
}

func heartbeats(t *testing.T) {
	n := newNode(t, harness.Options{Name: "beat", Apps: []harness.App{beating("match = \"PING\\r\\n\"\nreply = \"+PONG\\r\\n\"\n")}})
	must(t, n.Up())
	var all []net.Conn
	for range 10 {
		c, err := n.Dial(at(6379))
		must(t, err)
		t.Cleanup(func() { c.Close() })
		must(t, said(c, "PING\r\n", "+PONG\r\n", reply))
		all = append(all, c)
	}
	must(t, said(all[0], "SET k value\r\n", "+OK\r\n", reply))
	adopt(t, n, "redis")
	unnoticed := watch(t, n.Net, vip)
	for _, c := range all { // the capture knows all numbers from here on
		must(t, said(c, "PING\r\n", "+PONG\r\n", reply))
	}
	for round := range 2 {
		snapshot(t, n, "redis", "redis-server")
		rounds := 0
		for end := time.Now().Add(hold() / 2); time.Now().Before(end); rounds++ {
			for _, c := range all {
				must(t, said(c, "PING\r\n", "+PONG\r\n", reply))
			}
			time.Sleep(500 * time.Millisecond) // the clients' interval
		}
		st, err := n.Status("redis")
		must(t, err)
		if st.State != "SNAPSHOTDONE" {
			t.Fatalf("after %d rounds of heartbeats the state is %s", rounds, st.State)
		}
		gone(t, n, "redis-server")
		for _, c := range all {
			must(t, said(c, "GET k\r\n", "$5\r\nvalue\r\n", reply))
		}
		must(t, said(all[round], "PING\r\n", "+PONG\r\n", reply))
		t.Logf("%d rounds of heartbeats, by %d clients", rounds, len(all))
	}
	unnoticed()
}

// TestHeartbeatsSent: clients that give up when they hear nothing for five
// seconds hear something every two.
func TestHeartbeatsSent(t *testing.T) {
	t.Parallel()
	const idle = 5 * time.Second
	n := newNode(t, harness.Options{Name: "beats", Apps: []harness.App{beating("send = \"\\n\"\ninterval = \"2s\"\n")}})
	must(t, n.Up())
	c, err := n.Dial(at(6379))
	must(t, err)
	defer c.Close()
	must(t, said(c, "SET k value\r\n", "+OK\r\n", reply))
	adopt(t, n, "redis")
	unnoticed := watch(t, n.Net, vip)
	must(t, said(c, "PING\r\n", "+PONG\r\n", reply)) // the capture knows all numbers from here on
	snapshot(t, n, "redis", "redis-server")
	r := bufio.NewReader(c)
	heard := 0
	for end := time.Now().Add(3 * idle); time.Now().Before(end); heard++ {
		must(t, c.SetReadDeadline(time.Now().Add(idle)))
		b, err := r.ReadByte()
		must(t, err)
		if b != '\n' {
			t.Fatalf("heard %q", b)
		}
	}
	gone(t, n, "redis-server")
	t.Logf("%d heartbeats in %v", heard, 3*idle)
	must(t, c.SetDeadline(time.Now().Add(reply)))
	_, err = c.Write([]byte("GET k\r\n"))
	must(t, err)
	var got strings.Builder
	for got.Len() < len("$5\r\nvalue\r\n") {
		line, err := r.ReadString('\n')
		must(t, err)
		if line != "\n" { // one more heartbeat
			got.WriteString(line)
		}
	}
	if got.String() != "$5\r\nvalue\r\n" {
		t.Errorf("the reply is %q", got.String())
	}
	unnoticed()
}

// TestSpool: remotes that give up after three seconds without an acknowledgement
// write 100 KiB each while the server is away for 20 s; and one sends its request,
// closes its side and waits for the answer. (Shorter where the tests' setting says so.)
func TestSpool(t *testing.T) {
	t.Parallel()
	spool(t)
}

func spool(t *testing.T) {
	const (
		writers = 4
		first   = 64 << 10
		more    = 100 << 10
		timeout = 3 * time.Second
	)
	away := min(hold(), 20*time.Second)
	n := newNode(t, harness.Options{Name: "spool"})
	path := n.Path("counts")
	counts, err := clients.OpenCountFile(path)
	must(t, err)
	t.Cleanup(func() { counts.Close() })
	app := bulkApp(n, path)
	app.Checkpoint = "[hold]\nspool = \"256KiB\"\nwake = \"full\"\n"
	must(t, n.WriteApp(placed(app)))
	must(t, n.Up())
	must(t, n.Ctl("start", "count").Err())
	type writer struct {
		*net.TCPConn
		port uint16
		sent uint64
	}
	write := func(w *writer, k int) {
		b := make([]byte, k)
		clients.Fill(b, uint64(w.port), w.sent)
		must(t, w.SetWriteDeadline(time.Now().Add(reply)))
		_, err := w.Write(b)
		must(t, err)
		w.sent += uint64(k)
	}
	taken := func(w *writer) uint64 {
		if r := counts.Find(w.port); r != nil {
			return r.Count()
		}
		return 0
	}
	var all []*writer
	for range writers {
		c, err := n.Dial(at(9000))
		must(t, err)
		t.Cleanup(func() { c.Close() })
		w := &writer{TCPConn: c.(*net.TCPConn), port: uint16(c.LocalAddr().(*net.TCPAddr).Port)}
		raw, err := w.SyscallConn()
		must(t, err)
		must(t, raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds()))
		}))
		must(t, err)
		write(w, first)
		all = append(all, w)
	}
	settled := func(what string) {
		t.Helper()
		must(t, harness.Wait(reply, what, func() bool {
			for _, w := range all {
				if taken(w) != w.sent {
					return false
				}
			}
			return true
		}))
	}
	settled("the first octets are read")
	adopt(t, n, "count")
	unnoticed := watch(t, n.Net, vip)
	snapshot(t, n, "count", "bytecount")
	begin := time.Now()
	for _, w := range all {
		write(w, more)
	}
	// Acknowledged at once: nothing waits in the writers.
	must(t, harness.Wait(timeout, "everything is acknowledged", func() bool {
		for _, w := range all {
			if q, err := unsent(w.TCPConn); err != nil || q != 0 {
				return false
			}
		}
		return true
	}))
	time.Sleep(away - time.Since(begin))
	gone(t, n, "bytecount")
	// Its answer is the number of octets that the server has read.
	must(t, all[0].CloseWrite())
	must(t, all[0].SetReadDeadline(time.Now().Add(reply)))
	line, err := bufio.NewReader(all[0]).ReadString('\n')
	must(t, err)
	if want := fmt.Sprintln(all[0].sent); line != want {
		t.Errorf("the answer is %q, want %q", line, want)
	}
	settled("the spools are read")
	for _, w := range all[1:] {
		write(w, first)
	}
	settled("what follows is read")
	for _, w := range all {
		if r := counts.Find(w.port); r.Wrong() != 0 {
			t.Errorf("%d octets of %d are wrong", r.Wrong(), w.port)
		}
	}
	unnoticed()
}

// unsent is how many octets the remote of c has not acknowledged.
func unsent(c *net.TCPConn) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	if cerr != nil {
		return 0, cerr
	}
	return n, err
}
