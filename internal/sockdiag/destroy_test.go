package sockdiag

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDestroyStates(t *testing.T) {
	f := newFixture(t, "destroy")
	for _, c := range []struct{ listen, host string }{
		{"10.77.0.1:0", "10.77.0.1"}, {"[fd77::1]:0", "fd77::1"}, {"[::]:0", "10.77.0.1"},
	} {
		ln := f.listen("tcp", c.listen)
		for state, prepare := range map[State]func(node, client *net.TCPConn) error{
			Established: func(_, _ *net.TCPConn) error { return nil },
			CloseWait:   func(_, client *net.TCPConn) error { return client.CloseWrite() },
			FinWait2:    func(node, _ *net.TCPConn) error { return node.CloseWrite() },
			TimeWait: func(node, client *net.TCPConn) error {
				return errors.Join(node.Close(), client.Close())
			},
		} {
			node, client := f.connect(ln, c.host)
			r := at(node)
			f.must(prepare(node, client))
			s := f.waitState(state, r)

			wrong := s
			wrong.Cookie[0]++
			if err := f.c.Destroy(wrong); err != nil {
				t.Errorf("%s: another socket's cookie: %v", s, err)
			}
			f.waitState(state, r)
			if n, err := f.c.DestroySockets([]Socket{s}); n != 1 || err != nil {
				t.Errorf("%s: destroyed %d, %v", s, n, err)
			}
			f.waitGone(r)
			if n, err := f.c.DestroySockets([]Socket{s}); n != 0 || err != nil {
				t.Errorf("%s: second time %d, %v", s, n, err)
			}
			if state == Established {
				_ = node.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := node.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
					t.Errorf("owner's read: %v", err)
				}
			}
		}
		// An orphan in FIN_WAIT2 is a TIME_WAIT socket in disguise.
		node, _ := f.connect(ln, c.host)
		r := at(node)
		f.must(node.Close())
		f.must(f.c.Destroy(f.waitState(FinWait2, r)))
		f.waitGone(r)
		// By addresses alone.
		node, _ = f.connect(ln, c.host)
		s := f.waitState(Established, at(node))
		f.must(f.c.Destroy(Socket{Local: s.Local, Remote: s.Remote}))
		f.waitGone(ends{s.Local, s.Remote})
	}
}

func TestDestroyListener(t *testing.T) {
	f := newFixture(t, "destroyl")
	ln := f.listen("tcp", "[::]:7001")
	addrs := []netip.Addr{f.net.NodeAddr()}
	list, err := f.c.Listeners(addrs, nil)
	f.must(err)
	if len(list) != 1 {
		t.Fatalf("listeners: %v", list)
	}
	f.must(f.c.Destroy(list[0]))
	if list, err = f.c.Listeners(addrs, nil); err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	if _, err := f.net.Client().Dial("tcp", "10.77.0.1:7001"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	_ = ln
}

func TestDestroyAll(t *testing.T) {
	f := newFixture(t, "destroyall")
	f.must(f.net.Node().AddAddr("eth0", "10.77.0.50/32"))
	ln := f.listen("tcp", "[::]:0")
	keep, _ := f.connect(ln, "10.77.0.1")
	for i := range 200 {
		node, client := f.connect(ln, "10.77.0.50")
		if i%2 == 0 {
			r := at(node)
			f.must(errors.Join(node.Close(), client.Close()))
			f.waitState(TimeWait, r)
		}
	}
	q := Query{Local: []netip.Addr{netip.MustParseAddr("10.77.0.50")}}
	if n, err := f.c.DestroyAll(q); n != 200 || err != nil {
		t.Fatalf("destroyed %d, %v", n, err)
	}
	if n, err := f.c.DestroyAll(q); n != 0 || err != nil {
		t.Fatalf("second time %d, %v", n, err)
	}
	f.waitState(Established, at(keep))
	// Nothing holds the port now, not even without SO_REUSEADDR.
	port := ln.Addr().(*net.TCPAddr).Port
	f.must(ln.Close())
	f.must(f.net.Node().Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{10, 77, 0, 50}})
	}))
}

func TestDestroyWithoutPrivilege(t *testing.T) {
	f := newFixture(t, "priv")
	ln := f.listen("tcp4", "10.77.0.1:0")
	node, _ := f.connect(ln, "10.77.0.1")
	s := f.waitState(Established, at(node))
	err := f.net.Node().Do(func() error {
		c, err := Open()
		if err != nil {
			return err
		}
		defer c.Close()
		return withoutCapabilities(func() error { return c.Destroy(s) })
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("without privilege: %v", err)
	}
	f.waitState(Established, at(node))
}

// withoutCapabilities runs f with this thread's effective capabilities cleared.
func withoutCapabilities(f func() error) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var full, none [2]unix.CapUserData
	if err := unix.Capget(&header, &full[0]); err != nil {
		return err
	}
	none = full
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&header, &none[0]); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, unix.Capset(&header, &full[0]))
}

func TestOpen(t *testing.T) {
	f := newFixture(t, "open")
	ln := f.listen("tcp4", "10.77.0.1:0")
	node, _ := f.connect(ln, "10.77.0.1")
	var inside *Conn
	f.must(f.net.Node().Do(func() (err error) { inside, err = Open(); return err }))
	defer inside.Close()
	byPath, err := OpenIn(f.net.Node().Path())
	f.must(err)
	defer byPath.Close()
	own, err := Open()
	f.must(err)
	defer own.Close()
	for name, c := range map[string]*Conn{"Open inside": inside, "by path": byPath, "elsewhere": own} {
		list, err := c.List(Query{Local: []netip.Addr{f.net.NodeAddr()}})
		f.must(err)
		if found := len(list) == 1 && list[0].Remote == remote(node); found != (c != own) {
			t.Errorf("%s: %v", name, list)
		}
	}
	for _, bad := range []string{"", "no-such-namespace", "/no/such/file", "/dev/null"} {
		if c, err := OpenIn(bad); err == nil {
			_ = c.Close()
			t.Errorf("OpenIn(%q) succeeded", bad)
		} else if bad != "" && bad[0] != '/' && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("OpenIn(%q): %v", bad, err)
		}
	}
	f.must(byPath.Close())
	if _, err := byPath.List(Query{}); err == nil {
		t.Error("List on a closed Conn succeeded")
	}
}

// mesh makes count connections inside the node's namespace, over loopback, half of them on a second address.
func (f *fixture) mesh(count int) {
	f.t.Helper()
	var lns []*net.TCPListener
	for _, host := range []string{"127.0.0.1", "127.0.0.2"} {
		lns = append(lns, f.listen("tcp4", host+":0"))
	}
	for i := range count {
		ln := lns[i%2]
		c, err := f.net.Node().DialFrom("tcp4", fmt.Sprintf("127.0.%d.9:0", 1+i/20000), ln.Addr().String())
		f.must(err)
		f.t.Cleanup(func() { _ = c.Close() })
		n, err := ln.AcceptTCP()
		f.must(err)
		f.t.Cleanup(func() { _ = n.Close() })
	}
}

func TestListIsComplete(t *testing.T) {
	f := newFixture(t, "complete")
	const count = 1500
	f.mesh(count)
	list, err := f.c.List(Query{Info: true})
	f.must(err)
	seen := map[string]bool{}
	for _, s := range list {
		if s.Info == nil || s.Info.SndMSS == 0 || s.Info.RcvWnd == 0 {
			t.Fatalf("%s: info %+v", s, s.Info)
		}
		seen[s.String()] = true
	}
	if len(list) != 2*count || len(seen) != 2*count {
		t.Errorf("%d sockets, %d different, want %d", len(list), len(seen), 2*count)
	}
	list, err = f.c.List(Query{Local: []netip.Addr{netip.MustParseAddr("127.0.0.2")}})
	f.must(err)
	if len(list) != count/2 {
		t.Errorf("%d on one address, want %d", len(list), count/2)
	}
	// Both ends are here: the reset of one takes the other along, often before its turn.
	if n, err := f.c.DestroyAll(Query{}); n < count || n > 2*count || err != nil {
		t.Errorf("destroyed %d, %v", n, err)
	}
	if list, err = f.c.List(Query{}); err != nil || len(list) != 0 {
		t.Errorf("%d left, %v", len(list), err)
	}
}

func BenchmarkList(b *testing.B) {
	f := newFixture(b, "bench")
	f.mesh(5000)
	for name, q := range map[string]Query{
		"all10000":     {},
		"all10000info": {Info: true},
		"one2500":      {Local: []netip.Addr{netip.MustParseAddr("127.0.0.2")}},
		"none":         {Local: []netip.Addr{netip.MustParseAddr("10.1.1.1")}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.c.List(q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
