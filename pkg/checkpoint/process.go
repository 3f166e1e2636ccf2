package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
)

// process is one running application: all its processes together.
type process interface {
	// alive tells whether any of its processes runs.
	alive() bool
	// within fails with errElsewhere where all of it runs in another network
	// namespace ("": the agent's): its sockets are not to be found in this one.
	within(namespace string) error
	// has tells whether a process with this number is one of them.
	has(pid int) bool
	// rootedIn fails where not all of them descend from the process with this number.
	rootedIn(pid int) error
	// describe names it for logs and errors.
	describe() string
	// freeze stops all its processes; on an error none is left stopped.
	freeze(ctx context.Context) error
	// thaw lets them run on.
	thaw() error
	// stop sends the signal to all, lets frozen ones run on where the signal
	// needs it, and returns when the last has ended. After timeout they are
	// killed.
	stop(sig unix.Signal, timeout time.Duration) error
}

const (
	// freezeTimeout bounds the wait for processes to stand still.
	freezeTimeout = 5 * time.Second
	// killTimeout bounds the wait for killed processes to be gone.
	killTimeout = 10 * time.Second
	// reapTimeout bounds the wait for the status of a child that has ended.
	reapTimeout = 100 * time.Millisecond
)

// osProcess is a process of this machine, found again by its record.
type osProcess struct {
	rec   record
	child chan struct{} // closed when our child was reaped; nil when it is not our child
	// ended is called once when stop has seen the last process end.
	ended func()
	ends  *failpoint.Points

	mu   sync.Mutex
	exit string // how the child ended
}

func (p *osProcess) describe() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exit != "" {
		return fmt.Sprintf("process %d (%s)", p.rec.PID, p.exit)
	}
	return fmt.Sprintf("process %d", p.rec.PID)
}

var errElsewhere = errors.New("it runs in another network namespace than process.namespace says; the file was changed or the namespace " +
	"made anew meanwhile: set it to the one that it runs in, or stop and start the application")

func (p *osProcess) within(namespace string) error {
	path := "/proc/self/ns/net"
	if namespace != hostNamespace {
		path = namespacePath(namespace)
	}
	want, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", namespace, err)
	}
	all, err := p.members()
	if err != nil {
		return err
	}
	elsewhere := error(nil)
	for _, s := range all {
		have, err := os.Stat("/proc/" + strconv.Itoa(s.pid) + "/ns/net")
		if err != nil { // one that ends meanwhile is nowhere
			continue
		}
		if os.SameFile(have, want) {
			return nil
		}
		elsewhere = fmt.Errorf("process %d: %w", s.pid, errElsewhere)
	}
	return elsewhere
}

func (p *osProcess) members() ([]procStat, error) {
	if p.rec.Cgroup != "" {
		return cgroup(p.rec.Cgroup).members(), nil
	}
	all, err := listStats()
	if err != nil {
		return nil, err
	}
	return p.rec.tree().members(all, os.Getpid()), nil
}

func (p *osProcess) alive() bool {
	if p.rec.Cgroup == "" {
		if s, err := readStat(p.rec.PID); err == nil && s.start == p.rec.StartTime && !s.gone() {
			return true
		}
	}
	if m, err := p.members(); err == nil && len(m) > 0 {
		return true
	}
	if p.child != nil {
		// About to be reaped: describe tells how it ended then.
		select {
		case <-p.child:
		case <-time.After(reapTimeout):
		}
	}
	return false
}

func (p *osProcess) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, freezeTimeout,
		fmt.Errorf("not all of it stood still within %s", freezeTimeout))
	defer cancel()
	var err error
	if p.rec.Cgroup != "" {
		err = cgroup(p.rec.Cgroup).freeze(ctx)
	} else {
		err = p.stopTree(ctx)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("stop %s: %w", p.describe(), err), p.thaw())
	}
	return nil
}

// stopTree sends SIGSTOP to every member until a look finds no new one and all
// threads stand still: what was forked between look and signal is found then.
// A parent inside vfork(2) cannot stop before its child has executed, and the
// child cannot execute when it was stopped first: then all go on for a moment.
func (p *osProcess) stopTree(ctx context.Context) error {
	const patience = 200 * time.Millisecond
	told := map[int]uint64{}
	since := time.Now()
	return poll(ctx, pollFirst, pollMost, func() (bool, error) {
		m, err := p.members()
		if err != nil {
			return false, err
		}
		stable := true
		for _, s := range m {
			if told[s.pid] != s.start {
				if err := signalExactly(s, unix.SIGSTOP); err != nil {
					return false, err
				}
				told[s.pid], stable = s.start, false
			}
		}
		for _, s := range m {
			stable = stable && tasksStopped(s.pid)
		}
		if !stable && time.Since(since) > patience {
			if err := p.signal(unix.SIGCONT); err != nil {
				return false, err
			}
			clear(told)
			since = time.Now()
		}
		return stable, nil
	})
}

func (p *osProcess) thaw() error {
	if p.rec.Cgroup != "" {
		return cgroup(p.rec.Cgroup).thaw()
	}
	return p.signal(unix.SIGCONT)
}

func (p *osProcess) signal(sig unix.Signal) error {
	p.ends.Here(failpoint.Signal, nil)
	defer p.ends.Here(failpoint.Signaled, nil)
	m, err := p.members()
	for _, s := range m {
		err = errors.Join(err, signalExactly(s, sig))
	}
	return err
}

func (p *osProcess) stop(sig unix.Signal, timeout time.Duration) error {
	err := p.signal(sig)
	if sig != unix.SIGKILL { // an earlier agent may have stopped it
		err = errors.Join(err, p.thaw())
	}
	if sig != unix.SIGKILL && p.waitGone(timeout, 0) == nil {
		p.finished()
		return nil
	}
	// Killed again at every look: a member may fork between look and signal.
	if werr := p.waitGone(killTimeout, unix.SIGKILL); werr != nil {
		return errors.Join(fmt.Errorf("%s does not end even when killed: %w", p.describe(), werr), err)
	}
	p.finished()
	return nil
}

func (p *osProcess) finished() {
	if p.rec.Cgroup != "" {
		cgroup(p.rec.Cgroup).remove()
	}
	if p.ended != nil {
		p.ended()
	}
}

// waitGone waits until no member is left and our child is reaped; a signal
// other than 0 is sent to those still there.
func (p *osProcess) waitGone(timeout time.Duration, sig unix.Signal) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), timeout,
		fmt.Errorf("still there after %s", timeout))
	defer cancel()
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		m, err := p.members()
		if err != nil {
			return false, err
		}
		if sig != 0 {
			for _, s := range m {
				if err := signalExactly(s, sig); err != nil {
					return false, err
				}
			}
		}
		return len(m) == 0, nil
	})
	if err != nil {
		return err
	}
	if p.child != nil {
		select {
		case <-p.child:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
