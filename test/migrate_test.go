package test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// talk has the clients talk until the test has ended, or until the function that
// it returns, which tells what went wrong.
func talk(t *testing.T, load *clients.Load, pause time.Duration) (talk *clients.Talk, stop func() error) {
	talk = load.Talk(pause, reply)
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			load.Close() // so that a failure ends soon
			talk.Stop()
		}
	})
	return talk, func() error {
		stopped = true
		return clients.Summary(talk.Stop())
	}
}

// everybody waits until every client has had so many replies from now on, or
// one has failed.
func everybody(t *testing.T, talk *clients.Talk, more int) {
	t.Helper()
	before := talk.Replies()
	must(t, harness.Wait(3*reply, "every client is answered", func() bool {
		select {
		case <-talk.Failed():
			return true
		default:
		}
		for i, n := range talk.Replies() {
			if n < before[i]+more {
				return false
			}
		}
		return true
	}))
}

// thereAndBack migrates an application from the first node to the second and
// back, so many times, while the clients talk: each migration waits until every
// client has been answered since the one before.
func thereAndBack(t *testing.T, c *harness.Cluster, load *clients.Load, times int, pause time.Duration) {
	t.Helper()
	talk, stop := talk(t, load, pause)
	for i := range 2 * times {
		everybody(t, talk, 1)
		talk.Commands()
		from, to := i%2, 1-i%2
		begin := time.Now()
		m, err := c.Migrate("redis", from, to)
		took := time.Since(begin)
		must(t, err)
		if m.From != c.Nodes[from].Name() || m.To != c.Nodes[to].Name() {
			t.Fatalf("it says %+v", m)
		}
		n, slowest := talk.Commands()
		t.Logf("migration %d to %s: %v, meanwhile %d replies, the slowest after %v;%v",
			i+1, m.To, took.Round(time.Millisecond), n, slowest.Round(time.Millisecond), phases(m))
	}
	everybody(t, talk, 2)
	must(t, stop())
}

func phases(m harness.Migration) string {
	s := ""
	for _, p := range m.Phases {
		s += fmt.Sprintf(" %s %.0f", p.Name, p.MS)
	}
	return s + " ms"
}

// TestMigrateRedis: 1,000 clients that keep sending commands, one at a time each,
// while their server moves to the other node and back ten times.
func TestMigrateRedis(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "redis"}, 1000)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	thereAndBack(t, c, load, 10, 200*time.Millisecond)
	node, err := c.Settled("redis", vip, reply)
	must(t, err)
	if node != 0 {
		t.Errorf("it runs on node %d after as many moves back as there", node)
	}
	unnoticed(20)
}

// TestMigrateRedisImpaired is the same over a link that loses 2 % of the
// packets and takes 20 ms, each way.
func TestMigrateRedisImpaired(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "lossy", Cable: true, Seed: 2}, 1000)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	c.Net.Link().Impair(testnet.Impairment{Loss: 0.02, Delay: 20 * time.Millisecond})
	thereAndBack(t, c, load, 10, 200*time.Millisecond)
	forth, back := c.Net.Link().Stats()
	t.Logf("the link: %+v and %+v", forth, back)
	if forth.Lost < 1000 || back.Lost < 1000 {
		t.Errorf("too little was lost: %+v, %+v", forth, back)
	}
	_, err := c.Settled("redis", vip, reply)
	must(t, err)
	unnoticed(20)
}

// TestMigrateIPv6 does it with an IPv6 address.
func TestMigrateIPv6(t *testing.T) {
	with(t, func() { vip = vip6 }, func(t *testing.T) {
		c, load := clusterUp(t, harness.ClusterOptions{Name: "six", Cable: true, Seed: 3}, 200)
		unnoticed := watchCluster(t, c, vip)
		rounds(t, load, 1)
		c.Net.Link().Impair(testnet.Impairment{Loss: 0.01, Delay: 5 * time.Millisecond})
		thereAndBack(t, c, load, 2, 100*time.Millisecond)
		_, err := c.Settled("redis", vip, reply)
		must(t, err)
		unnoticed(4)
		t.Run("Outgoing", migrateOutgoing)
	})
}

// TestMigrateBothFamilies moves an application with an IPv4 and an IPv6 address, which
// has clients on both.
func TestMigrateBothFamilies(t *testing.T) {
	app := harness.Redis("redis", vip+","+vip6)
	app.Before = []string{"redis-cli", "-h", vip, "save"}
	c, load := clusterUp(t, harness.ClusterOptions{Name: "both", Apps: []harness.App{app}}, 30)
	six, err := clients.OpenLoad(c.Dial, net.JoinHostPort(vip6, "6379"), nextClient, 30)
	must(t, err)
	nextClient += 30
	t.Cleanup(six.Close)
	rounds(t, six, 4)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	for i := range 4 {
		_, err := c.Migrate("redis", i%2, 1-i%2)
		must(t, err)
		rounds(t, load, 2)
		rounds(t, six, 2)
		for _, v := range []string{vip, vip6} {
			if node, err := c.Settled("redis", v, reply); err != nil || node != 1-i%2 {
				t.Fatalf("%s is on node %d, %v", v, node, err)
			}
		}
	}
	unnoticed(4)
}

// TestMigrateOutgoing: an application moves with the connections that it has
// opened to a server on another machine, while it is asked all the time. The server
// has the same ones after each move, and sees no SYN, FIN or RST.
func TestMigrateOutgoing(t *testing.T) { migrateOutgoing(t) }

func migrateOutgoing(t *testing.T) {
	host := "10.77.0.2"
	if overIPv6() {
		host = "fd77::2"
	}
	server := net.JoinHostPort(host, "6379")
	c := newCluster(t, harness.ClusterOptions{Name: "out", Apps: []harness.App{{
		Name: "pool", VIP: vip, Ports: []int{7000},
		Start:   []string{filepath.Join(toolDir, "pool"), "-listen", at(7000), "-server", server, "-size", fmt.Sprint(poolSize), "-bind=false"},
		Process: "bind_vip = true",
	}}})
	redis := c.Net.Client().Command("redis-server", "--bind", host, "--port", "6379",
		"--save", "", "--appendonly", "no", "--protected-mode", "no", "--tcp-keepalive", "1")
	must(t, redis.Start())
	t.Cleanup(func() { _ = redis.Process.Kill(); _ = redis.Wait() })
	cli := func(args ...string) error {
		out, err := c.Net.Client().Command("redis-cli", append([]string{"-h", host}, args...)...).CombinedOutput()
		if err != nil || strings.HasPrefix(string(out), "ERR") {
			return fmt.Errorf("redis-cli %v: %w: %s", args, err, out)
		}
		return nil
	}
	must(t, harness.Wait(reply, "the server answers", func() bool { return cli("set", "k", "v") == nil }))
	must(t, c.Up())
	conn, err := c.Dial(at(7000))
	must(t, err)
	defer conn.Close()
	a := &asker{conn: conn, r: bufio.NewReader(conn)}
	a.ask(t, "k", "v")
	before := sessions(t, c.Net.Client(), server, vip)
	if len(before) != poolSize {
		t.Fatalf("the server has %d connections, want %d", len(before), poolSize)
	}
	seen, err := c.Net.Client().Capture(testnet.Iface, "tcp port 6379")
	must(t, err)
	for i := range 4 {
		moved := make(chan error, 1)
		go func() {
			_, err := c.Migrate("pool", i%2, 1-i%2)
			moved <- err
		}()
		asked := 0
		for done := false; !done; asked++ {
			select {
			case err := <-moved:
				must(t, err)
				done = true
			default:
			}
			a.ask(t, "k", "v")
		}
		t.Logf("move %d: asked %d times meanwhile", i+1, asked)
		if now := sessions(t, c.Net.Client(), server, vip); !slices.Equal(now, before) {
			t.Fatalf("the server's connections were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
		}
	}
	_, err = c.Settled("pool", vip, reply)
	must(t, err)
	for _, p := range seen.Stop() {
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		if ip := p.NetworkLayer(); ok && ip != nil && ip.NetworkFlow().Src().String() == vip && (tcp.SYN || tcp.RST || tcp.FIN) {
			t.Errorf("on the wire: %v", p)
		}
	}
}

// wrkScript has wrk ask with pauses, compare every page with its file, and tell
// at the end what came of it.
const wrkScript = `local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args)
	right, wrong = 0, 0
	local f = io.open(args[1])
	want = f:read("*a")
	f:close()
end
function delay() return 20 end
function response(status, headers, body)
	if status == 200 and body == want then right = right + 1 else wrong = wrong + 1 end
end
function done(summary, latency, requests)
	local r, w, e = 0, 0, summary.errors
	for _, t in ipairs(threads) do r, w = r + t:get("right"), w + t:get("wrong") end
	io.write(string.format("right %d wrong %d connect %d read %d write %d status %d timeout %d\n",
		r, w, e.connect, e.read, e.write, e.status, e.timeout))
end
`

// TestMigrateNginx: nginx moves under the kept-open connections of wrk, which
// sees no socket error and no wrong page.
func TestMigrateNginx(t *testing.T) {
	const connections = 64
	c := newCluster(t, harness.ClusterOptions{Name: "nginx", Apps: []harness.App{{
		Name: "web", VIP: vip, Ports: []int{80}, Start: []string{"nginx", "-c", "@app/nginx.conf", "-p", "@app"}}}})
	must(t, os.MkdirAll(c.Path("app", "www"), 0o755))
	must(t, os.WriteFile(c.Path("app", "www", "5.txt"), []byte(page(5)), 0o644))
	must(t, os.Chmod(c.Dir, 0o755)) // the workers are another user
	must(t, os.WriteFile(c.Path("app", "nginx.conf"), fmt.Appendf(nil, nginxConf, c.Dir, at(80)), 0o644))
	must(t, os.WriteFile(c.Path("wrk.lua"), []byte(wrkScript), 0o644))
	must(t, c.Up())
	unnoticed := watchCluster(t, c, vip)
	var out bytes.Buffer
	wrk := c.Net.Client().Command("wrk", "-t", "2", "-c", fmt.Sprint(connections), "-d", "300s", "--timeout", "20s",
		"-s", c.Path("wrk.lua"), "http://"+at(80)+"/5.txt", c.Path("app", "www", "5.txt"))
	wrk.Stdout, wrk.Stderr = &out, &out
	must(t, wrk.Start())
	ended := false
	t.Cleanup(func() {
		if !ended {
			_ = wrk.Process.Kill()
			_ = wrk.Wait()
		}
	})
	for i := range 4 {
		must(t, harness.Wait(reply, "wrk has its connections and is served", func() bool {
			s, err := c.Nodes[i%2].Status("web")
			return err == nil && s.Connections["CONNECT"] >= connections
		}))
		m, err := c.Migrate("web", i%2, 1-i%2)
		must(t, err)
		t.Logf("migration %d:%s", i+1, phases(m))
	}
	_, err := c.Settled("web", vip, reply)
	must(t, err)
	// wrk resets its connections in the middle of replies: what the server says to
	// those who are gone is no matter.
	unnoticed(4)
	must(t, wrk.Process.Signal(syscall.SIGINT))
	ended = true
	must(t, wrk.Wait())
	text := out.String()
	var right, wrong, connect, read, write, status, timeout int
	i := strings.Index(text, "right ")
	if i < 0 {
		t.Fatalf("wrk says\n%s", text)
	}
	_, err = fmt.Sscanf(text[i:], "right %d wrong %d connect %d read %d write %d status %d timeout %d",
		&right, &wrong, &connect, &read, &write, &status, &timeout)
	must(t, err)
	t.Logf("wrk: %s", strings.TrimSpace(text[i:]))
	if wrong+connect+read+write+status+timeout != 0 || right < 10*connections || strings.Contains(text, "Socket errors") {
		t.Errorf("wrk says\n%s", text)
	}
}
