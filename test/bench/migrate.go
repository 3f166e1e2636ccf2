package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// migrateSize is a number of connections and the limits for a migration of
// them, in ms.
type migrateSize struct {
	conns                 int
	reconnect, unanswered float64
}

var migrateSizes = []migrateSize{
	{conns: 1000, reconnect: 150, unanswered: 500},
	{conns: 10000, reconnect: 1500, unanswered: 500},
}

const (
	redisPort = 6379
	// alonePort is that of the same server started without anything else.
	alonePort = 6380
	// probedConns is how many connections a prober has.
	probedConns = 8
)

// figures of migrations, in ms.
type figures struct {
	reconnect, outage, alone, beyond, unanswered []float64
}

// migrations measures Redis with that many clients going to another node and
// back. Figures beyond their limits are shown as such, and are no failure.
func migrations(bin string, rounds int, only int) error {
	var errs []error
	for _, size := range migrateSizes {
		if only == 0 || only == size.conns {
			errs = append(errs, size.measure(bin, rounds))
		}
	}
	return errors.Join(errs...)
}

func (s migrateSize) measure(bin string, rounds int) (err error) {
	server := harness.Redis("redis", vip)
	setFlag(server.Start, "--maxclients", strconv.Itoa(s.conns+1000))
	c, err := harness.NewCluster(harness.ClusterOptions{Name: "move", Bin: bin, Apps: []harness.App{server}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for i := range c.Net.Nodes() {
		if err := unlimited(c.Net.Node(i)); err != nil {
			return err
		}
	}
	if err := c.Up(); err != nil {
		return fmt.Errorf("%w\n%s", err, c.Logs())
	}
	// One in ten asks every second whether its server lives.
	mix := make([]clients.KeepAlive, 10)
	mix[0] = clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 20}
	addr := net.JoinHostPort(vip, strconv.Itoa(redisPort))
	all, err := clients.OpenLoad(c.Dial, addr, 0, s.conns-probedConns, mix...)
	if err != nil {
		return err
	}
	defer all.Close()
	p, err := newProber(c.Net.Client(), netip.MustParseAddrPort(addr), probedConns)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := clients.Summary(all.Round(time.Minute)); err != nil {
		return err
	}
	quiet, err := p.longest(10 * time.Second)
	if err != nil {
		return err
	}
	fmt.Printf("%d connections migrated, ms; a probe is answered within %.1f ms before\n", s.conns, ms(quiet))
	fmt.Println("  round  re-establish + open  outage  stop + start alone  beyond  unanswered  load average")
	var f figures
	for i := range rounds {
		if err := f.round(c, p, server, i); err != nil {
			return fmt.Errorf("%w\n%s", err, c.Logs())
		}
		if err := clients.Summary(all.Round(time.Minute)); err != nil {
			return err
		}
	}
	limit("re-establish + open", f.reconnect, s.reconnect)
	limit("outage beyond stop + start", f.beyond, s.reconnect)
	limit("longest unanswered", f.unanswered, s.unanswered)
	return nil
}

// round is one migration, and a pure stop and start beside it.
func (f *figures) round(c *harness.Cluster, p *prober, server harness.App, i int) error {
	from, to := i%2, 1-i%2
	stop, start, err := alone(c, to, server)
	if err != nil {
		return err
	}
	p.reset()
	m, err := c.Migrate(server.Name, from, to)
	if err != nil {
		return err
	}
	gap, err := p.longest(time.Minute)
	if err != nil {
		return err
	}
	if os.Getenv("NFCF_BENCH_PHASES") != "" {
		fmt.Print("        ")
		for _, ph := range m.Phases {
			fmt.Printf(" %s %.1f (%.1f)", ph.Name, ph.MS, ph.FilterMS)
		}
		fmt.Println()
	}
	pure := ms(stop + start)
	outage := m.Sum("stop", "hand over", "start", "re-establish", "open")
	f.reconnect = append(f.reconnect, m.Sum("re-establish", "open"))
	f.outage, f.alone = append(f.outage, outage), append(f.alone, pure)
	f.beyond, f.unanswered = append(f.beyond, outage-pure), append(f.unanswered, ms(gap))
	fmt.Printf("  %5d %20.1f %7.1f %19.1f %7.1f %11.1f  %s\n", i+1, f.reconnect[i], outage, pure, f.beyond[i], ms(gap), loadAverage())
	return nil
}

// alone measures the same server as a process of its own on a node: from its
// end to its being gone, and from its start to its first connection.
func alone(c *harness.Cluster, node int, server harness.App) (stop, start time.Duration, err error) {
	ns := c.Net.Node(node)
	host := c.Nodes[node].Net.NodeAddr().String()
	args := slices.Clone(server.Start)
	for i, a := range args {
		if rest, ok := strings.CutPrefix(a, "@"); ok {
			args[i] = c.Path(rest)
		}
	}
	setFlag(args, "--bind", host)
	setFlag(args, "--port", strconv.Itoa(alonePort))
	cmd := ns.Command(args[0], args[1:]...)
	addr := net.JoinHostPort(host, strconv.Itoa(alonePort))
	err = ns.Do(func() error {
		begin := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		for {
			// This goroutine's thread is in the namespace, a dialer's might not be.
			ok, err := connects(addr)
			if start = time.Since(begin); ok || err != nil || start > 30*time.Second {
				return err
			}
			time.Sleep(200 * time.Microsecond)
		}
	})
	if cmd.Process == nil {
		return 0, 0, err
	}
	begin := time.Now()
	err = errors.Join(err, cmd.Process.Kill())
	_ = cmd.Wait() // it was killed
	stop = time.Since(begin)
	if start > 30*time.Second {
		err = errors.Join(err, fmt.Errorf("%s alone did not take a connection within %v", args[0], start))
	}
	return stop, start, err
}

// connects tells whether a server takes a connection at addr, from this thread.
func connects(addr string) (bool, error) {
	ap := netip.MustParseAddrPort(addr)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}) == nil, nil
}

// setFlag replaces the value behind a flag.
func setFlag(args []string, flag, value string) {
	if i := slices.Index(args, flag); i >= 0 && i+1 < len(args) {
		args[i+1] = value
	}
}

// limit shows median and worst of figures beside their limit.
func limit(what string, x []float64, most float64) {
	verdict := "within"
	switch {
	case median(x) > most:
		verdict = "BEYOND"
	case slices.Max(x) > most:
		verdict = "worst BEYOND"
	}
	fmt.Printf("  %-28s median %7.1f  worst %7.1f  limit %5.0f ms: %s\n", what, median(x), slices.Max(x), most, verdict)
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// loadAverage is the machine's over the last minute.
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}

func interfaceIndex(name string) (int, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	return ifi.Index, nil
}
