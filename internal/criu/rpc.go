package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
)

// Actions at which CRIU tells how far it is (criu(8), --action-script).
const (
	PreDump     = "pre-dump"       // nothing is stopped yet
	NetLock     = "network-lock"   // the tasks stand still; called where they have a network namespace of their own
	PostDump    = "post-dump"      // the images are whole, the tasks stand still; an error lets them run on
	NetUnlock   = "network-unlock" // as NetLock, of a dump: they run on; of a restore: the sockets work soon
	PreRestore  = "pre-restore"    // nothing is there yet; an error ends it
	PostRestore = "post-restore"   // the tasks and sockets are there, in repair mode; an error ends them
	PreResume   = "pre-resume"     // the sockets work, the tasks stand still; CRIU goes on whatever is answered
)

// Run is one run of CRIU.
type Run struct {
	Command string // name on PATH or path
	Images  string // directory of the images
	Work    string // directory of the log and the statistics
	Log     string // name of the log in it
	// Start starts the command: in another namespace or cgroup. nil: cmd.Start.
	Start func(*exec.Cmd) error
	// Notify is called at each action, with the number of the root task where CRIU
	// tells it (PostRestore), else 0. nil: never.
	Notify func(action string, pid int) error
}

// DumpOptions of Dump and PreDump.
type DumpOptions struct {
	PID int
	// Parent is the directory, relative to Images, of the pre-dump before; "": none.
	Parent string
	// Track has the kernel note which memory changes from now on.
	Track bool
}

func (r Run) options() *rpc.CriuOpts {
	return &rpc.CriuOpts{
		TcpEstablished: ptr(true), TcpSkipInFlight: ptr(true), // what waits to be accepted is not the process's yet
		NetworkLock:       rpc.CriuNetworkLockMethod_SKIP.Enum(),
		ManageCgroupsMode: rpc.CriuCgMode_IGNORE.Enum(), ManageCgroups: ptr(true),
		FileLocks: ptr(true),
		LogLevel:  ptr[int32](2), LogFile: ptr(r.Log),
	}
}

// Dump writes the images of a process and its children and ends them, unless
// Notify(PostDump) fails: then they run on.
func (r Run) Dump(ctx context.Context, d DumpOptions) error {
	o := r.options()
	o.Pid = ptr(int32(d.PID))
	o.TrackMem = ptr(d.Track)
	if d.Parent != "" {
		o.ParentImg = ptr(d.Parent)
	}
	return r.do(ctx, "dump", rpc.CriuReqType_DUMP, o)
}

// PreDump writes the memory of a process, which runs on, and has the kernel track
// what of it changes.
func (r Run) PreDump(ctx context.Context, d DumpOptions) error {
	o := r.options()
	o.Pid = ptr(int32(d.PID))
	o.TrackMem = ptr(true)
	if d.Parent != "" {
		o.ParentImg = ptr(d.Parent)
	}
	return r.do(ctx, "pre-dump", rpc.CriuReqType_PRE_DUMP, o)
}

// Restore makes the processes of the images. Their root is the caller's child, and does
// not end with it.
func (r Run) Restore(ctx context.Context) error {
	o := r.options()
	o.RstSibling = ptr(true) // the caller's child: its end is seen, and its number is free then
	return r.do(ctx, "restore", rpc.CriuReqType_RESTORE, o)
}

func ptr[T any](v T) *T { return &v }

// do sends one request and answers the notifications that come before its reply.
// When ctx ends the next notification that may fail does: CRIU must not be killed while
// it has its code in a task. Before its first notification it has not, and is killed.
func (r Run) do(ctx context.Context, what string, kind rpc.CriuReqType, o *rpc.CriuOpts) error {
	images, err := os.Open(r.Images)
	if err != nil {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	defer images.Close()
	work, err := os.Open(r.Work)
	if err != nil {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	defer work.Close()
	s, err := r.start()
	if err != nil {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	defer s.close()
	// CRIU opens them by the numbers that they have in this process.
	o.ImagesDirFd, o.WorkDirFd = ptr(int32(images.Fd())), ptr(int32(work.Fd()))
	o.NotifyScripts = ptr(r.Notify != nil)
	s.working = r.Notify == nil || kind == rpc.CriuReqType_PRE_DUMP // which notifies of nothing
	defer context.AfterFunc(ctx, func() { s.abort(context.Cause(ctx)) })()
	refused, err := s.ask(ctx, &rpc.CriuReq{Type: kind.Enum(), Opts: o}, r.Notify)
	switch why := s.whyAborted(); {
	case why != nil:
		return why
	case refused != nil: // what CRIU says of it is nothing but its consequence
		return refused
	case err == nil:
		return nil
	}
	return fmt.Errorf("criu %s failed: %w", what, r.explain(err))
}

// socketFD is the number of the socket in CRIU's process.
const socketFD = 3

// session is a running CRIU.
type session struct {
	sk    *os.File
	fd    int
	cmd   *exec.Cmd
	out   strings.Builder
	ended chan struct{}
	exit  error // once it has

	mu      sync.Mutex
	working bool  // it may have its code in tasks
	aborted error // why it was killed before that
}

// abort kills a CRIU that has done nothing yet: it may hang, and asks nothing then.
func (s *session) abort(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.working {
		s.aborted = why
		_ = s.cmd.Process.Kill()
	}
}

// works notes that it has come to its first notification.
func (s *session) works() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.working = true
}

func (s *session) whyAborted() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aborted
}

func (r Run) start() (*session, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &session{sk: os.NewFile(uintptr(fds[0]), "criu"), fd: fds[0], ended: make(chan struct{})}
	theirs := os.NewFile(uintptr(fds[1]), "criu")
	defer theirs.Close()
	// Its own session: a signal from the terminal must not end it in a task.
	s.cmd = exec.Command(r.Command, "swrk", fmt.Sprint(socketFD))
	s.cmd.ExtraFiles = []*os.File{theirs}
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	s.cmd.WaitDelay = 100 * time.Millisecond // what it leaves behind may hold its output open
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	begin := r.Start
	if begin == nil {
		begin = (*exec.Cmd).Start
	}
	if err := begin(s.cmd); err != nil {
		s.sk.Close()
		return nil, err
	}
	// The tasks that it makes have the socket too: its own end is what counts.
	go func() {
		defer close(s.ended)
		s.exit = s.cmd.Wait()
		_ = unix.Shutdown(fds[0], unix.SHUT_RD) // what it said before is read all the same
	}()
	return s, nil
}

// close waits for CRIU's end: it ends by itself when nobody listens.
func (s *session) close() {
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR)
	<-s.ended
	s.sk.Close()
}

// ask carries out one request; refused is why a notification was answered with a
// failure.
func (s *session) ask(ctx context.Context, req *rpc.CriuReq, notify func(string, int) error) (refused, err error) {
	for {
		b, err := req.MarshalVT()
		if err != nil {
			return refused, err
		}
		if _, err := s.sk.Write(b); err != nil {
			return refused, s.lost(err)
		}
		buf := make([]byte, 64<<10)
		n, err := s.sk.Read(buf)
		if err != nil || n == 0 {
			return refused, s.lost(err)
		}
		s.works()
		var resp rpc.CriuResp
		if err := resp.UnmarshalVT(buf[:n]); err != nil {
			return refused, err
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			if !resp.GetSuccess() {
				return refused, errors.New(strings.TrimSpace(resp.GetCrErrmsg()))
			}
			return refused, nil
		}
		if n := resp.GetNotify(); refused == nil && notify != nil {
			action := n.GetScript()
			if err := context.Cause(ctx); err != nil && (action == PreDump || action == PostDump || action == PostRestore) {
				refused = err
			} else {
				refused = notify(action, int(n.GetPid()))
			}
		}
		req = &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: ptr(refused == nil)}
	}
}

// lost is for a CRIU that is gone.
func (s *session) lost(err error) error {
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR)
	<-s.ended
	switch text := strings.TrimSpace(unharmful(s.out.String())); {
	case text != "":
		return fmt.Errorf("it ended (%v): %s", s.exit, text)
	case s.exit != nil:
		return fmt.Errorf("it ended: %w", s.exit)
	}
	return fmt.Errorf("it ended without an answer: %v", err)
}

// explain adds what the log tells, and where it is.
func (r Run) explain(err error) error {
	path := filepath.Join(r.Work, r.Log)
	line := Telling(path)
	switch text := err.Error(); {
	case line == "":
		if text == "" {
			text = "it gave no reason"
		}
		return fmt.Errorf("%s (its log is %s)", text, path)
	case text == "" || strings.Contains(line, text):
		return fmt.Errorf("%s (its log is %s)", line, path)
	default:
		return fmt.Errorf("%s: %s (its log is %s)", text, line, path)
	}
}
