package config

import (
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// youngFile is how long after its last change a file of the shared directory
	// may still be in the middle of being written by somebody.
	youngFile = 2 * time.Second
	// settleMost bounds the wait for it.
	settleMost  = 3 * time.Second
	settleEvery = 100 * time.Millisecond
)

// Reloaded is what Reload has read.
type Reloaded struct {
	*Config
	// Faults are those of the applications' files as they are now.
	Faults Faults
	// Kept names the applications that stay as they were for their faults.
	Kept []string
}

// Reload has a daemon read its configuration again with load, which is Load or
// LoadScheduler; old is the one in force. Another node, or an editor, may be
// writing a file just now: while a shared file is younger than two seconds it
// is read again until it has no fault and stands still, for three seconds at
// most. An application whose file has become bad stays as old has it.
//
// The error is load's, or says that cluster.toml or all applications are gone:
// that is rather a directory that is not mounted. The caller keeps old then.
func Reload(old *Config, load func() (*Config, error)) (*Reloaded, error) {
	return reload(old, load, time.Now, time.Sleep)
}

func reload(old *Config, load func() (*Config, error), now func() time.Time, sleep func(time.Duration)) (*Reloaded, error) {
	last := ""
	for until := now().Add(settleMost); ; sleep(settleEvery) {
		before, _ := look(old.SharedDir, now())
		c, err := load()
		if err == nil {
			err = old.gone(c)
		}
		after, young := look(old.SharedDir, now())
		whole := err == nil && len(c.AppFaults) == 0 && !old.lacks(c)
		still := whole && before == after && last == after
		if young && !still && now().Before(until) {
			last = after
			continue
		}
		if err != nil {
			return nil, err
		}
		r := &Reloaded{Config: c, Faults: c.AllFaults()}
		r.keep(old)
		return r, nil
	}
}

// look gives a text that is another one after any of the shared files has
// changed, and tells whether one did just now. Clocks of file servers differ:
// what seems to be of the near future counts too.
func look(sharedDir string, now time.Time) (state string, young bool) {
	var b strings.Builder
	note := func(fi fs.FileInfo) {
		fmt.Fprintln(&b, fi.Name(), fi.Size(), fi.ModTime().UnixNano())
		young = young || now.Sub(fi.ModTime()).Abs() < youngFile
	}
	apps := filepath.Join(sharedDir, "apps")
	for _, path := range []string{filepath.Join(sharedDir, "cluster.toml"), apps} {
		if fi, err := os.Stat(path); err == nil {
			note(fi)
		}
	}
	entries, _ := os.ReadDir(apps)
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && !fi.IsDir() && filepath.Ext(e.Name()) == ".toml" {
			note(fi)
		}
	}
	return b.String(), young
}

// gone refuses to take a shared directory that is empty for one without
// cluster.toml and applications.
func (c *Config) gone(now *Config) error {
	missing, what := "", ""
	switch {
	case c.hasCluster && !now.hasCluster:
		missing, what = "cluster.toml", "start the daemons anew if there is to be none"
	case c.hasApps && len(c.Apps) > 0 && !now.hasApps:
		missing, what = "apps", "make the directory if there is to be no application"
	default:
		return nil
	}
	return Faults{{File: filepath.Join(c.SharedDir, missing), Line: 1, Col: 1,
		Message: "is gone; put it back, see that the shared directory is mounted, or " + what}}
}

// lacks tells whether an application of c has no file now.
func (c *Config) lacks(now *Config) bool {
	for name := range c.Apps {
		if now.Apps[name] == nil && now.AppFaults[name] == nil {
			return true
		}
	}
	return false
}

// keep has applications whose file is bad now, or that another one's change
// made so, stay as old has them; but not one whose VIP a valid application has
// now.
func (r *Reloaded) keep(old *Config) {
	taken := map[netip.Addr]bool{}
	for _, app := range r.Apps {
		for _, v := range app.VIPs {
			taken[v] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.AppFaults)) {
		if app := old.Apps[name]; app != nil && !slices.ContainsFunc(app.VIPs, func(v netip.Addr) bool { return taken[v] }) {
			r.Apps[name] = app
			r.Kept = append(r.Kept, name)
			delete(r.AppFaults, name)
		}
	}
}
