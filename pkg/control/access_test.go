package control

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func newGzipReader() connect.Decompressor { return &gzip.Reader{} }
func newGzipWriter() connect.Compressor   { return gzip.NewWriter(io.Discard) }

// childEnv names the socket that a child process of this test calls.
const childEnv = "NFCONNFILTER_TEST_SOCKET"

// childMain calls Status with each protocol and prints the outcome.
func childMain() int {
	for _, opts := range [][]connect.ClientOption{nil, {connect.WithGRPC()}} {
		c := Dial(os.Getenv(childEnv), opts...)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		_, err := c.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{App: "child"}))
		cancel()
		c.Close()
		fmt.Printf("%s|%v\n", connect.CodeOf(err), err)
		if err == nil {
			fmt.Println("ok")
		}
	}
	return 0
}

// runChild runs this test's program as another user.
func runChild(t *testing.T, socket string, cred *syscall.Credential) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: another user's process is started")
	}
	// The test's program lies in a directory that only its owner may enter.
	exe := filepath.Join(publicDir(t), "child")
	src, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, src, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Dir = "/"
	cmd.Env = []string{childEnv + "=" + socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// publicDir returns a new directory that every user can enter.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// publicServer serves f on a socket that every user may connect to, so that
// only the credentials stand in the way.
func publicServer(t *testing.T, f *fake, allowed func(Caller) error) string {
	t.Helper()
	path := filepath.Join(publicDir(t), "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, f, allowed)
	return path
}

func TestOtherUser(t *testing.T) {
	group := func() string {
		g, err := user.LookupGroupId("1")
		if err != nil {
			return "1"
		}
		return g.Name
	}()
	many := make([]uint32, 0, 101) // more than the first buffer holds
	for i := range uint32(100) {
		many = append(many, 5000+i)
	}
	many = append(many, 1)
	for _, tc := range []struct {
		name  string
		group string
		cred  syscall.Credential
		ok    bool
		says  string
	}{
		{"no group at all", "", syscall.Credential{Uid: 65534, Gid: 65534}, false, "only root"},
		{"group missing", "no-such-group-here", syscall.Credential{Uid: 65534, Gid: 65534}, false, "no-such-group-here does not exist"},
		{"not a member", group, syscall.Credential{Uid: 65534, Gid: 65534}, false, "join group " + group},
		{"group 0 is not root", group, syscall.Credential{Uid: 65534, Gid: 0}, false, "join group " + group},
		{"primary group", group, syscall.Credential{Uid: 65534, Gid: 1}, true, ""},
		{"supplementary group", group, syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{7, 1}}, true, ""},
		{"one of many groups", group, syscall.Credential{Uid: 65534, Gid: 65534, Groups: many}, true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &fake{callers: make(chan Caller, 2)}
			path := publicServer(t, f, AllowGroup(tc.group))
			out := runChild(t, path, &tc.cred)
			if tc.ok {
				if strings.Count(out, "\nok\n") != 2 {
					t.Fatalf("refused: %s", out)
				}
				c := <-f.callers
				if c.UID != tc.cred.Uid || c.GID != tc.cred.Gid || !c.InGroup(1) || c.PID <= 0 || c.PID == int32(os.Getpid()) {
					t.Errorf("caller %+v", c)
				}
				return
			}
			if strings.Count(out, "permission_denied|") != 2 || strings.Count(out, tc.says) != 2 {
				t.Fatalf("got %s, want permission_denied with %q", out, tc.says)
			}
			if len(f.callers) != 0 {
				t.Fatal("the refused request was executed")
			}
		})
	}
}

// A refused caller's request is not even read: more of it than any buffer
// holds is sent, and the answer comes nevertheless.
func TestRefusedUnread(t *testing.T) {
	f := &fake{callers: make(chan Caller, 1)}
	path := serve(t, f, func(Caller) error { return errors.New("join group wheel") })
	got := rawHTTP(t, path, "POST /nfconnfilter.v1.Filter/Status HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 60000000\r\n\r\n{")
	if !strings.HasPrefix(got, "HTTP/1.1 403 ") || !strings.Contains(got, `"code":"permission_denied"`) || !strings.Contains(got, "join group wheel") {
		t.Fatalf("got %q", got)
	}
	if len(f.callers) != 0 {
		t.Fatal("executed")
	}
}

func TestAllowGroupOwnUser(t *testing.T) {
	allowed := AllowGroup("no-such-group-here")
	if err := allowed(Caller{UID: uint32(os.Geteuid()), GID: 12345}); err != nil {
		t.Error(err)
	}
	if err := allowed(Caller{UID: 0, GID: 12345}); err != nil {
		t.Error(err)
	}
	if err := allowed(Caller{UID: 4242, GID: 0}); err == nil {
		t.Error("a stranger is let in")
	}
}

func TestListenModeAndGroup(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "nf")
	path := filepath.Join(dir, "c.sock")
	gid := strconv.Itoa(os.Getegid())
	if os.Geteuid() == 0 {
		gid = "12321"
	}
	l, err := Listen(path, gid)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if w := Warning(l); w != "" {
		t.Errorf("warning %q", w)
	}
	for name, mode := range map[string]fs.FileMode{path: 0o660 | fs.ModeSocket, dir: 0o750 | fs.ModeDir} {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != mode || strconv.Itoa(int(st.Sys().(*syscall.Stat_t).Gid)) != gid {
			t.Errorf("%s: mode %v group %d, want %v and %s", name, st.Mode(), st.Sys().(*syscall.Stat_t).Gid, mode, gid)
		}
	}
	l2, err := Listen(filepath.Join(dir, "d.sock"), "no-such-group-here")
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()
	if w := Warning(l2); !strings.Contains(w, "no-such-group-here does not exist") || !strings.Contains(w, "only root") {
		t.Errorf("warning %q", w)
	}
	if Warning(nil) != "" {
		t.Error("warning of nothing")
	}
}

func TestListenInTheWay(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, ""); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("in use: %v", err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()
	l, err := Listen(path, "")
	if err != nil {
		t.Fatalf("stale: %v", err)
	}
	l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, ""); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Errorf("file: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "keep" {
		t.Error("the file is gone")
	}
	if _, err := Listen("", ""); err == nil {
		t.Error("no path")
	}
	if _, err := Listen(filepath.Join(dir, strings.Repeat("x", 120)), ""); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("long path: %v", err)
	}
}

// Of many daemons that start at once on a stale socket one gets it.
func TestListenRace(t *testing.T) {
	dir := t.TempDir()
	for i := range 100 {
		path := filepath.Join(dir, strconv.Itoa(i))
		stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		stale.SetUnlinkOnClose(false)
		stale.Close()
		var wg sync.WaitGroup
		got := make(chan net.Listener, 4)
		start := make(chan struct{})
		for range cap(got) {
			wg.Go(func() {
				<-start
				if l, err := Listen(path, ""); err == nil {
					got <- l
				}
			})
		}
		close(start)
		wg.Wait()
		close(got)
		if n := len(got); n != 1 {
			t.Errorf("try %d: %d daemons have the socket", i, n)
		}
		for l := range got {
			l.Close()
		}
	}
}

func TestPeerOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := peerOf(s.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	own, _ := os.Getgroups()
	if got.PID != int32(os.Getpid()) || got.UID != uint32(os.Getuid()) || got.GID != uint32(os.Getgid()) || len(got.Groups) != len(own) {
		t.Errorf("caller %+v, groups %v", got, own)
	}
	for _, g := range own {
		if !slices.Contains(got.Groups, uint32(g)) {
			t.Errorf("group %d is missing in %v", g, got.Groups)
		}
	}
}

// Another user who may write the socket's directory puts a link in its place:
// what it leads to is left as it is.
func TestSocketReplacedByLink(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "agent.sock")
	if err := os.Symlink(secret, path); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, secret} {
		if _, err := giveTo(p, os.Getgid()); err == nil || !strings.Contains(err.Error(), "something else in its place") {
			t.Errorf("%s: %v", p, err)
		}
	}
	// Another socket of the daemon's user, which is for nobody else.
	other := filepath.Join(dir, "other.sock")
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	link := filepath.Join(dir, "control.sock")
	if err := errors.Join(os.Chmod(other, 0o600), os.Symlink(other, link)); err != nil {
		t.Fatal(err)
	}
	if _, err := giveTo(link, os.Getgid()); err == nil || !strings.Contains(err.Error(), "something else in its place") {
		t.Errorf("%s: %v", link, err)
	}
	for _, p := range []string{secret, other} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", p, st.Mode(), err)
		}
	}
}
