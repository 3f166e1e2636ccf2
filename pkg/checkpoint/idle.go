package checkpoint

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// How long an application has been idle.
//
// The sockets' own counters are sampled: bytes received and bytes acknowledged.
// What a heartbeat adds to them cannot be told from other payload of the same
// length, so lengths decide: between two samples a connection may have moved
// as many octets, each way, as a few of its configured heartbeats have; anything
// else is activity. A new connection is activity, and so is one that came and
// went between two samples: the filter counts handshakes.
//
// It errs in one direction only where somebody speaks in messages of just these
// lengths, two or three a second at most: such an application is put to sleep,
// and woken by its next message. Nothing is lost by that. In the other
// direction heartbeats that come faster, or that the
// application answers otherwise than configured, keep it awake.

const (
	idleEvery = time.Second
	// idleStale is the age from which a sample says nothing any more.
	idleStale = 5 * time.Second
	// Between two samples there may be one heartbeat a second, and a few more: a
	// remote's seconds are not ours.
	spareBeats = 2
	maxBeats   = 16
)

// idleMeters holds a meter for each application that may hibernate.
type idleMeters struct {
	mu  sync.Mutex
	all map[string]*idleMeter
	now func() time.Time
}

// idleMs gives the idle time as NodeStatus tells it; -1: not known, also where
// the last sample is of the time before the application was away.
func (m *idleMeters) idleMs(st *pb.AppStatus) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.all[st.Name]
	if i == nil || i.era != eraOf(st) || m.now().Sub(i.at) > idleStale {
		return -1
	}
	return i.at.Sub(i.last).Milliseconds()
}

// sample hands the meter of an application what there is now. An application
// that was away since, as its state and its snapshot show, begins anew.
func (m *idleMeters) sample(app *config.App, st *pb.AppStatus, socks []sockdiag.Socket) {
	m.mu.Lock()
	defer m.mu.Unlock()
	opened := st.Reasons["handshake"] + st.Reasons["table-full"] + st.Reasons["app-table-full"]
	i := m.all[app.Name]
	if i == nil || i.era != eraOf(st) {
		i = &idleMeter{era: eraOf(st)}
		m.all[app.Name] = i
	}
	i.sample(m.now(), app.Heartbeats, socks, opened)
}

// eraOf names the time since an application was away last.
func eraOf(st *pb.AppStatus) string { return st.State + " " + st.SnapshotId }

// forget drops the meters of applications that are not among names: what is
// away, and comes back, begins anew.
func (m *idleMeters) forget(names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.all {
		if !slices.Contains(names, name) {
			delete(m.all, name)
		}
	}
}

// idleMeter follows the connections of one application.
type idleMeter struct {
	era    string // another one after it was away
	known  map[connKey]counters
	opened uint64    // handshakes that the filter has counted
	at     time.Time // of the last sample
	last   time.Time // when payload was moved last
}

type connKey struct {
	local, remote netip.AddrPort
	cookie        [2]uint32
}

type counters struct{ received, acked uint64 }

// sample compares the connections with those of the last sample. The first one
// believes the times that the kernel keeps, which count heartbeats as well.
func (i *idleMeter) sample(now time.Time, beats []config.Heartbeat, socks []sockdiag.Socket, opened uint64) {
	first := i.known == nil
	active := first || opened != i.opened
	known := make(map[connKey]counters, len(socks))
	quiet := time.Duration(-1)
	n := spareBeats + int(min(now.Sub(i.at).Round(time.Second)/time.Second, maxBeats))
	for _, k := range socks {
		if k.State == sockdiag.TimeWait {
			continue
		}
		key := connKey{k.Local, k.Remote, k.Cookie}
		var c counters
		if k.Info != nil {
			c = counters{k.Info.BytesReceived, k.Info.BytesAcked}
			if d := min(k.Info.LastDataRecv, k.Info.LastDataSent); quiet < 0 || d < quiet {
				quiet = max(d, 0)
			}
		}
		known[key] = c
		if active {
			continue
		}
		was, there := i.known[key]
		in, out := beatLengths(beats, k.Remote.Addr())
		active = !there ||
			!madeOf(c.received-was.received, in, n) || !madeOf(uint64(k.RecvQ), in, n) ||
			!madeOf(c.acked-was.acked, out, n) || !madeOf(uint64(k.SendQ), out, n)
	}
	switch {
	case first && quiet >= 0:
		i.last = now.Add(-quiet)
	case active:
		i.last = now
	}
	i.known, i.opened, i.at = known, opened, now
}

// beatLengths gives the lengths of a remote's heartbeats, and of what the
// application says to them or by itself.
func beatLengths(beats []config.Heartbeat, remote netip.Addr) (in, out []int) {
	for _, b := range beats {
		if !b.Remote.Contains(remote.Unmap()) {
			continue
		}
		if len(b.Match) > 0 {
			in = append(in, len(b.Match))
		}
		if len(b.Reply) > 0 {
			out = append(out, len(b.Reply))
		}
		if len(b.Send) > 0 && !b.OnlyClosed { // those only the filter sends
			out = append(out, len(b.Send))
		}
	}
	return in, out
}

// madeOf tells whether a number of octets is the sum of at most n of the
// lengths.
func madeOf(octets uint64, lengths []int, n int) bool {
	if octets == 0 {
		return true
	}
	if len(lengths) == 0 || octets > uint64(n)*uint64(slices.Max(lengths)) {
		return false
	}
	// fewest[v] is the least number of messages that have v octets together.
	fewest := make([]int, octets+1)
	for v := 1; v < len(fewest); v++ {
		fewest[v] = n + 1
		for _, l := range lengths {
			if l <= v {
				fewest[v] = min(fewest[v], fewest[v-l]+1)
			}
		}
	}
	return fewest[octets] <= n
}

// keepIdle samples the applications that may hibernate, until ctx ends. On a
// node without a scheduler it puts them to sleep as well.
func (a *agent) keepIdle(ctx context.Context) {
	tick := time.NewTicker(idleEvery)
	defer tick.Stop()
	for s := (sleeps{}); ; {
		a.lookIdle(ctx, s)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// lookIdle takes one sample of every application that may hibernate and runs.
func (a *agent) lookIdle(ctx context.Context, s sleeps) {
	cfg := a.config()
	var running []string
	defer func() { a.idle.forget(running) }()
	if !anySleeper(cfg) {
		return
	}
	st, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{}))
	if err != nil {
		running = a.idle.names() // nothing is known of them meanwhile
		return
	}
	for _, p := range st.Msg.Apps {
		app := cfg.Apps[p.Name]
		if app == nil || app.Hibernate.After <= 0 || p.State != control.StateConnected && p.State != control.StateRestored {
			continue
		}
		running = append(running, p.Name)
		if a.busy(p.Name) {
			continue
		}
		socks, err := a.idleSockets(app)
		if err != nil {
			a.log.Debug("idle time is not known", "app", p.Name, "err", err)
			continue
		}
		a.idle.sample(app, p, socks)
		if cfg.Cluster.Scheduler == nil {
			a.sleepIfDue(s, app, p)
		}
	}
}

func anySleeper(cfg *config.Config) bool {
	for _, app := range cfg.Apps {
		if app.Hibernate.After > 0 {
			return true
		}
	}
	return false
}

func (m *idleMeters) names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for name := range m.all {
		out = append(out, name)
	}
	return out
}

// idleSockets lists the sockets on an application's addresses, those on ports
// that are never filtered aside.
func (a *agent) idleSockets(app *config.App) ([]sockdiag.Socket, error) {
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	all, err := s.List(sockdiag.Query{Local: app.VIPs, Info: true})
	if err != nil {
		return nil, err
	}
	exclude := ports(app.ExcludePorts, a.config().Cluster.Filter.ExcludePorts)
	return slices.DeleteFunc(all, func(k sockdiag.Socket) bool { return slices.Contains(exclude, uint32(k.Local.Port())) }), nil
}
