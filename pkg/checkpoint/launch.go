package checkpoint

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// launcher starts applications and finds those that run already.
type launcher interface {
	// start runs the application's start command.
	start(app *config.App) (process, error)
	// run runs another command of the application to its end, as the same
	// user and in the same place. When ctx ends it is killed.
	run(ctx context.Context, app *config.App, argv []string) error
	// find gives the process that an earlier agent started or adopted, or
	// that pid_file names; nil when none runs.
	find(app *config.App) (process, error)
	// adopt takes a process that somebody else has made for the application's.
	adopt(app *config.App, pid int) (process, error)
	// hook has the connections that a running process opens from now on follow
	// process.bind_vip; start has done that before the process begins.
	hook(app *config.App, p process) error
	// logPath tells where the application's output goes.
	logPath(app *config.App) string
}

// osLauncher starts processes on this machine.
type osLauncher struct {
	stateDir string
	log      *slog.Logger
	hooks    connectHooks
	hooking  sync.Mutex // one at a time: a reload may meet a start
	noCgroup bool       // tests: stop by signals
	ends     *failpoint.Points
	// children counts the goroutines that reap.
	children sync.WaitGroup
}

func (l *osLauncher) logPath(app *config.App) string {
	p := app.Process.LogFile
	switch {
	case p == "":
		return filepath.Join(l.stateDir, logsDir, app.Name+".log")
	case !filepath.IsAbs(p) && app.Process.WorkingDirectory != "":
		return filepath.Join(app.Process.WorkingDirectory, p)
	}
	return p
}

func (l *osLauncher) openLog(app *config.App) (*os.File, error) {
	var f *os.File
	var err error
	if app.Process.LogFile == "" {
		f, err = openPrivateLog(l.stateDir, app.Name+".log")
	} else {
		f, err = openLogAt(l.logPath(app))
	}
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", app.Name, err)
	}
	if err := plainLog(f); err != nil {
		return nil, errors.Join(fmt.Errorf("log of %s: %w", app.Name, err), f.Close())
	}
	return f, nil
}

// command prepares a child that outlives the agent: a session of its own, its
// output in a file, nothing on its standard input.
func (l *osLauncher) command(app *config.App, argv []string, log *os.File) (*exec.Cmd, error) {
	p := app.Process
	name := argv[0]
	if strings.Contains(name, "/") && !filepath.IsAbs(name) && p.WorkingDirectory != "" {
		name = filepath.Join(p.WorkingDirectory, name)
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("command of %s: %w", app.Name, err)
	}
	if os.Geteuid() == 0 && (p.User == "" || p.User == "root" || p.User == "0") {
		if err := config.CheckTrusted(path); err != nil {
			return nil, fmt.Errorf("command of %s is not run as root: %w", app.Name, err)
		}
	}
	cmd := &exec.Cmd{
		Path: path, Args: argv, Dir: p.WorkingDirectory, Stdout: log, Stderr: log,
		Env:         append(os.Environ(), p.Environment...),
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if p.User == "" {
		return cmd, nil
	}
	cred, env, err := credential(p.User)
	if err != nil {
		return nil, fmt.Errorf("user of %s: %w", app.Name, err)
	}
	cmd.Env = slices.Concat(os.Environ(), env, p.Environment)
	if os.Geteuid() != int(cred.Uid) || os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = cred
	}
	return cmd, nil
}

// credential looks up a user by name or number with all groups.
func credential(name string) (*syscall.Credential, []string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		byID, idErr := user.LookupId(name)
		if idErr != nil {
			return nil, nil, fmt.Errorf("%w; create it or change process.user", err)
		}
		u = byID
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, nil, err
	}
	c := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, nil, err
	}
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 32); err == nil {
			c.Groups = append(c.Groups, uint32(n))
		}
	}
	return c, []string{"HOME=" + u.HomeDir, "USER=" + u.Username, "LOGNAME=" + u.Username}, nil
}

func (l *osLauncher) start(app *config.App) (process, error) {
	if len(app.Process.Start) == 0 {
		return nil, fmt.Errorf("%s has no process.start and no process that runs already; give it a start command", app.Name)
	}
	log, err := l.openLog(app)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd, err := l.command(app, app.Process.Start, log)
	if err != nil {
		return nil, err
	}
	mark := randomHex(8)
	cmd.Env = append(cmd.Env, startVariable+"="+mark)
	if err := saveRecord(l.stateDir, record{App: app.Name, BootID: bootID(), Mark: mark}); err != nil {
		return nil, fmt.Errorf("record of %s: %w; nothing was started", app.Name, err)
	}
	l.ends.Here(failpoint.Launch, nil)
	group, err := l.startInCgroup(app, cmd, mark)
	if group == "" && err == nil {
		err = startIn(app.Process.Namespace, cmd)
	}
	if err != nil {
		l.forget(app.Name)
		return nil, fmt.Errorf("start %s: %w", app.Name, err)
	}
	l.ends.Here(failpoint.Launched, nil)
	st, err := readStat(cmd.Process.Pid)
	if err != nil {
		// It is our child and not reaped yet, so /proc itself is at fault.
		return nil, errors.Join(fmt.Errorf("start %s: %w", app.Name, err), cmd.Process.Kill(), cmd.Wait())
	}
	p := &osProcess{ends: l.ends, child: make(chan struct{}), rec: record{
		App: app.Name, PID: st.pid, StartTime: st.start, BootID: bootID(),
		Cgroup: string(group), OwnSession: true, OwnGroup: true, Mark: mark,
	}}
	p.ended = func() { l.forget(app.Name) }
	l.reap(p, func() (*os.ProcessState, error) {
		err := cmd.Wait()
		return cmd.ProcessState, err
	})
	if err := saveRecord(l.stateDir, p.rec); err != nil {
		return nil, errors.Join(fmt.Errorf("record of %s: %w", app.Name, err), p.stop(unix.SIGKILL, 0))
	}
	return p, nil
}

// reap waits in the background for the end of p, which is our child.
func (l *osLauncher) reap(p *osProcess, wait func() (*os.ProcessState, error)) {
	l.children.Go(func() {
		defer close(p.child)
		state, err := wait()
		p.mu.Lock()
		p.exit = state.String()
		p.mu.Unlock()
		l.log.Info("process ended", "app", p.rec.App, "pid", p.rec.PID, "how", state.String(), "err", err)
	})
}

func (l *osLauncher) forget(app string) {
	if err := removeRecord(l.stateDir, app); err != nil {
		l.log.Warn("record of a stopped application stays", "app", app, "err", err)
	}
}

// startInCgroup starts the command inside a new cgroup (clone3 with
// CLONE_INTO_CGROUP); "" when that is not possible here and nothing was
// started, which is an error for an application that cannot do without.
func (l *osLauncher) startInCgroup(app *config.App, cmd *exec.Cmd, mark string) (cgroup, error) {
	c, err := l.hookedCgroup(app, mark)
	if err != nil && app.Process.BindVIP {
		return "", err
	}
	if err != nil {
		l.log.Debug("no cgroup for the application, it is stopped by signals", "app", app.Name, "err", err)
		return "", nil
	}
	d, err := os.Open(string(c))
	if err == nil {
		defer d.Close()
		attr := *cmd.SysProcAttr
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(d.Fd())
		if err = startIn(app.Process.Namespace, cmd); err == nil {
			return c, nil
		}
		// A second Start needs a fresh Cmd.
		*cmd = exec.Cmd{Path: cmd.Path, Args: cmd.Args, Dir: cmd.Dir, Env: cmd.Env,
			Stdout: cmd.Stdout, Stderr: cmd.Stderr, SysProcAttr: &attr}
	}
	c.remove()
	if app.Process.BindVIP {
		return "", err
	}
	l.log.Debug("no cgroup for the application, it is stopped by signals", "app", app.Name, "err", err)
	return "", nil
}

// hookedCgroup makes the cgroup, and puts the hook for process.bind_vip there
// before any process is in it: no connection goes out without.
func (l *osLauncher) hookedCgroup(app *config.App, mark string) (cgroup, error) {
	c, err := cgroup(""), errors.New("it is not to be used")
	if !l.noCgroup {
		c, err = newCgroup(app.Name, mark)
	}
	if !app.Process.BindVIP {
		return c, err
	}
	if err != nil {
		return "", fmt.Errorf("process.bind_vip of %s needs a cgroup: %w; give the agent cgroup v2 "+
			"(mount -t cgroup2 none /sys/fs/cgroup), or set bind_vip = false", app.Name, err)
	}
	if err := l.attach(app, c); err != nil {
		c.remove()
		return "", err
	}
	return c, nil
}

func (l *osLauncher) run(ctx context.Context, app *config.App, argv []string) error {
	log, err := l.openLog(app)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd, err := l.command(app, argv, log)
	if err != nil {
		return err
	}
	if err := startIn(app.Process.Namespace, cmd); err != nil {
		return fmt.Errorf("%s: %w", argv[0], err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		// Its own session, so the group holds what it started.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-done
		return fmt.Errorf("%s was killed: %w", argv[0], context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("%s: %w (its output is in %s)", argv[0], err, log.Name())
	}
	return nil
}

func (l *osLauncher) find(app *config.App) (process, error) {
	rec, err := loadRecord(l.stateDir, app.Name)
	if err != nil {
		return nil, err
	}
	if rec != nil && rec.PID == 0 { // an agent was killed while it started it
		if rec, err = findMarked(*rec); err != nil {
			return nil, err
		}
		if rec == nil {
			l.forget(app.Name)
		} else if err := saveRecord(l.stateDir, *rec); err != nil {
			return nil, fmt.Errorf("record of %s: %w", app.Name, err)
		}
	}
	if rec != nil {
		p := &osProcess{ends: l.ends, rec: *rec, ended: func() { l.forget(app.Name) }}
		if p.alive() {
			return p, nil
		}
		// Once: a CRIU that somebody else has started may make it again for the next one.
		if rec.Cgroup != "" {
			cgroup(rec.Cgroup).remove()
		}
		l.forget(app.Name)
	}
	if app.Process.PidFile == "" {
		return nil, nil
	}
	pid, file, err := readPidFile(app.Process.PidFile)
	if err != nil || pid == 0 {
		return nil, err
	}
	st, err := readStat(pid)
	if err != nil || st.gone() {
		return nil, nil // a stale pid_file
	}
	if why := stale(app.Process.PidFile, file, st); why != "" {
		l.log.Warn("the process that pid_file names is not taken for the application", "app", app.Name, "why", why)
		return nil, nil
	}
	return l.take(app, st, "")
}

func (l *osLauncher) adopt(app *config.App, pid int) (process, error) {
	st, err := readStat(pid)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return l.take(app, st, ownCgroup(app.Name, pid))
}

// take writes a process down that the agent has not started.
func (l *osLauncher) take(app *config.App, st procStat, group cgroup) (process, error) {
	r := record{App: app.Name, PID: st.pid, StartTime: st.start, BootID: bootID(),
		OwnSession: st.sid == st.pid, OwnGroup: st.pgid == st.pid, Adopted: true, Cgroup: string(group)}
	if err := saveRecord(l.stateDir, r); err != nil {
		return nil, fmt.Errorf("record of %s: %w", app.Name, err)
	}
	return &osProcess{ends: l.ends, rec: r, ended: func() { l.forget(app.Name) }}, nil
}

// readPidFile gives the process number in the file, 0 when there is none. The
// file may be in the hands of the application's user, who must not make the
// agent wait for a pipe, or take another program's file for it by a link.
func readPidFile(path string) (int, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, fmt.Errorf("pid_file: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, nil, fmt.Errorf("pid_file: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return 0, nil, fmt.Errorf("pid_file %s is no regular file; remove it", path)
	}
	if fi.Sys().(*syscall.Stat_t).Nlink != 1 {
		return 0, nil, fmt.Errorf("pid_file %s has more than one name, it may be another program's; remove it", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return 0, nil, fmt.Errorf("pid_file: %w", err)
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return 0, nil, nil
	}
	pid, err := strconv.Atoi(text)
	if err != nil || pid <= 1 || pid == os.Getpid() {
		return 0, nil, fmt.Errorf("pid_file %s holds no process number of an application: %.20q", path, text)
	}
	return pid, fi, nil
}

// startIn starts cmd in a network namespace, given by name or path; "" is the
// agent's own.
func startIn(namespace string, cmd *exec.Cmd) error {
	return inNamespace(namespace, cmd.Start)
}

// namespacePath gives the file of a network namespace (ip-netns(8)).
func namespacePath(namespace string) string {
	if strings.Contains(namespace, "/") {
		return namespace
	}
	return "/run/netns/" + namespace
}

// inNamespace calls f on a thread inside the namespace. The thread ends with
// the call, so that no other goroutine ever runs there.
func inNamespace(namespace string, f func() error) error {
	if namespace == "" {
		return f()
	}
	ns, err := os.Open(namespacePath(namespace))
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", namespace, err)
	}
	defer ns.Close()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is thrown away
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("network namespace %s: %w", namespace, err)
			return
		}
		result <- f()
	}()
	return <-result
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
