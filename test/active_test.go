package test

import (
	"bufio"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const poolSize = 50

// asker is a client of the pool program.
type asker struct {
	conn net.Conn
	r    *bufio.Reader
}

// ask has the application ask its server over each of its connections.
func (a *asker) ask(t *testing.T, key, want string) {
	t.Helper()
	must(t, a.conn.SetDeadline(time.Now().Add(reply)))
	_, err := fmt.Fprintln(a.conn, "ask "+key)
	must(t, err)
	line, err := a.r.ReadString('\n')
	must(t, err)
	got := strings.Fields(line)
	if len(got) != poolSize {
		t.Fatalf("%d answers, want %d", len(got), poolSize)
	}
	for i, v := range got {
		if v != want {
			t.Fatalf("connection %d answered %q, want %q", i, v, want)
		}
	}
}

// sessions names the connections that the server has of vip, each by a number
// that it gave it and the client's address.
func sessions(t *testing.T, ns *testnet.NS, server, vip string) []string {
	t.Helper()
	host, port, err := net.SplitHostPort(server)
	must(t, err)
	out, err := ns.Command("redis-cli", "-h", host, "-p", port, "client", "list").Output()
	must(t, err)
	var list []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 1 && strings.Contains(f[1], vip) {
			list = append(list, f[0]+" "+f[1])
		}
	}
	slices.Sort(list)
	return list
}

// TestOutgoingPool: the connections that an application has opened to a server
// on another machine, with bind_vip and no word of its own about addresses, are kept too, while it is away and when it comes back,
// twice: the server has the same ones all the time, and sees no SYN.
func TestOutgoingPool(t *testing.T) {
	t.Parallel()
	outgoingPool(t)
}

func outgoingPool(t *testing.T) {
	n := newNode(t, harness.Options{Name: "pool"})
	host := n.Net.ClientAddr().String()
	if overIPv6() {
		host = "fd77::2"
	}
	server := net.JoinHostPort(host, "6379")
	redis := n.Net.Client().Command("redis-server", "--bind", host, "--port", "6379",
		"--save", "", "--appendonly", "no", "--protected-mode", "no", "--tcp-keepalive", "1")
	must(t, redis.Start())
	t.Cleanup(func() { _ = redis.Process.Kill(); _ = redis.Wait() })
	cli := func(args ...string) error {
		out, err := n.Net.Client().Command("redis-cli", append([]string{"-h", host}, args...)...).CombinedOutput()
		if err != nil || strings.HasPrefix(string(out), "ERR") {
			return fmt.Errorf("redis-cli %v: %w: %s", args, err, out)
		}
		return nil
	}
	must(t, harness.Wait(reply, "the server answers", func() bool { return cli("set", "k", "v0") == nil }))
	must(t, n.WriteApp(placed(harness.App{Name: "pool", VIP: vip, Ports: []int{7000},
		Start:   []string{filepath.Join(toolDir, "pool"), "-listen", at(7000), "-server", server, "-size", fmt.Sprint(poolSize), "-bind=false"},
		Process: "bind_vip = true"})))
	must(t, n.Up())
	must(t, n.Ctl("start", "pool").Err())
	conn, err := n.Dial(at(7000))
	must(t, err)
	defer conn.Close()
	a := &asker{conn: conn, r: bufio.NewReader(conn)}
	a.ask(t, "k", "v0")
	adopt(t, n, "pool")
	before := sessions(t, n.Net.Client(), server, vip)
	if len(before) != poolSize {
		t.Fatalf("the server has %d connections, want %d", len(before), poolSize)
	}
	seen, err := n.Net.Client().Capture(testnet.Iface, "tcp port 6379")
	must(t, err)
	for round := range 2 {
		snapshot(t, n, "pool", "pool")
		conns, err := n.Conns("pool")
		must(t, err)
		if len(conns) != poolSize+1 {
			t.Fatalf("%d connections are held, want %d", len(conns), poolSize+1)
		}
		time.Sleep(strictHold) // the server's keepalives are answered
		gone(t, n, "pool")
		want := fmt.Sprintf("v%d", round+1)
		must(t, cli("set", "k", want))
		begin := time.Now()
		a.ask(t, "k", want)
		t.Logf("wake-up with all answers: %v", time.Since(begin).Round(100*time.Microsecond))
		must(t, n.WaitState("pool", "RESTORED", reply))
		a.ask(t, "k", want)
		if now := sessions(t, n.Net.Client(), server, vip); !slices.Equal(now, before) {
			t.Fatalf("the server's connections were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
		}
	}
	for _, p := range seen.Stop() {
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		if ip := p.NetworkLayer(); ok && ip != nil && ip.NetworkFlow().Src().String() == vip && (tcp.SYN || tcp.RST || tcp.FIN) {
			t.Errorf("on the wire: %v", p)
		}
	}
}
