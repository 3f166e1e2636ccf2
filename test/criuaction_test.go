package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// caller calls CRIU itself, with ckptctl criu-action as its action script.
type caller struct {
	t       *testing.T
	n       *harness.Node
	script  string
	images  string
	actions string // what the script has said
}

// callerUp is a node with a running Redis and n clients, and somebody who calls CRIU.
func callerUp(t *testing.T, o harness.Options, n int, mix ...clients.KeepAlive) (*caller, *clients.Load) {
	t.Helper()
	if len(o.Apps) == 0 {
		a := harness.Redis("redis", vip) // whatever its engine
		a.Before = nil
		o.Apps = []harness.App{a}
	}
	node, load := redisUp(t, withCRIU(t, o), n, mix...)
	return newCaller(t, node), load
}

func newCaller(t *testing.T, n *harness.Node) *caller {
	t.Helper()
	c := &caller{t: t, n: n, script: n.Path("action"), images: n.Path("images"), actions: n.Path("log", "action.log")}
	c.write("")
	return c
}

// write makes the script; first is run before ckptctl.
func (c *caller) write(first string) {
	c.t.Helper()
	must(c.t, os.WriteFile(c.script, []byte("#!/bin/sh\n"+first+"\nexec "+c.ckptctl()+"\n"), 0o755))
}

// ckptctl is the line of the script that matters.
func (c *caller) ckptctl() string {
	return fmt.Sprintf("%s --node %s criu-action >>%s 2>&1", c.n.Program("ckptctl"), c.n.Path("node.toml"), c.actions)
}

// read gives what the logs of a name hold.
func (c *caller) read(name string) string {
	c.t.Helper()
	files, err := filepath.Glob(c.n.Path("log", "*"+name+".log"))
	must(c.t, err)
	var all []byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		must(c.t, err)
		all = append(all, b...)
	}
	return string(all)
}

// command is a call of CRIU in the node's namespace.
func (c *caller) command(args ...string) *exec.Cmd {
	c.t.Helper()
	command, err := criuCommand()
	must(c.t, err)
	args = append([]string{args[0], "-D", c.images, "-o", c.n.Path("log", "criu.log"), "-v4", "--tcp-established", "--network-lock", "skip", "--action-script", c.script}, args[1:]...)
	return c.n.Net.Node().Command(command, args...)
}

func (c *caller) pid(comm string) string {
	c.t.Helper()
	pids, err := c.n.Processes(comm)
	must(c.t, err)
	if len(pids) != 1 {
		c.t.Fatalf("%s runs as %v", comm, pids)
	}
	return strconv.Itoa(pids[0])
}

// dump calls criu dump, with further arguments.
func (c *caller) dump(more ...string) error {
	c.t.Helper()
	must(c.t, os.RemoveAll(c.images))
	must(c.t, os.MkdirAll(c.images, 0o700))
	return c.run(c.command(append([]string{"dump", "-t", c.pid("redis-server")}, more...)...))
}

// restore calls criu restore.
func (c *caller) restore(more ...string) error {
	c.t.Helper()
	return c.run(c.command(append([]string{"restore", "-d", "--pidfile", filepath.Join(c.images, "pid")}, more...)...))
}

func (c *caller) run(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	return nil
}

// stays checks that the application runs on with its clients.
func (c *caller) stays(load *clients.Load, pid string) {
	c.t.Helper()
	must(c.t, c.n.WaitState("redis", "RESTORED", reply))
	if now := c.pid("redis-server"); now != pid {
		c.t.Errorf("it ran as %s and now as %s", pid, now)
	}
	rounds(c.t, load, 3)
}

// holds checks that the application is away and comes back with its clients.
func (c *caller) holds(load *clients.Load, d time.Duration) {
	c.t.Helper()
	must(c.t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	held(c.t, c.n, "redis", "redis-server", load, d)
	must(c.t, c.restore())
	must(c.t, c.n.WaitState("redis", "RESTORED", reply))
	rounds(c.t, load, 2)
}

// TestCRIUAction: what somebody else dumps and restores keeps its clients, as often as
// he likes. Nobody but he can restore it.
func TestCRIUAction(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "action"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	for range 3 {
		rounds(t, load, 2)
		must(t, c.dump())
		c.holds(load, strictHold)
	}
	must(t, c.dump())
	must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	r := c.n.Ctl("restore", "redis")
	if want := "were written by CRIU to " + c.images; r.Code != 1 || !strings.Contains(r.Stderr, want) {
		t.Errorf("restore by the agent: %+v", r)
	}
	done := make(chan error, 1)
	go func() { done <- load.Clients[0].Command(2 * reply) }() // it wakes
	asked := func() string { return c.n.Ctl("status").Stderr }
	must(t, harness.Wait(reply, "the status tells who can restore it", func() bool { return strings.Contains(asked(), c.images) }))
	if n := strings.Count(c.read("agent"), "a client waits for an application"); n != 1 {
		t.Errorf("the agent has logged %d times that it cannot restore it", n)
	}
	must(t, c.restore())
	must(t, <-done)
	rounds(t, load, 2)
	if said := asked(); strings.Contains(said, c.images) {
		t.Errorf("restored, the status still tells %q", said)
	}
	must(t, clients.Summary(load.Idle()))
	unnoticed()
}

// TestCRIUActionCancelled: a dump whose connections cannot be held is cancelled, and the
// application runs on.
func TestCRIUActionCancelled(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "cancel"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	pid := c.pid("redis-server")
	refuses := func(what, why string, more ...string) {
		t.Helper()
		must(t, os.WriteFile(c.actions, nil, 0o600))
		if err := c.dump(more...); err == nil {
			t.Errorf("%s: the dump succeeds", what)
		}
		if said := c.read("action"); !strings.Contains(said, why) {
			t.Errorf("%s: the script says %q", what, said)
		}
	}
	refuses("CRIU's own lock", "--network-lock skip", "--network-lock", "nftables")
	c.stays(load, pid)

	// A client whose connection the application has not accepted has said something.
	number, err := strconv.Atoi(pid)
	must(t, err)
	must(t, syscall.Kill(number, syscall.SIGSTOP))
	late, err := clients.DialRaw(c.n.Dial, at(6379))
	must(t, err)
	defer late.Close()
	_, err = late.Write([]byte("PING\r\n"))
	must(t, err)
	refuses("what was not accepted", "has not accepted it", "--skip-in-flight")
	must(t, syscall.Kill(number, syscall.SIGCONT))
	must(t, late.Exchange(nil, []byte("+PONG\r\n")))
	c.stays(load, pid)

	// The agent is away.
	must(t, c.n.Agent.Stop(5*time.Second))
	refuses("without an agent", "the agent cannot be reached")
	must(t, c.n.StartAgent())
	c.stays(load, pid)
	must(t, c.dump())
	c.holds(load, 0)
	unnoticed()
}

// TestCRIUActionDumpFails: CRIU fails or is killed, and calls for nothing any more.
func TestCRIUActionDumpFails(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "fails"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	pid := c.pid("redis-server")
	for what, first := range map[string]string{
		"killed at post-dump": "[ $CRTOOLS_SCRIPT_ACTION = post-dump ] && kill -9 $PPID && exit 1",
		"killed at pre-dump":  "[ $CRTOOLS_SCRIPT_ACTION = pre-dump ] && (" + c.ckptctl() + "; kill -9 $PPID) && exit 1",
		"killed behind us":    "[ $CRTOOLS_SCRIPT_ACTION = post-dump ] && (" + c.ckptctl() + "; kill -9 $PPID) && exit 1",
		"given up behind us":  "[ $CRTOOLS_SCRIPT_ACTION = post-dump ] && " + c.ckptctl() + " && exit 1",
	} {
		t.Logf("%s", what)
		c.write(first)
		if err := c.dump(); err == nil {
			t.Errorf("%s: the dump succeeds", what)
		}
		c.stays(load, pid)
	}
	c.write("")
	must(t, c.dump())
	c.holds(load, 0)
	unnoticed()
}

// TestCRIUActionLeaveRunning: a dump that lets the application run on takes nothing from
// its clients.
func TestCRIUActionLeaveRunning(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "leave"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	pid := c.pid("redis-server")
	for range 3 {
		must(t, c.dump("--leave-running"))
		c.stays(load, pid)
	}
	if r := c.n.Ctl("-o", "json", "snapshots", "redis"); strings.Contains(r.Stdout, "engine") {
		t.Errorf("a snapshot is stored: %s", r.Stdout)
	}
	must(t, c.dump())
	c.holds(load, 0)
	unnoticed()
}

// TestCRIUActionRestoreFails: a restore that fails leaves the clients held, and can be
// tried again.
func TestCRIUActionRestoreFails(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "refail"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	must(t, c.dump())
	must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	fails := func(what, first string) {
		t.Helper()
		t.Logf("%s", what)
		c.write(first)
		if err := c.restore(); err == nil {
			t.Errorf("%s: the restore succeeds", what)
		}
		must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
		held(t, c.n, "redis", "redis-server", load, time.Second)
		c.write("")
	}
	fails("given up at post-restore", "[ $CRTOOLS_SCRIPT_ACTION = post-restore ] && exit 1")
	fails("given up behind us", "[ $CRTOOLS_SCRIPT_ACTION = post-restore ] && "+c.ckptctl()+" && exit 1")
	pages := filepath.Join(c.images, "pages-1.img")
	must(t, os.Rename(pages, pages+".away"))
	fails("an image is missing", "")
	must(t, os.Rename(pages+".away", pages))
	c.holds(load, 0)
	unnoticed()
}

// TestCRIUActionAgentDies: an agent that is killed in the middle is followed by one that
// looks what CRIU has made of it.
func TestCRIUActionAgentDies(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "agentdies"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	pid := c.pid("redis-server")
	doom := func(phase string) {
		t.Helper()
		t.Logf("criu/%s", phase)
		must(t, c.n.Agent.Stop(5*time.Second))
		must(t, c.n.StartDoomedAgent("criu/"+phase))
	}
	next := func() {
		t.Helper()
		must(t, harness.Wait(reply, "the agent is killed", func() bool { return !c.n.Agent.Running() }))
		must(t, c.n.StartAgent())
	}
	for _, phase := range []string{"announce", "freeze", "dump", "compare", "seal", "kill"} {
		doom(phase)
		if err := c.dump(); err == nil {
			t.Errorf("%s: the dump succeeds", phase)
		}
		next()
		if phase != "announce" {
			c.stays(load, pid)
		}
		rounds(t, load, 2)
	}
	for _, phase := range []string{"store", "hold"} {
		doom(phase)
		must(t, c.dump())
		next()
		c.holds(load, 0)
	}
	for _, phase := range []string{"announce", "clear", "sockets", "open"} {
		must(t, c.dump())
		must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
		doom(phase)
		err := c.restore()
		next()
		if phase != "open" { // CRIU goes on whatever becomes of pre-resume
			if err == nil {
				t.Errorf("%s: the restore succeeds", phase)
			}
			c.holds(load, 0)
		}
		must(t, c.n.WaitState("redis", "RESTORED", reply))
		rounds(t, load, 2)
	}
	unnoticed()
}

// TestCRIUActionAgentReturns: an agent that comes back while CRIU still runs goes on.
func TestCRIUActionAgentReturns(t *testing.T) {
	c, load := callerUp(t, harness.Options{Name: "returns"}, 50, clients.Mixed...)
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	at, on := c.n.Path("at"), c.n.Path("on")
	killed := func(action string, f func(...string) error) {
		t.Helper()
		t.Logf("%s", action)
		c.write(fmt.Sprintf("[ $CRTOOLS_SCRIPT_ACTION = %s ] && { touch %s; while [ ! -e %s ]; do sleep 0.01; done; rm %[2]s %[3]s; }", action, at, on))
		done := make(chan error, 1)
		go func() { done <- f() }()
		must(t, harness.Wait(reply, "CRIU comes to "+action, func() bool { _, err := os.Stat(at); return err == nil }))
		c.n.Agent.Kill()
		must(t, c.n.StartAgent())
		must(t, os.WriteFile(on, nil, 0o600))
		must(t, <-done)
		c.write("")
	}
	killed("post-dump", c.dump)
	must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	held(t, c.n, "redis", "redis-server", load, time.Second)
	for _, action := range []string{"post-restore", "pre-resume"} {
		killed(action, c.restore)
		must(t, c.n.WaitState("redis", "RESTORED", reply))
		rounds(t, load, 2)
		must(t, c.dump())
		must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	}
	c.holds(load, 0)
	unnoticed()
}
