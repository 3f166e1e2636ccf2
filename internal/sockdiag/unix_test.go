package sockdiag

import (
	"net"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// unixAnswer builds one answer of the kernel.
func unixAnswer(inode uint32, attrs ...[]byte) []byte {
	b := append([]byte{unix.AF_UNIX, unix.SOCK_STREAM, 1, 0}, ne.AppendUint32(nil, inode)...)
	b = append(b, make([]byte, 8)...)
	for i := 0; i < len(attrs); i += 2 {
		kind, v := attrs[i], attrs[i+1]
		b = ne.AppendUint16(b, uint16(4+len(v)))
		b = append(b, kind[0], 0)
		b = append(b, v...)
		b = append(b, make([]byte, (4-len(v)%4)%4)...)
	}
	return b
}

func TestParseUnix(t *testing.T) {
	peer := ne.AppendUint32(nil, 77)
	for _, c := range []struct {
		b    []byte
		want UnixSocket
	}{
		{unixAnswer(5), UnixSocket{Inode: 5}},
		{unixAnswer(5, []byte{unixAttrName}, []byte("/run/s\x00"), []byte{unixAttrPeer}, peer), UnixSocket{5, 77, "/run/s"}},
		{unixAnswer(5, []byte{unixAttrName}, []byte("\x00abs")), UnixSocket{5, 0, "@abs"}},
		{unixAnswer(5, []byte{unixAttrPeer}, []byte{1}), UnixSocket{Inode: 5}}, // too short for a number
	} {
		if got, err := parseUnix(c.b); got != c.want || err != nil {
			t.Errorf("%v: %+v, %v", c.want, got, err)
		}
	}
	if _, err := parseUnix(make([]byte, unixMsgLen-1)); err == nil {
		t.Error("a truncated answer is taken")
	}
	if _, err := parseUnix(append(unixAnswer(5), 9, 0, 0, 0)); err == nil {
		t.Error("a truncated attribute is taken")
	}
}

// The kernel names both ends, and the listener's path at the accepted one.
func TestUnixPeers(t *testing.T) {
	f := newFixture(t, "unixpeers")
	path := filepath.Join(t.TempDir(), "sock")
	var ends [2]net.Conn
	f.must(f.net.Node().Do(func() error { // a socket belongs to the namespace that it was made in
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		defer l.Close()
		if ends[0], err = net.Dial("unix", path); err != nil {
			return err
		}
		ends[1], err = l.Accept()
		return err
	}))
	var inodes [2]uint32
	for i, c := range ends {
		defer c.Close()
		raw, err := c.(*net.UnixConn).SyscallConn()
		f.must(err)
		var st unix.Stat_t
		f.must(raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }))
		f.must(err)
		inodes[i] = uint32(st.Ino)
	}
	all, err := f.c.Unix()
	f.must(err)
	got := map[uint32]UnixSocket{}
	for _, s := range all {
		got[s.Inode] = s
	}
	if s := got[inodes[0]]; s.Peer != inodes[1] || s.Name != "" {
		t.Errorf("the client's end is %+v, want peer %d", s, inodes[1])
	}
	if s := got[inodes[1]]; s.Peer != inodes[0] || s.Name != path {
		t.Errorf("the accepted end is %+v, want peer %d", s, inodes[0])
	}
}

// Keys of TCP-MD5 are told with Info.
func TestMD5(t *testing.T) {
	f := newFixture(t, "md5")
	ln := f.listen("tcp4", "10.77.0.1:0")
	listeners := func() (signed []bool) {
		all, err := f.c.List(Query{States: []State{Listen}, Info: true})
		f.must(err)
		for _, s := range all {
			signed = append(signed, s.MD5)
		}
		return signed
	}
	if got := listeners(); len(got) != 1 || got[0] {
		t.Errorf("without keys: %v", got)
	}
	raw, err := ln.SyscallConn()
	f.must(err)
	key := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}, Keylen: 1, Key: [80]byte{1}}
	copy(key.Addr.Data[2:], []byte{10, 77, 0, 2})
	f.must(raw.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key) }))
	f.must(err)
	if got := listeners(); len(got) != 1 || !got[0] {
		t.Errorf("with a key: %v", got)
	}
}
