package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/checkpoint-restore/go-criu/v8/rpc"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// playEnv has the test's program be a CRIU that does what it says, a word each:
// NAME notifies, fail and done reply, die ends, garbage answers something else, log
// writes an error into the log, hang does nothing until nobody listens, leave starts a
// process that keeps CRIU's socket and output; its number is in the file "left".
const playEnv = "NFCF_TEST_PLAY_CRIU"

func init() {
	script := os.Getenv(playEnv)
	if script == "" || len(os.Args) < 3 || os.Args[1] != "swrk" {
		return
	}
	sk := os.NewFile(socketFD, "criu")
	buf := make([]byte, 64<<10)
	n, _ := sk.Read(buf)
	var req rpc.CriuReq
	if err := req.UnmarshalVT(buf[:n]); err != nil {
		os.Exit(3)
	}
	say := func(r *rpc.CriuResp) {
		b, _ := r.MarshalVT()
		_, _ = sk.Write(b)
	}
	ok := true
	work := fmt.Sprintf("/proc/%d/fd/%d/", os.Getppid(), req.GetOpts().GetWorkDirFd())
	for _, word := range strings.Fields(script) {
		switch word {
		case "die":
			fmt.Println("rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted")
			fmt.Println("something else")
			os.Exit(7)
		case "garbage":
			_, _ = sk.Write([]byte("\xff\xff\xff\xff"))
		case "hang":
			_, _ = sk.Read(buf)
			os.Exit(8)
		case "leave":
			child := exec.Command("sleep", "1000")
			child.Stdout, child.ExtraFiles = os.Stdout, []*os.File{sk}
			if err := child.Start(); err != nil {
				os.Exit(3)
			}
			_ = os.WriteFile(work+"left", []byte(fmt.Sprint(child.Process.Pid)), 0o600)
		case "log":
			path := work + req.GetOpts().GetLogFile()
			_ = os.WriteFile(path, []byte("(00.1) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: EPERM\n(00.2) 7: Error (criu/x.c:9): the telling line\n(00.3) Error (criu/y.c:1): what follows\n"), 0o600)
		case "done", "fail":
			say(&rpc.CriuResp{Type: req.GetType().Enum(), Success: ptr(word == "done" && ok), CrErrmsg: ptr("")})
		default:
			notify := &rpc.CriuNotify{Script: ptr(word)}
			if word == PostRestore {
				notify.Pid = ptr[int32](4711)
			}
			say(&rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: ptr(true), Notify: notify})
			n, err := sk.Read(buf)
			if err != nil || n == 0 {
				os.Exit(8) // nobody answers
			}
			var answer rpc.CriuReq
			ok = answer.UnmarshalVT(buf[:n]) == nil && answer.GetNotifySuccess() && ok
		}
	}
	os.Exit(0)
}

// play is a run of that CRIU, and what it notifies.
func play(t *testing.T, script string, refuse error) (r Run, seen *[]string) {
	t.Helper()
	t.Setenv(playEnv, script)
	seen = new([]string)
	dir := t.TempDir()
	return Run{Command: os.Args[0], Images: dir, Work: dir, Log: "it.log", Notify: func(action string, pid int) error {
		*seen = append(*seen, fmt.Sprint(action, " ", pid))
		if action == PostDump {
			return refuse
		}
		return nil
	}}, seen
}

func TestRun(t *testing.T) {
	refusal := errors.New("it does not agree")
	for name, c := range map[string]struct {
		script string
		refuse error
		want   string // in the error, "" for none
		seen   []string
	}{
		"goes well":            {"pre-dump post-dump done", nil, "", []string{"pre-dump 0", "post-dump 0"}},
		"refused":              {"pre-dump post-dump done", refusal, refusal.Error(), []string{"pre-dump 0", "post-dump 0"}},
		"fails":                {"pre-dump log fail", nil, "criu dump failed: the telling line (its log is ", []string{"pre-dump 0"}},
		"fails without a word": {"fail", nil, "it gave no reason (its log is ", nil},
		"dies":                 {"pre-dump die", nil, "it ended (exit status 7): something else", []string{"pre-dump 0"}},
		"ends without answer":  {"pre-dump", nil, "it ended without an answer", []string{"pre-dump 0"}},
		"garbage":              {"garbage", nil, "criu dump failed", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, seen := play(t, c.script, c.refuse)
			err := r.Dump(t.Context(), DumpOptions{PID: 1})
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if c.refuse != nil && !errors.Is(err, c.refuse) {
				t.Errorf("%v is not what refused it", err)
			}
			if !slices.Equal(*seen, c.seen) {
				t.Errorf("notified %q, want %q", *seen, c.seen)
			}
		})
	}
}

// At a restore CRIU tells the number of the root task, and is told nothing new behind
// that: it goes on whatever it is told.
func TestRunRestore(t *testing.T) {
	r, seen := play(t, "pre-restore post-restore pre-resume done", nil)
	if err := r.Restore(t.Context()); err != nil || !slices.Equal(*seen, []string{"pre-restore 0", "post-restore 4711", "pre-resume 0"}) {
		t.Errorf("%v, %q", err, *seen)
	}
}

// A caller that gives up refuses the next step that can be refused, and waits for CRIU's
// end: killed, it would take the task with it.
func TestRunCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator has had enough")
	r, _ := play(t, "pre-dump post-dump log done", nil)
	r.Notify = func(action string, _ int) error {
		if action == PreDump {
			cancel(why)
		} else {
			t.Errorf("notified of %s", action)
		}
		return nil
	}
	if err := r.Dump(ctx, DumpOptions{PID: 1}); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(r.Work, r.Log)); err != nil {
		t.Errorf("it was not let come to its end: %v", err)
	}
}

// A CRIU that hangs before it has notified of anything has done nothing, and ends with its
// caller; one that notifies of nothing comes to its end.
func TestRunAborted(t *testing.T) {
	why := errors.New("the operator has had enough")
	for name, do := range map[string]func(Run, context.Context) error{
		"dump":    func(r Run, ctx context.Context) error { return r.Dump(ctx, DumpOptions{PID: 1}) },
		"restore": Run.Restore,
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		r, seen := play(t, "hang", nil)
		r.Start = func(cmd *exec.Cmd) error {
			defer cancel(why)
			return cmd.Start()
		}
		if err := do(r, ctx); !errors.Is(err, why) || err.Error() != why.Error() || len(*seen) > 0 {
			t.Errorf("%s: %v, notified %q", name, err, *seen)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	r, _ := play(t, "done", nil)
	if err := r.PreDump(ctx, DumpOptions{PID: 1}); err != nil {
		t.Errorf("pre-dump: %v", err)
	}
}

// What CRIU leaves behind keeps its socket and its output: its own end counts.
func TestRunLeaves(t *testing.T) {
	r, _ := play(t, "pre-restore leave die", nil)
	err := r.Restore(t.Context())
	if err == nil || !strings.Contains(err.Error(), "it ended (exit status 7): something else") {
		t.Errorf("%v", err)
	}
	b, err := os.ReadFile(filepath.Join(r.Work, "left"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Error(err)
	}
}

func TestRunDoesNotStart(t *testing.T) {
	r, _ := play(t, "done", nil)
	r.Command = filepath.Join(t.TempDir(), "none")
	if err := r.Dump(t.Context(), DumpOptions{PID: 1}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	r, _ = play(t, "done", nil)
	failed := errors.New("no namespace")
	r.Start = func(*exec.Cmd) error { return failed }
	if err := r.Restore(t.Context()); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	r.Images = filepath.Join(r.Images, "none")
	if err := r.Restore(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// TestEndRepair: a socket that is left in repair mode works again.
func TestEndRepair(t *testing.T) {
	testnet.RequireRoot(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	// Another process has it.
	cmd := exec.Command("cat")
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	if err := unix.SetsockoptInt(int(f.Fd()), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		t.Fatal(err)
	}
	if n, err := EndRepair(cmd.Process.Pid); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if on, err := unix.GetsockoptInt(int(f.Fd()), unix.IPPROTO_TCP, unix.TCP_REPAIR); on != 0 || err != nil {
		t.Errorf("repair mode %d, %v", on, err)
	}
	if n, err := EndRepair(cmd.Process.Pid); n != 0 || err != nil {
		t.Errorf("again: %d, %v", n, err)
	}
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := syscall.Write(int(f.Fd()), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := far.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := EndRepair(1 << 22); n != 0 || err != nil {
		t.Errorf("of no process: %d, %v", n, err)
	}
}
