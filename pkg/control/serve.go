package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

const (
	// MaxRequest is the largest request in bytes; the sockets of an
	// application with a hundred thousand connections fit.
	MaxRequest = 64 << 20

	// MaxPeerMessage is the largest request and reply in bytes between the
	// filters of two nodes: the connections of an application with all that is
	// kept for them.
	MaxPeerMessage = 640 << 20

	// MaxConns is how many connections root, and how many all others
	// together, may have open at once.
	MaxConns = 256

	headerTimeout   = 10 * time.Second // from accept to the end of the header
	idleTimeout     = 2 * time.Minute
	flushTimeout    = 200 * time.Millisecond
	partingTimeout  = time.Second      // for a client to take its reply from a daemon that ends
	shutdownTimeout = 15 * time.Second // for handlers to return after their contexts ended
	spareConns      = 32               // beyond MaxConns, told so and closed
)

// Variables for the tests.
var (
	bodyTimeout  = 30 * time.Second // for the rest of the request
	replyTimeout = 30 * time.Second // for a client to take its reply
)

// FilterHandler returns the HTTP handler for a filter, with the limits of this
// package; a panic of svc becomes an error of code internal.
func FilterHandler(svc nfconnfilterv1connect.FilterHandler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(nfconnfilterv1connect.NewFilterHandler(svc, handlerOptions()...))
	return mux
}

// PeerFilterHandler is FilterHandler for Peers.Serve: requests may be as large as
// MaxPeerMessage.
func PeerFilterHandler(svc nfconnfilterv1connect.FilterHandler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(nfconnfilterv1connect.NewFilterHandler(svc, append(handlerOptions(), connect.WithReadMaxBytes(MaxPeerMessage))...))
	return mux
}

// AgentHandler returns the HTTP handler for an agent; see FilterHandler.
func AgentHandler(svc nfconnfilterv1connect.AgentHandler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(nfconnfilterv1connect.NewAgentHandler(svc, handlerOptions()...))
	return mux
}

func handlerOptions() []connect.HandlerOption {
	return []connect.HandlerOption{
		// Counts after decompression, which Serve cannot see.
		connect.WithReadMaxBytes(MaxRequest),
		connect.WithRecover(func(_ context.Context, spec connect.Spec, _ http.Header, p any) error {
			slog.Error("a request made the daemon panic", "procedure", spec.Procedure, "panic", p, "stack", string(debug.Stack()))
			return connect.NewError(connect.CodeInternal, fmt.Errorf("%s: internal error: %v", spec.Procedure, p))
		}),
	}
}

// Serve answers requests on l, which is a Unix socket, until ctx ends: the
// contexts of running handlers end with it, and Serve returns nil when they
// have returned or after 15 seconds. Clients who are in the middle of a request
// or do not take their reply are not waited for. It speaks HTTP/1.1 and HTTP/2 without
// TLS. The credentials of each caller are read once, at accept; allowed (nil:
// AllowGroup("")) decides, and a caller that it refuses gets permission_denied
// with its error as the message, while nothing of the request is read. Serve
// closes l. The returned error is that of accept(2).
func Serve(ctx context.Context, l net.Listener, handler http.Handler, allowed func(Caller) error) error {
	if allowed == nil {
		allowed = AllowGroup("")
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	g := &gate{next: handler, errors: connect.NewErrorWriter(), limit: MaxRequest, body: bodyTimeout, reply: replyTimeout, parting: partingTimeout}
	srv := &http.Server{
		Handler:           g,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       connContext,
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(&admission{Listener: l, allowed: allowed}) }()
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

// shutdown waits for running requests. Shutdown alone would also wait a second
// for every idle HTTP/2 client.
func (g *gate) shutdown(ctx context.Context, srv *http.Server) {
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	go func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for g.active.Load() > 0 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
		select { // the last replies are on their way
		case <-time.After(flushTimeout):
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := srv.Shutdown(ctx); err != nil {
		srv.Close()
	}
}

// admission reads who is calling as connections are accepted and counts them.
type admission struct {
	net.Listener
	allowed func(Caller) error

	mu     sync.Mutex
	root   int // open connections of root
	others int
}

// peerConn is an accepted connection with the verdict on its caller.
type peerConn struct {
	net.Conn
	caller  Caller
	refusal error // *connect.Error, nil when let in
	release func()
	once    sync.Once
}

// Close frees the connection's place.
func (c *peerConn) Close() error {
	c.once.Do(c.release)
	return c.Conn.Close()
}

// Accept returns the next connection. Connections beyond the limits are closed
// here, so that those who hold theirs open never keep others (root least of
// all) from being accepted.
func (a *admission) Accept() (net.Conn, error) {
	for {
		c, err := a.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if pc := a.admit(c); pc != nil {
			return pc, nil
		}
		c.Close()
	}
}

func (a *admission) admit(c net.Conn) *peerConn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		slog.Error("control socket: a connection without a file descriptor was refused")
		return nil
	}
	pc := &peerConn{Conn: c}
	var err error
	if pc.caller, err = peerOf(sc); err != nil {
		slog.Error("control socket: the caller's credentials cannot be read", "error", err)
		return nil
	}
	if err := a.allowed(pc.caller); err != nil {
		pc.refusal = connect.NewError(connect.CodePermissionDenied, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	count := &a.others
	if pc.caller.UID == 0 {
		count = &a.root
	}
	if *count >= MaxConns+spareConns {
		return nil
	}
	*count++
	pc.release = func() {
		a.mu.Lock()
		*count--
		a.mu.Unlock()
	}
	if *count > MaxConns && pc.refusal == nil {
		pc.refusal = connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d connections are open on this socket already: close some and try again", MaxConns))
	}
	return pc
}

type refusalKey struct{}

func connContext(ctx context.Context, c net.Conn) context.Context {
	pc, ok := c.(*peerConn)
	if !ok {
		return context.WithValue(ctx, refusalKey{}, errors.New("connection without credentials"))
	}
	ctx = context.WithValue(ctx, callerKey{}, pc.caller)
	if pc.refusal != nil {
		ctx = context.WithValue(ctx, refusalKey{}, pc.refusal)
	}
	return ctx
}

// gate answers refused callers and reads each request under a deadline before
// its handler runs. All methods are unary, so the whole request is one
// message. A deadline of the server itself would end long calls as well.
type gate struct {
	next   http.Handler
	errors *connect.ErrorWriter
	active atomic.Int64
	limit  int64         // of a request in bytes
	body   time.Duration // for it to arrive
	reply  time.Duration // for the client to take its reply
	// parting is the same for one who would keep us from ending.
	parting time.Duration
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.active.Add(1)
	defer g.active.Add(-1)
	rc := http.NewResponseController(w)
	if err, ok := r.Context().Value(refusalKey{}).(error); ok {
		w.Header().Set("Connection", "close")
		_ = rc.SetWriteDeadline(time.Now().Add(g.reply))
		_ = g.errors.Write(w, r, err)
		return
	}
	_ = rc.SetWriteDeadline(time.Time{})
	_ = rc.SetReadDeadline(time.Now().Add(g.body))
	whole := atEnd(r.Context(), func() { _ = rc.SetReadDeadline(time.Unix(1, 0)) })
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, g.limit))
	whole()
	if err != nil {
		w.Header().Set("Connection", "close")
		_ = rc.SetWriteDeadline(time.Now().Add(g.patience(r)))
		_ = g.errors.Write(w, r, bodyError(err))
		return
	}
	_ = rc.SetReadDeadline(time.Time{})
	r.Body = io.NopCloser(bytes.NewReader(body))
	taken := atEnd(r.Context(), func() { _ = rc.SetWriteDeadline(time.Now().Add(g.patience(r))) })
	defer taken()
	g.next.ServeHTTP(&replyWriter{ResponseWriter: w, rc: rc, most: func() time.Duration { return g.patience(r) }}, r)
}

// atEnd calls f when ctx ends. Behind stop f is not called and has returned: a
// handler's writer is no more when the handler has returned.
func atEnd(ctx context.Context, f func()) (stop func()) {
	var mu sync.Mutex
	over := false
	quiet := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			f()
		}
	})
	return func() {
		quiet()
		mu.Lock()
		over = true
		mu.Unlock()
	}
}

// patience is how long a client may take to take its reply.
func (g *gate) patience(r *http.Request) time.Duration {
	if r.Context().Err() != nil {
		return min(g.reply, g.parting)
	}
	return g.reply
}

func bodyError(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("the request is larger than %d bytes", tooLarge.Limit))
	}
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the request did not arrive whole: %v", err))
}

// replyWriter gives a client a limited time to take its reply, counted from
// the reply's first byte and not, as http.Server would, from the request's.
type replyWriter struct {
	http.ResponseWriter
	rc      *http.ResponseController
	most    func() time.Duration
	started bool
}

func (w *replyWriter) start() {
	if !w.started {
		w.started = true
		_ = w.rc.SetWriteDeadline(time.Now().Add(w.most()))
	}
}

// WriteHeader starts the time.
func (w *replyWriter) WriteHeader(code int) {
	w.start()
	w.ResponseWriter.WriteHeader(code)
}

// Write starts the time.
func (w *replyWriter) Write(p []byte) (int, error) {
	w.start()
	return w.ResponseWriter.Write(p)
}

// Flush starts the time.
func (w *replyWriter) Flush() {
	w.start()
	_ = w.rc.Flush()
}

// Unwrap is for http.ResponseController.
func (w *replyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
