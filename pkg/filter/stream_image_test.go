package filter_test

import (
	"math/rand/v2"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

// imageCycle is one snapshot by an image.
func (s *stream) imageCycle() {
	for range s.r.IntN(6) {
		s.remoteSays()
		s.localSays()
	}
	if s.r.IntN(2) == 0 {
		s.settle()
	}
	s.play("request SNAPSHOTSTART silent")
	for range s.r.IntN(4) {
		s.remoteSays()
		s.localSays()
	}
	spool := []string{"", " spool=30", " spool=3000 wake=full"}[s.r.IntN(3)]
	s.spools = s.spools || spool != ""
	s.play("request SNAPSHOTFREEZE silent%s", spool)
	for range s.r.IntN(5) {
		s.remoteSays()
		if s.r.IntN(3) == 0 {
			s.localSays()
		}
		if s.r.IntN(12) == 0 {
			s.play("restart")
		}
		s.play("advance %dms", s.r.IntN(40))
	}
	if s.r.IntN(3) == 0 { // written and not sent yet
		n := s.r.IntN(200)
		s.calm = true
		s.out += n
		s.calm = false
		s.play("image c1 nxt %d", n)
	}
	s.play("request SEAL image")
	if s.r.IntN(4) == 0 {
		s.remoteSays()
		s.play("restart")
	}
	s.id++
	if s.r.IntN(6) > 0 {
		s.play("request SNAPSHOTDONE s%d", s.id)
	}
	if s.state() != appstate.SnapshotDone {
		s.play("restored c1") // the process goes on where it was dumped
		s.play("request SNAPSHOTABORT")
		return
	}
	s.held++
	s.restoreImage()
}

// restoreImage goes on to RESTORED.
func (s *stream) restoreImage() {
	for {
		for range s.r.IntN(8) {
			s.remoteSays()
			if s.r.IntN(10) == 0 {
				s.play("restart")
			}
		}
		from := s.handOver()
		s.play("request RESTORESTART s%d", s.id)
		if s.state() != appstate.RestoreStart {
			s.t.Fatalf("not restoring\n%s", s.script.String())
		}
		s.play("restored c1")
		s.remoteSays()
		s.queueAgain()
		s.play("request RESTORECONN c1 image")
		s.queueAgain()
		s.remoteSays()
		again := s.r.IntN(4) == 0
		if again && s.r.IntN(2) == 0 || !again {
			s.play("request RESTORED")
			s.remoteSays()
			s.queueAgain()
		}
		if !again {
			break
		}
		s.giveUp(from)
	}
	s.play("advance 30ms")
	if s.state() != appstate.Restored {
		s.t.Fatalf("not restored\n%s", s.script.String())
	}
	s.play("local c1 ACK ts +1000") // its clock went on, beyond that of restores that failed
	s.release()
	if s.r.IntN(4) == 0 {
		s.play("restart")
	}
	if s.r.IntN(3) == 0 {
		s.play("advance 10s") // what was translated for a moment is so no more
	}
}

// queueAgain has local say again what it may have in its queue.
func (s *stream) queueAgain() {
	_, remote := s.w.Taken("c1")
	if at := max(len(remote)-s.r.IntN(10), 0); at < s.out && s.r.IntN(2) == 0 {
		s.calm = true
		s.say("local", s.out, at, s.out-at)
		s.calm = false
	}
}

// TestStreamsOfImages: whatever happens, each side takes the octets of the other once and
// in order, also where snapshots by an image and by a restart follow each other, and on
// two nodes.
func TestStreamsOfImages(t *testing.T) {
	held, moved := 0, 0
	for seed := range uint64(400 / slower) {
		s := &stream{t: t, w: filtertest.New(), r: rand.New(rand.NewPCG(seed, 5)), at: "a"}
		if seed%2 == 0 {
			s.nodes = rand.New(rand.NewPCG(seed, 6))
		}
		s.w.RemoteTakes()
		s.begin()
		for range 4 {
			if s.r.IntN(4) == 0 {
				s.settle()
				s.cycle()
			} else {
				s.imageCycle()
			}
		}
		s.end()
		held, moved = held+s.held, moved+s.moved
	}
	if held < 600/slower || moved < 100/slower {
		t.Errorf("only %d snapshots came to their end, %d moves", held, moved)
	}
}
