package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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

// LoadSettled is Load for a daemon that reads its configuration again: another
// node, or an editor, may be writing a file just now. What has faults is read
// again while a file of the shared directory is younger than two seconds, for
// three seconds at most.
func LoadSettled(sharedDir, nodeFile string) (*Config, error) {
	return settled(sharedDir, time.Now, time.Sleep, func() (*Config, error) { return Load(sharedDir, nodeFile) })
}

func settled(sharedDir string, now func() time.Time, sleep func(time.Duration), load func() (*Config, error)) (*Config, error) {
	for until := now().Add(settleMost); ; sleep(settleEvery) {
		c, err := load()
		if err == nil && len(c.AppFaults) == 0 || !young(sharedDir, now()) || !now().Before(until) {
			return c, err
		}
	}
}

// young tells whether a shared file was changed just now. Clocks of file
// servers differ: what seems to be of the near future counts too.
func young(sharedDir string, now time.Time) bool {
	found := false
	for _, dir := range []string{sharedDir, filepath.Join(sharedDir, "apps")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if fi, err := e.Info(); err == nil && !fi.IsDir() && filepath.Ext(e.Name()) == ".toml" {
				found = found || now.Sub(fi.ModTime()).Abs() < youngFile
			}
		}
	}
	return found
}

// KeepOld has applications whose file is bad now stay as old has them; it names
// them. One whose VIP a valid application has now is not kept.
func (c *Config) KeepOld(old *Config) (kept []string) {
	taken := map[netip.Addr]bool{}
	for _, app := range c.Apps {
		for _, v := range app.VIPs {
			taken[v] = true
		}
	}
	for name := range c.AppFaults {
		if app := old.Apps[name]; app != nil && !slices.ContainsFunc(app.VIPs, func(v netip.Addr) bool { return taken[v] }) {
			c.Apps[name] = app
			kept = append(kept, name)
		}
	}
	for _, name := range kept {
		delete(c.AppFaults, name)
	}
	return kept
}
