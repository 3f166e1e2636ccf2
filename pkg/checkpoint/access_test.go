package checkpoint

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// dialAs connects to a Unix socket as another user. The raw system call changes
// one thread alone, which ends with it.
func dialAs(uid int, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	res := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		u := uintptr(uid)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, u, u, u); errno != 0 {
			res <- result{nil, errno}
			return
		}
		c, err := net.Dial("unix", path)
		res <- result{c, err}
	}()
	r := <-res
	return r.c, r.err
}

// openSocket serves an agent to everybody, as to members of control_group.
func openSocket(t *testing.T, a *agent) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	try(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	try(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "agent.sock")
	l, err := control.Listen(path, "")
	try(t, err)
	try(t, os.Chmod(path, 0o666))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- control.Serve(ctx, l, control.AgentHandler(a), func(control.Caller) error { return nil })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return path
}

// postAs sends one request as a user and gives the answer.
func postAs(t *testing.T, uid int, path, procedure, body string) string {
	t.Helper()
	c, err := dialAs(uid, path)
	try(t, err)
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	r, err := (&http.Client{Transport: tr}).Post("http://agent"+procedure, "application/json", strings.NewReader(body))
	try(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	try(t, err)
	return string(b)
}

// The members of control_group do not get root by it: a process that they name as
// CRIU's, and would have the agent end, is not the application's.
func TestActionIsRoots(t *testing.T) {
	needRoot(t)
	w, a, c := newCRIU(t, 1)
	path := openSocket(t, a)
	body := `{"action":"` + criu.PreDump + `","pid":1234,"criuPid":4321,"imageDir":"/proc/4321/fd/5"}`
	if got := postAs(t, stranger, path, nfconnfilterv1connect.AgentCriuActionProcedure, body); !strings.Contains(got, "permission_denied") || !strings.Contains(got, "user ID 12345 is not allowed") {
		t.Errorf("a member of the group: %s", got)
	}
	wantState(t, w, control.StateConnected)
	if got := postAs(t, stranger, path, nfconnfilterv1connect.AgentNodeStatusProcedure, "{}"); !strings.Contains(got, "node-a") {
		t.Errorf("a member may ask other things: %s", got)
	}
	if got := postAs(t, 0, path, nfconnfilterv1connect.AgentCriuActionProcedure, body); strings.Contains(got, "permission_denied") {
		t.Errorf("root: %s", got)
	}
	close(c.ended)
	idle(t, a)
}

// Nothing is executed as root of an application whose file somebody else may
// write, whatever is asked.
func TestUntrustedFile(t *testing.T) {
	needRoot(t)
	refused := func(what string, err error) {
		t.Helper()
		if connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "redis.toml belongs to user 12345, but root executes what it says") {
			t.Errorf("%s: %v", what, err)
		}
	}
	plant := func(a *agent) {
		file := filepath.Join(a.config().SharedDir, "apps", "redis.toml")
		writeFile(t, file, "")
		try(t, os.Chmod(file, 0o600))
		try(t, os.Chown(file, stranger, stranger))
		a.trust = config.CheckTrusted
	}
	w, a, c := newCRIU(t, 1)
	plant(a)
	_, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
	refused("snapshot", err)
	_, err = a.Migrate(t.Context(), connect.NewRequest(&pb.AgentMigrateRequest{App: "redis", ToNode: "node-b"}))
	refused("migrate", err)
	refused("dump", act(t, a, criu.PreDump))
	w.running = false
	_, err = a.Start(t.Context(), connect.NewRequest(&pb.AgentStartRequest{App: "redis"}))
	refused("start", err)
	w.away()
	_, err = a.restore(t.Context(), "redis", "")
	refused("restore", err)
	c.ended = make(chan struct{})
	refused("restore by CRIU", act(t, a, criu.PreRestore))
	_, err = a.Prepare(t.Context(), connect.NewRequest(&pb.AgentPrepareRequest{App: "redis", FromNode: "node-b"}))
	if err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
		t.Errorf("take-over: %v", err)
	}
	if trace := w.trace(); strings.Contains(trace, "SNAPSHOT") || strings.Contains(trace, "RESTORE") || strings.Contains(trace, "save") || w.running {
		t.Errorf("done: %s", trace)
	}
}

// Images are programs: where somebody else can write there, CRIU does not run them.
func TestUntrustedImages(t *testing.T) {
	needRoot(t)
	for _, where := range []string{".", "..", "manifest.json", "images", "images/pages-1.img"} {
		w, a, _ := imagedWorld(t, 2)
		if _, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
			t.Fatal(err)
		}
		a.trust = config.CheckTrusted
		writeFile(t, filepath.Join(a.config().SharedDir, "apps", "redis.toml"), "")
		ids, err := a.store.ids("redis")
		try(t, err)
		at := filepath.Join(a.store.dir, "redis", ids[0], where)
		try(t, os.Chown(at, stranger, stranger))
		_, err = a.restore(t.Context(), "redis", "")
		if err == nil || !strings.Contains(err.Error(), filepath.Base(at)) || !strings.Contains(err.Error(), "belongs to user 12345") || w.running {
			t.Errorf("%s: %v, running %v", where, err, w.running)
		}
		try(t, os.Chown(at, 0, 0))
		if _, err := a.restore(t.Context(), "redis", ""); err != nil || !w.running {
			t.Errorf("%s, root's again: %v", where, err)
		}
	}
}

// Nothing is dumped to where somebody else can write: it could not be restored.
func TestUntrustedPlaceOfImages(t *testing.T) {
	needRoot(t)
	w, a, _ := imagedWorld(t, 2)
	a.trust = config.CheckTrusted
	writeFile(t, filepath.Join(a.config().SharedDir, "apps", "redis.toml"), "")
	at := filepath.Join(a.store.dir, "redis")
	try(t, os.MkdirAll(at, 0o700))
	try(t, os.Chown(at, stranger, stranger))
	_, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"})
	if err == nil || !strings.Contains(err.Error(), at+" belongs to user 12345") || !w.running || len(files(t, at)) > 0 {
		t.Errorf("%v, running %v, written %v", err, w.running, files(t, at))
	}
	wantState(t, w, control.StateConnected)
	try(t, os.Chown(at, 0, 0))
	if _, err := a.snapshot(t.Context(), &pb.AgentSnapshotRequest{App: "redis"}); err != nil {
		t.Error(err)
	}
}

// What stands in the place of a stored file neither stops the agent nor takes its
// memory.
func TestStoreOfPipesAndGiants(t *testing.T) {
	for _, name := range []string{manifestFile, connectionsFile} {
		for want, plant := range map[string]func(path string) error{
			"is no regular file":   func(path string) error { return unix.Mkfifo(path, 0o600) },
			"are the most that an": func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)) },
		} {
			s, id := store{t.TempDir()}, newSnapshotID(time.Now())
			put(t, s, "redis", id)
			path := filepath.Join(s.dir, "redis", id, name)
			try(t, os.Remove(path))
			try(t, plant(path))
			done := make(chan error, 1)
			go func() {
				_, _, err := s.load("redis", id)
				done <- err
			}()
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
					t.Errorf("%s: %v, want %q", name, err, want)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("%s is waited for", path)
			}
		}
	}
}

// At rest everything is its owner's alone: clients' data, and what names them.
func TestAtRest(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := t.TempDir()
	s := store{filepath.Join(dir, "snapshots")}
	put(t, s, "redis", newSnapshotID(time.Now()))
	state := filepath.Join(dir, "state")
	try(t, saveRecord(state, record{App: "redis", PID: 77, BootID: bootID()}))
	in := intents{state}
	try(t, in.save(intent{App: "redis"}))
	l := &osLauncher{stateDir: state, log: quietLog(), noCgroup: true}
	try(t, l.run(t.Context(), shellApp("echo hello"), shellApp("echo hello").Process.Start))
	n := 0
	for _, name := range files(t, dir) {
		fi, err := os.Lstat(filepath.Join(dir, name))
		try(t, err)
		n++
		most := os.FileMode(0o700)
		if strings.HasPrefix(name, "state/log") { // root's, for a group to read
			most = 0o750
		}
		if fi.Mode().Perm()&^most != 0 {
			t.Errorf("%s has mode %v", name, fi.Mode())
		}
	}
	if n < 9 {
		t.Errorf("%d files: %v", n, files(t, dir))
	}
}

// What other nodes may ask is a short list: nothing that starts or ends what their
// certificate is not for, and nothing that names processes or files.
func TestPeersMayAsk(t *testing.T) {
	var got []string
	for _, p := range peerProcedures {
		got = append(got, p[strings.LastIndexByte(p, '/')+1:])
	}
	if want := "NodeStatus Restore Snapshot Migrate Abort Prepare Yield Progress"; strings.Join(got, " ") != want {
		t.Errorf("%v, want %s", got, want)
	}
}
