package checkpoint

import (
	"net/netip"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestMadeOf(t *testing.T) {
	for _, tc := range []struct {
		octets  uint64
		lengths []int
		n       int
		want    bool
	}{
		{0, nil, 1, true}, {1, nil, 9, false}, {6, []int{6}, 1, true}, {12, []int{6}, 1, false}, {12, []int{6}, 2, true},
		{7, []int{6}, 2, false}, {11, []int{6, 5}, 2, true}, {11, []int{6, 5}, 1, false}, {16, []int{6, 5}, 3, true},
		{1 << 63, []int{6}, 16, false}, {^uint64(0), []int{1}, 16, false},
	} {
		if got := madeOf(tc.octets, tc.lengths, tc.n); got != tc.want {
			t.Errorf("%d of at most %d of %v: %v", tc.octets, tc.n, tc.lengths, got)
		}
	}
}

// A meter is looked at once a second; each step says what has happened since,
// and whether it was activity.
func TestIdleMeter(t *testing.T) {
	beats := []config.Heartbeat{
		{Remote: netip.MustParsePrefix("198.51.100.0/24"), Match: []byte("PING\r\n"), Reply: []byte("PONG!\r\n")},
		{Remote: netip.MustParsePrefix("198.51.100.0/24"), Send: []byte("x"), Interval: config.Duration(time.Second)},
		{Remote: netip.MustParsePrefix("0.0.0.0/0"), Send: []byte("closed only"), OnlyClosed: true},
	}
	info := func(remote string) sockdiag.Socket {
		k := sock(remote, sockdiag.Established)
		k.Info = &sockdiag.TCPInfo{LastDataRecv: time.Minute, LastDataSent: 40 * time.Second}
		return k
	}
	beating, other := info("198.51.100.7:1000"), info("203.0.113.1:1000")
	socks := []sockdiag.Socket{beating, other}
	var opened uint64
	m := &idleMeter{}
	now := time.Unix(1000, 0)
	look := func() time.Duration {
		now = now.Add(time.Second)
		m.sample(now, beats, socks, opened)
		return m.at.Sub(m.last)
	}
	if got := look(); got != 40*time.Second {
		t.Fatalf("the first look believes the kernel: %v", got)
	}
	for _, step := range []struct {
		name   string
		do     func()
		active bool
	}{
		{"nothing", func() {}, false},
		{"a heartbeat is received", func() { beating.Info.BytesReceived += 6 }, false},
		{"and answered", func() { beating.Info.BytesAcked += 7 }, false},
		{"one that is being answered", func() { socks[0].SendQ = 7 }, false},
		{"and is through", func() { socks[0].SendQ = 0; beating.Info.BytesAcked += 7 }, false},
		{"one that was not read yet", func() { socks[0].RecvQ = 6 }, false},
		{"and is", func() { socks[0].RecvQ = 0; beating.Info.BytesReceived += 6 }, false},
		{"what it says by itself", func() { beating.Info.BytesAcked++ }, false},
		{"two heartbeats", func() { beating.Info.BytesReceived += 12 }, false},
		{"three in a second", func() { beating.Info.BytesReceived += 18 }, false},
		{"four", func() { beating.Info.BytesReceived += 24 }, true},
		{"another length", func() { beating.Info.BytesReceived += 5 }, true},
		{"another answer", func() { beating.Info.BytesAcked += 6 }, true},
		{"what only the filter says", func() { beating.Info.BytesAcked += 11 }, true},
		{"queued data", func() { socks[0].RecvQ = 100 }, true},
		{"read", func() { socks[0].RecvQ = 0 }, false},
		{"one octet of another remote", func() { other.Info.BytesReceived++ }, true},
		{"its heartbeat is none", func() { other.Info.BytesReceived += 6 }, true},
		{"octets to another remote", func() { other.Info.BytesAcked++ }, true},
		{"a new connection", func() { socks = append(socks, info("198.51.100.8:1")) }, true},
		{"it ends", func() { socks = socks[:2] }, false},
		{"it waits", func() { socks = append(socks, sock("198.51.100.8:1", sockdiag.TimeWait)) }, false},
		{"one came and went", func() { opened++ }, true},
		{"the filter is new", func() { opened = 0 }, true},
		{"its addresses are used again", func() { socks[1].Cookie[0]++ }, true},
		{"counters that begin anew", func() { other.Info.BytesReceived = 0 }, true},
	} {
		before := m.at.Sub(m.last)
		step.do()
		got := look()
		if want := before + time.Second; step.active && got != 0 || !step.active && got != want {
			t.Errorf("%s: idle for %v", step.name, got)
		}
	}
	// After a gap there may be more of them.
	now = now.Add(4 * time.Second)
	beating.Info.BytesReceived += 7 * 6
	if got := look(); got == 0 {
		t.Error("heartbeats of five seconds are activity")
	}
}

func TestIdleMeters(t *testing.T) {
	now := time.Unix(1000, 0)
	m := idleMeters{all: map[string]*idleMeter{}, now: func() time.Time { return now }}
	app := &config.App{Name: "redis"}
	st := &pb.AppStatus{Name: "redis", State: control.StateConnected}
	if got := m.idleMs(st); got != -1 {
		t.Errorf("never looked at: %d", got)
	}
	m.sample(app, st, nil)
	now = now.Add(3 * time.Second)
	m.sample(app, st, nil)
	if got := m.idleMs(st); got != 3000 {
		t.Errorf("idle for %d ms", got)
	}
	st = &pb.AppStatus{Name: "redis", State: control.StateRestored, SnapshotId: "a"}
	if got := m.idleMs(st); got != -1 {
		t.Errorf("restored, and not looked at yet: %d", got)
	}
	m.sample(app, st, nil)
	if got := m.idleMs(st); got != 0 {
		t.Errorf("restored just now: %d", got)
	}
	now = now.Add(idleStale + time.Second)
	if got := m.idleMs(st); got != -1 {
		t.Errorf("a look of long ago: %d", got)
	}
	m.sample(app, st, nil)
	m.forget([]string{"other"})
	if got := m.idleMs(st); got != -1 {
		t.Errorf("forgotten: %d", got)
	}
}
