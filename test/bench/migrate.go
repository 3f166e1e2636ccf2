package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// migrateSize is a number of connections and what is asked of a migration, in ms.
type migrateSize struct {
	conns         int
	back, silence float64
}

var migrateSizes = []migrateSize{
	{conns: 1000, back: 150, silence: 500},
	{conns: 10000, back: 1500, silence: 500},
}

// migrations measures, with that many Redis clients on two nodes: how long it
// takes until their connections are re-established and open again, beyond what
// the stop and the start of Redis take, and how long a remote is without an answer.
func migrations(bin string, rounds int) error {
	var errs []error
	for _, size := range migrateSizes {
		errs = append(errs, size.measure(bin, rounds))
	}
	return errors.Join(errs...)
}

func (s migrateSize) measure(bin string, rounds int) (err error) {
	server := harness.Redis("redis", vip)
	for i, a := range server.Start {
		if a == "--maxclients" {
			server.Start[i+1] = strconv.Itoa(s.conns + probeConns + 1000)
		}
	}
	c, err := harness.NewCluster(harness.ClusterOptions{Name: "move", Bin: bin, Apps: []harness.App{server}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.Up(); err != nil {
		return fmt.Errorf("%w\n%s", err, c.Logs())
	}
	addr := net.JoinHostPort(vip, "6379")
	mix := make([]clients.KeepAlive, 10)
	mix[0] = clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 20}
	all, err := clients.OpenLoad(c.Dial, addr, 0, s.conns-probeConns, mix...)
	if err != nil {
		return err
	}
	defer all.Close()
	p, err := newProber(c.Net.Client(), c.Dial, addr)
	if p != nil {
		defer p.close()
	}
	if err != nil {
		return err
	}
	fmt.Printf("%d connections moved to the other node, ms\n  round  freeze and drain  stop  hand over  start  re-establish  open  of these the connections' own  without an answer\n", s.conns)
	var backs, silences []float64
	for i := range rounds {
		if err := clients.Summary(all.Round(time.Minute)); err != nil {
			return err
		}
		var m harness.Migration
		gap, err := p.during(func() (err error) {
			m, err = c.Migrate("redis", i%2, 1-i%2)
			return err
		})
		if err != nil {
			return fmt.Errorf("%w\n%s", err, c.Logs())
		}
		back := m.Sum("re-establish", "open")
		silent := float64(gap-probeEvery) / float64(time.Millisecond)
		backs, silences = append(backs, back), append(silences, silent)
		fmt.Printf("  %5d %17.1f %5.1f %10.1f %6.1f %13.1f %5.1f %30.1f %18.1f\n", i+1, m.Sum("freeze", "drain"), m.Sum("stop"), m.Sum("hand over"),
			m.Sum("start"), m.Sum("re-establish"), m.Sum("open"), back, silent)
	}
	if err := clients.Summary(all.Round(time.Minute)); err != nil {
		return err
	}
	return errors.Join(
		judge("re-establishing and opening after a migration", s.conns, backs, s.back),
		judge("the longest time without an answer", s.conns, silences, s.silence))
}
