package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/google/gopacket"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// holdSize is a number of connections and what is asked of it, in ms; 0: nothing.
type holdSize struct {
	conns                        int
	snapshot, reconnect, restart float64
}

var holdSizes = []holdSize{
	{conns: 1000, snapshot: 20, reconnect: 100},
	{conns: 10000, reconnect: 1500, restart: 1000},
}

// phase of an operation, as ckptctl -o json tells it.
type phase struct {
	Name     string  `json:"name"`
	MS       float64 `json:"ms"`
	FilterMS float64 `json:"filter_ms"`
}

// holds measures, with that many Redis clients: what the filter adds to a
// snapshot, how fast connections are re-established, and how long a filter
// that is killed while it holds them does not answer.
func holds(bin string, rounds int) error {
	var errs []error
	for _, size := range holdSizes {
		errs = append(errs, size.measure(bin, rounds))
	}
	return errors.Join(errs...)
}

func (s holdSize) measure(bin string, rounds int) (err error) {
	server := harness.Redis("redis", vip)
	for i, a := range server.Start {
		if a == "--maxclients" {
			server.Start[i+1] = strconv.Itoa(s.conns + 1000)
		}
	}
	n, err := harness.New(harness.Options{Name: "hold", Bin: bin, Apps: []harness.App{server}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := n.Up(); err != nil {
		return fmt.Errorf("%w\n%s", err, n.Logs())
	}
	// One in ten asks every second whether its server lives.
	mix := make([]clients.KeepAlive, 10)
	mix[0] = clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 20}
	all, err := clients.OpenLoad(n.Dial, net.JoinHostPort(vip, "6379"), 0, s.conns, mix...)
	if err != nil {
		return err
	}
	defer all.Close()
	fmt.Printf("%d connections held, ms\n  round  snapshot  of it filter  restore  of it re-establishing  filter silent\n", s.conns)
	var shares, backs, silences []float64
	for i := range rounds {
		if err := clients.Summary(all.Round(time.Minute)); err != nil {
			return err
		}
		down, err := operate(n, "snapshot")
		if err != nil {
			return err
		}
		silence := 0.0
		if s.restart > 0 {
			if silence, err = silent(n); err != nil {
				return err
			}
		}
		up, err := operate(n, "restore")
		if err != nil {
			return err
		}
		share, back := filterShare(down), sum(up, "reconnect", "open")
		shares, backs, silences = append(shares, share), append(backs, back), append(silences, silence)
		fmt.Printf("  %5d %9.1f %13.1f %8.1f %22.1f %14.1f\n", i+1, sum(down), share, sum(up), back, silence)
	}
	if err := clients.Summary(all.Round(time.Minute)); err != nil {
		return err
	}
	return errors.Join(
		judge("the filter's share of a snapshot", s.conns, shares, s.snapshot),
		judge("re-establishing", s.conns, backs, s.reconnect),
		judge("a killed filter's silence", s.conns, silences, s.restart))
}

// judge compares the median of figures with a target in ms, 0: none.
func judge(what string, conns int, figures []float64, target float64) error {
	m := median(figures)
	if target == 0 {
		return nil
	}
	fmt.Printf("  %s, median %.1f ms, target %.0f ms\n", what, m, target)
	if m > target {
		return fmt.Errorf("%s with %d connections: median %.1f ms, target %.0f ms", what, conns, m, target)
	}
	return nil
}

// operate runs snapshot or restore and returns its phases.
func operate(n *harness.Node, command string) ([]phase, error) {
	r := n.Ctl("-o", "json", command, "redis")
	if err := r.Err(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, n.Logs())
	}
	if os.Getenv("NFCF_BENCH_PHASES") != "" {
		fmt.Print("        ", r.Stdout)
	}
	var reply struct {
		Phases []phase `json:"phases"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &reply); err != nil || len(reply.Phases) == 0 {
		return nil, fmt.Errorf("%s says %q: %w", command, r.Stdout, err)
	}
	return reply.Phases, nil
}

// sum adds up the phases of these names, of none: all.
func sum(phases []phase, names ...string) (ms float64) {
	for _, p := range phases {
		if len(names) == 0 || slices.Contains(names, p.Name) {
			ms += p.MS
		}
	}
	return ms
}

// filterShare is the time in which a snapshot waited for the filter, the drain
// aside: there it waits for applications and remotes to become silent, and asks
// the filter now and then.
func filterShare(phases []phase) (ms float64) {
	for _, p := range phases {
		if p.Name != "drain" {
			ms += p.FilterMS
		}
	}
	return ms
}

// silent kills the filter, starts it again and returns how long nothing came
// from the VIP.
func silent(n *harness.Node) (ms float64, err error) {
	n.Filter.Kill()
	killed := time.Now()
	capture, err := n.Net.Client().Capture(testnet.Iface, "tcp in src "+vip)
	if err != nil {
		return 0, err
	}
	defer capture.Stop()
	if err := n.StartFilter(); err != nil {
		return 0, err
	}
	first, err := capture.WaitFor(30*time.Second, func(gopacket.Packet) bool { return true })
	if err != nil {
		return 0, fmt.Errorf("no held connection was answered after the filter came back: %w", err)
	}
	return float64(first.Metadata().Timestamp.Sub(killed)) / float64(time.Millisecond), nil
}
