package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nfconnfilter/nfconnfilter/internal/node"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// Anybody who reaches the port of the metrics may ask: he must not use up the
// filter's descriptors, nor its time.
const (
	metricsPatience = 10 * time.Second // for a request, its answer, and between two
	metricsConns    = 64               // at once; further ones are closed
	metricsAtOnce   = 4                // answers; further ones get 503
)

// serveMetrics answers Prometheus where the node's file asks for it.
func serveMetrics(ctx context.Context, cfg *config.Config, n *node.Node, log *slog.Logger) error {
	if cfg.Node.MetricsListen == "" {
		return nil
	}
	l, err := net.Listen("tcp", cfg.Node.MetricsListen)
	if err != nil {
		return fmt.Errorf("metrics_listen: %w", err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(n.Metrics(), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	srv := metricsServer(reg, metricsPatience)
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	go func() {
		if err := srv.Serve(&fewConns{Listener: l}); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics", "error", err)
		}
	}()
	return nil
}

func metricsServer(reg prometheus.Gatherer, patience time.Duration) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: metricsAtOnce}))
	return &http.Server{Handler: mux, ReadTimeout: patience, WriteTimeout: patience, IdleTimeout: patience, MaxHeaderBytes: 16 << 10}
}

// fewConns closes connections beyond metricsConns.
type fewConns struct {
	net.Listener
	open atomic.Int64
}

// Accept returns the next connection that has a place.
func (l *fewConns) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= metricsConns {
			return &placedConn{Conn: c, of: l}, nil
		}
		l.open.Add(-1)
		_ = c.Close()
	}
}

type placedConn struct {
	net.Conn
	of   *fewConns
	gone atomic.Bool
}

// Close frees the connection's place.
func (c *placedConn) Close() error {
	if !c.gone.Swap(true) {
		c.of.open.Add(-1)
	}
	return c.Conn.Close()
}
