package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

const (
	// nodeHeader names the asking node where it speaks plain text: several may
	// share an address. A certificate is believed instead where there is one.
	nodeHeader = "Nfcf-Node"

	peerDial = 5 * time.Second // for connect(2), and for the TLS handshake behind it
	// peerGone is when a peer that does not answer at all is given up, in a
	// call that may take long otherwise.
	peerGone      = 15 * time.Second
	peerIdle      = 30 * time.Second // of a connection without a call
	maxPeerConns  = 64               // of one address
	largeMessage  = 16 << 20
	largeAtOnce   = 2
	strangersEach = time.Minute // a line in the log
)

// Variables for the tests.
var (
	peerBody  = 2 * time.Minute // for a whole request, and for a reply to be taken
	peerReply = MaxPeerMessage
)

// Peer is another node of the cluster, or its scheduler.
type Peer struct {
	Name                  string // of the node; SchedulerName: the scheduler
	Address               netip.Addr
	FilterPort, AgentPort uint16
}

// SchedulerName is the name of the scheduler where that is not a node.
const SchedulerName = "scheduler"

// PeerOptions say how the nodes of a cluster speak with each other.
type PeerOptions struct {
	// Self is this node's own name.
	Self string
	// Files of this node's certificate, its key and the authority, in PEM. All
	// empty: in plain text. They are read again when they change.
	Cert, Key, CA string
	// AllowPlaintext permits plain text with other addresses than loopback's.
	AllowPlaintext bool
	// Peers gives the nodes and the scheduler as they are configured now.
	Peers func() []Peer
}

// Peers is the way to the other nodes, and from them to this one: TLS 1.3 with
// a certificate on both sides, of which each must name a peer.
type Peers struct {
	o     PeerOptions
	certs *certFiles // nil: plain text
	large chan struct{}
	dial  time.Duration // peerDial, in tests another

	mu        sync.Mutex
	strangers map[netip.Addr]time.Time // when they were last named in the log
}

// NewPeers reads the certificates. An expired one is no error here: it is when
// it is used.
func NewPeers(o PeerOptions) (*Peers, error) {
	p := &Peers{o: o, large: make(chan struct{}, largeAtOnce), dial: peerDial, strangers: map[netip.Addr]time.Time{}}
	switch n := len(o.Cert) * len(o.Key) * len(o.CA); {
	case o.Cert == "" && o.Key == "" && o.CA == "":
		return p, nil
	case n == 0:
		return nil, errors.New("[tls] needs all of cert, key and ca; ckptctl certs makes them")
	}
	p.certs = &certFiles{cert: o.Cert, key: o.Key, ca: o.CA}
	if _, err := p.certs.current(); err != nil {
		return nil, err
	}
	return p, nil
}

type peerKey struct{}

// PeerFrom returns the node that a request came from; false when it did not
// come through Peers.Serve.
func PeerFrom(ctx context.Context) (Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(Peer)
	return p, ok
}

// Serve answers the named procedures to the peers until ctx ends, and closes l.
// Connections from other addresses than theirs are closed at once. A peer
// whose certificate is not accepted gets permission_denied with the reason.
func (p *Peers) Serve(ctx context.Context, l net.Listener, h http.Handler, procedures ...string) error {
	allowed := map[string]bool{}
	for _, m := range procedures {
		allowed[m] = true
	}
	g := &gate{next: h, errors: connect.NewErrorWriter(), limit: MaxPeerMessage, body: peerBody, reply: peerBody, parting: shutdownTimeout}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	srv := &http.Server{
		Handler:           p.identify(g, allowed),
		ReadHeaderTimeout: headerTimeout, // of the handshake too
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		Protocols:         protocols,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	var accept net.Listener = &peerListener{Listener: l, p: p, conns: map[netip.Addr]int{}}
	if p.certs != nil {
		accept = tls.NewListener(accept, p.serverTLS())
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(accept) }()
	select {
	case err := <-done:
		srv.Close()
		if ctx.Err() != nil {
			return nil
		}
		return err
	case <-ctx.Done():
	}
	g.shutdown(context.WithoutCancel(ctx), srv)
	<-done
	return nil
}

// identify finds out who asks and whether it may, before anything of a request
// but its header is read.
func (p *Peers) identify(g *gate, allowed map[string]bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, err := p.caller(r)
		if err == nil && !allowed[r.URL.Path] {
			err = fmt.Errorf("%s is not for other nodes", r.URL.Path)
		}
		if err != nil {
			p.refused(r.RemoteAddr, err)
			r = r.WithContext(context.WithValue(r.Context(), refusalKey{}, connect.NewError(connect.CodePermissionDenied, err)))
			g.ServeHTTP(w, r)
			return
		}
		if r.ContentLength > largeMessage || r.ContentLength < 0 {
			select {
			case p.large <- struct{}{}:
				defer func() { <-p.large }()
			case <-r.Context().Done():
				return
			}
		}
		g.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), peerKey{}, peer)))
	})
}

// caller tells which peer sends a request.
func (p *Peers) caller(r *http.Request) (Peer, error) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return Peer{}, err
	}
	if p.certs != nil {
		if r.TLS == nil {
			return Peer{}, errors.New("this node speaks TLS")
		}
		return p.certs.whose(r.TLS.PeerCertificates, p.o.Peers())
	}
	if !p.plain(from.Addr().Unmap()) {
		return Peer{}, fmt.Errorf("this node has no certificate and does not speak plain text with %s: set [tls], or allow_plaintext = true, in its node file", from.Addr().Unmap())
	}
	name := r.Header.Get(nodeHeader)
	var there []Peer
	for _, o := range p.o.Peers() {
		if o.Address.Unmap() == from.Addr().Unmap() && (o.Name == name || name == "") {
			there = append(there, o)
		}
	}
	if len(there) == 1 {
		return there[0], nil
	}
	if len(there) > 1 {
		return Peer{}, fmt.Errorf("several nodes of cluster.toml have the address %s, and the request does not say which one asks (header %s)", from.Addr().Unmap(), nodeHeader)
	}
	return Peer{}, fmt.Errorf("%s is not the address of node %q in this node's cluster.toml", from.Addr().Unmap(), name)
}

// plain tells whether plain text may be spoken with an address.
func (p *Peers) plain(a netip.Addr) bool { return a.IsLoopback() || p.o.AllowPlaintext }

// peerListener lets only the peers' addresses in, each some times at once.
type peerListener struct {
	net.Listener
	p *Peers

	mu    sync.Mutex
	conns map[netip.Addr]int
}

type countedConn struct {
	net.Conn
	release func()
	once    sync.Once
}

// Close frees the connection's place.
func (c *countedConn) Close() error {
	c.once.Do(c.release)
	return c.Conn.Close()
}

// Accept returns the next connection of a peer.
func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if pc := l.admit(c); pc != nil {
			return pc, nil
		}
		c.Close()
	}
}

func (l *peerListener) admit(c net.Conn) net.Conn {
	ap, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return nil
	}
	from := ap.Addr().Unmap()
	if !l.p.known(from) {
		l.p.stranger(from)
		return nil
	}
	watchful(c)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns[from] >= maxPeerConns {
		return nil
	}
	l.conns[from]++
	return &countedConn{Conn: c, release: func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.conns[from]--; l.conns[from] == 0 {
			delete(l.conns, from)
		}
	}}
}

func (p *Peers) known(from netip.Addr) bool {
	for _, o := range p.o.Peers() {
		if o.Address.Unmap() == from {
			return true
		}
	}
	return false
}

// stranger names an address that is no peer's, now and then.
func (p *Peers) stranger(from netip.Addr) {
	if p.worthALine(from) {
		slog.Warn("a connection from an address that is no node's in cluster.toml was closed", "address", from)
	}
}

// refused names a peer that may not ask what it asks, now and then.
func (p *Peers) refused(remote string, err error) {
	if ap, perr := netip.ParseAddrPort(remote); perr == nil && p.worthALine(ap.Addr().Unmap()) {
		slog.Warn("a peer was refused", "address", remote, "error", err)
	}
}

// worthALine tells whether the log has not named an address for a while.
func (p *Peers) worthALine(from netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if len(p.strangers) > 1024 {
		clear(p.strangers)
	}
	if now.Sub(p.strangers[from]) < strangersEach {
		return false
	}
	p.strangers[from] = now
	return true
}

// watchful has the kernel notice a peer that is gone: a call may be silent for
// minutes (tcp(7), TCP_USER_TIMEOUT and TCP_KEEPIDLE).
func watchful(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	// The RST of a daemon that is killed can be lost with the queue of a filter
	// that dies at the same moment: a probe has it sent again.
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: int(peerGone / time.Second)})
	if raw, err := t.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerGone.Milliseconds()))
		})
	}
}

// DialFilter returns a client of a node's filter. It connects with the first call.
func (p *Peers) DialFilter(node string) (*FilterClient, error) {
	hc, t, url, err := p.client(node, func(p Peer) uint16 { return p.FilterPort })
	if err != nil {
		return nil, err
	}
	return &FilterClient{nfconnfilterv1connect.NewFilterClient(hc, url, peerClientOptions()...), t}, nil
}

// DialAgent returns a client of a node's agent; see DialFilter.
func (p *Peers) DialAgent(node string) (*AgentClient, error) {
	hc, t, url, err := p.client(node, func(p Peer) uint16 { return p.AgentPort })
	if err != nil {
		return nil, err
	}
	return &AgentClient{nfconnfilterv1connect.NewAgentClient(hc, url, peerClientOptions()...), t}, nil
}

func peerClientOptions() []connect.ClientOption {
	return append(clientOptions(nil), connect.WithReadMaxBytes(peerReply))
}

// client makes the way to one node.
func (p *Peers) client(node string, port func(Peer) uint16) (*http.Client, *http.Transport, string, error) {
	var to Peer
	self := netip.Addr{}
	for _, o := range p.o.Peers() {
		if o.Name == node {
			to = o
		}
		if o.Name == p.o.Self {
			self = o.Address
		}
	}
	if to.Name == "" {
		return nil, nil, "", fmt.Errorf("no node %q in cluster.toml", node)
	}
	scheme := "https"
	if p.certs == nil {
		if scheme = "http"; !p.plain(to.Address.Unmap()) {
			return nil, nil, "", fmt.Errorf("node %s is not dialled in plain text: set [tls] in the node file (ckptctl certs makes certificates), or allow_plaintext = true", node)
		}
	}
	d := &peerDialer{p: p, to: to, self: self}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	t := &http.Transport{
		DialContext:         d.dial,
		DialTLSContext:      d.dialTLS,
		Protocols:           protocols,
		IdleConnTimeout:     peerIdle,
		MaxIdleConnsPerHost: 2,
	}
	url := scheme + "://" + net.JoinHostPort(to.Address.String(), strconv.Itoa(int(port(to))))
	return &http.Client{Transport: &peerTransport{t, p.o.Self, node}}, t, url, nil
}

// peerDialer connects to one node.
type peerDialer struct {
	p    *Peers
	to   Peer
	self netip.Addr
}

func (d *peerDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	nd := net.Dialer{Timeout: d.p.dial}
	// A node has VIPs besides, and the others know it by its own address.
	if d.self.IsValid() && d.self.Is4() == d.to.Address.Is4() {
		nd.LocalAddr = &net.TCPAddr{IP: d.self.AsSlice()}
	}
	c, err := nd.DialContext(ctx, network, addr)
	if errors.Is(err, syscall.EADDRNOTAVAIL) {
		err = fmt.Errorf("%w; this node does not have the address %s that its [[node]] names", err, d.self)
	}
	if err != nil {
		return nil, notDelivered{err}
	}
	watchful(c)
	return c, nil
}

func (d *peerDialer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	cfg, err := d.p.clientTLS(d.to)
	if err == nil {
		t := tls.Client(c, cfg)
		hctx, cancel := context.WithTimeout(ctx, d.p.dial)
		defer cancel()
		if err = t.HandshakeContext(hctx); err == nil {
			return t, nil
		}
		if hctx.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("node %s has taken the connection and not answered the TLS handshake within %s: look at the daemon there", d.to.Name, d.p.dial)
		}
	}
	c.Close()
	if r := (tls.RecordHeaderError{}); errors.As(err, &r) {
		err = fmt.Errorf("node %s speaks plain text and this node TLS: set [tls] in its node file", d.to.Name)
	}
	return nil, notDelivered{err}
}

// peerTransport says who asks, and makes sense of what a TLS server answers to plain text.
type peerTransport struct {
	next http.RoundTripper
	self string
	node string
}

// RoundTrip carries out one call.
func (t *peerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r.Header.Set(nodeHeader, t.self)
	resp, err := t.next.RoundTrip(r)
	if err == nil {
		// Connect reads what is too large to its end, wherever that is.
		resp.Body = &boundedBody{resp.Body, int64(peerReply) + 64<<10}
	}
	if err != nil || resp.StatusCode != http.StatusBadRequest || r.URL.Scheme != "http" || strings.Contains(resp.Header.Get("Content-Type"), "json") {
		return resp, err
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 256))
	resp.Body.Close()
	if strings.Contains(string(b), "HTTPS server") { // net/http, server.go
		return nil, notDelivered{fmt.Errorf("node %s speaks TLS and this node plain text: set [tls] in this node's file", t.node)}
	}
	return nil, fmt.Errorf("node %s answers: %s: %s", t.node, resp.Status, b)
}

// boundedBody is a reply that fails behind so many octets.
type boundedBody struct {
	io.ReadCloser
	left int64
}

// Read reads some of what is allowed.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errors.New("the reply does not end")
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// notDelivered is a failure before anything of a request was sent.
type notDelivered struct{ error }

func (e notDelivered) Unwrap() error { return e.error }

// NotDelivered reports whether err says that no handler has seen, or will ever
// see, the request: the node could not be dialled, its certificate or this
// node's was not accepted, or it refused the caller. A connection that was lost
// later is none of these.
func NotDelivered(err error) bool {
	var nd notDelivered
	if errors.As(err, &nd) {
		return true
	}
	return connect.IsWireError(err) && connect.CodeOf(err) == connect.CodePermissionDenied
}
