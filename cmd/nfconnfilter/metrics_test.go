package main

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Who reaches the port of the metrics and says nothing, or half of something, is let
// go, and has few connections until then; who asks is answered again.
func TestMetricsPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const patience = 300 * time.Millisecond
	srv := metricsServer(prometheus.NewRegistry(), patience)
	few := &fewConns{Listener: l}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(few) }()
	defer func() {
		srv.Close()
		<-done
	}()
	dial := func(say string) net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(c, say)
		return c
	}
	const whole = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
	var all []net.Conn
	for range 2 * metricsConns {
		all = append(all, dial(""))
	}
	all = append(all, dial(whole[:20]), dial("POST"+whole[3:len(whole)-2]+"Content-Length: 9\r\n\r\n"), dial(whole))
	for i, c := range all {
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Fatalf("connection %d stays open", i)
		}
		if n := few.open.Load(); n > metricsConns {
			t.Fatalf("%d connections are open", n)
		}
	}
	for end := time.Now().Add(10 * time.Second); few.open.Load() > 0; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d places are not freed", few.open.Load())
		}
	}
	c := dial(whole)
	if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 ") { // its silence then ends it
		t.Errorf("%q, %v", b, err)
	}
}
