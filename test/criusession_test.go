package test

import (
	"bufio"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// Sessions whose state is in the memory of their process alone: a process that was
// started anew would have forgotten them.

// interpApp is an interpreter; it opens connections from the VIP.
func interpApp() harness.App {
	return imaged(harness.App{Name: "interp", VIP: vip, Ports: []int{7000},
		Start: []string{filepath.Join(toolDir, "interp"), "-listen", at(7000), "-source", vip}})
}

// echo answers each line in the client's namespace, with what it counted so far.
func echo(t *testing.T, ns *testnet.NS, addr string) {
	t.Helper()
	l, err := ns.Listen("tcp", addr)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				in := bufio.NewScanner(c)
				for n := 1; in.Scan(); n++ {
					if _, err := fmt.Fprintf(c, "%d %s\n", n, in.Text()); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// life is one process with sessions of every kind, whose clients go on meanwhile.
type life struct {
	dial    clients.Dialer
	typists clients.Typists
	typing  *clients.Typing
	stop    func() clients.Typed
	ctl     *clients.Interp
	before  string // who the process is
	calls   int    // over the opened connection
	door    int
}

const echoPort = "7070"

// newLife begins sessions with an interpreter that runs at the VIP.
func newLife(t *testing.T, dial clients.Dialer, client *testnet.NS, host string) *life {
	t.Helper()
	l := &life{dial: dial}
	echo(t, client, net.JoinHostPort(host, echoPort))
	var err error
	l.typists, err = clients.OpenTypists(dial, at(7000), nextClient, 50)
	must(t, err)
	nextClient += 50
	t.Cleanup(l.typists.Close)
	l.ctl = l.session(t)
	l.before, err = l.ctl.Identity()
	must(t, err)
	local, err := l.ctl.Do("dial out " + net.JoinHostPort(host, echoPort))
	must(t, err)
	if !strings.Contains(local, vip) {
		t.Fatalf("the connection that it opened is %q, not from %s", local, vip)
	}
	l.call(t)
	l.typing = l.typists.Type(20*time.Millisecond, 4)
	l.stop = sync.OnceValue(l.typing.Stop)
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *life) session(t *testing.T) *clients.Interp {
	t.Helper()
	c, err := clients.DialInterp(l.dial, at(7000), clients.Strictest)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// call speaks over the opened connection, which is still the same one.
func (l *life) call(t *testing.T) {
	t.Helper()
	l.calls++
	text := fmt.Sprintf("call %d", l.calls)
	must(t, l.ctl.Expect("tell out "+text, fmt.Sprintf("%d %s", l.calls, text)))
}

// through has the process taken away and brought back by move, with sessions that are
// closed on one side.
func (l *life) through(t *testing.T, move func()) {
	t.Helper()
	l.door++
	door := fmt.Sprint("door", l.door)
	held, half := l.session(t), l.session(t)
	must(t, held.Send("wait "+door)) // its client has closed, the reply is owed
	must(t, held.CloseWrite())
	must(t, harness.Wait(reply, "a session waits", func() bool { return l.ctl.Expect("waiting "+door, "1") == nil }))
	name, err := half.Half() // the interpreter has closed, the client goes on
	must(t, err)
	must(t, half.Write([]byte("before ")))
	must(t, l.ctl.Halved(name, []byte("before "), "open"))

	move()
	must(t, half.Write([]byte("behind")))
	must(t, l.ctl.Halved(name, []byte("before behind"), "open"))
	must(t, half.CloseWrite())
	must(t, l.ctl.Halved(name, []byte("before behind"), "ended"))
	must(t, l.ctl.Expect("release "+door, "1"))
	if got, err := held.Reply(); err != nil || got != "released "+door {
		t.Errorf("the reply that was owed: %q, %v", got, err)
	}
	must(t, held.Ended())
	l.look(t)
}

// look sees that all of it goes on.
func (l *life) look(t *testing.T) {
	t.Helper()
	must(t, l.ctl.Expect("pid", l.before)) // restored, not started anew
	l.call(t)
	r := l.typing.Fresh()
	must(t, r.Err())
	t.Logf("%d replies right, the slowest took %v", r.Right, r.Slowest.Round(time.Millisecond))
}

func (l *life) end(t *testing.T) {
	t.Helper()
	r := l.stop()
	must(t, r.Err())
	for i, n := range r.Each {
		if n == 0 {
			t.Errorf("typist %d had no reply", i)
		}
	}
	must(t, clients.Summary(l.typists.Idle()))
}

// TestCRIUMigrate moves the interpreter to another node and back, twice, while its
// clients type on.
func TestCRIUMigrate(t *testing.T) { criuMigrate(t, "10.77.0.2") }

// TestCRIUMigrateIPv6 does so over IPv6.
func TestCRIUMigrateIPv6(t *testing.T) {
	with(t, func() { vip = vip6 }, func(t *testing.T) { criuMigrate(t, "fd77::2") })
}

func criuMigrate(t *testing.T, host string) {
	command, err := criuCommand()
	must(t, err)
	c := newCluster(t, harness.ClusterOptions{Name: "ses", CRIU: command, Apps: []harness.App{interpApp()}})
	must(t, c.Up())
	l := newLife(t, c.Dial, c.Net.Client(), host)
	unnoticed := watchCluster(t, c, vip)
	l.look(t) // the capture knows all numbers from here on
	move := func(i int) {
		m, err := c.Migrate("interp", i%2, 1-i%2)
		must(t, err)
		t.Logf("move %d: %.0f ms", i+1, m.Sum())
	}
	for i := range 2 {
		move(i)
		l.look(t)
	}
	unnoticed(2)
	for i := range 2 {
		l.through(t, func() { move(i) })
	}
	l.end(t)
	_, err = c.Settled("interp", vip, reply)
	must(t, err)
}

// TestCRIUHeld: the interpreter is away and comes back, on the node and in a network
// namespace of its own.
func TestCRIUHeld(t *testing.T) {
	for _, own := range []bool{false, true} {
		t.Run(map[bool]string{false: "node", true: "namespace"}[own], func(t *testing.T) {
			app := interpApp()
			app.Namespace = own
			n := newNode(t, withCRIU(t, harness.Options{Name: "held", Apps: []harness.App{app}}))
			must(t, n.Up())
			l := newLife(t, n.Dial, n.Net.Client(), "10.77.0.2")
			for range 3 {
				l.through(t, func() {
					_, err := n.Snapshot("interp") // the typists wake it
					must(t, err)
					must(t, n.WaitState("interp", "RESTORED", reply))
				})
			}
			l.end(t)
		})
	}
}
