package rules

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// netns is a reference to a network namespace.
type netns struct {
	fd       int
	dev, ino uint64
}

const selfNetns = "/proc/thread-self/ns/net"

func currentNetns() (*netns, error) {
	fd, err := unix.Open(selfNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("rules: opening this thread's network namespace: %w", err)
	}
	n := &netns{fd: fd}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, n.close())
	}
	n.dev, n.ino = uint64(st.Dev), st.Ino
	return n, nil
}

func (n *netns) here() bool {
	var st unix.Stat_t
	return unix.Stat(selfNetns, &st) == nil && uint64(st.Dev) == n.dev && st.Ino == n.ino
}

// do runs fn on a thread that is in the namespace, because a child process inherits the namespace of the
// thread that starts it. Only a caller that stands in another namespace pays for a change, which needs
// CAP_SYS_ADMIN; the filter itself never does.
func (n *netns) do(fn func() error) error {
	if n.fd < 0 {
		return errors.New("rules: the manager is closed")
	}
	runtime.LockOSThread()
	if n.here() {
		defer runtime.UnlockOSThread()
		return fn()
	}
	runtime.UnlockOSThread()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("rules: entering the network namespace in which the rules are (needs CAP_SYS_ADMIN): %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

func (n *netns) close() error {
	if n.fd < 0 {
		return nil
	}
	fd := n.fd
	n.fd = -1
	return unix.Close(fd)
}
