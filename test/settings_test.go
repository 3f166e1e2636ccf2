package test

import (
	"testing"
	"time"
)

// everywhere are the tests that must pass wherever the application runs and
// whatever the filter has seen of its connections.
var everywhere = []struct {
	name string
	test func(*testing.T)
}{
	{"KeepaliveStrict", keepaliveStrict}, {"BulkWriters", TestBulkWriters}, // of the holds the strict one
	{"SnapshotUnderTraffic", TestSnapshotUnderTraffic}, {"SnapshotWithLoss", TestSnapshotWithLoss},
	{"NginxKeepalive", TestNginxKeepalive}, {"SmallSegmentChecksums", TestSmallSegmentChecksums},
	{"DrainTimeoutAborts", TestDrainTimeoutAborts}, {"StartFails", TestStartFails},
	{"FilterKilledConnected", TestFilterKilledConnected}, {"FilterKilledAway", TestFilterKilledAway},
	{"SynToOtherPort", TestSynToOtherPort}, {"NewConnectionWakes", TestNewConnectionWakes},
	{"ClientClosesWhileHeld", TestClientClosesWhileHeld}, {"ClientResetsWhileHeld", TestClientResetsWhileHeld},
	{"MalformedPackets", TestMalformedPackets}, {"RulesFlushed", TestRulesFlushed},
	{"SetsFlushed", TestSetsFlushed},
	{"FilterCrash", func(t *testing.T) { filterCrash(t, gated(), 500*time.Millisecond) }},
	{"FilterTerminated", TestFilterTerminated}, {"Reboot", TestReboot}, {"Adopted", TestAdopted},
	{"OutgoingPool", outgoingPool}, {"Heartbeats", heartbeats}, {"Spool", spool},
}

// onNode are those of the application's place on the node itself.
var onNode = []struct {
	name string
	test func(*testing.T)
}{{"ConntrackInvalidDrop", TestConntrackInvalidDrop}}

// with runs f with the setting that change makes, and holds of a few seconds.
func with(t *testing.T, change func(), f func(*testing.T)) {
	t.Helper()
	long, was, place, old := *holdFlag, vip, behindNode, adopted
	defer func() { *holdFlag, vip, behindNode, adopted = long, was, place, old }()
	*holdFlag = strictHold
	change()
	f(t)
}

func runEverywhere(t *testing.T) {
	for _, c := range everywhere {
		t.Run(c.name, c.test)
	}
}

func runOnNode(t *testing.T) {
	for _, c := range onNode {
		t.Run(c.name, c.test)
	}
}

// TestIPv6 does over IPv6 what the other tests do over IPv4.
func TestIPv6(t *testing.T) {
	with(t, func() { vip = vip6 }, func(t *testing.T) {
		runEverywhere(t)
		runOnNode(t)
		t.Run("DualStack", dualStack)
		t.Run("ExtensionHeaders", extensionHeaders)
	})
}

// TestBehind does it with applications in network namespaces of their own.
func TestBehind(t *testing.T) {
	with(t, func() { behindNode = true }, func(t *testing.T) {
		runEverywhere(t)
		t.Run("Conntrack", behindConntrack)
	})
}

// TestBehindIPv6 does both.
func TestBehindIPv6(t *testing.T) {
	with(t, func() { vip, behindNode = vip6, true }, func(t *testing.T) {
		runEverywhere(t)
		t.Run("Conntrack", behindConntrack)
		t.Run("DualStack", dualStack)
	})
}

// TestAdoptedConnections does it with connections that are older than the
// filter.
func TestAdoptedConnections(t *testing.T) {
	with(t, func() { adopted = true }, func(t *testing.T) {
		runEverywhere(t)
		runOnNode(t)
	})
}
