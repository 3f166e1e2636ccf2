package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// opener opens a connection to each of its arguments, ADDRESS/PORT, one after
// the other and from the beginning again; each lasts until the server has said
// a word and ended it. It begins when the file $0 is there.
const opener = `until [ -e "$0" ]; do sleep 0.05; done
while :; do
	for to; do
		exec 3<>/dev/tcp/$to || exit 1
		read -r -u 3 word && read -r -u 3
		exec 3>&-
	done
done`

// opened are the servers that the opener connects to, in its order.
type opened struct {
	t    *testing.T
	n    *harness.Node
	lns  []net.Listener
	next int
	conn net.Conn // the last, which the application waits on
}

// openers starts the servers and writes the application.
func openers(t *testing.T, place harness.App) *opened {
	o := &opened{t: t, n: newNode(t, harness.Options{Name: "bind"})}
	place.Name, place.VIP, place.Process = "opener", vip4+","+vip6, "bind_vip = true"
	place.Start = []string{"/bin/bash", "-c", opener, "@app/go"}
	for _, to := range []string{"10.77.0.2/5432", "fd77::2/5432", "10.77.0.2/443", "fd77::2/443"} {
		addr, port, _ := strings.Cut(to, "/")
		ln, err := o.n.Net.Client().Listen("tcp", net.JoinHostPort(addr, port))
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		o.lns = append(o.lns, ln)
		place.Start = append(place.Start, to)
	}
	must(t, o.n.WriteApp(place))
	must(t, o.n.Up())
	must(t, o.n.Ctl("start", "opener").Err())
	return o
}

// begin lets the application open its connections.
func (o *opened) begin() {
	o.t.Helper()
	must(o.t, os.WriteFile(o.n.Path("app", "go"), nil, 0o644))
}

// accept ends the connection of the last call, whereupon the application opens
// the next, and checks that one's source. So nothing is opened between two
// calls.
func (o *opened) accept(what, source string) {
	o.t.Helper()
	if o.conn != nil {
		must(o.t, o.conn.SetDeadline(time.Now().Add(reply)))
		_, err := fmt.Fprintln(o.conn, "word")
		must(o.t, err)
		must(o.t, o.conn.Close())
	}
	ln := o.lns[o.next%len(o.lns)]
	o.next++
	must(o.t, ln.(*net.TCPListener).SetDeadline(time.Now().Add(reply)))
	conn, err := ln.Accept()
	if err != nil {
		o.t.Fatalf("%s: %v", what, err)
	}
	o.t.Cleanup(func() { conn.Close() })
	o.conn = conn
	if from := conn.RemoteAddr().(*net.TCPAddr).IP.String(); from != source {
		o.t.Errorf("%s: %v sees a connection from %s, want %s", what, ln.Addr(), from, source)
	}
}

// round takes several connections.
func (o *opened) round(what string, sources ...string) {
	o.t.Helper()
	for _, s := range sources {
		o.accept(what, s)
	}
}

// cgroup is the application's, by the agent's record.
func (o *opened) cgroup() string {
	o.t.Helper()
	b, err := os.ReadFile(o.n.Path("state", "agent", "opener.json"))
	must(o.t, err)
	var record struct{ Cgroup string }
	must(o.t, json.Unmarshal(b, &record))
	if fi, err := os.Stat(record.Cgroup); err != nil || !fi.IsDir() {
		o.t.Fatalf("cgroup %q: %v", record.Cgroup, err)
	}
	return record.Cgroup
}

// stop ends the application; its cgroup takes the hook with it.
func (o *opened) stop() {
	o.t.Helper()
	dir := o.cgroup()
	must(o.t, o.n.Ctl("stop", "opener").Err())
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		o.t.Errorf("left: %s (%v)", dir, err)
	}
}

// restart starts another agent and waits for its first answer: before that it
// looks at what the earlier one left.
func (o *opened) restart() {
	o.t.Helper()
	must(o.t, o.n.StartAgent())
	must(o.t, o.n.Ctl("snapshots").Err())
}

func (o *opened) edit(from, to string) {
	o.t.Helper()
	path := o.n.Path("shared", "apps", "opener.toml")
	b, err := os.ReadFile(path)
	must(o.t, err)
	if !strings.Contains(string(b), from) {
		o.t.Fatalf("%q is not in %s", from, b)
	}
	must(o.t, os.WriteFile(path, []byte(strings.Replace(string(b), from, to, 1)), 0o644))
}

// TestBindVIP: a program that knows nothing of the VIP opens connections, and
// the servers see them come from it.
func TestBindVIP(t *testing.T) {
	const own4, own6 = "10.77.0.1", "fd77::1"
	o := openers(t, harness.App{})
	o.begin()
	o.round("started", vip4, vip6, vip4, vip6)
	// With no agent, and with another one that reads another list of ports.
	o.n.Agent.Kill()
	o.round("without an agent", vip4, vip6, vip4, vip6)
	o.edit("include_ports = []", "include_ports = []\noutgoing_ports = [443]")
	o.restart()
	o.round("another agent, port 443 alone", own4, own6, vip4, vip6)
	// Off, for the same process.
	o.edit("bind_vip = true", "bind_vip = false")
	must(t, o.n.Ctl("start", "opener").Err())
	o.round("switched off", own4, own6, own4, own6)
	// And on again.
	o.edit("bind_vip = false", "bind_vip = true")
	o.edit("outgoing_ports = [443]", "outgoing_ports = []")
	must(t, o.n.Ctl("start", "opener").Err())
	o.round("switched on", vip4, vip6, vip4, vip6)
	o.stop()
}

// restored takes the application away and brings it back: the new process has
// a cgroup of its own.
func (o *opened) restored() {
	o.t.Helper()
	before := o.cgroup()
	snapshot(o.t, o.n, "opener", "bash")
	must(o.t, o.n.Ctl("restore", "opener").Err())
	if after := o.cgroup(); after == before {
		o.t.Errorf("still cgroup %s", before)
	}
}

// TestBindVIPBehind: the same from a network namespace of its own, whose own
// addresses no remote has a route to.
func TestBindVIPBehind(t *testing.T) {
	o := openers(t, harness.App{Namespace: true})
	o.begin()
	o.round("started", vip4, vip6, vip4, vip6)
	o.n.Agent.Kill()
	o.restart()
	o.round("another agent", vip4, vip6, vip4, vip6)
	o.stop()
}

// TestBindVIPRestored: a restored application opens them as one that was
// started.
func TestBindVIPRestored(t *testing.T) {
	for name, place := range map[string]harness.App{"on the node": {}, "behind it": {Namespace: true}} {
		t.Run(name, func(t *testing.T) {
			o := openers(t, place)
			o.restored()
			o.begin()
			o.round("restored", vip4, vip6, vip4, vip6)
			o.stop()
		})
	}
}

// TestBindVIPRefused: where the hook is not possible start says so, and what to
// do, and leaves nothing.
func TestBindVIPRefused(t *testing.T) {
	n := newNode(t, harness.Options{Name: "bind"})
	app := harness.App{Name: "opener", VIP: vip4, Process: fmt.Sprintf("bind_vip = true\npid_file = %q", n.Path("app", "pid"))}
	must(t, n.WriteApp(app))
	must(t, n.Up())
	cmd := n.Net.Node().Command("/bin/sleep", "10000")
	must(t, cmd.Start())
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	must(t, os.WriteFile(n.Path("app", "pid"), fmt.Appendf(nil, "%d\n", cmd.Process.Pid), 0o644))
	r := n.Ctl("start", "opener")
	if r.Code != 1 || !strings.Contains(r.Stderr, "set bind_vip = false") {
		t.Errorf("start: %d %s", r.Code, r.Stderr)
	}
	out, err := n.Net.Node().Command("ip", "-4", "addr", "show", "dev", testnet.Iface).Output()
	must(t, err)
	if strings.Contains(string(out), vip4) {
		t.Errorf("the VIP is left: %s", out)
	}
}
