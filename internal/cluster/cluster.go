// Package cluster drives the application scheduler routine: it asks the nodes'
// agents how they are, takes restore requests on TCP, and has pkg/scheduler
// decide what the agents are asked to do. It keeps nothing on disk.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/restorereq"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
	"github.com/nfconnfilter/nfconnfilter/pkg/scheduler"
)

// Variables for the tests.
var (
	pollEvery   = time.Second
	pollTimeout = 3 * time.Second // for one answer of a node
	deadAfter   = 30 * time.Second
	grace       = 10 * time.Second // for actions under way, when the scheduler is told to end
)

// pollLeast is the least time between two questions to a node.
const pollLeast = 20 * time.Millisecond

// actionTimeout bounds one request to an agent: its own time-outs are shorter.
const actionTimeout = 15 * time.Minute

// Options say how a scheduler runs.
type Options struct {
	SharedDir, NodeFile string
	// Listen is ADDR:PORT; empty: what [scheduler] of cluster.toml says.
	Listen string
	// Logger is slog.Default when nil.
	Logger *slog.Logger
	// Reload makes it read its configuration again; may be nil.
	Reload <-chan struct{}
	// Ready is called once requests are taken; may be nil.
	Ready func()
}

// agentClient is what is asked of a node's agent.
type agentClient interface {
	nfconnfilterv1connect.AgentClient
	Close()
}

// driver carries out what the scheduler decides.
type driver struct {
	log   *slog.Logger
	load  func() (*config.Config, error)
	dial  func(node string) (agentClient, error)
	calls context.Context // of requests to agents that change something
	wg    sync.WaitGroup  // these requests

	mu    sync.Mutex
	cfg   *config.Config
	sched *scheduler.Scheduler
	nodes map[string]*node
	over  bool // nothing new is begun
}

// Misconfigured is an error of options or configuration that is no fault of a
// single file.
type Misconfigured struct{ error }

func (e Misconfigured) Unwrap() error { return e.error }

// Run schedules until ctx ends. An error says what keeps it from working: an
// invalid configuration (config.Faults, Misconfigured), an address that is
// taken.
func Run(ctx context.Context, o Options) error {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	load := func() (*config.Config, error) { return config.LoadScheduler(o.SharedDir, o.NodeFile) }
	cfg, err := load()
	if err != nil {
		return err
	}
	if o.Listen, err = listenAddress(o.Listen, cfg); err != nil {
		return Misconfigured{err}
	}
	d := newDriver(o.Logger, cfg)
	d.load = load
	peers, err := control.NewPeers(control.ClusterPeers(d.config))
	if err != nil {
		return err
	}
	d.dial = func(node string) (agentClient, error) { return peers.DialAgent(node) }
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", o.Listen)
	if err != nil {
		return fmt.Errorf("port for restore requests: %w; another scheduler or agent may run here, or the address is not this machine's: see [scheduler] in cluster.toml, or give --listen", err)
	}
	return d.serve(ctx, l, o)
}

// listenAddress checks where requests are taken.
func listenAddress(listen string, cfg *config.Config) (string, error) {
	if listen == "" {
		s := cfg.Cluster.Scheduler
		if s == nil {
			return "", errors.New("cluster.toml has no [scheduler]: add it with the address that the nodes send restore requests to, or give --listen ADDR:PORT")
		}
		return net.JoinHostPort(s.Address.String(), strconv.Itoa(int(s.Port))), nil
	}
	host, port, err := net.SplitHostPort(listen)
	if err == nil && host != "" {
		_, err = netip.ParseAddr(host)
	}
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("--listen %q is not ADDR:PORT, such as 192.0.2.10:7400", listen)
	}
	return listen, nil
}

func newDriver(log *slog.Logger, cfg *config.Config) *driver {
	return &driver{log: log, cfg: cfg, sched: scheduler.New(decisions(cfg)), nodes: map[string]*node{}}
}

// decisions is the part of the configuration that decisions depend on.
func decisions(cfg *config.Config) scheduler.Config {
	b := cfg.Cluster.Balance
	out := scheduler.Config{
		Apps:    make(map[string]scheduler.App, len(cfg.Apps)),
		Balance: scheduler.Balance{High: b.High, Low: b.Low, Cooldown: b.Cooldown.Std()},
	}
	for _, n := range cfg.Cluster.Nodes {
		out.Nodes = append(out.Nodes, n.Name)
	}
	for name, a := range cfg.Apps {
		out.Apps[name] = scheduler.App{VIPs: a.VIPs, Nodes: a.Nodes, HibernateAfter: a.Hibernate.After.Std()}
	}
	return out
}

func (d *driver) config() *config.Config {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cfg
}

// serve takes requests on l and watches the nodes until ctx ends. Actions under
// way have a little time then; one that is cut off is undone by its agent, and
// begun anew by the next scheduler.
func (d *driver) serve(ctx context.Context, l net.Listener, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	calls, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	d.calls = calls
	for _, f := range d.config().AllFaults() {
		d.log.Error("application disabled", "fault", f.Error())
	}
	d.report(d.config())
	var wg sync.WaitGroup
	watch := func() { d.watch(ctx, &wg) }
	watch()
	failed := make(chan error, 1)
	wg.Go(func() {
		s := &restorereq.Server{
			Allowed: func(a netip.Addr) bool { return restorereq.FromNodes(d.config(), a) },
			Accept:  d.requested,
		}
		failed <- s.Serve(ctx, l)
		cancel()
	})
	d.log.Info("scheduler takes restore requests", "address", l.Addr().String())
	if o.Ready != nil {
		o.Ready()
	}
	for reload := o.Reload; ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case _, open := <-reload:
			if !open {
				reload = nil
				continue
			}
			d.reload()
			watch()
		}
	}
	d.end()
	ended := make(chan struct{})
	go func() { d.wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(grace):
		d.log.Warn("actions under way are cut off; their agents undo them")
		cut()
		<-ended
	}
	wg.Wait()
	for _, n := range d.nodes { // nobody else is left
		n.close()
	}
	return <-failed
}

// end keeps new actions from beginning.
func (d *driver) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
}

func (d *driver) report(cfg *config.Config) {
	if len(cfg.Cluster.Nodes) == 0 {
		d.log.Error("cluster.toml has no [[node]]: there is no agent to ask; add one for each node")
	}
}

// reload takes a new configuration; an invalid one leaves the old in force.
func (d *driver) reload() {
	r, err := config.Reload(d.config(), d.load)
	if err != nil {
		d.log.Error("configuration is invalid, the old one stays in force", "err", err)
		return
	}
	cfg := r.Config
	for _, f := range r.Faults {
		d.log.Error("an application's file has faults", "fault", f.Error())
	}
	d.report(cfg)
	for _, name := range r.Kept {
		d.log.Warn("what was read of the application before stays in force", "app", name)
	}
	d.mu.Lock()
	cfg.Generation = d.cfg.Generation + 1
	d.cfg = cfg
	d.sched.Configure(decisions(cfg))
	d.mu.Unlock()
	d.log.Info("configuration read again", "generation", cfg.Generation)
}

// requested takes a restore request.
func (d *driver) requested(vip netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over {
		return errors.New("the scheduler is being stopped; ask again")
	}
	if err := d.sched.Request(time.Now(), vip); err != nil {
		return err
	}
	d.step()
	// What is known may be older than the request.
	for _, n := range d.nodes {
		n.kick()
	}
	return nil
}

// step begins what is to be done now. Called with the lock held.
func (d *driver) step() {
	if d.over {
		return
	}
	actions, notes := d.sched.Step(time.Now())
	for _, n := range notes {
		level := slog.LevelInfo
		if n.Warn {
			level = slog.LevelWarn
		}
		var attrs []any
		if n.App != "" {
			attrs = append(attrs, "app", n.App)
		}
		if n.Node != "" {
			attrs = append(attrs, "node", n.Node)
		}
		d.log.Log(context.Background(), level, n.Text, attrs...)
	}
	for _, a := range actions {
		d.begin(a)
	}
}
