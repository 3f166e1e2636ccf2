// Package harness runs the two programs of this project, with real
// applications, in a pair of network namespaces: for the root tests and the
// demonstration. Everything it makes is removed by Close, and what a killed
// predecessor left is removed by Sweep.
package harness

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// App is one application of the node, as its file in apps/ describes it.
type App struct {
	Name  string
	VIP   string // one, or two joined by a comma: IPv4 and IPv6
	Ports []int
	Start []string
	// Before is the command run once connections are drained; none when empty.
	Before []string
	// Namespace gives it a network namespace of its own behind the node.
	Namespace bool
	// Head, Process and Checkpoint are further lines, before the tables and for
	// these two.
	Head, Process, Checkpoint string
}

// Options shape a Node.
type Options struct {
	// Name becomes part of the namespaces' names.
	Name string
	// Bin is the directory that holds nfconnfilter and ckptctl.
	Bin string
	// NoOffloads as in testnet.Options.
	NoOffloads bool
	// Holdpoint lets Hold stop an agent in a phase of an operation.
	Holdpoint bool
	// Failpoints lets EndAt end filter and agent at the boundaries of their effects.
	Failpoints bool
	// Scheduler, "IP:port", receives the restore requests; empty: the agent does.
	Scheduler string
	// CRIU is the command for applications with engine "criu".
	CRIU string
	// Lines are further lines of the node's file.
	Lines string
	Apps  []App
}

// Node is a node namespace with its configuration, and a client namespace.
type Node struct {
	Net    *testnet.Net
	Dir    string // holds everything: shared/, node.toml, log/, and room for the application
	Filter *Daemon
	Agent  *Daemon

	// View are shell commands that the next agent runs before it begins, in a
	// mount namespace of its own: it sees directories as no other daemon does.
	View string
	// Instead holds other programs for the next daemons: a path by a name of those
	// in Options.Bin.
	Instead map[string]string

	name   string // as cluster.toml has it
	root   string // holds shared/ and app/; Dir unless several nodes share them
	o      Options
	behind map[string]*testnet.NS
	links  map[string]int // numbers of the links to these namespaces
}

// New makes the namespaces and writes the configuration; nothing is started.
func New(o Options) (n *Node, err error) {
	n = &Node{o: o, name: "node-a", behind: map[string]*testnet.NS{}, links: map[string]int{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	// Short, because the paths of Unix sockets are limited to 107 bytes.
	if n.Dir, err = os.MkdirTemp("", dirPrefix()); err != nil {
		return n, err
	}
	n.root = n.Dir
	if err := makeDirs(n.Dir, "shared/apps", "log", "state", "app"); err != nil {
		return n, err
	}
	if n.Net, err = testnet.Setup(testnet.Options{Name: o.Name, NoOffloads: o.NoOffloads}); err != nil {
		return n, err
	}
	// IPv6 beside it.
	if err := errors.Join(n.Net.Node().AddAddr(testnet.Iface, "fd77::1/64"), n.Net.Client().AddAddr(testnet.Iface, "fd77::2/64")); err != nil {
		return n, err
	}
	if err := n.writeConfig(); err != nil {
		return n, err
	}
	return n, nil
}

func makeDirs(root string, dirs ...string) error {
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// dirPrefix names this process, so that Sweep knows whose directory it is.
func dirPrefix() string { return fmt.Sprintf("nfcf-%d-", os.Getpid()) }

// Path is a file below the node's directory.
func (n *Node) Path(elem ...string) string {
	return filepath.Join(append([]string{n.Dir}, elem...)...)
}

func (n *Node) writeConfig() error {
	cluster := ""
	if n.o.Scheduler != "" {
		host, port, err := net.SplitHostPort(n.o.Scheduler)
		if err != nil {
			return err
		}
		cluster = fmt.Sprintf("[scheduler]\naddress = %q\nport = %s\n", host, port)
	}
	if err := os.WriteFile(n.Path("shared", "cluster.toml"), []byte(cluster), 0o644); err != nil {
		return err
	}
	if err := n.writeNode(n.o.Lines); err != nil {
		return err
	}
	for _, a := range n.o.Apps {
		if err := n.WriteApp(a); err != nil {
			return err
		}
	}
	return nil
}

// writeNode writes the node's own file, with further lines.
func (n *Node) writeNode(more string) error {
	node := fmt.Sprintf(`name = %q
interface = %q
address = %q
state_dir = %q
control_socket = %q
agent_socket = %q
%s[criu]
command = %q
`, n.name, testnet.Iface, n.Net.NodeAddr(), n.Path("state"), n.Path("control.sock"), n.Path("agent.sock"), more, cmp.Or(n.o.CRIU, "criu"))
	return os.WriteFile(n.Path("node.toml"), []byte(node), 0o644)
}

// Name is the node's name in cluster.toml.
func (n *Node) Name() string { return n.name }

// WriteApp writes an application's file; "@" at the start of an argument of
// its commands stands for the node's directory, or that of all nodes.
func (n *Node) WriteApp(a App) error {
	if a.Namespace && n.behind[a.Name] == nil {
		if err := n.AddBehind(a.Name, a.VIP); err != nil {
			return err
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "name = %q\n%s\nvip = %s\ninclude_ports = %s\n", a.Name, a.Head, n.list(strings.Split(a.VIP, ",")), strings.Join(strings.Fields(fmt.Sprint(a.Ports)), ", "))
	fmt.Fprintf(&b, "[process]\nstart = %s\n%s\n", n.list(a.Start), a.Process)
	if a.Namespace {
		fmt.Fprintf(&b, "namespace = %q\n", n.namespacePath(a.Name))
	}
	b.WriteString("[checkpoint]\n")
	if len(a.Before) > 0 {
		fmt.Fprintf(&b, "before = %s\n", n.list(a.Before))
	}
	b.WriteString(a.Checkpoint + "\n")
	return os.WriteFile(filepath.Join(n.root, "shared", "apps", a.Name+".toml"), []byte(b.String()), 0o644)
}

// list writes a command as a TOML array.
func (n *Node) list(args []string) string {
	q := make([]string, len(args))
	for i, a := range args {
		if rest, ok := strings.CutPrefix(a, "@"); ok {
			a = filepath.Join(n.root, rest)
		}
		q[i] = fmt.Sprintf("%q", a)
	}
	return "[" + strings.Join(q, ", ") + "]"
}

// Up starts filter and agent and, with ckptctl, every application.
func (n *Node) Up() error {
	if err := n.StartFilter(); err != nil {
		return err
	}
	if err := n.StartAgent(); err != nil {
		return err
	}
	for _, a := range n.o.Apps {
		if r := n.Ctl("start", a.Name); r.Code != 0 {
			return r.Err()
		}
	}
	return nil
}

// StartFilter starts nfconnfilter and waits for its READY=1.
func (n *Node) StartFilter() (err error) {
	n.Filter, err = n.startDaemon("nfconnfilter", "run", n.failpoints("filter")...)
	return err
}

// StartAgent starts ckptctl agent and waits until its socket answers.
func (n *Node) StartAgent() (err error) {
	env := n.failpoints("agent")
	if n.o.Holdpoint {
		env = append(env, "NFCONNFILTER_AGENT_HOLDPOINT="+n.Path("holdpoint"))
	}
	n.Agent, err = n.startDaemon("ckptctl", "agent", env...)
	return err
}

// failpoints is the environment that names a program's file of points.
func (n *Node) failpoints(program string) []string {
	if !n.o.Failpoints {
		return nil
	}
	return []string{failpoint.Env + "=" + n.Path(program+".failpoints")}
}

// EndAt has the "filter" or the "agent" end with SIGKILL at a point, whenever it comes there; nil
// takes it back. It takes Options.Failpoints.
func (n *Node) EndAt(program string, at *failpoint.Point) error {
	if !n.o.Failpoints {
		return errors.New("harness: the node was made without Failpoints")
	}
	path := n.Path(program + ".failpoints")
	if at == nil {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	// As a whole, because the program may be reading it.
	if err := os.WriteFile(path+".new", []byte(at.String()), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Hold has the agent wait in these phases of operations, each OPERATION/PHASE,
// whenever it comes to one; none lets it go on. It takes Options.Holdpoint.
func (n *Node) Hold(points ...string) error {
	if !n.o.Holdpoint {
		return errors.New("harness: the node was made without Holdpoint")
	}
	if len(points) == 0 {
		if err := os.Remove(n.Path("holdpoint")); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	// As a whole, because the agent may be reading it.
	if err := os.WriteFile(n.Path("holdpoint.new"), []byte(strings.Join(points, "\n")), 0o644); err != nil {
		return err
	}
	return os.Rename(n.Path("holdpoint.new"), n.Path("holdpoint"))
}

// StartDoomedAgent starts an agent that is killed where the phase of the
// operation begins, OPERATION/PHASE.
func (n *Node) StartDoomedAgent(failpoint string) (err error) {
	n.Agent, err = n.startDaemon("ckptctl", "agent", "NFCONNFILTER_AGENT_FAILPOINT="+failpoint)
	return err
}

// Program is the path of one of the two programs.
func (n *Node) Program(name string) string {
	if path := n.Instead[name]; path != "" {
		return path
	}
	return filepath.Join(n.o.Bin, name)
}

// Args are the arguments that tell a daemon its configuration.
func (n *Node) Args() []string {
	return []string{"--shared", filepath.Join(n.root, "shared"), "--node", n.Path("node.toml")}
}

// Down ends agent and filter in an orderly way; an application stays.
func (n *Node) Down() error {
	var errs []error
	for _, d := range []*Daemon{n.Agent, n.Filter} {
		if d != nil {
			errs = append(errs, d.Stop(5*time.Second))
		}
	}
	return errors.Join(errs...)
}

// Close ends everything that runs in the node's namespaces and removes them
// and the directory.
func (n *Node) Close() error {
	var errs []error
	errs = append(errs, n.Down())
	for app := range n.behind {
		errs = append(errs, n.DropBehind(app))
	}
	if n.Net != nil {
		errs = append(errs, killInside(n.Net.Node().Path()), killInside(n.Net.Client().Path()), n.Net.Close())
		n.Net = nil
	}
	if n.Dir != "" {
		errs = append(errs, os.RemoveAll(n.Dir))
	}
	return errors.Join(errs...)
}

// Logs returns what the daemons and the applications wrote.
func (n *Node) Logs() string {
	var b strings.Builder
	for _, pattern := range []string{"log/*", "state/log/*"} {
		files, _ := filepath.Glob(n.Path(pattern))
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				continue
			}
			const most = 16 << 10
			if len(text) > most {
				text = append([]byte("[...]\n"), text[len(text)-most:]...)
			}
			fmt.Fprintf(&b, "---- %s\n%s\n", filepath.Base(f), text)
		}
	}
	ask := [][]string{{"status"}}
	apps, _ := filepath.Glob(filepath.Join(n.root, "shared", "apps", "*.toml"))
	for _, f := range apps {
		ask = append(ask, []string{"conns", strings.TrimSuffix(filepath.Base(f), ".toml"), "--reasons"})
	}
	for _, args := range ask {
		if r := n.Ctl(args...); r.Err() == nil {
			fmt.Fprintf(&b, "---- ckptctl %s\n%s\n", strings.Join(args, " "), firstLines(r.Stdout, 40))
		}
	}
	return b.String()
}

// firstLines cuts a text behind so many lines.
func firstLines(text string, n int) string {
	lines := strings.SplitAfterN(text, "\n", n+1)
	if len(lines) > n {
		lines[n] = "[...]\n"
	}
	return strings.Join(lines, "")
}

// Dial connects from the client namespace; it is a clients.Dialer.
func (n *Node) Dial(addr string) (net.Conn, error) { return n.Net.Client().Dial("tcp", addr) }

// Redis describes a Redis server on port 6379 of the VIP that keeps its data
// in the node's directory: it saves when its connections are drained.
func Redis(name, vip string) App {
	return App{
		Name: name, VIP: vip, Ports: []int{6379},
		Start: []string{"redis-server", "--bind", strings.ReplaceAll(vip, ",", " "), "--port", "6379", "--dir", "@app",
			"--dbfilename", name + ".rdb", "--save", "", "--appendonly", "no", "--daemonize", "no",
			"--protected-mode", "no", "--tcp-backlog", "511", "--maxclients", "8000"},
		Before: []string{"redis-cli", "-h", vip, "save"},
	}
}

// Wait polls cond until it holds or the time is over; what names the
// condition in the error.
func Wait(timeout time.Duration, what string, cond func() bool) error {
	return poll(timeout, 20*time.Millisecond, what, cond)
}

// Watch is Wait that looks every millisecond, for a time to be measured.
func Watch(timeout time.Duration, what string, cond func() bool) error {
	return poll(timeout, time.Millisecond, what, cond)
}

func poll(timeout, most time.Duration, what string, cond func() bool) error {
	deadline := time.Now().Add(timeout)
	for step := time.Millisecond; !cond(); step = min(2*step, most) {
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %s", timeout, what)
		}
		time.Sleep(step)
	}
	return nil
}
