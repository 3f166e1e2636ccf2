package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestRefused(t *testing.T) {
	r := newRig(t)
	r.agent.err = control.Error(connect.CodeFailedPrecondition, "redis", "CONNECTED", "not drained", "10.0.0.1:80 10.0.0.2:4000: 12 bytes not read")
	got := r.want(1, "", "snapshot", "redis")
	if got.err != "ckptctl: not drained\n  10.0.0.1:80 10.0.0.2:4000: 12 bytes not read\n" {
		t.Errorf("standard error %q", got.err)
	}
	r.want(1, `{"error":{"code":"failed_precondition","message":"not drained","app":"redis","state":"CONNECTED","connections":["10.0.0.1:80 10.0.0.2:4000: 12 bytes not read"]}}`+"\n",
		"snapshot", "redis", "-o", "json")
	// An error without a detail; the application is the one that was asked for.
	r.agent.err = connect.NewError(connect.CodeInternal, nil)
	r.want(1, `{"error":{"code":"internal","message":"","app":"redis","state":""}}`+"\n", "restore", "redis", "-ojson")
	// The daemons' own time-outs are failures, not ours.
	for _, code := range []connect.Code{connect.CodeDeadlineExceeded, connect.CodeUnavailable, connect.CodeCanceled, connect.CodePermissionDenied} {
		r.agent.err = control.Error(code, "redis", "RESTORESTART", "no")
		r.want(1, `{"error":{"code":"`+code.String()+`","message":"no","app":"redis","state":"RESTORESTART"}}`+"\n", "restore", "redis", "-o", "json", "--timeout", "1m")
	}
	for _, code := range []connect.Code{connect.CodeNotFound, connect.CodeInvalidArgument} {
		r.agent.err = control.Error(code, "redis", "", "apps/redis.toml:3:1: unknown key")
		r.want(2, `{"error":{"code":"`+code.String()+`","message":"apps/redis.toml:3:1: unknown key","app":"redis","state":""}}`+"\n", "start", "redis", "-o", "json")
	}
}

func TestUsage(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		says string
		args []string
	}{
		{"which command", nil},
		{"unknown command", []string{"explode"}},
		{"unknown command", []string{"help", "explode"}},
		{"unknown flag: --from", []string{"restore", "redis", "--from", "node-b"}},
		{`required flag(s) "to" not set`, []string{"migrate", "redis"}},
		{"takes one application", []string{"start"}},
		{"takes one application", []string{"start", "a", "b"}},
		{"takes one application or none", []string{"status", "a", "b"}},
		{"name is empty", []string{"start", ""}},
		{"name is empty", []string{"status", ""}},
		{"it is table or json", []string{"status", "-o", "yaml"}},
		{"cannot be negative", []string{"status", "--timeout", "-1s"}},
		{"invalid argument", []string{"status", "--timeout", "soon"}},
		{"at least 1ms", []string{"snapshot", "redis", "--drain-timeout", "0s"}},
		{"at least 1ms", []string{"snapshot", "redis", "--drain-timeout", "-5s"}},
		{`required flag(s) "state"`, []string{"wait", "redis"}},
		{"CONNECTED, SNAPSHOTSTART", []string{"wait", "redis", "--state", ""}},
		{"REGISTER APP VIP", []string{"ioctl"}},
		{"usage: ckptctl ioctl HANDOVER APP NODE", []string{"ioctl", "HANDOVER", "redis"}},
		{"GETCONNINFO APP", []string{"ioctl", "EXPLODE", "redis"}},
		{"usage: ckptctl ioctl SEAL APP", []string{"ioctl", "SEAL"}},
		{"usage: ckptctl ioctl SNAPSHOTDONE APP ID [--force]", []string{"ioctl", "SNAPSHOTDONE", "redis"}},
		{"--force is not for SEAL", []string{"ioctl", "SEAL", "redis", "--force"}},
		{"not an IP address", []string{"ioctl", "REGISTER", "redis", "host"}},
		{"not an IP address", []string{"ioctl", "REGISTER", "redis", "fe80::1%lo"}},
		{`--ports: "0" is not a port`, []string{"ioctl", "REGISTER", "redis", "192.0.2.1", "--ports", "80,0"}},
		{`--exclude-ports: "65536" is not a port`, []string{"ioctl", "REGISTER", "redis", "192.0.2.1", "--exclude-ports", "65536"}},
		{"not an IP address", []string{"ioctl", "RESTORESTART", "redis", "x", "S-1"}},
		{"LOCAL", []string{"ioctl", "RESTORECONN", "redis", "192.0.2.1", "192.0.2.2:1", "syn"}},
		{"REMOTE", []string{"ioctl", "RESTORECONN", "redis", "192.0.2.1:1", "192.0.2.2", "syn"}},
		{"syn (accepted", []string{"ioctl", "RESTORECONN", "redis", "192.0.2.1:1", "192.0.2.2:1", "ack"}},
		{"it is turn, line, resp or now", []string{"ioctl", "SNAPSHOTFREEZE", "redis", "--boundary", "x"}},
		{"cannot be negative", []string{"ioctl", "SNAPSHOTFREEZE", "redis", "--quiet", "-1s"}},
		{"ID is empty", []string{"ioctl", "SNAPSHOTDONE", "redis", ""}},
	} {
		got := r.do(tc.args...)
		if got.code != 2 || got.out != "" || !strings.Contains(got.err, tc.says) {
			t.Errorf("%v: %+v, want %q", tc.args, got, tc.says)
		}
		// The same as JSON, whatever stands before -o.
		got = r.do(append(tc.args, "-o", "json")...)
		if tc.says == "it is table or json" {
			continue // the second -o wins: the command succeeds or not, but it is no usage error
		}
		if got.code != 2 || got.err != "" || !strings.HasPrefix(got.out, `{"error":{"code":"invalid_argument","message":"`) || strings.Count(got.out, "\n") != 1 {
			t.Errorf("%v as JSON: %+v", tc.args, got)
		}
	}
	if r.filter.last()+r.agent.last() != "" && !strings.HasPrefix(r.filter.last(), "Status") {
		t.Errorf("a request was sent: %s %s", r.filter.last(), r.agent.last())
	}
}

func TestConfiguration(t *testing.T) {
	r := newRig(t)
	var out, errs bytes.Buffer
	bad := r.path("bad.toml")
	if err := os.WriteFile(bad, []byte("name = \"node-a\"\ncontrol_sockets = \"x\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if code := run(r.ctx, []string{"status", "--node", bad}, &out, &errs); code != 2 || !strings.Contains(errs.String(), bad+":2:1: ") {
		t.Errorf("unknown key: %d %s", code, errs.String())
	}
	errs.Reset()
	if code := run(r.ctx, []string{"start", "redis", "--node", r.path("missing.toml")}, &out, &errs); code != 2 || !strings.Contains(errs.String(), "missing.toml") {
		t.Errorf("missing file: %d %s", code, errs.String())
	}
	// A socket that is given makes the file unnecessary.
	r.filter.status = &nfconnfilterv1.StatusReply{Node: "node-a"}
	for _, args := range [][]string{{"status", "--socket", r.path("control.sock")}, {"start", "redis", "--agent-socket", r.path("agent.sock")}} {
		errs.Reset()
		if code := run(r.ctx, append(args, "--node", bad), &out, &errs); code != 0 {
			t.Errorf("%v: %d %s", args, code, errs.String())
		}
	}
}

func TestUnreachable(t *testing.T) {
	r := newRig(t)
	missing := r.path("missing.sock")
	got := r.want(3, "", "status", "--socket", missing)
	if got.err != "ckptctl: the filter cannot be reached: there is no socket "+missing+": start nfconnfilter run, or name its socket with --node or --socket\n" {
		t.Errorf("standard error %q", got.err)
	}
	r.want(3, `{"error":{"code":"unavailable","message":"the agent cannot be reached: there is no socket `+missing+`: start ckptctl agent, or name its socket with --node or --agent-socket","app":"redis","state":""}}`+"\n",
		"start", "redis", "--agent-socket", missing, "-o", "json", "--timeout", "1m")
	left := r.path("left.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if got := r.want(3, "", "status", "--socket", left); !strings.Contains(got.err, "nobody listens on "+left) {
		t.Errorf("standard error %q", got.err)
	}
	dead := r.path("dead.sock")
	if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if got := r.want(3, "", "stop", "redis", "--agent-socket", dead); !strings.Contains(got.err, "went away before it answered") {
		t.Errorf("standard error %q", got.err)
	}
}

func TestTimeoutAborts(t *testing.T) {
	r := newRig(t)
	r.agent.hang, r.agent.aborted = make(chan struct{}), make(chan struct{})
	got := r.want(4, "", "snapshot", "redis", "--timeout", "50ms")
	<-r.agent.ended
	if !r.agent.has(`Abort app:"redis"`) {
		t.Error("the agent was not told to abort")
	}
	if got.err != "ckptctl: not finished within --timeout 50ms; the operation was aborted, the application is in state RESTORED\n" {
		t.Errorf("standard error %q", got.err)
	}
}

// The agent refuses to abort: the call is given up all the same, and the
// message says that the operation may go on.
func TestTimeoutAbortRefused(t *testing.T) {
	r := newRig(t)
	r.agent.hang = make(chan struct{})
	r.agent.abortErr = control.Error(connect.CodeFailedPrecondition, "redis", "SNAPSHOTFREEZE", "sealed already")
	r.want(4, `{"error":{"code":"deadline_exceeded","message":"not finished within --timeout 50ms; the operation could not be aborted and may go on (see ckptctl status): sealed already","app":"redis","state":""}}`+"\n",
		"restore", "redis", "--timeout", "50ms", "-o", "json")
	<-r.agent.ended // by its context
}

// An operation that finishes while it is being aborted has succeeded.
func TestTimeoutTooLate(t *testing.T) {
	r := newRig(t)
	r.agent.hang = make(chan struct{})
	r.agent.onAbort = func() { close(r.agent.hang) } // the work ends by itself just then
	r.want(0, "20261122T153000Z-1a2b3c\n", "snapshot", "redis", "--timeout", "50ms")
	<-r.agent.ended
	if !r.agent.has("Abort") {
		t.Error("finished before the time-out: nothing is tested")
	}
}

func TestInterrupted(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	r.ctx = ctx
	r.agent.hang = make(chan struct{})
	go func() {
		for !r.agent.has("Start") {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	r.want(1, `{"error":{"code":"canceled","message":"interrupted; the operation was given up","app":"redis","state":""}}`+"\n", "start", "redis", "-o", "json")
	<-r.agent.ended
}

// lockedBuffer may be read while a command writes.
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

func TestProgress(t *testing.T) {
	for _, terminal := range []bool{true, false} {
		r := newRig(t)
		r.agent.hang = make(chan struct{})
		r.agent.progress = &nfconnfilterv1.AgentProgressReply{App: "redis", Operation: "snapshot", Phase: "drain", Detail: "3 connections", ElapsedMs: 1234}
		var out bytes.Buffer
		errs := &lockedBuffer{}
		c := &cli{out: &out, err: errs, terminal: terminal}
		code := make(chan int)
		go func() { code <- c.run(r.ctx, []string{"snapshot", "redis", "--node", r.path("node.toml")}) }()
		const line = "\r\x1b[Kredis: snapshot: drain (3 connections), 1.2s"
		if terminal {
			for deadline := time.Now().Add(10 * time.Second); !strings.Contains(errs.String(), line) && time.Now().Before(deadline); {
				time.Sleep(5 * time.Millisecond)
			}
		} else {
			time.Sleep(progressAfter + progressEvery)
		}
		close(r.agent.hang)
		if got := <-code; got != 0 || out.String() != "20261122T153000Z-1a2b3c\n" {
			t.Errorf("code %d, %q", got, out.String())
		}
		got := errs.String()
		if terminal && (!strings.HasPrefix(got, line) || !strings.HasSuffix(got, clearLine)) {
			t.Errorf("terminal: %q", got)
		}
		if !terminal && got != "" {
			t.Errorf("no terminal: %q", got)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[2Jb\nc"); got != "a [2Jb c" {
		t.Errorf("%q", got)
	}
	if got := printable(strings.Repeat("é", 200)); got != strings.Repeat("é", 67)+"..." {
		t.Errorf("%q", got)
	}
}

func TestHelp(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"", "start", "stop", "status", "conns", "snapshot", "snapshots", "restore", "migrate", "abort", "release", "wait", "ioctl", "agent", "scheduler", "certs", "criu-action"} {
		args := []string{name, "--help"}
		if name == "" {
			args = args[1:]
		}
		got := r.do(args...)
		if got.code != 0 || got.err != "" || !strings.Contains(got.out, "Examples:") || !strings.Contains(got.out, "--timeout") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := r.do("--help"); strings.Contains(got.out, "completion") {
		t.Errorf("help names what is not there:\n%s", got.out)
	}
	if f, err := os.Open(filepath.Join(r.dir, "node.toml")); err != nil || isTerminal(f) || isTerminal(&bytes.Buffer{}) {
		t.Error("a file is no terminal")
	} else {
		f.Close()
	}
}
