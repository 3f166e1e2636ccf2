package restorereq

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

var vip = netip.MustParseAddr("192.0.2.100")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseRequest(t *testing.T) {
	for in, want := range map[string]string{
		"Restore 192.000.002.100\r\n":                         "192.0.2.100",
		"Restore 2001:0db8:0000:0000:0000:0000:0000:0001\r\n": "2001:db8::1",
		"Restore 192.000.002.100\n":                           "",
		"Restore 192.000.002.256\r\n":                         "",
		"Restore 192.0.2.100\r\n":                             "",
		"restore 192.000.002.100\r\n":                         "",
		"Restore 192,000.002.100\r\n":                         "",
		"Restore 192.000.002.1 0\r\n":                         "",
		"Restore 2001:0DB8:0000:0000:0000:0000:0000:0001\r\n": "",
		"Restore 2001:0db8:0000:0000:0000:0000:0000.0001\r\n": "",
		"": "", "\r\n": "", "Restore \r\n": "",
	} {
		got, err := parseRequest([]byte(in))
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("%q: %v, %v; want %q", in, got, err, want)
		}
	}
}

// What is accepted is written in exactly one way.
func FuzzParseRequest(f *testing.F) {
	f.Add([]byte("Restore 192.000.002.100\r\n"))
	f.Add([]byte("Restore 2001:0db8:0000:0000:0000:0000:0000:0001\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseRequest(b)
		if err != nil {
			return
		}
		text := a.StringExpanded()
		if a.Is4() {
			q := a.As4()
			text = fmt.Sprintf("%03d.%03d.%03d.%03d", q[0], q[1], q[2], q[3])
		} else if a.Is4In6() {
			q := a.As16() // StringExpanded writes these with dots
			text = fmt.Sprintf("0000:0000:0000:0000:0000:ffff:%02x%02x:%02x%02x", q[12], q[13], q[14], q[15])
		}
		if want := "Restore " + text + "\r\n"; string(b) != want {
			t.Errorf("%q is taken as %q", b, want)
		}
	})
}

func TestRequestServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan netip.Addr, 10)
	s := &Server{
		Allowed: func(a netip.Addr) bool { return a != netip.MustParseAddr("127.0.0.9") },
		Accept: func(a netip.Addr) error {
			if a != vip {
				return errors.New("no such\r\napplication")
			}
			asked <- a
			return nil
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	ask := func(from, text string) string {
		t.Helper()
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(c, text)
		line, _ := bufio.NewReader(c).ReadString('\n')
		return line
	}
	if got := ask("127.0.0.1", "Restore 192.000.002.100\r\n"); got != "OK\r\n" || <-asked != vip {
		t.Errorf("answer %q", got)
	}
	if got := ask("127.0.0.1", "Restore 192.000.002.101\r\n"); got != "ERR no such application\r\n" {
		t.Errorf("answer %q", got)
	}
	if got := ask("127.0.0.9", "Restore 192.000.002.100\r\n"); !strings.HasPrefix(got, "ERR only") {
		t.Errorf("a stranger got %q", got)
	}
	for _, garbage := range []string{"GET / HTTP/1.1\r\n", strings.Repeat("x", 49), "\n", "Restore 999.000.002.100\r\n"} {
		if got := ask("127.0.0.1", garbage); !strings.HasPrefix(got, "ERR ") {
			t.Errorf("%q: %q", garbage, got)
		}
	}
	// One that says nothing keeps nobody out, and is let go.
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if got := ask("127.0.0.1", "Restore 192.000.002.100\r\n"); got != "OK\r\n" {
		t.Errorf("beside a silent one: %q", got)
	}
	_ = silent.SetDeadline(time.Now().Add(10 * time.Second))
	if b, err := io.ReadAll(silent); err != nil || !strings.HasPrefix(string(b), "ERR ") {
		t.Errorf("the silent one got %q, %v", b, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Ten thousand that are open and silent, from one source: one that speaks is
// answered, and no more are kept than one source may have.
func TestFlood(t *testing.T) {
	const flood = 10000
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stranger := netip.MustParseAddr("127.0.0.9")
	accepted := make(chan netip.Addr, 1)
	s := &Server{
		Allowed: func(a netip.Addr) bool { return a != stranger },
		Accept:  func(a netip.Addr) error { accepted <- a; return nil },
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}
	ask := func() {
		t.Helper()
		c := dial("127.0.0.1")
		defer c.Close()
		_, _ = io.WriteString(c, "Restore 192.000.002.100\r\n")
		if line, err := bufio.NewReader(c).ReadString('\n'); line != "OK\r\n" {
			t.Fatalf("after %d connections: %q, %v", len(open), line, err)
		}
		<-accepted
	}
	for i := range flood {
		from := fmt.Sprintf("127.0.%d.%d", i%7, 1+i%200)
		if i%3 == 0 {
			from = stranger.String()
		}
		c := dial(from)
		if i%5 == 0 {
			_, _ = io.WriteString(c, "Restore 192")
		}
		open = append(open, c)
		if i%1000 == 999 {
			ask()
		}
	}
	s.mu.Lock()
	kept := 0
	for _, a := range s.asking {
		kept += len(a)
	}
	s.mu.Unlock()
	if kept > maxPerSource {
		t.Errorf("%d connections are kept, one source may have %d", kept, maxPerSource)
	}
	if b, err := io.ReadAll(open[1]); err != nil || !strings.HasPrefix(string(b), "ERR ") {
		t.Errorf("the oldest got %q, %v", b, err)
	}
	ask()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestFromNodes(t *testing.T) {
	c := &config.Config{}
	c.Cluster.Nodes = []config.ClusterNode{{Address: netip.MustParseAddr("192.0.2.1")}, {Address: netip.MustParseAddr("::ffff:192.0.2.2")}}
	for a, want := range map[string]bool{"127.0.0.5": true, "::1": true, "192.0.2.1": true, "192.0.2.2": true, "192.0.2.3": false, "2001:db8::1": false} {
		if got := FromNodes(c, netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
}
