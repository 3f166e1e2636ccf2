package checkpoint

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// doctorCRIU has a real CRIU dump every process that doctor has judged: what is
// dumped must have no fault of those that a dump shows.
var doctorCRIU = flag.String("doctor-criu", "", "dump each process of the doctor's tests with this `COMMAND`, too, and compare")

// patientEnv makes the test binary play a program with the ailment of that name.
const patientEnv = "CHECKPOINT_TEST_PATIENT"

// tracing is a program that traces the outside process. It is not the test,
// whose waits for its children would take their stops for their ends.
const tracing = "tracing"

func init() {
	if name := os.Getenv(patientEnv); name != "" {
		play := ailments[name].play
		if name == tracing {
			play = func() (any, error) {
				runtime.LockOSThread()
				pid, err := strconv.Atoi(outside())
				return nil, errors.Join(err, unix.PtraceSeize(pid))
			}
		}
		kept, err := play()
		if err == nil {
			err = os.Mkdir("ready", 0o755) // a file would be open for a moment
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, name, err)
			os.Exit(1)
		}
		time.Sleep(time.Hour)
		runtime.KeepAlive(kept)
	}
}

// ailment is something that a program does, and what doctor says of it.
type ailment struct {
	play  func() (any, error)
	check string // of the finding; "": there is none
	level string
	what  string
	// restart is the level with the restart engine; "": it does not matter.
	restart string
	// dumps: CRIU dumps it all the same, and what comes back is not whole.
	dumps bool
}

func syscallFD(nr uintptr, args ...uintptr) (any, error) {
	args = append(args, 0, 0, 0)
	fd, _, errno := unix.Syscall(nr, args[0], args[1], args[2])
	if errno != 0 {
		return nil, errno
	}
	return fd, nil
}

// listenRaw is a listener that accepts nothing by itself, without MPTCP.
func listenRaw(prepare func(fd int) error) (any, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, &unix.SockaddrInet4{Addr: testVIP.As4(), Port: 6379}))
	if prepare != nil {
		err = errors.Join(err, prepare(fd))
	}
	return fd, errors.Join(err, unix.Listen(fd, 16))
}

// large makes a file that is larger than CRIU keeps of a deleted one.
func large(name string) (*os.File, error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(make([]byte, 2*ghostLimit))
	return f, err
}

// outside opens what the test holds itself.
func outside() string { return os.Getenv(patientEnv + "_OUTSIDE") }

var ailments = map[string]ailment{
	"none": {play: func() (any, error) {
		log, err := os.OpenFile("log", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp4", "192.0.2.100:6379")
		if err != nil {
			return nil, err
		}
		r, w, err := os.Pipe()
		go func() {
			c, _ := l.Accept()
			_, _ = io.Copy(c, c)
		}()
		small, serr := os.Create("small")
		return []any{log, l, r, w, small}, errors.Join(err, serr, os.Remove("small"))
	}},
	"deleted": {check: "deleted", level: levelFault, what: "gone, which was deleted", play: func() (any, error) {
		f, err := large("gone")
		return f, errors.Join(err, os.Remove("gone"))
	}},
	"deleted mapping": {check: "deleted", level: levelFault, what: "in the memory of", play: func() (any, error) {
		f, err := large("gone")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		return m, errors.Join(err, os.Remove("gone"))
	}},
	"deleted link": {check: "deleted", level: levelFault, what: "while it has another one", play: func() (any, error) {
		f, err := os.Create("gone")
		return f, errors.Join(err, os.Link("gone", "other"), os.Remove("gone"))
	}},
	"written": {check: "file", level: levelWarning, what: "1 files are open for writing", play: func() (any, error) {
		return os.OpenFile("data", os.O_RDWR|os.O_CREATE, 0o644)
	}},
	"lock": {check: "lock", level: levelWarning, what: "holds a lock on", play: func() (any, error) {
		f, err := os.OpenFile("lock", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		return f, unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}},
	"pipe": {check: "pipe", level: levelFault, what: "that process " + strconv.Itoa(os.Getpid()), dumps: true, play: func() (any, error) {
		return os.OpenFile(outside(), os.O_WRONLY, 0)
	}},
	"packets": {check: "pipe", level: levelFault, what: "packet mode", play: func() (any, error) {
		var p [2]int
		return p, unix.Pipe2(p[:], unix.O_DIRECT)
	}},
	"terminal": {check: "terminal", level: levelFault, what: "whose other end is outside", play: func() (any, error) {
		return os.OpenFile(outside(), os.O_RDWR|unix.O_NOCTTY, 0)
	}},
	"unix": {check: "unix", level: levelFault, what: "to process " + strconv.Itoa(os.Getpid()), play: func() (any, error) {
		return net.Dial("unix", outside())
	}},
	"mptcp": {check: "mptcp", level: levelFault, restart: levelWarning, what: "192.0.2.100:6379", play: func() (any, error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(true)
		return lc.Listen(context.Background(), "tcp", "192.0.2.100:6379")
	}},
	"backlog": {check: "backlog", level: levelWarning, what: "1 connections to 192.0.2.100:6379", play: func() (any, error) { return listenRaw(nil) }},
	"defer": {check: "defer-accept", level: levelNote, restart: levelWarning, what: "192.0.2.100:6379", play: func() (any, error) {
		return listenRaw(func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30) })
	}},
	"md5": {check: "md5", level: levelFault, restart: levelFault, what: "keys of TCP-MD5", dumps: true, play: func() (any, error) {
		return listenRaw(func(fd int) error {
			key := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}, Keylen: 3, Key: [80]byte{1, 2, 3}}
			copy(key.Addr.Data[2:], []byte{198, 51, 100, 7}) // behind the port
			return unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key)
		})
	}},
	"vsock": {check: "socket", level: levelFault, what: "address family 40", play: func() (any, error) { return unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) }},
	"io_uring": {check: "io_uring", level: levelFault, play: func() (any, error) {
		var params [120]byte // struct io_uring_params
		return syscallFD(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params)))
	}},
	"bpf": {check: "descriptor", level: levelFault, what: "anon_inode:bpf-map", play: func() (any, error) {
		attr := [32]uint32{unix.BPF_MAP_TYPE_ARRAY, 4, 4, 1}
		return syscallFD(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}},
	"pidfd": {check: "descriptor", level: levelFault, what: "stands for process " + strconv.Itoa(os.Getpid()), play: func() (any, error) {
		return unix.PidfdOpen(os.Getppid(), 0)
	}},
	"device": {check: "device", level: levelFault, what: "/dev/fuse (10:229)", play: func() (any, error) { return os.OpenFile("/dev/fuse", os.O_RDWR, 0) }},
	"mqueue": {check: "file", level: levelFault, what: "mounted nowhere", play: func() (any, error) {
		name, _ := unix.BytePtrFromString("nfconnfilter-doctor")
		fd, _, errno := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(name)), unix.O_RDWR|unix.O_CREAT, 0o600, 0, 0, 0)
		if errno != 0 {
			return nil, errno
		}
		_, _, errno = unix.Syscall(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(name)), 0, 0)
		if errno != 0 {
			return nil, errno
		}
		return fd, nil
	}},
	"inotify": {check: "inotify", level: levelFault, what: "a file of proc", play: func() (any, error) {
		fd, err := unix.InotifyInit1(0)
		if err != nil {
			return nil, err
		}
		_, err = unix.InotifyAddWatch(fd, "/proc", unix.IN_CREATE)
		return fd, err
	}},
	"shm": {check: "shm", level: levelFault, play: func() (any, error) {
		id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 8192, unix.IPC_CREAT|0o600)
		if err != nil {
			return nil, err
		}
		m, err := unix.SysvShmAttach(id, 0, 0)
		_, rerr := unix.SysvShmCtl(id, unix.IPC_RMID, nil) // goes with the process
		return m, errors.Join(err, rerr)
	}},
	"thread": {check: "namespace", level: levelFault, what: "these threads are in another network namespace", dumps: true, play: func() (any, error) {
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			done <- unix.Unshare(unix.CLONE_NEWNET)
			select {}
		}()
		return nil, <-done
	}},
	"child": {check: "namespace", level: levelFault, what: "is in another ipc namespace", play: func() (any, error) {
		cmd := exec.Command("/bin/sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWIPC}
		return cmd, cmd.Start()
	}},
	"orphan": {check: "tree", level: levelFault, what: "is no descendant of", dumps: true, play: func() (any, error) {
		return nil, exec.Command("/bin/sh", "-c", "sleep 1000 >/dev/null 2>&1 </dev/null &").Run()
	}},
}

// ward is where the programs run.
type ward struct {
	a      *agent
	app    *config.App
	net    *testnet.Net
	launch *osLauncher
}

func newWard(t *testing.T) *ward {
	testnet.RequireRoot(t)
	for _, fd := range namesIn("/proc/self/fd") { // what the caller has left open goes to no program
		if n, err := strconv.Atoi(fd); err == nil && n > 2 {
			unix.CloseOnExec(n)
		}
	}
	n := testnet.New(t, testnet.Options{Name: "doctor"})
	_, a := newWorld(t, 0)
	app := a.cfg.Apps["redis"]
	app.Process.Namespace = n.Node().Path()
	app.Process.Start = []string{try1(os.Executable())}
	w := &ward{a: a, app: app, net: n, launch: &osLauncher{stateDir: t.TempDir(), log: a.log}}
	t.Cleanup(w.launch.children.Wait)
	a.launch = w.launch
	a.addrs = osAddresses{log: a.log}
	a.openSockets = func(ns string) (sockets, error) { return sockdiag.OpenIn(namespacePath(ns)) }
	a.cfg.Node.CRIU.Command = fakeCRIU(t, "4.2.1", "")
	try(t, n.Node().AddAddr("eth0", "192.0.2.100/32"))
	try(t, n.Client().AddRoute(testnet.Iface, "192.0.2.100/32", n.NodeAddr()))
	return w
}

func try1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fakeCRIU is a command that answers as CRIU does; check fails with fault.
func fakeCRIU(t *testing.T, version, fault string) string {
	path := filepath.Join(t.TempDir(), "criu")
	writeFile(t, path, "#!/bin/sh\ncase \"$*\" in\n--version) echo Version: "+version+";;\n*mem_dirty_track) echo 'Warn  (criu/cr-check.c:824): Dirty tracking is OFF.' >&2; exit 1;;\n"+
		"check) [ -z '"+fault+"' ] || { echo 'Error (criu/cr-check.c:1): "+fault+"' >&2; exit 1; };;\nesac\n")
	return path
}

// admit starts a program and waits until it has what ails it.
func (w *ward) admit(t *testing.T, name, outside string) *osProcess {
	t.Helper()
	dir := t.TempDir()
	w.app.Process.WorkingDirectory = dir
	w.app.Process.Environment = []string{patientEnv + "=" + name, patientEnv + "_OUTSIDE=" + outside, "GODEBUG=multipathtcp=0"}
	p := startShell(t, w.launch, w.app)
	w.a.setProcess("redis", p)
	t.Cleanup(func() { w.a.setProcess("redis", nil) })
	within(t, name+" is there: "+w.launch.logPath(w.app), func() bool {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return err == nil
	})
	return p
}

func (w *ward) examine(t *testing.T, engine string) []*pb.Finding {
	t.Helper()
	w.app.Checkpoint.Engine = engine
	r, err := w.a.Doctor(t.Context(), connect.NewRequest(&pb.AgentDoctorRequest{App: "redis"}))
	if err != nil {
		t.Fatal(err)
	}
	return r.Msg.Findings
}

// chronic are findings that every application has.
func chronic(f *pb.Finding) bool {
	return f.Level == levelNote && (f.Check == "pid" || f.Check == "file" || f.Check == "memory")
}

func wantFindings(t *testing.T, engine, level, check, what string, got []*pb.Finding) {
	t.Helper()
	found := false
	for _, f := range got {
		switch {
		case level != "" && f.Level == level && f.Check == check && strings.Contains(f.What, what) && f.Remedy != "":
			found = true
		case !chronic(f):
			t.Errorf("engine %s: nothing calls for %v", engine, f)
		}
	}
	if !found && level != "" {
		t.Errorf("engine %s: no %s %s with %q in %v", engine, level, check, what, got)
	}
}

// Every finding, provoked by a program that does it, and a program that has
// files, pipes, a small deleted file, a listener and a client, and no finding.
func TestDoctorFinds(t *testing.T) {
	w := newWard(t)
	r, pw, err := os.Pipe()
	try(t, err)
	defer r.Close()
	defer pw.Close()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	try(t, err)
	defer master.Close()
	try(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	pts, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	try(t, err)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "sock"))
	try(t, err)
	defer l.Close()
	outside := map[string]string{
		"pipe":     fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pw.Fd()),
		"terminal": fmt.Sprintf("/dev/pts/%d", pts),
		"unix":     l.Addr().String(),
	}
	names := make([]string, 0, len(ailments))
	for name := range ailments {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		ill := ailments[name]
		t.Run(name, func(t *testing.T) {
			p := w.admit(t, name, outside[name])
			switch name {
			case "unix":
				c, err := l.Accept()
				try(t, err)
				defer c.Close()
			case "backlog", "none":
				c, err := w.net.Client().Dial("tcp", "192.0.2.100:6379")
				try(t, err)
				defer c.Close()
			}
			got := w.examine(t, config.EngineCRIU)
			wantFindings(t, config.EngineCRIU, ill.level, ill.check, ill.what, got)
			wantFindings(t, config.EngineRestart, ill.restart, ill.check, ill.what, w.examine(t, config.EngineRestart))
			compareDump(t, p, ill, got)
		})
	}
}

// compareDump asks CRIU itself.
func compareDump(t *testing.T, p *osProcess, ill ailment, got []*pb.Finding) {
	if *doctorCRIU == "" {
		return
	}
	dir := t.TempDir()
	out, err := exec.Command(*doctorCRIU, "dump", "-t", strconv.Itoa(p.rec.PID), "-D", dir, "--leave-running",
		"--tcp-established", "--network-lock", "skip", "--file-locks").CombinedOutput()
	faulty := slices.ContainsFunc(got, func(f *pb.Finding) bool { return f.Level == levelFault || f.Check == "backlog" })
	if failed := err != nil; failed != (faulty && !ill.dumps) {
		t.Errorf("CRIU: %v, and the doctor found %v\n%s", err, got, out)
	}
}

// What a program does not do itself: it is traced, was not started as the
// leader of a session, or speaks with another one on this node.
func TestDoctorSurroundings(t *testing.T) {
	w := newWard(t)
	p := w.admit(t, "none", "")
	self, err := os.Executable()
	try(t, err)
	tracer := exec.Command(self)
	tracer.Dir = t.TempDir()
	tracer.Env = append(os.Environ(), patientEnv+"="+tracing, patientEnv+"_OUTSIDE="+strconv.Itoa(p.rec.PID))
	try(t, tracer.Start())
	defer func() { _, _ = tracer.Process.Kill(), tracer.Wait() }()
	within(t, "it is traced", func() bool {
		_, err := os.Stat(filepath.Join(tracer.Dir, "ready"))
		return err == nil
	})
	wantFindings(t, config.EngineCRIU, levelFault, "tracer", "is traced by process", w.examine(t, config.EngineCRIU))
	try(t, tracer.Process.Kill())
	_ = tracer.Wait() // killed, and with it the trace is gone
	wantFindings(t, config.EngineCRIU, "", "", "", w.examine(t, config.EngineCRIU))

	cmd := exec.Command("/bin/sleep", "1000") // in the test's own session
	try(t, startIn(w.app.Process.Namespace, cmd))
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	st, err := readStat(cmd.Process.Pid)
	try(t, err)
	w.a.setProcess("redis", &osProcess{rec: record{PID: st.pid, StartTime: st.start}})
	got := w.examine(t, config.EngineCRIU)
	wantFindings(t, config.EngineCRIU, levelFault, "session", "does not lead its session", got)
	compareDump(t, &osProcess{rec: record{PID: st.pid}}, ailment{}, got)

	// Another user's limits are the business of CAP_SYS_RESOURCE, which root may
	// lack inside a container.
	stranger := shellApp("exec sleep 1000")
	stranger.Process.Namespace, stranger.Process.User, stranger.Process.WorkingDirectory = w.app.Process.Namespace, "nobody", "/"
	other := startShell(t, w.launch, stranger)
	w.a.setProcess("redis", other)
	caps := [2]unix.CapUserData{}
	try(t, unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]))
	level := levelFault
	if caps[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		level = ""
	}
	got = w.examine(t, config.EngineCRIU)
	wantFindings(t, config.EngineCRIU, level, "privilege", "runs as another user", got)
	compareDump(t, other, ailment{}, got)

	w.a.setProcess("redis", p)
	c, err := w.net.Node().Dial("tcp", "192.0.2.100:6379")
	try(t, err)
	defer c.Close()
	within(t, "it is accepted", func() bool {
		return !slices.ContainsFunc(w.examine(t, config.EngineCRIU), func(f *pb.Finding) bool { return f.Check == "backlog" })
	})
	for _, engine := range []string{config.EngineCRIU, config.EngineRestart} {
		wantFindings(t, engine, levelWarning, "same-host", "1 connections are within this node", w.examine(t, engine))
	}

	w.app.Process.Namespace = w.net.Client().Path()
	wantFindings(t, config.EngineRestart, levelFault, "namespace", "runs in another network namespace", w.examine(t, config.EngineRestart))
}
