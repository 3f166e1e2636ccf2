package testnet

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// linkQueue is how many frames a direction of a Link holds at most.
	linkQueue = 20_000
	// tapQueue is the same of the kernel, before the Link has read them.
	tapQueue = 20_000
)

// Impairment is what a Link does to the frames of each direction. The zero value carries all of them at once.
type Impairment struct {
	// Loss and Duplicate are shares of the frames, 0 to 1.
	Loss, Duplicate float64
	// Delay is how long every frame takes. Jitter is how much longer at most, evenly spread, each frame for itself: with
	// it frames overtake one another; without it they never do.
	Delay, Jitter time.Duration
}

// LinkStats count the frames of one direction.
type LinkStats struct {
	Carried    uint64 // written on the far side, duplicates too
	Lost       uint64 // by Impairment.Loss
	Duplicated uint64
	Overtaken  uint64 // carried after a frame that had come later
	Overflowed uint64 // dropped because too many were under way, or because the far side took none
}

// Link is a cable between two namespaces, in user space: two TAP devices, and two goroutines that carry frames from one
// to the other. The kernel hands TAP devices small frames with full checksums.
type Link struct {
	taps [2]*os.File
	ways [2]*direction // from a to b, from b to a
	wg   sync.WaitGroup
}

// Cable joins two namespaces by a Link whose ends are interfaces of these names, up. The seed makes its losses and
// delays: the same frames at the same times meet the same fate.
func Cable(a *NS, ifaceA string, b *NS, ifaceB string, seed uint64) (*Link, error) {
	l := &Link{}
	var err error
	if l.taps[0], err = newTAP(a, ifaceA); err != nil {
		return nil, err
	}
	if l.taps[1], err = newTAP(b, ifaceB); err != nil {
		return nil, errors.Join(err, l.taps[0].Close())
	}
	for i := range l.ways {
		to := l.taps[1-i]
		d := newDirection(rand.New(rand.NewPCG(seed, uint64(i))), func(frame []byte) error {
			_, err := to.Write(frame)
			return err
		})
		l.ways[i] = d
		l.wg.Go(func() { d.read(l.taps[i]) })
		l.wg.Go(d.send)
	}
	return l, nil
}

// newTAP makes a TAP device, up, in a namespace.
func newTAP(ns *NS, iface string) (tap *os.File, err error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("testnet: TAP device %s in %s: %w", iface, ns.name, err)
	}
	fd := -1
	err = ns.Do(func() (err error) { // the device is of the namespace that /dev/net/tun is opened in
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		ifr, err := unix.NewIfreq(iface)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return fail(err)
	}
	tap = os.NewFile(uintptr(fd), iface)
	err = ns.withHandle(func(h *netlink.Handle) error {
		link, err := h.LinkByName(iface)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetTxQLen(link, tapQueue), h.LinkSetUp(link))
	})
	if err != nil {
		_ = tap.Close()
		return fail(err)
	}
	return tap, nil
}

// Impair sets what happens to frames from now on, in both directions. Those under way keep their times.
func (l *Link) Impair(i Impairment) {
	for _, d := range l.ways {
		d.mu.Lock()
		d.imp = i
		d.mu.Unlock()
	}
}

// Stats returns the counters of the direction from the first namespace of Cable to the second, and back.
func (l *Link) Stats() (forth, back LinkStats) {
	var s [2]LinkStats
	for i, d := range l.ways {
		d.mu.Lock()
		s[i] = d.stats
		d.mu.Unlock()
	}
	return s[0], s[1]
}

// Close removes both devices; frames under way are lost.
func (l *Link) Close() error {
	err := errors.Join(l.taps[0].Close(), l.taps[1].Close())
	for _, d := range l.ways {
		d.stop()
	}
	l.wg.Wait()
	return err
}

// direction carries frames one way.
type direction struct {
	write func([]byte) error
	wake  chan struct{} // the first frame of the queue has changed
	done  chan struct{}

	mu    sync.Mutex
	rng   *rand.Rand
	imp   Impairment
	queue frameHeap
	next  uint64    // number of the next frame
	last  uint64    // highest number carried, plus one
	due   time.Time // of the frame that is carried last
	stats LinkStats
}

func newDirection(rng *rand.Rand, write func([]byte) error) *direction {
	return &direction{rng: rng, write: write, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

func (d *direction) stop() { close(d.done) }

// read takes frames while the device is there.
func (d *direction) read(tap *os.File) {
	buf := make([]byte, maxFrame)
	for {
		n, err := tap.Read(buf)
		if err != nil { // closed, or its namespace is gone
			return
		}
		if d.take(time.Now(), buf[:n]) {
			d.carry(buf[:n])
		}
	}
}

// take decides what becomes of a frame that has come: true when it is to be written at once, or else it is lost or
// kept as a copy.
func (d *direction) take(now time.Time, frame []byte) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.imp == (Impairment{}) && len(d.queue) == 0 {
		d.next++
		d.last = d.next
		return true
	}
	if d.imp.Loss > 0 && d.rng.Float64() < d.imp.Loss {
		d.stats.Lost++
		return false
	}
	copies := 1
	if d.imp.Duplicate > 0 && d.rng.Float64() < d.imp.Duplicate {
		d.stats.Duplicated++
		copies = 2
	}
	for range copies {
		if len(d.queue) >= linkQueue {
			d.stats.Overflowed++
			continue
		}
		due := now.Add(d.imp.Delay)
		if d.imp.Jitter > 0 {
			due = due.Add(time.Duration(d.rng.Int64N(int64(d.imp.Jitter))))
		} else if due.Before(d.due) { // a delay that was shortened reorders nothing
			due = d.due
		}
		if d.due.Before(due) {
			d.due = due
		}
		heap.Push(&d.queue, pendingFrame{due: due, n: d.next, data: append([]byte(nil), frame...)})
		if d.queue[0].n == d.next {
			select {
			case d.wake <- struct{}{}:
			default:
			}
		}
		d.next++
	}
	return false
}

// pop returns a frame that is due, or else when to look again; zero: when one has come.
func (d *direction) pop(now time.Time) (frame []byte, next time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.queue) == 0 {
		return nil, time.Time{}
	}
	if first := d.queue[0].due; first.After(now) {
		return nil, first
	}
	f := heap.Pop(&d.queue).(pendingFrame)
	if f.n < d.last {
		d.stats.Overtaken++
	} else {
		d.last = f.n + 1
	}
	return f.data, time.Time{}
}

// send carries the frames that wait, each at its time.
func (d *direction) send() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		frame, next := d.pop(time.Now())
		if frame != nil {
			d.carry(frame)
			continue
		}
		wait := time.Hour
		if !next.IsZero() {
			wait = time.Until(next)
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-d.wake:
		case <-d.done:
			return
		}
	}
}

func (d *direction) carry(frame []byte) {
	err := d.write(frame)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.stats.Overflowed++
		return
	}
	d.stats.Carried++
}

type pendingFrame struct {
	due  time.Time
	n    uint64
	data []byte
}

// frameHeap has the frame that is due first at its top, of equals the one that came first.
type frameHeap []pendingFrame

func (h frameHeap) Len() int { return len(h) }
func (h frameHeap) Less(i, j int) bool {
	if h[i].due.Equal(h[j].due) {
		return h[i].n < h[j].n
	}
	return h[i].due.Before(h[j].due)
}
func (h frameHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *frameHeap) Push(x any)   { *h = append(*h, x.(pendingFrame)) }
func (h *frameHeap) Pop() any {
	old := *h
	f := old[len(old)-1]
	old[len(old)-1] = pendingFrame{}
	*h = old[:len(old)-1]
	return f
}
