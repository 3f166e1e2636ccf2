package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	bolt "go.etcd.io/bbolt"
)

func open(t *testing.T, path string) *Journal {
	t.Helper()
	j, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j
}

func read(t *testing.T, j *Journal, table Table) map[string]string {
	t.Helper()
	m := map[string]string{}
	if err := j.Read(table, func(k, v []byte) error { m[string(k)] = string(v); return nil }); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestApply(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	j := open(t, path)
	err := j.Apply([]Entry{
		{Table: Apps, Key: []byte("a"), Value: []byte("1")},
		{Table: Conns, Key: []byte("x"), Value: []byte("1")},
		{Table: Conns, Key: []byte("y"), Value: []byte("1")},
		{Table: Conns, Key: []byte("x"), Value: nil},
		{Table: Conns, Key: []byte("not there"), Value: nil},
		{Table: Apps, Key: []byte("a"), Value: []byte("2")}, // the last one counts
		{Table: Spool, Key: []byte("a1"), Value: []byte("1")},
		{Table: Spool, Key: []byte("a2"), Value: []byte("1")},
		{Table: Spool, Key: []byte("b1"), Value: []byte("1")},
		{Table: Spool, Key: []byte("a"), Prefix: true},
		{Table: Spool, Key: []byte("a3"), Value: []byte("1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = open(t, path)
	if got := fmt.Sprint(read(t, j, Apps), read(t, j, Conns), read(t, j, Spool)); got != "map[a:2] map[y:1] map[a3:1 b1:1]" {
		t.Errorf("read back: %s", got)
	}
}

// A batch with an impossible entry leaves nothing of it behind.
func TestApplyIsOne(t *testing.T) {
	j := open(t, filepath.Join(t.TempDir(), "journal.db"))
	if err := j.Apply([]Entry{{Table: Apps, Key: []byte("a"), Value: []byte("1")}, {Table: Apps, Key: nil, Value: []byte("no key")}}); err == nil {
		t.Error("an entry without a key was taken")
	}
	if m := read(t, j, Apps); len(m) != 0 {
		t.Errorf("half a batch was written: %v", m)
	}
}

func TestHeldByAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	open(t, path)
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "does another filter run?") || errors.Is(err, ErrDamaged) {
		t.Errorf("opened twice: %v", err)
	}
}

func TestVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	j := open(t, path)
	if err := j.Apply([]Entry{{Table: Meta, Key: versionKey, Value: binary.BigEndian.AppendUint32(nil, Version+1)}}); err != nil {
		t.Fatal(err)
	}
	must(t, j.Close())
	_, err := Open(path)
	if err == nil || !strings.Contains(err.Error(), "has format 3, this filter reads 2") || errors.Is(err, ErrDamaged) {
		t.Errorf("another version: %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever is not a whole journal is named, and left as it is.
func TestDamage(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "journal.db")
	j := open(t, whole)
	var entries []Entry
	for i := range 2000 {
		entries = append(entries, Entry{Table: Conns, Key: fmt.Appendf(nil, "%06d", i), Value: bytes.Repeat([]byte{byte(i)}, 100)})
	}
	must(t, j.Apply(entries))
	must(t, j.Close())
	good, err := os.ReadFile(whole)
	must(t, err)
	for name, spoil := range map[string]func([]byte) []byte{
		"empty":         func([]byte) []byte { return nil },
		"text":          func([]byte) []byte { return []byte("this is not a journal\n") },
		"cut in half":   func(b []byte) []byte { return b[:len(b)/2] },
		"one page":      func(b []byte) []byte { return b[:os.Getpagesize()] },
		"both metas":    func(b []byte) []byte { clear(b[16:80]); p := os.Getpagesize(); clear(b[p+16 : p+80]); return b },
		"no spool":      func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("spool"), []byte("spoon")) },
		"no meta":       func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("meta"), []byte("mete")) },
		"another value": func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("\xcd\xcd\xcd"), []byte("\xcd\xcd\xce")) },
		"pages cleared": func(b []byte) []byte { clear(b[3*os.Getpagesize():]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "journal.db")
			bad := spoil(bytes.Clone(good))
			must(t, os.WriteFile(path, bad, 0o600))
			j, err := Open(path)
			if err == nil {
				_ = j.Close()
			}
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "move it away") {
				t.Errorf("opened, or no clear error: %v", err)
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
				t.Errorf("the file was changed: %v", err)
			}
		})
	}
}

// A file of somebody else's is not taken over.
func TestForeignFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	db, err := bolt.Open(path, 0o600, nil)
	must(t, err)
	must(t, db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket([]byte("something"))
		return err
	}))
	must(t, db.Close())
	if _, err := Open(path); !errors.Is(err, ErrDamaged) {
		t.Errorf("opened: %v", err)
	}
}

// What clients have sent lies in it: it is its owner's alone.
func TestMode(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "journal.db")
	j, err := Open(path)
	must(t, err)
	defer j.Close()
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}
