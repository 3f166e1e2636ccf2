package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	socketMode = 0o660
	dirMode    = 0o750
	maxPath    = 107 // sizeof(sockaddr_un.sun_path) - 1, unix(7)
)

type listener struct {
	*net.UnixListener
	warning string
}

// Listen opens the Unix socket at path: mode 0660, owned by the named group
// when there is one. A missing directory is made with mode 0750 and the same
// group. A socket left behind by a daemon that died is replaced; one that
// somebody answers on is an error, and so is anything at path that is no
// socket. When the group is missing or cannot be given, the socket is left to
// the daemon's own user (and root), and Warning says so.
func Listen(path, group string) (net.Listener, error) {
	if path == "" {
		return nil, errors.New("the socket has no path: set control_socket and agent_socket in the node file")
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("socket %s: the path has %d bytes and the kernel allows %d: choose a shorter one", path, len(path), maxPath)
	}
	gid, warning := -1, ""
	if group != "" {
		if n, err := lookupGroup(group); err != nil {
			warning = fmt.Sprintf("socket %s: %v: only root may use it", path, err)
		} else {
			gid = int(n)
		}
	}
	dir := filepath.Dir(path)
	if err := makeDir(dir, gid); err != nil {
		return nil, err
	}
	// Two daemons that start at once would each see the other's socket as
	// stale; a lock on the directory lets one finish first.
	unlock := lockDir(dir)
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	refused, err := giveTo(path, gid)
	if refused != nil {
		warning = fmt.Sprintf("socket %s: group %s cannot be given (%v), only root may use it: run the daemon as root or as a member of the group", path, group, refused)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return &listener{UnixListener: l, warning: warning}, nil
}

// giveTo sets group and mode of the socket at path. The directory may belong
// to another user, who could put a link in its place meanwhile: what is opened
// is looked at, and changed by what is open.
func giveTo(path string, gid int) (refused, err error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
		return nil, errors.New("somebody has put something else in its place; look at who may write its directory")
	}
	if gid >= 0 {
		refused = unix.Fchownat(fd, "", -1, gid, unix.AT_EMPTY_PATH)
	}
	return refused, os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), socketMode)
}

// Warning returns what went less than well in Listen, for the caller to log;
// "" when nothing did or when l is not from Listen.
func Warning(l net.Listener) string {
	if l, ok := l.(*listener); ok {
		return l.warning
	}
	return ""
}

// makeDir makes a missing directory and gives it to the group, whose members
// could not reach the socket otherwise. An existing one is left as it is.
func makeDir(dir string, gid int) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	if err := os.Mkdir(dir, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	if gid >= 0 {
		// A refusal shows again, and is reported, at the socket itself.
		_ = os.Lchown(dir, -1, gid)
	}
	return nil
}

// lockDir takes an advisory lock on dir for the time that Listen needs. It
// gives up after a second: whoever may read the directory could hold the lock.
func lockDir(dir string) func() {
	f, err := os.Open(dir)
	if err != nil {
		return func() {}
	}
	for end := time.Now().Add(time.Second); ; {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return func() { f.Close() }
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: there is something else in its place (%s): remove it or choose another path", path, st.Mode().Type())
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("socket %s: another daemon answers on it: stop that one or choose another path", path)
	}
	// Only this says that nobody listens; EAGAIN is a full backlog.
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("socket %s: cannot tell whether another daemon uses it: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket %s: left behind and cannot be removed: %w", path, err)
	}
	return nil
}
