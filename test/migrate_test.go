package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// talk has the clients talk until the test has ended, or until the function that
// it returns, which tells what went wrong.
func talk(t *testing.T, load *clients.Load, pause time.Duration) (talk *clients.Talk, stop func() error) {
	talk = load.Talk(pause, reply)
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			load.Close() // so that a failure ends soon
			talk.Stop()
		}
	})
	return talk, func() error {
		stopped = true
		return clients.Summary(talk.Stop())
	}
}

// everybody waits until every client has had so many replies from now on, or
// one has failed.
func everybody(t *testing.T, talk *clients.Talk, more int) {
	t.Helper()
	before := talk.Replies()
	must(t, harness.Wait(3*reply, "every client is answered", func() bool {
		select {
		case <-talk.Failed():
			return true
		default:
		}
		for i, n := range talk.Replies() {
			if n < before[i]+more {
				return false
			}
		}
		return true
	}))
}

// thereAndBack migrates an application from the first node to the second and
// back, so many times, while the clients talk: each migration waits until every
// client has been answered since the one before.
func thereAndBack(t *testing.T, c *harness.Cluster, load *clients.Load, times int, pause time.Duration) {
	t.Helper()
	talk, stop := talk(t, load, pause)
	for i := range 2 * times {
		everybody(t, talk, 2)
		talk.Commands()
		from, to := i%2, 1-i%2
		begin := time.Now()
		m, err := c.Migrate("redis", from, to)
		took := time.Since(begin)
		must(t, err)
		if m.From != c.Nodes[from].Name() || m.To != c.Nodes[to].Name() {
			t.Fatalf("it says %+v", m)
		}
		n, slowest := talk.Commands()
		t.Logf("migration %d to %s: %v, meanwhile %d replies, the slowest after %v;%v",
			i+1, m.To, took.Round(time.Millisecond), n, slowest.Round(time.Millisecond), phases(m))
	}
	everybody(t, talk, 2)
	must(t, stop())
}

func phases(m harness.Migration) string {
	s := ""
	for _, p := range m.Phases {
		s += fmt.Sprintf(" %s %.0f", p.Name, p.MS)
	}
	return s + " ms"
}

// TestMigrateRedis: 1,000 clients that keep sending commands, one at a time each,
// while their server moves to the other node and back ten times.
func TestMigrateRedis(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "redis", Plaintext: true}, 1000)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	thereAndBack(t, c, load, 10, 200*time.Millisecond)
	node, err := c.Settled("redis", vip, reply)
	must(t, err)
	if node != 0 {
		t.Errorf("it runs on node %d after as many moves back as there", node)
	}
	unnoticed(20)
}

// TestMigrateRedisImpaired is the same over a link that loses 2 % of the
// packets and takes 20 ms, each way.
func TestMigrateRedisImpaired(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "lossy", Plaintext: true, Cable: true, Seed: 2}, 1000)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	c.Net.Link().Impair(testnet.Impairment{Loss: 0.02, Delay: 20 * time.Millisecond})
	thereAndBack(t, c, load, 10, 300*time.Millisecond)
	forth, back := c.Net.Link().Stats()
	t.Logf("the link: %+v and %+v", forth, back)
	if forth.Lost < 1000 || back.Lost < 1000 {
		t.Errorf("too little was lost: %+v, %+v", forth, back)
	}
	_, err := c.Settled("redis", vip, reply)
	must(t, err)
	unnoticed(20)
}
