package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// create makes a journal under another name and gives it its own when all of it is
// on the disk: whenever the power fails there is no file, or a whole one. Neither
// journal nor error: another process was quicker.
func create(path string) (*Journal, error) {
	name := path + ".new" // also what an earlier attempt has left
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	j, err := fill(f, path)
	if j == nil {
		_ = f.Close() // bbolt may have done it
	}
	return j, err
}

// fill makes f, which is beside path, the journal at path.
func fill(f *os.File, path string) (*Journal, error) {
	if err := lock(f, unix.LOCK_EX, time.Second); err != nil {
		return nil, err
	}
	if there, err := ours(f, path); !there || err != nil {
		return nil, err
	}
	if err := f.Truncate(0); err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	db, err := bolt.Open(f.Name(), 0o600, options(func(string, int, os.FileMode) (*os.File, error) { return f, nil }))
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	j := &Journal{db: db, path: path}
	err = j.begin(path)
	if err == nil {
		err = errors.Join(os.Rename(f.Name(), path), syncDir(filepath.Dir(path)), syncDir(filepath.Dir(filepath.Dir(path))))
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return j, nil
}

// ours tells whether f, which is locked, still has its name, and path is to be made.
// Another process may have renamed it before it let go of the lock.
func ours(f *os.File, path string) (bool, error) {
	named, err := os.Stat(f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	st, err := f.Stat()
	if err != nil || !os.SameFile(named, st) {
		return false, err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	return false, os.Remove(f.Name())
}

// syncDir has the names in a directory on the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
