package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(childMain())
	}
	goleak.VerifyTestMain(m)
}

// fake is a filter whose calls tests can see and hold.
type fake struct {
	nfconnfilterv1connect.UnimplementedFilterHandler
	waiting chan struct{}               // a value for every Wait that has begun
	ended   chan error                  // how the context of each Wait ended
	status  *nfconnfilterv1.StatusReply // what Status answers
	callers chan Caller
}

func (f *fake) Status(ctx context.Context, r *connect.Request[nfconnfilterv1.StatusRequest]) (*connect.Response[nfconnfilterv1.StatusReply], error) {
	if f.callers != nil {
		c, _ := CallerFrom(ctx)
		f.callers <- c
	}
	if f.status != nil {
		return connect.NewResponse(f.status), nil
	}
	return connect.NewResponse(&nfconnfilterv1.StatusReply{Node: "node-a", Apps: []*nfconnfilterv1.AppStatus{{Name: r.Msg.App}}}), nil
}

func (f *fake) Seal(_ context.Context, r *connect.Request[nfconnfilterv1.SealRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return nil, Error(connect.CodeFailedPrecondition, r.Msg.App, StateConnected, "SEAL is not allowed in CONNECTED", "10.0.0.1:80 10.0.0.2:4000: 12 bytes not read")
}

func (f *fake) Unregister(context.Context, *connect.Request[nfconnfilterv1.UnregisterRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return nil, connect.NewError(connect.CodeUnavailable, errors.New("not now"))
}

func (f *fake) Register(context.Context, *connect.Request[nfconnfilterv1.RegisterRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	panic("broken")
}

func (f *fake) SnapshotStart(_ context.Context, r *connect.Request[nfconnfilterv1.SnapshotStartRequest]) (*connect.Response[nfconnfilterv1.LearnReply], error) {
	return connect.NewResponse(&nfconnfilterv1.LearnReply{Learned: uint32(len(r.Msg.Sockets))}), nil
}

func (f *fake) Wait(ctx context.Context, _ *connect.Request[nfconnfilterv1.WaitRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	f.waiting <- struct{}{}
	<-ctx.Done()
	f.ended <- ctx.Err()
	return nil, ctx.Err()
}

// serve starts a server for f and returns its socket's path.
func serve(t *testing.T, f *fake, allowed func(Caller) error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, f, allowed)
	return path
}

// serveOn serves f on l and returns a function that stops it.
func serveOn(t *testing.T, l net.Listener, f *fake, allowed func(Caller) error) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, FilterHandler(f), allowed) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(shutdownTimeout + 5*time.Second):
			t.Error("Serve did not return")
		}
	}
	t.Cleanup(stop)
	return stop
}

func dial(t *testing.T, path string, opts ...connect.ClientOption) *FilterClient {
	c := Dial(path, opts...)
	t.Cleanup(c.Close)
	return c
}

func status(t *testing.T, c *FilterClient, app string) {
	t.Helper()
	r, err := c.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{App: app}))
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Msg.Apps[0].Name; got != app {
		t.Fatalf("app %q, want %q", got, app)
	}
}

func TestProtocols(t *testing.T) {
	path := serve(t, &fake{}, nil)
	t.Run("connect", func(t *testing.T) { status(t, dial(t, path), "redis") })
	t.Run("grpc", func(t *testing.T) { status(t, dial(t, path, connect.WithGRPC()), "redis") })
	t.Run("grpc-web", func(t *testing.T) { status(t, dial(t, path, connect.WithGRPCWeb()), "redis") })
	t.Run("json", func(t *testing.T) { status(t, dial(t, path, connect.WithProtoJSON()), "redis") })
	t.Run("agent on the filter's socket", func(t *testing.T) {
		c := DialAgent(path)
		defer c.Close()
		_, err := c.Start(t.Context(), connect.NewRequest(&nfconnfilterv1.AgentStartRequest{App: "a"}))
		if connect.CodeOf(err) != connect.CodeUnimplemented || IsUnreachable(err) {
			t.Fatalf("got %v", err)
		}
	})
}

// rawHTTP sends text on a new connection and returns all that is answered.
func rawHTTP(t *testing.T, path, text string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Logf("read: %v", err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("no end of the answer; so far %q", b)
	}
	return string(b)
}

func post(procedure, body string) string {
	return "POST /nfconnfilter.v1.Filter/" + procedure + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n" +
		"Content-Length: " + itoa(len(body)) + "\r\n\r\n" + body
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func TestJSONByHand(t *testing.T) {
	path := serve(t, &fake{}, nil)
	got := rawHTTP(t, path, post("Status", `{"app":"redis"}`))
	head, body, _ := strings.Cut(got, "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") {
		t.Fatalf("got %q", got)
	}
	var reply struct {
		Node string
		Apps []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(body), &reply); err != nil || reply.Node != "node-a" || len(reply.Apps) != 1 || reply.Apps[0].Name != "redis" {
		t.Fatalf("body %q: %v", body, err)
	}
	got = rawHTTP(t, path, post("Seal", `{"app":"redis"}`))
	for _, want := range []string{`"code":"failed_precondition"`, `"message":"SEAL is not allowed in CONNECTED"`, "nfconnfilter.v1.ErrorInfo"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	if got = rawHTTP(t, path, post("Status", `{"app":`)); !strings.Contains(got, `"code":"invalid_argument"`) {
		t.Errorf("broken JSON: %q", got)
	}
}

func TestErrorInfo(t *testing.T) {
	path := serve(t, &fake{}, nil)
	for name, opt := range map[string]connect.ClientOption{"connect": connect.WithProtoJSON(), "grpc": connect.WithGRPC()} {
		_, err := dial(t, path, opt).Seal(t.Context(), connect.NewRequest(&nfconnfilterv1.SealRequest{App: "redis"}))
		info := Info(err)
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || info == nil || info.App != "redis" || info.State != StateConnected ||
			len(info.Connections) != 1 || info.Connections[0] != "10.0.0.1:80 10.0.0.2:4000: 12 bytes not read" {
			t.Errorf("%s: %v, info %v", name, err, info)
		}
		if IsUnreachable(err) {
			t.Errorf("%s: an answer counts as unreachable", name)
		}
	}
	_, err := dial(t, path).Unregister(t.Context(), connect.NewRequest(&nfconnfilterv1.UnregisterRequest{}))
	if connect.CodeOf(err) != connect.CodeUnavailable || IsUnreachable(err) {
		t.Errorf("the daemon itself says unavailable: %v", err)
	}
	if Info(nil) != nil || Info(errors.New("x")) != nil || Info(connect.NewError(connect.CodeAborted, nil)) != nil {
		t.Error("info out of nothing")
	}
	if e := Error(connect.CodeAborted, "\xff", "", "bad text"); connect.CodeOf(e) != connect.CodeAborted || Info(e) != nil {
		t.Errorf("text that is not UTF-8: %v", e)
	}
}

func TestPanicIsAnError(t *testing.T) {
	path := serve(t, &fake{}, nil)
	c := dial(t, path)
	_, err := c.Register(t.Context(), connect.NewRequest(&nfconnfilterv1.RegisterRequest{}))
	if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "broken") {
		t.Fatalf("got %v", err)
	}
	status(t, c, "still-there")
}

func TestGarbage(t *testing.T) {
	path := serve(t, &fake{}, nil)
	for _, text := range []string{
		"\x00\xff\x13\x37\r\n\r\n",
		"GET / HTTP/1.1\r\n\r\n",
		"POST /nfconnfilter.v1.Filter/Status HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + strings.Repeat("\xff", 64),
		strings.Repeat("A", 200<<10) + "\r\n\r\n",
		post("Nothing", "{}"),
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(c, text) // the server may close before it has read all
		_ = c.(*net.UnixConn).CloseWrite()
		if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) || strings.HasPrefix(string(b), "HTTP/1.1 200") {
			t.Errorf("%.40q: %q %v", text, b, err)
		}
		c.Close()
	}
	status(t, dial(t, path), "still-there")
}

func TestLargeRequests(t *testing.T) {
	path := serve(t, &fake{}, nil)
	c := dial(t, path)
	const n = 100_000
	req := &nfconnfilterv1.SnapshotStartRequest{App: "a", Sockets: make([]*nfconnfilterv1.Socket, n)}
	for i := range req.Sockets {
		req.Sockets[i] = &nfconnfilterv1.Socket{Local: "192.0.2.100:6379", Remote: "198.51.100.200:54321", State: "ESTABLISHED", Passive: true,
			HasInfo: true, BytesAcked: 1 << 40, BytesReceived: 1 << 40, BytesSent: 1 << 40, SndMss: 1448, AdvMss: 1448, RcvSpace: 65535}
	}
	r, err := c.SnapshotStart(t.Context(), connect.NewRequest(req))
	if err != nil || r.Msg.Learned != n {
		t.Fatalf("%d sockets: %v", n, err)
	}
	over := "POST /nfconnfilter.v1.Filter/Status HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " + itoa(MaxRequest+1) + "\r\n\r\n"
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	answer := make(chan string, 1)
	go func() { b, _ := io.ReadAll(conn); answer <- string(b) }()
	chunk := strings.Repeat(" ", 1<<20)
	_, err = io.WriteString(conn, over)
	for i := 0; err == nil && i <= MaxRequest>>20; i++ {
		_, err = io.WriteString(conn, chunk)
	}
	if got := <-answer; !strings.Contains(got, `"code":"resource_exhausted"`) || !strings.Contains(got, "the request is larger than") {
		t.Fatalf("%.300q", got)
	}
	status(t, c, "still-there")
}

// A gzip bomb is small on the wire; the limit counts what comes out of it.
func TestCompressedLimit(t *testing.T) {
	path := serve(t, &fake{}, nil)
	c := dial(t, path, connect.WithSendGzip(), connect.WithAcceptCompression("gzip", newGzipReader, newGzipWriter))
	_, err := c.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{App: strings.Repeat("a", MaxRequest+1)}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Fatalf("got %.200v", err)
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	missing := dial(t, filepath.Join(dir, "missing.sock"))
	_, err := missing.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{}))
	if !IsUnreachable(err) {
		t.Errorf("missing socket: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = missing.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{})); IsUnreachable(err) {
		t.Errorf("cancelled call: %v", err)
	}
	// Somebody who hangs up in the middle of the call.
	path := filepath.Join(dir, "mute.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if _, err = dial(t, path).Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{})); !IsUnreachable(err) {
		t.Errorf("hung up: %v", err)
	}
	if IsUnreachable(nil) || IsUnreachable(errors.New("x")) {
		t.Error("unreachable out of nothing")
	}
}

// The client finds a restarted daemon again, on the connection pool it has.
func TestRestartedServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	stop := serveOn(t, l, &fake{}, nil)
	c := dial(t, path)
	status(t, c, "first")
	stop()
	if _, err := c.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{})); !IsUnreachable(err) {
		t.Fatalf("stopped: %v", err)
	}
	if l, err = Listen(path, ""); err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, &fake{}, nil)
	status(t, c, "second")
}

func TestClientGoneEndsCall(t *testing.T) {
	f := &fake{waiting: make(chan struct{}, 1), ended: make(chan error, 1)}
	path := serve(t, f, nil)
	for name, call := range map[string]func(ctx context.Context){
		"http2": func(ctx context.Context) {
			_, _ = dial(t, path).Wait(ctx, connect.NewRequest(&nfconnfilterv1.WaitRequest{}))
		},
		"http1": func(ctx context.Context) {
			var d net.Dialer
			hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", path)
			}}}
			_, _ = nfconnfilterv1connect.NewFilterClient(hc, "http://x").Wait(ctx, connect.NewRequest(&nfconnfilterv1.WaitRequest{}))
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); call(ctx) }()
		<-f.waiting
		cancel()
		select {
		case <-f.ended:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the call goes on without its client", name)
		}
		<-done
	}
}

func TestServeEndsCalls(t *testing.T) {
	f := &fake{waiting: make(chan struct{}, 1), ended: make(chan error, 1)}
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	stop := serveOn(t, l, f, nil)
	c := dial(t, path)
	done := make(chan error, 1)
	go func() {
		_, err := c.Wait(context.Background(), connect.NewRequest(&nfconnfilterv1.WaitRequest{}))
		done <- err
	}()
	<-f.waiting
	start := time.Now()
	stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	if err := <-done; err == nil {
		t.Error("the call succeeded")
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket left: %v", err)
	}
}

func TestStuckClients(t *testing.T) {
	f := &fake{waiting: make(chan struct{}, 1), ended: make(chan error, 1)}
	path := serve(t, f, nil)
	var stuck []net.Conn
	defer func() {
		for _, c := range stuck {
			c.Close()
		}
	}()
	texts := []string{"", "POST /nfconn", "PRI * HTTP/2.0\r\n\r\n", strings.TrimSuffix(post("Status", `{"app":"x"}`), `"x"}`)}
	for i := range MaxConns - 2 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		stuck = append(stuck, c)
		if _, err := io.WriteString(c, texts[i%len(texts)]); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	status(t, dial(t, path), "others")
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("others waited %v", d)
	}
}

func TestTooManyConnections(t *testing.T) {
	path := serve(t, &fake{}, nil)
	var held []net.Conn
	closeAll := func() {
		for _, c := range held {
			c.Close()
		}
		held = nil
	}
	defer closeAll()
	for range MaxConns {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	c := dial(t, path)
	_, err := c.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted || IsUnreachable(err) {
		t.Fatalf("got %v", err)
	}
	for range 2 * spareConns { // beyond the spare ones: closed unheard
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	closeAll()
	deadline := time.Now().Add(10 * time.Second)
	for {
		_, err := c.Status(t.Context(), connect.NewRequest(&nfconnfilterv1.StatusRequest{App: "x"}))
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("places are not freed: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestWords(t *testing.T) {
	if !IsState("") || !IsState(StateBlockData) || IsState("connected") || IsState("X") {
		t.Error("IsState")
	}
	s := States()
	s[0] = "changed"
	if States()[0] != StateConnected || len(States()) != 7 || len(Requests()) != 17 {
		t.Error("the lists can be changed from outside, or lack a word")
	}
}

// shorten gives requests and replies a short time in one test.
func shorten(t *testing.T, d time.Duration) {
	b, r := bodyTimeout, replyTimeout
	bodyTimeout, replyTimeout = d, d
	t.Cleanup(func() { bodyTimeout, replyTimeout = b, r })
}

// A call may take longer than a client has for its request and its reply.
func TestLongCall(t *testing.T) {
	shorten(t, 100*time.Millisecond)
	f := &fake{waiting: make(chan struct{}, 1), ended: make(chan error, 1)}
	path := serve(t, f, nil)
	t.Run("http2", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		c := dial(t, path)
		go func() {
			defer close(done)
			_, _ = c.Wait(ctx, connect.NewRequest(&nfconnfilterv1.WaitRequest{App: "a"}))
		}()
		longCall(t, f)
		cancel()
		<-f.ended
		<-done
		status(t, c, "same-connection")
	})
	// The server watches for the end of an HTTP/1.1 connection from when the
	// body was read, or from the start when there is none.
	for name, request := range map[string]string{
		"http1":         post("Wait", `{"app":"a"}`),
		"http1 no body": strings.Replace(post("Wait", ""), "/json", "/proto", 1),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			longCall(t, f)
			conn.Close()
			<-f.ended
		})
	}
}

func longCall(t *testing.T, f *fake) {
	t.Helper()
	<-f.waiting
	select {
	case err := <-f.ended:
		t.Errorf("the call was ended: %v", err)
		f.ended <- err
	case <-time.After(400 * time.Millisecond):
	}
}

func TestRequestThatStops(t *testing.T) {
	shorten(t, 100*time.Millisecond)
	path := serve(t, &fake{}, nil)
	got := rawHTTP(t, path, strings.TrimSuffix(post("Status", `{"app":"x"}`), `"x"}`))
	if !strings.Contains(got, `"code":"invalid_argument"`) || !strings.Contains(got, "did not arrive whole") {
		t.Fatalf("got %q", got)
	}
}

// A client that takes no reply is let go, and does not hold the server up.
func TestReplyNotTaken(t *testing.T) {
	shorten(t, 100*time.Millisecond)
	f := &fake{status: &nfconnfilterv1.StatusReply{Node: strings.Repeat("x", 8<<20)}}
	path := serve(t, f, nil)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, post("Status", "{}")); err != nil {
		t.Fatal(err)
	}
	// The server hangs up: what it could not send never comes.
	time.Sleep(500 * time.Millisecond)
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	n, err := io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) || n >= 8<<20 {
		t.Fatalf("%d bytes came, %v", n, err)
	}
}
