package sockdiag

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixture struct {
	t   testing.TB
	net *testnet.Net
	c   *Conn
}

func newFixture(t testing.TB, name string) *fixture {
	t.Helper()
	testnet.RequireRoot(t)
	f := &fixture{t: t, net: testnet.New(t, testnet.Options{Name: name})}
	f.must(errors.Join(
		f.net.Node().AddAddr(testnet.Iface, "fd77::1/64"), f.net.Client().AddAddr(testnet.Iface, "fd77::2/64")))
	c, err := OpenIn(f.net.Node().Name())
	f.must(err)
	t.Cleanup(func() { _ = c.Close() })
	f.c = c
	return f
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) listen(network, addr string) *net.TCPListener {
	f.t.Helper()
	ln, err := f.net.Node().Listen(network, addr)
	f.must(err)
	f.t.Cleanup(func() { _ = ln.Close() })
	return ln.(*net.TCPListener)
}

// listenShared listens with SO_REUSEPORT, without which a wildcard and an address exclude each other.
func (f *fixture) listenShared(addr string) {
	f.t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}), err)
	}}
	lc.SetMultipathTCP(false)
	f.must(f.net.Node().Do(func() error {
		ln, err := lc.Listen(context.Background(), "tcp4", addr)
		if err == nil {
			f.t.Cleanup(func() { _ = ln.Close() })
		}
		return err
	}))
}

// connect returns both ends of a connection to host, which the listener serves.
func (f *fixture) connect(ln *net.TCPListener, host string) (node, client *net.TCPConn) {
	f.t.Helper()
	port := netip.MustParseAddrPort(ln.Addr().String()).Port()
	c, err := f.net.Client().Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(host), port).String())
	f.must(err)
	f.t.Cleanup(func() { _ = c.Close() })
	n, err := ln.AcceptTCP()
	f.must(err)
	f.t.Cleanup(func() { _ = n.Close() })
	return n, c.(*net.TCPConn)
}

func unmap(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

func remote(c net.Conn) netip.AddrPort { return unmap(c.RemoteAddr()) }

// ends name a connection; local may be left out. The remote alone is not enough: the kernel uses a client's port for
// several destinations at once.
type ends struct{ local, remote netip.AddrPort }

func at(c net.Conn) ends { return ends{unmap(c.LocalAddr()), remote(c)} }

// find returns the socket with those ends.
func (f *fixture) find(q Query, e ends) (Socket, bool) {
	f.t.Helper()
	list, err := f.c.List(q)
	f.must(err)
	i := slices.IndexFunc(list, func(s Socket) bool {
		return s.Remote == e.remote && (s.Local == e.local || !e.local.IsValid())
	})
	if i < 0 {
		return Socket{}, false
	}
	return list[i], true
}

// wait polls until the socket with those ends satisfies ok.
func (f *fixture) wait(what string, e ends, ok func(Socket) bool) Socket {
	f.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		s, found := f.find(Query{Info: true}, e)
		if found && ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("no %s; last seen: %v %+v, %+v", what, found, s, s.Info)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (f *fixture) waitState(state State, e ends) Socket {
	f.t.Helper()
	return f.wait(state.String(), e, func(s Socket) bool { return s.State == state })
}

func (f *fixture) waitGone(e ends) {
	f.t.Helper()
	if s, found := f.find(Query{}, e); found {
		f.t.Fatalf("still there: %v", s)
	}
}

func TestStatesBothFamilies(t *testing.T) {
	f := newFixture(t, "states")
	for _, c := range []struct {
		network, listen, host string
		family                uint8
	}{
		{"tcp4", "10.77.0.1:0", "10.77.0.1", unix.AF_INET},
		{"tcp6", "[fd77::1]:0", "fd77::1", unix.AF_INET6},
		{"tcp", "[::]:0", "10.77.0.1", unix.AF_INET6}, // dual-stack: an IPv4 connection on an IPv6 socket
	} {
		ln := f.listen(c.network, c.listen)
		node, client := f.connect(ln, c.host)
		s := f.waitState(Established, at(node))
		if s.Family != c.family || s.Local.Addr() != netip.MustParseAddr(c.host) || s.Inode == 0 || s.Info == nil {
			t.Errorf("%s: %+v", c.listen, s)
		}
		if s.Info.State != Established || !s.Info.Options.Timestamps || !s.Info.Options.SACK || !s.Info.Options.WScale {
			t.Errorf("%s: info %+v", c.listen, s.Info)
		}
		f.must(client.CloseWrite())
		s = f.waitState(CloseWait, at(node))
		if s.RecvQ != 1 || s.SendQ != 0 {
			t.Errorf("CLOSE_WAIT queues %d %d, want 1 0: a FIN counts 1", s.RecvQ, s.SendQ)
		}

		node, client = f.connect(ln, c.host)
		f.must(node.CloseWrite())
		if s = f.waitState(FinWait2, at(node)); s.Inode == 0 {
			t.Errorf("FIN_WAIT2 of an open file has no inode: %+v", s)
		}
		r := at(node)
		f.must(node.Close())
		if s = f.waitState(FinWait2, r); s.Inode != 0 {
			t.Errorf("orphan FIN_WAIT2 has an inode: %+v", s)
		}
		f.must(client.Close())
		if s = f.waitState(TimeWait, r); s.Family != c.family || s.Info != nil {
			t.Errorf("%s: TIME_WAIT %+v", c.listen, s)
		}
		for _, q := range []Query{{States: []State{TimeWait}}, {Local: []netip.Addr{s.Local.Addr()}}} {
			if _, found := f.find(q, r); !found {
				t.Errorf("%s: %+v does not find TIME_WAIT", c.listen, q)
			}
		}
	}
}

func TestQueuesAreExact(t *testing.T) {
	f := newFixture(t, "queues")
	ln := f.listen("tcp4", "10.77.0.1:0")
	node, client := f.connect(ln, "10.77.0.1")
	_, err := client.Write(make([]byte, 1000))
	f.must(err)
	f.wait("1000 bytes unread", at(node), func(s Socket) bool { return s.RecvQ == 1000 && s.Info.BytesReceived == 1000 })
	_, err = io.ReadFull(node, make([]byte, 400))
	f.must(err)
	f.wait("600 bytes unread", at(node), func(s Socket) bool { return s.RecvQ == 600 })
	f.must(client.CloseWrite())
	f.wait("600 bytes and a FIN unread", at(node), func(s Socket) bool { return s.RecvQ == 601 && s.State == CloseWait })

	// A remote that does not read: what is written is in one of the two queues.
	node, client = f.connect(ln, "10.77.0.1")
	remoteSide, err := OpenIn(f.net.Client().Path())
	f.must(err)
	defer remoteSide.Close()
	written, block := 0, make([]byte, 256<<10)
	for progress := true; progress; {
		f.must(node.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)))
		n, err := node.Write(block)
		if written += n; err != nil && !isTimeout(err) {
			t.Fatalf("after %d bytes: %v", written, err)
		}
		progress = n > 0 || written == 0
	}
	fin := 0
	check := func(s Socket) bool {
		list, err := remoteSide.List(Query{})
		f.must(err)
		i := slices.IndexFunc(list, func(r Socket) bool { return r.Local == remote(node) && r.Remote == at(node).local })
		return s.SendQ > 0 && int(s.SendQ)+int(list[i].RecvQ) == written+fin && s.Info.NotSent <= s.SendQ
	}
	s := f.wait("sum of both queues", at(node), check)
	if s.Info.NotSent == 0 || s.Info.SndWnd >= s.SendQ {
		t.Errorf("nothing unsent towards a full remote: %+v", s.Info)
	}
	r := at(node)
	f.must(node.CloseWrite())
	fin = 1
	f.wait("FIN_WAIT1 with a FIN queued", r, func(s Socket) bool { return s.State == FinWait1 && check(s) })
	_ = client
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func TestSynSentAndSynReceived(t *testing.T) {
	f := newFixture(t, "syn")
	// Nobody has this address: the SYN waits for its neighbour.
	fd := -1
	f.must(f.net.Node().Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 77, 0, 99}}); err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	s := f.waitState(SynSent, ends{remote: netip.MustParseAddrPort("10.77.0.99:9")})
	if s.SendQ != 1 {
		t.Errorf("SYN_SENT send queue %d, want 1", s.SendQ)
	}
	f.must(f.c.Destroy(s))
	f.waitGone(ends{s.Local, s.Remote})

	for _, listen := range []string{"10.77.0.1:0", "[::]:0"} {
		ln := f.listen("tcp", listen)
		r := ends{remote: netip.MustParseAddrPort("10.77.0.98:4000")}
		f.sendSYN(r.remote, netip.AddrPortFrom(f.net.NodeAddr(), netip.MustParseAddrPort(ln.Addr().String()).Port()))
		s = f.waitState(SynReceived, r)
		if s.Local.Addr() != f.net.NodeAddr() || s.Info != nil {
			t.Errorf("request: %+v", s)
		}
		for _, q := range []Query{{States: []State{SynReceived}}, {Local: []netip.Addr{f.net.NodeAddr()}}} {
			if _, found := f.find(q, r); !found {
				t.Errorf("%+v does not find the request", q)
			}
		}
		f.must(f.c.Destroy(s))
		f.waitGone(r)
	}
}

// sendSYN sends a SYN from the client's namespace with a source that never answers.
func (f *fixture) sendSYN(src, dst netip.AddrPort) {
	f.t.Helper()
	seg := make([]byte, 20)
	binary.BigEndian.PutUint16(seg, src.Port())
	binary.BigEndian.PutUint16(seg[2:], dst.Port())
	binary.BigEndian.PutUint32(seg[4:], 12345)
	seg[12], seg[13] = 5<<4, 2
	binary.BigEndian.PutUint16(seg[14:], 1000)
	pseudo := slices.Concat(src.Addr().AsSlice(), dst.Addr().AsSlice(), []byte{0, 6, 0, 20}, seg)
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(seg[16:], ^uint16(sum&0xffff+sum>>16))
	ip := slices.Concat([]byte{0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0}, src.Addr().AsSlice(), dst.Addr().AsSlice(), seg)
	f.must(f.net.Client().Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, ip, 0, &unix.SockaddrInet4{Addr: dst.Addr().As4()})
	}))
}

func TestListeners(t *testing.T) {
	f := newFixture(t, "listen")
	f.must(f.net.Node().AddAddr(testnet.Iface, "10.77.0.50/32"))
	vip, other, v6 := netip.MustParseAddr("10.77.0.50"), f.net.NodeAddr(), netip.MustParseAddr("fd77::1")
	dual := f.listen("tcp", "[::]:7001")
	f.listen("tcp6", "[::]:7002") // IPV6_V6ONLY
	f.listenShared("0.0.0.0:7003")
	f.listenShared("10.77.0.50:7003") // shadows the wildcard for one address
	f.listen("tcp6", "[fd77::1]:7004")
	for _, c := range []struct {
		addrs []netip.Addr
		ports []uint16
		want  []string
	}{
		{[]netip.Addr{vip}, nil, []string{"10.77.0.50:7003", "[::]:7001"}},
		{[]netip.Addr{other}, nil, []string{"0.0.0.0:7003", "[::]:7001"}},
		{[]netip.Addr{other, vip}, []uint16{7003, 7004}, []string{"0.0.0.0:7003", "10.77.0.50:7003"}},
		{[]netip.Addr{netip.AddrFrom16(vip.As16())}, []uint16{7001}, []string{"[::]:7001"}}, // mapped form
		{[]netip.Addr{v6}, nil, []string{"[::]:7001", "[::]:7002", "[fd77::1]:7004"}},
		{[]netip.Addr{vip}, []uint16{7002}, nil},
		{nil, []uint16{7002}, []string{"[::]:7002"}},
	} {
		got, err := f.c.Listeners(c.addrs, c.ports)
		f.must(err)
		if names := localNames(got); !slices.Equal(names, c.want) {
			t.Errorf("%v %v: %v, want %v", c.addrs, c.ports, names, c.want)
		}
	}
	list, err := f.c.List(Query{Local: []netip.Addr{vip}, States: []State{Listen}})
	f.must(err)
	if names := localNames(list); !slices.Equal(names, []string{"0.0.0.0:7003", "10.77.0.50:7003", "[::]:7001"}) {
		t.Errorf("List of listeners: %v", names)
	}
	for range 3 {
		c, err := f.net.Client().Dial("tcp", "10.77.0.50:7001")
		f.must(err)
		defer c.Close()
	}
	queued := func() Socket {
		got, err := f.c.Listeners([]netip.Addr{vip}, []uint16{7001})
		f.must(err)
		return got[0]
	}
	if s := queued(); s.RecvQ != 3 || s.SendQ < 128 {
		t.Errorf("accept queue %d, backlog %d, want 3 and the system's", s.RecvQ, s.SendQ)
	}
	n, err := dual.AcceptTCP()
	f.must(err)
	defer n.Close()
	if s := queued(); s.RecvQ != 2 {
		t.Errorf("accept queue %d after one accept, want 2", s.RecvQ)
	}
	// By default listeners are left out, whatever the addresses.
	for _, q := range []Query{{}, {Local: []netip.Addr{vip}}} {
		list, err := f.c.List(q)
		f.must(err)
		if len(list) != 3 || slices.ContainsFunc(list, func(s Socket) bool { return s.State != Established }) {
			t.Errorf("%+v: %v", q, list)
		}
	}
}

func localNames(list []Socket) (names []string) {
	for _, s := range list {
		names = append(names, s.Local.String())
	}
	slices.Sort(names)
	return names
}

func TestListFiltersLocal(t *testing.T) {
	f := newFixture(t, "local")
	f.must(f.net.Node().AddAddr(testnet.Iface, "10.77.0.50/32"))
	dual := f.listen("tcp", "[::]:0")
	a, _ := f.connect(dual, "10.77.0.1")
	b, _ := f.connect(dual, "10.77.0.50")
	c, _ := f.connect(dual, "fd77::1")
	wild, err := f.net.Node().Listen("tcp", "10.77.0.50:0") // a real IPv4 socket
	f.must(err)
	defer wild.Close()
	d, _ := f.connect(wild.(*net.TCPListener), "10.77.0.50")
	addr := netip.MustParseAddr
	for _, x := range []struct {
		local []netip.Addr
		want  []net.Conn
	}{
		{nil, []net.Conn{a, b, c, d}},
		{[]netip.Addr{addr("10.77.0.1")}, []net.Conn{a}},
		{[]netip.Addr{addr("10.77.0.50")}, []net.Conn{b, d}},
		{[]netip.Addr{addr("::ffff:10.77.0.50")}, []net.Conn{b, d}},
		{[]netip.Addr{addr("fd77::1")}, []net.Conn{c}},
		{[]netip.Addr{addr("10.9.9.9"), addr("fd99::9"), addr("fd77::1"), addr("10.77.0.1")}, []net.Conn{a, c}},
		{[]netip.Addr{addr("10.77.0.2")}, nil},
	} {
		list, err := f.c.List(Query{Local: x.local})
		f.must(err)
		var got, want []string
		for _, s := range list {
			got = append(got, s.Remote.String())
		}
		for _, w := range x.want {
			want = append(want, remote(w).String())
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%v: %v, want %v", x.local, got, want)
		}
	}
}

// The kernel checks a program before it runs it: long ones of both kinds must pass, and too long ones fall back.
func TestManyLocalAddresses(t *testing.T) {
	f := newFixture(t, "many")
	ln := f.listen("tcp4", "10.77.0.1:0")
	node, _ := f.connect(ln, "10.77.0.1")
	for _, count := range []int{1, 2, 3, 500, 2000, 5000} {
		var local []netip.Addr
		v4, v6 := netip.MustParseAddr("10.80.0.0"), netip.MustParseAddr("fd80::")
		for range count - 1 {
			v4, v6 = v4.Next(), v6.Next()
			if len(local)%2 == 0 {
				local = append(local, v4)
			} else {
				local = append(local, v6)
			}
		}
		if list, err := f.c.List(Query{Local: append(local, netip.MustParseAddr("10.80.255.255"))}); err != nil || len(list) != 0 {
			t.Fatalf("%d foreign addresses: %v, %v", count, list, err)
		}
		list, err := f.c.List(Query{Local: append(local, f.net.NodeAddr())})
		if err != nil || len(list) != 1 || list[0].Remote != remote(node) {
			t.Fatalf("%d addresses: %v, %v", count, list, err)
		}
	}
}
