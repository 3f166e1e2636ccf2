package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv(listenEnv); addr != "" {
		playServer(addr)
	}
	goleak.VerifyTestMain(m)
}

// world is everything outside of the agent: it records what is done to it, in
// order, and plays a filter, a kernel and a process.
type world struct {
	nfconnfilterv1connect.UnimplementedFilterHandler

	mu     sync.Mutex
	events []string
	fail   map[string]error  // by event: the step fails
	hook   map[string]func() // by event: called before the step, unlocked

	state, id string
	conns     []*pb.ConnInfo
	socks     []sockdiag.Socket
	listening bool
	backlog   uint32
	queue     uint32
	vip       map[string]bool // by namespace
	routed    string          // where the node routes the VIP
	others    []*pb.AppStatus // other applications
	running   bool
	frozen    bool
	hooked    bool           // the connections that it opens get the VIP
	lossy     map[string]int // handshakes to lose, by remote
	unlearned []string
	seals     []bool   // of each SEAL, whether it repeats one
	bounds    []string // boundary and quiet of SNAPSHOTSTART and SNAPSHOTFREEZE
	inFlight  int
	most      int // most connections in flight at once
	stopAgent context.CancelFunc
	answering []string // link-layer addresses that answer for the VIP

	node             string
	peer             *world // of the other node
	oldNode, takenBy string
}

var (
	testVIP = netip.MustParseAddr("192.0.2.100")
	client  = netip.MustParseAddr("198.51.100.7")
)

func (w *world) do(event string) error {
	w.mu.Lock()
	hook := w.hook[event]
	w.mu.Unlock()
	if hook != nil {
		hook()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.events); n == 0 || w.events[n-1] != event {
		w.events = append(w.events, event)
	}
	return w.fail[event]
}

// setFail makes an event fail from now on; nil: not any more.
func (w *world) setFail(event string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail[event] = err; err == nil {
		delete(w.fail, event)
	}
}

// setHook has f called before an event from now on; nil: nothing.
func (w *world) setHook(event string, f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hook[event] = f; f == nil {
		delete(w.hook, event)
	}
}

func (w *world) trace() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.events, " ")
}

// step moves the filter between states.
func (w *world) step(event string, from []string, to string) (*connect.Response[pb.AppReply], error) {
	if err := w.do(event); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Contains(from, w.state) {
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", w.state, event+" is not allowed in "+w.state)
	}
	w.state = to
	if err := w.fail[event+" lost"]; err != nil { // it is carried out, and the reply does not arrive
		return nil, err
	}
	return connect.NewResponse(&pb.AppReply{App: "redis", State: to}), nil
}

type reply = connect.Response[pb.AppReply]

func (w *world) Register(context.Context, *connect.Request[pb.RegisterRequest]) (*reply, error) {
	return w.step("REGISTER", []string{""}, control.StateConnected)
}

func (w *world) Unregister(_ context.Context, r *connect.Request[pb.UnregisterRequest]) (*reply, error) {
	return w.step("UNREGISTER", []string{control.StateConnected, control.StateRestored, control.StateSnapshotDone}, "")
}

func (w *world) SnapshotStart(_ context.Context, r *connect.Request[pb.SnapshotStartRequest]) (*connect.Response[pb.LearnReply], error) {
	_, err := w.step("SNAPSHOTSTART", []string{control.StateConnected, control.StateRestored}, control.StateSnapshotStart)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.oldNode = ""
	w.events = append(w.events, fmt.Sprintf("sockets=%d,ports=%v", len(r.Msg.Sockets), r.Msg.ListenPorts))
	w.bounds = append(w.bounds, fmt.Sprint(r.Msg.Boundary, " ", r.Msg.QuietMs))
	return connect.NewResponse(&pb.LearnReply{Unlearned: w.unlearned}), nil
}

func (w *world) Adopt(_ context.Context, r *connect.Request[pb.AdoptRequest]) (*connect.Response[pb.AdoptReply], error) {
	_, err := w.step("ADOPT", []string{control.StateConnected, control.StateRestored, control.StateSnapshotStart}, w.state)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, fmt.Sprintf("sockets=%d", len(r.Msg.Sockets)))
	return connect.NewResponse(&pb.AdoptReply{App: "redis", State: w.state, Adopted: uint32(len(r.Msg.Sockets))}), nil
}

func (w *world) SnapshotFreeze(_ context.Context, r *connect.Request[pb.SnapshotFreezeRequest]) (*reply, error) {
	if r.Msg.Boundary == control.BoundaryNow {
		return w.step("SNAPSHOTFREEZE-now", []string{control.StateSnapshotFreeze}, control.StateSnapshotFreeze)
	}
	w.mu.Lock()
	w.bounds = append(w.bounds, fmt.Sprint(r.Msg.Boundary, " ", r.Msg.QuietMs))
	w.mu.Unlock()
	return w.step("SNAPSHOTFREEZE", []string{control.StateSnapshotStart}, control.StateSnapshotFreeze)
}

func (w *world) Seal(_ context.Context, r *connect.Request[pb.SealRequest]) (*reply, error) {
	w.mu.Lock()
	w.seals = append(w.seals, r.Msg.Again)
	w.mu.Unlock()
	return w.step("SEAL", []string{control.StateSnapshotFreeze}, control.StateSnapshotFreeze)
}

func (w *world) SnapshotDone(_ context.Context, r *connect.Request[pb.SnapshotDoneRequest]) (*reply, error) {
	event := "SNAPSHOTDONE"
	if r.Msg.Force {
		event += "-force"
	}
	res, err := w.step(event, []string{control.StateSnapshotFreeze}, control.StateSnapshotDone)
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.id = r.Msg.SnapshotId
	}
	return res, err
}

func (w *world) SnapshotAbort(context.Context, *connect.Request[pb.AppRequest]) (*reply, error) {
	return w.step("SNAPSHOTABORT", []string{control.StateSnapshotStart, control.StateSnapshotFreeze}, control.StateRestored)
}

func (w *world) RestoreStart(_ context.Context, r *connect.Request[pb.RestoreStartRequest]) (*reply, error) {
	if r.Msg.OldNode != "" {
		return w.takeOver(r.Msg.OldNode)
	}
	return w.step("RESTORESTART", []string{control.StateSnapshotDone}, control.StateRestoreStart)
}

func (w *world) RestoreConn(_ context.Context, r *connect.Request[pb.RestoreConnRequest]) (*reply, error) {
	if err := w.do("RESTORECONN-" + r.Msg.Kind); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range r.Msg.Conns {
		if w.lossy[id.Remote] > 0 {
			w.lossy[id.Remote]--
			continue
		}
		for _, c := range w.conns {
			if c.Remote == id.Remote {
				c.State = control.ConnRestoring
				w.inFlight++
			}
		}
	}
	w.most = max(w.most, w.inFlight+int(w.queue))
	return connect.NewResponse(&pb.AppReply{App: "redis", State: w.state}), nil
}

func (w *world) Restored(context.Context, *connect.Request[pb.RestoredRequest]) (*reply, error) {
	return w.step("RESTORED", []string{control.StateRestoreStart}, control.StateRestored)
}

func (w *world) RestoreAbort(context.Context, *connect.Request[pb.AppRequest]) (*reply, error) {
	w.mu.Lock()
	foreign := w.oldNode != "" && (w.state == control.StateRestoreStart || w.state == control.StateSnapshotDone)
	w.mu.Unlock()
	if foreign {
		return w.handBack()
	}
	return w.step("RESTOREABORT", []string{control.StateRestoreStart}, control.StateSnapshotDone)
}

func (w *world) Status(context.Context, *connect.Request[pb.StatusRequest]) (*connect.Response[pb.StatusReply], error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["STATUS"]; err != nil {
		return nil, err
	}
	r := &pb.StatusReply{}
	if w.state != "" {
		under := map[string]uint32{control.ConnRestoring: uint32(w.inFlight)}
		r.Apps = []*pb.AppStatus{{Name: "redis", State: w.state, SnapshotId: w.id, Connections: under, OldNode: w.oldNode, TakenBy: w.takenBy}}
		w.finish()
	}
	r.Apps = append(r.Apps, w.others...)
	return connect.NewResponse(r), nil
}

// finish ends every handshake under way.
func (w *world) finish() {
	for _, c := range w.conns {
		if c.State == control.ConnRestoring {
			c.State, c.Restorable = control.ConnConnect, false
			w.inFlight--
			w.socks = append(w.socks, sock(c.Remote, sockdiag.Established))
		}
	}
}

// GetConnInfo finishes every handshake under way: the time of a look.
func (w *world) GetConnInfo(context.Context, *connect.Request[pb.GetConnInfoRequest]) (*connect.Response[pb.ConnInfoReply], error) {
	if err := w.do("INFO"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &pb.ConnInfoReply{App: "redis", State: w.state}
	w.finish()
	for _, c := range w.conns {
		r.Conns = append(r.Conns, &pb.ConnInfo{Local: c.Local, Remote: c.Remote, Role: c.Role, State: c.State,
			Restorable: c.Restorable, Missing: c.Missing, KeptBytes: c.KeptBytes, Image: c.Image})
	}
	return connect.NewResponse(r), nil
}

// The kernel.

func (w *world) List(q sockdiag.Query) ([]sockdiag.Socket, error) {
	if err := w.do("list"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.socks), nil
}

func (w *world) Listeners([]netip.Addr, []uint16) ([]sockdiag.Socket, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["listeners"]; err != nil {
		return nil, err
	}
	if !w.listening {
		return nil, nil
	}
	return []sockdiag.Socket{{Local: netip.AddrPortFrom(netip.IPv4Unspecified(), 6379), State: sockdiag.Listen, SendQ: w.backlog, RecvQ: w.queue}}, nil
}

func (w *world) DestroySockets(all []sockdiag.Socket) (int, error) {
	for i, k := range all {
		if err := w.Destroy(k); err != nil {
			return i, err
		}
	}
	return len(all), nil
}

func (w *world) Destroy(k sockdiag.Socket) error {
	if err := w.do("destroy"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.socks = slices.DeleteFunc(w.socks, func(o sockdiag.Socket) bool { return o.Remote == k.Remote })
	return nil
}

func (w *world) Close() error { return nil }

func (w *world) add(ns, iface string, _ netip.Addr) error {
	w.mu.Lock()
	w.vip[ns] = true
	w.mu.Unlock()
	return w.do("vip+" + ns + iface)
}

func (w *world) remove(ns, iface string, _ netip.Addr) error {
	w.mu.Lock()
	w.vip[ns] = false
	w.mu.Unlock()
	return w.do("vip-" + ns + iface)
}

func (w *world) has(ns string, _ netip.Addr) (string, bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["has-"+ns]; err != nil {
		return "", false, err
	}
	if ns != hostNamespace {
		return "lo", w.vip[ns], nil
	}
	return "eth0", w.vip[ns], nil
}

func (w *world) announce(iface string, _ netip.Addr) error { return w.do("announce+" + iface) }

func (w *world) links(string) []string { return []string{"02:00:00:00:00:0a"} }

func (w *world) probe(_, _ string, _ netip.Addr) ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answering, w.fail["probe"]
}

func (w *world) route(netip.Addr) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.routed, w.fail["route"]
}

func (w *world) local(string) ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr("192.0.2.11")}, nil
}

// Processes.

type fakeLauncher struct{ w *world }

func (l fakeLauncher) start(app *config.App) (process, error) {
	if err := l.w.do("exec"); err != nil {
		return nil, err
	}
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	l.w.running = l.w.fail["dies"] == nil
	l.w.listening = l.w.running && l.w.fail["deaf"] == nil
	l.w.hooked = app.Process.BindVIP
	return fakeProcess(l), nil
}

// hook is seen only where it has something to do.
func (l fakeLauncher) hook(app *config.App, _ process) error {
	l.w.mu.Lock()
	was := l.w.hooked
	l.w.hooked = app.Process.BindVIP
	l.w.mu.Unlock()
	switch {
	case app.Process.BindVIP:
		return l.w.do("hook")
	case was:
		return l.w.do("unhook")
	}
	return nil
}

func (l fakeLauncher) run(ctx context.Context, _ *config.App, argv []string) error {
	if err := l.w.do("before"); err != nil {
		return err
	}
	return ctx.Err()
}

func (l fakeLauncher) find(*config.App) (process, error) {
	if p := fakeProcess(l); p.alive() {
		return p, nil
	}
	return nil, nil
}

func (l fakeLauncher) adopt(*config.App, int) (process, error) {
	if err := l.w.do("adopt"); err != nil {
		return nil, err
	}
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	l.w.running, l.w.listening = true, true
	return fakeProcess(l), nil
}

func (l fakeLauncher) logPath(*config.App) string { return "/log" }

// fakePID is the number of its process.
const fakePID = 1234

type fakeProcess struct{ w *world }

func (p fakeProcess) alive() bool {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	return p.w.running
}

func (p fakeProcess) within(string) error {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	return p.w.fail["elsewhere"]
}

func (p fakeProcess) has(pid int) bool { return pid == fakePID && p.alive() }

func (p fakeProcess) rootedIn(int) error {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	return p.w.fail["rooted"]
}

func (p fakeProcess) describe() string { return "process 1234" }

func (p fakeProcess) freeze(context.Context) error {
	p.w.mu.Lock()
	p.w.frozen = true
	p.w.mu.Unlock()
	return p.w.do("freeze")
}

func (p fakeProcess) thaw() error {
	p.w.mu.Lock()
	was := p.w.frozen
	p.w.frozen = false
	p.w.mu.Unlock()
	if !was {
		return nil
	}
	return p.w.do("thaw")
}

func (p fakeProcess) stop(sig unix.Signal, _ time.Duration) error {
	err := p.w.do("stop-" + unix.SignalName(sig))
	if err == nil {
		p.w.mu.Lock()
		p.w.running, p.w.listening, p.w.frozen = false, false, false
		p.w.mu.Unlock()
	}
	return err
}

func sock(remote string, s sockdiag.State) sockdiag.Socket {
	return sockdiag.Socket{Local: netip.AddrPortFrom(testVIP, 6379), Remote: netip.MustParseAddrPort(remote), State: s}
}

// newWorld has n clients connected to an application that runs.
func newWorld(t *testing.T, n int) (*world, *agent) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &world{fail: map[string]error{}, hook: map[string]func(){}, lossy: map[string]int{},
		stopAgent: cancel, state: control.StateConnected, running: true, listening: true, vip: map[string]bool{"": true}, routed: "veth1", backlog: 64}
	for i := range n {
		remote := netip.AddrPortFrom(client, uint16(20000+i)).String()
		w.socks = append(w.socks, sock(remote, sockdiag.Established))
		w.conns = append(w.conns, &pb.ConnInfo{Local: "192.0.2.100:6379", Remote: remote, Role: control.RolePassive, State: control.ConnConnect})
	}
	app := &config.App{Name: "redis", VIPs: []netip.Addr{testVIP}, IncludePorts: []uint16{6379}}
	app.Process.Start = []string{"redis-server"}
	app.Process.StopSignal = "SIGKILL"
	app.Process.ReadyTimeout = config.Duration(2 * time.Second)
	app.Checkpoint = config.Checkpoint{Engine: config.EngineRestart, Boundary: "turn", Before: []string{"save"},
		DrainTimeout: config.Duration(60 * time.Millisecond), Quiet: config.Duration(time.Millisecond)}
	cfg := &config.Config{Apps: map[string]*config.App{"redis": app}}
	cfg.Node.Name, cfg.Node.Interface, cfg.Node.StateDir = "node-a", "eth0", t.TempDir()
	shared := t.TempDir()
	cfg.SharedDir = shared
	a := newAgent(ctx, Options{SharedDir: shared, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}, cfg, w)
	a.launch, a.addrs = fakeLauncher{w}, w
	a.openSockets = func(string) (sockets, error) { return w, nil }
	a.trust = func(string) error { return nil }
	a.readApp = func(string) (*config.App, error) { return app, nil }
	t.Cleanup(func() {
		cancel()
		a.wg.Wait()
	})
	return w, a
}

// away puts the world behind a snapshot: the application gone, all held.
func (w *world) away() {
	w.state, w.id, w.running, w.listening = control.StateSnapshotDone, "20261122T153000Z-1a2b3c", false, false
	w.socks = nil
	for _, c := range w.conns {
		c.State, c.Restorable = control.ConnConnectRmt, true
	}
}

var errTest = errors.New("made to fail")

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func quietLog() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }
