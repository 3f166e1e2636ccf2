package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A file that is being written is read again until it is whole, one that is old
// and bad is not, and nobody waits for ever.
func TestSettled(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "apps"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "apps", "redis.toml")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	bad := &Config{AppFaults: map[string]Faults{"redis": nil}}
	good := &Config{}
	for _, c := range []struct {
		name  string
		age   time.Duration
		bad   int // readings that find a fault
		reads int
		good  bool
	}{
		{"whole", 0, 0, 1, true},
		{"being written", 0, 4, 5, true},
		{"of a server whose clock is ahead", -time.Second, 4, 5, true},
		{"old and bad", time.Hour, 100, 1, false},
		{"written again and again", 0, 100, 31, false},
	} {
		now := time.Now()
		reads := 0
		sleep := func(d time.Duration) { now = now.Add(d) }
		got, err := settled(dir, func() time.Time { return now }, sleep, func() (*Config, error) {
			if err := os.Chtimes(path, now, now.Add(-c.age)); err != nil {
				t.Fatal(err)
			}
			if reads++; reads <= c.bad {
				return bad, nil
			}
			return good, nil
		})
		if err != nil || (got == good) != c.good || reads != c.reads {
			t.Errorf("%s: %v, %v after %d readings, want %v after %d", c.name, got == good, err, reads, c.good, c.reads)
		}
	}
	broken := errors.New("broken")
	if _, err := settled(dir, time.Now, func(time.Duration) { _ = os.Chtimes(path, time.Unix(0, 0), time.Unix(0, 0)) },
		func() (*Config, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("%v, want the fault itself", err)
	}
}

func TestKeepOld(t *testing.T) {
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	was := &App{Name: "redis", VIPs: []netip.Addr{one}}
	old := &Config{Apps: map[string]*App{"redis": was, "gone": {}, "moved": {VIPs: []netip.Addr{two}}}}
	c := &Config{Apps: map[string]*App{"heir": {VIPs: []netip.Addr{two}}}, AppFaults: map[string]Faults{"redis": nil, "new": nil, "moved": nil}}
	if kept := c.KeepOld(old); len(kept) != 1 || c.Apps["redis"] != was || len(c.Apps) != 2 || len(c.AppFaults) != 2 {
		t.Errorf("kept %v: %v, faults %v", kept, c.Apps, c.AppFaults)
	}
}
