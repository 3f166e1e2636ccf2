package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Numbers of the kernel's ipset protocol: include/uapi/linux/netfilter/ipset/ip_set.h.
const (
	ipsetProtocol = 6 // what sets of these types need; kernels that speak 7 take it too

	cmdCreate  = 2
	cmdDestroy = 3
	cmdFlush   = 4
	cmdSwap    = 6
	cmdList    = 7
	cmdAdd     = 9
	cmdDel     = 10
	cmdHeader  = 12
	cmdType    = 13

	attrProtocol = 1
	attrSetName  = 2
	attrTypeName = 3 // the second set of a swap, too
	attrRevision = 4
	attrFamily   = 5
	attrData     = 7
	attrADT      = 8
	attrLineNo   = 9

	attrIP      = 1
	attrPort    = 4
	attrProto   = 7
	attrMaxElem = 19
	attrIP2     = 20

	attrIPv4 = 1
	attrIPv6 = 2

	ipsetErrPrivate    = 4096
	ipsetErrFindType   = 4098
	ipsetErrMaxSets    = 4099
	ipsetErrBusy       = 4100
	ipsetErrExist      = 4103
	ipsetErrReferenced = 4108
	ipsetErrHashFull   = 4352

	// The newest revision of our types to ask for. A set of a later one could not be listed by an ipset command
	// of today.
	newestRevision = 6

	// A netlink attribute is at most 65,535 bytes long, and the list of entries is one attribute.
	maxBatch = 60000
)

// setConn speaks the ipset protocol. It is bound to the network namespace in which it was opened.
type setConn struct {
	c    *netlink.Conn
	buf  []byte
	revs map[string]uint8
}

func dialSets() (*setConn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("rules: opening a netfilter netlink socket: %w", err)
	}
	return &setConn{c: c, revs: map[string]uint8{}}, nil
}

func (s *setConn) close() error { return s.c.Close() }

// Attribute encoding. Numbers in ipset messages are in network order and flagged so.

func putAttr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func putString(b []byte, typ uint16, s string) []byte { return putAttr(b, typ, append([]byte(s), 0)) }

func putBE32(b []byte, typ uint16, v uint32) []byte {
	return putAttr(b, typ|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, v))
}

// openNest starts a nested attribute; closeNest fills in its length.
func openNest(b []byte, typ uint16) ([]byte, int) {
	at := len(b)
	return binary.NativeEndian.AppendUint16(append(b, 0, 0), typ|unix.NLA_F_NESTED), at
}

func closeNest(b []byte, at int) { binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) }

func putIP(b []byte, typ uint16, ip netip.Addr) []byte {
	b, at := openNest(b, typ)
	if ip.Is4() {
		a := ip.As4()
		b = putAttr(b, attrIPv4|unix.NLA_F_NET_BYTEORDER, a[:])
	} else {
		a := ip.As16()
		b = putAttr(b, attrIPv6|unix.NLA_F_NET_BYTEORDER, a[:])
	}
	closeNest(b, at)
	return b
}

func putEntry(b []byte, c *Change) []byte {
	b, at := openNest(b, attrData)
	b = putIP(b, attrIP, c.IP)
	if c.Set == Skip || c.Set == Flow {
		b = putAttr(b, attrPort|unix.NLA_F_NET_BYTEORDER, []byte{byte(c.Port >> 8), byte(c.Port)})
		b = putAttr(b, attrProto, []byte{unix.IPPROTO_TCP})
	}
	if c.Set == Flow {
		b = putIP(b, attrIP2, c.Peer)
	}
	closeNest(b, at)
	return b
}

// header starts a message: struct nfgenmsg and the protocol version.
func (s *setConn) header(f *family) []byte {
	s.buf = append(s.buf[:0], f.afi, 0, 0, 0)
	s.buf = putAttr(s.buf, attrProtocol, []byte{ipsetProtocol})
	return s.buf
}

func (s *setConn) do(cmd uint16, flags netlink.HeaderFlags, b []byte) ([]netlink.Message, error) {
	s.buf = b[:0]
	return s.c.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_IPSET<<8 | cmd),
			Flags: netlink.Request | flags,
		},
		Data: b,
	})
}

// named sends a command whose only argument is a set.
func (s *setConn) named(cmd uint16, f *family, name string) ([]netlink.Message, error) {
	return s.do(cmd, netlink.Acknowledge, putString(s.header(f), attrSetName, name))
}

// setErr adds to an ipset error what it concerns and what to do.
func setErr(what, name string, err error) error {
	if err == nil {
		return nil
	}
	text, code := "", setErrno(err)
	switch code {
	case syscall.EPERM, syscall.EACCES:
		text = " (needs CAP_NET_ADMIN)"
	case syscall.EINVAL, syscall.EOPNOTSUPP, syscall.EPROTONOSUPPORT:
		text = " (the kernel may lack ipset: CONFIG_IP_SET)"
	case syscall.ENOENT:
		text = " (the set is not there: another program removed it, install the rules again)"
	case ipsetErrFindType:
		text = " (the kernel lacks this type of set: CONFIG_IP_SET_HASH_IP, CONFIG_IP_SET_HASH_IPPORT, CONFIG_IP_SET_HASH_IPPORTIP)"
	case ipsetErrMaxSets:
		text = " (the kernel's limit of sets is reached: CONFIG_IP_SET_MAX)"
	case ipsetErrHashFull:
		text = " (the set is full: raise max_connections in [queue])"
	case ipsetErrBusy, ipsetErrReferenced:
		text = " (a rule still refers to the set)"
	case syscall.EEXIST:
		text = " (a set of that name but another type or size exists)"
	}
	if code >= ipsetErrPrivate {
		return fmt.Errorf("rules: %s ipset %s: ipset error %d%s", what, name, int(code), text)
	}
	return fmt.Errorf("rules: %s ipset %s%s: %w", what, name, text, err)
}

func setErrno(err error) syscall.Errno {
	var op *netlink.OpError
	var no syscall.Errno
	if errors.As(err, &op) && errors.As(op.Err, &no) {
		return no
	}
	return 0
}

// revision returns the revision of a set type to ask for.
func (s *setConn) revision(f *family, typ string) (uint8, error) {
	key := f.prefix + typ
	if r, ok := s.revs[key]; ok {
		return r, nil
	}
	b := putString(s.header(f), attrTypeName, typ)
	b = putAttr(b, attrFamily, []byte{f.afi})
	msgs, err := s.do(cmdType, 0, b) // the answer is the acknowledgement
	if err != nil {
		return 0, setErr("asking the kernel for type", typ, err)
	}
	rev := uint8(0)
	for _, m := range msgs {
		for a := range attrs(m.Data, 4) {
			if a.typ == attrRevision && len(a.data) >= 1 {
				rev = min(a.data[0], newestRevision)
			}
		}
	}
	s.revs[key] = rev
	return rev, nil
}

func (s *setConn) create(f *family, set Set, name string, maxElem uint32) error {
	rev, err := s.revision(f, set.typeName())
	if err != nil {
		return err
	}
	b := putString(s.header(f), attrSetName, name)
	b = putString(b, attrTypeName, set.typeName())
	b = putAttr(b, attrRevision, []byte{rev})
	b = putAttr(b, attrFamily, []byte{f.afi})
	b, at := openNest(b, attrData)
	b = putBE32(b, attrMaxElem, maxElem)
	closeNest(b, at)
	// Without NLM_F_EXCL a set that is there and alike is no error.
	_, err = s.do(cmdCreate, netlink.Acknowledge|netlink.Create, b)
	return err
}

// ensure makes sure that a set is there with the configured size. One of another size is replaced in one step
// by a copy.
func (s *setConn) ensure(f *family, set Set, cfg Config) error {
	name, size := f.setName(set), set.maxElem(cfg)
	err := s.create(f, set, name, size)
	if setErrno(err) != syscall.EEXIST {
		return setErr("creating", name, err)
	}
	entries, lerr := s.list(f, set, name)
	if lerr != nil {
		return lerr
	}
	tmp := name + "-new"
	if err := s.destroy(f, tmp); err != nil {
		return err
	}
	if err := s.create(f, set, tmp, size); err != nil {
		return setErr("creating", tmp, err)
	}
	err = s.send(f, tmp, true, entries)
	if err == nil {
		b := putString(s.header(f), attrSetName, name)
		_, err = s.do(cmdSwap, netlink.Acknowledge, putString(b, attrTypeName, tmp))
		err = setErr("replacing", name, err)
	}
	return errors.Join(err, s.destroy(f, tmp))
}

func (s *setConn) exists(f *family, set Set) (bool, error) {
	name := f.setName(set)
	_, err := s.do(cmdHeader, 0, putString(s.header(f), attrSetName, name)) // the answer is the acknowledgement
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, setErr("looking for", name, err)
}

func (s *setConn) flush(f *family, name string) error {
	_, err := s.named(cmdFlush, f, name)
	return setErr("emptying", name, err)
}

// destroy removes a set; one that is not there is no error. The kernel gives back what a deleted rule held
// only after a grace period, so a set that is still referred to is tried again for a while.
func (s *setConn) destroy(f *family, name string) error {
	deadline := time.Now().Add(2 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		_, err := s.named(cmdDestroy, f, name)
		switch code := setErrno(err); {
		case err == nil, code == syscall.ENOENT:
			return nil
		case code == ipsetErrBusy || code == ipsetErrReferenced:
			if time.Now().Before(deadline) {
				time.Sleep(wait)
				continue
			}
		}
		return setErr("removing", name, err)
	}
}

// apply sends the changes in their order; neighbours that go the same way into the same set share messages.
func (s *setConn) apply(changes []Change) error {
	for len(changes) > 0 {
		c, n := changes[0], 1
		for n < len(changes) && changes[n].Set == c.Set && changes[n].Add == c.Add && changes[n].IP.Is4() == c.IP.Is4() {
			n++
		}
		f := &family4
		if c.IP.Is6() {
			f = &family6
		}
		if err := s.send(f, f.setName(c.Set), c.Add, changes[:n]); err != nil {
			return err
		}
		changes = changes[n:]
	}
	return nil
}

// send adds or deletes entries of one set, as many as fit in a message.
func (s *setConn) send(f *family, name string, add bool, entries []Change) error {
	cmd, what := uint16(cmdDel), "deleting from"
	if add {
		cmd, what = cmdAdd, "adding to"
	}
	for len(entries) > 0 {
		b := putString(s.header(f), attrSetName, name)
		// A list is refused without a line number; 0 asks for plain errors.
		b = putAttr(b, attrLineNo, []byte{0, 0, 0, 0})
		b, at := openNest(b, attrADT)
		n := 0
		for n < len(entries) && len(b)-at < maxBatch {
			b = putEntry(b, &entries[n])
			n++
		}
		closeNest(b, at)
		if _, err := s.do(cmd, netlink.Acknowledge, b); err != nil {
			return setErr(what, name, err)
		}
		entries = entries[n:]
	}
	return nil
}

func (s *setConn) list(f *family, set Set, name string) ([]Change, error) {
	msgs, err := s.do(cmdList, netlink.Dump, putString(s.header(f), attrSetName, name))
	if err != nil {
		return nil, setErr("listing", name, err)
	}
	var out []Change
	for _, m := range msgs {
		out = append(out, parseList(set, m.Data)...)
	}
	return out, nil
}

// parseList reads the entries of one message of a listing.
func parseList(set Set, b []byte) (out []Change) {
	for a := range attrs(b, 4) {
		if a.typ != attrADT {
			continue
		}
		for e := range attrs(a.data, 0) {
			if e.typ == attrData {
				out = append(out, parseEntry(set, e.data))
			}
		}
	}
	return out
}

func parseEntry(set Set, b []byte) Change {
	c := Change{Set: set, Add: true}
	for a := range attrs(b, 0) {
		switch a.typ {
		case attrIP:
			c.IP = parseIP(a.data)
		case attrIP2:
			c.Peer = parseIP(a.data)
		case attrPort:
			if len(a.data) >= 2 {
				c.Port = binary.BigEndian.Uint16(a.data)
			}
		}
	}
	return c
}

func parseIP(b []byte) netip.Addr {
	for a := range attrs(b, 0) {
		if ip, ok := netip.AddrFromSlice(a.data); ok {
			return ip
		}
	}
	return netip.Addr{}
}

type attr struct {
	typ  uint16
	data []byte
}

// attrs walks the attributes of b from an offset on and stops at the first that does not fit.
func attrs(b []byte, off int) func(func(attr) bool) {
	return func(yield func(attr) bool) {
		if len(b) < off {
			return
		}
		for b := b[off:]; len(b) >= 4; {
			n := int(binary.NativeEndian.Uint16(b))
			if n < 4 || n > len(b) {
				return
			}
			typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if !yield(attr{typ, b[4:n]}) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}
