package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// inside lists the processes whose main thread is in the network namespace at
// path, this process itself excepted: one of its threads may be inside.
func inside(path string) ([]int, error) {
	var want syscall.Stat_t
	if err := syscall.Stat(path, &want); err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st syscall.Stat_t
		if syscall.Stat(d+"/ns/net", &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// killInside ends every process in a namespace of ours.
func killInside(path string) error {
	err := Wait(5*time.Second, "the processes in "+filepath.Base(path)+" are gone", func() bool {
		pids, err := inside(path)
		if err != nil {
			return true
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0
	})
	return err
}

// Processes lists the processes of the node whose name is comm.
func (n *Node) Processes(comm string) ([]int, error) {
	var pids, found []int
	for _, path := range n.spaces() {
		in, err := inside(path)
		if err != nil {
			return nil, err
		}
		pids = append(pids, in...)
	}
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// PID (COMM) STATE ...: a zombie is gone.
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		if open < 0 || end < 0 || string(stat[open+1:end]) != comm || strings.HasPrefix(string(stat[end+1:]), " Z") {
			continue
		}
		found = append(found, pid)
	}
	return found, nil
}

// Sweep ends the processes and removes the directories that runs left which
// were killed before their clean-up. Namespaces without an owner are removed
// by testnet when it makes the next one.
func Sweep() error {
	var errs []error
	spaces, _ := filepath.Glob("/run/netns/nfcf-*")
	for _, ns := range spaces {
		if orphan(ns) {
			errs = append(errs, killInside(ns))
		}
	}
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "nfcf-*"))
	for _, d := range dirs {
		if orphan(d) {
			for _, sub := range []string{"state/agent", "state"} { // small disks of tests
				_ = syscall.Unmount(filepath.Join(d, sub), syscall.MNT_DETACH)
			}
			errs = append(errs, os.RemoveAll(d))
		}
	}
	return errors.Join(errs...)
}

// orphan tells whether the process that is named in nfcf-PID-... is gone.
func orphan(path string) bool {
	f := strings.SplitN(filepath.Base(path), "-", 3)
	if len(f) < 3 {
		return false
	}
	pid, err := strconv.Atoi(f[1])
	return err == nil && pid > 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}
