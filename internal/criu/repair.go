package criu

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// EndRepair takes the TCP sockets of a process out of repair mode, in which a CRIU that
// was killed leaves them: they would neither send nor be acknowledged (kernel
// net/ipv4/tcp.c, TCP_REPAIR). n is how many were.
func EndRepair(pid int) (n int, err error) {
	p, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(p)
	dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
	names, err := readDir(dir)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		if to, err := os.Readlink(dir + name); err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		number, _ := strconv.Atoi(name)
		was, ferr := endRepair(p, number)
		if was {
			n++
		}
		if ferr != nil {
			err = errors.Join(err, fmt.Errorf("socket %d of process %d stays in repair mode: %w", number, pid, ferr))
		}
	}
	return n, err
}

func readDir(path string) ([]string, error) {
	d, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// endRepair does it for one; a file that was closed meanwhile is none.
func endRepair(pidfd, number int) (was bool, err error) {
	fd, err := unix.PidfdGetfd(pidfd, number, 0)
	if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	on, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR)
	if err != nil || on == 0 {
		return false, nil // of another protocol
	}
	return true, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 0)
}
