package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// newCluster makes a cluster that is removed with the test; when the test has
// failed, the logs are shown.
func newCluster(t *testing.T, o harness.ClusterOptions) *harness.Cluster {
	t.Helper()
	testnet.RequireRoot(t)
	if o.Name == "" {
		o.Name = "c"
	}
	o.Bin = binDir
	c, err := harness.NewCluster(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		showLogs(t, c.Logs)
		if err := c.Close(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return c
}

// clusterUp is a cluster with a running Redis on its first node, and clients
// that have each exchanged four commands.
func clusterUp(t *testing.T, o harness.ClusterOptions, n int, mix ...clients.KeepAlive) (*harness.Cluster, *clients.Load) {
	t.Helper()
	if len(o.Apps) == 0 {
		o.Apps = []harness.App{harness.Redis("redis", vip)}
	}
	c := newCluster(t, o)
	must(t, c.Up())
	return c, clusterClients(t, c, n, mix...)
}

func clusterClients(t *testing.T, c *harness.Cluster, n int, mix ...clients.KeepAlive) *clients.Load {
	t.Helper()
	load, err := clients.OpenLoad(c.Dial, at(6379), nextClient, n, mix...)
	must(t, err)
	nextClient += n
	t.Cleanup(load.Close)
	rounds(t, load, 4)
	return load
}

// oneSpeaker names every place in a capture of the client's port of the switch
// where the VIP's segments come from another node than before; that is right so
// many times, or fewer by an even number down to least: a move that is taken
// back may be over before the other node had anything to say.
func oneSpeaker(vip string, packets []gopacket.Packet, least, moves int) error {
	var last, changes []string
	for i, p := range packets {
		eth, _ := p.LinkLayer().(*layers.Ethernet)
		if eth == nil || p.NetworkLayer() == nil || p.NetworkLayer().NetworkFlow().Src().String() != vip {
			continue
		}
		mac := eth.SrcMAC.String()
		if len(last) > 0 && last[0] != mac {
			changes = append(changes, fmt.Sprintf("at segment %d from %s to %s: %v", i, last[0], mac, p))
		}
		last = []string{mac}
	}
	if len(last) == 0 {
		return fmt.Errorf("nothing from %s in %d packets", vip, len(packets))
	}
	if n := len(changes); n < least || n > moves || (moves-n)%2 != 0 {
		return fmt.Errorf("%s spoke from another node %d times, want %d (at least %d): %v", vip, n, moves, least, changes)
	}
	return nil
}

// watchCluster captures what passes the client's port of the switch; what it
// returns ends the capture and fails the test for every segment that a client
// could notice, and unless exactly one node spoke at a time, with so many moves.
func watchCluster(t *testing.T, c *harness.Cluster, vip string) func(moves int) {
	t.Helper()
	end := watchMoves(t, c, vip)
	return func(moves int) {
		t.Helper()
		end(moves, moves)
	}
}

// watchMoves is watchCluster for a number of moves of which some may pass unseen,
// see oneSpeaker.
func watchMoves(t *testing.T, c *harness.Cluster, vip string) func(least, moves int) {
	t.Helper()
	capture, err := c.Net.Switch().Capture("client", "tcp")
	must(t, err)
	saveCapture(t, c.Net.Switch())
	return func(least, moves int) {
		t.Helper()
		packets := capture.Stop()
		must(t, capture.Err())
		check(t, wireFaults(vip, packets))
		check(t, oneSpeaker(vip, packets, least, moves))
	}
}

// TestClusterHarness: a node of a cluster is a node like any other, and the
// client's link loses what it says.
func TestClusterHarness(t *testing.T) {
	c, load := clusterUp(t, harness.ClusterOptions{Name: "one", Cable: true, Seed: 1}, 20)
	unnoticed := watchCluster(t, c, vip)
	rounds(t, load, 1)
	n := c.Nodes[0]
	snapshot(t, n, "redis", "redis-server")
	c.Net.Link().Impair(testnet.Impairment{Loss: 0.02, Delay: 5 * time.Millisecond})
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 20)
	forth, back := c.Net.Link().Stats()
	if forth.Lost == 0 || back.Lost == 0 {
		t.Errorf("nothing was lost: %+v, %+v", forth, back)
	}
	if node, err := c.Settled("redis", vip, reply); err != nil || node != 0 {
		t.Errorf("it runs on node %d, %v", node, err)
	}
	unnoticed(0)
}
