package test

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// behind is Redis in a network namespace of its own, to which the node forwards.
func behind() harness.App {
	a := harness.Redis("redis", vip)
	a.Namespace = true
	return a
}

func behindUp(t *testing.T, n int, mix ...clients.KeepAlive) (*harness.Node, *clients.Load) {
	t.Helper()
	return redisUp(t, harness.Options{Name: "behind", Apps: []harness.App{behind()}}, n, mix...)
}

// strictHold is longer than the strictest keepalive lives without answers.
const strictHold = 5 * time.Second

// behindConntrack: a firewall that forwards what it has tracked and nothing
// else.
func behindConntrack(t *testing.T) {
	behindFirewall(t, behind(),
		"-A FORWARD -m conntrack --ctstate INVALID -j DROP",
		"-A OUTPUT -m conntrack --ctstate INVALID -j DROP",
		"-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED,UNTRACKED -j ACCEPT",
		"-A FORWARD -p tcp --syn --dport 6379 -m conntrack --ctstate NEW -j ACCEPT",
		"-P FORWARD DROP")
}

// TestBehindNamespaceGoes: while the application is away its namespace goes,
// and with it link and route, and another takes its place.
func TestBehindNamespaceGoes(t *testing.T) {
	n, load := behindUp(t, 50, clients.Strictest)
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	snapshot(t, n, "redis", "redis-server")
	must(t, n.DropBehind("redis"))
	must(t, harness.Wait(10*time.Second, "the link to the namespace is gone", func() bool {
		out, err := n.Net.Node().Command("ip", "-br", "link").Output()
		return err == nil && !strings.Contains(string(out), "behind")
	}))
	// The clients ask anew who has the address.
	out, err := n.Net.Client().Command("ip", "neigh", "flush", "dev", testnet.Iface).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	held(t, n, "redis", "redis-server", load, strictHold)
	must(t, n.AddBehind("redis", vip))
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 4)
	unnoticed()
}

// TestBehindSameNode: the node itself may always talk to the application; such
// connections are named at a snapshot and not kept.
func TestBehindSameNode(t *testing.T) {
	n, load := behindUp(t, 5)
	own, err := clients.DialRedis(func(addr string) (conn net.Conn, err error) { return n.Net.Node().Dial("tcp", addr) }, at(6379), 2000, clients.KeepAlive{})
	must(t, err)
	defer own.Close()
	must(t, own.Command(reply))
	r := n.Ctl("snapshot", "redis")
	must(t, r.Err())
	if !strings.Contains(r.Stdout+r.Stderr, own.LocalAddr().String()) {
		t.Errorf("the snapshot does not name %v: %s %s", own.LocalAddr(), r.Stdout, r.Stderr)
	}
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 2)
}

// TestBehindBesideAnother: an application behind the node is away while one on
// it, and another behind it, work on.
func TestBehindBesideAnother(t *testing.T) {
	const vip2, vip3 = "10.77.0.101", "10.77.0.102"
	third := harness.Redis("third", vip3)
	third.Namespace = true
	n := newNode(t, harness.Options{Name: "beside", Apps: []harness.App{behind(), harness.Redis("second", vip2), third}})
	must(t, n.Up())
	load := redisClients(t, n, 20)
	var others []*clients.Load
	for i, v := range []string{vip2, vip3} {
		l, err := clients.OpenLoad(n.Dial, v+":6379", 3000+10*i, 10)
		must(t, err)
		t.Cleanup(l.Close)
		others = append(others, l)
	}
	// A connection from one VIP of the node to another.
	between, err := clients.DialRedis(func(addr string) (net.Conn, error) {
		return n.Behind("third").DialFrom("tcp", vip3+":0", addr)
	}, vip2+":6379", 3100, clients.KeepAlive{})
	must(t, err)
	defer between.Close()
	for i := range 2 {
		must(t, n.Ctl("snapshot", "redis").Err())
		for _, l := range others {
			rounds(t, l, 2)
		}
		must(t, between.Command(reply))
		must(t, clients.Summary(load.Idle()))
		wake(t, n, "redis", load.Clients[i])
		// The third goes and comes back while the second works on.
		must(t, n.Ctl("snapshot", "third").Err())
		rounds(t, others[0], 2)
		rounds(t, load, 2)
		wake(t, n, "third", others[1].Clients[i])
		rounds(t, others[1], 2)
		must(t, between.Command(reply)) // not kept, but nothing has harmed it
	}
}
