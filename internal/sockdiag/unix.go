package sockdiag

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Numbers of include/uapi/linux/unix_diag.h.
const (
	unixReqLen   = 24 // struct unix_diag_req
	unixMsgLen   = 16 // struct unix_diag_msg
	unixShowName = 1
	unixShowPeer = 4
	unixAttrName = 0
	unixAttrPeer = 2
)

// UnixSocket is one Unix domain socket as the kernel reported it.
type UnixSocket struct {
	// Inode is that of the socket's file, Peer that of the one that it is connected to; 0 for none.
	Inode, Peer uint32
	// Name is what it is bound to, "" for none; an abstract name begins with "@".
	Name string
}

// Unix lists the Unix domain sockets of the namespace.
func (c *Conn) Unix() ([]UnixSocket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range dumpTries {
		var found []UnixSocket
		interrupted := false
		c.seq++
		if err := c.send(unixRequest(c.seq)); err != nil {
			return nil, fmt.Errorf("sockdiag: list Unix sockets in %s: %w", c.name, err)
		}
		err := c.receive(func(m message) (bool, error) {
			if m.seq != c.seq {
				return false, nil
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.kind {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				return true, m.errno()
			case unix.SOCK_DIAG_BY_FAMILY:
				s, err := parseUnix(m.data)
				found = append(found, s)
				return false, err
			}
			return false, nil
		})
		if errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("sockdiag: list Unix sockets in %s: %w (the kernel lacks CONFIG_UNIX_DIAG: load the module unix_diag)", c.name, err)
		}
		if err != nil {
			return nil, fmt.Errorf("sockdiag: list Unix sockets in %s: %w", c.name, err)
		}
		if !interrupted {
			return found, nil
		}
	}
	return nil, fmt.Errorf("sockdiag: the list of Unix sockets in %s changed during each of %d attempts: try again", c.name, dumpTries)
}

func unixRequest(seq uint32) []byte {
	b := appendHeader(make([]byte, 0, nlmsgHeaderLen+unixReqLen), unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq)
	b = append(b, unix.AF_UNIX, 0, 0, 0)
	b = ne.AppendUint32(b, ^uint32(0)) // any state
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint32(b, unixShowName|unixShowPeer)
	b = append(b, make([]byte, 8)...)
	ne.PutUint32(b, uint32(len(b)))
	return b
}

// parseUnix decodes one struct unix_diag_msg and its attributes.
func parseUnix(b []byte) (UnixSocket, error) {
	if len(b) < unixMsgLen {
		return UnixSocket{}, errShort
	}
	s := UnixSocket{Inode: ne.Uint32(b[4:])}
	err := eachAttr(b[unixMsgLen:], func(kind uint16, v []byte) {
		switch {
		case kind == unixAttrPeer && len(v) >= 4:
			s.Peer = ne.Uint32(v)
		case kind == unixAttrName && len(v) > 0 && v[0] == 0:
			s.Name = "@" + string(v[1:])
		case kind == unixAttrName:
			s.Name = string(v)
		}
	})
	for len(s.Name) > 0 && s.Name[len(s.Name)-1] == 0 {
		s.Name = s.Name[:len(s.Name)-1]
	}
	return s, err
}
