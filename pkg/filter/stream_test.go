package filter_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

// stream plays a random life of one connection: octets both ways, snapshots,
// holds, restores, restarts of the filter, repetitions and holes.
type stream struct {
	t      *testing.T
	w      *filtertest.World
	r      *rand.Rand
	script strings.Builder
	in     int // octets that the remote has sent
	fin    int // 1: and its FIN
	out    int // that local has
	iss    uint32
	id     int
	held   int  // snapshots that came to their end
	life   int  // how soon the remote closes
	calm   bool // nothing is lost
	lines  bool // snapshots with boundary "line"
	taken  int  // octets that local had at SNAPSHOTSTART
	cut    int  // snapshots that were taken in between lines
	spools bool // the filter may acknowledge what local has not taken

	nodes *rand.Rand // the application moves between nodes, nil: there is one
	at    string     // where it is
	moved int
	back  int // restores on another node that were given up
}

func (s *stream) play(format string, a ...any) {
	line := fmt.Sprintf(format, a...)
	s.script.WriteString(line + "\n")
	if err := s.w.Play(line); err != nil {
		s.t.Fatalf("%v\n%s", err, s.script.String())
	}
	local, remote := s.w.Taken("c1")
	for i, b := range local {
		if b != octet(i) {
			s.t.Fatalf("octet %d to local is %q\n%s", i, b, s.script.String())
		}
	}
	for i, b := range remote {
		if b != octet(i) {
			s.t.Fatalf("octet %d to the remote is %q\n%s", i, b, s.script.String())
		}
	}
	if n := s.w.Acknowledged("c1"); n > len(local)+s.fin && !s.spools {
		s.t.Fatalf("%d octets acknowledged to the remote, local has taken %d\n%s", n, len(local), s.script.String())
	}
	if f := s.w.Faults(); len(f) > 0 {
		s.t.Fatalf("%s\n%s", f, s.script.String())
	}
}

// octet i of each stream: lines of different length.
func octet(i int) byte {
	if i%26 == 9 || i%26 == 25 {
		return '\n'
	}
	return 'a' + byte(i%26)
}

// say sends n octets from offset at of an end that has sent have so far.
func (s *stream) say(end string, have, at, n int) {
	lost := ""
	if s.r.IntN(6) == 0 && !s.calm {
		lost = "lost "
	}
	text := make([]byte, n)
	for i := range text {
		text[i] = octet(at + i)
	}
	s.play("%s%s c1 ACK ts +%d seq %d data %q", lost, end, s.r.IntN(20), at-have, text)
}

// remoteSays is something that a remote may send at any time.
func (s *stream) remoteSays() {
	local, _ := s.w.Taken("c1")
	if s.fin == 0 && s.r.IntN(s.life) == 0 {
		s.play("remote c1 FIN+ACK")
		s.fin = 1
		return
	}
	switch s.r.IntN(10) {
	case 0:
		s.play("remote c1 ACK seq -1")
	case 1:
		s.play("remote c1 ACK ts +%d", s.r.IntN(1000))
	case 2, 3: // new octets
		if s.fin == 1 {
			s.again(len(local))
			return
		}
		n := 1 + s.r.IntN(40)
		s.say("remote", s.in, s.in, n)
		s.in += n
	case 4: // from the first that is missing, as after a time-out
		s.again(len(local))
	case 5: // an old duplicate
		if at := s.r.IntN(s.in + 1); at < s.in {
			s.say("remote", s.in+s.fin, at, 1+s.r.IntN(s.in-at))
		}
	case 6: // of what comes next, its head is lost
		if s.fin == 1 {
			return
		}
		s.say("remote", s.in, s.in+1+s.r.IntN(20), 1+s.r.IntN(20))
	case 7:
		s.play("remote c1 RST seq 7")
	default: // an outsider, far from everything
		flags := []string{"RST", "RST+ACK", "SYN", "FIN+ACK", "ACK", "SYN+ACK", "NONE"}[s.r.IntN(7)]
		far := 100000 + s.r.IntN(1<<31)
		s.play("remote c1 %s seq %d ack %d data \"evil\"", flags, far-s.r.IntN(2)<<31, s.r.IntN(1<<31)-s.r.IntN(1<<31))
	}
}

// again sends everything from offset at on once more.
func (s *stream) again(at int) {
	switch {
	case s.fin == 1:
		text := make([]byte, s.in-at)
		for i := range text {
			text[i] = octet(at + i)
		}
		s.play("remote c1 FIN+ACK seq %d data %q", at-s.in-1, text)
	case at < s.in:
		s.say("remote", s.in, at, s.in-at)
	}
}

// settle lets everything that was sent arrive and be acknowledged.
func (s *stream) settle() {
	s.calm = true
	local, remote := s.w.Taken("c1")
	s.again(len(local))
	if n := len(remote); n < s.out {
		s.say("local", s.out, n, s.out-n)
	}
	s.play("local c1 ACK")
	s.play("remote c1 ACK")
	s.calm = false
}

// state is the application's.
func (s *stream) state() appstate.App {
	var fx filter.Effects
	s.w.Engine.Step(s.w.Now(), filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "redis"}}}, &fx)
	return fx.Replies[0].Body.(*filter.ConnList).State
}

func (s *stream) run(cycles int) {
	s.begin()
	for range cycles {
		s.cycle()
	}
	s.end()
}

func (s *stream) begin() {
	s.life = 1 + s.r.IntN(100)
	s.play("app redis 10.0.0.100 6379")
	s.play("link c1 10.0.0.2:40000 %s lscale %d", []string{"", "plain", "ecn"}[s.r.IntN(3)], s.r.IntN(8))
	s.play("open c1")
}

// cycle is one snapshot by a restart of the application.
func (s *stream) cycle() {
	for range s.r.IntN(6) {
		s.remoteSays()
		s.localSays()
	}
	s.settle()
	boundary := ""
	if s.lines = s.r.IntN(2) == 0; s.lines {
		boundary = " line"
	}
	s.play("request SNAPSHOTSTART%s", boundary)
	local, _ := s.w.Taken("c1")
	s.taken = len(local)
	for range s.r.IntN(4) {
		s.remoteSays()
		s.localSays()
	}
	s.play("request SNAPSHOTFREEZE%s", boundary)
	for range s.r.IntN(6) {
		s.remoteSays()
		if s.r.IntN(3) == 0 {
			s.localSays()
		}
		s.play("advance %dms", s.r.IntN(40))
		if s.r.IntN(12) == 0 {
			s.play("restart")
		}
	}
	s.play("local c1 ACK")
	if _, remote := s.w.Taken("c1"); len(remote) < s.out { // local sends again
		s.calm = true
		s.say("local", s.out, len(remote), s.out-len(remote))
		s.calm = false
	}
	s.play("remote c1 ACK")
	s.play("advance 120ms")
	if s.r.IntN(4) == 0 {
		s.play("request SNAPSHOTABORT")
		return
	}
	s.hold()
}

// end lets both sides close when everything has arrived.
func (s *stream) end() {
	s.settle()
	local, remote := s.w.Taken("c1")
	if len(local) != s.in || len(remote) != s.out {
		s.t.Fatalf("local took %d of %d octets, the remote %d of %d\n%s", len(local), s.in, len(remote), s.out, s.script.String())
	}
	s.play("local c1 FIN+ACK")
	if s.fin == 0 {
		s.play("remote c1 FIN+ACK")
		s.fin = 1
	}
	s.play("local c1 ACK")
	s.play("remote c1 ACK")
	if n := s.w.Acknowledged("c1"); n != s.in+1 {
		s.t.Fatalf("%d of %d octets acknowledged to the remote\n%s", n, s.in+1, s.script.String())
	}
	s.play("advance 200s")
	if n := s.w.Engine.Limits()[0].Used; n != 0 {
		s.t.Fatalf("%d connections are left\n%s", n, s.script.String())
	}
}

// hold goes from the seal to RESTORED.
func (s *stream) hold() {
	s.id++
	s.play("request SEAL")
	s.remoteSays()
	s.play("request SNAPSHOTDONE s%d", s.id)
	if s.state() != appstate.SnapshotDone {
		s.play("request SNAPSHOTABORT")
		return
	}
	s.held++
	if local, _ := s.w.Taken("c1"); s.lines && len(local) > s.taken && s.fin == 0 {
		if octet(len(local)-1) != '\n' {
			s.t.Fatalf("the snapshot was taken in the middle of a line, at octet %d\n%s", len(local), s.script.String())
		}
		s.cut++
	}
	for {
		for range s.r.IntN(8) {
			s.remoteSays()
			if s.r.IntN(10) == 0 {
				s.play("restart")
			}
		}
		from := s.handOver()
		s.iss += s.r.Uint32() >> 1
		s.play("newlocal c1 %d %d lscale %d", s.iss, s.r.Uint32()>>1, s.r.IntN(8))
		if s.play("request RESTORESTART s%d", s.id); s.state() != appstate.RestoreStart {
			s.t.Fatalf("not restoring\n%s", s.script.String())
		}
		s.remoteSays()
		s.play("request RESTORECONN c1")
		for range s.r.IntN(3) {
			s.remoteSays()
		}
		s.play("advance 20ms")
		if s.r.IntN(4) > 0 {
			break
		}
		s.giveUp(from)
	}
	s.play("request RESTORED")
	s.release()
	if s.r.IntN(4) == 0 {
		s.play("advance 30ms")
		s.play("restart")
	}
}

// handOver moves the application to the other node now and then, and returns the
// node that it was on.
func (s *stream) handOver() string {
	if s.nodes == nil || s.nodes.IntN(3) == 0 || s.away() {
		return ""
	}
	from := s.at
	s.at = map[string]string{"a": "b", "b": "a"}[from]
	for range 1 + s.nodes.IntN(2) { // an answer can be lost
		s.play("request HANDOVER %s s%d", s.at, s.id)
	}
	if s.nodes.IntN(3) == 0 {
		s.play("restart")
		s.play("request HANDOVER %s", s.at)
	}
	s.remoteSays()
	s.play("node %s %ds", s.at, s.nodes.IntN(9000)-4500)
	s.play("request RESTORESTART s%d from %s", s.id, from)
	if s.state() != appstate.RestoreStart {
		s.t.Fatalf("not taken over\n%s", s.script.String())
	}
	if s.nodes.IntN(3) == 0 {
		s.play("restart")
	}
	s.moved++
	return from
}

// away tells whether what is here came from the other node and was not restored.
func (s *stream) away() bool {
	var fx filter.Effects
	s.w.Engine.Step(s.w.Now(), filter.Event{Request: &filter.Request{Body: &filter.Status{App: "redis"}}}, &fx)
	return fx.Replies[0].Body.(*filter.StatusList).Apps[0].Foreign
}

// giveUp ends a restore, here or by handing back what came from another node.
func (s *stream) giveUp(from string) {
	if from == "" || s.nodes.IntN(2) == 0 {
		s.abort(from)
		return
	}
	s.handBack(from)
}

// abort gives a restore up, and stays here.
func (s *stream) abort(from string) {
	if !s.away() {
		s.play("request RESTOREABORT")
		return
	}
	s.play("request YIELD")
	s.remoteSays()
	s.play("request UNYIELD")
}

// handBack gives it up, and goes back.
func (s *stream) handBack(from string) {
	s.play("request YIELD")
	if s.nodes.IntN(3) == 0 {
		s.play("restart")
		s.play("request YIELD")
	}
	s.remoteSays()
	s.play("node %s", from)
	s.play("request HANDBACK %s", s.at)
	if s.state() != appstate.SnapshotDone {
		s.t.Fatalf("not handed back\n%s", s.script.String())
	}
	s.play("node %s", s.at)
	s.play("request RELEASE --force")
	s.at = from
	s.play("node %s", s.at)
	s.back++
}

// release forgets what the other node still has, or leaves it to be replaced.
func (s *stream) release() {
	if s.nodes == nil || s.nodes.IntN(2) == 0 {
		return
	}
	other := map[string]string{"a": "b", "b": "a"}[s.at]
	s.play("node %s", other)
	s.play("request RELEASE %s", s.at)
	s.play("node %s", s.at)
}

func (s *stream) localSays() {
	if s.r.IntN(2) == 0 {
		s.play("local c1 ACK")
		return
	}
	n := 1 + s.r.IntN(40)
	s.say("local", s.out, s.out, n)
	s.out += n
}

// TestStreams: whatever happens, each side takes the octets of the other once
// and in order, nothing is acknowledged that local has not taken, and no octet
// is lost.
func TestStreams(t *testing.T) {
	held, cut := 0, 0
	for seed := range uint64(300) {
		s := &stream{t: t, w: filtertest.New(), r: rand.New(rand.NewPCG(seed, 1))}
		s.run(4)
		held, cut = held+s.held, cut+s.cut
	}
	if held < 300 {
		t.Errorf("only %d snapshots came to their end", held)
	}
	if cut < 30 {
		t.Errorf("only %d snapshots were taken at the end of a line", cut)
	}
}

// TestStreamsOfTwoNodes: the same where the application moves between two nodes, is
// handed back, and filters of both end in between.
func TestStreamsOfTwoNodes(t *testing.T) {
	moved, back := 0, 0
	for seed := range uint64(300) {
		s := &stream{t: t, w: filtertest.New(), r: rand.New(rand.NewPCG(seed, 3)), nodes: rand.New(rand.NewPCG(seed, 4)), at: "a"}
		s.run(5)
		moved, back = moved+s.moved, back+s.back
	}
	if moved < 300 || back < 30 {
		t.Errorf("only %d moves, %d of them back", moved, back)
	}
}
