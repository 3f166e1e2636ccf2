package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
)

// criuRef names one process of CRIU: numbers are used again.
type criuRef struct {
	pid   int
	start uint64 // proc_pid_stat(5), field 22
}

// foreignCRIU is what is to be known of a CRIU that somebody else has started.
type foreignCRIU interface {
	// find gives the CRIU with a process number.
	find(pid int) (criuRef, error)
	// runs tells whether it has not ended.
	runs(r criuRef) bool
	// awaitEnd returns when it has.
	awaitEnd(ctx context.Context, r criuRef) error
	// target reads from its command line which process it dumps; 0: it does not say.
	target(r criuRef) int
	// made fails where the process is not one that it has made.
	made(r criuRef, pid int) error
	// place gives the permanent name of a directory of images.
	place(dir string) (string, error)
	// fit fails for images whose connections cannot be held.
	fit(dir string) error
	// outcome tells, once CRIU has ended, whether p runs on. It waits for the end of
	// what was killed, and has the sockets of what was not work.
	outcome(ctx context.Context, p process) (runsOn bool, err error)
}

func (osImager) find(pid int) (criuRef, error) {
	st, err := readStat(pid)
	if err != nil || st.gone() {
		return criuRef{}, fmt.Errorf("there is no process %d that could be CRIU; ckptctl criu-action is called by CRIU itself", pid)
	}
	// It can kill what it likes; whoever may only use the socket must not be it.
	fi, err := os.Stat("/proc/" + strconv.Itoa(pid))
	if os.Geteuid() == 0 && (err != nil || fi.Sys().(*syscall.Stat_t).Uid != 0) {
		return criuRef{}, fmt.Errorf("process %d is not root's and so no CRIU that the agent believes", pid)
	}
	return criuRef{pid, st.start}, nil
}

func (osImager) runs(r criuRef) bool {
	st, err := readStat(r.pid)
	return err == nil && st.start == r.start && !st.gone()
}

func (o osImager) awaitEnd(ctx context.Context, r criuRef) error {
	return poll(ctx, pollFirst, criuLook, func() (bool, error) { return !o.runs(r), nil })
}

// criuLook is the longest wait between two looks at CRIU: behind the images the clients
// wait for its end.
const criuLook = 5 * pollFirst

func (osImager) target(r criuRef) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(r.pid) + "/cmdline")
	if err != nil {
		return 0
	}
	return dumpedPID(strings.Split(string(b), "\x00"))
}

// dumpedPID finds -t PID or --tree PID in the arguments of criu.
func dumpedPID(args []string) int {
	for i, a := range args {
		text, attached := "", false
		for _, flag := range []string{"--tree=", "-t"} {
			if rest, ok := strings.CutPrefix(a, flag); ok && rest != "" {
				text, attached = rest, true
				break
			}
		}
		if !attached && (a == "-t" || a == "--tree") && i+1 < len(args) {
			text = args[i+1]
		}
		if pid, err := strconv.Atoi(text); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}

func (osImager) made(r criuRef, pid int) error {
	st, err := readStat(pid)
	if err != nil {
		return fmt.Errorf("the restored process %d: %w", pid, err)
	}
	self, err := readStat(r.pid)
	if err != nil {
		return fmt.Errorf("criu %d: %w", r.pid, err)
	}
	if st.ppid != self.pid && st.ppid != self.ppid { // --restore-sibling
		return fmt.Errorf("process %d was not made by criu %d", pid, r.pid)
	}
	return nil
}

func (osImager) place(dir string) (string, error) {
	at, err := os.Readlink(dir)
	if errors.Is(err, unix.EINVAL) { // no link
		return dir, nil
	}
	if err != nil {
		return "", fmt.Errorf("the directory of the images: %w", err)
	}
	return at, nil
}

func (osImager) fit(dir string) error {
	lock, err := criu.NetworkLock(dir)
	switch {
	case err != nil:
		return fmt.Errorf("the images: %w; they have to be files (no --stream, no --page-server)", err)
	case lock != criu.LockSkip:
		return fmt.Errorf("CRIU locks the network itself (%s), so that clients get no answers while the application is away; give it --network-lock skip", lock)
	}
	return nil
}

func (osImager) outcome(ctx context.Context, p process) (bool, error) {
	op, ok := p.(*osProcess)
	if !ok {
		return p.alive(), nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, killTimeout, fmt.Errorf("%s, which CRIU has killed, does not end", p.describe()))
	defer cancel()
	runsOn := false
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		all, err := op.members()
		if err != nil {
			return false, err
		}
		runsOn = slices.ContainsFunc(all, func(s procStat) bool { return !dying(s.pid) })
		return runsOn || len(all) == 0, nil
	})
	if err != nil || !runsOn {
		return false, err
	}
	return true, op.endRepair()
}

// dying tells whether a process is about to end: it was killed, or ends already.
func dying(pid int) bool {
	const exiting = 4 // PF_EXITING (include/linux/sched.h)
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	if _, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')'):]), ") "); ok {
		if f := strings.Fields(rest); len(f) > 6 {
			if flags, err := strconv.ParseUint(f[6], 10, 64); err == nil && flags&exiting != 0 {
				return true
			}
		}
	}
	b, err = os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		name, mask, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		pending, _ := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		if pending&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

func (p *osProcess) has(pid int) bool {
	all, err := p.members()
	return err == nil && slices.ContainsFunc(all, func(s procStat) bool { return s.pid == pid })
}

func (p *osProcess) rootedIn(pid int) error {
	root, err := p.root()
	if err != nil {
		return err
	}
	for at := root; at > 1; {
		if at == pid {
			return nil
		}
		st, err := readStat(at)
		if err != nil {
			break
		}
		at = st.ppid
	}
	return fmt.Errorf("CRIU dumps process %d, and the application's is %d with all that descend from it; give CRIU that (-t %[2]d)", pid, root)
}
