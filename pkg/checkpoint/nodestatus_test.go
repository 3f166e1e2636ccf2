package checkpoint

import (
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func nodeStatus(t *testing.T, a *agent) (*pb.AgentNodeStatusReply, map[string]*pb.NodeApp) {
	t.Helper()
	r, err := a.NodeStatus(t.Context(), connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	apps := map[string]*pb.NodeApp{}
	for _, n := range r.Msg.Apps {
		apps[n.Name] = n
	}
	return r.Msg, apps
}

func TestNodeStatus(t *testing.T) {
	w, a := newWorld(t, 2)
	w.others = []*pb.AppStatus{{Name: "gone", State: control.StateBlockData, TakenBy: "node-b"}}
	vip := []netip.Addr{netip.MustParseAddr("192.0.2.101")}
	a.cfg.Apps["away"] = &config.App{Name: "away", VIPs: vip, Nodes: []string{"node-b", "node-c"}}
	a.cfg.Apps["unit"] = &config.App{Name: "unit", VIPs: vip, Process: config.Process{SystemdUnit: "redis.service"}}
	a.cfg.AppFaults = map[string]config.Faults{"broken": {{File: "broken.toml", Line: 3, Col: 1, Message: "bad"}}}
	a.cfg.Node.LoadFile = filepath.Join(t.TempDir(), "load")
	writeFile(t, a.cfg.Node.LoadFile, "0.75\n")
	r, apps := nodeStatus(t, a)
	if r.Node != "node-a" || r.Load != 0.75 || len(r.Apps) != 5 {
		t.Fatalf("%v", r)
	}
	if n := apps["redis"]; n.State != control.StateConnected || !n.MayRun || n.Fault != "" || n.IdleMs != -1 || n.Operation != "" {
		t.Errorf("redis: %v", n)
	}
	if n := apps["gone"]; n.State != control.StateBlockData || n.TakenBy != "node-b" || n.MayRun || !strings.Contains(n.Fault, "gone.toml") {
		t.Errorf("gone: %v", n)
	}
	for name, fault := range map[string]string{"away": "node-b, node-c", "unit": "not supported", "broken": "broken.toml:3:1: bad"} {
		if n := apps[name]; n.MayRun || !strings.Contains(n.Fault, fault) || n.State != "" {
			t.Errorf("%s: %v", name, n)
		}
	}
	op, err := a.begin(t.Context(), "redis", opSnapshot)
	if err != nil {
		t.Fatal(err)
	}
	if _, apps = nodeStatus(t, a); apps["redis"].Operation != opSnapshot {
		t.Errorf("%v", apps["redis"])
	}
	a.finish(op, nil)
	w.mu.Lock()
	w.away()
	w.mu.Unlock()
	a.trust = func(string) error { return errors.New("redis.toml may be written by others") }
	if _, apps = nodeStatus(t, a); apps["redis"].State != control.StateSnapshotDone || apps["redis"].SnapshotId != w.id ||
		apps["redis"].MayRun || !strings.Contains(apps["redis"].Fault, "written by others") {
		t.Errorf("%v", apps["redis"])
	}
	w.mu.Lock()
	w.fail["STATUS"] = errTest
	w.mu.Unlock()
	if _, err := a.NodeStatus(t.Context(), connect.NewRequest(&pb.AgentNodeStatusRequest{})); err == nil {
		t.Error("a status without the filter")
	}
}

func TestLoad(t *testing.T) {
	for text, want := range map[string]float64{"0.75\n": 0.75, "1.50 0.1 0.2 1/2 3": 1.5, "0": 0, "": -1, "\n": -1, "high": -1, "NaN": -1, "inf": -1, "-1": -1, "1e999": -1} {
		if got, err := parseLoad(text); (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	_, a := newWorld(t, 0)
	if got := a.load(""); got < 0 {
		t.Errorf("the kernel's load is %v", got)
	}
	if got := a.load(filepath.Join(t.TempDir(), "none")); got != -1 {
		t.Errorf("without its file the load is %v", got)
	}
}

// Where there is no scheduler the agent puts applications to sleep itself; it
// does not try again at once when that is refused.
func TestHibernate(t *testing.T) {
	w, a := newWorld(t, 1)
	now := time.Now()
	a.idle.now = func() time.Time { return now }
	w.socks[0].Info = &sockdiag.TCPInfo{LastDataRecv: time.Second, LastDataSent: time.Second}
	a.cfg.Apps["redis"].Hibernate.After = config.Duration(time.Minute)
	s := sleeps{}
	look := func() string {
		w.mu.Lock()
		w.events = nil
		w.mu.Unlock()
		a.lookIdle(t.Context(), s)
		a.wg.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.state
	}
	if got := look(); got != control.StateConnected {
		t.Fatalf("after a second: %s", got)
	}
	if _, apps := nodeStatus(t, a); apps["redis"].IdleMs != 1000 {
		t.Errorf("idle: %v", apps["redis"])
	}
	now = now.Add(time.Minute)
	a.cfg.Cluster.Scheduler = &config.Scheduler{}
	if got := look(); got != control.StateConnected {
		t.Fatalf("with a scheduler the agent decides: %s", got)
	}
	a.cfg.Cluster.Scheduler = nil
	w.mu.Lock()
	w.fail["SNAPSHOTSTART"] = errTest
	w.mu.Unlock()
	if got := look(); got != control.StateConnected || !strings.Contains(w.trace(), "SNAPSHOTSTART") {
		t.Fatalf("refused: %s, %s", got, w.trace())
	}
	if look(); strings.Contains(w.trace(), "SNAPSHOTSTART") {
		t.Errorf("tried again at once: %s", w.trace())
	}
	w.mu.Lock()
	delete(w.fail, "SNAPSHOTSTART")
	w.mu.Unlock()
	s["redis"].Worked()
	if got := look(); got != control.StateSnapshotDone {
		t.Errorf("after a minute: %s, %s", got, w.trace())
	}
	if look(); len(a.idle.names()) != 0 {
		t.Error("what is away is followed on")
	}
}

func TestPeerPort(t *testing.T) {
	_, a := newWorld(t, 0)
	loop := netip.MustParseAddr("127.0.0.1")
	p := &peerPort{a: a, ctx: t.Context()}
	if serve, err := p.ensure(); serve != nil || err != nil {
		t.Fatalf("a single node opens a port: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	a.cfg.Cluster.Nodes = []config.ClusterNode{{Name: "node-a", Address: loop, AgentPort: port}}
	a.cfg.Node.Address, a.cfg.Node.AgentPort = loop, port
	if serve, err := p.ensure(); serve != nil || err != nil {
		t.Fatalf("a node without others opens a port: %v", err)
	}
	a.cfg.Cluster.Scheduler = &config.Scheduler{Address: loop}
	if _, err := p.ensure(); err == nil || !strings.Contains(err.Error(), "agent_port") {
		t.Errorf("a port that is taken: %v", err)
	}
	l.Close()
	serve, err := p.ensure()
	if serve == nil || err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if serve, err := p.ensure(); serve != nil || err != nil {
		t.Errorf("opened twice: %v", err)
	}
	a.cfg.Node.AgentPort++
	if _, err := p.ensure(); err == nil || !strings.Contains(err.Error(), "until it is started anew") {
		t.Errorf("a port that has changed: %v", err)
	}
	a.cfg.Cluster.Scheduler, a.cfg.Cluster.Nodes = nil, append(a.cfg.Cluster.Nodes, config.ClusterNode{Name: "node-b"})
	if got := peerAddress(a.cfg); !got.IsValid() {
		t.Error("with another node there is no port")
	}
	a.cfg.Node.Name = "node-x"
	if got := peerAddress(a.cfg); got.IsValid() {
		t.Error("a node that is not in cluster.toml has a port")
	}
}
