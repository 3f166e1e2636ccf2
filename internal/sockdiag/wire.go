package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Sizes and numbers of include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h.
const (
	nlmsgHeaderLen = 16
	nlaHeaderLen   = 4
	sockIDLen      = 48 // struct inet_diag_sockid
	reqLen         = 56 // struct inet_diag_req_v2
	oldReqLen      = 60 // struct inet_diag_req
	msgLen         = 72 // struct inet_diag_msg
	hostcondLen    = 8  // struct inet_diag_hostcond without its address
	bcOpLen        = 4  // struct inet_diag_bc_op

	tcpdiagGetsock = 18 // TCPDIAG_GETSOCK

	attrReqBytecode = 1  // INET_DIAG_REQ_BYTECODE
	attrInfo        = 2  // INET_DIAG_INFO
	attrV6Only      = 11 // INET_DIAG_SKV6ONLY
	attrMD5Sig      = 18 // INET_DIAG_MD5SIG
	attrULPInfo     = 19 // INET_DIAG_ULP_INFO
	attrULPName     = 1  // INET_ULP_INFO_NAME
	attrTypeMask    = 0x3fff

	bcJump       = 1 // INET_DIAG_BC_JMP
	bcSourceCond = 7 // INET_DIAG_BC_S_COND

	maxBytecode = 0xffff - nlaHeaderLen
)

var ne = binary.NativeEndian

// stateMask turns states into the kernel's bit set. The kernel keeps connection requests under a state of their own
// and reports them as SYN_RECEIVED, so that asks for both.
func stateMask(states []State) uint32 {
	if len(states) == 0 {
		const all = 1<<(NewSynReceived+1) - 1<<Established // bits 1 to 12
		return all &^ (1<<Listen | 1<<Closed)
	}
	var mask uint32
	for _, s := range states {
		if s > 0 && s < 32 {
			mask |= 1 << s
		}
		if s == SynReceived {
			mask |= 1 << NewSynReceived
		}
	}
	return mask
}

func appendHeader(b []byte, kind, flags uint16, seq uint32) []byte {
	b = ne.AppendUint32(b, 0) // length, set when known
	b = ne.AppendUint16(b, kind)
	b = ne.AppendUint16(b, flags)
	b = ne.AppendUint32(b, seq)
	return ne.AppendUint32(b, 0)
}

// dumpRequest asks for the sockets of a family; AF_UNSPEC: of both, with the request that
// was there before SOCK_DIAG_BY_FAMILY (net/ipv4/inet_diag.c, inet_diag_dump_compat). That
// is one walk through the table of sockets instead of two, and with few sockets the walk is
// all that a dump costs.
func dumpRequest(seq uint32, family uint8, states uint32, info bool, bytecode []byte) []byte {
	var extensions uint8
	if info {
		extensions = 1 << (attrInfo - 1)
	}
	b := make([]byte, 0, nlmsgHeaderLen+oldReqLen+nlaHeaderLen+len(bytecode))
	b = appendHeader(b, dumpKind(family), unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq)
	if family == unix.AF_UNSPEC {
		b = append(b, family, 0, 0, extensions)
		b = append(b, make([]byte, sockIDLen)...)
		b = ne.AppendUint32(b, states)
		b = ne.AppendUint32(b, 0)
	} else {
		b = append(b, family, unix.IPPROTO_TCP, extensions, 0)
		b = ne.AppendUint32(b, states)
		b = append(b, make([]byte, sockIDLen)...)
	}
	if len(bytecode) > 0 {
		b = ne.AppendUint16(b, uint16(nlaHeaderLen+len(bytecode)))
		b = ne.AppendUint16(b, attrReqBytecode)
		b = append(b, bytecode...)
	}
	ne.PutUint32(b, uint32(len(b)))
	return b
}

// dumpKind is the type of the request for a family, and of its answers.
func dumpKind(family uint8) uint16 {
	if family == unix.AF_UNSPEC {
		return tcpdiagGetsock
	}
	return unix.SOCK_DIAG_BY_FAMILY
}

func appendDestroy(b []byte, seq uint32, s Socket) []byte {
	start := len(b)
	b = appendHeader(b, unix.SOCK_DESTROY, unix.NLM_F_REQUEST|unix.NLM_F_ACK, seq)
	family := s.Family
	if family == 0 {
		family = unix.AF_INET6
		if s.Local.Addr().Unmap().Is4() {
			family = unix.AF_INET
		}
	}
	b = append(b, family, unix.IPPROTO_TCP, 0, 0)
	b = ne.AppendUint32(b, ^uint32(0))
	b = binary.BigEndian.AppendUint16(b, s.Local.Port())
	b = binary.BigEndian.AppendUint16(b, s.Remote.Port())
	for _, a := range []netip.Addr{s.Local.Addr(), s.Remote.Addr()} {
		var field [16]byte
		if family == unix.AF_INET {
			copy(field[:], a.Unmap().AsSlice())
		} else {
			field = a.As16() // an IPv4 address in its mapped form, as the kernel reports it
		}
		b = append(b, field[:]...)
	}
	b = ne.AppendUint32(b, s.Interface)
	cookie := s.Cookie
	if cookie == [2]uint32{} {
		cookie = [2]uint32{^uint32(0), ^uint32(0)} // INET_DIAG_NOCOOKIE
	}
	b = ne.AppendUint32(b, cookie[0])
	b = ne.AppendUint32(b, cookie[1])
	ne.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// localBytecode returns a program for the kernel's filter (net/ipv4/inet_diag.c, inet_diag_bc_run) that accepts
// sockets with one of the local addresses; an IPv4 condition holds for mapped addresses too. It is empty for no
// addresses, and for more than fit a netlink attribute.
//
// Every operation has a jump for yes and one for no, in bytes from its start. Landing on the very end accepts, landing
// 4 bytes behind it refuses. A condition's yes leads to the jump that follows it, which leads to the end; its no leads
// to the next condition.
func localBytecode(addrs []netip.Addr) []byte {
	total := 0
	for _, a := range addrs {
		total += bcOpLen + hostcondLen + a.BitLen()/8 + bcOpLen
	}
	total -= bcOpLen // the last condition needs no jump
	if total <= 0 || total > maxBytecode {
		return nil
	}
	b := make([]byte, 0, total)
	for _, a := range addrs {
		family := uint8(unix.AF_INET6)
		if a.Is4() {
			family = unix.AF_INET
		}
		size := bcOpLen + hostcondLen + a.BitLen()/8
		b = append(b, bcSourceCond, uint8(size))
		b = ne.AppendUint16(b, uint16(size+bcOpLen))
		b = append(b, family, uint8(a.BitLen()), 0, 0)
		b = ne.AppendUint32(b, ^uint32(0)) // any port
		b = append(b, a.AsSlice()...)
		if len(b) < total {
			b = append(b, bcJump, bcOpLen)
			b = ne.AppendUint16(b, uint16(total-len(b)+2))
		}
	}
	return b
}

// message is one netlink message.
type message struct {
	kind, flags uint16
	seq         uint32
	data        []byte
}

var errShort = errors.New("truncated netlink message")

// errno returns the error in an NLMSG_ERROR or NLMSG_DONE message, nil for none.
func (m message) errno() error {
	if len(m.data) < 4 {
		if m.kind == unix.NLMSG_DONE {
			return nil
		}
		return errShort
	}
	if code := int32(ne.Uint32(m.data)); code < 0 {
		return unix.Errno(-int64(code))
	}
	return nil
}

// splitMessages calls handle for each message of a datagram until it returns true or an error.
func splitMessages(b []byte, handle func(message) (bool, error)) (bool, error) {
	for len(b) >= nlmsgHeaderLen {
		size := int(ne.Uint32(b))
		if size < nlmsgHeaderLen || size > len(b) {
			return false, errShort
		}
		done, err := handle(message{
			kind: ne.Uint16(b[4:]), flags: ne.Uint16(b[6:]), seq: ne.Uint32(b[8:]), data: b[nlmsgHeaderLen:size],
		})
		if done || err != nil {
			return done, err
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	if len(b) != 0 {
		return false, errShort
	}
	return false, nil
}

// eachAttr calls f for every attribute; what is malformed ends it with an error.
func eachAttr(b []byte, f func(kind uint16, value []byte)) error {
	for len(b) >= nlaHeaderLen {
		size := int(ne.Uint16(b))
		if size < nlaHeaderLen || size > len(b) {
			return errShort
		}
		f(ne.Uint16(b[2:])&attrTypeMask, b[nlaHeaderLen:size])
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}

// decoder collects sockets and drops the second report of one: when the table changes between two parts of a dump,
// the kernel's walk can meet a socket again.
type decoder struct {
	sockets []Socket
	infos   []TCPInfo // allocated in blocks; sockets point into it
	seen    map[[2]uint32]struct{}
}

func (d *decoder) truncate(n int) {
	for _, s := range d.sockets[n:] {
		delete(d.seen, s.Cookie)
	}
	d.sockets = d.sockets[:n]
}

// add decodes one struct inet_diag_msg and its attributes.
func (d *decoder) add(b []byte) error {
	if len(b) < msgLen {
		return errShort
	}
	s := Socket{
		Family: b[0], State: State(b[1]), Retransmits: b[3],
		Interface: ne.Uint32(b[40:]),
		Cookie:    [2]uint32{ne.Uint32(b[44:]), ne.Uint32(b[48:])},
		RecvQ:     ne.Uint32(b[56:]), SendQ: ne.Uint32(b[60:]), UID: ne.Uint32(b[64:]), Inode: ne.Uint32(b[68:]),
	}
	if _, again := d.seen[s.Cookie]; again {
		return nil
	}
	local, err1 := address(s.Family, b[8:24])
	remote, err2 := address(s.Family, b[24:40])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	s.Local = netip.AddrPortFrom(local, binary.BigEndian.Uint16(b[4:]))
	s.Remote = netip.AddrPortFrom(remote, binary.BigEndian.Uint16(b[6:]))
	ulp := ""
	err := eachAttr(b[msgLen:], func(kind uint16, v []byte) {
		switch kind {
		case attrInfo:
			s.Info = d.newInfo()
			parseInfo(v, s.Info)
		case attrV6Only:
			s.V6Only = len(v) > 0 && v[0] != 0
		case attrMD5Sig:
			s.MD5 = true
		case attrULPInfo:
			ulp = ulpName(v)
		}
	})
	if err != nil {
		return err
	}
	if s.Info != nil {
		s.Info.ULP = ulp
	}
	d.seen[s.Cookie] = struct{}{}
	d.sockets = append(d.sockets, s)
	return nil
}

func (d *decoder) newInfo() *TCPInfo {
	if len(d.infos) == cap(d.infos) {
		d.infos = make([]TCPInfo, 0, 256)
	}
	d.infos = append(d.infos, TCPInfo{})
	return &d.infos[len(d.infos)-1]
}

func address(family uint8, b []byte) (netip.Addr, error) {
	switch family {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(b)), nil
	case unix.AF_INET6:
		return netip.AddrFrom16([16]byte(b)).Unmap(), nil
	}
	return netip.Addr{}, fmt.Errorf("unknown address family %d in a socket report", family)
}

func ulpName(b []byte) (name string) {
	_ = eachAttr(b, func(kind uint16, v []byte) {
		if kind == attrULPName {
			for len(v) > 0 && v[len(v)-1] == 0 {
				v = v[:len(v)-1]
			}
			name = string(v)
		}
	})
	return name
}

// infoLen covers the fields read here; older kernels send fewer bytes, newer ones more.
const infoLen = 240

// parseInfo reads struct tcp_info. Fields that b is too short for are 0.
func parseInfo(b []byte, t *TCPInfo) {
	var full [infoLen]byte
	copy(full[:], b)
	u32 := func(offset int) uint32 { return ne.Uint32(full[offset:]) }
	ms := func(offset int) time.Duration { return time.Duration(u32(offset)) * time.Millisecond }
	us := func(offset int) time.Duration { return time.Duration(u32(offset)) * time.Microsecond }

	options := full[5]
	t.State = State(full[0])
	t.Options = Options{
		Timestamps: options&1 != 0, SACK: options&2 != 0, WScale: options&4 != 0, ECN: options&8 != 0,
	}
	t.SndWScale, t.RcvWScale = wscales(full[6])
	t.Retransmits, t.Probes, t.Backoff = full[2], full[3], full[4]
	t.RTO, t.RTT, t.RTTVar = us(8), us(68), us(72)
	t.SndMSS, t.RcvMSS, t.AdvMSS, t.PMTU = u32(16), u32(20), u32(84), u32(60)
	t.Unacked, t.Sacked, t.Lost, t.Retrans, t.TotalRetrans = u32(24), u32(28), u32(32), u32(36), u32(100)
	t.LastDataSent, t.LastDataRecv, t.LastAckRecv = ms(44), ms(52), ms(56)
	t.BytesAcked, t.BytesReceived = ne.Uint64(full[120:]), ne.Uint64(full[128:])
	t.BytesSent, t.BytesRetrans = ne.Uint64(full[200:]), ne.Uint64(full[208:])
	t.SegsOut, t.SegsIn = u32(136), u32(140)
	t.NotSent = u32(144)
	t.RcvSpace, t.SndWnd, t.RcvWnd = u32(96), u32(228), u32(232)
}

// wscales splits the byte of two 4-bit fields, send scale first; C puts the first field in the low bits on
// little-endian machines and in the high bits on others.
func wscales(b uint8) (snd, rcv uint8) {
	if ne.Uint16([]byte{1, 0}) == 1 {
		return b & 15, b >> 4
	}
	return b >> 4, b & 15
}
