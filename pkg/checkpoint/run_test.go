package checkpoint

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// lockedBuffer takes log lines from several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// The agent as a whole over its real sockets, with a filter that plays dead or
// answers.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	node, shared := filepath.Join(dir, "node.toml"), filepath.Join(dir, "shared")
	control1, agentSock := filepath.Join(dir, "c.sock"), filepath.Join(dir, "a.sock")
	nodeText := "name = \"node-a\"\ninterface = \"eth0\"\naddress = \"127.0.0.1\"\nstate_dir = \"" + dir + "/state\"\ncontrol_socket = \"" + control1 + "\"\nagent_socket = \"" + agentSock + "\"\n"
	writeFile(t, node, nodeText)
	writeFile(t, filepath.Join(shared, "apps", "redis.toml"), "name = \"redis\"\nvip = \"192.0.2.100\"\ninclude_ports = [6379]\n[process]\nstart = [\"/bin/true\"]\n")
	var logs lockedBuffer
	reload := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	o := Options{SharedDir: shared, NodeFile: node, Logger: slog.New(slog.NewTextHandler(&logs, nil)), Reload: reload, RestoreListen: freePort(t)}
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	c := control.DialAgent(agentSock)
	defer c.Close()
	within(t, "it serves", func() bool {
		_, err := c.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"}))
		return err == nil
	})
	_, err := c.Snapshot(t.Context(), connect.NewRequest(&pb.AgentSnapshotRequest{App: "redis"}))
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "start nfconnfilter run") {
		t.Errorf("without a filter: %v", err)
	}
	_, err = c.Start(t.Context(), connect.NewRequest(&pb.AgentStartRequest{App: "../redis"}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a name that is a path: %v", err)
	}
	_, err = c.Restore(t.Context(), connect.NewRequest(&pb.AgentRestoreRequest{App: "nginx"}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unknown application: %v", err)
	}
	// An invalid configuration leaves the old one in force.
	writeFile(t, node, "name = 1\n")
	reload <- struct{}{}
	within(t, "refused", func() bool { return strings.Contains(logs.String(), "the old one stays") })
	writeFile(t, node, nodeText)
	reload <- struct{}{}
	within(t, "read again", func() bool { return strings.Contains(logs.String(), "generation=2") })
	// A restore request comes through to the filter.
	w, _ := newWorld(t, 0)
	w.state = control.StateConnected
	l, err := control.Listen(control1, "")
	if err != nil {
		t.Fatal(err)
	}
	fctx, fcancel := context.WithCancel(t.Context())
	fdone := make(chan error, 1)
	go func() {
		fdone <- control.Serve(fctx, l, control.FilterHandler(w), func(control.Caller) error { return nil })
	}()
	conn, err := net.DialTimeout("tcp", o.RestoreListen, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "Restore 192.000.002.100\r\n")
	if b, err := io.ReadAll(conn); string(b) != "OK\r\n" {
		t.Errorf("answer %q, %v", b, err)
	}
	conn.Close()
	within(t, "the filter's state decides", func() bool { return strings.Contains(logs.String(), "not allowed in state CONNECTED") })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("end: %v", err)
	}
	fcancel()
	if err := <-fdone; err != nil {
		t.Errorf("filter's end: %v", err)
	}
	c.Close()
	if err := Run(t.Context(), Options{SharedDir: shared, NodeFile: filepath.Join(dir, "none.toml")}); err == nil {
		t.Error("it ran without a node file")
	}
}
