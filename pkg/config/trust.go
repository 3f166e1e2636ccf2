package config

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxLinks bounds the symbolic links on one path, as the kernel does
// (path_resolution(7)).
const maxLinks = 40

// CheckTrusted tells whether only root can change what path leads to. Every
// directory on the way, every symbolic link and the file itself must belong to
// root, and others, or a group other than root's, must not be able to write
// them; directories with the sticky bit pass, because there nobody can replace what belongs to root.
//
// Whoever executes as root what a file says, or the file itself, asks this
// first. The error names what to change. It wraps fs.ErrNotExist when
// something on the path is missing.
func CheckTrusted(path string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	todo := strings.Split(abs, "/")
	at := "/"
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			at = filepath.Dir(at)
			continue
		}
		at = filepath.Join(at, name)
		st, err := os.Lstat(at)
		if err != nil {
			return fmt.Errorf("cannot tell who may write %s: %w", path, err)
		}
		if err := trusted(at, st); err != nil {
			return err
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%s goes through more than %d symbolic links", path, maxLinks)
		}
		target, err := os.Readlink(at)
		if err != nil {
			return fmt.Errorf("cannot tell who may write %s: %w", path, err)
		}
		at = filepath.Dir(at)
		if filepath.IsAbs(target) {
			at = "/"
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return nil
}

// trusted checks owner and mode of one file, directory or link.
func trusted(path string, st fs.FileInfo) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: its owner is not known", path)
	}
	if sys.Uid != 0 {
		return fmt.Errorf("%s belongs to user %d, but root executes what it says; run: chown root %s", path, sys.Uid, path)
	}
	// A link's own mode means nothing.
	if st.Mode()&fs.ModeSymlink != 0 || st.IsDir() && st.Mode()&fs.ModeSticky != 0 {
		return nil
	}
	mask := fs.FileMode(0o022)
	if sys.Gid == 0 {
		mask = 0o002
	}
	if st.Mode().Perm()&mask != 0 {
		return fmt.Errorf("%s can be written by others than root (mode %04o), but root executes what it says; run: chmod go-w %s",
			path, st.Mode().Perm(), path)
	}
	return nil
}
