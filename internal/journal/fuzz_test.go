package journal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// FuzzDamage overwrites octets of a journal at any place. It is named as damaged,
// or opens and holds what it held or other octets, and can be written.
func FuzzDamage(f *testing.F) {
	path := filepath.Join(f.TempDir(), "journal.db")
	j, err := Open(path)
	if err != nil {
		f.Fatal(err)
	}
	for i := range 200 {
		if err := j.Apply([]Entry{{Table: Conns, Key: fmt.Appendf(nil, "connection %d", i), Value: bytes.Repeat([]byte{byte(i)}, 100)}, {Table: Apps, Key: []byte("a"), Value: []byte{1}}}); err != nil {
			f.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	for page := range len(whole) / 4096 {
		f.Add(uint32(page*4096+8), []byte{0xff, 0xff}, uint32(0))
		f.Add(uint32(page*4096+10), []byte{0xff, 0x7f, 0xff, 0xff}, uint32(0))
		f.Add(uint32(page*4096+20), []byte{0xff, 0xff, 0xff, 0x7f, 0xff}, uint32(0))
	}
	f.Add(uint32(0), []byte{}, uint32(4096))
	f.Add(uint32(0), []byte{}, uint32(100))
	n := 0
	f.Fuzz(func(t *testing.T, at uint32, octets []byte, cut uint32) {
		n++
		path := fmt.Sprintf("%s.%d", path, n)
		defer os.Remove(path)
		b := bytes.Clone(whole)
		if len(b) > int(cut)+1 {
			b = b[:len(b)-int(cut)]
		}
		copy(b[int(at)%len(b):], octets)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := Open(path)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !bytes.Contains([]byte(err.Error()), []byte("format")) {
				t.Fatal(err)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
				t.Fatalf("a damaged journal was changed: %v", err)
			}
			return
		}
		for _, table := range []Table{Meta, Apps, Conns, Spool} {
			if err := j.Read(table, func(k, v []byte) error { _ = bytes.Clone(v); return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(j.Apply([]Entry{{Table: Apps, Key: []byte("b"), Value: []byte{2}}}), j.Close()); err != nil {
			t.Fatal(err)
		}
	})
}
