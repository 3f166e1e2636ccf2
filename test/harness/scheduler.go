package harness

import (
	"bufio"
	"net"
	"sync"
	"time"
)

// Scheduler stands in for the application scheduler: it takes restore
// requests, answers OK, and restores nothing, so that a test decides when.
type Scheduler struct {
	l  net.Listener
	wg sync.WaitGroup
	mu sync.Mutex

	lines []string
}

// StartScheduler listens inside the node namespace at addr.
func (n *Node) StartScheduler(addr string) (*Scheduler, error) {
	l, err := n.Net.Node().Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &Scheduler{l: l}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() { s.serve(c) })
		}
	})
	return s, nil
}

func (s *Scheduler) serve(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	s.mu.Lock()
	s.lines = append(s.lines, line)
	s.mu.Unlock()
	_, _ = c.Write([]byte("OK\r\n"))
}

// Requests are the lines received so far, with their ends.
func (s *Scheduler) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lines...)
}

// Close stops listening.
func (s *Scheduler) Close() {
	s.l.Close()
	s.wg.Wait()
}
