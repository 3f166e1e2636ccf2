package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// procStat is what /proc/PID/stat tells about a process (proc_pid_stat(5)).
type procStat struct {
	pid, ppid, pgid, sid int
	state                byte
	start                uint64 // field 22, clock ticks since boot
}

// gone tells that the process has ended, reaped or not.
func (s procStat) gone() bool { return s.state == 'Z' || s.state == 'X' || s.state == 'x' }

// stopped tells that the task takes no more steps.
func (s procStat) stopped() bool { return s.state == 'T' || s.state == 't' || s.gone() }

// began is when the process was started.
func (s procStat) began() time.Time {
	const ticks = 100 // USER_HZ is the same on every architecture that Go has
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	age := time.Duration(now.Nano()) - time.Duration(s.start)*(time.Second/ticks)
	return time.Now().Add(-age)
}

// parseStat reads one line of /proc/PID/stat. The command name may hold
// anything, so the fields are counted from the last closing parenthesis.
func parseStat(b []byte) (procStat, error) {
	var s procStat
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return s, errors.New("stat line without a command name")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:open])))
	if err != nil {
		return s, fmt.Errorf("stat line: %w", err)
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 || len(f[0]) != 1 {
		return s, errors.New("stat line is too short")
	}
	s.pid, s.state = pid, f[0][0]
	for i, p := range []*int{&s.ppid, &s.pgid, &s.sid} {
		if *p, err = strconv.Atoi(f[i+1]); err != nil {
			return s, fmt.Errorf("stat line: %w", err)
		}
	}
	if s.start, err = strconv.ParseUint(f[19], 10, 64); err != nil {
		return s, fmt.Errorf("stat line: %w", err)
	}
	return s, nil
}

func readStat(pid int) (procStat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	return parseStat(b)
}

// numbers gives the entries of a directory of /proc that are numbers, in its order.
func numbers(dir string) ([]int, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil {
			out = append(out, n)
		}
	}
	return out, nil
}

// listStats reads all processes. One that ends meanwhile is left out.
func listStats() ([]procStat, error) {
	pids, err := numbers("/proc")
	if err != nil {
		return nil, err
	}
	var all []procStat
	for _, pid := range pids {
		if s, err := readStat(pid); err == nil {
			all = append(all, s)
		}
	}
	return all, nil
}

// tree describes which processes belong to an application that has no cgroup
// of its own.
type tree struct {
	pid     int
	start   uint64
	session bool // the leader leads its session, all of which is the application's
	group   bool // the same for its process group
}

// members picks the live processes of the application: its leader, its session
// or group where those are its own, and all their descendants. The caller's
// own process and init are never among them.
func (t tree) members(all []procStat, self int) []procStat {
	reused := false
	for _, s := range all {
		if s.pid == t.pid && s.start != t.start {
			// The leader's number went to a stranger; a session or group of
			// this number would be the stranger's too.
			reused = true
		}
	}
	if reused {
		return nil
	}
	in := map[int]bool{}
	for _, s := range all {
		if s.pid == t.pid || (t.session && s.sid == t.pid) || (t.group && s.pgid == t.pid) {
			in[s.pid] = true
		}
	}
	for again := true; again; {
		again = false
		for _, s := range all {
			if !in[s.pid] && in[s.ppid] {
				in[s.pid], again = true, true
			}
		}
	}
	var out []procStat
	for _, s := range all {
		if in[s.pid] && !s.gone() && s.pid != self && s.pid != 1 {
			out = append(out, s)
		}
	}
	return out
}

// tasksStopped tells whether every thread of the process takes no more steps.
func tasksStopped(pid int) bool {
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	tids, err := numbers(dir)
	if err != nil {
		return true
	}
	for _, tid := range tids {
		b, err := os.ReadFile(dir + "/" + strconv.Itoa(tid) + "/stat")
		if err != nil {
			continue
		}
		if s, err := parseStat(b); err == nil && !s.stopped() {
			return false
		}
	}
	return true
}

// signalExactly sends sig to the process that has this number and start time;
// a process that has ended is no error. The pidfd keeps the number from being
// reused between the look and the signal (pidfd_open(2)).
func signalExactly(s procStat, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(s.pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return nil
		}
		return fmt.Errorf("process %d: %w", s.pid, err)
	}
	defer unix.Close(fd)
	now, err := readStat(s.pid)
	if err != nil || now.start != s.start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s to process %d: %w", unix.SignalName(sig), s.pid, err)
	}
	return nil
}
