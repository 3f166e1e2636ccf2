package restorereq

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

const (
	// requestTimeout is how long one may take to say its line, and to take
	// the answer.
	requestTimeout = 2 * time.Second
	// strangerTimeout bounds the answer to one that may not ask. It is the
	// first that is written to its connection, so that there is room for it.
	strangerTimeout = 10 * time.Millisecond
	// maxPerSource is how many connections one source may have open. All
	// loopback addresses are one source.
	maxPerSource = 64
	// acceptPause is waited when there are no descriptors left.
	acceptPause = 20 * time.Millisecond
)

// Server answers restore requests. The zero timeouts and bounds are the
// package's.
type Server struct {
	// Allowed tells whether a peer may ask.
	Allowed func(netip.Addr) bool
	// Accept takes the request for a VIP. It must not block: OK means
	// accepted, not done.
	Accept func(netip.Addr) error

	mu     sync.Mutex
	asking map[netip.Addr][]*asker // by source, the oldest first
}

// asker is a connection that has not said its line yet.
type asker struct {
	net.Conn
	source netip.Addr
}

// FromNodes tells whether a peer may ask for restores: this machine and the
// [[node]] addresses may.
func FromNodes(c *config.Config, peer netip.Addr) bool {
	return peer.IsLoopback() || slices.ContainsFunc(c.Cluster.Nodes, func(n config.ClusterNode) bool { return n.Address.Unmap() == peer })
}

var (
	errStranger = errors.New("only this node and the [[node]] addresses of cluster.toml may ask")
	errCrowded  = fmt.Errorf("more than %d connections of this address are open, this one was the oldest; ask again", maxPerSource)
)

// Serve runs until ctx ends or the listener fails, and returns when every
// connection is closed. Strangers are sent away as they are accepted. A source
// that opens more connections than it may loses its oldest: one that says its
// line is answered whatever else the same source, or another, does.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var te interface{ Temporary() bool }
			if errors.As(err, &te) && te.Temporary() { // out of descriptors
				select {
				case <-ctx.Done():
				case <-time.After(acceptPause):
				}
				continue
			}
			return fmt.Errorf("restore requests: %w", err)
		}
		peer, err := netip.ParseAddrPort(c.RemoteAddr().String())
		if source := peer.Addr().Unmap().WithZone(""); err == nil && s.Allowed(source) {
			a := s.admit(c, source)
			wg.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = c.Close() })()
				s.answer(a)
			})
			continue
		}
		reply(c, strangerTimeout, errStranger)
		_ = c.Close()
	}
}

// admit counts a connection to its source, which loses its oldest when it has
// too many.
func (s *Server) admit(c net.Conn, source netip.Addr) *asker {
	if source.IsLoopback() {
		source = netip.IPv6Loopback()
	}
	a := &asker{c, source}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asking == nil {
		s.asking = map[netip.Addr][]*asker{}
	}
	all := s.asking[source]
	if len(all) >= maxPerSource {
		// Its reader is woken, and says why.
		_ = all[0].SetReadDeadline(time.Unix(1, 0))
		all = all[1:]
	}
	s.asking[source] = append(slices.Clip(all), a)
	return a
}

// leave forgets a connection; false when it was the oldest of too many.
func (s *Server) leave(a *asker) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.asking[a.source], a)
	if i < 0 {
		return false
	}
	s.asking[a.source] = slices.Delete(s.asking[a.source], i, i+1)
	if len(s.asking[a.source]) == 0 {
		delete(s.asking, a.source)
	}
	return true
}

func (s *Server) answer(a *asker) {
	defer a.Close()
	s.mu.Lock()
	if slices.Contains(s.asking[a.source], a) {
		_ = a.SetReadDeadline(time.Now().Add(requestTimeout))
	}
	s.mu.Unlock()
	vip, err := read(a)
	if there := s.leave(a); err != nil && !there {
		err = errCrowded
	}
	if err == nil {
		err = s.Accept(vip)
	}
	// One that was too slow is still told so.
	reply(a, requestTimeout, err)
}

// read gives the VIP of the one request of a connection.
func read(r io.Reader) (netip.Addr, error) {
	line, err := readRequest(r)
	if err != nil {
		return netip.Addr{}, errRequest
	}
	return parseRequest(line)
}

func reply(c net.Conn, patience time.Duration, err error) {
	text := "OK\r\n"
	if err != nil {
		// One line whatever the error holds.
		text = "ERR " + strings.Join(strings.Fields(err.Error()), " ") + "\r\n"
	}
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(c, text)
}
