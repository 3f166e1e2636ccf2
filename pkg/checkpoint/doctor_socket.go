package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
)

// endpoint is one socket of the application, asked by a copy of its
// descriptor (pidfd_getfd(2)).
type endpoint struct {
	inode               uint32
	where               string
	family, kind, proto int
	listening           bool
	queue               uint32 // of a listening TCP socket: connections that nobody has accepted
	deferAccept         bool
	local               string
}

// sockets judges the application's sockets.
func (d *diagnosis) sockets(ctx context.Context, a *agent, t *kin) error {
	own, err := t.endpoints()
	if err != nil {
		d.warning("socket", "its sockets cannot be looked at: "+err.Error(), "let the agent run as root, with CAP_SYS_PTRACE")
	}
	for _, e := range own {
		d.endpoint(e)
	}
	s, err := a.openSockets(d.app.Process.Namespace)
	if err != nil {
		return err
	}
	defer s.Close()
	if l, ok := s.(interface {
		Unix() ([]sockdiag.UnixSocket, error)
	}); ok && d.criu {
		all, err := l.Unix()
		if err != nil {
			return err
		}
		d.unixPeers(t, own, all)
	}
	listeners, err := s.Listeners(d.app.VIPs, nil)
	if err != nil {
		return err
	}
	all, err := s.List(sockdiag.Query{Local: d.app.VIPs, Info: true})
	if err != nil {
		return err
	}
	listening, err := s.List(sockdiag.Query{Local: d.app.VIPs, States: []sockdiag.State{sockdiag.Listen}, Info: true})
	if err != nil {
		return err
	}
	d.keys(append(listening, all...))
	d.connections(ctx, a, listeners, all, owned(own))
	return nil
}

// endpoints asks every socket of the application once.
func (t *kin) endpoints() ([]endpoint, error) {
	var out []endpoint
	seen := map[uint32]bool{}
	for _, p := range t.all {
		pidfd := -1
		for _, f := range p.files {
			inode := uint32(f.inode)
			if f.kind() != unix.S_IFSOCK || seen[inode] {
				continue
			}
			if pidfd < 0 {
				var err error
				if pidfd, err = unix.PidfdOpen(p.pid, 0); err != nil {
					break // it has ended
				}
			}
			fd, err := unix.PidfdGetfd(pidfd, f.fd, 0)
			if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
				continue // it was closed
			}
			if err != nil {
				_ = unix.Close(pidfd)
				return out, fmt.Errorf("%s: %w", p, err)
			}
			e := ask(fd)
			_ = unix.Close(fd)
			e.inode, e.where = inode, fmt.Sprintf("descriptor %d of %s", f.fd, p)
			out, seen[inode] = append(out, e), true
		}
		if pidfd >= 0 {
			_ = unix.Close(pidfd)
		}
	}
	return out, nil
}

func owned(list []endpoint) map[uint32]bool {
	out := map[uint32]bool{}
	for _, e := range list {
		out[e.inode] = true
	}
	return out
}

// ask reads what a socket is.
func ask(fd int) endpoint {
	get := func(level, name int) int {
		n, _ := unix.GetsockoptInt(fd, level, name)
		return n
	}
	e := endpoint{
		family: get(unix.SOL_SOCKET, unix.SO_DOMAIN), kind: get(unix.SOL_SOCKET, unix.SO_TYPE),
		proto: get(unix.SOL_SOCKET, unix.SO_PROTOCOL), listening: get(unix.SOL_SOCKET, unix.SO_ACCEPTCONN) != 0,
	}
	if !e.inet() {
		return e
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			e.local = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
		case *unix.SockaddrInet6:
			e.local = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)).String()
		}
	}
	if e.listening && e.proto == unix.IPPROTO_TCP {
		e.deferAccept = get(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT) != 0
		if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			e.queue = info.Unacked // sk_ack_backlog of a listener (tcp_get_info)
		}
	}
	return e
}

func (e endpoint) inet() bool { return e.family == unix.AF_INET || e.family == unix.AF_INET6 }

// endpoint judges one socket.
func (d *diagnosis) endpoint(e endpoint) {
	const mptcp = "turn MPTCP off: for Go programs (>= 1.24) process.environment = [\"GODEBUG=multipathtcp=0\"], for others sysctl -w net.mptcp.enabled=0 or without mptcpize"
	switch {
	case e.inet() && e.proto == unix.IPPROTO_MPTCP && d.criu:
		d.fault("mptcp", e.where+" is an MPTCP socket ("+e.local+"), which CRIU cannot dump", mptcp)
	case e.inet() && e.proto == unix.IPPROTO_MPTCP && e.listening:
		d.warning("mptcp", e.where+" listens for MPTCP on "+e.local+": the connection of a remote that asks for it cannot be kept", mptcp)
	case e.inet() && e.proto == unix.IPPROTO_MPTCP:
		d.fault("mptcp", e.where+" is an MPTCP connection ("+e.local+"), which cannot be kept", mptcp)
	case e.queue > 0 && d.criu:
		d.warning("backlog", fmt.Sprintf("%d connections to %s wait to be accepted by %s, and CRIU cannot dump them", e.queue, e.local, e.where),
			"let the program accept them; if it never does, find out what keeps it")
	case e.deferAccept && !d.criu:
		d.warning("defer-accept", e.where+" listens on "+e.local+" with TCP_DEFER_ACCEPT: the kernel hands over a connection when its remote says something, so silent ones cannot be brought back",
			"turn it off (nginx: listen without deferred)")
	case e.deferAccept:
		// No word of it in CRIU's source: the option is not in the images.
		d.note("defer-accept", e.where+" listens on "+e.local+" with TCP_DEFER_ACCEPT, which it has not any more after a restore", "none is needed: connections are accepted earlier then")
	}
	if !d.criu {
		return
	}
	switch e.family {
	case unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET:
	default:
		d.fault("socket", fmt.Sprintf("%s is a socket of address family %d, which CRIU does not know", e.where, e.family), "let the program run without it")
		return
	}
	if !e.inet() || e.kind == unix.SOCK_RAW || e.proto == unix.IPPROTO_MPTCP {
		return
	}
	switch e.proto { // sk-inet.c, can_dump_ipproto
	case unix.IPPROTO_IP, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
	default:
		d.fault("socket", fmt.Sprintf("%s is a socket of protocol %d, which CRIU does not know", e.where, e.proto), "let the program run without it")
	}
}

// unixPeers names Unix sockets that are connected to other programs.
func (d *diagnosis) unixPeers(t *kin, own []endpoint, all []sockdiag.UnixSocket) {
	inside := owned(own)
	byInode := map[uint32]sockdiag.UnixSocket{}
	for _, u := range all {
		byInode[u.Inode] = u
	}
	link := func(inode uint32) string { return "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]" }
	wanted := map[string]bool{}
	for _, e := range own {
		if peer := byInode[e.inode].Peer; e.family == unix.AF_UNIX && peer != 0 && !inside[peer] {
			wanted[link(peer)] = true
		}
	}
	who := holders(wanted, t.inside)
	for _, e := range own {
		peer := byInode[e.inode].Peer
		if !wanted[link(peer)] || e.family != unix.AF_UNIX {
			continue
		}
		at := byInode[peer].Name
		if at == "" {
			at = byInode[e.inode].Name
		}
		text := e.where + " is connected by a Unix socket"
		if at != "" {
			text += " (" + at + ")"
		}
		if w := who[link(peer)]; w != "" {
			text += " to " + w
		}
		d.fault("unix", text+", outside of the application: CRIU cannot dump one end alone",
			"let the program close it before the snapshot, log to a file and not to syslog, and use TCP between programs")
	}
}

// keys names sockets that sign their segments.
func (d *diagnosis) keys(all []sockdiag.Socket) {
	for _, k := range all {
		if k.MD5 {
			d.fault("md5", fmt.Sprintf("%v has keys of TCP-MD5, which neither the filter nor CRIU keeps", k), "turn TCP-MD5 off, or use a tunnel")
		}
	}
}

// connections judges what the filter is to hold.
func (d *diagnosis) connections(ctx context.Context, a *agent, listeners, all []sockdiag.Socket, own map[uint32]bool) {
	sack := false
	for _, k := range all {
		sack = sack || k.Info != nil && k.Info.Options.SACK
	}
	if strings.TrimSpace(a.sysctl(d.app.Process.Namespace, "net/ipv4/tcp_dsack")) == "0" {
		level := levelWarning
		if sack {
			level = levelFault
		}
		d.add(level, "dsack", "net.ipv4.tcp_dsack is 0, and without it connections that use SACK cannot be learned", "sysctl -w net.ipv4.tcp_dsack=1, in its network namespace")
	}
	scope, err := a.newScope(ctx, d.app, listeners)
	if err != nil {
		d.warning("filter", "connections within this node cannot be told from others: "+err.Error(), "start nfconnfilter run and ask again")
		return
	}
	var here []string
	pair := map[[2]netip.AddrPort]bool{}
	for _, k := range all {
		if own[k.Inode] {
			pair[[2]netip.AddrPort{k.Local, k.Remote}] = true
		}
	}
	for _, k := range all {
		// One whose both ends are the application's goes and comes as a whole.
		whole := d.criu && pair[[2]netip.AddrPort{k.Local, k.Remote}] && pair[[2]netip.AddrPort{k.Remote, k.Local}]
		// Between two of its own addresses the other end is in the list, too.
		counted := slices.Contains(here, k.Remote.String()+" "+k.Local.String())
		if scope.sameHost(k) && k.State != sockdiag.TimeWait && !whole && !counted {
			here = append(here, k.Local.String()+" "+k.Remote.String())
		}
	}
	if len(here) > 0 {
		d.warning("same-host", fmt.Sprintf("%d connections are within this node and are not kept: %s", len(here), some(here)),
			"connect from another machine or network namespace, or let these clients connect anew")
	}
}
