package main

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestServe writes whole streams through the server on loopback.
func TestServe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "counts")
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := probe.Addr().String()
	probe.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, addr, file, 0) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	dial := func(addr string) (net.Conn, error) {
		deadline := time.Now().Add(5 * time.Second)
		for {
			c, err := net.Dial("tcp", addr)
			if err == nil || time.Now().After(deadline) {
				return c, err
			}
			time.Sleep(time.Millisecond)
		}
	}
	for _, total := range []uint64{0, 1, 3<<20 + 17} {
		w, err := clients.DialByteWriter(dial, addr, total, clients.Strictest)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Run(time.Now().Add(20 * time.Second)); err != nil {
			t.Error(err)
		}
		w.Close()
	}
}
