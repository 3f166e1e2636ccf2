package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Files of an agent that is root. state_dir may belong to the unprivileged user
// of the filter, who must not make the agent write elsewhere by a link or
// believe what it finds there; logs may lie in a directory of the application's
// user. So the agent works inside directories below state_dir that belong to
// it alone, and follows no link on the way to a log but root's own.

const (
	recordsDir = "agent" // below state_dir
	logsDir    = "log"
)

// withPrivate calls f with a directory of the agent's own below state_dir. A
// missing one is made where mode is not 0, and is fs.ErrNotExist otherwise.
func withPrivate(stateDir, name string, mode os.FileMode, f func(*os.Root) error) error {
	if mode != 0 {
		if err := os.MkdirAll(stateDir, 0o700); err != nil {
			return err
		}
	}
	state, err := os.OpenRoot(stateDir)
	if err != nil {
		return err
	}
	defer state.Close()
	if mode != 0 {
		if err := state.Mkdir(name, mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	path := filepath.Join(stateDir, name)
	there, err := state.Lstat(name)
	if err != nil {
		return err
	}
	if !there.IsDir() {
		return fmt.Errorf("%s is no directory (%s), and the agent keeps its files there; remove it", path, there.Mode().Type())
	}
	dir, err := state.OpenRoot(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	opened, err := dir.Stat(".")
	if err != nil {
		return err
	}
	if !os.SameFile(there, opened) {
		return fmt.Errorf("%s was exchanged while it was opened; somebody works against the agent", path)
	}
	if err := ours(path, opened); err != nil {
		return err
	}
	return f(dir)
}

// ours tells why a file or directory is not the agent's own, or root's.
func ours(path string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	switch {
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, and the agent, which trusts what it finds there, is user %d; move it away, or if its contents are the agent's: chown -R %[3]d %[1]s",
			path, st.Uid, os.Geteuid())
	case fi.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be written by others (mode %04o), and the agent trusts what it finds there; move it away, or if its contents are the agent's: chmod go-w %[1]s",
			path, fi.Mode().Perm())
	}
	return nil
}

// checkRecords tells why an agent cannot keep its records. Their directory is
// made as soon as state_dir is there, before somebody else makes it.
func checkRecords(stateDir string) error {
	if _, err := os.Stat(stateDir); errors.Is(err, os.ErrNotExist) {
		return nil // the filter makes it, as its own
	}
	return withPrivate(stateDir, recordsDir, 0o700, func(*os.Root) error { return nil })
}

// readPrivate reads a record of the agent's.
func readPrivate(stateDir, name string) (b []byte, err error) {
	err = withPrivate(stateDir, recordsDir, 0, func(dir *os.Root) error {
		path := filepath.Join(stateDir, recordsDir, name)
		fi, err := dir.Lstat(name)
		if err != nil {
			return err
		}
		if !fi.Mode().IsRegular() {
			return fmt.Errorf("%s is no regular file (%s); remove it", path, fi.Mode().Type())
		}
		if err := ours(path, fi); err != nil {
			return err
		}
		b, err = dir.ReadFile(name)
		return err
	})
	return b, err
}

// writePrivate replaces a record of the agent's.
func writePrivate(stateDir, name string, b []byte) error {
	return withPrivate(stateDir, recordsDir, 0o700, func(dir *os.Root) error { return writeAtomic(dir, name, b, 0o600) })
}

// removePrivate removes a record of the agent's; one that is not there is no error.
func removePrivate(stateDir, name string) error {
	err := withPrivate(stateDir, recordsDir, 0, func(dir *os.Root) error {
		if _, err := dir.Lstat(name); err != nil { // a read-only disk would refuse before it looks
			return err
		}
		return dir.Remove(name)
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// writeAtomic replaces a file below dir as a whole and durably.
func writeAtomic(dir *os.Root, name string, b []byte, mode os.FileMode) error {
	temp := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+"."+randomHex(8))
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer dir.Remove(temp) // gone already when all went well
	if err := errors.Join(writeAndSync(f, b, mode), f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(temp, name); err != nil {
		return err
	}
	return syncDir(dir, filepath.Dir(name))
}

func writeAndSync(f *os.File, b []byte, mode os.FileMode) error {
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(dir *os.Root, name string) error {
	d, err := dir.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// What a log is opened with. O_NONBLOCK: a pipe in its place would be waited for.
const logFlags = os.O_WRONLY | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK

// openPrivateLog opens a log in the agent's own directory for them.
func openPrivateLog(stateDir, name string) (f *os.File, err error) {
	err = withPrivate(stateDir, logsDir, 0o750, func(dir *os.Root) error {
		if fi, lerr := dir.Lstat(name); lerr == nil && !fi.Mode().IsRegular() {
			return fmt.Errorf("%s is no file; remove it", filepath.Join(stateDir, logsDir, name))
		}
		f, err = dir.OpenFile(name, logFlags, 0o640)
		return err
	})
	return f, err
}

// maxLinks bounds the symbolic links on one path, as the kernel does
// (path_resolution(7)).
const maxLinks = 40

// openLogAt opens a log anywhere and makes missing directories. It follows
// symbolic links of root's and of the agent's user, none of other users, who
// would choose where root writes; and none at the end.
func openLogAt(path string) (*os.File, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	dir, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(dir) }()
	todo := strings.Split(filepath.Dir(abs), "/")
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == "" || name == "." {
			continue
		}
		const walk = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
		next, err := unix.Openat(dir, name, walk, 0)
		if errors.Is(err, unix.ENOENT) {
			if err = unix.Mkdirat(dir, name, 0o750); err == nil || errors.Is(err, unix.EEXIST) {
				next, err = unix.Openat(dir, name, walk, 0)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s on the way to %s: %w", name, path, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(next, &st); err != nil {
			return nil, errors.Join(err, unix.Close(next))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			_ = unix.Close(dir)
			dir = next
			continue
		}
		target, err := linkTarget(next, &st)
		_ = unix.Close(next)
		if links++; links > maxLinks {
			err = unix.ELOOP
		}
		if err != nil {
			return nil, fmt.Errorf("%s on the way to %s: %w", name, path, err)
		}
		if filepath.IsAbs(target) {
			root, err := unix.Openat(dir, "/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			_ = unix.Close(dir)
			dir = root
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	fd, err := unix.Openat(dir, filepath.Base(abs), logFlags|unix.O_CLOEXEC, 0o640)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// linkTarget reads an open symbolic link, if whoever made it may lead us.
func linkTarget(link int, st *unix.Stat_t) (string, error) {
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return "", fmt.Errorf("it is a symbolic link of user %d, who would choose where the agent writes; name the place itself in log_file", st.Uid)
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(link, "", b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// plainLog tells why an open file is none to write a log to.
func plainLog(f *os.File) error {
	fi, err := f.Stat()
	switch {
	case err != nil:
		return err
	case fi.Mode().Type()&^(os.ModeDevice|os.ModeCharDevice) != 0:
		return fmt.Errorf("%s is no file; remove it", f.Name())
	case fi.Mode().IsRegular() && fi.Sys().(*syscall.Stat_t).Nlink > 1:
		return fmt.Errorf("%s has more than one name, it may be somebody else's file; remove it", f.Name())
	}
	return nil
}
