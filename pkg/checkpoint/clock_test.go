package checkpoint

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// A clock that is set, forth or back, is not believed for a day; one that is
// slewed is.
func TestWallClock(t *testing.T) {
	begin := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for name, jump := range map[string]time.Duration{"forth": 365 * 24 * time.Hour, "back": -2 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			var c wallClock
			look := func(set, boot time.Duration, want bool) {
				t.Helper()
				if got := c.steady(begin.Add(boot+set), boot); got != want {
					t.Errorf("set by %v, %v after the boot: steady %v", set, boot, got)
				}
			}
			look(0, time.Minute, true)
			look(30*time.Second, time.Hour, true)
			look(jump, 2*time.Hour, false)
			look(jump, 25*time.Hour, false)
			look(jump, 26*time.Hour, true)
			look(0, 27*time.Hour, false) // and set right again
			look(0, 51*time.Hour, true)
		})
	}
}

// What would go for its age stays while the clock cannot be trusted; what goes for
// its number, and a node's own leftovers, go as ever.
func TestPruneWithoutClock(t *testing.T) {
	dir := t.TempDir()
	s := store{dir: dir}
	ids := []string{"20200101T000000Z-aaaaaa", "20200102T000000Z-bbbbbb", "20260101T000000Z-cccccc"}
	make := func() {
		for _, id := range append(ids, tempName("node-a", "x"), tempName("node-b", "x")) {
			try(t, os.MkdirAll(filepath.Join(dir, "redis", id), 0o700))
			try(t, os.WriteFile(filepath.Join(dir, "redis", id, "manifest.json"), nil, 0o600))
		}
		old := time.Now().Add(-48 * time.Hour)
		try(t, os.Chtimes(filepath.Join(dir, "redis", tempName("node-b", "x")), old, old))
	}
	left := func(now time.Time, keep int) (names []string) {
		t.Helper()
		make()
		try(t, s.prune("redis", ids[2], "node-a", config.Snapshots{Keep: keep, MaxAge: config.Duration(24 * time.Hour)}, now))
		list, err := os.ReadDir(filepath.Join(dir, "redis"))
		try(t, err)
		for _, e := range list {
			names = append(names, e.Name())
		}
		return names
	}
	if l := left(time.Time{}, 5); len(l) != 4 { // all but its own leftover
		t.Errorf("without a clock: %v", l)
	}
	if l := left(time.Time{}, 2); len(l) != 3 {
		t.Errorf("without a clock, two are kept: %v", l)
	}
	if l := left(time.Now(), 5); len(l) != 1 {
		t.Errorf("with a clock: %v", l)
	}
	// The clock has gone back: what is of the future is no older for it.
	if l := left(time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), 5); len(l) != 4 {
		t.Errorf("before all of them: %v", l)
	}
}
