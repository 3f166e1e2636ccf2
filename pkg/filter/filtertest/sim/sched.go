package sim

import (
	"container/heap"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// scheduler is the only clock of a run. It holds what is to happen in the order
// of time, and of two things at the same moment the one that was asked for
// first comes first. It serves the TCP stacks as tcpip.Clock: the manual clock
// of gVisor's own tests runs the timers of one moment in the order of a map,
// which is another one in each run.
type scheduler struct {
	mu   sync.Mutex // stacks ask for timers in goroutines of their own
	now  int64
	seq  uint64
	heap events
}

// event is one thing to be done.
type event struct {
	at    int64
	seq   uint64
	fn    func()
	index int // in the heap, -1: not there
}

type events []*event

func (h events) Len() int { return len(h) }
func (h events) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h events) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *events) Push(x any) {
	e := x.(*event)
	e.index = len(*h)
	*h = append(*h, e)
}
func (h *events) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	e.index = -1
	return e
}

// at has fn called at time t, or now if that is past.
func (s *scheduler) at(t int64, fn func()) *event {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &event{fn: fn, index: -1}
	s.enter(e, t)
	return e
}

func (s *scheduler) after(d time.Duration, fn func()) *event { return s.at(s.time()+int64(d), fn) }

func (s *scheduler) enter(e *event, t int64) {
	s.seq++
	e.at, e.seq = max(t, s.now), s.seq
	heap.Push(&s.heap, e)
}

// cancel takes e back; it reports whether it had not happened yet.
func (s *scheduler) cancel(e *event) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e == nil || e.index < 0 {
		return false
	}
	heap.Remove(&s.heap, e.index)
	return true
}

// step lets the next thing happen; false when there is none before limit.
func (s *scheduler) step(limit int64) bool {
	s.mu.Lock()
	if len(s.heap) == 0 || s.heap[0].at > limit {
		s.mu.Unlock()
		return false
	}
	e := heap.Pop(&s.heap).(*event)
	s.now = e.at
	s.mu.Unlock()
	e.fn()
	return true
}

func (s *scheduler) time() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// Now implements tcpip.Clock.
func (s *scheduler) Now() time.Time { return time.Unix(0, s.time()) }

// NowMonotonic implements tcpip.Clock.
func (s *scheduler) NowMonotonic() tcpip.MonotonicTime {
	var t tcpip.MonotonicTime
	return t.Add(time.Duration(s.time()))
}

// AfterFunc implements tcpip.Clock.
func (s *scheduler) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	t := &timer{s: s, e: &event{fn: f, index: -1}}
	t.Reset(d)
	return t
}

// timer implements tcpip.Timer.
type timer struct {
	s *scheduler
	e *event
}

// Stop implements tcpip.Timer.
func (t *timer) Stop() bool { return t.s.cancel(t.e) }

// Reset implements tcpip.Timer.
func (t *timer) Reset(d time.Duration) {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.e.index >= 0 {
		heap.Remove(&t.s.heap, t.e.index)
	}
	t.s.enter(t.e, t.s.now+int64(d))
}
