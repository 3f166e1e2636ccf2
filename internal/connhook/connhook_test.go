package connhook

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// roleEnv makes the test binary play another process: an application that
// connects as it is told, or an agent that attaches and ends.
const roleEnv = "CONNHOOK_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); {
	case role == "app":
		playApp()
	case role != "":
		var s Source
		err := json.Unmarshal([]byte(role), &s)
		if err == nil {
			err = Attach(os.Args[1], s)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// call is one connect of the application.
type call struct {
	Family, Type int
	Bind, To     netip.AddrPort
	// NoPort takes no port at the bind (IP_BIND_ADDRESS_NO_PORT, ip(7)).
	NoPort bool
	// Undo dissolves the connection: an address that was bound stays.
	Undo bool
}

// playApp connects as each line of its input says, answers with the source
// address or the error, and keeps every socket.
func playApp() {
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		var c call
		if err := json.Unmarshal(sc.Bytes(), &c); err != nil {
			panic(err)
		}
		from, err := c.connect()
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		fmt.Println(from)
	}
	os.Exit(0)
}

func (c call) sockaddr(a netip.AddrPort) unix.Sockaddr {
	if c.Family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func (c call) connect() (netip.Addr, error) {
	fd, err := unix.Socket(c.Family, c.Type, 0)
	if err != nil {
		return netip.Addr{}, err
	}
	if c.NoPort {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return netip.Addr{}, err
		}
	}
	if c.Bind.IsValid() {
		if err := unix.Bind(fd, c.sockaddr(c.Bind)); err != nil {
			return netip.Addr{}, err
		}
	}
	if err := unix.Connect(fd, c.sockaddr(c.To)); err != nil {
		return netip.Addr{}, err
	}
	if c.Undo {
		var none [16]byte // AF_UNSPEC, connect(2)
		if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none)); e != 0 {
			return netip.Addr{}, e
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.Addr{}, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr), nil
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr).Unmap(), nil
	}
	return netip.Addr{}, fmt.Errorf("%T", sa)
}

const (
	vip4, vip6       = "10.77.0.100", "fd77::100"
	own4, own6       = "10.77.0.1", "fd77::1"
	remote4, remote6 = "10.77.0.2", "fd77::2"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a node with both VIPs, an application in a cgroup of it, and servers
// on both ends.
type world struct {
	t      *testing.T
	net    *testnet.Net
	cgroup string
	in     io.Writer
	out    *bufio.Scanner
	ln     map[string]net.Listener
}

// cgroupRoot is where cgroup v2 is mounted.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Fatal("cgroup v2 is not mounted")
	return ""
}

func newCgroup(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(cgroupRoot(t), fmt.Sprintf("nfcf-test-%d", os.Getpid()))
	must(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				return
			}
			if time.Now().After(end) {
				t.Error(err)
				return
			}
		}
	})
	return dir
}

// servers are the addresses and ports that are listened on, "node" or "client".
var servers = map[string]string{
	remote4 + ":5432": "client", remote4 + ":443": "client", "[" + remote6 + "]:5432": "client", "[" + remote6 + "]:443": "client",
	"127.0.0.1:5432": "node", "[::1]:5432": "node", vip4 + ":5432": "node", "[" + vip6 + "]:5432": "node",
}

func newWorld(t *testing.T) *world {
	t.Helper()
	testnet.RequireRoot(t)
	w := &world{t: t, net: testnet.New(t, testnet.Options{Name: "hook"}), cgroup: newCgroup(t), ln: map[string]net.Listener{}}
	must(t, errors.Join(w.net.Client().AddAddr(testnet.Iface, remote6+"/64"), w.net.Node().AddAddr(testnet.Iface, own6+"/64")))
	for _, v := range []string{vip4 + "/32", vip6 + "/128"} {
		must(t, w.net.Node().AddAddr(testnet.Iface, v))
	}
	// Without us it is the node's own address that is chosen.
	out, err := w.net.Node().Command("ip", "-6", "addr", "change", vip6+"/128", "dev", testnet.Iface, "preferred_lft", "0").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for at, where := range servers {
		ns := w.net.Client()
		if where == "node" {
			ns = w.net.Node()
		}
		ln, err := ns.Listen("tcp", at)
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		w.ln[at] = ln
	}
	self, err := os.Executable()
	must(t, err)
	cmd := w.net.Node().Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"=app")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	dir, err := os.Open(w.cgroup)
	must(t, err)
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	must(t, cmd.Start())
	t.Cleanup(func() { _, _ = in.Close(), cmd.Wait() })
	w.in, w.out = in, bufio.NewScanner(stdout)
	return w
}

func tcp(to string) call {
	c := call{Family: unix.AF_INET, Type: unix.SOCK_STREAM, To: netip.MustParseAddrPort(to)}
	if c.To.Addr().Is6() {
		c.Family = unix.AF_INET6
	}
	return c
}

// from changes how a call is made.
func (c call) from(bind string) call {
	c.Bind = netip.MustParseAddrPort(bind)
	return c
}

func (c call) as(family, typ int) call {
	c.Family, c.Type = family, typ
	return c
}

// connect has the application connect and gives its source, as itself and, for
// TCP, the server see it.
func (w *world) connect(c call) string {
	w.t.Helper()
	b, err := json.Marshal(c)
	must(w.t, err)
	_, err = fmt.Fprintf(w.in, "%s\n", b)
	must(w.t, err)
	if !w.out.Scan() {
		w.t.Fatal("the application has ended")
	}
	local := w.out.Text()
	ln := w.ln[c.To.String()]
	if c.To.Addr().Is4In6() {
		ln = w.ln[netip.AddrPortFrom(c.To.Addr().Unmap(), c.To.Port()).String()]
	}
	if c.Type != unix.SOCK_STREAM || ln == nil || strings.HasPrefix(local, "error") {
		return local
	}
	must(w.t, ln.(*net.TCPListener).SetDeadline(time.Now().Add(10*time.Second)))
	conn, err := ln.Accept()
	must(w.t, err)
	w.t.Cleanup(func() { conn.Close() })
	if c.Undo {
		return local
	}
	if seen := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String(); seen != local {
		w.t.Errorf("%+v: source %s, the server sees %s", c, local, seen)
	}
	return local
}

func (w *world) want(what string, c call, source string) {
	w.t.Helper()
	if got := w.connect(c); got != source {
		w.t.Errorf("%s, to %s: source %s, want %s", what, c.To, got, source)
	}
}

func addrs(text ...string) (out []netip.Addr) {
	for _, s := range text {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

const mapped4 = "[::ffff:" + remote4 + "]"

func TestSources(t *testing.T) {
	w := newWorld(t)
	plain := func(what string) {
		t.Helper()
		w.want(what, tcp(remote4+":5432"), own4)
		w.want(what, tcp("["+remote6+"]:5432"), own6)
		w.want(what, tcp(mapped4+":5432"), own4)
	}
	plain("no hook")
	must(t, Attach(w.cgroup, Source{Addrs: addrs(vip4, vip6)}))
	for _, port := range []string{":5432", ":443"} {
		w.want("IPv4", tcp(remote4+port), vip4)
		w.want("IPv6", tcp("["+remote6+"]"+port), vip6)
		w.want("IPv4 over an IPv6 socket", tcp(mapped4+port), vip4)
	}
	for _, c := range []struct {
		what, source string
		call
	}{
		{"loopback", "127.0.0.1", tcp("127.0.0.1:5432")},
		{"loopback", "::1", tcp("[::1]:5432")},
		{"loopback over an IPv6 socket", "127.0.0.1", tcp("[::ffff:127.0.0.1]:5432")},
		{"unspecified", "127.0.0.1", tcp("0.0.0.0:5432")},
		{"unspecified", "::1", tcp("[::]:5432")},
		{"UDP", own4, tcp(remote4+":5432").as(unix.AF_INET, unix.SOCK_DGRAM)},
		{"UDP", own6, tcp("["+remote6+"]:5432").as(unix.AF_INET6, unix.SOCK_DGRAM)},
		{"bound", own4, tcp(remote4 + ":5432").from(own4 + ":0")},
		{"bound", own6, tcp("[" + remote6 + "]:5432").from("[" + own6 + "]:0")},
		{"bound over an IPv6 socket", own4, tcp(mapped4 + ":5432").from("[::ffff:" + own4 + "]:0")},
		{"port bound alone", own4, tcp(remote4 + ":5432").from("0.0.0.0:12345")},
		{"port bound alone", own6, tcp("[" + remote6 + "]:5432").from("[::]:12346")},
	} {
		w.want(c.what, c.call, c.source)
		if c.Bind.IsValid() && c.Bind.Port() == 0 {
			c.NoPort = true
			w.want(c.what+" without a port", c.call, c.source)
		}
	}
	// The kernel's own choice for one of its addresses is that address: only
	// when the connection is gone it shows whether it was bound.
	for to, unbound := range map[string]string{vip4 + ":5432": "0.0.0.0", "[" + vip6 + "]:5432": "::", "[::ffff:" + vip4 + "]:5432": "::"} {
		w.want("the VIP itself", tcp(to), tcp(to).To.Addr().Unmap().String())
		c := tcp(to)
		c.Undo = true
		w.want("not bound to the VIP itself", c, unbound)
	}
	c := tcp(remote4 + ":443")
	c.Undo = true
	w.want("bound", c, vip4)
	// A connect fails as it would without us.
	if got := w.connect(tcp(remote4 + ":1")); got != "error: connection refused" {
		t.Errorf("to a port without a server: %s", got)
	}
	must(t, Detach(w.cgroup))
	plain("detached")
	must(t, Detach(w.cgroup))
}

func TestPorts(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		ports []uint16
		binds bool
	}{
		{[]uint16{5432}, true}, {[]uint16{443}, false}, {[]uint16{443, 5431, 5432, 5433, 9000}, true},
		{[]uint16{5433, 5431}, false}, {[]uint16{1, 5432}, true}, {[]uint16{5432, 65535}, true}, {[]uint16{1}, false}, {[]uint16{65535}, false},
	} {
		must(t, Attach(w.cgroup, Source{Addrs: addrs(vip4, vip6), Ports: c.ports}))
		want4, want6 := own4, own6
		if c.binds {
			want4, want6 = vip4, vip6
		}
		what := fmt.Sprint(c.ports)
		w.want(what, tcp(remote4+":5432"), want4)
		w.want(what, tcp("["+remote6+"]:5432"), want6)
		w.want(what, tcp(mapped4+":5432"), want4)
	}
}

// As many ranges as are possible pass the verifier, and work.
func TestManyPorts(t *testing.T) {
	w := newWorld(t)
	var ports []uint16
	for p := uint16(5432); len(ports) < maxRanges; p += 2 {
		ports = append(ports, p)
	}
	must(t, Attach(w.cgroup, Source{Addrs: addrs(vip4, vip6), Ports: ports}))
	w.want("listed", tcp("["+remote6+"]:5432"), vip6)
	w.want("not listed", tcp("["+remote6+"]:443"), own6)
	err := Attach(w.cgroup, Source{Addrs: addrs(vip4), Ports: append(ports, 1)})
	if err == nil || !strings.Contains(err.Error(), "name fewer") {
		t.Errorf("one more: %v", err)
	}
}

// Only the families of which there is a VIP are touched.
func TestFamilies(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		addrs        []netip.Addr
		want4, want6 string
	}{{addrs(vip4), vip4, own6}, {addrs(vip6), own4, vip6}, {addrs("::ffff:" + vip4), vip4, own6}} {
		must(t, Attach(w.cgroup, Source{Addrs: c.addrs}))
		w.want("of one family", tcp(remote4+":5432"), c.want4)
		w.want("of one family", tcp("["+remote6+"]:5432"), c.want6)
		w.want("of one family", tcp(mapped4+":5432"), c.want4)
	}
}

// A VIP that is not there keeps no connect from its way.
func TestNoSuchAddress(t *testing.T) {
	w := newWorld(t)
	must(t, Attach(w.cgroup, Source{Addrs: addrs("10.77.0.222", "fd77::222")}))
	w.want("no such address", tcp(remote4+":5432"), own4)
	w.want("no such address", tcp("["+remote6+"]:5432"), own6)
	w.want("no such address", tcp(mapped4+":5432"), own4)
}

// A port serves one connection to each remote: two ports are enough for twice
// as many connections as there are servers.
func TestPortsAreShared(t *testing.T) {
	w := newWorld(t)
	must(t, w.net.Node().Sysctl("net/ipv4/ip_local_port_range", "40000 40001"))
	must(t, Attach(w.cgroup, Source{Addrs: addrs(vip4, vip6)}))
	for range 2 {
		for _, port := range []string{":5432", ":443"} {
			w.want("few ports", tcp(remote4+port), vip4)
			w.want("few ports", tcp("["+remote6+"]"+port), vip6)
		}
	}
	if got := w.connect(tcp(remote4 + ":5432")); got != "error: cannot assign requested address" {
		t.Errorf("no port is free any more: %s", got)
	}
}

// ids are the programs on the cgroup, of both hooks.
func (w *world) ids() (out []ebpf.ProgramID) {
	w.t.Helper()
	dir, err := os.Open(w.cgroup)
	must(w.t, err)
	defer dir.Close()
	for _, h := range hooks {
		r, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: h.attach})
		must(w.t, err)
		for _, p := range r.Programs {
			out = append(out, p.ID)
		}
	}
	return out
}

// The hook outlives the process that attached it; the next takes it over, which
// leaves one program, or removes it. A program of somebody else stays.
func TestOutlives(t *testing.T) {
	w := newWorld(t)
	stranger, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "stranger", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	must(t, err)
	defer stranger.Close()
	dir, err := os.Open(w.cgroup)
	must(t, err)
	defer dir.Close()
	must(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: stranger,
		Attach: ebpf.AttachCGroupInet4Connect, Flags: unix.BPF_F_ALLOW_MULTI}))
	strangers := w.ids()
	agent := func(s Source) {
		t.Helper()
		b, err := json.Marshal(s)
		must(t, err)
		cmd := exec.Command(os.Args[0], w.cgroup)
		cmd.Env = append(os.Environ(), roleEnv+"="+string(b))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	agent(Source{Addrs: addrs(vip4, vip6)})
	first := w.ids()
	w.want("its agent has ended", tcp(remote4+":5432"), vip4)
	w.want("its agent has ended", tcp("["+remote6+"]:5432"), vip6)
	agent(Source{Addrs: addrs(vip4, vip6), Ports: []uint16{443}})
	second := w.ids()
	if len(first) != 3 || len(second) != 3 {
		t.Errorf("programs %v, then %v; want those of one attachment and the other's", first, second)
	}
	for _, id := range second {
		if slices.Contains(first, id) != slices.Contains(strangers, id) {
			t.Errorf("program %d of %v was not replaced: %v", id, first, second)
		}
	}
	w.want("taken over", tcp(remote4+":5432"), own4)
	w.want("taken over", tcp(remote4+":443"), vip4)
	w.want("taken over", tcp("["+remote6+"]:443"), vip6)
	must(t, Detach(w.cgroup))
	w.want("removed", tcp(remote4+":443"), own4)
	w.want("removed", tcp("["+remote6+"]:443"), own6)
	if left := w.ids(); !slices.Equal(left, strangers) {
		t.Errorf("programs %v, want the other's %v alone", left, strangers)
	}
	// Without a VIP of IPv4 there is one program less.
	agent(Source{Addrs: addrs(vip4, vip6)})
	agent(Source{Addrs: addrs(vip6)})
	if left := w.ids(); len(left) != 2 {
		t.Errorf("programs %v, want the one of IPv6 and the other's %v", left, strangers)
	}
}

func TestErrors(t *testing.T) {
	testnet.RequireRoot(t)
	for what, s := range map[string]Source{"none": {}, "two of one family": {Addrs: addrs(vip4, own4)}, "unspecified": {Addrs: addrs("::")}} {
		if err := Attach("/", s); err == nil || !strings.Contains(err.Error(), "address") {
			t.Errorf("%s: %v", what, err)
		}
	}
	s := Source{Addrs: addrs(vip4)}
	if err := Attach(t.TempDir(), s); err == nil || !strings.Contains(err.Error(), "cgroup v2") {
		t.Errorf("no cgroup: %v", err)
	}
	gone := filepath.Join(t.TempDir(), "gone")
	if err := Attach(gone, s); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is gone: %v", err)
	}
	if err := Detach(gone); err != nil {
		t.Errorf("removal of what is gone: %v", err)
	}
	// A program above that is for itself alone.
	dir, err := os.Open(newCgroup(t))
	must(t, err)
	defer dir.Close()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	must(t, err)
	defer p.Close()
	must(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect}))
	below := filepath.Join(dir.Name(), "below")
	must(t, os.Mkdir(below, 0o755))
	defer unix.Rmdir(below)
	if err := Attach(below, s); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "for itself alone") {
		t.Errorf("below an exclusive program: %v", err)
	}
}

func TestPortRanges(t *testing.T) {
	for _, c := range []struct {
		in   []uint16
		want []portRange
	}{
		{nil, nil},
		{[]uint16{9, 7, 8, 8, 3}, []portRange{{3, 3}, {7, 9}}},
		{[]uint16{65535, 1, 65534}, []portRange{{1, 1}, {65534, 65535}}},
	} {
		if got := portRanges(c.in); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}
