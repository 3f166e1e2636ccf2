package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

// side is one of two nodes: an engine, the service before it, and the way to it.
type side struct {
	name string
	s    service
	l    *loop
	mu   sync.Mutex
	srv  *httptest.Server
	way  func(r *http.Request, next http.RoundTripper) (*http.Response, error) // to this node, nil: it works

	vipHere bool
}

// pair is two nodes that share an application, and the world around.
type pair struct {
	t    *testing.T
	a, b *side
	w    *filtertest.World
}

const heldScript = `app redis 10.0.0.100 6379
	link c1 10.0.0.2:40000
	open c1
	remote c1 ACK data "one\n"
	local c1 ACK ts +7 data "two\n"
	remote c1 ACK ts +3
	request SNAPSHOTSTART
	request SNAPSHOTFREEZE
	advance 60ms
	request SEAL
	request SNAPSHOTDONE s1`

func newPair(t *testing.T) *pair {
	p := &pair{t: t}
	p.a, p.b = p.side("a"), p.side("b")
	for _, x := range []struct{ from, to *side }{{p.a, p.b}, {p.b, p.a}} {
		x.from.s.n.foreign.dial = func(node string) (nfconnfilterv1connect.FilterClient, func(), error) {
			if node != x.to.name {
				return nil, nil, errors.New("no such node: " + node)
			}
			tr := &http.Transport{}
			return nfconnfilterv1connect.NewFilterClient(&http.Client{Transport: p.way(x.to, tr)}, x.to.srv.URL, connect.WithAcceptCompression("gzip", nil, nil)), tr.CloseIdleConnections, nil
		}
		x.to.s.n.foreign.peerFrom = func(context.Context) (control.Peer, bool) { return control.Peer{Name: x.from.name}, true }
	}
	p.w = filtertest.With(p.a.l.e)
	p.w.Attach("b", p.b.l.e)
	p.play(heldScript)
	p.a.s.n.states["redis"] = "SNAPSHOTDONE"
	p.a.l.now = p.w.Now()
	return p
}

func (p *pair) side(name string) *side {
	n := &Node{states: map[string]string{}, changed: make(chan struct{}), log: slog.New(slog.DiscardHandler)}
	n.cfg.Store(&config.Config{Node: config.Node{Name: name}})
	x := &side{name: name, l: &loop{t: p.t, n: n, e: filter.New(filter.Config{MaxConns: 100}), now: 1e9}}
	n.foreign.patience, n.foreign.again = 150*time.Millisecond, 5*time.Millisecond
	n.foreign.here = func(netip.Addr) (string, bool, error) { return "eth0", x.vipHere, nil }
	x.s = service{n, func(ctx context.Context, body any) (any, error) {
		x.mu.Lock()
		defer x.mu.Unlock()
		n.mu.Lock() // tell takes it in a real node
		defer n.mu.Unlock()
		return x.l.do(ctx, body)
	}}
	x.srv = httptest.NewServer(control.PeerFilterHandler(peerService{service: x.s}))
	p.t.Cleanup(func() {
		n.foreign.close()
		x.srv.Close()
	})
	return x
}

type tripper func(*http.Request) (*http.Response, error)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (p *pair) way(to *side, next http.RoundTripper) http.RoundTripper {
	return tripper(func(r *http.Request) (*http.Response, error) {
		p.alone()
		defer p.alone()
		to.mu.Lock()
		way := to.way
		to.mu.Unlock()
		if way == nil {
			return next.RoundTrip(r)
		}
		return way(r, next)
	})
}

func (x *side) set(way func(*http.Request, http.RoundTripper) (*http.Response, error)) {
	x.mu.Lock()
	x.way = way
	x.mu.Unlock()
}

// Ways that a call can fail.
func notThere(*http.Request, http.RoundTripper) (*http.Response, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

func answerLost(r *http.Request, next http.RoundTripper) (*http.Response, error) {
	res, err := next.RoundTrip(r)
	if err == nil {
		res.Body.Close()
	}
	return nil, io.ErrUnexpectedEOF
}

func requestLost(r *http.Request, _ http.RoundTripper) (*http.Response, error) {
	if t := httptrace.ContextClientTrace(r.Context()); t != nil {
		t.GotConn(httptrace.GotConnInfo{})
	}
	return nil, io.ErrUnexpectedEOF
}

// only lets way spoil the calls of one method.
func only(method string, way func(*http.Request, http.RoundTripper) (*http.Response, error)) func(*http.Request, http.RoundTripper) (*http.Response, error) {
	return func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
		if strings.HasSuffix(r.URL.Path, "/"+method) {
			return way(r, next)
		}
		return next.RoundTrip(r)
	}
}

// app is the application as node x has it.
func (p *pair) app(x *side) *filter.AppStatus {
	a, err := x.s.app(context.Background(), "redis")
	if err != nil {
		p.t.Fatal(err)
	}
	if a == nil {
		a = &filter.AppStatus{}
	}
	return a
}

// alone fails where two nodes answer for the application's VIP.
func (p *pair) alone() {
	if a, b := p.app(p.a).State, p.app(p.b).State; a.Away() && b.Away() {
		p.t.Errorf("both answer: %v and %v", a, b)
	}
}

func (p *pair) states(a, b string) {
	p.t.Helper()
	if x, y := p.app(p.a).State.String(), p.app(p.b).State.String(); x != a || y != b {
		p.t.Fatalf("states %q and %q, want %q and %q", x, y, a, b)
	}
}

// until waits for the states of both nodes.
func (p *pair) until(a, b string) {
	p.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for p.app(p.a).State.String() != a || p.app(p.b).State.String() != b {
		if time.Now().After(end) {
			p.states(a, b)
		}
		<-time.After(time.Millisecond)
	}
}

func (p *pair) play(script string) {
	p.t.Helper()
	if err := p.w.Play(script); err != nil {
		p.t.Fatal(err)
	}
	if f := p.w.Faults(); len(f) > 0 {
		p.t.Fatal(f)
	}
}

// at lets scripts speak of node x.
func (p *pair) at(x *side) {
	p.w.Node(x.name)
	p.w.Look(x.l.now)
}

// left tells node x how late it is, and what scripts have made of its application.
func (p *pair) left(x *side) {
	x.l.now = p.w.Now()
	x.s.n.states["redis"] = p.app(x).State.String()
}

func (p *pair) restore(to *side, id, from string) error {
	_, err := to.s.RestoreStart(p.t.Context(), connect.NewRequest(&pb.RestoreStartRequest{App: "redis", Ip: "10.0.0.100", SnapshotId: id, OldNode: from}))
	p.alone()
	return err
}

func (p *pair) abort(x *side) error {
	_, err := x.s.RestoreAbort(p.t.Context(), connect.NewRequest(&pb.AppRequest{App: "redis"}))
	p.alone()
	return err
}

func (p *pair) want(err error, code connect.Code, text string) {
	p.t.Helper()
	if err == nil || connect.CodeOf(err) != code || !strings.Contains(err.Error(), text) {
		p.t.Fatalf("%v, want %v with %q", err, code, text)
	}
}

func (p *pair) ok(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// An application goes to the other node and comes back, over the wire; every octet
// of both sides arrives once and in order.
func TestMigration(t *testing.T) {
	p := newPair(t)
	p.play(`remote c1 ACK ts +3 data "three\n"`)
	p.ok(p.restore(p.b, "s1", "a"))
	p.states("BLOCKDATA", "RESTORESTART")
	p.ok(p.restore(p.b, "s1", "a")) // again
	if a, b := p.app(p.a), p.app(p.b); a.TakenBy != "b" || b.OldNode != "a" {
		t.Errorf("taken by %q, from %q", a.TakenBy, b.OldNode)
	}
	p.at(p.b)
	p.play(`newlocal c1 0x1000 77
		request RESTORECONN c1
		advance 20ms
		request RESTORED
		local c1 ACK ts +4 data "four\n"
		remote c1 ACK
		request SNAPSHOTSTART
		request SNAPSHOTFREEZE
		advance 60ms
		request SEAL
		request SNAPSHOTDONE s2
		remote c1 ACK ts +2 data "five\n"`)
	p.left(p.b)
	p.ok(p.restore(p.a, "s2", "b")) // there the release was lost
	p.states("RESTORESTART", "BLOCKDATA")
	p.at(p.a)
	p.play(`newlocal c1 0x2000 9
		request RESTORECONN c1
		advance 20ms
		request RESTORED
		local c1 ACK ts +4 data "six\n"
		remote c1 ACK`)
	p.left(p.a)
	if _, err := p.b.s.Release(t.Context(), connect.NewRequest(&pb.ReleaseRequest{App: "redis"})); err != nil {
		t.Fatal(err)
	}
	p.states("RESTORED", "")
	local, remote := p.w.Taken("c1")
	if string(local) != "one\nthree\nfive\n" || string(remote) != "two\nfour\nsix\n" {
		t.Errorf("local has %q, the remote %q", local, remote)
	}
}

// What can go wrong when a node takes over: each is a clear error, and the
// connections are held where they were, at once or as soon as that node is there.
func TestTakeOverFails(t *testing.T) {
	for name, x := range map[string]struct {
		id, from string
		way      func(*http.Request, http.RoundTripper) (*http.Response, error)
		before   func(p *pair)
		code     connect.Code
		text     string
		state    string // of the old node then
	}{
		"itself":          {from: "b", code: connect.CodeInvalidArgument, text: "old_node b is this node"},
		"no such node":    {from: "c", code: connect.CodeUnavailable, text: "no such node: c"},
		"not there":       {from: "a", way: notThere, code: connect.CodeUnavailable, text: "connections stay held there, nothing changed here"},
		"other snapshot":  {from: "a", id: "s7", code: connect.CodeFailedPrecondition, text: "the filter of node a: HANDOVER refused: the connections of application \"redis\" belong to snapshot s1, not s7"},
		"answer lost":     {from: "a", way: only("Handover", answerLost), code: connect.CodeUnavailable, text: "has not answered"},
		"request lost":    {from: "a", way: only("Handover", requestLost), code: connect.CodeUnavailable, text: "has not answered"},
		"everything lost": {from: "a", way: answerLost, code: connect.CodeUnavailable, text: "has not answered"},
		"taken already": {from: "a", code: connect.CodeFailedPrecondition, text: "handed over to node c already", state: "BLOCKDATA", before: func(p *pair) {
			if _, err := p.a.s.do(p.t.Context(), &filter.Handover{App: "redis", To: "c"}); err != nil {
				p.t.Fatal(err)
			}
		}},
		"VIP of another": {from: "a", code: connect.CodeFailedPrecondition, text: "10.0.0.100 is the VIP of application \"web\" on this node; the connections are held on node a as before", before: func(p *pair) {
			if _, err := p.b.s.do(p.t.Context(), &filter.Register{App: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.100")}}); err != nil {
				p.t.Fatal(err)
			}
		}},
		"VIP of another, and the way back is lost": {from: "a", way: only("Handback", answerLost), code: connect.CodeFailedPrecondition, text: "as soon as it can be reached", before: func(p *pair) {
			if _, err := p.b.s.do(p.t.Context(), &filter.Register{App: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.100")}}); err != nil {
				p.t.Fatal(err)
			}
		}},
		"damaged": {from: "a", code: connect.CodeFailedPrecondition, text: `they are of application "rodos"`, way: only("Handover", func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
			res, err := next.RoundTrip(r)
			if err != nil {
				return nil, err
			}
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			res.Body = io.NopCloser(bytes.NewReader(bytes.ReplaceAll(b, []byte("redis"), []byte("rodos"))))
			return res, err
		})},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			if x.before != nil {
				x.before(p)
			}
			p.a.set(x.way)
			p.want(p.restore(p.b, x.id, x.from), x.code, x.text)
			if got := p.app(p.b).State.String(); got != "" {
				t.Errorf("here it is %q", got)
			}
			p.a.set(nil)
			want := "SNAPSHOTDONE"
			if x.state != "" {
				want = x.state
			}
			p.until(want, "")
			if want == "SNAPSHOTDONE" && x.before == nil && name != "damaged" { // and a second try succeeds
				p.ok(p.restore(p.b, "s1", "a"))
				p.states("BLOCKDATA", "RESTORESTART")
			}
		})
	}
}

// An answer that is lost once is asked for again.
func TestTakeOverAsksAgain(t *testing.T) {
	for name, way := range map[string]func(*http.Request, http.RoundTripper) (*http.Response, error){"refused": notThere, "answer": answerLost, "request": requestLost} {
		p := newPair(t)
		var once sync.Once
		p.a.set(func(r *http.Request, next http.RoundTripper) (res *http.Response, err error) {
			done := false
			once.Do(func() { res, err, done = nil, nil, true; res, err = way(r, next) })
			if done {
				return res, err
			}
			return next.RoundTrip(r)
		})
		if err := p.restore(p.b, "s1", "a"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		p.states("BLOCKDATA", "RESTORESTART")
	}
}

// A restore on the new node is given up: of both nodes at most one answers, whatever
// gets lost, and in the end the old one does.
func TestHandedBack(t *testing.T) {
	t.Run("at once", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.ok(p.abort(p.b))
		p.states("SNAPSHOTDONE", "")
		p.ok(p.abort(p.b)) // again
	})
	t.Run("VIP", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.b.vipHere = true
		p.want(p.abort(p.b), connect.CodeFailedPrecondition, "ip addr del 10.0.0.100 dev eth0")
		p.states("BLOCKDATA", "RESTORESTART")
	})
	t.Run("not there", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.a.set(notThere)
		p.want(p.abort(p.b), connect.CodeUnavailable, "the connections stay held on this node")
		p.states("BLOCKDATA", "RESTORESTART")
	})
	t.Run("gone at the last moment", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.a.set(only("Handback", notThere))
		p.want(p.abort(p.b), connect.CodeFailedPrecondition, "the connections stay held on this node")
		p.states("BLOCKDATA", "RESTORESTART")
		p.a.set(nil)
		p.ok(p.abort(p.b))
		p.states("SNAPSHOTDONE", "")
	})
	for name, way := range map[string]func(*http.Request, http.RoundTripper) (*http.Response, error){"answer lost": answerLost, "request lost": requestLost} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			p.ok(p.restore(p.b, "s1", "a"))
			p.a.set(only("Handback", way))
			p.want(p.abort(p.b), connect.CodeUnavailable, "nobody answers the remotes until it can be reached again")
			if b := p.app(p.b); b.State.String() != "BLOCKDATA" || !b.Yielding {
				t.Fatalf("%+v", b)
			}
			p.a.set(notThere) // that is no proof any more
			p.want(p.abort(p.b), connect.CodeUnavailable, "nobody answers")
			p.want(p.restore(p.b, "s1", "a"), connect.CodeFailedPrecondition, "being handed back")
			p.a.set(nil)
			p.until("SNAPSHOTDONE", "")
		})
	}
	t.Run("the old filter has gone on", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.a.set(only("Handback", answerLost))
		p.want(p.abort(p.b), connect.CodeUnavailable, "nobody answers")
		p.states("SNAPSHOTDONE", "BLOCKDATA")
		p.ok(p.restore(p.a, "s1", ""))
		p.a.set(nil)
		p.until("RESTORESTART", "")
	})
	t.Run("refused", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		if _, err := p.a.s.do(t.Context(), &filter.Release{App: "redis"}); err != nil {
			t.Fatal(err)
		}
		// Nobody takes them back ever: they are this node's own.
		p.want(p.abort(p.b), connect.CodeFailedPrecondition, "the connections stay held on this node")
		p.states("", "SNAPSHOTDONE")
		p.ok(p.restore(p.b, "s1", ""))
		p.ok(p.abort(p.b))
		p.states("", "SNAPSHOTDONE")
	})
	t.Run("behind a restart", func(t *testing.T) {
		p := newPair(t)
		p.ok(p.restore(p.b, "s1", "a"))
		p.a.set(only("Handback", requestLost))
		p.want(p.abort(p.b), connect.CodeUnavailable, "nobody answers")
		p.b.s.n.foreign.close()
		p.b.s.n.foreign.mu.Lock()
		p.b.s.n.foreign.closed, p.b.s.n.foreign.jobs = false, nil
		p.b.s.n.foreign.mu.Unlock()
		p.a.set(nil)
		p.b.s.resumeYields(t.Context())
		p.until("SNAPSHOTDONE", "")
	})
}

// A node asks for itself alone, and the scheduler for nobody.
func TestWhoAsks(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	svc := peerService{service: p.a.s}
	from := func(peer control.Peer, ok bool) {
		p.a.s.n.foreign.peerFrom = func(context.Context) (control.Peer, bool) { return peer, ok }
	}
	handover := func(to string) error {
		_, err := svc.Handover(ctx, connect.NewRequest(&pb.HandoverRequest{App: "redis", ToNode: to}))
		return err
	}
	from(control.Peer{Name: "b"}, true)
	p.want(handover("c"), connect.CodePermissionDenied, "in the name of node c")
	from(control.Peer{Name: control.SchedulerName}, true)
	p.want(handover(control.SchedulerName), connect.CodePermissionDenied, "only the nodes")
	from(control.Peer{}, false)
	p.want(handover("b"), connect.CodePermissionDenied, "only the nodes")
	p.states("SNAPSHOTDONE", "")
	from(control.Peer{Name: "b"}, true)
	p.ok(handover("b"))
	_, err := svc.Handback(ctx, connect.NewRequest(&pb.HandbackRequest{App: "redis", FromNode: "c"}))
	p.want(err, connect.CodePermissionDenied, "in the name of node c")
	from(control.Peer{Name: "c"}, true)
	_, err = svc.Release(ctx, connect.NewRequest(&pb.ReleaseRequest{App: "redis"}))
	p.want(err, connect.CodeFailedPrecondition, "handed over to node b, not c")
	from(control.Peer{Name: "b"}, true)
	p.a.vipHere = true
	_, err = svc.Release(ctx, connect.NewRequest(&pb.ReleaseRequest{App: "redis", Force: true}))
	p.want(err, connect.CodeFailedPrecondition, "remove it first")
	_, err = p.a.s.Release(ctx, connect.NewRequest(&pb.ReleaseRequest{App: "redis", Force: true}))
	p.ok(err)
	p.states("", "")
	_, err = svc.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "redis"}))
	p.want(err, connect.CodeUnimplemented, "")
}

// A node that this node's files do not let run an application is not given its
// connections, and one that does not have them cannot have this one speak for other
// addresses, whatever certificate it has.
func TestTakeOverAsConfigured(t *testing.T) {
	has := func(x *side, vips, nodes string) {
		a := &config.App{Name: "redis", Nodes: strings.Fields(nodes)}
		for _, v := range strings.Fields(vips) {
			a.VIPs = append(a.VIPs, netip.MustParseAddr(v))
		}
		c := *x.s.n.cfg.Load()
		c.Apps = map[string]*config.App{"redis": a}
		x.s.n.cfg.Store(&c)
	}
	p := newPair(t)
	has(p.a, "10.0.0.100", "a c")
	p.want(p.restore(p.b, "s1", "a"), connect.CodeFailedPrecondition, "node b may not run it")
	p.states("SNAPSHOTDONE", "")
	has(p.a, "10.0.0.100", "a b")
	for _, vips := range []string{"10.0.0.101", "10.0.0.100 fd00::100"} {
		has(p.b, vips, "")
		p.want(p.restore(p.b, "s1", "a"), connect.CodeFailedPrecondition, "they are of the VIPs [10.0.0.100], and application")
		p.states("SNAPSHOTDONE", "")
	}
	c := *p.b.s.n.cfg.Load()
	c.Apps = nil // its file is newer than what the filter has read
	p.b.s.n.cfg.Store(&c)
	p.b.vipHere = true
	p.want(p.restore(p.b, "s1", "a"), connect.CodeFailedPrecondition, "is on interface eth0 of this node already")
	p.states("SNAPSHOTDONE", "")
	p.b.vipHere = false
	p.ok(p.restore(p.b, "s1", "a"))
	p.states("BLOCKDATA", "RESTORESTART")
}

func TestPeerAddress(t *testing.T) {
	addr := netip.MustParseAddr("192.0.2.11")
	node := config.Node{Name: "a", Address: addr, FilterPort: 7401}
	for _, x := range []struct {
		cluster config.Cluster
		node    config.Node
		want    string
	}{
		{config.Cluster{}, node, ""},
		{config.Cluster{Nodes: []config.ClusterNode{{Name: "a"}}}, node, ""},
		{config.Cluster{Nodes: []config.ClusterNode{{Name: "a"}, {Name: "b"}}}, node, "192.0.2.11:7401"},
		{config.Cluster{Scheduler: &config.Scheduler{}}, node, "192.0.2.11:7401"},
		{config.Cluster{Scheduler: &config.Scheduler{}}, config.Node{Name: "a"}, ""},
	} {
		got, ok := PeerAddress(&config.Config{Cluster: x.cluster, Node: x.node})
		if got != x.want || ok != (x.want != "") {
			t.Errorf("%+v: %q, want %q", x, got, x.want)
		}
	}
}
