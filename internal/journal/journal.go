// Package journal keeps what the filter must not forget when its process ends:
// key and value pairs in named tables of one file, written in transactions
// that are on the disk when they return (go.etcd.io/bbolt). It knows nothing
// of what the values mean.
package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// Version of the format of the file: its tables and keys, and the encoding of
// their values. 2: with a sum of the contents.
const (
	Version = 2
	oldest  = 1 // that is read, and brought up to Version
)

// ErrDamaged marks a file that cannot be read as a journal. It is left as it is.
var ErrDamaged = errors.New("the journal is damaged")

// Table names one of the tables.
type Table string

// Tables.
const (
	Meta  Table = "meta"
	Apps  Table = "apps"  // by name
	Conns Table = "conns" // by addresses
	Spool Table = "spool" // by addresses and order
)

var tables = []Table{Meta, Apps, Conns, Spool}

// Entry is one change: a nil Value deletes the key, with Prefix all keys that
// begin with Key.
type Entry struct {
	Table  Table
	Key    []byte
	Value  []byte
	Prefix bool
}

// Journal is an open file. Its methods may be called from one goroutine at a
// time.
type Journal struct {
	db   *bolt.DB
	path string
	sum  sum
}

var versionKey = []byte("version")

// Open opens or creates the file at path. Errors: ErrDamaged; a file of
// another version; one that another process holds, after a second.
func Open(path string) (*Journal, error) {
	for {
		fi, err := os.Stat(path)
		switch {
		case err == nil && fi.Size() == 0:
			return nil, damaged(path, errors.New("it is empty"))
		case err == nil:
			return openOld(path)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		if j, err := create(path); j != nil || err != nil {
			return j, err
		}
	}
}

// openOld opens a file that is there.
func openOld(path string) (j *Journal, err error) {
	var db *bolt.DB
	undo := func() error { return nil }
	defer func() { // bbolt panics on pages that make no sense
		if r := recover(); r != nil {
			j, err = nil, damaged(path, fmt.Errorf("%v", r))
			if db != nil {
				err = errors.Join(err, undo(), db.Close())
			}
		}
	}()
	db, undo, err = openBolt(path)
	if err != nil {
		return nil, err
	}
	j = &Journal{db: db, path: path}
	if err := j.begin(path); err != nil {
		return nil, errors.Join(err, undo(), db.Close())
	}
	return j, nil
}

// openBolt opens a file whose pages make sense. undo is for one that turns out to be
// damaged.
func openBolt(path string) (db *bolt.DB, undo func() error, err error) {
	if err := lookAt(path); err != nil {
		return nil, nil, err
	}
	db, err = bolt.Open(path, 0o600, options(nil))
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, nil, held(path)
	case isSystem(err):
		return nil, nil, fmt.Errorf("journal %s: %w", path, err)
	case err != nil:
		return nil, nil, damaged(path, err)
	}
	if undo, err = mendHeader(path, db.Info().PageSize); err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	return db, undo, nil
}

func options(openFile func(string, int, os.FileMode) (*os.File, error)) *bolt.Options {
	return &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType, OpenFile: openFile}
}

func held(path string) error {
	return fmt.Errorf("journal %s is held by another process; does another filter run?", path)
}

// isSystem tells whether err comes from the operating system, not from what
// the file holds.
func isSystem(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno)
}

func damaged(path string, err error) error {
	return fmt.Errorf("%w: %s: %w; move it away to go on without what was held", ErrDamaged, path, err)
}

// begin makes the tables of a new file and looks at the version, pages and sum of
// an old one.
func (j *Journal) begin(path string) error {
	return j.db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket([]byte(Meta))
		if meta == nil {
			if n, _ := tx.Cursor().First(); n != nil {
				return damaged(path, errors.New("it holds something else"))
			}
			return upgrade(tx)
		}
		v := meta.Get(versionKey)
		if len(v) != 4 || tx.Bucket([]byte(Apps)) == nil || tx.Bucket([]byte(Conns)) == nil {
			return damaged(path, errors.New("a table is missing"))
		}
		n := binary.BigEndian.Uint32(v)
		if n == Version && tx.Bucket([]byte(Spool)) == nil { // younger than the first format
			return damaged(path, errors.New("a table is missing"))
		}
		if n < oldest || n > Version {
			return fmt.Errorf("journal %s has format %d, this filter reads %d; use the filter that wrote it, or move it away to go on without what was held", path, n, Version)
		}
		var first error
		for err := range tx.Check() { // to its end: it goes on in a goroutine that must not outlive the file
			if first == nil {
				first = damaged(path, err)
			}
		}
		if first != nil {
			return first
		}
		if n < Version {
			if err := upgrade(tx); err != nil {
				return damaged(path, err)
			}
			return nil
		}
		var is, said sum
		if err := is.all(tx); err != nil {
			return err
		}
		if !said.read(meta) || is.now != said.now {
			return damaged(path, errors.New("what it holds was not written together"))
		}
		return nil
	})
}

// upgrade makes a file without tables, or of an older version, one of this version.
func upgrade(tx *bolt.Tx) error {
	for _, t := range tables {
		if _, err := tx.CreateBucketIfNotExists([]byte(t)); err != nil {
			return err
		}
	}
	meta := tx.Bucket([]byte(Meta))
	if err := meta.Put(versionKey, binary.BigEndian.AppendUint32(nil, Version)); err != nil {
		return err
	}
	var s sum
	if err := s.all(tx); err != nil {
		return err
	}
	return s.write(meta)
}

// Apply writes the entries, in their order, in one transaction. When it
// returns without an error they are on the disk.
func (j *Journal) Apply(entries []Entry) error {
	return j.db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket([]byte(Meta))
		s := &j.sum
		s.read(meta) // what was in memory may be of a transaction that failed
		var c *bolt.Cursor
		for i := range entries {
			e := &entries[i]
			if i == 0 || e.Table != entries[i-1].Table {
				c = tx.Bucket([]byte(e.Table)).Cursor()
			}
			if err := e.apply(c, s); err != nil {
				return fmt.Errorf("journal: %w", err)
			}
		}
		return s.write(meta)
	})
}

// apply does what e says to the table of c.
func (e *Entry) apply(c *bolt.Cursor, s *sum) error {
	if e.Value == nil && e.Prefix {
		return e.deleteAll(c, s)
	}
	k, v := c.Seek(e.Key)
	if k != nil && bytes.Equal(k, e.Key) {
		s.change(e.Table, k, v)
		if e.Value == nil {
			return c.Delete()
		}
	}
	if e.Value == nil {
		return nil
	}
	s.change(e.Table, e.Key, e.Value)
	return c.Bucket().Put(e.Key, e.Value)
}

// deleteAll deletes every key that begins with that of e.
func (e *Entry) deleteAll(c *bolt.Cursor, s *sum) error {
	for k, v := c.Seek(e.Key); bytes.HasPrefix(k, e.Key); k, v = c.Seek(e.Key) {
		s.change(e.Table, k, v)
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}

// Read calls f for every entry of a table. Key and value are f's only until it
// returns.
func (j *Journal) Read(t Table, f func(key, value []byte) error) error {
	return j.db.View(func(tx *bolt.Tx) error { return tx.Bucket([]byte(t)).ForEach(f) })
}

// Path is that of the file.
func (j *Journal) Path() string { return j.path }

// Close lets go of the file.
func (j *Journal) Close() error { return j.db.Close() }
