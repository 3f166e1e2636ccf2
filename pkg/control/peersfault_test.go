package control

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// A host that is down, or a daemon that hangs, is told from one that answers.
func TestPeersDead(t *testing.T) {
	dial := func(r *peerRig, ca string, patience time.Duration) *AgentClient {
		t.Helper()
		p, err := NewPeers(r.options("node-a", ca, "node-a"))
		if err != nil {
			t.Fatal(err)
		}
		p.dial = patience
		c, err := p.DialAgent("node-b")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	const brief = 200 * time.Millisecond
	for _, ca := range []string{"", "ca"} {
		r := newPeerRig(t)
		// A queue that is full answers no SYN, as a host that is down.
		raw, err := r.l.(*net.TCPListener).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { _ = unix.Listen(int(fd), 0) })
		}
		if err != nil {
			t.Fatal(err)
		}
		first, err := net.Dial("tcp", r.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, err = ask(t, dial(r, ca, brief))
		if !NotDelivered(err) || !IsUnreachable(err) {
			t.Errorf("authority %q: a host that is down: %v, not delivered %v, unreachable %v", ca, err, NotDelivered(err), IsUnreachable(err))
		}
		first.Close()
		r.l.Close()
	}
	r := newPeerRig(t) // the kernel accepts, nobody reads
	defer r.l.Close()
	_, err := ask(t, dial(r, "ca", brief))
	if !NotDelivered(err) || !strings.Contains(err.Error(), "not answered the TLS handshake") {
		t.Errorf("a daemon that hangs: %v, not delivered %v", err, NotDelivered(err))
	}
	// The caller's own deadline says nothing about the node.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = dial(r, "ca", time.Minute).NodeStatus(ctx, connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err == nil || IsUnreachable(err) {
		t.Errorf("the caller's deadline: %v", err)
	}
}

// A large reply over a slow link has the time that a large request has.
func TestPeersSlowReply(t *testing.T) {
	reply, body := replyTimeout, peerBody
	replyTimeout, peerBody = 20*time.Millisecond, time.Minute
	defer func() { replyTimeout, peerBody = reply, body }()
	r := newPeerRig(t)
	r.agent.reply = strings.Repeat("x", 32<<20) // more than both sockets hold
	r.serve(t, r.options("node-b", "", ""))
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	c, err := d.Dial("tcp", r.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = io.WriteString(c, "POST "+nfconnfilterv1connect.AgentNodeStatusProcedure+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	if err != nil {
		t.Fatal(err)
	}
	resp := bufio.NewReader(c)
	if _, err := resp.Peek(1); err != nil {
		t.Fatal(err)
	}
	<-time.After(10 * replyTimeout) // the link
	h, err := http.ReadResponse(resp, nil)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, h.Body)
	if err != nil || n < 32<<20 {
		t.Errorf("%d octets, %v", n, err)
	}
}

// A reply that has no end, or is too large when it is unpacked, is given up.
func TestPeersEndlessReply(t *testing.T) {
	most := peerReply
	peerReply = 1 << 20
	defer func() { peerReply = most }()
	r := newPeerRig(t)
	sent := make(chan int, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/proto")
		n := 0
		for {
			k, err := w.Write(make([]byte, 1<<16))
			if n += k; err != nil || n > 1<<28 {
				sent <- n
				return
			}
		}
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(r.l) }()
	defer func() {
		srv.Close()
		<-done
	}()
	c := r.dial(t, r.options("node-a", "", ""))
	if _, err := ask(t, c); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("%v", err)
	}
	c.Close()
	if n := <-sent; n > 1<<27 {
		t.Errorf("%d octets were taken", n)
	}
}

// Who is refused again and again does not fill the log, whatever name it gives.
func TestPeersLog(t *testing.T) {
	r := newPeerRig(t)
	var log lockedLog
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(old)
	r.serve(t, r.options("node-b", "", ""))
	for i := range 5 {
		liar := r.options(fmt.Sprint("node-", i), "", "")
		liar.Peers = func() []Peer { return r.peers }
		if _, err := ask(t, r.dial(t, liar)); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("as another node: %v", err)
		}
	}
	if n := strings.Count(log.text(), "a peer was refused"); n != 1 {
		t.Errorf("%d lines in the log", n)
	}
}

type lockedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// FuzzPeers has a peer's address say anything to the open port: nothing panics,
// no handler runs for other than a whole request, and the port goes on working.
func FuzzPeers(f *testing.F) {
	const post = "POST " + nfconnfilterv1connect.AgentNodeStatusProcedure + " HTTP/1.1\r\nHost: x\r\n"
	f.Add([]byte(post + "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"))
	f.Add([]byte(post + "Nfcf-Node: node-b\r\nContent-Type: application/proto\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"))
	r := &peerRig{agent: &peerAgent{}}
	var err error
	if r.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		f.Fatal(err)
	}
	r.peers = []Peer{{Name: "node-a", Address: netip.MustParseAddr("127.0.0.1")}, {Name: "node-b", Address: netip.MustParseAddr("127.0.0.1"), AgentPort: uint16(r.l.Addr().(*net.TCPAddr).Port)}}
	slog.SetDefault(slog.New(slog.DiscardHandler))
	r.serve(f, r.options("node-b", "", ""))
	good := r.dial(f, r.options("node-a", "", ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := net.Dial("tcp", r.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(b)
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, c); os.IsTimeout(err) {
			t.Errorf("no end of the reply to %q", b)
		}
		c.Close()
		if got, err := ask(t, good); err != nil || got != "node-a" {
			t.Errorf("behind %q: %q, %v", b, got, err)
		}
	})
}
