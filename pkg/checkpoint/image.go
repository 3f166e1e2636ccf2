package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// imager writes and reads images of whole processes.
type imager interface {
	// dump writes the images of a process and ends it, unless notify fails at
	// criu.PostDump; the process runs on then, as after any other failure.
	dump(ctx context.Context, app *config.App, p process, r imageRun) error
	// preDump writes the memory of a process, which runs on.
	preDump(ctx context.Context, app *config.App, p process, r imageRun) error
	// tracks tells why this kernel cannot tell which memory has changed; "": it can.
	tracks(ctx context.Context) string
	// restore makes the processes of the images. With an error none is left.
	restore(ctx context.Context, app *config.App, r imageRun, back func(process)) error
	// follow reads images of a dump while they are written.
	follow(dir string) follower
	// sockets reads the TCP connections of images.
	sockets(dir string) ([]criu.Socket, error)
	// taken names a process that has one of the numbers that the images need; "": nobody.
	taken(dir string) (string, error)
	// settle sees that a CRIU which an earlier agent has started is gone, and that
	// its process is as before; it takes what time that needs.
	settle(ctx context.Context, pid int, start uint64, p process) error
}

// imageRun is one run of CRIU.
type imageRun struct {
	images, work, log string
	parent            string // directory of a pre-dump, from images; "": none
	notify            func(action string) error
	began             func(criu procStat) error // before anything is done
}

// follower has read what of images was written early.
type follower interface {
	Stop() // once nothing more is written; repeated it does nothing
	Sockets() ([]criu.Socket, error)
	// Sum gives the SHA-256 in hexadecimal of a file in the state st, where it is known.
	Sum(name string, st *unix.Stat_t) (string, bool)
}

// osImager uses CRIU.
type osImager struct {
	launch  *osLauncher
	command func() string
}

func (o osImager) run(r imageRun) criu.Run {
	return criu.Run{Command: o.command(), Images: r.images, Work: r.work, Log: r.log}
}

// runOn is a run of CRIU on a process, whose root task has the number root.
func (o osImager) runOn(app *config.App, p process, r imageRun) (run criu.Run, op *osProcess, root int, err error) {
	op, ok := p.(*osProcess)
	if !ok {
		return run, nil, 0, fmt.Errorf("%s is no process of this machine", p.describe())
	}
	run = o.run(r)
	run.Start = func(cmd *exec.Cmd) error {
		err := startIn(app.Process.Namespace, cmd)
		if err != nil {
			return err
		}
		spare(cmd.Process.Pid)
		if r.began != nil {
			var st procStat
			if st, err = readStat(cmd.Process.Pid); err == nil {
				err = r.began(st)
			}
			if err != nil {
				_ = cmd.Process.Kill() // it has not been asked for anything
				_ = cmd.Wait()
			}
		}
		return err
	}
	root, err = op.root()
	return run, op, root, err
}

func (o osImager) dump(ctx context.Context, app *config.App, p process, r imageRun) error {
	run, op, root, err := o.runOn(app, p, r)
	if err != nil {
		return err
	}
	run.Notify = func(action string, _ int) error { return r.notify(action) }
	err = run.Dump(ctx, criu.DumpOptions{PID: root, Track: r.parent != "", Parent: r.parent})
	if err != nil { // a CRIU that was killed leaves the sockets as they were then
		err = errors.Join(err, op.endRepair())
	}
	return err
}

func (o osImager) preDump(ctx context.Context, app *config.App, p process, r imageRun) error {
	run, _, root, err := o.runOn(app, p, r)
	if err != nil {
		return err
	}
	return run.PreDump(ctx, criu.DumpOptions{PID: root})
}

func (o osImager) tracks(ctx context.Context) string {
	if ok, why := criu.Feature(ctx, o.command(), "mem_dirty_track"); !ok {
		return why
	}
	return ""
}

// spare keeps a CRIU from being chosen when memory runs out: killed while it puts its code
// into a task it would take the task with it. Without CAP_SYS_RESOURCE it stays as it is.
func spare(pid int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("-1000"), 0)
}

// endRepair has the sockets of all its processes work again.
func (p *osProcess) endRepair() error {
	all, err := p.members()
	for _, s := range all {
		_, rerr := criu.EndRepair(s.pid)
		err = errors.Join(err, rerr)
	}
	return err
}

// root is the process from which all others of the application descend: that is what
// CRIU dumps.
func (p *osProcess) root() (int, error) {
	all, err := p.members()
	if err != nil {
		return 0, err
	}
	var roots []string
	root := 0
	for _, s := range all {
		if !slices.ContainsFunc(all, func(o procStat) bool { return o.pid == s.ppid }) {
			root = s.pid
			roots = append(roots, fmt.Sprint(s.pid))
		}
	}
	switch len(roots) {
	case 0:
		return 0, fmt.Errorf("%s is gone", p.describe())
	case 1:
		return root, nil
	}
	return 0, fmt.Errorf("its processes %s have no common ancestor among them, and an image holds one tree; have it run in the foreground", strings.Join(roots, ", "))
}

// restore starts CRIU inside the application's new cgroup, so that the processes are
// there from their first moment, and in its network namespace.
func (o osImager) restore(ctx context.Context, app *config.App, r imageRun, back func(process)) error {
	l := o.launch
	log, err := l.openLog(app) // the process opens it by its name
	if err != nil {
		return err
	}
	log.Close()
	mark := randomHex(8)
	group, err := l.hookedCgroup(app, mark)
	if err != nil {
		return fmt.Errorf("restoring %s needs a cgroup of its own, to end what CRIU leaves when it fails: %w; give the agent cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup)", app.Name, err)
	}
	p := &osProcess{ends: l.ends, rec: record{App: app.Name, BootID: bootID(), Cgroup: string(group), OwnSession: true, OwnGroup: true, Mark: mark},
		ended: func() { l.forget(app.Name) }}
	opened := false
	run := o.run(r)
	run.Start = func(cmd *exec.Cmd) error {
		d, err := os.Open(string(group))
		if err != nil {
			return err
		}
		defer d.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(d.Fd())
		if err := startIn(app.Process.Namespace, cmd); err != nil {
			return err
		}
		// Until its own number is known it is found by CRIU's, in the same cgroup.
		p.rec.PID = cmd.Process.Pid
		if st, err := readStat(p.rec.PID); err == nil {
			p.rec.StartTime = st.start
		}
		if err := saveRecord(l.stateDir, p.rec); err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			return fmt.Errorf("record of %s: %w", app.Name, err)
		}
		return nil
	}
	run.Notify = func(action string, pid int) error {
		if action == criu.PostRestore {
			if err := o.found(p, pid); err != nil {
				return err
			}
			back(p)
		}
		err := r.notify(action)
		switch {
		case action != criu.PreResume:
		case err != nil: // CRIU would go on whatever it is told
			err = errors.Join(err, p.signal(unix.SIGKILL))
		default:
			opened = true
		}
		return err
	}
	err = run.Restore(ctx)
	switch {
	case err == nil:
		return nil
	case opened && p.alive(): // its clients speak with it; without CRIU the tasks go on
		l.log.Warn("CRIU failed behind the last step of a restore, the application runs", "app", app.Name, "err", err)
		return nil
	}
	if serr := p.stop(unix.SIGKILL, 0); serr != nil {
		err = errors.Join(err, serr)
	}
	if p.child == nil { // CRIU did not come to tell which child it is
		err = errors.Join(err, reapRoot(r.images))
	}
	return err
}

// reapRoot reaps the root task of images, which CRIU has made as our child.
func reapRoot(dir string) error {
	pids, err := criu.PIDs(dir)
	if err != nil || len(pids) == 0 {
		return nil // nothing was made of them
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	return poll(ctx, pollFirst, pollMost, func() (bool, error) {
		pid, err := unix.Wait4(pids[0], nil, unix.WNOHANG, nil)
		return pid == pids[0] || errors.Is(err, unix.ECHILD), nil
	})
}

// found notes which process was restored.
func (o osImager) found(p *osProcess, pid int) error {
	st, err := readStat(pid)
	if err != nil {
		return fmt.Errorf("the restored process %d: %w", pid, err)
	}
	p.rec.PID, p.rec.StartTime = st.pid, st.start
	p.rec.OwnSession, p.rec.OwnGroup = st.sid == st.pid, st.pgid == st.pid
	if err := saveRecord(o.launch.stateDir, p.rec); err != nil {
		return fmt.Errorf("record of %s: %w", p.rec.App, err)
	}
	root, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	p.child = make(chan struct{})
	o.launch.reap(p, root.Wait)
	return nil
}

func (osImager) follow(dir string) follower { return criu.Follow(dir) }

func (osImager) sockets(dir string) ([]criu.Socket, error) { return criu.Sockets(dir) }

func (osImager) taken(dir string) (string, error) {
	pids, err := criu.PIDs(dir)
	if err != nil {
		return "", err
	}
	for _, pid := range pids {
		if who := holder(pid); who != "" {
			return who, nil
		}
	}
	return "", nil
}

// holder names who has a process or thread number. One that has ended and is not
// reaped yet gives it up soon.
func holder(pid int) (who string) {
	const unreaped = 5 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), unreaped)
	defer cancel()
	_ = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		who = ""
		if unix.Kill(pid, 0) != nil {
			return true, nil
		}
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		who = fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(string(name)))
		st, err := readStat(pid)
		return err == nil && !st.gone(), nil
	})
	return who
}

// settleTime is how long a CRIU has to end by itself once nobody answers it.
const settleTime = time.Minute

func (osImager) settle(ctx context.Context, pid int, start uint64, p process) error {
	if pid > 0 {
		ctx, cancel := context.WithTimeoutCause(ctx, settleTime, fmt.Errorf("criu %d, which an earlier agent has started, does not end", pid))
		defer cancel()
		err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
			st, err := readStat(pid)
			return err != nil || st.gone() || st.start != start, nil
		})
		if err != nil {
			return err
		}
	}
	if op, ok := p.(*osProcess); ok {
		return op.endRepair()
	}
	return nil
}
