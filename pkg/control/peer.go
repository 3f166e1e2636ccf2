package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Caller is who is at the other end of a Unix socket, as the kernel recorded
// it at connect(2) (unix(7), SO_PEERCRED and SO_PEERGROUPS).
type Caller struct {
	PID    int32
	UID    uint32
	GID    uint32   // primary group
	Groups []uint32 // supplementary groups
}

// InGroup reports whether gid is the caller's primary or a supplementary group.
func (c Caller) InGroup(gid uint32) bool {
	return c.GID == gid || slices.Contains(c.Groups, gid)
}

type callerKey struct{}

// CallerFrom returns the caller of the request that ctx belongs to; false when
// the request did not come through Serve.
func CallerFrom(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}

// AllowGroup returns the access rule of both sockets: root, the daemon's own
// user and the members of the named group are let in. The group is looked up
// for every connection, so that one made later counts at once; a missing or
// empty name lets nobody in besides root and the daemon's own user.
func AllowGroup(group string) func(Caller) error {
	return func(c Caller) error {
		if c.UID == 0 || c.UID == uint32(os.Geteuid()) {
			return nil
		}
		if group == "" {
			return fmt.Errorf("user ID %d is not allowed: only root may use this socket; set control_group in the node file to let a group in", c.UID)
		}
		gid, err := lookupGroup(group)
		if err != nil {
			return fmt.Errorf("user ID %d is not allowed: only root may use this socket, for %w; create it and join it", c.UID, err)
		}
		if !c.InGroup(gid) {
			return fmt.Errorf("user ID %d is not allowed: be root or join group %s (then log in anew)", c.UID, group)
		}
		return nil
	}
}

// lookupGroup resolves a group's name, or its number, to its ID.
func lookupGroup(group string) (uint32, error) {
	g, err := user.LookupGroup(group)
	if err != nil {
		var unknown user.UnknownGroupError
		if n, perr := strconv.ParseUint(group, 10, 32); perr == nil {
			return uint32(n), nil
		}
		if errors.As(err, &unknown) {
			return 0, fmt.Errorf("group %s does not exist", group)
		}
		return 0, fmt.Errorf("group %s cannot be looked up: %v", group, err)
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %s has the ID %q, which is no number", group, g.Gid)
	}
	return uint32(n), nil
}

// peerOf reads the credentials of a connected Unix socket.
func peerOf(c syscall.Conn) (Caller, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var caller Caller
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner != nil {
			return
		}
		caller = Caller{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}
		caller.Groups, inner = peerGroups(fd)
	})
	if err != nil {
		return Caller{}, err
	}
	return caller, inner
}

// peerGroups reads SO_PEERGROUPS. A buffer that is too short gives ERANGE and
// the length that is needed (net/core/sock.c, sk_getsockopt); the groups of a
// connected socket never change, so the second try fits.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for range 2 {
		n := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&n)), 0)
		switch errno {
		case 0:
			return groups[:n/4], nil
		case unix.ERANGE:
			groups = make([]uint32, n/4+1)
		default:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", errno)
		}
	}
	return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", unix.ERANGE)
}
