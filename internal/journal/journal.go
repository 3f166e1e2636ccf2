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
// their values.
const Version = 1

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
	db *bolt.DB
}

var versionKey = []byte("version")

// Open opens or creates the file at path. Errors: ErrDamaged; a file of
// another version; one that another process holds, after a second.
func Open(path string) (j *Journal, err error) {
	var db *bolt.DB
	defer func() { // bbolt panics on pages that make no sense
		if r := recover(); r != nil {
			j, err = nil, damaged(path, fmt.Errorf("%v", r))
			if db != nil {
				err = errors.Join(err, db.Close())
			}
		}
	}()
	if fi, serr := os.Stat(path); serr == nil && fi.Size() == 0 {
		return nil, damaged(path, errors.New("it is empty"))
	} else if serr != nil && !errors.Is(serr, fs.ErrNotExist) {
		return nil, serr
	}
	if err := lookAt(path); err != nil {
		return nil, err
	}
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, held(path)
	case isSystem(err):
		return nil, fmt.Errorf("journal %s: %w", path, err)
	case err != nil:
		return nil, damaged(path, err)
	}
	j = &Journal{db: db}
	if err := j.begin(path); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return j, nil
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

// begin makes the tables of a new file and looks at the version and pages of
// an old one.
func (j *Journal) begin(path string) error {
	return j.db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket([]byte(Meta))
		if meta == nil {
			if n, _ := tx.Cursor().First(); n != nil {
				return damaged(path, errors.New("it holds something else"))
			}
			for _, t := range []Table{Meta, Apps, Conns, Spool} {
				if _, err := tx.CreateBucket([]byte(t)); err != nil {
					return err
				}
			}
			return tx.Bucket([]byte(Meta)).Put(versionKey, binary.BigEndian.AppendUint32(nil, Version))
		}
		v := meta.Get(versionKey)
		if len(v) != 4 || tx.Bucket([]byte(Apps)) == nil || tx.Bucket([]byte(Conns)) == nil {
			return damaged(path, errors.New("a table is missing"))
		}
		if n := binary.BigEndian.Uint32(v); n != Version {
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
		_, err := tx.CreateBucketIfNotExists([]byte(Spool)) // younger than the format
		return err
	})
}

// Apply writes the entries, in their order, in one transaction. When it
// returns without an error they are on the disk.
func (j *Journal) Apply(entries []Entry) error {
	return j.db.Update(func(tx *bolt.Tx) error {
		for i := range entries {
			e := &entries[i]
			b := tx.Bucket([]byte(e.Table))
			var err error
			switch {
			case e.Value == nil && e.Prefix:
				err = deleteAll(b, e.Key)
			case e.Value == nil:
				err = b.Delete(e.Key)
			default:
				err = b.Put(e.Key, e.Value)
			}
			if err != nil {
				return fmt.Errorf("journal: %w", err)
			}
		}
		return nil
	})
}

// deleteAll deletes every key that begins with prefix.
func deleteAll(b *bolt.Bucket, prefix []byte) error {
	c := b.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Seek(prefix) {
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

// Close lets go of the file.
func (j *Journal) Close() error { return j.db.Close() }
