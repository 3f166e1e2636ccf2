package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const nginxConf = `worker_processes 2;
pid %[1]s/app/nginx.pid;
error_log stderr;
daemon off;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/app/body;
	proxy_temp_path %[1]s/app/proxy;
	fastcgi_temp_path %[1]s/app/fastcgi;
	uwsgi_temp_path %[1]s/app/uwsgi;
	scgi_temp_path %[1]s/app/scgi;
	keepalive_timeout 3600s;
	keepalive_requests 1000000;
	server {
		listen %[2]s;
		root %[1]s/app/www;
	}
}
`

// httpClient is one HTTP/1.1 connection that is kept open.
type httpClient struct {
	conn net.Conn
	r    *bufio.Reader
}

// get asks for /N.txt and checks status and body.
func (c *httpClient) get(i int) error {
	if err := c.conn.SetDeadline(time.Now().Add(reply)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c.conn, "GET /%d.txt HTTP/1.1\r\nHost: example.test\r\n\r\n", i); err != nil {
		return err
	}
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return fmt.Errorf("%v: %w", c.conn.LocalAddr(), err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK || string(body) != page(i) || res.Close {
		return fmt.Errorf("%v: %s, %d bytes, close %v", c.conn.LocalAddr(), res.Status, len(body), res.Close)
	}
	return nil
}

// page is the content of a file; some are larger than a window.
func page(i int) string {
	return strings.Repeat(fmt.Sprintf("page %d\n", i), 1+i*i*i*10)
}

// TestNginxKeepalive takes nginx, master and workers, away under its clients.
func TestNginxKeepalive(t *testing.T) { nginx(t, vip, at(80), at(80)) }

func nginx(t *testing.T, vips, listen string, dial ...string) {
	const pages, perPage = 10, 3
	n := newNode(t, harness.Options{Name: "nginx"})
	must(t, os.MkdirAll(n.Path("app", "www"), 0o755))
	for i := range pages {
		must(t, os.WriteFile(n.Path("app", "www", fmt.Sprintf("%d.txt", i)), []byte(page(i)), 0o644))
	}
	must(t, os.Chmod(n.Dir, 0o755)) // the workers are another user
	must(t, os.WriteFile(n.Path("app", "nginx.conf"), fmt.Appendf(nil, nginxConf, n.Dir, listen), 0o644))
	must(t, n.WriteApp(placed(harness.App{Name: "web", VIP: vips, Ports: []int{80},
		Start: []string{"nginx", "-c", "@app/nginx.conf", "-p", "@app"}})))
	must(t, n.Up())
	must(t, n.Ctl("start", "web").Err())
	var all []*httpClient
	for i := range pages * perPage {
		conn, err := n.Dial(dial[i%len(dial)])
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		c := &httpClient{conn: conn, r: bufio.NewReader(conn)}
		all = append(all, c)
		must(t, c.get(i%pages))
	}
	adopt(t, n, "web")
	for range 2 {
		snapshot(t, n, "web", "nginx")
		time.Sleep(2 * time.Second)
		gone(t, n, "nginx")
		start := time.Now()
		must(t, all[4].get(4))
		t.Logf("wake-up: %v", time.Since(start).Round(100*time.Microsecond))
		for i, c := range all {
			must(t, c.get(i%pages))
			must(t, c.get((i+1)%pages))
		}
	}
}

// TestConntrackInvalidDrop is the whole cycle behind a firewall that tracks
// connections and drops what does not fit; the strict one also takes a new
// connection by its SYN alone, so that it never picks one up in the middle.
func TestConntrackInvalidDrop(t *testing.T) {
	for name, new := range map[string]string{
		"lenient": "-A INPUT -p tcp --dport 6379 -m conntrack --ctstate NEW -j ACCEPT",
		"strict":  "-A INPUT -p tcp --syn --dport 6379 -m conntrack --ctstate NEW -j ACCEPT",
	} {
		t.Run(name, func(t *testing.T) {
			behindFirewall(t, harness.Redis("redis", vip),
				"-A INPUT -m conntrack --ctstate INVALID -j DROP",
				"-A OUTPUT -m conntrack --ctstate INVALID -j DROP",
				"-A INPUT -i lo -j ACCEPT",
				"-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED,UNTRACKED -j ACCEPT",
				new,
				"-P INPUT DROP")
		})
	}
}

func behindFirewall(t *testing.T, app harness.App, rules ...string) {
	n := newNode(t, harness.Options{Name: "ct", Apps: []harness.App{app}})
	for _, rule := range rules {
		out, err := n.Net.Node().Command(iptables(), strings.Fields(rule)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", iptables(), rule, err, out)
		}
	}
	must(t, n.Net.Node().Sysctl("net/netfilter/nf_conntrack_tcp_loose", "0"))
	if ns := n.Behind("redis"); ns != nil { // which may have a firewall of its own
		tracked(t, ns, "0")
	}
	must(t, n.Up())
	load := redisClients(t, n, 100)
	adopt(t, n, "redis")
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1) // the capture knows all numbers from here on
	for i := range 3 {
		snapshot(t, n, "redis", "redis-server")
		d := time.Second
		if i == 0 {
			d = strictHold
		}
		held(t, n, "redis", "redis-server", load, d)
		wake(t, n, "redis", load.Clients[i])
		load.Clients[i].Piece = 3
		rounds(t, load, 4)
		// A connection that is made after a restore is tracked like any other.
		late := redisClients(t, n, 5)
		rounds(t, late, 2)
		late.Close()
	}
	unnoticed()
}

// TestDrainTimeoutAborts: a remote that never pauses keeps its connection from
// its boundary.
func TestDrainTimeoutAborts(t *testing.T) {
	app := harness.Redis("redis", vip)
	app.Checkpoint = `quiet = "1s"` // longer than a busy machine keeps the writer from writing
	n, load := redisUp(t, harness.Options{Name: "drain", Apps: []harness.App{app}}, 20)
	busy, err := clients.DialRaw(n.Dial, at(6379))
	must(t, err)
	defer busy.Close()
	const size = 1 << 20
	_, err = fmt.Fprintf(busy, "*3\r\n$3\r\nSET\r\n$4\r\nslow\r\n$%d\r\n", size)
	must(t, err)
	value := make([]byte, size)
	clients.Fill(value, 1, 0)
	stop, done, sent := make(chan struct{}), make(chan error, 1), 0
	go func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				done <- nil
				return
			case <-tick.C:
			}
			if _, err := busy.Write(value[sent : sent+1]); err != nil {
				done <- err
				return
			}
			sent++
		}
	}()
	r := n.Ctl("snapshot", "redis", "--drain-timeout", "3s")
	if r.Code != 1 {
		t.Errorf("exit %d, want 1: %s %s", r.Code, r.Stdout, r.Stderr)
	}
	if !strings.Contains(r.Stderr, busy.LocalAddr().String()) {
		t.Errorf("the message does not name %v: %s", busy.LocalAddr(), r.Stderr)
	}
	for _, c := range load.Clients {
		if strings.Contains(r.Stderr, c.LocalAddr().String()) {
			t.Errorf("the message names %v, which was quiet: %s", c.LocalAddr(), r.Stderr)
			break
		}
	}
	s, err := n.Status("redis")
	must(t, err)
	if s.State != "RESTORED" {
		t.Errorf("state %q after the abort, want RESTORED", s.State)
	}
	rounds(t, load, 4)
	close(stop)
	must(t, <-done)
	must(t, busy.SetDeadline(time.Now().Add(reply)))
	must(t, busy.Exchange(append(value[sent:], "\r\n"...), []byte("+OK\r\n")))
	// Now that everybody is quiet it works.
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 4)
}

// TestStartFails: connections stay held while the application cannot start.
func TestStartFails(t *testing.T) {
	app := harness.Redis("redis", vip)
	const guard = `test -e "$0/fail" && { echo out of order; exit 7; }; test -e "$0/hang" && exec sleep 600; exec "$@"`
	app.Start = append([]string{"sh", "-c", guard, "@app"}, app.Start...)
	app.Process = `ready_timeout = "2s"`
	n, load := redisUp(t, harness.Options{Name: "start", Apps: []harness.App{app}}, 50, clients.Strictest)
	snapshot(t, n, "redis", "redis-server")
	for _, how := range []string{"fail", "hang"} {
		must(t, os.WriteFile(n.Path("app", how), nil, 0o644))
		r := n.Ctl("restore", "redis")
		if r.Code != 1 || strings.TrimSpace(r.Stderr) == "" {
			t.Errorf("%s: exit %d, want 1 and a message: %s", how, r.Code, r.Stderr)
		}
		t.Logf("%s: %s", how, strings.TrimSpace(r.Stderr))
		held(t, n, "redis", "redis-server", load, 3*time.Second)
		gone(t, n, "sleep")
		must(t, os.Remove(n.Path("app", how)))
	}
	must(t, n.Ctl("restore", "redis").Err())
	rounds(t, load, 4)
}
