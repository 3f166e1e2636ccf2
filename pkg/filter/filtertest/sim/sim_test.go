package sim

import (
	"flag"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	seeds    = flag.Int("seeds", 100, "how many seeds are played")
	first    = flag.Uint64("first", 1, "the first seed")
	one      = flag.Int64("seed", -1, "play only this seed")
	traceTo  = flag.String("transcript", "", "write the whole trace of -seed to this file")
	pcapTo   = flag.String("pcap", "", "write what the remotes of -seed saw to this file")
	features = flag.String("without", "", "features to leave out: letters of loss(l) reorder(r) crash(c) aborts(a) force(f) bulk(b) outsiders(o) late(t) plain(p) keepalive(k) spool(s) heartbeats(h) dials(d)")
	lines    = flag.Int("lines", 60, "lines of the trace that an error shows")
)

func options() Options {
	o := Options{Lines: *lines}
	for _, c := range *features {
		switch c {
		case 'l':
			o.NoLoss = true
		case 'r':
			o.NoReorder = true
		case 'c':
			o.NoCrash = true
		case 'a':
			o.NoAborts = true
		case 'f':
			o.NoForce = true
		case 'b':
			o.NoBulk = true
		case 'o':
			o.NoOutsiders = true
		case 't':
			o.NoLate = true
		case 'p':
			o.NoPlain = true
		case 'k':
			o.NoKeep = true
		case 's':
			o.NoSpool = true
		case 'h':
			o.NoBeats = true
		case 'd':
			o.NoDials = true
		}
	}
	return o
}

// TestSeeds plays many seeds; -seed N plays one again.
func TestSeeds(t *testing.T) {
	if *one >= 0 {
		playOne(t, uint64(*one))
		return
	}
	var next atomic.Uint64
	next.Store(*first)
	var total Report
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				seed := next.Add(1) - 1
				if seed >= *first+uint64(*seeds) {
					return
				}
				rep, err := Run(seed, options())
				mu.Lock()
				total.add(rep)
				mu.Unlock()
				if err != nil {
					t.Errorf("%v\nplay it again: go test ./pkg/filter/filtertest/sim -run TestSeeds -seed %d -transcript /tmp/seed.txt -pcap /tmp/sim.pcap", err, seed)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d seeds: %s", *seeds, total.String())
}

func playOne(t *testing.T, seed uint64) {
	o := options()
	if *traceTo != "" {
		f, err := os.Create(*traceTo)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		o.Trace = f
	}
	if *pcapTo != "" {
		f, err := os.Create(*pcapTo)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if o.Capture, err = NewCapture(f); err != nil {
			t.Fatal(err)
		}
	}
	rep, err := Run(seed, o)
	t.Log(rep.String())
	if err != nil {
		t.Fatal(err)
	}
}

// TestDeterminism plays some seeds twice: the traces must be the same.
func TestDeterminism(t *testing.T) {
	for seed := uint64(1); seed <= 20; seed++ {
		a, _ := Run(seed, options())
		b, _ := Run(seed, options())
		if a.Hash != b.Hash || a.Packets != b.Packets {
			t.Errorf("seed %d: two runs differ: %d packets and hash %x, %d packets and hash %x", seed, a.Packets, a.Hash, b.Packets, b.Hash)
		}
	}
}

// TestNothingStays plays some seeds and looks whether anything of them goes on.
func TestNothingStays(t *testing.T) {
	before := runtime.NumGoroutine()
	for seed := uint64(1); seed <= 20; seed++ {
		_, _ = Run(seed, options())
	}
	for range 1 << 20 { // one that has ended needs a moment until it is not counted
		if runtime.NumGoroutine() <= before {
			return
		}
		runtime.Gosched()
	}
	t.Errorf("%d goroutines before 20 runs, %d after them", before, runtime.NumGoroutine())
}
