package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// shared is a shared directory with a clock.
type shared struct {
	t    *testing.T
	dir  string
	node string
	now  time.Time
	step func() // what others do while the daemon waits
}

func newShared(t *testing.T) *shared {
	s := &shared{t: t, dir: filepath.Join(t.TempDir(), "shared"), now: time.Now()}
	s.node = filepath.Join(filepath.Dir(s.dir), "node.toml")
	s.file("../node.toml", "name = \"node-a\"\ninterface = \"eth0\"\n")
	s.file("cluster.toml", "[[node]]\nname = \"node-a\"\naddress = \"192.0.2.11\"\n")
	s.file("apps/redis.toml", app("redis", "192.0.2.100"))
	s.file("apps/nginx.toml", app("nginx", "192.0.2.101"))
	return s
}

func app(name, vip string) string {
	return fmt.Sprintf("name = %q\nvip = %q\ninclude_ports = [6379]\n[process]\nstart = [\"/bin/true\"]\n", name, vip)
}

// file writes one now, by the clock.
func (s *shared) file(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o644)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.touch()
}

func (s *shared) remove(name string) {
	s.t.Helper()
	if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
		s.t.Fatal(err)
	}
	s.touch()
}

// touch gives everything the clock's time.
func (s *shared) touch() {
	_ = filepath.Walk(s.dir, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Chtimes(path, s.now, s.now))
	})
}

// reload counts the readings.
func (s *shared) reload(old *Config) (r *Reloaded, reads int, err error) {
	load := func() (*Config, error) { reads++; return Load(s.dir, s.node) }
	r, err = reload(old, load, func() time.Time { return s.now }, func(d time.Duration) {
		s.now = s.now.Add(d)
		if s.step != nil {
			s.step()
		}
	})
	return r, reads, err
}

func (s *shared) load() *Config {
	s.t.Helper()
	c, err := Load(s.dir, s.node)
	if err != nil || len(c.Apps) != 2 {
		s.t.Fatal(c, err)
	}
	s.now = s.now.Add(time.Hour)
	return c
}

// A file that is being written is read again until it stands still.
func TestReloadWaits(t *testing.T) {
	text := app("redis", "192.0.2.100") + "[hibernate]\nafter = \"1h\"\n"
	for _, c := range []struct {
		name  string
		lines []int // of the file, at each step
		reads int
		after time.Duration
	}{
		{"whole", []int{7}, 2, time.Hour},
		{"half a table", []int{4, 5, 6, 7}, 5, time.Hour},
		{"half, but without a fault", []int{5, 7}, 3, time.Hour},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newShared(t)
			old := s.load()
			steps := c.lines
			s.step = func() {
				if len(steps) > 0 {
					s.file("apps/redis.toml", strings.Join(strings.SplitAfter(text, "\n")[:steps[0]], ""))
					steps = steps[1:]
				}
			}
			s.step()
			r, reads, err := s.reload(old)
			if err != nil || reads != c.reads || r.Apps["redis"] == nil || r.Apps["redis"].Hibernate.After.Std() != c.after || len(r.Kept) != 0 {
				t.Errorf("%+v after %d readings, %v", r, reads, err)
			}
		})
	}
}

// Old files are read once, and nobody is waited for longer than three seconds.
func TestReloadEnds(t *testing.T) {
	s := newShared(t)
	old := s.load()
	if _, reads, err := s.reload(old); err != nil || reads != 1 {
		t.Errorf("%d readings of old files, %v", reads, err)
	}
	s.step = func() { s.file("apps/redis.toml", "na") }
	s.step()
	began := s.now
	r, _, err := s.reload(old)
	if err != nil || s.now.Sub(began) != settleMost || !slices.Equal(r.Kept, []string{"redis"}) {
		t.Errorf("%+v after %s, %v", r, s.now.Sub(began), err)
	}
	// The clock of the file server is ahead.
	s.step = nil
	s.file("apps/redis.toml", app("redis", "192.0.2.100"))
	s.now = s.now.Add(-time.Second)
	if r, reads, err := s.reload(old); err != nil || reads != 2 || len(r.Kept) != 0 {
		t.Errorf("%+v after %d readings, %v", r, reads, err)
	}
}

// A file that is replaced is not there for a moment; one that is removed is.
func TestReloadVanished(t *testing.T) {
	s := newShared(t)
	old := s.load()
	s.remove("apps/redis.toml")
	steps := 0
	s.step = func() {
		if steps++; steps == 5 {
			s.file("apps/redis.toml", app("redis", "192.0.2.100"))
		}
	}
	if r, _, err := s.reload(old); err != nil || r.Apps["redis"] == nil {
		t.Errorf("%+v, %v", r, err)
	}
	s.step = nil
	s.remove("apps/redis.toml")
	if r, _, err := s.reload(old); err != nil || len(r.Apps) != 1 || len(r.Kept) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	// A share that is not mounted is an empty directory.
	s.remove("cluster.toml")
	if _, _, err := s.reload(old); err == nil || !strings.Contains(err.Error(), "cluster.toml:1:1: is gone; put it back") {
		t.Error(err)
	}
	alone := s.soloLoad()
	s.remove("apps")
	if _, _, err := s.reload(alone); err == nil || !strings.Contains(err.Error(), "apps:1:1: is gone") {
		t.Error(err)
	}
	s.file("apps/none.txt", "")
	if r, _, err := s.reload(alone); err != nil || len(r.Apps) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func (s *shared) soloLoad() *Config {
	s.t.Helper()
	c, err := Load(s.dir, s.node)
	if err != nil || len(c.Apps) != 1 {
		s.t.Fatal(c, err)
	}
	return c
}

// An application whose file is bad stays as it was.
func TestReloadKeeps(t *testing.T) {
	s := newShared(t)
	old := s.load()
	was := old.Apps["redis"]
	s.file("apps/redis.toml", "vip = 1\n")
	s.file("apps/new.toml", "vip = 1\n")
	s.now = s.now.Add(time.Hour)
	r, _, err := s.reload(old)
	if err != nil || !slices.Equal(r.Kept, []string{"redis"}) || r.Apps["redis"] != was || len(r.Apps) != 2 || len(r.AppFaults) != 1 || r.AppFaults["new"] == nil || len(r.Faults) < 2 {
		t.Errorf("%+v, %v", r, err)
	}
	// But not beside a valid one that has its VIP now.
	s.file("apps/new.toml", app("new", "192.0.2.100"))
	s.now = s.now.Add(time.Hour)
	r, _, err = s.reload(old)
	if err != nil || len(r.Kept) != 0 || r.Apps["redis"] != nil || r.Apps["new"] == nil || r.AppFaults["redis"] == nil {
		t.Errorf("%+v, %v", r, err)
	}
}
