package sim

import (
	"errors"
	"iter"
	"math/rand/v2"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

const app = "app"

// agent plays ckptctl agent, the operator and the application scheduler. Its
// script runs as a coroutine that is resumed from the scheduler, so that it can
// be read from top to bottom.
type agent struct {
	w    *world
	r    *rand.Rand
	more *rand.Rand // what came later draws from it, so that a seed without that stays what it was
	next func() (struct{}, bool)
	stop func()
	y    func(struct{}) bool

	wake     bool // a restore was requested
	finished bool
	adopted  uint64 // engine that was told of the sockets
	adoptAt  int64
	every    time.Duration // between two looks at the sockets
	snap     int
	missing  bool  // connections that the application has closed wait for it
	late     int   // attempts in which connections did not come back in time
	cut      bool  // the snapshot under way was forced
	beatsFor int64 // how long heartbeats of the filter go on, 0: there are none
}

func (a *agent) run(script func()) {
	a.next, a.stop = iter.Pull(func(y func(struct{}) bool) {
		defer func() {
			a.finished = true
			if p := recover(); p != nil && p != errQuit {
				panic(p)
			}
		}()
		a.y = y
		script()
	})
	a.w.clk.at(a.w.clk.time(), a.resume)
}

// quit ends the script where it waits: its coroutine holds the whole world.
func (a *agent) quit() {
	if a.stop != nil {
		a.stop()
	}
}

// resume lets the script look whether what it waits for has come.
func (a *agent) resume() {
	if !a.finished {
		a.next()
	}
}

// errQuit ends the script of a run that has failed.
var errQuit = errors.New("the run is over")

// wait yields until cond holds; it is looked at whenever something happens
// that the agent could know of, and at time till.
func (a *agent) wait(till int64, cond func() bool) {
	e := a.w.clk.at(till, a.resume)
	for a.w.clk.time() < till && !cond() {
		if !a.y(struct{}{}) {
			panic(errQuit)
		}
	}
	a.w.clk.cancel(e)
}

func never() bool { return false }

func (a *agent) sleep(d time.Duration) { a.wait(a.w.clk.time()+int64(d), never) }

// soon sleeps for a moment of an operation.
func (a *agent) soon() { a.sleep(logDuration(a.r, 10*time.Microsecond, 30*time.Millisecond)) }

func (a *agent) chance(n int) bool { return a.r.IntN(n) == 0 }

// wanted takes a restore request of the engine.
func (a *agent) wanted() {
	w := a.w
	w.rep.Wakes++
	w.trace.note("a restore is requested")
	if !a.wake && w.hush && !w.outsiderSyn {
		speaks := false
		for _, c := range w.clients {
			speaks = speaks || c.speaks()
		}
		for _, d := range w.dials {
			speaks = speaks || d.speaks()
		}
		if !speaks {
			w.fail("the application is woken up although no remote has said anything")
		}
	}
	a.wake = true
	w.clk.at(w.clk.time(), a.resume)
}

var errLost = errors.New("the filter ended before it answered")

// request hands a request to the filter and waits for its answer. While no
// filter runs it waits for one.
func (a *agent) request(body any) (any, error) {
	w := a.w
	for w.engine == nil {
		a.sleep(5 * time.Millisecond)
	}
	a.sleep(time.Duration(a.r.Int64N(200_000)))
	for w.engine == nil {
		a.sleep(5 * time.Millisecond)
	}
	w.reqs++
	id, eng := w.reqs, w.engines
	w.step(filter.Event{Request: &filter.Request{ID: id, Body: body}}, nil)
	answered := func() bool {
		_, ok := w.replies[id]
		return ok || w.engine == nil || w.engines != eng
	}
	if !answered() {
		a.wait(w.clk.time()+int64(10*time.Minute), answered)
	}
	r, ok := w.replies[id]
	delete(w.replies, id)
	switch {
	case !ok && w.engine != nil && w.engines == eng:
		w.fail("request %T is not answered", body)
		return nil, errLost
	case !ok:
		w.trace.note("request %T: %v", body, errLost)
		return nil, errLost
	case r.Err != nil:
		w.trace.note("request %T refused: %v", body, r.Err)
	default:
		w.trace.note("request %T done", body)
	}
	return r.Body, r.Err
}

// insist repeats a request until a filter has answered it.
func (a *agent) insist(body any) (any, error) {
	for {
		b, err := a.request(body)
		if err != errLost || a.w.err != nil {
			return b, err
		}
	}
}

func (a *agent) conns() *filter.ConnList {
	b, err := a.insist(&filter.GetConnInfo{App: app})
	if err != nil {
		a.w.fail("GETCONNINFO: %v", err)
		return &filter.ConnList{}
	}
	return b.(*filter.ConnList)
}

// script is the life of the application.
func (a *agent) script() {
	w := a.w
	if _, err := a.insist(&filter.Register{App: app, VIPs: w.vips, Include: []uint16{port}}); err != nil {
		w.fail("REGISTER: %v", err)
	}
	if a.every = time.Minute; a.chance(4) {
		a.every = logDuration(a.r, 20*time.Millisecond, time.Minute)
	}
	for range w.opt.episodes(a.r) {
		a.idle(logDuration(a.r, 10*time.Millisecond, 8*time.Second))
		if a.snapshot() {
			a.hold()
			for !a.restore() {
				if w.err != nil {
					return
				}
				a.sleep(logDuration(a.r, time.Millisecond, time.Minute))
			}
		}
	}
	w.healthy()
	a.idle(time.Hour)
}

// idle lets the application run for d; the filter is told of the sockets now
// and then.
func (a *agent) idle(d time.Duration) {
	till := a.w.clk.time() + int64(d)
	for a.w.clk.time() < till && a.w.err == nil {
		a.adopt()
		next := max(a.adoptAt, a.w.clk.time()+int64(5*time.Millisecond)) // while no filter runs nobody is told
		a.wait(min(till, next), func() bool { return a.w.engine != nil && a.adopted != a.w.engines })
	}
}

// adopt tells a filter of the sockets when it is new, and every minute or more
// often.
func (a *agent) adopt() {
	w := a.w
	if w.engine == nil || a.adopted == w.engines && w.clk.time() < a.adoptAt {
		return
	}
	a.adoptAt = w.clk.time() + int64(max(a.every, w.calmFor()))
	if w.state != appstate.Connected && w.state != appstate.Restored {
		return
	}
	eng := w.engines
	if a.tellSockets(true) == nil {
		a.adopted = eng
	}
}

// tellSockets hands the list of sockets to the filter; it takes a moment until
// that has it.
func (a *agent) tellSockets(timeWait bool) error {
	r := &filter.Adopt{App: app, Listen: []uint16{port}, At: a.w.nodeTime()}
	for _, i := range a.w.server.sockets() {
		if i.state != tcp.StateTimeWait || timeWait {
			r.Sockets = append(r.Sockets, i.Socket)
		}
	}
	if a.chance(4) {
		a.soon()
	}
	_, err := a.request(r)
	return err
}
