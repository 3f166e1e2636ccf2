package checkpoint

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// startVariable marks, in their environment, the processes of one start of an
// application. The mark is on the disk before the start: an agent that is
// killed before it could write down the process number leaves no process that
// nobody knows.
const startVariable = "NFCONNFILTER_START"

// findMarked looks for the processes of a start of which only the mark is
// known, and gives the record of the oldest; nil when there are none.
func findMarked(rec record) (*record, error) {
	all, err := listStats()
	if err != nil {
		return nil, err
	}
	want := []byte(startVariable + "=" + rec.Mark)
	// The mark is in the cgroup's name too: many a program writes its title
	// over its environment (Redis, PostgreSQL, nginx).
	c := cgroup(filepath.Join(cgroup2Mount(), cgroupParent, rec.App+"."+rec.Mark))
	inside := c.members()
	var oldest *procStat
	for i := range all {
		s := &all[i]
		if s.gone() || oldest != nil && oldest.start <= s.start {
			continue
		}
		if slices.ContainsFunc(inside, func(m procStat) bool { return m.pid == s.pid && m.start == s.start }) {
			oldest = s
			continue
		}
		// A process that ends, or is somebody else's, has no environment for us.
		env, err := os.ReadFile("/proc/" + strconv.Itoa(s.pid) + "/environ")
		if err != nil {
			continue
		}
		for v := range bytes.SplitSeq(env, []byte{0}) {
			if bytes.Equal(v, want) {
				oldest = s
				break
			}
		}
	}
	if oldest == nil {
		return nil, nil
	}
	rec.PID, rec.StartTime = oldest.pid, oldest.start
	rec.OwnSession, rec.OwnGroup = oldest.sid == oldest.pid, oldest.pgid == oldest.pid
	if len(inside) > 0 {
		rec.Cgroup = string(c)
	}
	return &rec, nil
}

// stale tells why a process cannot be the one that its application's pid_file
// names, "" when it can: the file lives longer than the process, and its number
// may belong to somebody else by now; and whoever may write the file must not
// name a process that is not his.
func stale(path string, fi os.FileInfo, st procStat) string {
	const slack = 2 * time.Second
	if began := st.began(); began.After(fi.ModTime().Add(slack)) {
		return fmt.Sprintf("process %d began %s after pid_file %s was written and is not the application's; if it is, have it write the file anew",
			st.pid, began.Sub(fi.ModTime()).Round(time.Second), path)
	}
	owner := fi.Sys().(*syscall.Stat_t).Uid
	proc, err := os.Stat("/proc/" + strconv.Itoa(st.pid))
	if err != nil {
		return "it has ended"
	}
	if uid := proc.Sys().(*syscall.Stat_t).Uid; owner != 0 && owner != uid {
		return fmt.Sprintf("pid_file %s belongs to user %d and names process %d of user %d", path, owner, st.pid, uid)
	}
	return ""
}
