package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/restorereq"
	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/internal/vip"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// Names of operations, as errors and Progress show them.
const (
	opStart    = "start"
	opStop     = "stop"
	opSnapshot = "snapshot"
	opRestore  = "restore"
	opAbort    = "abort"
	opRecover  = "recover"
	opMigrate  = "migrate"
	opCriu     = "criu" // of a CRIU that somebody else has started
)

// DefaultRestoreListen is where restore requests of the filter arrive on a
// node without a scheduler.
const DefaultRestoreListen = "127.0.0.1:7400"

// Options say how an agent runs.
type Options struct {
	// SharedDir holds cluster.toml, apps/ and snapshots/; NodeFile is the
	// node's own file.
	SharedDir, NodeFile string
	// Logger is slog.Default when nil.
	Logger *slog.Logger
	// Reload makes the agent read its configuration again; may be nil.
	Reload <-chan struct{}
	// RestoreListen is DefaultRestoreListen when empty.
	RestoreListen string
	// Failpoint, OPERATION/PHASE, kills the agent's process where that phase
	// of the operation begins: for tests of what the next agent does.
	Failpoint string
	// Holdpoint is a file; while a line of it is OPERATION/PHASE, that phase does
	// not go on: for tests of what happens just then. Empty: none.
	Holdpoint string
	// Ends are where the agent's process ends, for tests of crashes; nil: nowhere.
	Ends *failpoint.Points
}

// sockets is the part of sockdiag.Conn that the agent needs.
type sockets interface {
	List(sockdiag.Query) ([]sockdiag.Socket, error)
	Listeners(addrs []netip.Addr, ports []uint16) ([]sockdiag.Socket, error)
	Destroy(sockdiag.Socket) error
	DestroySockets([]sockdiag.Socket) (int, error)
	Close() error
}

// addresses adds and removes VIPs, in a network namespace ("": the agent's).
type addresses interface {
	add(namespace, iface string, addr netip.Addr) error
	remove(namespace, iface string, addr netip.Addr) error
	has(namespace string, addr netip.Addr) (iface string, ok bool, err error)
	// local lists every address of the node and of the namespace.
	local(namespace string) ([]netip.Addr, error)
	// announce tells the link of the node's interface who has the address now.
	announce(iface string, addr netip.Addr) error
	// links gives the link-layer addresses of the node's interface.
	links(iface string) []string
	// probe asks the link who has the address: link-layer addresses.
	probe(namespace, iface string, addr netip.Addr) ([]string, error)
	// route tells by which interface the node reaches the address; "" when it
	// is its own.
	route(addr netip.Addr) (iface string, err error)
}

// agent serves nfconnfilter.v1.Agent.
type agent struct {
	o           Options
	log         *slog.Logger
	filter      nfconnfilterv1connect.FilterClient
	openSockets func(namespace string) (sockets, error)
	addrs       addresses
	sysctl      func(namespace, name string) string // a value below /proc/sys, "" where it cannot be read
	launch      launcher
	images      imager
	foreign     foreignCRIU
	peers       *control.Peers // the way to the other nodes
	store       store
	clock       wallClock
	intents     intents
	owed        owed
	settling    sync.Map   // of *sync.Mutex by application: one release of old nodes at a time, and none of one that is asked anew
	yielding    sync.Mutex // one at a time
	// dialAgent and dialFilter give another node's daemon, and what ends the use
	// of it.
	dialAgent  func(node string) (nfconnfilterv1connect.AgentClient, func(), error)
	dialFilter func(node string) (nfconnfilterv1connect.FilterClient, func(), error)
	trust      func(path string) error // whether root may run what the file says
	readApp    func(name string) (*config.App, error)
	idle       *idleMeters
	root       context.Context // ends when the agent is told to stop
	wg         sync.WaitGroup  // operations under way

	mu     sync.Mutex
	cfg    *config.Config
	ops    map[string]*operation
	wanted map[string]bool // restore requests that came during another operation
	procs  map[string]process
	// actions are operations of a CRIU that somebody else has started.
	actions  map[string]*actionRun
	takingUp map[string]bool   // these of an earlier agent
	awaited  map[string]string // applications that only the caller of CRIU can bring back, and why
	// returning: their migration failed, and they are being restored here.
	returning map[string]bool
	prepared  map[string]prepared

	loadSaid string // what is in the log of the load
}

var _ nfconnfilterv1connect.AgentHandler = (*agent)(nil)

// Run serves the agent socket until ctx ends. Operations that can be undone
// are undone then, the others are finished; applications run on. An error says
// what keeps the agent from working: an invalid configuration (config.Faults),
// a socket or port that is taken.
func Run(ctx context.Context, o Options) error {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.RestoreListen == "" {
		o.RestoreListen = DefaultRestoreListen
	}
	cfg, err := config.Load(o.SharedDir, o.NodeFile)
	if err != nil {
		return err
	}
	closeOnExec()
	launch := &osLauncher{stateDir: cfg.Node.StateDir, log: o.Logger, hooks: kernelHooks{}, ends: o.Ends}
	filter := control.Dial(cfg.Node.ControlSocket, connect.WithInterceptors(patience(filterPatience), crossing(o.Ends)))
	defer filter.Close()
	a := newAgent(ctx, o, cfg, filter)
	a.launch, a.addrs = launch, osAddresses{log: o.Logger, ends: o.Ends}
	criu := osImager{launch, func() string { return a.config().Node.CRIU.Command }}
	a.images, a.foreign = criu, criu
	a.openSockets = openSockets
	if a.peers, err = control.NewPeers(control.ClusterPeers(a.config)); err != nil {
		return err
	}
	a.dialPeers()
	for _, f := range cfg.AllFaults() {
		a.log.Error("application disabled", "fault", f.Error())
	}
	return a.serve(ctx)
}

// closeOnExec keeps what stood open where the agent was started from the applications
// that it starts: an image of them could not be made.
func closeOnExec() {
	const first = 3
	names, _ := os.ReadDir("/proc/self/fd")
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd >= first {
			unix.CloseOnExec(fd)
		}
	}
}

func newAgent(root context.Context, o Options, cfg *config.Config, filter nfconnfilterv1connect.FilterClient) *agent {
	return &agent{
		trust: config.CheckTrusted,
		sysctl: func(namespace, name string) string {
			var b []byte
			_ = inNamespace(namespace, func() (err error) { // net is the reading thread's own
				b, err = os.ReadFile("/proc/sys/" + name)
				return err
			})
			return string(b)
		},
		readApp: func(name string) (*config.App, error) { return config.LoadApp(o.SharedDir, o.NodeFile, name) },
		o:       o, log: o.Logger, filter: filter, cfg: cfg, root: root,
		store: store{filepath.Join(o.SharedDir, "snapshots")}, intents: intents{cfg.Node.StateDir},
		ops: map[string]*operation{}, wanted: map[string]bool{}, procs: map[string]process{}, actions: map[string]*actionRun{}, takingUp: map[string]bool{}, awaited: map[string]string{},
		owed: owed{cfg.Node.StateDir, &sync.Mutex{}}, returning: map[string]bool{}, prepared: map[string]prepared{},
		idle: &idleMeters{all: map[string]*idleMeter{}, now: time.Now},
	}
}

// serve opens the doors and waits for their end and that of all operations.
func (a *agent) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.root = ctx
	_ = a.clock.now() // what it is set to from here on shows
	node := a.config().Node
	if err := checkRecords(node.StateDir); err != nil {
		return err
	}
	l, err := control.Listen(node.AgentSocket, node.ControlGroup)
	if err != nil {
		return err
	}
	defer l.Close()
	if w := control.Warning(l); w != "" {
		a.log.Warn(w)
	}
	var rl net.Listener
	if a.config().Cluster.Scheduler == nil {
		var lc net.ListenConfig
		if rl, err = lc.Listen(ctx, "tcp", a.o.RestoreListen); err != nil {
			return fmt.Errorf("port for restore requests: %w; another agent or scheduler runs here, or set [scheduler] in cluster.toml", err)
		}
		defer rl.Close()
	}
	errs := make(chan error, 3) // one for each door
	var wg sync.WaitGroup
	// A door that cannot be kept open ends the agent.
	door := func(f func() error) {
		wg.Go(func() {
			errs <- f()
			cancel()
		})
	}
	peers := &peerPort{a: a, ctx: ctx}
	servePeers, err := peers.ensure()
	if err != nil {
		return err
	}
	a.recover(ctx)
	if servePeers != nil {
		door(servePeers)
	}
	door(func() error {
		return control.Serve(ctx, l, control.AgentHandler(a), control.AllowGroup(node.ControlGroup))
	})
	if rl != nil {
		s := &restorereq.Server{Allowed: a.mayRequest, Accept: a.requested}
		door(func() error { return s.Serve(ctx, rl) })
	}
	wg.Go(func() { a.keepAdopted(ctx) })
	wg.Go(func() { a.keepSettled(ctx) })
	wg.Go(func() { a.keepIdle(ctx) })
	a.log.Info("agent serves", "socket", node.AgentSocket, "node", node.Name)
	for reload := a.o.Reload; ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case _, open := <-reload:
			if !open {
				reload = nil
				continue
			}
			a.reload()
			switch servePeers, err := peers.ensure(); {
			case err != nil:
				a.log.Error("other nodes do not reach this agent", "err", err)
			case servePeers != nil:
				door(servePeers)
			}
		}
	}
	wg.Wait()
	// An operation that saw the agent running is counted before the lock is
	// free again; none begins after.
	a.mu.Lock()
	under := len(a.ops)
	a.mu.Unlock()
	if under > 0 {
		a.log.Info("waiting for operations to end", "number", under)
	}
	a.wg.Wait()
	close(errs)
	var all error
	for err := range errs {
		all = errors.Join(all, err)
	}
	return all
}

func (a *agent) config() *config.Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg
}

// reload takes a new configuration; an invalid one leaves the old in force.
func (a *agent) reload() {
	r, err := config.Reload(a.config(), func() (*config.Config, error) { return config.Load(a.o.SharedDir, a.o.NodeFile) })
	if err != nil {
		a.log.Error("configuration is invalid, the old one stays in force", "err", err)
		return
	}
	cfg := r.Config
	for _, f := range r.Faults {
		a.log.Error("an application's file has faults", "fault", f.Error())
	}
	for name := range cfg.AppFaults {
		a.log.Error("application disabled", "app", name)
	}
	for _, name := range r.Kept {
		a.log.Warn("what was read of the application before stays in force", "app", name)
	}
	a.mu.Lock()
	cfg.Generation = a.cfg.Generation + 1
	for name := range cfg.Apps {
		if a.cfg.Apps[name] == nil { // an earlier agent may have left something
			a.recoverLater(name)
		}
	}
	a.cfg = cfg
	procs := maps.Clone(a.procs)
	a.mu.Unlock()
	for name, p := range procs {
		if app := cfg.Apps[name]; app != nil {
			a.hookRunning(app, p)
		}
	}
	a.log.Info("configuration read again", "generation", cfg.Generation)
}

// app finds an application in the configuration in force.
func (a *agent) app(name string) (*config.App, error) {
	cfg := a.config()
	if app := cfg.Apps[name]; app != nil {
		return app, nil
	}
	if f := cfg.AppFaults[name]; len(f) > 0 {
		return nil, control.Error(connect.CodeInvalidArgument, name, "", "application "+name+" is disabled: "+f.Error())
	}
	known := slices.Sorted(maps.Keys(cfg.Apps))
	return nil, control.Error(connect.CodeNotFound, name, "",
		fmt.Sprintf("no application %q in %s; there is %q", name, filepath.Join(cfg.SharedDir, "apps"), known))
}

// freshApp reads an application's file again, for start.
func (a *agent) freshApp(name string) (*config.App, error) {
	if name == "" || name != filepath.Base(name) || name[0] == '.' {
		return nil, control.Error(connect.CodeInvalidArgument, name, "", fmt.Sprintf("%q is not an application's name", name))
	}
	cfg := a.config()
	app, err := a.readApp(name)
	if _, serr := os.Stat(filepath.Join(cfg.SharedDir, "apps", name+".toml")); err != nil && errors.Is(serr, os.ErrNotExist) {
		return a.app(name) // says which there are
	}
	if err != nil {
		return nil, control.Error(connect.CodeInvalidArgument, name, "", err.Error())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	fresh := *a.cfg
	fresh.Apps, fresh.AppFaults = maps.Clone(fresh.Apps), maps.Clone(fresh.AppFaults)
	if fresh.Apps == nil {
		fresh.Apps = map[string]*config.App{}
	}
	fresh.Apps[name] = app
	delete(fresh.AppFaults, name)
	a.cfg = &fresh
	return app, nil
}

// trusted tells whether root may run what the application's file says.
func (a *agent) trusted(app *config.App) error {
	return a.trustedFile(app, filepath.Join(a.config().SharedDir, "apps", app.Name+".toml"))
}

// trustedFile tells whether root may run what a file says.
func (a *agent) trustedFile(app *config.App, path string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	if err := a.trust(path); err != nil {
		return control.Error(connect.CodePermissionDenied, app.Name, "", err.Error())
	}
	return nil
}

// mayRequest tells who may ask for restores: this machine and the nodes.
func (a *agent) mayRequest(peer netip.Addr) bool { return restorereq.FromNodes(a.config(), peer) }

// processOf gives the application's process; nil when none runs.
func (a *agent) processOf(app *config.App) (process, error) {
	a.mu.Lock()
	p := a.procs[app.Name]
	a.mu.Unlock()
	if p != nil && p.alive() {
		return p, nil
	}
	p, err := a.launch.find(app)
	if err != nil {
		return nil, err
	}
	a.setProcess(app.Name, p)
	return p, nil
}

func (a *agent) setProcess(app string, p process) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p == nil {
		delete(a.procs, app)
		return
	}
	a.procs[app] = p
}

// osAddresses are those of this machine.
type osAddresses struct {
	log  *slog.Logger
	host string // the node's namespace; "": the agent's
	ends *failpoint.Points
}

func (o osAddresses) in(namespace string, f func() error) error {
	if namespace == hostNamespace {
		namespace = o.host
	}
	return inNamespace(namespace, f)
}

func (o osAddresses) add(namespace, iface string, addr netip.Addr) error {
	o.ends.Here(failpoint.Address, nil)
	defer o.ends.Here(failpoint.Moved, nil)
	return o.in(namespace, func() error {
		if err := vip.Add(iface, addr); err != nil {
			return err
		}
		if iface == "lo" {
			return nil
		}
		if err := vip.Announce(iface, addr); err != nil {
			// Neighbours that still know another owner learn it with time.
			o.log.Warn("VIP is not announced", "interface", iface, "vip", addr, "err", err)
		}
		return nil
	})
}

func (o osAddresses) remove(namespace, iface string, addr netip.Addr) error {
	o.ends.Here(failpoint.Address, nil)
	defer o.ends.Here(failpoint.Moved, nil)
	return o.in(namespace, func() error { return vip.Remove(iface, addr) })
}

func (o osAddresses) has(namespace string, addr netip.Addr) (iface string, ok bool, err error) {
	err = o.in(namespace, func() error {
		iface, ok, err = vip.Has(addr)
		return err
	})
	return iface, ok, err
}

func (o osAddresses) announce(iface string, addr netip.Addr) error {
	return o.in(hostNamespace, func() error { return vip.Announce(iface, addr) })
}

func (o osAddresses) links(iface string) []string {
	var out []string
	_ = o.in(hostNamespace, func() error {
		i, err := net.InterfaceByName(iface)
		if err == nil && len(i.HardwareAddr) > 0 {
			out = append(out, i.HardwareAddr.String())
		}
		return err
	})
	return out
}

func (o osAddresses) probe(namespace, iface string, addr netip.Addr) (out []string, err error) {
	err = o.in(namespace, func() error {
		who, err := vip.Probe(iface, addr)
		for _, w := range who {
			out = append(out, w.String())
		}
		return err
	})
	return out, err
}

func (o osAddresses) route(addr netip.Addr) (iface string, err error) {
	err = o.in(hostNamespace, func() error {
		iface, err = vip.Route(addr)
		return err
	})
	return iface, err
}

func (o osAddresses) local(namespace string) ([]netip.Addr, error) {
	var out []netip.Addr
	look := func() error {
		all, err := net.InterfaceAddrs()
		for _, n := range all {
			if p, ok := n.(*net.IPNet); ok {
				if addr, ok := netip.AddrFromSlice(p.IP); ok {
					out = append(out, addr.Unmap())
				}
			}
		}
		return err
	}
	if err := o.in(hostNamespace, look); err != nil || namespace == hostNamespace {
		return out, err
	}
	err := o.in(namespace, look)
	return out, err
}
