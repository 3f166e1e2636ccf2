package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// schedulerPort is where a Cluster's scheduler takes restore requests, on the
// address of its first node.
const schedulerPort = 7400

// ClusterOptions shape a Cluster.
type ClusterOptions struct {
	// Name becomes part of the namespaces' names.
	Name string
	// Bin is the directory that holds nfconnfilter and ckptctl.
	Bin string
	// Nodes is how many there are, node-a, node-b and so on; default 2.
	Nodes int
	// Cable has the client on a link that can be impaired (Net.Link), by Seed.
	Cable bool
	Seed  uint64
	// Plaintext has the nodes speak without certificates.
	Plaintext bool
	// Scheduler has cluster.toml name one, on the first node, and Up start it.
	Scheduler bool
	// Lines are further ones for cluster.toml.
	Lines string
	// LoadFiles has each node's load read from its file "load", which SetLoad
	// writes.
	LoadFiles bool
	// Holdpoint lets Node.Hold stop agents in a phase of an operation.
	Holdpoint bool
	// Failpoints as in Options.
	Failpoints bool
	// CRIU as in Options.
	CRIU string
	Apps []App
}

// Cluster is a number of nodes that share a directory, and one client
// namespace. Programs and data of the applications are in Path("app"), which
// all nodes see.
type Cluster struct {
	Net       *testnet.Cluster
	Dir       string
	Nodes     []*Node
	Scheduler *Daemon // nil while none runs

	o ClusterOptions
}

// NewCluster makes the namespaces, the certificates and the configuration;
// nothing is started.
func NewCluster(o ClusterOptions) (c *Cluster, err error) {
	c = &Cluster{o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	// Short, because the paths of Unix sockets are limited to 107 bytes.
	if c.Dir, err = os.MkdirTemp("", dirPrefix()); err != nil {
		return c, err
	}
	if err := makeDirs(c.Dir, "shared/apps", "app"); err != nil {
		return c, err
	}
	c.Net, err = testnet.SetupCluster(testnet.ClusterOptions{Name: o.Name, Nodes: o.Nodes, Cable: o.Cable, Seed: o.Seed})
	if err != nil {
		return c, err
	}
	for i := range c.Net.Nodes() {
		letter := string(rune('a' + i))
		n := &Node{
			Net: c.Net.Net(i), Dir: c.Path(letter), name: "node-" + letter, root: c.Dir,
			o: Options{Name: o.Name + "-" + letter, Bin: o.Bin, Holdpoint: o.Holdpoint, Failpoints: o.Failpoints, CRIU: o.CRIU}, behind: map[string]*testnet.NS{}, links: map[string]int{},
		}
		c.Nodes = append(c.Nodes, n)
		if err := makeDirs(n.Dir, "log", "state"); err != nil {
			return c, err
		}
	}
	if !o.Plaintext {
		if err := c.Certificates(c.Path("tls")); err != nil {
			return c, err
		}
	}
	return c, c.writeConfig()
}

// Certificates makes a certificate authority and the nodes' certificates in a
// directory with ckptctl certs.
func (c *Cluster) Certificates(dir string, flags ...string) error {
	args := append([]string{"certs", "--out", dir}, flags...)
	for _, n := range c.Nodes {
		args = append(args, fmt.Sprintf("%s=%s", n.name, n.Net.NodeAddr()))
	}
	return c.Nodes[0].Ctl(args...).Err()
}

func (c *Cluster) writeConfig() error {
	var b strings.Builder
	if c.o.Scheduler {
		fmt.Fprintf(&b, "[scheduler]\naddress = %q\nport = %d\n", c.Nodes[0].Net.NodeAddr(), schedulerPort)
	}
	for _, n := range c.Nodes {
		fmt.Fprintf(&b, "[[node]]\nname = %q\naddress = %q\nfilter_port = 7401\nagent_port = 7402\n", n.name, n.Net.NodeAddr())
	}
	b.WriteString(c.o.Lines)
	if err := os.WriteFile(c.Path("shared", "cluster.toml"), []byte(b.String()), 0o644); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := c.WriteNode(n, c.Path("tls")); err != nil {
			return err
		}
		if c.o.LoadFiles {
			if err := n.SetLoad(0.1); err != nil {
				return err
			}
		}
	}
	for _, a := range c.o.Apps {
		if err := c.WriteApp(a); err != nil {
			return err
		}
	}
	return nil
}

// WriteNode writes a node's file, with certificates from a directory.
func (c *Cluster) WriteNode(n *Node, tls string) error {
	more := ""
	if c.o.LoadFiles {
		more += fmt.Sprintf("load_file = %q\n", n.Path("load"))
	}
	if c.o.Plaintext {
		more += "allow_plaintext = true\n"
	} else {
		more += fmt.Sprintf("[tls]\ncert = %q\nkey = %q\nca = %q\n",
			filepath.Join(tls, n.name+".crt"), filepath.Join(tls, n.name+".key"), filepath.Join(tls, "ca.crt"))
	}
	return n.writeNode(more)
}

// SetLoad says what the node's load is, 1 being one CPU that is fully used. The
// file is replaced as a whole.
func (n *Node) SetLoad(load float64) error {
	temporary := n.Path("load.new")
	if err := os.WriteFile(temporary, fmt.Appendf(nil, "%g\n", load), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, n.Path("load"))
}

// WriteApp writes an application's file, which all nodes share.
func (c *Cluster) WriteApp(a App) error {
	if a.Namespace {
		return errors.New("harness: an application of a cluster has no namespace of its own")
	}
	return c.Nodes[0].WriteApp(a)
}

// Path is a file below the cluster's directory.
func (c *Cluster) Path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}

// Up starts filters, agents and the scheduler, and every application on the
// first node.
func (c *Cluster) Up() error {
	for _, n := range c.Nodes {
		if err := n.StartFilter(); err != nil {
			return err
		}
		if err := n.StartAgent(); err != nil {
			return err
		}
	}
	if c.o.Scheduler {
		if err := c.StartScheduler(); err != nil {
			return err
		}
	}
	for _, a := range c.o.Apps {
		if err := c.Nodes[0].Ctl("start", a.Name).Err(); err != nil {
			return err
		}
	}
	return nil
}

// StartScheduler starts ckptctl scheduler on the first node.
func (c *Cluster) StartScheduler() (err error) {
	c.Scheduler, err = c.Nodes[0].startDaemon("ckptctl", "scheduler")
	return err
}

// Close ends everything that runs in the cluster's namespaces and removes them
// and the directory.
func (c *Cluster) Close() error {
	var errs []error
	if c.Scheduler != nil {
		errs = append(errs, c.Scheduler.Stop(5*time.Second))
	}
	for _, n := range c.Nodes {
		errs = append(errs, n.Down())
	}
	if c.Net != nil {
		for _, n := range c.Nodes {
			errs = append(errs, killInside(n.Net.Node().Path()))
		}
		errs = append(errs, killInside(c.Net.Client().Path()), c.Net.Close())
		c.Net = nil
	}
	if c.Dir != "" {
		errs = append(errs, os.RemoveAll(c.Dir))
	}
	return errors.Join(errs...)
}

// Logs returns what the daemons and the applications wrote, node by node.
func (c *Cluster) Logs() string {
	var b strings.Builder
	for _, n := range c.Nodes {
		fmt.Fprintf(&b, "======== %s\n%s", n.name, n.Logs())
	}
	return b.String()
}

// Dial connects from the client namespace; it is a clients.Dialer.
func (c *Cluster) Dial(addr string) (net.Conn, error) { return c.Net.Client().Dial("tcp", addr) }

// Phase is a step of an operation.
type Phase struct {
	Name     string  `json:"name"`
	MS       float64 `json:"ms"`
	FilterMS float64 `json:"filter_ms"`
}

// Migration is what `ckptctl migrate -o json` tells.
type Migration struct {
	App    string  `json:"app"`
	From   string  `json:"from"`
	To     string  `json:"to"`
	Phases []Phase `json:"phases"`
}

// Sum adds up the times of the phases of these names in ms, of none: all.
func (m Migration) Sum(names ...string) (ms float64) {
	for _, p := range m.Phases {
		match := len(names) == 0
		for _, n := range names {
			match = match || n == p.Name
		}
		if match {
			ms += p.MS
		}
	}
	return ms
}

// Migrate moves an application from one node to another.
func (c *Cluster) Migrate(app string, from, to int, flags ...string) (Migration, error) {
	args := append([]string{"-o", "json", "migrate", app, "--to", c.Nodes[to].name}, flags...)
	r := c.Nodes[from].Ctl(args...)
	var m Migration
	if err := r.Err(); err != nil {
		return m, err
	}
	if err := json.Unmarshal([]byte(r.Stdout), &m); err != nil {
		return m, fmt.Errorf("migrate says %q: %w", r.Stdout, err)
	}
	return m, nil
}

// Running tells whether a state is that of an application that runs.
func Running(state string) bool { return state == "CONNECTED" || state == "RESTORED" }

// Peek asks every node's filter for the state of an application, and looks
// whether the node has the VIP. "" stands for a filter that cannot be reached, "unknown" for
// one that does not know the application.
func (c *Cluster) Peek(app, vip string) []Place {
	all := make([]Place, len(c.Nodes))
	for i, n := range c.Nodes {
		all[i].Node = n.name
		all[i].State = n.peek(app)
		out, err := n.Net.Node().Command("ip", "-o", "address", "show", "to", vip).Output()
		all[i].VIP = err == nil && len(out) > 0
	}
	return all
}

// Place is how an application stands on a node.
type Place struct {
	Node, State string
	VIP         bool // the address is there
}

func (n *Node) peek(app string) string {
	var reply struct {
		Apps []struct {
			Name, State string
		} `json:"apps"`
	}
	if err := n.FilterAPI(2*time.Second, "Status", map[string]string{"app": app}, &reply); err != nil {
		if strings.Contains(err.Error(), "not_found") {
			return "unknown"
		}
		return ""
	}
	for _, a := range reply.Apps {
		if a.Name == app && a.State != "" {
			return a.State
		}
	}
	return "unknown"
}

// Settled waits until the application runs on exactly one node, which alone
// has the address, while the others know it no more, and tells which node that is.
func (c *Cluster) Settled(app, vip string, timeout time.Duration) (node int, err error) {
	var last []Place
	node = -1
	err = Wait(timeout, app+" runs on one node and is unknown elsewhere", func() bool {
		last = c.Peek(app, vip)
		node = -1
		for i, p := range last {
			switch {
			case Running(p.State) && p.VIP && node < 0:
				node = i
			case p.State == "unknown" && !p.VIP:
			default:
				return false
			}
		}
		return node >= 0
	})
	if err != nil {
		return -1, fmt.Errorf("%w: %+v", err, last)
	}
	return node, nil
}
