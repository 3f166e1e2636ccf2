package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TCPFlow is one TCP connection by its two ends.
type TCPFlow struct {
	Local, Remote netip.AddrPort
}

// Numbers of the kernel's conntrack protocol: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
const (
	ctCmdDelete = 2 // IPCTNL_MSG_CT_DELETE

	ctaTupleOrig     = 1
	ctaTupleIP       = 1
	ctaTupleProto    = 2
	ctaIPv4Src       = 1
	ctaIPv4Dst       = 2
	ctaIPv6Src       = 3
	ctaIPv6Dst       = 4
	ctaProtoNum      = 1
	ctaProtoSrcPort  = 2
	ctaProtoDstPort  = 3
	ctMessagesAtOnce = 64 // their answers must fit into the socket's receive buffer
)

// DeleteConntrack removes the connection tracking entries of the given TCP connections, whichever end opened
// them, and returns how many there were. A connection without an entry is no error, nor is a kernel without
// connection tracking. Entries are looked up by their tuple in the default zone, so the cost depends on the
// number of flows and not on the size of the table.
func (m *Manager) DeleteConntrack(flows []TCPFlow) (int, error) {
	var msgs []netlink.Message
	for _, fl := range flows {
		local := netip.AddrPortFrom(fl.Local.Addr().Unmap(), fl.Local.Port())
		remote := netip.AddrPortFrom(fl.Remote.Addr().Unmap(), fl.Remote.Port())
		if !local.IsValid() || !remote.IsValid() || local.Addr().Is4() != remote.Addr().Is4() {
			return 0, fmt.Errorf("rules: %s to %s is no TCP connection", fl.Local, fl.Remote)
		}
		// The kernel finds an entry by the tuple of either direction. Both are tried, because address
		// translation by others can make one of them differ from what the ends see.
		msgs = append(msgs, ctDelete(local, remote), ctDelete(remote, local))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	count := 0
	for len(msgs) > 0 {
		n := min(len(msgs), ctMessagesAtOnce)
		found, err := m.sets.deleteBatch(msgs[:n])
		count += found
		if errors.Is(err, errNoConntrack) {
			return count, nil
		}
		if err != nil {
			return count, err
		}
		msgs = msgs[n:]
	}
	return count, nil
}

var errNoConntrack = errors.New("rules: the kernel has no connection tracking")

// deleteBatch sends the messages together and reads one answer for each.
func (s *setConn) deleteBatch(msgs []netlink.Message) (int, error) {
	if _, err := s.c.SendMessages(msgs); err != nil {
		return 0, fmt.Errorf("rules: deleting conntrack entries: %w", err)
	}
	found := 0
	var first error
	for range msgs {
		_, err := s.c.Receive()
		switch code := setErrno(err); {
		case err == nil:
			found++
		case code == syscall.ENOENT:
		case code == syscall.EINVAL, code == syscall.EOPNOTSUPP:
			first = errors.Join(first, errNoConntrack)
		case code == syscall.EPERM:
			first = fmt.Errorf("rules: deleting conntrack entries (needs CAP_NET_ADMIN): %w", err)
		case code == 0: // the socket itself failed; no more answers
			return found, fmt.Errorf("rules: deleting conntrack entries: %w", err)
		case first == nil:
			first = fmt.Errorf("rules: deleting a conntrack entry: %w", err)
		}
	}
	return found, first
}

func ctDelete(src, dst netip.AddrPort) netlink.Message {
	f, srcType, dstType := &family4, uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if src.Addr().Is6() {
		f, srcType, dstType = &family6, ctaIPv6Src, ctaIPv6Dst
	}
	port := func(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

	b := []byte{f.afi, 0, 0, 0}
	b, tuple := openNest(b, ctaTupleOrig)
	b, at := openNest(b, ctaTupleIP)
	b = putAttr(b, srcType, src.Addr().AsSlice())
	b = putAttr(b, dstType, dst.Addr().AsSlice())
	closeNest(b, at)
	b, at = openNest(b, ctaTupleProto)
	b = putAttr(b, ctaProtoNum, []byte{unix.IPPROTO_TCP})
	b = putAttr(b, ctaProtoSrcPort, port(src.Port()))
	b = putAttr(b, ctaProtoDstPort, port(dst.Port()))
	closeNest(b, at)
	closeNest(b, tuple)
	return netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_CTNETLINK<<8 | ctCmdDelete),
			Flags: netlink.Request | netlink.Acknowledge,
		},
		Data: b,
	}
}
