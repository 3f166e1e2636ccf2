package checkpoint

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	// The wait between two glances: a part of what the handshakes under way take.
	paceEach  = 20 * time.Microsecond
	paceLeast = 500 * time.Microsecond
	paceMost  = 3 * time.Millisecond
	// handshakeRetry is after how long a handshake counts as lost: the queue
	// of the listener was full after all.
	handshakeRetry = 200 * time.Millisecond
	// lookEvery is how long every connection is not looked at while handshakes
	// go on: for the retry of a lost one, and the count that operators see.
	lookEvery = time.Second
)

// pacer decides which connections are re-established next. A listener whose
// accept queue is full drops handshakes or answers with cookies, so at most
// half of its backlog is under way or waits to be accepted.
type pacer struct {
	now     func() time.Time
	left    map[string]*comeback
	order   []string // of left, as first seen
	done    int
	counted map[string]bool
	looked  time.Time // when every connection was looked at
	moved   time.Time // when the handshakes were last seen to go on
	untried int       // of left, at the last pick
	pending int       // handshakes that were not done at the last glance
}

// comeback is one connection that has to be re-established.
type comeback struct {
	id            *pb.ConnID
	local         netip.AddrPort
	active        bool
	tried         int
	started       time.Time
	socket, state string // what was seen last, for messages
}

func newPacer(now func() time.Time) *pacer {
	return &pacer{now: now, left: map[string]*comeback{}, counted: map[string]bool{}}
}

// observe takes the filter's and the kernel's view. A connection is back when
// the filter is done with its handshake and its socket is there.
func (p *pacer) observe(conns []*pb.ConnInfo, socks []sockdiag.Socket) {
	states := make(map[string]sockdiag.State, len(socks))
	for _, k := range socks {
		states[pairName(k.Local.String(), k.Remote.String())] = k.State
	}
	present := make(map[string]bool, len(conns))
	for _, c := range conns {
		name := pairName(c.Local, c.Remote)
		present[name] = true
		pending := c.Restorable || c.State == control.ConnRestoring
		e := p.left[name]
		if e == nil && pending && !p.counted[name] {
			e = p.add(name, c)
		}
		if e == nil {
			continue
		}
		socket, ok := states[socketName(c)]
		e.state, e.socket = c.State, "no socket"
		if ok {
			e.socket = socket.String()
		}
		// Without a socket it is over only when the filter says so: the
		// application refused it or the remote reset it.
		over := c.State == control.ConnRst || c.State == control.ConnClosing
		if !pending && (over || ok && handshaken(socket)) {
			p.finish(name)
		}
	}
	for _, name := range p.order {
		if p.left[name] != nil && !present[name] {
			p.finish(name) // ended meanwhile
		}
	}
	p.order = slices.DeleteFunc(p.order, func(name string) bool { return p.left[name] == nil })
}

func (p *pacer) add(name string, c *pb.ConnInfo) *comeback {
	e := &comeback{id: &pb.ConnID{Local: c.Local, Remote: c.Remote}, active: c.Role == control.RoleActive}
	e.local, _ = netip.ParseAddrPort(c.Local) // an address that is none has no listener and times out by name
	p.left[name] = e
	p.order = append(p.order, name)
	return e
}

func (p *pacer) finish(name string) {
	delete(p.left, name)
	p.counted[name] = true
	p.done++
}

// stale gives old sockets of connections that are not back: one that was in
// FIN_WAIT1 can have come to TIME_WAIT between the look at the old sockets and
// their end, and would swallow every handshake.
func (p *pacer) stale(socks []sockdiag.Socket) []sockdiag.Socket {
	var out []sockdiag.Socket
	for _, k := range socks {
		switch k.State {
		case sockdiag.FinWait1, sockdiag.FinWait2, sockdiag.Closing, sockdiag.LastAck, sockdiag.TimeWait:
			if e := p.left[pairName(k.Local.String(), k.Remote.String())]; e != nil && !e.active {
				e.started = time.Time{} // tried again at once
				out = append(out, k)
			}
		}
	}
	return out
}

// handshaken tells that the application's side finished the handshake,
// whatever it did since.
func handshaken(s sockdiag.State) bool {
	switch s {
	case sockdiag.SynSent, sockdiag.SynReceived, sockdiag.NewSynReceived, sockdiag.Listen, sockdiag.Closed, sockdiag.TimeWait:
		return false
	}
	return true
}

// ports lists the local ports that are still waited for.
func (p *pacer) ports() []uint16 {
	set := map[uint16]bool{}
	for _, e := range p.left {
		if !e.active {
			set[e.local.Port()] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// everyOne stands for the number of handshakes under way where every
// connection was just looked at.
const everyOne = -1

// glanceWillDo tells whether a look at every connection can wait: there are
// some that were never tried or whose handshake is under way, they go on, and
// the last such look is not old.
func (p *pacer) glanceWillDo() bool {
	now := p.now()
	return (p.untried > 0 || p.pending > 0) && now.Sub(p.moved) < handshakeRetry && now.Sub(p.looked) < lookEvery
}

// glanced takes the number of handshakes that are not done.
func (p *pacer) glanced(underWay int) {
	if underWay < p.pending {
		p.moved = p.now()
	}
	p.pending = underWay
}

// idle tells that no handshake is under way or waits for room.
func (p *pacer) idle() bool { return p.pending == 0 && p.untried == 0 }

// wait is how long not to look: asking all the time would take the processor
// from what is waited for.
func (p *pacer) wait() time.Duration {
	return min(max(time.Duration(p.pending)*paceEach, paceLeast), paceMost)
}

// next picks what has room in the listeners' queues and counts it as started.
// underWay is the number of handshakes that are not done, wherever; after a
// glance nothing is tried again.
func (p *pacer) next(ls []sockdiag.Socket, underWay int) []*pb.ConnID {
	now := p.now()
	room := map[netip.AddrPort]int{}
	inFlight := map[netip.AddrPort]int{}
	if underWay == everyOne {
		p.looked, p.moved = now, now
		for _, e := range p.left {
			if !e.active && e.tried > 0 && now.Sub(e.started) < handshakeRetry {
				inFlight[e.local]++
			}
		}
		p.pending = 0
		for _, n := range inFlight {
			p.pending += n
		}
	}
	var batch []*pb.ConnID
	p.untried = 0
	defer func() { p.pending += len(batch) }()
	for _, name := range p.order {
		e := p.left[name]
		if e.active || e.tried > 0 && (underWay != everyOne || now.Sub(e.started) < handshakeRetry) {
			continue
		}
		if _, ok := room[e.local]; !ok {
			busy := inFlight[e.local]
			if underWay != everyOne {
				busy = underWay
			}
			room[e.local] = capacity(listenersFor(ls, e.local.Addr(), e.local.Port())) - busy
		}
		if room[e.local] <= 0 {
			if e.tried == 0 {
				p.untried++
			}
			continue
		}
		room[e.local]--
		e.tried++
		e.started = now
		batch = append(batch, e.id)
	}
	return batch
}

// capacity is how many connections may be under way towards listeners. With
// several on one port the kernel picks one by hash: the fullest counts.
func capacity(ls []sockdiag.Socket) int {
	least := -1
	for _, l := range ls {
		n := max(int(l.SendQ/2), 1) - int(l.RecvQ)
		if least < 0 || n < least {
			least = max(n, 0)
		}
	}
	return least
}

// unfinished names the connections that are not back.
func (p *pacer) unfinished() []string {
	var out []string
	for _, name := range p.order {
		e := p.left[name]
		reason := "no room in the accept queue of its listener"
		switch {
		case e.active:
			reason = "the application did not open it again"
		case e.tried > 0:
			reason = "handshake not finished (filter: " + e.state + ", socket: " + e.socket + ")"
		}
		out = append(out, name+": "+reason)
	}
	return out
}
