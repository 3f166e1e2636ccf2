package journal

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// written is a journal with a list of free pages, and its path.
func written(t *testing.T) (b []byte, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "journal.db")
	j, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if err := j.Apply([]Entry{{Table: Conns, Key: []byte{byte(i), byte(i >> 8)}, Value: make([]byte, 100)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	return b, path
}

// What only bbolt's own check finds is looked for to the end: nothing of it goes
// on when the file is closed.
func TestCheckEnds(t *testing.T) {
	b, path := written(t)
	m, err := newest(b)
	if err != nil {
		t.Fatal(err)
	}
	count := b[int(m.freelist)*m.pageSize+10:]
	if ne.Uint16(count) < 2 {
		t.Fatalf("%d free pages", ne.Uint16(count))
	}
	ne.PutUint16(count, 0) // all of them are lost
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	if _, err := Open(path); !errors.Is(err, ErrDamaged) {
		t.Fatalf("opened: %v", err)
	}
	goleak.VerifyNone(t, before)
}

// Each of these would have bbolt read outside of what is mapped, or without end.
func TestPages(t *testing.T) {
	whole, path := written(t)
	m, err := newest(whole)
	if err != nil {
		t.Fatal(err)
	}
	root := int(m.root) * m.pageSize
	value, bucket := 0, 0
	for i := range int(ne.Uint16(whole[root+10:])) { // the bucket that has pages of its own
		e := root + pageHeader + i*element
		if v := e + int(ne.Uint32(whole[e+4:])+ne.Uint32(whole[e+8:])); ne.Uint64(whole[v:]) != 0 {
			value, bucket = v, int(ne.Uint64(whole[v:]))*m.pageSize
		}
	}
	if bucket == 0 || ne.Uint16(whole[bucket+8:]) != branchPage {
		t.Fatalf("no bucket with a branch page")
	}
	for name, spoil := range map[string]func(b []byte){
		"a page behind the end":      func(b []byte) { ne.PutUint64(b[bucket+pageHeader+8:], 1<<40) },
		"a page above itself":        func(b []byte) { ne.PutUint64(b[bucket+pageHeader+8:], uint64(bucket/m.pageSize)) },
		"a meta page in the tree":    func(b []byte) { ne.PutUint64(b[bucket+pageHeader+8:], 1) },
		"a bucket nowhere":           func(b []byte) { ne.PutUint64(b[value:], 1<<62) },
		"a key outside":              func(b []byte) { ne.PutUint32(b[bucket+pageHeader+4:], 1<<31) },
		"an element outside":         func(b []byte) { ne.PutUint32(b[root+pageHeader+12:], 1<<31) },
		"more elements than octets":  func(b []byte) { ne.PutUint16(b[bucket+10:], 0xffff) },
		"a branch without elements":  func(b []byte) { ne.PutUint16(b[bucket+10:], 0) },
		"an overflow behind the end": func(b []byte) { ne.PutUint32(b[root+12:], 1<<31) },
		"another number":             func(b []byte) { ne.PutUint64(b[root:], 77) },
		"no type":                    func(b []byte) { ne.PutUint16(b[root+8:], 0) },
		"no list of free pages":      func(b []byte) { ne.PutUint16(b[int(m.freelist)*m.pageSize+8:], leafPage) },
		"a long list of free pages":  func(b []byte) { ne.PutUint16(b[int(m.freelist)*m.pageSize+10:], 0xfffe) },
		"a free page in the tree":    func(b []byte) { ne.PutUint64(b[int(m.freelist)*m.pageSize+pageHeader:], m.root) },
		"both meta pages":            func(b []byte) { b[20], b[m.pageSize+20] = 7, 7 },
	} {
		b := append([]byte(nil), whole...)
		spoil(b)
		if err := checkPages(b); err == nil {
			t.Errorf("%s: taken for right", name)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: opened: %v", name, err)
		}
	}
	if err := checkPages(whole); err != nil {
		t.Error(err)
	}
	if err := checkPages(whole[:len(whole)-m.pageSize*(len(whole)/m.pageSize-int(m.high))-1]); err == nil {
		t.Error("one that is cut short was taken for right")
	}
}
