package sim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

var hoursFlag = flag.Float64("hours", 0.5, "how many hours 10,000 connections are held")

// profiles are the peers of TestHours; their shares add up to 10,000.
var profiles = []profile{
	{name: "1 s", share: 150, keep: keepalive{idle: time.Second, every: time.Second, probes: 3}},
	{name: "1 s, user timeout 5 s", share: 50, keep: keepalive{idle: time.Second, every: time.Second, user: 5 * time.Second}},
	{name: "10 s", share: 600, keep: keepalive{idle: 10 * time.Second, every: 5 * time.Second, probes: 3}},
	{name: "10 s, user timeout 30 s", share: 200, keep: keepalive{idle: 10 * time.Second, every: 10 * time.Second, user: 30 * time.Second}},
	{name: "75 s", share: 3500, keep: keepalive{idle: 75 * time.Second, every: 75 * time.Second, probes: 9}},
	{name: "2 h", share: 2500, keep: keepalive{idle: 2 * time.Hour, every: 75 * time.Second, probes: 9}},
	{name: "idle", share: 1200},
	{name: "window shut, sends all", share: 300, say: 1000, persist: resends, keep: keepalive{idle: 75 * time.Second, every: 75 * time.Second, probes: 9}},
	{name: "window shut, sends an octet", share: 300, say: 100, persist: oneOctet},
	{name: "window shut, sends nothing", share: 200, say: 1400, persist: emptyProbe},
	{name: "half-closed", share: 200, halfClosed: true, keep: keepalive{idle: 10 * time.Second, every: 5 * time.Second, probes: 3}},
	{name: "closed by local", share: 100, localClosed: true, keep: keepalive{idle: 75 * time.Second, every: 75 * time.Second, probes: 9}},
	{name: "heartbeats answered", share: 300, ping: true, reply: true},
	{name: "heartbeats acknowledged", share: 100, ping: true},
	{name: "heartbeats sent", share: 200, noop: true, keep: keepalive{idle: 75 * time.Second, every: 75 * time.Second, probes: 9}},
	{name: "heartbeats both ways", share: 100, ping: true, reply: true, noop: true},
}

// spoolProfiles are those of TestHoursSpooled: what they send is acknowledged, up to
// what the spool takes.
var spoolProfiles = []profile{
	{name: "10 s", share: 2000, keep: keepalive{idle: 10 * time.Second, every: 5 * time.Second, probes: 3}},
	{name: "spooled, user timeout 30 s", share: 4000, say: 100, keep: keepalive{idle: 10 * time.Second, every: 10 * time.Second, user: 30 * time.Second}},
	{name: "spool full, sends all", share: 1500, say: 4000, persist: resends},
	{name: "spool full, sends an octet", share: 1500, say: 4000, persist: oneOctet},
	{name: "heartbeats answered", share: 1000, ping: true, reply: true},
}

// hours is a hold in simulated time.
type hours struct {
	t        *testing.T
	w        *filtertest.World
	e        *filter.Engine
	profiles []profile
	fx       filter.Effects
	r        *rand.Rand
	began    int64
	now      int64
	until    int64
	spool    int

	peers  []*peer
	byAddr map[netip.AddrPort]*peer
	queue  timetable
	buf    [4096 + packet.MaxHeader]byte
	p      filter.Packet
	reason filter.Reason

	segments, answers, spoken, lost, missed int
	deadlines, restores                     int
	records                                 []int // in each eighth of the hold
	appRecords                              int
}

// TestHours holds 10,000 connections for -hours: clients whose kernels and programs
// notice what goes wrong.
func TestHours(t *testing.T) { holdFor(t, profiles, 10000, 0, *hoursFlag) }

// TestHoursSpooled is the same with a spool.
func TestHoursSpooled(t *testing.T) { holdFor(t, spoolProfiles, 1000, 3000, *hoursFlag) }

func holdFor(t *testing.T, profiles []profile, conns, spool int, long float64) {
	h := &hours{t: t, w: filtertest.With(filter.New(filter.Config{Seed: 1})), r: rand.New(rand.NewPCG(1, 1)),
		profiles: profiles, byAddr: map[netip.AddrPort]*peer{}, spool: spool, records: make([]int, 9)}
	h.e = h.w.Engine
	d := time.Duration(long * float64(time.Hour))
	h.connect(conns, d)
	h.snapshot()
	h.takeOver(d)
	first := h.began + int64(earlyIn(d))
	h.run(first)
	early, kept := heapInUse(), h.kept()
	h.run(h.until)
	late := heapInUse()
	h.report(d, early, late)
	if most := early + early/200; late > most {
		t.Errorf("%d octets of memory are in use after %v, %d at the end", early, time.Duration(first-h.began), late)
	}
	if now := h.kept(); now != kept {
		t.Errorf("%d octets were kept, %d at the end", kept, now)
	}
	h.alive()
	h.recorded()
	h.restore()
	runtime.KeepAlive(h)
}

// earlyIn is when all of a hold of d is under way that will be.
func earlyIn(d time.Duration) time.Duration { return min(time.Hour, d/4) }

// heapInUse is what is reachable.
func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func (h *hours) kept() (n uint64) {
	for _, l := range h.e.Limits() {
		if l.Name == "kept_bytes" {
			n = l.Used
		}
	}
	return n
}

func (h *hours) play(format string, a ...any) {
	if err := h.w.Play(fmt.Sprintf(format, a...)); err != nil {
		h.t.Fatal(err)
	}
}

// connect opens the connections, one octet stream of each side.
func (h *hours) connect(conns int, d time.Duration) {
	h.play("app redis 10.0.0.100,fd00::100 6379")
	options := []string{"", "plain", "without ts", "without sack", "without scale", "lscale 2", "lscale 10", "lscale 0"}
	for at := range h.profiles {
		prof := &h.profiles[at]
		for range prof.share * conns / 10000 {
			p := &peer{h: h, i: len(h.peers), prof: prof}
			p.name = fmt.Sprintf("c%d", p.i)
			h.peers = append(h.peers, p)
			addr := netip.AddrPortFrom(prefix(at, p.i%3 == 0).Addr().Next(), uint16(10000+p.i))
			wraps := uint32(float64(d/time.Millisecond) * (0.05 + 0.9*h.r.Float64())) // in the hold
			if p.clock0 = -wraps; p.i%4 == 0 {
				p.clock0 += 1 << 31
			}
			h.play("link %s %v %s clock %d\nopen %[1]s\nremote %[1]s ACK\nremote %[1]s ACK data \"hello\"\nlocal %[1]s ACK data \"welcome\"\nremote %[1]s ACK",
				p.name, addr, options[p.i%len(options)], p.clock0)
			if prof.halfClosed {
				h.play("remote %s FIN+ACK\nlocal %[1]s ACK", p.name)
			}
		}
	}
}

// snapshot takes the application away.
func (h *hours) snapshot() {
	h.play("request SNAPSHOTSTART\nadvance 700ms")
	for _, p := range h.peers {
		if p.prof.localClosed {
			h.play("local %s FIN+ACK\nremote %[1]s ACK", p.name)
		}
	}
	h.w.Request(&filter.SnapshotFreeze{App: "redis", Spool: h.spool, Heartbeats: h.heartbeats()})
	h.play("advance 400ms\nrequest SEAL\nrequest SNAPSHOTDONE s1")
	if s := h.status(); s.State != appstate.SnapshotDone {
		h.t.Fatalf("the application is in %v", s.State)
	}
}

// heartbeats are those that the filter speaks with each profile's peers.
func (h *hours) heartbeats() (out []filter.Heartbeat) {
	for at := range h.profiles {
		f := &h.profiles[at]
		for _, six := range []bool{false, true} {
			b := filter.Heartbeat{Remote: prefix(at, six)}
			if f.ping {
				b.Match = []byte(pingWord)
			}
			if f.reply {
				b.Reply = []byte(pongWord)
			}
			if f.noop {
				b.Send, b.Interval = []byte(noopWord), int64(pingEvery)
			}
			if f.ping || f.noop {
				out = append(out, b)
			}
		}
	}
	return out
}

func (h *hours) status() filter.AppStatus {
	h.e.Step(h.w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Status{App: "redis"}}}, &h.fx)
	s := h.fx.Replies[0].Body.(*filter.StatusList).Apps[0]
	h.fx.Reset()
	return s
}

// takeOver lets peers play their remotes from now on.
func (h *hours) takeOver(d time.Duration) {
	const segment = 1460
	h.began = h.w.Now()
	h.now, h.until = h.began, h.began+int64(d)
	for _, p := range h.peers {
		p.Remote = h.w.Remote(p.name)
		p.top = p.Expects
		p.una, p.ack, p.spoke, p.heardAt, p.noopAt, p.octetsAt = p.Next, p.Next, p.Clock, h.now, h.now, h.now
		if int(p.LocalWindow)<<p.LocalScale < segment && !p.prof.localClosed {
			p.LocalWindow = uint16(segment>>p.LocalScale) + 1 // the filter opens it for one segment
		}
		if k := int64(p.prof.keep.idle); k != 0 {
			p.keepAt = h.now + h.r.Int64N(k)
			p.heardAt = p.keepAt - k
		}
		if p.prof.ping {
			p.pingAt = h.now + h.r.Int64N(int64(pingEvery))
		}
		if p.prof.say > 0 {
			p.early = h.now + h.r.Int64N(int64(earlyIn(d))/2)
		}
		h.byAddr[p.Addr] = p
		h.queue.add(p)
	}
}

// run lets time pass.
func (h *hours) run(until int64) {
	for {
		at := h.queue.first()
		if d := h.e.NextDeadline(); d != 0 && d <= at {
			if d > until {
				break
			}
			h.now = d
			h.deadlines++
			h.step(filter.Event{})
			continue
		}
		if at > until {
			break
		}
		p := h.queue[0].p
		h.now = at
		p.act()
		h.queue.moved(p)
	}
	h.now = until
}

// packet is the segment of sp as the filter's queue brings it.
func (h *hours) packet(sp *packet.Spec) *filter.Packet {
	h.segments++
	h.p = filter.Packet{Hook: filter.HookPrerouting, Data: sp.Build(h.buf[:])}
	return &h.p
}

// step gives the engine one event, and peers what it says.
func (h *hours) step(ev filter.Event) {
	h.e.Step(h.now, ev, &h.fx)
	h.reason = h.fx.Reason
	if ev.Packet != nil && h.fx.Verdict != filter.Drop {
		h.t.Fatalf("a segment of a held remote went on: %v", h.reason)
	}
	if len(h.fx.Sets)+len(h.fx.Notes)+len(h.fx.Untrack) > 0 {
		h.t.Fatalf("the state changes in the hold: %+v %+v", h.fx.Sets, h.fx.Notes)
	}
	h.restores += len(h.fx.Restores)
	for i := range h.fx.Records {
		h.record(&h.fx.Records[i])
	}
	for i := range h.fx.Sends {
		var s packet.Segment
		if f := s.Parse(h.fx.Sends[i].Data); f != packet.OK {
			h.t.Fatalf("a broken segment: %v", f)
		}
		p := h.byAddr[s.Dst]
		if p == nil {
			h.t.Fatalf("a segment for %v, which nobody is", s.Dst)
		}
		if ev.Packet == nil {
			h.spoken++
		} else {
			h.answers++
		}
		p.takes(&s)
		h.queue.moved(p)
	}
	h.fx.Reset()
}

func (h *hours) record(r *filter.Record) {
	if r.App != nil {
		h.appRecords++
		return
	}
	h.records[(h.now-h.began)*8/(h.until-h.began)]++
	h.byAddr[r.ID.Remote].records++
}

func (h *hours) fail(p *peer, format string, a ...any) {
	h.t.Helper()
	h.t.Fatalf("%v after the snapshot, %s (%s, %v): %s", time.Duration(h.now-h.began), p.name, p.prof.name, p.Addr, fmt.Sprintf(format, a...))
}

// report prints the figures.
func (h *hours) report(d time.Duration, early, late uint64) {
	h.t.Logf("%d connections held for %v: %d segments of theirs and %d more that were lost, %d answers, %d segments that the filter said by itself, %d of both lost; "+
		"%d deadlines, %d restore requests; %d records of the application, of connections in each eighth %v; memory %.2f MB early, %.2f MB at the end, %d octets kept",
		len(h.peers), d, h.segments, h.lost, h.answers, h.spoken, h.missed, h.deadlines, h.restores, h.appRecords, h.records[:8], float64(early)/1e6, float64(late)/1e6, h.kept())
}

// alive checks that the engine has every connection, and what it tells of it.
func (h *hours) alive() {
	h.e.Step(h.now, filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "redis"}}}, &h.fx)
	conns := h.fx.Replies[0].Body.(*filter.ConnList).Conns
	h.fx.Reset()
	if len(conns) != len(h.peers) {
		h.t.Errorf("%d connections, want %d", len(conns), len(h.peers))
	}
	for i := range conns {
		c := &conns[i]
		p := h.byAddr[c.ID.Remote]
		want := appstate.ConnectRmt
		if p.prof.localClosed {
			want = appstate.Closing
		}
		if c.State != want || seqnum.Value(c.SndNxt) != p.top || seqnum.Value(c.RcvNxt) != p.ack {
			h.fail(p, "it is %v with %d and %d, want %v with %d and %d", c.State, c.SndNxt, c.RcvNxt, want, p.top, p.ack)
		}
		if quiet := time.Duration(h.now - p.octetsAt); p.prof.noop && quiet > 2*pingEvery {
			h.fail(p, "it got no heartbeat for %v", quiet)
		}
	}
}

// recorded checks that records follow octets that come or go, and not time: an
// acknowledgement that is given again changes nothing.
func (h *hours) recorded() {
	for _, p := range h.peers {
		most := 0
		switch {
		case p.prof.ping || p.prof.noop:
			most = 2*p.beats + 2 // the numbers, and that the octets were acknowledged
		case h.spool > 0 && p.prof.say > 0:
			most = 2 // the octets, and the numbers
		}
		if p.records > most {
			h.fail(p, "%d records, want at most %d", p.records, most)
		}
	}
	if h.appRecords > 2 {
		h.t.Errorf("%d records of the application, want at most 2", h.appRecords)
	}
}

// restore brings the application back: each connection gets what its remote has
// said, and octets pass both ways.
func (h *hours) restore() {
	h.w.SetTime(h.now)
	var names []string
	for _, p := range h.peers {
		if p.Clock = p.tsval(); h.spool > 0 {
			p.Next = p.una // what the spool has no room for is sent again
		}
		p.Expects = p.top // what was lost comes again
		h.w.SetRemote(p.name, p.Remote)
		if !p.prof.localClosed {
			names = append(names, p.name)
			h.play("newlocal %s %#x %d", p.name, h.r.Uint32(), h.r.Uint32())
		}
	}
	h.play("request RESTORESTART s1\nrequest RESTORECONN %s\nadvance 1s\nrequest RESTORED\nadvance 5s", strings.Join(names, " "))
	if s := h.status(); s.State != appstate.Restored {
		h.t.Fatalf("the application is in %v", s.State)
	}
	for _, p := range h.peers {
		if p.prof.localClosed {
			continue
		}
		want := "hello"
		if p.prof.say > 0 {
			want += fmt.Sprintf("%0*d", p.prof.say, p.i)
		}
		if got, _ := h.w.Taken(p.name); h.spool > 0 && len(p.pending) > 0 { // behind the spool what it offered last
			r, n := h.w.Remote(p.name), len(got)-(len(want)-len(p.pending))
			if n <= 0 {
				h.fail(p, "behind the restore local has %d octets, and not what came when there was no more room", len(got))
			}
			p.pending, r.Next = p.pending[n:], r.Next.Add(uint32(n))
			h.w.SetRemote(p.name, r)
			if len(p.pending) > 0 {
				h.play("remote %s ACK data %q", p.name, p.pending)
			}
		}
		if !p.prof.halfClosed {
			h.play("remote %s ACK data \"after\"", p.name)
			want += "after"
		}
		h.play("local %s ACK data \"reply\"", p.name)
		local, remote := h.w.Taken(p.name)
		if string(local) != want || string(remote) != "welcomereply" {
			h.fail(p, "behind the restore local has %.40q (%d octets, want %d), the remote %q", local, len(local), len(want), remote)
		}
	}
	if f := h.w.Faults(); len(f) > 0 {
		h.t.Errorf("%d faults in the restore: %s", len(f), f[0])
	}
}

// timetable is a heap of peers by when they do something.
type timetable []entry

type entry struct {
	at int64
	p  *peer
}

func (q *timetable) add(p *peer) {
	p.place = len(*q)
	*q = append(*q, entry{idleFor, p})
	q.moved(p)
}

// idleFor is the time of peers that wait.
const idleFor = int64(1) << 62

func (q timetable) first() int64 { return q[0].at }

// moved puts p where it belongs.
func (q timetable) moved(p *peer) {
	e := entry{p.next(), p}
	if e.at == 0 {
		e.at = idleFor
	}
	i := p.place
	for ; i > 0 && e.at < q[(i-1)/4].at; i = (i - 1) / 4 {
		q.put(i, q[(i-1)/4])
	}
	for {
		least := i
		for c := 4*i + 1; c <= 4*i+4 && c < len(q); c++ {
			if at := q[c].at; least == i && at < e.at || least != i && at < q[least].at {
				least = c
			}
		}
		if least == i {
			break
		}
		q.put(i, q[least])
		i = least
	}
	q.put(i, e)
}

func (q timetable) put(i int, e entry) { q[i], e.p.place = e, i }
