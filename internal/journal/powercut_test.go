package journal

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Whenever the power fails, what the last transaction that has returned left is
// there, or the one behind it; it is never damage.
func TestPowerFails(t *testing.T) {
	h := newHistory(t)
	r := rand.New(rand.NewPCG(8, 1))
	h.live(t, r, 48)
	overflow, branch := false, false
	for i := range h.steps {
		s := &h.steps[i]
		for _, w := range s.data {
			overflow = overflow || len(w.data) > os.Getpagesize()
			branch = branch || ne.Uint16(w.data[8:]) == branchPage
		}
		if s.size > len(s.before) {
			for range 20 {
				b := s.grown()
				h.try(t, "growing", b[:len(s.before)+r.IntN(len(b)-len(s.before)+1)], s.from, s.from, false)
			}
		}
		for k := range 60 {
			f := &fates[k%len(fates)]
			b := s.grown()
			f.land(r, b, s.data)
			h.try(t, "data, "+f.name, b, s.from, s.from, false)
		}
		for k := range 24 {
			f := &fates[k%len(fates)]
			b := s.synced()
			f.land(r, b, []write{s.meta})
			h.try(t, "meta, "+f.name, b, s.from, s.to, false)
		}
		for n := i % 4; n <= pageHeader+metaLen; n += 4 { // each octet of what counts in it
			b := s.synced()
			copy(b[s.meta.at:], s.meta.data[:n])
			first := s.from
			if n == pageHeader+metaLen {
				first = s.to
			}
			h.try(t, "meta, cut in what counts", b, first, s.to, false)
		}
		h.try(t, "done", s.whole(), s.to, s.to, false)
	}
	if !overflow || !branch || h.counts["growing"] == 0 {
		t.Error("the journal did not grow, or has no branch, or no page that overflows")
	}
	h.log(t)
}

// The power fails again while what the first failure left is opened.
func TestPowerFailsTwice(t *testing.T) {
	h := newHistory(t)
	r := rand.New(rand.NewPCG(8, 2))
	h.live(t, r, 30)
	path := filepath.Join(h.dir, "twice.db")
	for range 100 {
		s := &h.steps[r.IntN(len(h.steps))]
		b := s.grown()
		f := &fates[r.IntN(len(fates))]
		if r.IntN(2) == 0 {
			f.land(r, b, s.data)
		} else {
			b = s.synced()
			f.land(r, b, []write{s.meta})
		}
		must(t, os.WriteFile(path, b, 0o600))
		db, _, err := openBolt(path)
		must(t, err)
		j := &Journal{db: db}
		second := recorded(t, path, db, func() error { return j.begin(path) })
		must(t, j.Close())
		for range 6 {
			f, b := &fates[r.IntN(len(fates))], second.grown()
			f.land(r, b, second.data)
			h.try(t, "data", b, s.from, s.to, false)
			b = second.synced()
			f.land(r, b, []write{second.meta})
			h.try(t, "meta", b, s.from, s.to, false)
		}
	}
	h.log(t)
}

// A journal that is cut anywhere is damaged, or nothing of it is missing.
func TestCut(t *testing.T) {
	h := newHistory(t)
	r := rand.New(rand.NewPCG(8, 3))
	h.live(t, r, 30)
	for i := range h.steps {
		s := &h.steps[i]
		whole := s.whole()
		m, err := newest(whole)
		must(t, err)
		for range 30 {
			n := r.IntN(len(whole))
			if r.IntN(3) == 0 {
				n -= n % sector
			}
			h.try(t, "cut", whole[:n], s.to, s.to, n < int(m.high)*m.pageSize)
		}
	}
	h.log(t)
}

// A disk that loses what it said was written leaves damage or an earlier state, and
// never something of both.
func TestDiskLies(t *testing.T) {
	h := newHistory(t)
	r := rand.New(rand.NewPCG(8, 4))
	h.live(t, r, 60)
	for range 2500 {
		k := r.IntN(len(h.steps))
		from := max(0, k-r.IntN(6))
		var writes []write
		for _, s := range h.steps[from : k+1] {
			writes = append(append(writes, s.data...), s.meta)
		}
		b := h.steps[from].before
		b = append(append([]byte(nil), b...), make([]byte, h.steps[k].size-len(b))...)
		kind := []string{"one write lost", "writes lost", "sectors lost"}[r.IntN(3)]
		if kind == "sectors lost" {
			f := fates[2+r.IntN(3)]
			f.land(r, b, writes)
		} else {
			lost := r.IntN(len(writes))
			for i, w := range writes {
				if i != lost && (kind == "one write lost" || r.IntN(8) != 0) {
					copy(b[w.at:], w.data)
				}
			}
		}
		h.try(t, kind, b, 0, h.steps[k].to, true)
	}
	h.log(t)
}

// Whenever the power fails while a journal is made, the next start makes it.
func TestPowerFailsAtFirst(t *testing.T) {
	h := newHistory(t)
	r := rand.New(rand.NewPCG(8, 5))
	path := filepath.Join(h.dir, "first.db")
	name := path + ".new"
	db, err := bolt.Open(name, 0o600, options(nil))
	must(t, err)
	empty := content(t, name)
	j := &Journal{db: db}
	s := recorded(t, name, db, func() error { return j.begin(path) })
	h.steps = append(h.steps, s)
	must(t, j.Close())
	try := func(kind string, b []byte) {
		must(t, os.WriteFile(name, b, 0o600))
		h.counts[kind]++
		j, err := Open(path)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		defer func() { must(t, errors.Join(j.Close(), os.Remove(path))) }()
		if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s: %s is still there", kind, name)
		}
		h.goesOn(t, kind, j, path, 0, 0)
	}
	try("empty", nil)
	for k := range 600 {
		f := &fates[k%len(fates)]
		b := make([]byte, len(empty))
		f.land(r, b, []write{{0, empty}})
		if k%2 == 0 {
			b = b[:r.IntN(len(b)+1)] // it had not grown to its length
		}
		try("before the tables", b)
		b = s.grown()
		f.land(r, b, s.data)
		try("tables", b)
		b = s.synced()
		f.land(r, b, []write{s.meta})
		try("meta", b)
	}
	try("before it has its name", s.whole())
	h.try(t, "named", s.whole(), 0, 0, false)
	h.log(t)
}

// Of filters that make a journal at the same time, one has it.
func TestMadeAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	var wg sync.WaitGroup
	got := make([]*Journal, 6)
	errs := make([]error, len(got))
	for i := range got {
		wg.Go(func() { got[i], errs[i] = Open(path) })
	}
	wg.Wait()
	n := 0
	for i, j := range got {
		switch {
		case j != nil:
			n++
			must(t, j.Apply([]Entry{{Table: Apps, Key: []byte("a"), Value: []byte("1")}}))
			must(t, j.Close())
		case !strings.Contains(errs[i].Error(), "does another filter run?"):
			t.Error(errs[i])
		}
	}
	if n != 1 {
		t.Fatalf("%d have it", n)
	}
	if m := read(t, open(t, path), Apps); len(m) != 1 {
		t.Errorf("it holds %v", m)
	}
}

// One that another process is just making is held, and one that it has made
// meanwhile is opened.
func TestMadeByAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	f, err := os.Create(path + ".new")
	must(t, err)
	must(t, lock(f, unix.LOCK_EX, 0))
	if j, err := create(path); j != nil || err == nil || !strings.Contains(err.Error(), "does another filter run?") {
		t.Errorf("made twice: %v", err)
	}
	must(t, f.Close())
	must(t, open(t, path).Close())
	if j, err := create(path); j != nil || err != nil {
		t.Errorf("made where there was one: %v", err)
	}
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}
