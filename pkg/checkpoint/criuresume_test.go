package checkpoint

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// TestActionResume: what a new agent makes of the CRIU of an earlier one.
func TestActionResume(t *testing.T) {
	at := intent{App: "redis", Op: opCriu, BootID: bootID(), SnapshotID: "20261122T153000Z-1a2b3c", CRIU: fakeCRIUPID, CRIUStart: 1, Images: fakeImages}
	sealed, back := at, at
	sealed.Sealed, back.Back = true, true
	for _, c := range []struct {
		name, state string
		in          intent
		world       func(w *world, c *playedCRIU)
		then        func(t *testing.T, a *agent, c *playedCRIU)
		after       string
	}{
		{"frozen, CRIU failed", control.StateSnapshotFreeze, at, func(_ *world, c *playedCRIU) { close(c.ended) }, nil, control.StateRestored},
		{"frozen, CRIU runs", control.StateSnapshotFreeze, at, nil, func(t *testing.T, a *agent, c *playedCRIU) {
			acts(t, a, criu.PostDump)
			c.kills()
		}, control.StateSnapshotDone},
		{"frozen, CRIU runs and fails", control.StateSnapshotFreeze, at, nil, func(_ *testing.T, _ *agent, c *playedCRIU) { close(c.ended) }, control.StateRestored},
		{"sealed, CRIU has ended it", control.StateSnapshotFreeze, sealed, func(_ *world, c *playedCRIU) { c.kills() }, nil, control.StateSnapshotDone},
		{"sealed, CRIU has let it run on", control.StateSnapshotFreeze, sealed, func(_ *world, c *playedCRIU) { close(c.ended) }, nil, control.StateRestored},
		{"sealed, CRIU runs", control.StateSnapshotFreeze, sealed, nil, func(_ *testing.T, _ *agent, c *playedCRIU) { c.kills() }, control.StateSnapshotDone},
		{"restoring, CRIU failed", control.StateRestoreStart, at, func(w *world, c *playedCRIU) { c.kills() }, nil, control.StateSnapshotDone},
		{"restoring, CRIU runs", control.StateRestoreStart, at, func(w *world, c *playedCRIU) { c.kills(); c.ended = make(chan struct{}) },
			func(t *testing.T, a *agent, c *playedCRIU) {
				c.makes()
				acts(t, a, criu.PostRestore, criu.PreResume)
			}, control.StateRestored},
		{"back, CRIU has let it run", control.StateRestoreStart, back, func(_ *world, c *playedCRIU) { close(c.ended) }, nil, control.StateRestored},
		{"back, RESTORED has no answer", control.StateRestoreStart, back, func(w *world, c *playedCRIU) {
			close(c.ended)
			w.setFail("RESTORED lost", errTest)
		}, nil, control.StateRestored},
		{"back, CRIU failed", control.StateRestoreStart, back, func(_ *world, c *playedCRIU) { c.kills() }, nil, control.StateSnapshotDone},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, f := newCRIU(t, 2)
			w.state = c.state
			if c.world != nil {
				c.world(w, f)
			}
			if err := a.intents.save(c.in); err != nil {
				t.Fatal(err)
			}
			a.recover(t.Context())
			if c.then != nil {
				c.then(t, a, f)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
				in, err := a.intents.load("redis")
				return in == nil && !a.busy("redis"), err
			}); err != nil {
				t.Errorf("%v, did %s", err, w.trace())
			}
			wantState(t, w, c.after)
			if c.after == control.StateRestored && !w.running {
				t.Error("it was ended")
			}
		})
	}
}

// logLines counts what is logged.
type logLines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// TestActionSnapshotIsTheCallers: what the caller's CRIU has written is for him to restore.
func TestActionSnapshotIsTheCallers(t *testing.T) {
	w, a, c := newCRIU(t, 1)
	a.cfg.Cluster.Nodes = []config.ClusterNode{{Name: "node-a"}, {Name: "node-b"}}
	acts(t, a, criu.PreDump, criu.PostDump)
	c.kills()
	idle(t, a)
	lines := &logLines{}
	a.log = slog.New(slog.NewTextHandler(lines, nil))
	w.events = nil
	want := "were written by CRIU to " + fakeImages
	_, err := a.Restore(t.Context(), connect.NewRequest(&pb.AgentRestoreRequest{App: "redis"}))
	if err == nil || !strings.Contains(err.Error(), want) || control.Info(err).GetState() != control.StateSnapshotDone {
		t.Errorf("restore: %v", err)
	}
	_, err = a.Migrate(t.Context(), connect.NewRequest(&pb.AgentMigrateRequest{App: "redis", ToNode: "node-b"}))
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("migrate: %v", err)
	}
	for range 3 {
		if err := a.requested(testVIP); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_ = poll(ctx, pollFirst, pollMost, func() (bool, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			return !a.wanted["redis"], nil
		})
	}
	if n := strings.Count(lines.text.String(), "a client waits for an application"); n != 1 {
		t.Errorf("%d requests were logged:\n%s", n, lines.text.String())
	}
	p, err := a.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"}))
	if err != nil || !strings.Contains(p.Msg.Detail, want) {
		t.Errorf("progress %v, %v", p, err)
	}
	s, err := a.NodeStatus(t.Context(), connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err != nil || s.Msg.Apps[0].MayRun || !strings.Contains(s.Msg.Apps[0].Fault, want) {
		t.Errorf("node status %v, %v", s, err)
	}
	if w.trace() != "" {
		t.Errorf("did %s", w.trace())
	}
	c.ended = make(chan struct{})
	acts(t, a, criu.PreRestore)
	c.makes()
	acts(t, a, criu.PostRestore, criu.PreResume)
	idle(t, a)
	if p, err := a.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"})); err != nil || p.Msg.Detail != "" {
		t.Errorf("progress behind it: %v, %v", p, err)
	}
}

// TestDumpedPID reads the command line of CRIU.
func TestDumpedPID(t *testing.T) {
	for line, want := range map[string]int{
		"criu dump -t 12 -D x": 12, "criu dump --tree 12": 12, "criu dump --tree=12": 12, "criu dump -t12": 12,
		"criu swrk 3": 0, "criu dump -t": 0, "criu dump -t x": 0, "criu dump --tcp-established -t 7": 7, "": 0,
	} {
		if got := dumpedPID(strings.Fields(line)); got != want {
			t.Errorf("%q: %d, want %d", line, got, want)
		}
	}
}
