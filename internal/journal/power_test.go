package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"unsafe"

	bolt "go.etcd.io/bbolt"
)

// A power failure is played on the writes that bbolt really makes: its writeAt is
// replaced by one that also takes them down. What it cannot show is where they are
// synced; that is read in bbolt (DB.grow, Tx.Commit) and seen with strace: where the
// file grows, ftruncate and fsync before anything is written; the data pages, in the
// order of their numbers, fdatasync; the meta page, fdatasync; then Commit returns.
// That the meta page comes alone and last is asserted, and that the writes together
// make the file what it is.
//
// What was synced stays. Of what was not, each sector may be there, or not, or be
// torn at any octet, or hold zeros or rubbish.

const sector = 512

type write struct {
	at   int
	data []byte
}

// step is a transaction as the disk saw it.
type step struct {
	before []byte  // synced
	size   int     // that the file was grown to, and synced
	data   []write // and synced
	meta   write   // and synced
	from   int     // the state before
	to     int     // and behind it
}

// recorded is what the disk saw while do wrote one transaction to db, at path.
func recorded(t *testing.T, path string, db *bolt.DB, do func() error) step {
	t.Helper()
	if db.NoSync || db.NoGrowSync {
		t.Fatal("bbolt does not sync")
	}
	s := step{before: content(t, path)}
	f := reflect.ValueOf(db).Elem().FieldByName("ops").FieldByName("writeAt")
	hook := reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem()
	real := hook.Interface().(func([]byte, int64) (int, error))
	var all []write
	hook.Set(reflect.ValueOf(func(b []byte, at int64) (int, error) {
		if len(all) == 0 {
			fi, err := os.Stat(path)
			must(t, err)
			s.size = int(fi.Size())
		}
		all = append(all, write{int(at), bytes.Clone(b)})
		return real(b, at)
	}))
	defer hook.Set(reflect.ValueOf(real))
	must(t, do())
	last := len(all) - 1
	for i, w := range all {
		if (w.at < 2*os.Getpagesize()) != (i == last) {
			t.Fatalf("write %d of %d is at %d", i, len(all), w.at)
		}
	}
	s.data, s.meta = all[:last], all[last]
	if b := s.whole(); !bytes.Equal(b, content(t, path)) {
		t.Fatal("the file has changed by what was not seen")
	}
	return s
}

func content(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// grown is the file before anything is written.
func (s *step) grown() []byte {
	return append(bytes.Clone(s.before), make([]byte, s.size-len(s.before))...)
}

// synced is the file when the data pages are on the disk.
func (s *step) synced() []byte {
	b := s.grown()
	for _, w := range s.data {
		copy(b[w.at:], w.data)
	}
	return b
}

func (s *step) whole() []byte {
	b := s.synced()
	copy(b[s.meta.at:], s.meta.data)
	return b
}

// fate is how much of the writes arrives.
type fate struct {
	name string
	hits func(r *rand.Rand, n int) []int // of n sectors: octets that arrive, or zeros, or rubbish
}

const zeros, rubbish = -1, -2

var fates = []fate{
	{"cut at an octet", func(r *rand.Rand, n int) []int {
		f := make([]int, n)
		at := r.IntN(n)
		for i := range at {
			f[i] = sector
		}
		f[at] = r.IntN(sector + 1)
		return f
	}},
	{"cut at an octet, from behind", func(r *rand.Rand, n int) []int {
		f := make([]int, n)
		at := r.IntN(n)
		for i := at + 1; i < n; i++ {
			f[i] = sector
		}
		f[at] = r.IntN(sector + 1)
		return f
	}},
	{"any sectors", func(r *rand.Rand, n int) []int {
		f, p := make([]int, n), r.Float64()
		for i := range f {
			if r.Float64() < p {
				f[i] = sector
			}
		}
		return f
	}},
	{"all but one", func(r *rand.Rand, n int) []int {
		f := slices.Repeat([]int{sector}, n)
		f[r.IntN(n)] = r.IntN(sector)
		return f
	}},
	{"only one", func(r *rand.Rand, n int) []int {
		f := make([]int, n)
		f[r.IntN(n)] = sector
		return f
	}},
	{"anything", func(r *rand.Rand, n int) []int {
		f := make([]int, n)
		for i := range f {
			f[i] = []int{0, sector, r.IntN(sector), zeros, rubbish}[r.IntN(5)]
		}
		return f
	}},
}

// land has what the fate lets arrive of writes be in b.
func (f *fate) land(r *rand.Rand, b []byte, writes []write) {
	var places [][2][]byte // there, and what is written
	for _, w := range writes {
		for i := 0; i < len(w.data); i += sector {
			places = append(places, [2][]byte{b[w.at+i:][:sector], w.data[i:][:sector]})
		}
	}
	if len(places) == 0 {
		return
	}
	for i, n := range f.hits(r, len(places)) {
		there, data := places[i][0], places[i][1]
		switch n {
		case zeros:
			clear(there)
		case rubbish:
			for j := 0; j < sector; j += 8 {
				binary.NativeEndian.PutUint64(there[j:], r.Uint64())
			}
		default:
			copy(there, data[:n])
		}
	}
}

// contents are what the tables hold.
type contents map[Table]map[string]string

func (c contents) clone() contents {
	n := contents{}
	for t, m := range c {
		n[t] = maps.Clone(m)
	}
	return n
}

// apply does to c what Apply does to a journal.
func (c contents) apply(entries []Entry) {
	for _, e := range entries {
		m := c[e.Table]
		switch {
		case e.Prefix:
			maps.DeleteFunc(m, func(k, _ string) bool { return bytes.HasPrefix([]byte(k), e.Key) })
		case e.Value == nil:
			delete(m, string(e.Key))
		default:
			m[string(e.Key)] = string(e.Value)
		}
	}
}

type print [sha256.Size]byte

// fingerprint of what a journal holds, without its own keys.
func fingerprint(read func(Table, func(k, v []byte) error) error) (p print, err error) {
	var b []byte
	for _, t := range tables {
		b = append(b, t...)
		err = errors.Join(err, read(t, func(k, v []byte) error {
			if t == Meta && (string(k) == string(sumKey) || string(k) == string(versionKey)) {
				return nil
			}
			b = binary.BigEndian.AppendUint32(b, uint32(len(k)))
			b = binary.BigEndian.AppendUint32(append(b, k...), uint32(len(v)))
			b = append(b, v...)
			return nil
		}))
	}
	return sha256.Sum256(b), err
}

func (c contents) fingerprint() print {
	p, _ := fingerprint(func(t Table, f func(k, v []byte) error) error {
		for _, k := range slices.Sorted(maps.Keys(c[t])) {
			_ = f([]byte(k), []byte(c[t][k]))
		}
		return nil
	})
	return p
}

// history is a journal's life.
type history struct {
	dir    string
	steps  []step
	states []contents
	index  map[print]int // of states
	counts map[string]int
	opened int
}

func newHistory(t *testing.T) *history {
	dir := t.TempDir()
	if d, err := os.MkdirTemp("/dev/shm", "journal"); err == nil { // nothing is synced there
		dir = d
		t.Cleanup(func() { _ = os.RemoveAll(d) })
	}
	h := &history{dir: dir, index: map[print]int{}, counts: map[string]int{}}
	h.remember(contents{Meta: {}, Apps: {}, Conns: {}, Spool: {}})
	return h
}

func (h *history) remember(c contents) {
	h.index[c.fingerprint()] = len(h.states)
	h.states = append(h.states, c)
}

// live writes n transactions, and opens the journal anew now and then.
func (h *history) live(t *testing.T, r *rand.Rand, n int) {
	path := filepath.Join(h.dir, "life.db")
	j, err := Open(path)
	must(t, err)
	for i := 1; i <= n; i++ {
		now := len(h.states) - 1
		if i%12 == 0 {
			must(t, j.Close())
			db, _, err := openBolt(path)
			must(t, err)
			j = &Journal{db: db}
			s := recorded(t, path, db, func() error { return j.begin(path) })
			s.from, s.to = now, now
			h.steps = append(h.steps, s)
		}
		entries := transaction(r, i)
		s := recorded(t, path, j.db, func() error { return j.Apply(entries) })
		s.from, s.to = now, now+1
		h.steps = append(h.steps, s)
		next := h.states[now].clone()
		next.apply(entries)
		h.remember(next)
	}
	must(t, j.Close())
}

// transaction is like those of a node; each table says which it was.
func transaction(r *rand.Rand, n int) []Entry {
	conn := func() []byte {
		b := sha256.Sum256([]byte{byte(r.IntN(250)), 'c'})
		return append([]byte{37}, append(b[:], "port."[:4]...)...)
	}
	value := func(size int) []byte {
		v := fmt.Appendf(nil, "transaction %d ", n)
		for len(v) < size {
			v = append(v, byte(r.Uint32()))
		}
		return v
	}
	var out []Entry
	for _, t := range tables {
		out = append(out, Entry{Table: t, Key: []byte("transaction"), Value: value(0)})
	}
	for range r.IntN(3) {
		out = append(out, Entry{Table: Apps, Key: []byte{'a', byte(r.IntN(3))}, Value: value(150)})
	}
	for range []int{1, 6, 60}[r.IntN(3)] {
		out = append(out, Entry{Table: Conns, Key: conn(), Value: value(150 + r.IntN(100))})
	}
	for range r.IntN(12) {
		out = append(out, Entry{Table: Conns, Key: conn()})
	}
	for range r.IntN(6) {
		c := conn()
		if r.IntN(2) == 0 {
			out = append(out, Entry{Table: Spool, Key: c, Prefix: true})
		}
		for i := range r.IntN(4) {
			out = append(out, Entry{Table: Spool, Key: append(bytes.Clone(c), byte(n), byte(i)), Value: value(1 + r.IntN(1448))})
		}
		if r.IntN(12) == 0 { // more than a page
			out = append(out, Entry{Table: Spool, Key: append(bytes.Clone(c), byte(n)), Value: value(9000)})
		}
	}
	return out
}

// try opens what a failure has left. It must be a state from first to last and go on
// from there, or, where that is allowed, damage.
func (h *history) try(t *testing.T, kind string, b []byte, first, last int, mayBeDamaged bool) {
	t.Helper()
	path := filepath.Join(h.dir, "cut.db")
	must(t, os.WriteFile(path, b, 0o600))
	h.counts[kind]++
	j, err := Open(path)
	if err != nil {
		h.counts[kind+": damaged"]++
		if !mayBeDamaged || !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s, states %d to %d: %v", kind, first, last, err)
		}
		if !bytes.Equal(content(t, path), b) {
			t.Fatalf("%s: a damaged journal was changed", kind)
		}
		return
	}
	defer func() { _ = j.Close() }()
	h.goesOn(t, kind, j, path, first, last)
}

// goesOn tells whether j holds one of the states, and can be written and read again.
func (h *history) goesOn(t *testing.T, kind string, j *Journal, path string, first, last int) {
	t.Helper()
	p, err := fingerprint(j.Read)
	must(t, err)
	state, known := h.index[p]
	if !known || state < first || state > last {
		said := ""
		for _, table := range tables {
			said += fmt.Sprintf(" %s: %q", table, read(t, j, table)["transaction"])
		}
		t.Fatalf("%s: state %d, known %v, not one of %d to %d:%s", kind, state, known, first, last, said)
	}
	h.counts[fmt.Sprintf("%s: %d before the last", kind, min(last-state, 2))]++
	more := []Entry{{Table: Apps, Key: []byte("later"), Value: []byte("1")}, {Table: Spool, Key: []byte{37}, Prefix: true}, {Table: Conns, Key: []byte("later"), Value: make([]byte, 5000)}}
	must(t, j.Apply(more))
	if h.opened++; h.opened%8 != 0 {
		return
	}
	must(t, j.Close())
	again, err := Open(path)
	must(t, err)
	p, err = fingerprint(again.Read)
	must(t, errors.Join(err, again.Close()))
	want := h.states[state].clone()
	if want.apply(more); p != want.fingerprint() {
		t.Fatalf("%s: state %d does not go on", kind, state)
	}
}

// log says what was tried.
func (h *history) log(t *testing.T) {
	total := 0
	for _, k := range slices.Sorted(maps.Keys(h.counts)) {
		if !bytes.Contains([]byte(k), []byte(": ")) {
			total += h.counts[k]
		}
		t.Logf("%6d %s", h.counts[k], k)
	}
	t.Logf("%6d cuts of %d transactions, files of %d to %d octets", total, len(h.steps), len(h.steps[0].before), h.steps[len(h.steps)-1].size)
}
