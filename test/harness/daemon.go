package harness

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

var daemonCount atomic.Int32

// Daemon is a running program of the node.
type Daemon struct {
	Name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when the process has ended
	err  error         // how; valid once done is closed
}

// PID is the process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Running tells whether the process lives.
func (d *Daemon) Running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Log is what the daemon has written so far.
func (d *Daemon) Log() string {
	b, _ := os.ReadFile(d.log)
	return string(b)
}

// Kill ends the process with SIGKILL and waits for its end.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.done
}

// Signal sends a signal.
func (d *Daemon) Signal(s os.Signal) error { return d.cmd.Process.Signal(s) }

// Stop ends the process with SIGTERM and, when it takes longer than grace,
// with SIGKILL, which is an error.
func (d *Daemon) Stop(grace time.Duration) error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return nil
	case <-time.After(grace):
		d.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM", d.Name, grace)
	}
}

// start runs a program inside the node namespace with its output in a log.
func (n *Node) start(name string, env []string, args ...string) (*Daemon, error) {
	log := n.Path("log", fmt.Sprintf("%02d-%s-%s.log", daemonCount.Add(1), name, args[0]))
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := &Daemon{Name: name + " " + args[0], log: log, done: make(chan struct{})}
	d.cmd = n.Net.Node().Command(n.Program(name), args...)
	if n.View != "" && args[0] == "agent" {
		d.cmd = n.Net.Node().Command("unshare", append([]string{"--mount", "--propagation", "private",
			"sh", "-ec", n.View + "\nexec \"$0\" \"$@\"", n.Program(name)}, args...)...)
	}
	d.cmd.Stdout, d.cmd.Stderr = f, f
	d.cmd.Env = append(os.Environ(), env...)
	// A Ctrl-C on the terminal is for the caller, which ends its daemons in order.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.Name, err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

// startDaemon starts a daemon and waits until it says READY=1 (sd_notify(3)).
func (n *Node) startDaemon(name, sub string, env ...string) (*Daemon, error) {
	path := n.Path(sub + ".notify")
	_ = os.Remove(path)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer notify.Close()
	d, err := n.start(name, append(env, "NOTIFY_SOCKET="+path), append([]string{sub}, n.Args()...)...)
	if err != nil {
		return nil, err
	}
	socket := n.Path("control.sock")
	if sub == "agent" {
		socket = n.Path("agent.sock")
	}
	ready := func() bool {
		_ = notify.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		buf := make([]byte, 512)
		if k, _ := notify.Read(buf); strings.Contains(string(buf[:k]), "READY=1") {
			return true
		}
		if sub != "agent" {
			return false
		}
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	err = Wait(15*time.Second, d.Name+" is ready", func() bool { return !d.Running() || ready() })
	if err == nil && !d.Running() {
		err = fmt.Errorf("%s ended at once: %v", d.Name, d.err)
	}
	if err != nil {
		d.Kill()
		text, _ := os.ReadFile(d.log)
		return nil, fmt.Errorf("%w\n%s", err, text)
	}
	return d, nil
}

// Result is what a command gave.
type Result struct {
	Args   []string
	Code   int
	Stdout string
	Stderr string
	Took   time.Duration
}

// Err is nil for exit code 0, else all that the command said.
func (r Result) Err() error {
	if r.Code == 0 {
		return nil
	}
	return fmt.Errorf("ckptctl %s: exit %d after %v\nstdout: %s\nstderr: %s",
		strings.Join(r.Args, " "), r.Code, r.Took.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Ctl runs ckptctl with the node's sockets and gathers what it says; exit code
// -1 stands for a command that could not run.
func (n *Node) Ctl(args ...string) Result { return n.CtlAs(nil, args...) }

// CtlAs is Ctl as another user; nil: as the caller.
func (n *Node) CtlAs(cred *syscall.Credential, args ...string) Result {
	var stdout, stderr strings.Builder
	full := append([]string{"--node", n.Path("node.toml")}, args...)
	cmd := n.Net.Node().Command(n.Program("ckptctl"), full...)
	if cred != nil {
		// nsenter needs root: the Unix sockets are reached from any namespace.
		cmd = exec.Command(n.Program("ckptctl"), full...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	r := Result{Args: args, Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(start)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code = -1
		r.Stderr += err.Error()
	}
	return r
}
