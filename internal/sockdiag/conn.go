package sockdiag

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// A dump fills what the reader offers, 32 KiB at most (kernel netlink_dump).
	bufferSize = 64 << 10
	// opTimeout bounds one exchange with the kernel; it only fires when an answer was lost.
	opTimeout = 10 * time.Second
	// dumpTries bounds the repetition of dumps that the kernel marks as inconsistent.
	dumpTries = 8
	// destroyRounds bounds DestroyAll when sockets change state, or new ones come, while it works.
	destroyRounds = 5
	// destroyBatch is the number of requests sent at once; their answers must fit the socket's receive buffer.
	destroyBatch = 64
)

// Conn is a sock_diag socket in one network namespace. Its methods may be called from any goroutine; they take
// turns.
type Conn struct {
	mu   sync.Mutex
	nl   *netlink.Conn
	raw  syscall.RawConn
	buf  []byte
	seq  uint32
	name string
}

// Open makes a Conn in the calling thread's network namespace (a caller that entered another one has locked its
// goroutine to the thread). Listing needs no privilege; destroying needs CAP_NET_ADMIN.
func Open() (*Conn, error) {
	return open(0, "the current namespace")
}

// OpenIn makes a Conn in another network namespace, given by its name under /run/netns or by a path such as
// /proc/PID/ns/net. It needs CAP_SYS_ADMIN.
func OpenIn(nsPath string) (*Conn, error) {
	if nsPath == "" {
		return nil, errors.New("sockdiag: no network namespace was named: give a name under /run/netns or a path")
	}
	if !strings.Contains(nsPath, "/") {
		nsPath = filepath.Join("/run/netns", nsPath)
	}
	file, err := os.Open(nsPath)
	if err != nil {
		return nil, fmt.Errorf("sockdiag: network namespace: %w (does the process or `ip netns` name exist?)", err)
	}
	defer file.Close() //nolint:errcheck // nothing was written
	return open(int(file.Fd()), nsPath)
}

func open(netns int, name string) (*Conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("sockdiag: open netlink socket in %s: %w%s", name, err, remedy(err))
	}
	raw, err := nl.SyscallConn()
	if err != nil {
		_ = nl.Close()
		return nil, fmt.Errorf("sockdiag: open netlink socket in %s: %w", name, err)
	}
	return &Conn{nl: nl, raw: raw, buf: make([]byte, bufferSize), name: name}, nil
}

// Close releases the socket. A call that is under way on another goroutine fails.
func (c *Conn) Close() error { return c.nl.Close() }

// List returns the sockets that q selects, both families folded into one list without order. Sockets that appear,
// vanish or change state meanwhile may be missing: the kernel's walk is no snapshot. No socket comes twice.
func (c *Conn) List(q Query) ([]Socket, error) {
	states := stateMask(q.States)
	local := unmapAll(q.Local)
	found, err := c.list(states, local, q.Info)
	if err != nil || len(local) == 0 {
		return found, err
	}
	// The kernel has filtered already, but for programs too long for it and for listeners' IPV6_V6ONLY.
	set := make(map[netip.Addr]struct{}, len(local))
	for _, a := range local {
		set[a] = struct{}{}
	}
	return slices.DeleteFunc(found, func(s Socket) bool {
		if s.State == Listen {
			return !slices.ContainsFunc(local, s.accepts)
		}
		_, ok := set[s.Local.Addr()]
		return !ok
	}), nil
}

// Listeners returns the sockets in LISTEN that would accept connections to one of the addresses at one of the ports
// (none: any port). A wildcard listener is left out where one bound to the very address, and to no device, takes its
// connections. RecvQ is the accept queue's length, SendQ the backlog.
func (c *Conn) Listeners(addrs []netip.Addr, ports []uint16) ([]Socket, error) {
	addrs = unmapAll(addrs)
	found, err := c.list(1<<Listen, addrs, false)
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		found = slices.DeleteFunc(found, func(s Socket) bool { return !slices.Contains(ports, s.Local.Port()) })
	}
	if len(addrs) == 0 {
		return found, nil
	}
	exact := make(map[netip.AddrPort]bool)
	for _, s := range found {
		if s.Interface == 0 && !s.Local.Addr().IsUnspecified() {
			exact[s.Local] = true
		}
	}
	return slices.DeleteFunc(found, func(s Socket) bool {
		return !slices.ContainsFunc(addrs, func(a netip.Addr) bool {
			shadowed := s.Local.Addr() != a && exact[netip.AddrPortFrom(a, s.Local.Port())]
			return s.accepts(a) && !shadowed
		})
	}), nil
}

// accepts tells whether a listener takes connections to the address.
func (s Socket) accepts(a netip.Addr) bool {
	switch l := s.Local.Addr(); {
	case l == a:
		return true
	case l == netip.IPv4Unspecified():
		return a.Is4()
	case l == netip.IPv6Unspecified():
		return a.Is6() || !s.V6Only
	}
	return false
}

// list dumps the families that the addresses need, without duplicates.
func (c *Conn) list(states uint32, local []netip.Addr, info bool) ([]Socket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(local) > 0 && states&(1<<Listen) != 0 {
		local = slices.Concat(local, []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()})
	}
	bytecode := localBytecode(local)
	family := uint8(unix.AF_UNSPEC)
	if len(local) > 0 && !slices.ContainsFunc(local, netip.Addr.Is4) {
		family = unix.AF_INET6
	}
	d := decoder{seen: make(map[[2]uint32]struct{})}
	err := c.dump(family, states, info, bytecode, &d)
	if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.ENOENT)) { // a kernel without IPv6
		return nil, fmt.Errorf("sockdiag: list sockets in %s: %w%s", c.name, err, remedy(err))
	}
	return d.sockets, nil
}

func (c *Conn) dump(family uint8, states uint32, info bool, bytecode []byte, d *decoder) error {
	for range dumpTries {
		start := len(d.sockets)
		c.seq++
		interrupted := false
		if err := c.send(dumpRequest(c.seq, family, states, info, bytecode)); err != nil {
			return err
		}
		err := c.receive(func(m message) (bool, error) {
			if m.seq != c.seq {
				return false, nil // left from a call that failed
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.kind {
			case unix.NLMSG_DONE:
				return true, m.errno()
			case unix.NLMSG_ERROR:
				if err := m.errno(); err != nil {
					return true, err
				}
				return true, errors.New("the kernel acknowledged a dump without an answer")
			case dumpKind(family):
				return false, d.add(m.data)
			}
			return false, nil
		})
		if err != nil {
			return err
		}
		if !interrupted {
			return nil
		}
		d.truncate(start)
	}
	return fmt.Errorf("the list changed during each of %d attempts: try again", dumpTries)
}

// Destroy closes a socket as listed (SOCK_DESTROY; kernel tcp_abort): its owner gets ECONNABORTED, queued data is
// lost. The kernel sends the remote a reset in the states of RFC 9293, section 3.10.5, that call for one
// (SYN_RECEIVED, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT); who must not see it has to be kept from it by a rule.
// That the socket is gone already is no error; where it has changed into a TIME_WAIT socket meanwhile, that one stays.
// A zero Cookie matches whatever socket has the addresses. It needs CAP_NET_ADMIN.
func (c *Conn) Destroy(s Socket) error {
	_, err := c.DestroySockets([]Socket{s})
	return err
}

// DestroySockets is Destroy for many sockets; it goes on after an error and returns how many were destroyed, not
// counting those already gone, and all errors.
func (c *Conn) DestroySockets(sockets []Socket) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var (
		errs  []error
		count int
	)
	for batch := range slices.Chunk(sockets, destroyBatch) {
		n, err := c.destroy(batch)
		count += n
		if err != nil {
			errs = append(errs, err)
		}
	}
	return count, errors.Join(errs...)
}

// DestroyAll destroys every socket that q selects, and lists again until none is left, so that sockets that changed
// into TIME_WAIT meanwhile go too. It returns how many were destroyed. It fails when some are left: the application
// has to be stopped first.
func (c *Conn) DestroyAll(q Query) (int, error) {
	q.Info = false
	count, left := 0, 0
	for range destroyRounds {
		found, err := c.List(q)
		if err != nil {
			return count, err
		}
		if left = len(found); left == 0 {
			return count, nil
		}
		n, err := c.DestroySockets(found)
		count += n
		if err != nil {
			return count, err
		}
	}
	found, err := c.List(q)
	if err != nil {
		return count, err
	}
	if left = len(found); left > 0 {
		return count, fmt.Errorf("sockdiag: %d sockets in %s appeared again after %d rounds of destroying, such as %s: "+
			"stop the application first", left, c.name, destroyRounds, found[0])
	}
	return count, nil
}

// destroy sends one batch and collects its answers; requests carry successive sequence numbers.
func (c *Conn) destroy(batch []Socket) (int, error) {
	var (
		req     []byte
		sent    []int // index in batch by order of sequence number
		errs    []error
		first   = c.seq + 1
		answers = 0
		count   = 0
	)
	for i, s := range batch {
		if !s.Local.IsValid() || !s.Remote.IsValid() {
			errs = append(errs, fmt.Errorf("sockdiag: destroy: socket %s has no addresses", s))
			continue
		}
		c.seq++
		req = appendDestroy(req, c.seq, s)
		sent = append(sent, i)
	}
	if len(sent) == 0 {
		return 0, errors.Join(errs...)
	}
	err := c.send(req)
	if err == nil {
		err = c.receive(func(m message) (bool, error) {
			k := m.seq - first
			if m.kind != unix.NLMSG_ERROR || k >= uint32(len(sent)) {
				return false, nil
			}
			answers++
			s := batch[sent[k]]
			switch err := m.errno(); {
			case err == nil:
				count++
			case gone(err, s):
			default:
				errs = append(errs, fmt.Errorf("sockdiag: destroy %s in %s: %w%s", s, c.name, err, remedy(err)))
			}
			return answers == len(sent), nil
		})
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("sockdiag: destroy %d sockets in %s: %w%s", len(sent), c.name, err, remedy(err)))
	}
	return count, errors.Join(errs...)
}

// gone tells whether the kernel's answer means that the very socket exists no more: nothing has its addresses, or
// something else has. Listeners that share an address are another matter: the kernel picks one of them by itself.
func gone(err error, s Socket) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) && s.State != Listen
}

func (c *Conn) send(req []byte) error {
	if err := c.nl.SetDeadline(time.Now().Add(opTimeout)); err != nil {
		return err
	}
	var sendErr error
	err := c.raw.Write(func(fd uintptr) bool {
		sendErr = unix.Sendto(int(fd), req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return !errors.Is(sendErr, unix.EAGAIN)
	})
	return errors.Join(err, sendErr)
}

// receive hands every message that comes to handle until it returns true or an error.
func (c *Conn) receive(handle func(message) (bool, error)) error {
	for {
		var (
			n       int
			recvErr error
		)
		err := c.raw.Read(func(fd uintptr) bool {
			for {
				var from unix.Sockaddr
				n, from, recvErr = unix.Recvfrom(int(fd), c.buf, unix.MSG_TRUNC)
				if a, ok := from.(*unix.SockaddrNetlink); recvErr == nil && ok && a.Pid != 0 {
					continue // not from the kernel
				}
				return !errors.Is(recvErr, unix.EAGAIN)
			}
		})
		if err = errors.Join(err, recvErr); err != nil {
			return err
		}
		if n > len(c.buf) {
			return fmt.Errorf("netlink answer of %d bytes is longer than the buffer", n)
		}
		done, err := splitMessages(c.buf[:n], handle)
		if done || err != nil {
			return err
		}
	}
}

// remedy adds to an error what to do about it.
func remedy(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return " (run as root: CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter a namespace, are needed)"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EPROTONOSUPPORT):
		return " (the kernel lacks CONFIG_INET_DIAG and CONFIG_INET_TCP_DIAG: load the module tcp_diag)"
	case errors.Is(err, unix.EOPNOTSUPP):
		return " (the kernel lacks CONFIG_INET_DIAG_DESTROY)"
	case errors.Is(err, unix.ESTALE):
		return " (another listener has the same address: close it by ending its process)"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENOBUFS):
		return " (an answer was lost: try again)"
	}
	return ""
}

func unmapAll(addrs []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		if a.IsValid() {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out
}
