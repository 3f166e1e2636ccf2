// Command demo shows the main job of this project on one machine: a Redis
// server is stopped, its clients stay connected, and it comes back when one of
// them speaks; then it moves to another node while all of them speak. It needs root for its network namespaces and touches nothing
// outside of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const (
	vip     = "10.77.0.100"
	app     = "redis"
	comm    = "redis-server"
	replyIn = 20 * time.Second
)

func main() {
	bin := flag.String("bin", "bin", "`directory` that holds nfconnfilter and ckptctl")
	n := flag.Int("clients", 200, "number of clients")
	hold := flag.Duration("hold", 15*time.Second, "how long the application stays away")
	keep := flag.Bool("logs", false, "print the daemons' logs at the end")
	flag.Parse()
	if flag.NArg() != 0 || *n < 1 {
		flag.Usage()
		os.Exit(2)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: it needs root to make network namespaces; run make demo, which asks sudo")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	dir, err := filepath.Abs(*bin)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	d := &demo{out: os.Stdout, bin: dir, clients: *n, hold: *hold, logs: *keep}
	if err := d.run(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; everything was cleaned up")
		}
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is one demonstration.
type demo struct {
	out     io.Writer
	bin     string
	clients int
	hold    time.Duration
	logs    bool

	start   time.Time
	cluster *harness.Cluster
	node    *harness.Node // that has the application
	load    *clients.Load
}

// say prints a line of the timeline.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%7.2f s  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	if err := harness.Sweep(); err != nil {
		return fmt.Errorf("clean-up after an earlier run: %w", err)
	}
	d.start = time.Now()
	fmt.Fprintf(d.out, "%d clients of a Redis server stay connected while the server does not exist.\n\n", d.clients)
	defer func() {
		if d.load != nil {
			d.load.Close()
		}
		if d.cluster == nil {
			return
		}
		if d.logs || err != nil && ctx.Err() == nil {
			fmt.Fprint(os.Stderr, "\n", d.cluster.Logs())
		}
		if cerr := d.cluster.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("clean-up: %w", cerr))
		}
	}()
	for _, step := range []func(context.Context) error{d.setUp, d.snapshot, d.away, d.wake, d.move} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.result()
}

// setUp starts everything and lets the clients work for a while.
func (d *demo) setUp(ctx context.Context) (err error) {
	d.cluster, err = harness.NewCluster(harness.ClusterOptions{Name: "demo", Bin: d.bin, Apps: []harness.App{harness.Redis(app, vip)}})
	if err != nil {
		return err
	}
	d.node = d.cluster.Nodes[0]
	d.say("network namespaces on one switch: two nodes (%s and %s) and the clients (%s)",
		d.node.Net.NodeAddr(), d.cluster.Nodes[1].Net.NodeAddr(), d.node.Net.ClientAddr())
	if err := d.cluster.Up(); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\nfirst act: the server goes away, and comes back when a client speaks\n\n")
	pids, err := d.node.Processes(comm)
	if err != nil {
		return err
	}
	d.say("on node-a: nfconnfilter (pid %d), ckptctl agent (pid %d), %s on %s:6379 (pid %v)",
		d.node.Filter.PID(), d.node.Agent.PID(), comm, vip, pids)
	if d.load, err = clients.OpenLoad(d.cluster.Dial, vip+":6379", 0, d.clients); err != nil {
		return err
	}
	// An interrupt ends what waits for a reply.
	context.AfterFunc(ctx, d.load.Close)
	d.say("%d clients are connected; TCP keepalive %v", d.clients, joinSettings())
	for range 8 {
		if err := clients.Summary(d.load.Round(replyIn)); err != nil {
			return err
		}
	}
	d.say("they have sent %d commands (INCR, SET, GET, ECHO), every reply was right", 8*d.clients)
	return nil
}

func joinSettings() string {
	s := ""
	for i, k := range clients.Mixed {
		if i > 0 {
			s += " | "
		}
		s += k.String()
	}
	return s
}

// snapshot takes the server away.
func (d *demo) snapshot(context.Context) error {
	d.say("ckptctl snapshot %s ...", app)
	start := time.Now()
	id, err := d.node.Snapshot(app)
	if err != nil {
		return err
	}
	d.say("... done in %.0f ms, snapshot %s: connections frozen and drained, Redis saved, process stopped",
		ms(time.Since(start)), id)
	return nil
}

// away shows, each second, that the process is gone and the clients are not.
func (d *demo) away(ctx context.Context) error {
	probes, err := d.node.Net.Client().Capture(testnet.Iface, "tcp out dst "+vip+" not syn not data")
	if err != nil {
		return err
	}
	defer probes.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for range int(d.hold / time.Second) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		pids, err := d.node.Processes(comm)
		if err != nil {
			return err
		}
		process := "no " + comm + " process"
		if len(pids) > 0 {
			process = fmt.Sprintf("%s RUNS as %v", comm, pids)
		}
		lost := d.load.Idle()
		d.say("  %s | %d of %d clients connected | %d keepalive probes sent so far",
			process, d.clients-len(lost), d.clients, len(probes.Packets()))
		if len(pids) > 0 {
			return errors.New("the server was to be away")
		}
	}
	return nil
}

// wake lets one client speak.
func (d *demo) wake(context.Context) error {
	c := d.load.Clients[d.clients/2]
	d.say("client %d sends one command, as if nothing had happened ...", c.ID)
	start := time.Now()
	if err := c.Command(replyIn); err != nil {
		return err
	}
	took := time.Since(start)
	pids, err := d.node.Processes(comm)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return fmt.Errorf("a reply came, but there is no %s", comm)
	}
	d.say("... and has the right reply after %.1f ms: woken by its packet, %s runs again (pid %v)", ms(took), comm, pids)

	var all []time.Duration
	for _, c := range d.load.Clients {
		start := time.Now()
		if c.Command(replyIn) == nil {
			all = append(all, time.Since(start))
		}
	}
	if len(all) > 0 {
		slices.Sort(all)
		d.say("then every client sends a command, one after the other: median %.2f ms, slowest %.2f ms",
			ms(all[len(all)/2]), ms(all[len(all)-1]))
	}
	d.load.Round(replyIn)
	d.say("and once more, all at once")
	fmt.Fprintf(d.out, "\nwake-up time, from the command to its reply, server start included: %.1f ms\n", ms(took))
	return nil
}

// move takes the server to the other node while all clients speak.
func (d *demo) move(ctx context.Context) error {
	fmt.Fprintf(d.out, "\nsecond act: the server moves to the other node\n\n")
	d.say("every client sends one command after the other, without a pause ...")
	talk := startTalk(d.load)
	defer talk.stop()
	if err := talk.until(ctx, d.clients); err != nil {
		return err
	}
	d.say("ckptctl migrate %s --to node-b ...", app)
	start := time.Now()
	m, err := d.cluster.Migrate(app, 0, 1)
	if err != nil {
		return err
	}
	took := time.Since(start)
	for _, p := range m.Phases {
		d.say("  %-12s %7.1f ms", p.Name, p.MS)
	}
	d.say("... done in %.0f ms; the clients speak on", ms(took))
	if err := talk.until(ctx, d.clients); err != nil {
		return err
	}
	talk.stop()
	pids := make([][]int, 2)
	for i, n := range d.cluster.Nodes {
		if pids[i], err = n.Processes(comm); err != nil {
			return err
		}
	}
	d.say("%s on node-a: %v, on node-b: %v", comm, pids[0], pids[1])
	if len(pids[0]) > 0 || len(pids[1]) == 0 {
		return errors.New("the server was to be on node-b alone")
	}
	d.node = d.cluster.Nodes[1]
	commands, slowest := talk.sum()
	d.say("%d commands meanwhile, every reply was right; the slowest took %.0f ms", commands, ms(slowest))
	fmt.Fprintln(d.out)
	return nil
}

// result is the last line: how many connections came through whole.
func (d *demo) result() error {
	lost := d.load.Idle() // a client that has failed once stays failed
	for _, err := range lost {
		fmt.Fprintln(d.out, "lost:", err)
	}
	whole := d.clients - len(lost)
	fmt.Fprintf(d.out, "%d of %d connections survived with every byte right\n", whole, d.clients)
	if whole != d.clients {
		return fmt.Errorf("%d connections were lost", len(lost))
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
