package config

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// maxSocketPath is the longest path of a Unix socket, in bytes: sun_path of
// sockaddr_un (include/uapi/linux/un.h) less the closing NUL.
const maxSocketPath = 107

// plainName is what node and application names look like: they become file
// names, arguments and metric labels.
var plainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

const plainNameRule = "use up to 63 letters, digits, '.', '_' and '-', a letter or digit first"

// defaultNode is a node whose file says nothing.
func defaultNode() Node {
	name, err := os.Hostname()
	if err != nil || !plainName.MatchString(name) {
		name = "localhost"
	}
	return Node{
		Name:          name,
		FilterPort:    DefaultFilterPort,
		AgentPort:     DefaultAgentPort,
		StateDir:      "/var/lib/nfconnfilter",
		ControlSocket: "/run/nfconnfilter/control.sock",
		AgentSocket:   "/run/nfconnfilter/agent.sock",
		ControlGroup:  "nfconnfilter",
		Queue: Queue{
			First: 64, Count: 1,
			Mark: 0x4e460000, MarkMask: 0xffff0000,
			MaxConnections: 1 << 20,
		},
		Limits: Limits{
			KeptBytes: 256 << 20, KeptBytesPerApp: 256 << 20, KeptBytesPerConnection: 60000,
			PendingSYNs: 65536, PendingSYNsPerApp: 4096,
		},
		CRIU: CRIU{Command: "criu"},
	}
}

// readNode reads a node's file; root is nil after a syntax error.
func readNode(file, text string) (n Node, d *doc, root *table) {
	n = defaultNode()
	d, root = parse(file, text)
	if root == nil {
		return n, d, nil
	}
	t := root
	t.plain("name", &n.Name)
	t.str("interface", &n.Interface)
	if strings.ContainsAny(n.Interface, "/ \t\n") || len(n.Interface) > 15 {
		t.fault("interface", nil, "%q is not the name of a network interface (up to 15 characters)", n.Interface)
	}
	t.addr("address", &n.Address)
	integer(t, "filter_port", &n.FilterPort, 1, 65535)
	integer(t, "agent_port", &n.AgentPort, 1, 65535)
	if n.FilterPort == n.AgentPort {
		key := "agent_port"
		if !t.has(key) {
			key = "filter_port"
		}
		t.fault(key, nil, "filter_port and agent_port are both %d; two daemons listen there", n.AgentPort)
	}
	t.boolean("allow_plaintext", &n.AllowPlaintext)
	t.absolute("state_dir", &n.StateDir, true)
	t.socket("control_socket", &n.ControlSocket)
	t.socket("agent_socket", &n.AgentSocket)
	if n.ControlSocket == n.AgentSocket {
		t.fault("agent_socket", nil, "is the same path as control_socket")
	}
	t.str("control_group", &n.ControlGroup)
	t.str("metrics_listen", &n.MetricsListen)
	if err := checkListen(n.MetricsListen); err != nil {
		t.fault("metrics_listen", nil, "%v", err)
	}
	t.absolute("load_file", &n.LoadFile, false)
	readQueue(t.sub("queue"), &n.Queue)
	readLimits(t.sub("limits"), &n.Limits)
	c := t.sub("criu")
	c.str("command", &n.CRIU.Command)
	if n.CRIU.Command == "" {
		c.fault("command", nil, "is empty; write a name on PATH or a path, such as \"criu\"")
	}
	c.done()
	readTLS(t.sub("tls"), &n.TLS)
	t.done()
	return n, d, root
}

func readQueue(t *table, q *Queue) {
	integer(t, "first", &q.First, 0, 65535)
	integer(t, "count", &q.Count, 1, 65535)
	if int(q.First)+int(q.Count) > 65536 {
		t.fault("count", nil, "queues %d to %d go past the last one, 65535", q.First, int(q.First)+int(q.Count)-1)
	}
	integer(t, "mark", &q.Mark, 1, 1<<32-1)
	integer(t, "mark_mask", &q.MarkMask, 1, 1<<32-1)
	switch {
	case q.MarkMask&3 != 0:
		t.fault("mark_mask", nil, "%#x covers the two lowest bits, which tell our packets apart; clear them", q.MarkMask)
	case q.Mark&^q.MarkMask != 0:
		t.fault("mark", nil, "%#x has bits outside mark_mask %#x", q.Mark, q.MarkMask)
	}
	integer(t, "max_connections", &q.MaxConnections, 1, 1<<31-1)
	t.done()
}

func readLimits(t *table, l *Limits) {
	integer(t, "connections_per_app", &l.ConnectionsPerApp, 0, 1<<31-1)
	const most = 1 << 40
	for _, k := range []struct {
		key   string
		value *ByteSize
	}{{"kept_bytes", &l.KeptBytes}, {"kept_bytes_per_app", &l.KeptBytesPerApp}, {"kept_bytes_per_connection", &l.KeptBytesPerConnection}} {
		if t.size(k.key, k.value); *k.value < 1460 || *k.value > most {
			t.fault(k.key, nil, "%s is not between 1460 (one segment) and 1TiB", *k.value)
		}
	}
	integer(t, "pending_syns", &l.PendingSYNs, 1, 1<<31-1)
	integer(t, "pending_syns_per_app", &l.PendingSYNsPerApp, 1, 1<<31-1)
	t.done()
}

func readTLS(t *table, c *TLS) {
	t.absolute("cert", &c.Cert, false)
	t.absolute("key", &c.Key, false)
	t.absolute("ca", &c.CA, false)
	if *c != (TLS{}) {
		for _, f := range []struct{ key, value string }{{"cert", c.Cert}, {"key", c.Key}, {"ca", c.CA}} {
			if f.value == "" {
				t.fault(f.key, nil, "is missing; TLS needs cert, key and ca together")
			}
		}
	}
	t.done()
}

// plain reads the name of a node or an application.
func (t *table) plain(key string, dst *string) {
	v, ok := t.get(key)
	if !ok {
		return
	}
	if s, ok := as[string](t, key, nil, v, "a string"); ok {
		if !plainName.MatchString(s) {
			t.fault(key, nil, "%q is not a name; %s", s, plainNameRule)
			return
		}
		*dst = s
	}
}

// absolute reads a path that does not depend on where a daemon was started.
func (t *table) absolute(key string, dst *string, needed bool) {
	t.str(key, dst)
	if *dst != "" && !filepath.IsAbs(*dst) {
		t.fault(key, nil, "%q is not an absolute path; begin it with /", *dst)
	}
	if *dst == "" && needed {
		t.fault(key, nil, "is empty; leave the key out for the default")
	}
}

func (t *table) socket(key string, dst *string) {
	t.absolute(key, dst, true)
	if len(*dst) > maxSocketPath {
		t.fault(key, nil, "is %d bytes long; the path of a Unix socket has at most %d", len(*dst), maxSocketPath)
	}
}

// checkListen checks ADDRESS:PORT; empty is off.
func checkListen(s string) error {
	if s == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err == nil && host != "" {
		_, err = netip.ParseAddr(host)
	}
	if err != nil {
		return fmt.Errorf("%q is not ADDRESS:PORT, such as \"127.0.0.1:7403\"", s)
	}
	return nil
}
