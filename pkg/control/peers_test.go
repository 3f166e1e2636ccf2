package control

import (
	"cmp"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// peerAgent tells who asked, or does what hook says.
type peerAgent struct {
	nfconnfilterv1connect.UnimplementedAgentHandler
	hook  func(context.Context)
	reply string // instead of the asker's name
	calls atomic.Int32
}

func (a *peerAgent) NodeStatus(ctx context.Context, _ *connect.Request[pb.AgentNodeStatusRequest]) (*connect.Response[pb.AgentNodeStatusReply], error) {
	a.calls.Add(1)
	if a.hook != nil {
		a.hook(ctx)
	}
	p, ok := PeerFrom(ctx)
	if !ok {
		return nil, Error(connect.CodeInternal, "", "", "nobody asks")
	}
	return connect.NewResponse(&pb.AgentNodeStatusReply{Node: cmp.Or(a.reply, p.Name)}), nil
}

// rig is two nodes on loopback addresses, node-b with an agent that answers.
type peerRig struct {
	dir   string
	peers []Peer
	agent *peerAgent
	l     net.Listener
}

func newPeerRig(t *testing.T) *peerRig {
	t.Helper()
	r := &peerRig{dir: t.TempDir(), agent: &peerAgent{}}
	var err error
	if r.l, err = net.Listen("tcp", "127.0.0.2:0"); err != nil {
		t.Fatal(err)
	}
	port := uint16(r.l.Addr().(*net.TCPAddr).Port)
	r.peers = []Peer{{Name: "node-a", Address: netip.MustParseAddr("127.0.0.1")}, {Name: "node-b", Address: netip.MustParseAddr("127.0.0.2"), AgentPort: port}}
	r.issue(t, "ca", "node-a", "127.0.0.1", time.Now(), time.Hour)
	r.issue(t, "ca", "node-b", "127.0.0.2", time.Now(), time.Hour)
	return r
}

func (r *peerRig) issue(t *testing.T, ca, name, addr string, now time.Time, lifetime time.Duration) {
	t.Helper()
	a, err := OpenAuthority(filepath.Join(r.dir, ca), time.Now(), 24*time.Hour)
	if err == nil {
		err = a.Issue(name, []netip.Addr{netip.MustParseAddr(addr)}, now, lifetime, true)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// options are those of node self, with the certificate that name of authority ca has; ca "": plain text.
func (r *peerRig) options(self, ca, name string) PeerOptions {
	o := PeerOptions{Self: self, Peers: func() []Peer { return r.peers }}
	if ca != "" {
		f := func(file string) string { return filepath.Join(r.dir, ca, file) }
		o.Cert, o.Key, o.CA = f(name+".crt"), f(name+".key"), f(CACert)
	}
	return o
}

func (r *peerRig) serve(t testing.TB, o PeerOptions) {
	t.Helper()
	p, err := NewPeers(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- p.Serve(ctx, r.l, AgentHandler(r.agent), nfconnfilterv1connect.AgentNodeStatusProcedure)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// dial gives node-a's client of node-b's agent.
func (r *peerRig) dial(t testing.TB, o PeerOptions) *AgentClient {
	t.Helper()
	p, err := NewPeers(o)
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.DialAgent("node-b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func ask(t testing.TB, c *AgentClient) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := c.NodeStatus(ctx, connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err != nil {
		return "", err
	}
	return r.Msg.Node, nil
}

func TestPeersKnowEachOther(t *testing.T) {
	for _, ca := range []string{"ca", ""} {
		r := newPeerRig(t)
		r.serve(t, r.options("node-b", ca, "node-b"))
		c := r.dial(t, r.options("node-a", ca, "node-a"))
		for range 2 {
			if got, err := ask(t, c); err != nil || got != "node-a" {
				t.Errorf("authority %q: it is asked by %q, %v", ca, got, err)
			}
		}
		// Other requests are not for other nodes.
		_, err := c.Stop(t.Context(), connect.NewRequest(&pb.AgentStopRequest{App: "redis"}))
		if connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "not for other nodes") || !NotDelivered(err) {
			t.Errorf("authority %q: stop: %v", ca, err)
		}
	}
}

// What is wrong with a certificate is told on the side that asks, in words, and
// no handler sees the request.
func TestPeersCertificates(t *testing.T) {
	day := 24 * time.Hour
	for _, c := range []struct {
		name           string
		set            func(*testing.T, *peerRig)
		server, client string // authority/name
		want           string
	}{
		{"client's expired", func(t *testing.T, r *peerRig) {
			r.issue(t, "ca", "node-a", "127.0.0.1", time.Now().Add(-2*day), day)
		}, "ca/node-b", "ca/node-a", "the certificate of node-a expired on"},
		{"server's expired", func(t *testing.T, r *peerRig) {
			r.issue(t, "ca", "node-b", "127.0.0.2", time.Now().Add(-2*day), day)
		}, "ca/node-b", "ca/node-a", "the certificate of node-b expired on"},
		{"client's of the future", func(t *testing.T, r *peerRig) {
			r.issue(t, "ca", "node-a", "127.0.0.1", time.Now().Add(5*time.Hour), time.Hour)
		}, "ca/node-b", "ca/node-a", "valid from"},
		{"another authority", func(t *testing.T, r *peerRig) {
			r.issue(t, "other", "node-a", "127.0.0.1", time.Now(), time.Hour)
		}, "ca/node-b", "other/node-a", "signed by another authority"},
		{"client is no node", func(t *testing.T, r *peerRig) {
			r.issue(t, "ca", "node-x", "127.0.0.9", time.Now(), time.Hour)
		}, "ca/node-b", "ca/node-x", `names ["node-x" "127.0.0.9"], which is no [[node]]`},
		{"server is another node", nil, "ca/node-a", "ca/node-a", `answers the certificate of ["node-a" "127.0.0.1"]`},
		{"plain text to TLS", nil, "ca/node-b", "/", "node node-b speaks TLS and this node plain text"},
		{"TLS to plain text", nil, "/", "ca/node-a", "node node-b speaks plain text and this node TLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newPeerRig(t)
			if c.set != nil {
				c.set(t, r)
			}
			sca, sname, _ := strings.Cut(c.server, "/")
			cca, cname, _ := strings.Cut(c.client, "/")
			r.serve(t, r.options("node-b", sca, sname))
			_, err := ask(t, r.dial(t, r.options("node-a", cca, cname)))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if !NotDelivered(err) || IsUnreachable(err) {
				t.Errorf("%v: not delivered %v, unreachable %v", err, NotDelivered(err), IsUnreachable(err))
			}
			if n := r.agent.calls.Load(); n != 0 {
				t.Errorf("the handler was called %d times", n)
			}
		})
	}
}

// The address in a certificate makes nobody a node that its name does not: not a
// node that was taken out of the cluster, and not a scheduler on a node's machine.
func TestPeersNameBeforeAddress(t *testing.T) {
	r := newPeerRig(t)
	r.serve(t, r.options("node-b", "ca", "node-b"))
	for name, want := range map[string]string{"scheduler": SchedulerName, "node-x": ""} {
		r.issue(t, "ca", name, "127.0.0.1", time.Now(), time.Hour)
		got, err := ask(t, r.dial(t, r.options("node-a", "ca", name)))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s counts as %q, %v, want %q", name, got, err, want)
		}
	}
}

// A renewed certificate is used at once; one that cannot be read is not.
func TestPeersRenewal(t *testing.T) {
	r := newPeerRig(t)
	r.issue(t, "ca", "node-b", "127.0.0.2", time.Now().Add(-48*time.Hour), time.Hour)
	r.serve(t, r.options("node-b", "ca", "node-b"))
	c := r.dial(t, r.options("node-a", "ca", "node-a"))
	if _, err := ask(t, c); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatal(err)
	}
	r.issue(t, "ca", "node-b", "127.0.0.2", time.Now(), time.Hour)
	if got, err := ask(t, c); err != nil || got != "node-a" {
		t.Fatal(got, err)
	}
	c.Close()
	if err := os.WriteFile(filepath.Join(r.dir, "ca", "node-b.crt"), []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(t, r.dial(t, r.options("node-a", "ca", "node-a"))); err != nil || got != "node-a" {
		t.Error("with a certificate that is being written:", got, err)
	}
}

// A connection that is lost after the request was sent: nobody knows.
func TestPeersLost(t *testing.T) {
	r := newPeerRig(t)
	c := r.dial(t, r.options("node-a", "", ""))
	r.l.Close()
	if _, err := ask(t, c); !NotDelivered(err) || !IsUnreachable(err) {
		t.Errorf("nobody listens: %v, not delivered %v, unreachable %v", err, NotDelivered(err), IsUnreachable(err))
	}
	l, err := net.Listen("tcp", r.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = c.Read(make([]byte, 64)) // it has begun to arrive
			c.Close()
		}
	}()
	if _, err := ask(t, c); err == nil || NotDelivered(err) || !IsUnreachable(err) {
		t.Errorf("lost: %v, not delivered %v, unreachable %v", err, NotDelivered(err), IsUnreachable(err))
	}
}

// Strangers, garbage and half messages: it goes on working, and plain text is
// for loopback alone.
func TestPeersBadInput(t *testing.T) {
	r := newPeerRig(t)
	r.serve(t, r.options("node-b", "ca", "node-b"))
	from := func(addr string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}, Timeout: 5 * time.Second}
		return d.Dial("tcp", r.l.Addr().String())
	}
	stranger, err := from("127.0.0.9")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	_ = stranger.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := stranger.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Errorf("a stranger is not sent away: %d octets, %v", n, err)
	}
	var open []net.Conn
	for i := range 3 * maxPeerConns {
		c, err := from("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		_, _ = c.Write([]byte(strings.Repeat("\x16\x03garbage", i%7)))
	}
	for _, c := range open {
		c.Close()
	}
	// A stranger with a certificate of no authority at all, who asks for nothing.
	if c, err := from("127.0.0.1"); err == nil {
		s := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
		_, _ = io.WriteString(s, "POST "+nfconnfilterv1connect.AgentNodeStatusProcedure+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
		b := make([]byte, 4096)
		_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, _ := s.Read(b)
		if !strings.Contains(string(b[:n]), "403 Forbidden") || r.agent.calls.Load() != 0 {
			t.Errorf("without a certificate: %q", b[:n])
		}
		s.Close()
	}
	if got, err := ask(t, r.dial(t, r.options("node-a", "ca", "node-a"))); err != nil || got != "node-a" {
		t.Error(got, err)
	}
}

func TestPeersPlainText(t *testing.T) {
	r := newPeerRig(t)
	r.peers = append(r.peers, Peer{Name: "node-c", Address: netip.MustParseAddr("192.0.2.13")})
	p, err := NewPeers(r.options("node-a", "", ""))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.DialAgent("node-c"); err == nil || !strings.Contains(err.Error(), "allow_plaintext") {
		t.Errorf("plain text to another machine: %v", err)
	}
	o := r.options("node-a", "", "")
	o.AllowPlaintext = true
	if p, err = NewPeers(o); err == nil {
		_, err = p.DialAgent("node-c")
	}
	if err != nil {
		t.Error(err)
	}
	if _, err := p.DialAgent("node-x"); err == nil || !strings.Contains(err.Error(), `no node "node-x"`) {
		t.Error(err)
	}
	// In the name of a node of another address.
	r.serve(t, r.options("node-b", "", ""))
	liar := r.options("node-c", "", "")
	liar.Peers = func() []Peer {
		return []Peer{{Name: "node-c", Address: netip.MustParseAddr("127.0.0.1")}, r.peers[1]}
	}
	if _, err := ask(t, r.dial(t, liar)); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("as another node: %v", err)
	}
	o = r.options("node-a", "ca", "node-a")
	o.Key = ""
	if _, err := NewPeers(o); err == nil || !strings.Contains(err.Error(), "cert, key and ca") {
		t.Error(err)
	}
}

func TestAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	now := time.Now()
	a, err := OpenAuthority(dir, now, time.Hour)
	if err != nil || !a.Made() {
		t.Fatal(err)
	}
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")}
	if err := a.Issue("node-a", addrs, now, 24*time.Hour, false); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{CAKey, "node-a.key"} {
		if fi, err := os.Stat(filepath.Join(dir, f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Error(fi.Mode(), err)
	}
	if err := a.Issue("node-a", addrs, now, time.Hour, false); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a certificate was replaced: %v", err)
	}
	for _, name := range []string{"", "../x", "ca", ".x", "a/b", strings.Repeat("n", 64)} {
		if err := a.Issue(name, addrs, now, time.Hour, true); err == nil {
			t.Errorf("a certificate for %q", name)
		}
	}
	again, err := OpenAuthority(dir, now, time.Hour)
	if err != nil || again.Made() || !again.cert.Equal(a.cert) {
		t.Errorf("the authority is another one: %v", err)
	}
	if _, err := OpenAuthority(dir, now.Add(2*time.Hour), time.Hour); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired authority: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, CAKey)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(dir, now, time.Hour); err == nil {
		t.Error("half an authority was replaced")
	}
}
