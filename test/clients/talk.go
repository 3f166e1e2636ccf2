package clients

import (
	"slices"
	"sync"
	"time"
)

// Talk is a Load whose clients all send commands, each one at a time, without
// an end.
type Talk struct {
	stop chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex
	errs    []error
	failed  chan struct{} // closed with the first error
	replies []int         // of each client
	sent    int           // since Commands was called
	slowest time.Duration // since then
}

// Talk has every client send a command, check its reply, wait for pause and go
// on, until Stop. The clients begin spread over one pause. Each reply may take
// as long as timeout. A client that fails is silent from then on.
func (l *Load) Talk(pause, timeout time.Duration) *Talk {
	t := &Talk{stop: make(chan struct{}), failed: make(chan struct{}), replies: make([]int, len(l.Clients))}
	for i, c := range l.Clients {
		t.wg.Go(func() { t.run(i, c, pause*time.Duration(i)/time.Duration(len(l.Clients)), pause, timeout) })
	}
	return t
}

func (t *Talk) run(i int, c *Redis, first, pause, timeout time.Duration) {
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-t.stop:
			return
		case <-timer.C:
		}
		begin := time.Now()
		err := c.Command(timeout)
		t.note(i, time.Since(begin), err)
		if err != nil {
			return
		}
		timer.Reset(pause)
	}
}

func (t *Talk) note(i int, took time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slowest = max(t.slowest, took)
	if err == nil {
		t.sent++
		t.replies[i]++
		return
	}
	if len(t.errs) == 0 {
		close(t.failed)
	}
	t.errs = append(t.errs, err)
}

// Failed is closed when the first client has failed.
func (t *Talk) Failed() <-chan struct{} { return t.failed }

// Replies returns how many right replies each client has had.
func (t *Talk) Replies() []int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.replies)
}

// Commands returns how many replies have come since the last call, and how long
// the slowest took.
func (t *Talk) Commands() (n int, slowest time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, slowest = t.sent, t.slowest
	t.sent, t.slowest = 0, 0
	return n, slowest
}

// Stop lets every client finish the command that it is about and returns the
// errors, one a client.
func (t *Talk) Stop() []error {
	close(t.stop)
	t.wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.errs
}
