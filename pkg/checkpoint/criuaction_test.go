package checkpoint

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// playedCRIU is a CRIU that somebody else has started, and its images.
type playedCRIU struct {
	imager // nothing of its own is run
	w      *world
	socks  []criu.Socket
	ended  chan struct{}
}

const (
	fakeCRIUPID = 4321
	fakeImages  = "/images"
)

func (c *playedCRIU) find(pid int) (criuRef, error) {
	if pid != fakeCRIUPID {
		return criuRef{}, errTest
	}
	return criuRef{pid, 1}, nil
}

func (c *playedCRIU) runs(criuRef) bool {
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

func (c *playedCRIU) awaitEnd(ctx context.Context, _ criuRef) error {
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *playedCRIU) target(criuRef) int                    { return fakePID }
func (c *playedCRIU) made(criuRef, int) error               { return c.w.do("made") }
func (c *playedCRIU) place(string) (string, error)          { return fakeImages, nil }
func (c *playedCRIU) fit(string) error                      { return c.w.do("fit") }
func (c *playedCRIU) sockets(string) ([]criu.Socket, error) { return c.socks, nil }
func (c *playedCRIU) taken(string) (string, error)          { return "", nil }

func (c *playedCRIU) outcome(_ context.Context, p process) (bool, error) {
	return p.alive(), c.w.do("outcome")
}

// kills ends the tasks, as CRIU does behind its images, and itself.
func (c *playedCRIU) kills() {
	c.w.mu.Lock()
	c.w.running, c.w.listening, c.w.socks = false, false, nil
	for _, k := range c.w.conns {
		k.Image, k.State = true, control.ConnConnectRmt
	}
	c.w.mu.Unlock()
	close(c.ended)
}

// makes is a restore up to the sockets.
func (c *playedCRIU) makes() {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	for _, k := range c.w.conns {
		c.w.socks = append(c.w.socks, sock(k.Remote, 1))
	}
}

func newCRIU(t *testing.T, n int) (*world, *agent, *playedCRIU) {
	t.Helper()
	w, a := newWorld(t, n)
	c := &playedCRIU{w: w, ended: make(chan struct{})}
	for _, k := range w.conns {
		c.socks = append(c.socks, criu.Socket{Local: netip.MustParseAddrPort(k.Local), Remote: netip.MustParseAddrPort(k.Remote)})
	}
	a.images, a.foreign = c, c
	return w, a, c
}

func act(t *testing.T, a *agent, action string) error {
	t.Helper()
	_, err := a.CriuAction(t.Context(), connect.NewRequest(&pb.AgentCriuActionRequest{
		Action: action, Pid: fakePID, CriuPid: fakeCRIUPID, ImageDir: "/proc/4321/fd/5"}))
	return err
}

// acts does several, which all have to be answered well.
func acts(t *testing.T, a *agent, actions ...string) {
	t.Helper()
	for _, action := range actions {
		if err := act(t, a, action); err != nil {
			t.Fatalf("%s: %v", action, err)
		}
	}
}

// idle waits for the end of what is under way.
func idle(t *testing.T, a *agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := poll(ctx, pollFirst, pollMost, func() (bool, error) { return !a.busy("redis"), nil }); err != nil {
		t.Fatal(err)
	}
}

func wantState(t *testing.T, w *world, state string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != state {
		t.Errorf("state %s, want %s", w.state, state)
	}
}

// TestActionCycle: a dump and a restore, with or without a namespace of its own.
func TestActionCycle(t *testing.T) {
	for name, more := range map[string][2]string{"host": {}, "own namespace": {criu.NetLock, criu.NetUnlock}} {
		t.Run(name, func(t *testing.T) {
			w, a, c := newCRIU(t, 3)
			acts(t, a, criu.PreDump)
			if more[0] != "" {
				acts(t, a, more[0])
			}
			if p, _ := a.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"})); p.Msg.Operation != opCriu || p.Msg.Phase != "dump" {
				t.Errorf("progress %v", p.Msg)
			}
			acts(t, a, criu.PostDump)
			wantState(t, w, control.StateSnapshotFreeze)
			c.kills()
			idle(t, a)
			wantState(t, w, control.StateSnapshotDone)
			m, _, err := a.store.load("redis", w.id)
			if err != nil || m.Engine != config.EngineCRIU || m.Images != fakeImages || len(m.Files) != 1 {
				t.Errorf("manifest %+v, %v", m, err)
			}
			wantTrace(t, w, "list SNAPSHOTSTART sockets=3,ports=[6379] list SNAPSHOTFREEZE fit INFO SEAL outcome stop-SIGKILL INFO SNAPSHOTDONE")
			w.events = nil
			c.ended = make(chan struct{})
			acts(t, a, criu.PreRestore)
			wantState(t, w, control.StateRestoreStart)
			c.makes()
			acts(t, a, criu.PostRestore)
			if more[1] != "" {
				acts(t, a, more[1])
			}
			wantState(t, w, control.StateRestoreStart)
			acts(t, a, criu.PreResume)
			idle(t, a)
			wantState(t, w, control.StateRestored)
			wantTrace(t, w, "RESTORESTART INFO list made adopt INFO list RESTORECONN-image INFO list RESTORED")
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
		})
	}
}

// TestActionEnds: what becomes of a dump that does not go its way.
func TestActionEnds(t *testing.T) {
	refusal := control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotFreeze, "SEAL refused")
	for _, c := range []struct {
		name  string
		world func(w *world)
		then  func(t *testing.T, a *agent, c *playedCRIU)
		state string
		steps string // the last ones
	}{
		{"CRIU fails before the images", nil, func(t *testing.T, a *agent, c *playedCRIU) { acts(t, a, criu.PreDump); close(c.ended) },
			control.StateRestored, "outcome SNAPSHOTABORT"},
		{"CRIU fails and says so", nil, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.NetLock)
			if act(t, a, criu.NetUnlock) == nil {
				t.Error("a dump that fails is no success")
			}
		}, control.StateRestored, "SNAPSHOTABORT"},
		{"the images do not agree", func(w *world) { w.fail["SEAL"] = refusal }, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreDump)
			if err := act(t, a, criu.PostDump); err == nil || !strings.Contains(err.Error(), "SEAL refused") {
				t.Errorf("post-dump: %v", err)
			}
			acts(t, a, criu.NetUnlock)
		}, control.StateRestored, "SEAL SNAPSHOTABORT"},
		{"CRIU's own lock", func(w *world) { w.fail["fit"] = errTest }, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreDump)
			if err := act(t, a, criu.PostDump); err == nil {
				t.Error("post-dump succeeds")
			}
		}, control.StateRestored, "fit SNAPSHOTABORT"},
		{"left running", nil, func(t *testing.T, a *agent, c *playedCRIU) { acts(t, a, criu.PreDump, criu.PostDump); close(c.ended) },
			control.StateRestored, "outcome SNAPSHOTABORT"},
		{"left running in a namespace", nil, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreDump, criu.NetLock, criu.PostDump, criu.NetUnlock)
		}, control.StateRestored, "SEAL SNAPSHOTABORT"},
		{"left running, too late", func(w *world) { w.fail["SNAPSHOTABORT"] = refusal }, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreDump, criu.PostDump)
			close(c.ended)
		}, control.StateSnapshotDone, "SNAPSHOTABORT stop-SIGKILL INFO SNAPSHOTDONE"},
		{"aborted", nil, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreDump)
			if _, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"})); err != nil {
				t.Errorf("abort: %v", err)
			}
			if err := act(t, a, criu.PostDump); err == nil || !strings.Contains(err.Error(), "nothing is under way") {
				t.Errorf("post-dump of what was aborted: %v", err)
			}
		}, control.StateRestored, "SNAPSHOTFREEZE SNAPSHOTABORT"},
		{"not all of it is dumped", func(w *world) { w.fail["rooted"] = errTest }, func(t *testing.T, a *agent, c *playedCRIU) {
			if err := act(t, a, criu.PreDump); err == nil {
				t.Error("pre-dump succeeds")
			}
		}, control.StateConnected, ""},
		{"nobody froze it", nil, func(t *testing.T, a *agent, c *playedCRIU) {
			if err := act(t, a, criu.PostDump); err == nil {
				t.Error("post-dump succeeds")
			}
		}, control.StateConnected, ""},
		{"of somebody else", func(w *world) { w.running = false }, func(t *testing.T, a *agent, c *playedCRIU) {
			c.socks = nil
			acts(t, a, criu.PreDump, criu.NetLock, criu.PostDump, criu.NetUnlock, criu.PreRestore, criu.PostRestore, criu.PreResume)
		}, control.StateConnected, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, f := newCRIU(t, 2)
			if c.world != nil {
				c.world(w)
			}
			c.then(t, a, f)
			idle(t, a)
			wantState(t, w, c.state)
			if !strings.HasSuffix(w.trace(), c.steps) || c.steps == "" && w.trace() != "" {
				t.Errorf("did %s", w.trace())
			}
			if all, err := a.store.list("redis"); err != nil || (len(all) > 0) != (c.state == control.StateSnapshotDone) {
				t.Errorf("snapshots %v, %v", all, err)
			}
			if left, _ := filepath.Glob(filepath.Join(a.store.dir, "redis", tempPrefix+"*")); len(left) > 0 {
				t.Errorf("in the store stays %v", left)
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
		})
	}
}

// TestActionRestoreEnds: a restore that does not go its way leaves the clients held.
func TestActionRestoreEnds(t *testing.T) {
	for _, c := range []struct {
		name  string
		then  func(t *testing.T, w *world, a *agent, c *playedCRIU)
		state string
	}{
		{"CRIU fails", func(t *testing.T, _ *world, a *agent, c *playedCRIU) { acts(t, a, criu.PreRestore); close(c.ended) }, control.StateSnapshotDone},
		{"CRIU fails behind the sockets", func(t *testing.T, _ *world, a *agent, c *playedCRIU) {
			c.makes()
			acts(t, a, criu.PreRestore)
			c.makes()
			acts(t, a, criu.PostRestore)
			close(c.ended)
		}, control.StateSnapshotDone},
		{"a socket is missing", func(t *testing.T, _ *world, a *agent, c *playedCRIU) {
			acts(t, a, criu.PreRestore)
			if err := act(t, a, criu.PostRestore); err == nil || !strings.Contains(err.Error(), "not there again") {
				t.Errorf("post-restore: %v", err)
			}
		}, control.StateSnapshotDone},
		{"it cannot be opened", func(t *testing.T, w *world, a *agent, c *playedCRIU) {
			w.setFail("RESTORED", errTest)
			acts(t, a, criu.PreRestore)
			c.makes()
			acts(t, a, criu.PostRestore)
			if err := act(t, a, criu.PreResume); err == nil {
				t.Error("pre-resume succeeds")
			}
		}, control.StateSnapshotDone},
		{"it was made by somebody else", func(t *testing.T, w *world, a *agent, c *playedCRIU) {
			w.setFail("made", errTest)
			acts(t, a, criu.PreRestore)
			if err := act(t, a, criu.PostRestore); !errors.Is(err, errTest) && (err == nil || !strings.Contains(err.Error(), errTest.Error())) {
				t.Errorf("post-restore: %v", err)
			}
		}, control.StateSnapshotDone},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, f := newCRIU(t, 2)
			acts(t, a, criu.PreDump, criu.PostDump)
			f.kills()
			idle(t, a)
			f.ended = make(chan struct{})
			c.then(t, w, a, f)
			idle(t, a)
			wantState(t, w, c.state)
			if w.running {
				t.Error("something of it runs")
			}
		})
	}
}
