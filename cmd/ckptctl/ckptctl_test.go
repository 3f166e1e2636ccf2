package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeFilter and fakeAgent answer with what a test has put in, by method, and
// note every request.
type fakeFilter struct {
	nfconnfilterv1connect.UnimplementedFilterHandler
	*recorder
	status *nfconnfilterv1.StatusReply
	conns  []*nfconnfilterv1.ConnInfo
	err    error
	hang   bool
}

type recorder struct {
	mu   sync.Mutex
	seen []string
}

func (r *recorder) note(name string, m interface{ String() string }) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// The text form puts one or two blanks between fields, at random by build.
	r.seen = append(r.seen, strings.TrimSpace(name+" "+blanks.ReplaceAllString(m.String(), " ")))
}

var blanks = regexp.MustCompile(` +`)

func (r *recorder) last() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.seen) == 0 {
		return ""
	}
	return r.seen[len(r.seen)-1]
}

func (r *recorder) has(s string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.seen {
		if strings.HasPrefix(x, s) {
			return true
		}
	}
	return false
}

func (f *fakeFilter) reply(ctx context.Context, name, app, state string, m interface{ String() string }) (*connect.Response[nfconnfilterv1.AppReply], error) {
	f.note(name, m)
	if f.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.AppReply{App: app, State: state}), nil
}

func (f *fakeFilter) Register(ctx context.Context, r *connect.Request[nfconnfilterv1.RegisterRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Register", r.Msg.App, "CONNECTED", r.Msg)
}
func (f *fakeFilter) Unregister(ctx context.Context, r *connect.Request[nfconnfilterv1.UnregisterRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Unregister", r.Msg.App, "", r.Msg)
}
func (f *fakeFilter) SnapshotFreeze(ctx context.Context, r *connect.Request[nfconnfilterv1.SnapshotFreezeRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "SnapshotFreeze", r.Msg.App, "SNAPSHOTFREEZE", r.Msg)
}
func (f *fakeFilter) Seal(ctx context.Context, r *connect.Request[nfconnfilterv1.SealRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Seal", r.Msg.App, "SNAPSHOTFREEZE", r.Msg)
}
func (f *fakeFilter) SnapshotDone(ctx context.Context, r *connect.Request[nfconnfilterv1.SnapshotDoneRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	p, err := f.reply(ctx, "SnapshotDone", r.Msg.App, "SNAPSHOTDONE", r.Msg)
	if err == nil {
		p.Msg.SnapshotId, p.Msg.Notes = r.Msg.SnapshotId, []string{"a note"}
	}
	return p, err
}
func (f *fakeFilter) SnapshotAbort(ctx context.Context, r *connect.Request[nfconnfilterv1.AppRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "SnapshotAbort", r.Msg.App, "RESTORED", r.Msg)
}
func (f *fakeFilter) RestoreStart(ctx context.Context, r *connect.Request[nfconnfilterv1.RestoreStartRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "RestoreStart", r.Msg.App, "RESTORESTART", r.Msg)
}
func (f *fakeFilter) RestoreConn(ctx context.Context, r *connect.Request[nfconnfilterv1.RestoreConnRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "RestoreConn", r.Msg.App, "RESTORESTART", r.Msg)
}
func (f *fakeFilter) Restored(ctx context.Context, r *connect.Request[nfconnfilterv1.RestoredRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Restored", r.Msg.App, "RESTORED", r.Msg)
}
func (f *fakeFilter) RestoreAbort(ctx context.Context, r *connect.Request[nfconnfilterv1.AppRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "RestoreAbort", r.Msg.App, "SNAPSHOTDONE", r.Msg)
}
func (f *fakeFilter) Wait(ctx context.Context, r *connect.Request[nfconnfilterv1.WaitRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Wait", r.Msg.App, r.Msg.State, r.Msg)
}
func (f *fakeFilter) SnapshotStart(ctx context.Context, r *connect.Request[nfconnfilterv1.SnapshotStartRequest]) (*connect.Response[nfconnfilterv1.LearnReply], error) {
	f.note("SnapshotStart", r.Msg)
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.LearnReply{App: r.Msg.App, State: "SNAPSHOTSTART", Learned: 1, Unlearned: []string{"a b: c"}}), nil
}
func (f *fakeFilter) Adopt(_ context.Context, r *connect.Request[nfconnfilterv1.AdoptRequest]) (*connect.Response[nfconnfilterv1.AdoptReply], error) {
	f.note("Adopt", r.Msg)
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.AdoptReply{App: r.Msg.App, State: "RESTORED", Adopted: 1, Forgotten: 2}), nil
}
func (f *fakeFilter) GetConnCount(_ context.Context, r *connect.Request[nfconnfilterv1.AppRequest]) (*connect.Response[nfconnfilterv1.ConnCountReply], error) {
	f.note("GetConnCount", r.Msg)
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.ConnCountReply{App: r.Msg.App, State: "CONNECTED", Count: 7}), nil
}
func (f *fakeFilter) GetConnInfo(_ context.Context, r *connect.Request[nfconnfilterv1.GetConnInfoRequest]) (*connect.Response[nfconnfilterv1.ConnInfoReply], error) {
	f.note("GetConnInfo", r.Msg)
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.ConnInfoReply{App: r.Msg.App, State: "CONNECTED", Conns: f.conns}), nil
}
func (f *fakeFilter) Status(ctx context.Context, r *connect.Request[nfconnfilterv1.StatusRequest]) (*connect.Response[nfconnfilterv1.StatusReply], error) {
	f.note("Status", r.Msg)
	if f.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(f.status), nil
}

type fakeAgent struct {
	nfconnfilterv1connect.UnimplementedAgentHandler
	*recorder
	state    string
	notes    []string
	err      error
	forced   []string
	phases   []*nfconnfilterv1.Phase
	list     []*nfconnfilterv1.SnapshotInfo
	findings []*nfconnfilterv1.Finding
	hang     chan struct{} // an operation lasts until it is closed, Abort, or the caller is gone
	abortErr error
	aborted  chan struct{}
	onAbort  func()
	ended    chan struct{} // a value when a hanging operation has ended
	progress *nfconnfilterv1.AgentProgressReply
	action   *nfconnfilterv1.AgentCriuActionRequest
}

func (a *fakeAgent) work(ctx context.Context) error {
	if a.hang == nil {
		return a.err
	}
	defer func() { a.ended <- struct{}{} }()
	select {
	case <-a.hang:
		return a.err
	case <-a.aborted:
		return control.Error(connect.CodeAborted, "redis", "RESTORED", "aborted by request")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *fakeAgent) reply(ctx context.Context, name, app string, m interface{ String() string }) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	a.note(name, m)
	if err := a.work(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&nfconnfilterv1.AgentReply{App: app, State: a.state, Notes: a.notes, Phases: a.phases}), nil
}

func (a *fakeAgent) Start(ctx context.Context, r *connect.Request[nfconnfilterv1.AgentStartRequest]) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	return a.reply(ctx, "Start", r.Msg.App, r.Msg)
}
func (a *fakeAgent) Stop(ctx context.Context, r *connect.Request[nfconnfilterv1.AgentStopRequest]) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	return a.reply(ctx, "Stop", r.Msg.App, r.Msg)
}
func (a *fakeAgent) Restore(ctx context.Context, r *connect.Request[nfconnfilterv1.AgentRestoreRequest]) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	return a.reply(ctx, "Restore", r.Msg.App, r.Msg)
}
func (a *fakeAgent) Abort(_ context.Context, r *connect.Request[nfconnfilterv1.AgentAbortRequest]) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	a.note("Abort", r.Msg)
	if a.abortErr != nil {
		return nil, a.abortErr
	}
	if a.onAbort != nil {
		a.onAbort()
	}
	if a.aborted != nil {
		close(a.aborted)
	}
	return connect.NewResponse(&nfconnfilterv1.AgentReply{App: r.Msg.App, State: "RESTORED"}), nil
}
func (a *fakeAgent) Snapshot(ctx context.Context, r *connect.Request[nfconnfilterv1.AgentSnapshotRequest]) (*connect.Response[nfconnfilterv1.AgentSnapshotReply], error) {
	a.note("Snapshot", r.Msg)
	if err := a.work(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&nfconnfilterv1.AgentSnapshotReply{App: r.Msg.App, SnapshotId: "20261122T153000Z-1a2b3c", Forced: a.forced, Phases: a.phases}), nil
}
func (a *fakeAgent) Snapshots(_ context.Context, r *connect.Request[nfconnfilterv1.AgentSnapshotsRequest]) (*connect.Response[nfconnfilterv1.AgentSnapshotsReply], error) {
	a.note("Snapshots", r.Msg)
	if a.err != nil {
		return nil, a.err
	}
	return connect.NewResponse(&nfconnfilterv1.AgentSnapshotsReply{Snapshots: a.list}), nil
}
func (a *fakeAgent) Progress(context.Context, *connect.Request[nfconnfilterv1.AgentProgressRequest]) (*connect.Response[nfconnfilterv1.AgentProgressReply], error) {
	return connect.NewResponse(a.progress), nil
}

// rig is a node with both daemons faked.
type rig struct {
	t      *testing.T
	dir    string
	filter *fakeFilter
	agent  *fakeAgent
	ctx    context.Context
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), filter: &fakeFilter{recorder: &recorder{}}, agent: &fakeAgent{recorder: &recorder{}, ended: make(chan struct{}, 4)}, ctx: t.Context()}
	r.serve("control.sock", control.FilterHandler(r.filter))
	r.serve("agent.sock", control.AgentHandler(r.agent))
	node := `name = "node-a"
interface = "lo"
address = "127.0.0.1"
control_socket = "` + r.path("control.sock") + `"
agent_socket = "` + r.path("agent.sock") + `"
`
	if err := os.WriteFile(r.path("node.toml"), []byte(node), 0o644); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) serve(name string, h http.Handler) {
	l, err := control.Listen(r.path(name), "")
	if err != nil {
		r.t.Fatal(err)
	}
	serve(r.t, l, h)
}

func serve(t *testing.T, l net.Listener, h http.Handler) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- control.Serve(ctx, l, h, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

type result struct {
	code     int
	out, err string
}

// do runs a command line with the rig's node file.
func (r *rig) do(args ...string) result {
	r.t.Helper()
	var out, errs bytes.Buffer
	code := run(r.ctx, append(args, "--node", r.path("node.toml")), &out, &errs)
	return result{code, out.String(), errs.String()}
}

// want fails unless code and standard output are exactly as given.
func (r *rig) want(code int, out string, args ...string) result {
	r.t.Helper()
	got := r.do(args...)
	if got.code != code || got.out != out {
		r.t.Errorf("%v:\n got %d %q\nwant %d %q\nstandard error: %s", args, got.code, got.out, code, out, got.err)
	}
	return got
}

func TestAgentCommands(t *testing.T) {
	r := newRig(t)
	r.agent.state = "CONNECTED"
	r.want(0, "redis: CONNECTED\n", "start", "redis")
	r.want(0, `{"app":"redis","state":"CONNECTED"}`+"\n", "start", "redis", "-o", "json")
	r.agent.notes = []string{"adopted process 7"}
	if got := r.want(0, "redis: CONNECTED\n", "start", "redis"); got.err != "adopted process 7\n" {
		t.Errorf("standard error %q", got.err)
	}
	r.want(0, `{"app":"redis","state":"CONNECTED","notes":["adopted process 7"]}`+"\n", "start", "redis", "-o", "json")
	r.agent.notes, r.agent.state = nil, ""
	r.want(0, "redis: unknown\n", "stop", "redis", "--discard")
	if got := r.agent.last(); got != `Stop app:"redis" discard:true` {
		t.Errorf("sent %s", got)
	}
	r.agent.state = "RESTORED"
	r.want(0, "redis: RESTORED\n", "restore", "redis", "--snapshot", "X-1")
	if got := r.agent.last(); got != `Restore app:"redis" snapshot_id:"X-1"` {
		t.Errorf("sent %s", got)
	}
	r.want(0, "redis: RESTORED\n", "abort", "redis")
	if got := r.agent.last(); got != `Abort app:"redis"` {
		t.Errorf("sent %s", got)
	}
}

func TestSnapshot(t *testing.T) {
	r := newRig(t)
	r.want(0, "20261122T153000Z-1a2b3c\n", "snapshot", "redis")
	r.want(0, `{"app":"redis","snapshot_id":"20261122T153000Z-1a2b3c","forced":[]}`+"\n", "snapshot", "redis", "-o", "json")
	r.agent.forced = []string{"192.0.2.100:6379 198.51.100.7:4000: 3 bytes <not> read"}
	got := r.want(0, "20261122T153000Z-1a2b3c\n", "snapshot", "redis", "--force", "--drain-timeout", "1.5s")
	if got.err != "forced: 192.0.2.100:6379 198.51.100.7:4000: 3 bytes <not> read\n" {
		t.Errorf("standard error %q", got.err)
	}
	if s := r.agent.last(); s != `Snapshot app:"redis" force:true drain_timeout_ms:1500` {
		t.Errorf("sent %s", s)
	}
	r.want(0, `{"app":"redis","snapshot_id":"20261122T153000Z-1a2b3c","forced":["192.0.2.100:6379 198.51.100.7:4000: 3 bytes <not> read"]}`+"\n",
		"snapshot", "redis", "--output=json")

	r.agent.forced, r.agent.phases = nil, []*nfconnfilterv1.Phase{{Name: "drain", Ms: 51.23456, FilterMs: 0.5}, {Name: "seal"}}
	phases := `,"phases":[{"name":"drain","ms":51.235,"filter_ms":0.5},{"name":"seal","ms":0,"filter_ms":0}]}` + "\n"
	r.want(0, `{"app":"redis","snapshot_id":"20261122T153000Z-1a2b3c","forced":[]`+phases, "snapshot", "redis", "-o", "json")
	r.agent.state = "RESTORED"
	r.want(0, `{"app":"redis","state":"RESTORED"`+phases, "restore", "redis", "-o", "json")

	r.want(0, "[]\n", "snapshots", "-o", "json")
	r.want(0, "APP  ID  NODE  TIME  ENGINE\n", "snapshots")
	r.agent.list = []*nfconnfilterv1.SnapshotInfo{{App: "redis", Id: "20261122T153000Z-1a2b3c", Node: "node-a", Time: "2026-11-22T15:30:00Z", Engine: "restart"}}
	r.want(0, `[{"app":"redis","id":"20261122T153000Z-1a2b3c","node":"node-a","time":"2026-11-22T15:30:00Z","engine":"restart"}]`+"\n", "snapshots", "redis", "-o", "json")
	r.want(0, "APP    ID                       NODE    TIME                  ENGINE\n"+
		"redis  20261122T153000Z-1a2b3c  node-a  2026-11-22T15:30:00Z  restart\n", "snapshots")
}

func TestStatus(t *testing.T) {
	r := newRig(t)
	r.filter.status = &nfconnfilterv1.StatusReply{Node: "node-a", ConfigGeneration: 3}
	r.want(0, `{"node":"node-a","config_generation":3,"apps":[]}`+"\n", "status", "-o", "json")
	if got := r.do("status", "redis"); got.code != 2 || !strings.Contains(got.err, "unknown on this node") {
		t.Errorf("unknown application: %+v", got)
	}
	r.filter.status.Apps = []*nfconnfilterv1.AppStatus{
		{Name: "redis", Vips: []string{"192.0.2.100"}, State: "SNAPSHOTDONE", SnapshotId: "S-1", RestoreRequested: true,
			Connections: map[string]uint32{"RST": 1, "CONNECTRMT": 20, "CONNECT": 0}, BytesIn: 1 << 60, BytesOut: 2},
		{Name: "web", Vips: []string{"192.0.2.101", "2001:db8::1"}, State: "CONNECTED", Reasons: map[string]uint64{"pass": 4}},
	}
	r.want(0, `{"node":"node-a","config_generation":3,"apps":[`+
		`{"name":"redis","vip":"192.0.2.100","state":"SNAPSHOTDONE","snapshot_id":"S-1","restore_requested":true,"connections":{"CONNECTRMT":20,"RST":1},`+
		`"bytes_in":1152921504606846976,"bytes_out":2,"kept_bytes":0,"pending_syns":0},`+
		`{"name":"web","vip":["192.0.2.101","2001:db8::1"],"state":"CONNECTED","snapshot_id":"","restore_requested":false,"connections":{},`+
		`"bytes_in":0,"bytes_out":0,"kept_bytes":0,"pending_syns":0,"reasons":{"pass":4}}]}`+"\n", "status", "-o", "json")
	r.want(0, ""+
		"APP    VIP                      STATE         SNAPSHOT  RESTORE-REQUESTED  CONNECTIONS          BYTES-IN             BYTES-OUT  KEPT-BYTES  PENDING-SYNS\n"+
		"redis  192.0.2.100              SNAPSHOTDONE  S-1       yes                CONNECTRMT=20,RST=1  1152921504606846976  2          0           0\n"+
		"web    192.0.2.101,2001:db8::1  CONNECTED     -         no                 -                    0                    0          0           0\n", "status")
	if got := r.filter.last(); got != "Status" {
		t.Errorf("sent %s", got)
	}
}

func TestConns(t *testing.T) {
	r := newRig(t)
	r.want(0, "[]\n", "conns", "redis", "-o", "json")
	r.filter.conns = []*nfconnfilterv1.ConnInfo{
		{Local: "192.0.2.100:6379", Remote: "198.51.100.7:4000", Role: "passive", State: "CONNECT", BytesIn: 10, BytesOut: 20, Translated: true, WindowClosed: true, Missing: "unread", RemoteIdleMs: 3100},
		{Local: "[2001:db8::1]:6379", Remote: "[2001:db8::2]:4000", Role: "active", State: "CLOSING", RemoteIdleMs: -1},
	}
	r.want(0, `[{"local":"192.0.2.100:6379","remote":"198.51.100.7:4000","role":"passive","state":"CONNECT","bytes_in":10,"bytes_out":20,"translated":true,"offloaded":false,"window_closed":true,`+
		`"segments_in":0,"segments_out":0,"answered":0,"sent_to_remote":0,"sent_to_local":0,"kept_bytes":0,"kept_segments":0,"idle_seconds":3.1,"reasons":{}},`+
		`{"local":"[2001:db8::1]:6379","remote":"[2001:db8::2]:4000","role":"active","state":"CLOSING","bytes_in":0,"bytes_out":0,"translated":false,"offloaded":false,"window_closed":false,`+
		`"segments_in":0,"segments_out":0,"answered":0,"sent_to_remote":0,"sent_to_local":0,"kept_bytes":0,"kept_segments":0,"idle_seconds":-1,"reasons":{}}]`+"\n",
		"conns", "redis", "-o", "json")
	r.want(0, ""+
		"LOCAL               REMOTE              ROLE     STATE    BYTES-IN  BYTES-OUT  IDLE  FLAGS\n"+
		"192.0.2.100:6379    198.51.100.7:4000   passive  CONNECT  10        20         3s    translated,window-closed\n"+
		"[2001:db8::1]:6379  [2001:db8::2]:4000  active   CLOSING  0         0          -     -\n", "conns", "redis")
}

func TestWait(t *testing.T) {
	r := newRig(t)
	r.want(0, "redis: RESTORED\n", "wait", "redis", "--state", "restored")
	r.want(0, `{"app":"redis","state":""}`+"\n", "wait", "redis", "--state", "unknown", "-o", "json")
	r.want(2, "", "wait", "redis", "--state", "DONE")
	r.want(2, "", "wait", "redis")
	r.filter.hang = true
	start := time.Now()
	got := r.want(4, "", "wait", "redis", "--state", "RESTORED", "--timeout", "50ms")
	if d := time.Since(start); d > 5*time.Second || d < 50*time.Millisecond {
		t.Errorf("took %v", d)
	}
	if got.err != "ckptctl: not finished within --timeout 50ms; the operation was given up\n" {
		t.Errorf("standard error %q", got.err)
	}
	r.want(4, `{"error":{"code":"deadline_exceeded","message":"not finished within --timeout 50ms; the operation was given up","app":"redis","state":""}}`+"\n",
		"wait", "redis", "--state", "RESTORED", "--timeout", "50ms", "-o", "json")
}
