// Package sim runs the verdict engine between two real TCP stacks, those of
// gVisor, in simulated time: clients behind a bad network, and a server that is
// taken away and brought back at random moments, with filters that end and
// start anew. Whatever happens, both octet streams of each connection must come
// out whole.
//
// A third of the snapshots spools, a third of the seeds speaks heartbeats, and in a
// third the application opens connections itself; -without shd leaves these out, and
// such a seed is what it was before they came.
//
// # Determinism
//
// Everything derives from one number, the seed: the same seed gives the same
// packets at the same times, on any machine, and TestDeterminism holds it to
// that. Time is the scheduler's; the stacks take theirs and their random
// numbers from the run too. They handle segments in goroutines of their own;
// each call into a stack waits for these to have nothing left to do (Pause and
// Resume of the stack, as saving it would), so that never two work at once.
// Timers of the same moment run in the order in which they were asked for.
// The IPv4 identification, which is drawn elsewhere, is cleared.
//
// # What is not as on Linux
//
// netstack sends no duplicate SACK, which the engine asks sockets for, and
// tells nothing like tcp_info: package-internal shim stands in for both.
package sim

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime/debug"
	"time"

	"gvisor.dev/gvisor/pkg/log"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// Options turn features off, to find out what a failing seed needs.
type Options struct {
	Clients     int // at most [6]
	Episodes    int // snapshots at most [6]
	NoLoss      bool
	NoReorder   bool // neither duplication
	NoCrash     bool
	NoAborts    bool
	NoForce     bool
	NoBulk      bool
	NoOutsiders bool
	NoLate      bool      // no client comes after the first second
	NoPlain     bool      // no client without options
	NoKeep      bool      // no keepalive
	NoSpool     bool      // nothing is spooled
	NoBeats     bool      // no heartbeats
	NoDials     bool      // the application opens no connections
	Lines       int       // of the trace in an error [60]
	Trace       io.Writer // takes the whole trace
	Capture     *Capture  // takes what the remotes send and are sent
}

func (o *Options) traceLines() int {
	if o.Lines == 0 {
		return 60
	}
	return o.Lines
}

func (o *Options) episodes(r *rand.Rand) int {
	most := o.Episodes
	if most == 0 {
		most = 6
	}
	return 1 + r.IntN(most)
}

// Report says what happened in a run.
type Report struct {
	Seed                                    uint64
	Simulated                               time.Duration
	Clients, Packets, Injected, Dropped     int
	Lost, Duplicated, Reordered, Corrupted  int
	Snapshots, SnapshotAborts, Refused      int
	Lines                                   int // connections of those that froze behind one
	AtLines                                 int // snapshots with boundary "line" that were taken
	Restores, RestoreAborts, Crashes, Wakes int
	Reboots                                 int
	Spools                                  int // snapshots that were taken with one
	Dials                                   int // connections that the application opens
	Beats, Sends                            int // heartbeats of clients; those of the filter that they got
	DroppedDown, Outsiders, Again           int // connections from a port that was used before
	Held                                    time.Duration
	Reasons                                 [filter.NumReasons]int
	Hash                                    uint64 // of the trace
}

// Violation is a run that broke an invariant.
type Violation struct {
	Seed  uint64
	What  string
	At    int64
	Trace string
}

func (v *Violation) Error() string {
	return fmt.Sprintf("seed %d at %v: %s\n%s", v.Seed, time.Duration(v.At), v.What, v.Trace)
}

func init() {
	log.SetTarget(&log.GoogleEmitter{Writer: &log.Writer{Next: io.Discard}})
}

// Run plays the run of a seed. The error is a *Violation.
func Run(seed uint64, opt Options) (rep *Report, err error) {
	w := newWorld(seed, opt)
	defer func() {
		if p := recover(); p != nil {
			w.fail("panic: %v\n%s", p, debug.Stack())
		}
		w.rep.Simulated = time.Duration(w.clk.time())
		w.rep.Hash = w.trace.hash
		rep, err = &w.rep, w.err
		w.destroy()
	}()
	w.play()
	return nil, nil
}

// destroy ends everything of a run that would go on by itself or be held by
// something that does: the script and the goroutines of the stacks.
func (w *world) destroy() {
	w.agent.quit()
	w.remote.destroy()
	w.local.destroy()
}

func newWorld(seed uint64, opt Options) *world {
	w := &world{opt: opt, seed: seed, clk: &scheduler{now: 1e9}, byAddr: map[netip.AddrPort]*client{}, emptyLost: map[netip.Addr]bool{}, replies: map[uint64]filter.Reply{}, node: newNode()}
	w.rep.Seed = seed
	w.rand = func(purpose uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, purpose)) }
	w.trace = &trace{clk: w.clk, w: opt.Trace}
	w.check = &checker{w: w, conns: map[netip.AddrPort]*seen{}}
	w.shim = &shim{w: w, socks: map[netip.AddrPort]*track{}, syns: map[netip.AddrPort]packet.Options{}}
	w.vips = []netip.Addr{netip.MustParseAddr("10.0.0.100"), netip.MustParseAddr("fd00::100")}
	r := w.rand(1)
	w.localDelay = 1000 + r.Int64N(50_000)
	w.behind, w.offload = r.IntN(4) == 0, r.IntN(2) == 0
	if w.injects = w.rand(8); !opt.NoLoss && r.IntN(4) == 0 {
		w.localLoss = 0.02 * r.Float64()
	}
	w.up = &link{w: w, r: w.rand(2), q: randomQuality(r, &opt), deliver: func(b []byte) {
		w.check.arrives(b)
		w.fromRemote(b)
	}}
	w.down = &link{w: w, r: w.rand(3), q: randomQuality(r, &opt), deliver: func(b []byte) { w.remote.inject(b) }}
	w.down.q.delay = w.up.q.delay
	w.beats = drawBeats(w.rand(10), &opt)
	w.makeClients(w.rand(4))
	w.localConf = hostConfig{addrs: w.vips, mtu: localMTU, sack: r.IntN(4) != 0, rcvBuf: 16<<10 + r.IntN(1<<20),
		sndBuf: 16<<10 + r.IntN(1<<19), maxRetries: 15, outOfWin: 500 * time.Millisecond, cubic: r.IntN(2) == 0}
	w.server = &server{w: w, sessions: map[netip.AddrPort]*session{}, backlog: 4 + r.IntN(60)}
	w.newLocal(r.Uint64())
	w.agent = &agent{w: w, r: w.rand(5), more: w.rand(9)}
	return w
}
