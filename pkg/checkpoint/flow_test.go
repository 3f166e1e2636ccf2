package checkpoint

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func snapshotOnce(ctx context.Context, a *agent, force bool) (*pb.AgentSnapshotReply, error) {
	r, err := a.Snapshot(ctx, connect.NewRequest(&pb.AgentSnapshotRequest{App: "redis", Force: force}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func wantTrace(t *testing.T, w *world, want string) {
	t.Helper()
	if got := w.trace(); got != want {
		t.Errorf("steps:\n got %s\nwant %s", got, want)
	}
}

// wantRunning asserts that the application runs on as if nothing had been.
func wantRunning(t *testing.T, w *world, state string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != state || !w.running || w.frozen {
		t.Errorf("state %s running %v frozen %v, want %s and running", w.state, w.running, w.frozen, state)
	}
}

func wantNoSnapshot(t *testing.T, a *agent) {
	t.Helper()
	left, _ := filepath.Glob(filepath.Join(a.store.dir, "redis", "*"))
	hidden, _ := filepath.Glob(filepath.Join(a.store.dir, "redis", ".*"))
	if len(left)+len(hidden) > 0 {
		t.Errorf("left in the store: %v %v", left, hidden)
	}
}

const (
	snapshotSteps = "list SNAPSHOTSTART sockets=2,ports=[6379] list SNAPSHOTFREEZE list INFO before freeze list INFO SEAL stop-SIGKILL SNAPSHOTDONE"
	restoreSteps  = "RESTORESTART INFO list destroy exec INFO list RESTORECONN-syn INFO list RESTORED"
)

func TestSnapshotSteps(t *testing.T) {
	w, a := newWorld(t, 2)
	r, err := snapshotOnce(t.Context(), a, false)
	if err != nil {
		t.Fatal(err)
	}
	wantTrace(t, w, snapshotSteps)
	m, conns, err := a.store.load("redis", r.SnapshotId)
	if err != nil {
		t.Fatal(err)
	}
	if m.Node != "node-a" || m.Engine != "restart" || len(conns.Conns) != 2 || w.id != r.SnapshotId {
		t.Errorf("manifest %+v, %d connections, filter has %s", m, len(conns.Conns), w.id)
	}
	// A second one answers what there is and does nothing.
	again, err := snapshotOnce(t.Context(), a, false)
	if err != nil || again.SnapshotId != r.SnapshotId {
		t.Errorf("second snapshot: %v, %v", again, err)
	}
	wantTrace(t, w, snapshotSteps)
}

// Every step that fails before the application is ended takes all back.
func TestSnapshotStepFails(t *testing.T) {
	for event, state := range map[string]string{
		"list": control.StateConnected, "SNAPSHOTSTART": control.StateConnected,
		"SNAPSHOTFREEZE": control.StateRestored, "INFO": control.StateRestored,
		"before": control.StateRestored, "freeze": control.StateRestored, "SEAL": control.StateRestored,
	} {
		t.Run(event, func(t *testing.T) {
			w, a := newWorld(t, 2)
			w.fail[event] = errTest
			_, err := snapshotOnce(t.Context(), a, false)
			if err == nil || !strings.Contains(err.Error(), "made to fail") || !strings.Contains(err.Error(), "runs on") {
				t.Fatalf("error %v", err)
			}
			if info := control.Info(err); info.GetState() != state {
				t.Errorf("the error's state is %q, want %q", info.GetState(), state)
			}
			wantRunning(t, w, state)
			wantNoSnapshot(t, a)
			if strings.Contains(w.trace(), "stop-") {
				t.Errorf("the application was ended: %s", w.trace())
			}
		})
	}
}

func TestSnapshotCancelled(t *testing.T) {
	for _, event := range []string{"SNAPSHOTSTART", "SNAPSHOTFREEZE", "before", "freeze"} {
		for _, how := range []string{"caller", "agent", "abort"} {
			t.Run(event+"/"+how, func(t *testing.T) {
				w, a := newWorld(t, 2)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				aborted := make(chan error, 1)
				w.hook[event] = func() {
					switch how {
					case "caller":
						cancel()
					case "agent":
						w.stopAgent()
					case "abort":
						go func() {
							_, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
							aborted <- err
						}()
					}
					a.mu.Lock()
					o := a.ops["redis"]
					a.mu.Unlock()
					<-o.ctx.Done()
				}
				_, err := snapshotOnce(ctx, a, false)
				if err == nil || connect.CodeOf(err) != connect.CodeAborted {
					t.Fatalf("error %v, want code aborted", err)
				}
				wantRunning(t, w, control.StateRestored)
				wantNoSnapshot(t, a)
				if how == "abort" {
					if err := <-aborted; err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

// After the seal neither caller nor agent nor abort can stop it.
func TestSnapshotGoesOnAfterSeal(t *testing.T) {
	w, a := newWorld(t, 2)
	ctx, cancel := context.WithCancel(t.Context())
	w.hook["SEAL"] = func() {
		cancel()
		w.stopAgent()
		_, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"}))
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("abort after the seal: %v", err)
		}
	}
	r, err := snapshotOnce(ctx, a, false)
	if err != nil || r.SnapshotId == "" {
		t.Fatalf("%v, %v", r, err)
	}
	wantTrace(t, w, snapshotSteps)
}

func TestDrain(t *testing.T) {
	unread := func(w *world) { w.socks[1].RecvQ = 7; w.conns[0].Missing = "12 bytes on the way" }
	t.Run("time-out names the connections", func(t *testing.T) {
		w, a := newWorld(t, 2)
		unread(w)
		_, err := snapshotOnce(t.Context(), a, false)
		info := control.Info(err)
		want := []string{"192.0.2.100:6379 198.51.100.7:20000: 12 bytes on the way",
			"192.0.2.100:6379 198.51.100.7:20001: 7 bytes not read by the application"}
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || info == nil || fmt.Sprint(info.Connections) != fmt.Sprint(want) {
			t.Errorf("error %v, info %v", err, info)
		}
		wantRunning(t, w, control.StateRestored)
		if strings.Contains(w.trace(), "before") {
			t.Error("before ran although nothing was drained")
		}
	})
	t.Run("force", func(t *testing.T) {
		w, a := newWorld(t, 2)
		unread(w)
		w.unlearned = []string{"192.0.2.100:6379 198.51.100.9:1: no answer"}
		r, err := snapshotOnce(t.Context(), a, true)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Forced) != 3 || r.Forced[0] != "192.0.2.100:6379 198.51.100.9:1: left out, no answer" {
			t.Errorf("forced %q", r.Forced)
		}
		if w.state != control.StateSnapshotDone {
			t.Errorf("state %s", w.state)
		}
	})
	t.Run("force cuts and the application reads on", func(t *testing.T) {
		w, a := newWorld(t, 2)
		unread(w)
		w.hook["SNAPSHOTFREEZE-now"] = func() {
			w.mu.Lock()
			w.socks[1].RecvQ, w.conns[0].Missing = 0, ""
			w.mu.Unlock()
		}
		r, err := snapshotOnce(t.Context(), a, true)
		if err != nil || len(r.Forced) > 0 {
			t.Errorf("forced %v, error %v", r.GetForced(), err)
		}
	})
	t.Run("no DSACK", func(t *testing.T) {
		w, a := newWorld(t, 2)
		w.socks[1].Info = &sockdiag.TCPInfo{Options: sockdiag.Options{SACK: true}}
		a.sysctl = func(_, name string) string { return map[string]string{"net/ipv4/tcp_dsack": "0\n"}[name] }
		_, err := snapshotOnce(t.Context(), a, false)
		if err == nil || !strings.Contains(err.Error(), "sysctl -w net.ipv4.tcp_dsack=1") {
			t.Errorf("error %v", err)
		}
		wantRunning(t, w, control.StateConnected)
	})
	t.Run("drains in time", func(t *testing.T) {
		w, a := newWorld(t, 2)
		unread(w)
		looks := 0
		w.hook["INFO"] = func() {
			if looks++; looks == 4 {
				w.mu.Lock()
				w.socks[1].RecvQ, w.conns[0].Missing = 0, ""
				w.mu.Unlock()
			}
		}
		if _, err := snapshotOnce(t.Context(), a, false); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("moved at the stop", func(t *testing.T) {
		w, a := newWorld(t, 2)
		w.hook["freeze"] = func() {
			w.mu.Lock()
			w.socks[0].SendQ = 3
			delete(w.hook, "freeze")
			w.mu.Unlock()
		}
		w.hook["thaw"] = func() {
			w.mu.Lock()
			w.socks[0].SendQ = 0
			w.mu.Unlock()
		}
		if _, err := snapshotOnce(t.Context(), a, false); err != nil {
			t.Fatal(err)
		}
		if got := w.trace(); !strings.Contains(got, "before freeze list INFO thaw list INFO before freeze list INFO SEAL") {
			t.Errorf("steps %s", got)
		}
	})
	t.Run("ends by itself", func(t *testing.T) {
		w, a := newWorld(t, 2)
		unread(w)
		w.hook["INFO"] = func() {
			w.mu.Lock()
			w.running = false
			w.mu.Unlock()
		}
		_, err := snapshotOnce(t.Context(), a, false)
		if err == nil || !strings.Contains(err.Error(), "ended during the snapshot") {
			t.Errorf("error %v", err)
		}
	})
}

func TestAccountOfOneSocket(t *testing.T) {
	w, a := newWorld(t, 1)
	ls, _ := w.Listeners(nil, nil)
	s, err := a.newScope(t.Context(), a.cfg.Apps["redis"], ls)
	if err != nil {
		t.Fatal(err)
	}
	base := w.socks[0]
	for name, c := range map[string]struct {
		change func(*sockdiag.Socket)
		want   string
	}{
		"quiet":            {func(*sockdiag.Socket) {}, ""},
		"FIN unread":       {func(k *sockdiag.Socket) { k.State, k.RecvQ = sockdiag.CloseWait, 1 }, "the application has not read that the remote closed"},
		"FIN read":         {func(k *sockdiag.Socket) { k.State = sockdiag.CloseWait }, ""},
		"own FIN only":     {func(k *sockdiag.Socket) { k.State, k.SendQ = sockdiag.FinWait1, 1 }, ""},
		"own FIN and data": {func(k *sockdiag.Socket) { k.State, k.SendQ = sockdiag.LastAck, 5 }, "4 bytes not acknowledged by the remote"},
		"both queues":      {func(k *sockdiag.Socket) { k.RecvQ, k.SendQ = 2, 3 }, "2 bytes not read by the application, 3 bytes not acknowledged by the remote"},
		"same host": {func(k *sockdiag.Socket) {
			k.RecvQ = 9
			k.Remote = sock("192.0.2.11:99", 1).Remote
		}, ""},
		"stranger": {func(k *sockdiag.Socket) { k.Remote = sock("198.51.100.8:99", 1).Remote }, "the filter does not know it"},
	} {
		k := base
		c.change(&k)
		got := account(s, []sockdiag.Socket{k}, w.conns, nil)
		want := "[]"
		if c.want != "" {
			want = "[" + k.Local.String() + " " + k.Remote.String() + ": " + c.want + "]"
		}
		if fmt.Sprint(got) != want {
			t.Errorf("%s: %v, want %s", name, got, want)
		}
	}
}

// What fails after the application is gone must leave its connections held.
func TestSnapshotFailsLate(t *testing.T) {
	t.Run("SNAPSHOTDONE refused", func(t *testing.T) {
		w, a := newWorld(t, 2)
		w.fail["SNAPSHOTDONE"] = control.Error(connect.CodeFailedPrecondition, "redis", "SNAPSHOTFREEZE", "counts disagree", "L R: 3 bytes")
		_, err := snapshotOnce(t.Context(), a, false)
		if err == nil || !strings.Contains(err.Error(), "counts disagree") || !strings.Contains(err.Error(), "held under "+w.id) {
			t.Errorf("error %v", err)
		}
		if info := control.Info(err); w.id == "" || info.GetState() != control.StateSnapshotDone || len(info.GetConnections()) != 1 {
			t.Errorf("info %v, id %q", control.Info(err), w.id)
		}
		wantTrace(t, w, snapshotSteps+" SNAPSHOTDONE-force")
	})
	t.Run("store", func(t *testing.T) {
		w, a := newWorld(t, 2)
		w.hook["stop-SIGKILL"] = func() { os.RemoveAll(a.store.dir) }
		_, err := snapshotOnce(t.Context(), a, false)
		if err == nil || !strings.Contains(err.Error(), "not stored") || w.state != control.StateSnapshotDone {
			t.Errorf("error %v, state %s", err, w.state)
		}
	})
}

func TestRestoreSteps(t *testing.T) {
	w, a := newWorld(t, 3)
	old := w.socks[0]
	w.away()
	w.backlog = 511
	old.State = sockdiag.TimeWait
	w.socks = []sockdiag.Socket{old}
	r, err := a.restore(t.Context(), "redis", "")
	if err != nil || r.State != control.StateRestored {
		t.Fatal(r, err)
	}
	wantTrace(t, w, restoreSteps)
	if _, err := a.restore(t.Context(), "redis", ""); err != nil {
		t.Errorf("in RESTORED: %v", err)
	}
	wantTrace(t, w, restoreSteps)
}

func TestRestoreRefused(t *testing.T) {
	w, a := newWorld(t, 1)
	if _, err := a.restore(t.Context(), "redis", ""); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("in CONNECTED: %v", err)
	}
	w.away()
	if _, err := a.restore(t.Context(), "redis", "20200101T000000Z-000000"); err == nil || !strings.Contains(err.Error(), w.id) {
		t.Errorf("another ID: %v", err)
	}
	wantTrace(t, w, "")
	if _, err := a.restore(t.Context(), "nginx", ""); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unknown application: %v", err)
	}
}

// What fails in a restore leaves no process behind and the connections held.
func TestRestoreStepFails(t *testing.T) {
	for event, message := range map[string]string{
		"RESTORESTART": "made to fail", "destroy": "made to fail", "exec": "made to fail", "RESTORECONN-syn": "made to fail",
		"RESTORED": "made to fail", "listeners": "made to fail", "dies": "ended before it listened", "deaf": "does not listen within",
	} {
		t.Run(event, func(t *testing.T) {
			w, a := newWorld(t, 2)
			old := w.socks[:1:1]
			w.away()
			w.socks = old
			w.fail[event] = errTest
			a.cfg.Apps["redis"].Process.ReadyTimeout /= 20
			_, err := a.restore(t.Context(), "redis", "")
			if err == nil || !strings.Contains(err.Error(), message) || !strings.Contains(err.Error(), "stay held") {
				t.Fatalf("error %v", err)
			}
			if w.state != control.StateSnapshotDone || w.running || control.Info(err).GetState() != control.StateSnapshotDone {
				t.Errorf("state %s, running %v, error's state %s", w.state, w.running, control.Info(err).GetState())
			}
		})
	}
}

func TestRestoreCancelled(t *testing.T) {
	for _, event := range []string{"RESTORESTART", "exec", "RESTORECONN-syn"} {
		w, a := newWorld(t, 2)
		w.away()
		ctx, cancel := context.WithCancel(t.Context())
		w.hook[event] = cancel
		_, err := a.restore(ctx, "redis", "")
		if connect.CodeOf(err) != connect.CodeAborted || w.state != control.StateSnapshotDone || w.running {
			t.Errorf("%s: error %v, state %s, running %v", event, err, w.state, w.running)
		}
	}
}

func TestRestoreLostHandshakes(t *testing.T) {
	w, a := newWorld(t, 3)
	w.away()
	lost := w.conns[1].Remote
	w.lossy[lost] = 1
	began := time.Now()
	if _, err := a.restore(t.Context(), "redis", ""); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d < handshakeRetry {
		t.Errorf("tried again after %s, want at least %s", d, handshakeRetry)
	}
	w, a = newWorld(t, 3)
	w.away()
	w.lossy[lost] = 1000
	a.cfg.Apps["redis"].Process.ReadyTimeout /= 5
	_, err := a.restore(t.Context(), "redis", "")
	if info := control.Info(err); info == nil || len(info.Connections) != 1 || !strings.Contains(info.Connections[0], lost) {
		t.Errorf("error %v, info %v", err, info)
	}
	if w.state != control.StateSnapshotDone || w.running {
		t.Errorf("state %s, running %v", w.state, w.running)
	}
}

func TestRestorePace(t *testing.T) {
	for _, c := range []struct{ backlog, queue uint32 }{{64, 0}, {64, 10}, {1, 0}, {511, 3}} {
		w, a := newWorld(t, 200)
		w.away()
		w.backlog, w.queue = c.backlog, c.queue
		if _, err := a.restore(t.Context(), "redis", ""); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		limit := max(int(c.backlog/2), 1)
		if w.most > limit || w.most < min(limit, 200) {
			t.Errorf("%+v: at most %d at once, want %d", c, w.most, limit)
		}
	}
}

func TestStartStop(t *testing.T) {
	fresh := func(t *testing.T) (*world, *agent) {
		w, a := newWorld(t, 0)
		w.state, w.running, w.listening, w.vip[""] = "", false, false, false
		return w, a
	}
	w, a := fresh(t)
	if r, err := a.start(t.Context(), "redis"); err != nil || r.State != control.StateConnected {
		t.Fatal(r, err)
	}
	wantTrace(t, w, "REGISTER vip+eth0 exec")
	if _, err := a.start(t.Context(), "redis"); err != nil {
		t.Error(err)
	}
	wantTrace(t, w, "REGISTER vip+eth0 exec")
	if _, err := a.stop(t.Context(), "redis", false); err != nil {
		t.Fatal(err)
	}
	wantTrace(t, w, "REGISTER vip+eth0 exec stop-SIGKILL UNREGISTER vip-eth0")
	if _, err := a.stop(t.Context(), "redis", false); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("stop of what does not run: %v", err)
	}
	for event, steps := range map[string]string{
		"REGISTER": "REGISTER",
		"vip+eth0": "REGISTER vip+eth0 UNREGISTER",
		"exec":     "REGISTER vip+eth0 exec vip-eth0 UNREGISTER",
		"dies":     "REGISTER vip+eth0 exec stop-SIGKILL vip-eth0 UNREGISTER",
		"deaf":     "REGISTER vip+eth0 exec stop-SIGKILL vip-eth0 UNREGISTER",
	} {
		w, a := fresh(t)
		a.cfg.Apps["redis"].Process.ReadyTimeout /= 20
		w.fail[event] = errTest
		if _, err := a.start(t.Context(), "redis"); err == nil {
			t.Errorf("%s: started", event)
		}
		wantTrace(t, w, steps)
	}
	w, a = newWorld(t, 2)
	w.state = ""
	if r, err := a.start(t.Context(), "redis"); err != nil || len(r.Notes) != 1 {
		t.Errorf("adopt: %v, %v", r, err)
	}
	wantTrace(t, w, "REGISTER list ADOPT sockets=2")
	w, a = newWorld(t, 0)
	w.running, w.listening = false, false
	if _, err := a.start(t.Context(), "redis"); err != nil {
		t.Error(err)
	}
	wantTrace(t, w, "exec") // died in CONNECTED
	w, a = newWorld(t, 0)
	w.away()
	if _, err := a.stop(t.Context(), "redis", false); err == nil || !strings.Contains(err.Error(), "--discard") {
		t.Errorf("stop of a held one: %v", err)
	}
	if _, err := a.stop(t.Context(), "redis", true); err != nil || w.state != "" {
		t.Errorf("discard: %v, state %s", err, w.state)
	}
}

func TestOneOperationAtATime(t *testing.T) {
	w, a := newWorld(t, 2)
	w.hook["before"] = func() {
		if _, err := a.stop(t.Context(), "redis", false); err == nil || !strings.Contains(err.Error(), "snapshot is under way") {
			t.Errorf("second operation: %v", err)
		}
		// Asked for in a snapshot: accepted, done after it.
		for range 3 {
			if err := a.requested(testVIP); err != nil {
				t.Error(err)
			}
		}
		p, err := a.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"}))
		if err != nil || p.Msg.Operation != "snapshot" || p.Msg.Phase != "before" {
			t.Errorf("progress %v, %v", p, err)
		}
	}
	if _, err := snapshotOnce(t.Context(), a, false); err != nil {
		t.Fatal(err)
	}
	a.wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != control.StateRestored || strings.Count(strings.Join(w.events, " "), "RESTORESTART") != 1 {
		t.Errorf("state %s after %v", w.state, w.events)
	}
	if err := a.requested(client); err == nil {
		t.Error("a request for a stranger's address was accepted")
	}
}

// An agent that was killed midway leaves states that abort and a new agent
// take back.
