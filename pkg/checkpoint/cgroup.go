package checkpoint

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroup is a cgroup v2 of one application (kernel
// Documentation/admin-guide/cgroup-v2.rst, "Core Interface Files"). It stands
// at the top of the hierarchy, not below the agent's, so that stopping the
// agent's service leaves the application alone.
type cgroup string

// cgroupParent names the directory that holds the applications' cgroups.
const cgroupParent = "nfconnfilter"

// cgroup2Mount finds where the unified hierarchy is mounted, "" if nowhere.
func cgroup2Mount() string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// proc_pid_mountinfo(5): optional fields end with a lone hyphen.
		before, after, ok := strings.Cut(sc.Text(), " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			return fields[4]
		}
	}
	return ""
}

// ownCgroup gives the cgroup of a process where that is one of the application's: CRIU
// puts back what it restores. "": it is none.
func ownCgroup(app string, pid int) cgroup {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	root := cgroup2Mount()
	if err != nil || root == "" {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::") // cgroup v2 (cgroups(7))
		if ok && filepath.Dir(path) == "/"+cgroupParent && strings.HasPrefix(filepath.Base(path), app+".") {
			return cgroup(filepath.Join(root, path))
		}
	}
	return ""
}

// newCgroup makes an empty cgroup that can freeze.
func newCgroup(app, suffix string) (cgroup, error) {
	root := cgroup2Mount()
	if root == "" {
		return "", errors.New("cgroup v2 is not mounted")
	}
	dir := filepath.Join(root, cgroupParent, app+"."+suffix)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	c := cgroup(dir)
	if _, err := os.Stat(filepath.Join(dir, "cgroup.freeze")); err != nil {
		c.remove()
		return "", errors.New("cgroup v2 has no freezer here")
	}
	return c, nil
}

func (c cgroup) write(file, value string) error {
	return os.WriteFile(filepath.Join(string(c), file), []byte(value), 0)
}

// event reads one key of cgroup.events. A removed cgroup has no events.
func (c cgroup) event(key string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(string(c), "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) == 2 && string(f[0]) == key {
			return string(f[1]) == "1", nil
		}
	}
	return false, nil
}

// members lists its processes, those of sub-cgroups too.
func (c cgroup) members() []procStat {
	var out []procStat
	// A directory that vanishes meanwhile holds no process.
	_ = filepath.WalkDir(string(c), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		b, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for _, f := range bytes.Fields(b) {
			if pid, err := strconv.Atoi(string(f)); err == nil && pid > 1 && pid != os.Getpid() {
				if s, err := readStat(pid); err == nil && !s.gone() {
					out = append(out, s)
				}
			}
		}
		return nil
	})
	return out
}

// freeze stops every process and waits until they stand still.
func (c cgroup) freeze(ctx context.Context) error {
	if err := c.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) { return c.event("frozen") })
	if err != nil {
		return fmt.Errorf("cgroup %s did not freeze: %w", c, err)
	}
	return nil
}

func (c cgroup) thaw() error {
	err := c.write("cgroup.freeze", "0")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// remove deletes the cgroup; it stays while a process is in it.
func (c cgroup) remove() {
	var dirs []string
	_ = filepath.WalkDir(string(c), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		_ = os.Remove(dirs[i])
	}
	// Shared with other applications: goes when it is empty.
	_ = os.Remove(filepath.Dir(string(c)))
}

// Every wait for a condition of the machine looks again after pollFirst,
// then more and more seldom up to pollMost.
const (
	pollFirst = time.Millisecond
	pollMost  = 20 * time.Millisecond
)

// poll calls ready until it is true, fails, or ctx ends (its cause is
// returned). Between two looks it waits first, then half as long again each
// time, up to most, but never shorter than a look took.
func poll(ctx context.Context, first, most time.Duration, ready func() (bool, error)) error {
	t := time.NewTimer(0)
	defer t.Stop()
	<-t.C
	for wait := first; ; wait = min(wait*3/2, most) {
		began := time.Now()
		ok, err := ready()
		if err != nil || ok {
			return err
		}
		t.Reset(max(wait, time.Since(began)))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}
