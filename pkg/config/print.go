package config

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Print writes the merged configuration as one TOML document: what cluster.toml
// says under [cluster], the node's file under [node], each valid application
// under [apps.NAME]; every key, also those that have their default. The error
// is the writer's.
func Print(w io.Writer, c *Config) error {
	p := &printer{}
	fmt.Fprintf(p, "# Shared directory %s\n# Node file %s\n", quote(c.SharedDir), quote(c.NodeFile))
	p.cluster(&c.Cluster)
	p.node(&c.Node)
	for _, name := range slices.Sorted(maps.Keys(c.Apps)) {
		p.app(name, c.Apps[name])
	}
	_, err := w.Write(p.Bytes())
	return err
}

type printer struct{ bytes.Buffer }

// table begins a table.
func (p *printer) table(path ...string) { p.header("[", "]", path) }

// element begins an element of an array of tables.
func (p *printer) element(path ...string) { p.header("[[", "]]", path) }

func (p *printer) header(open, end string, path []string) {
	for i, k := range path {
		if strings.Trim(k, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != "" {
			path[i] = quote(k)
		}
	}
	fmt.Fprintf(p, "\n%s%s%s\n", open, strings.Join(path, "."), end)
}

// set writes key = value.
func (p *printer) set(key string, value any) {
	fmt.Fprintf(p, "%s = %s\n", key, literal(value))
}

// literal writes a value as TOML.
func literal(value any) string {
	switch v := value.(type) {
	case string:
		return quote(v)
	case fmt.Stringer: // durations, sizes, addresses and prefixes
		return quote(v.String())
	case float64:
		s := strconv.FormatFloat(v, 'f', -1, 64)
		if !strings.Contains(s, ".") {
			s += ".0"
		}
		return s
	case []string:
		return array(v)
	case []uint16:
		return array(v)
	case []netip.Addr:
		return array(v)
	case []netip.Prefix:
		return array(v)
	}
	return fmt.Sprint(value) // integers and booleans
}

func array[T any](values []T) string {
	items := make([]string, len(values))
	for i, v := range values {
		items[i] = literal(v)
	}
	return "[" + strings.Join(items, ", ") + "]"
}

// quote writes a basic string (TOML 1.0, "String").
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func (p *printer) cluster(c *Cluster) {
	if s := c.Scheduler; s != nil {
		p.table("cluster", "scheduler")
		p.set("address", s.Address)
		p.set("port", s.Port)
	}
	for _, n := range c.Nodes {
		p.element("cluster", "node")
		p.set("name", n.Name)
		p.set("address", n.Address)
		p.set("filter_port", n.FilterPort)
		p.set("agent_port", n.AgentPort)
	}
	p.table("cluster", "filter")
	p.set("include_ports", c.Filter.IncludePorts)
	p.set("exclude_ports", c.Filter.ExcludePorts)
	p.set("include_addresses", c.Filter.IncludeAddresses)
	p.set("exclude_addresses", c.Filter.ExcludeAddresses)
	p.hold(c.Hold, "cluster", "hold")
	p.table("cluster", "balance")
	p.set("high", c.Balance.High)
	p.set("low", c.Balance.Low)
	p.set("cooldown", c.Balance.Cooldown)
	p.table("cluster", "snapshots")
	p.set("keep", c.Snapshots.Keep)
	p.set("max_age", c.Snapshots.MaxAge)
}

func (p *printer) hold(h Hold, path ...string) {
	p.table(path...)
	p.set("on_data_during_snapshot", h.OnDataDuringSnapshot)
	p.set("spool", h.Spool)
	p.set("wake", h.Wake)
}

func (p *printer) node(n *Node) {
	p.table("node")
	p.set("name", n.Name)
	p.set("interface", n.Interface)
	if n.Address.IsValid() {
		p.set("address", n.Address)
	}
	p.set("filter_port", n.FilterPort)
	p.set("agent_port", n.AgentPort)
	p.set("allow_plaintext", n.AllowPlaintext)
	p.set("state_dir", n.StateDir)
	p.set("control_socket", n.ControlSocket)
	p.set("agent_socket", n.AgentSocket)
	p.set("control_group", n.ControlGroup)
	p.set("metrics_listen", n.MetricsListen)
	p.set("load_file", n.LoadFile)
	p.table("node", "queue")
	p.set("first", n.Queue.First)
	p.set("count", n.Queue.Count)
	fmt.Fprintf(p, "mark = 0x%08x\nmark_mask = 0x%08x\n", n.Queue.Mark, n.Queue.MarkMask)
	p.set("max_connections", n.Queue.MaxConnections)
	p.table("node", "limits")
	p.set("connections_per_app", n.Limits.ConnectionsPerApp)
	p.set("kept_bytes", n.Limits.KeptBytes)
	p.set("kept_bytes_per_app", n.Limits.KeptBytesPerApp)
	p.set("kept_bytes_per_connection", n.Limits.KeptBytesPerConnection)
	p.set("pending_syns", n.Limits.PendingSYNs)
	p.set("pending_syns_per_app", n.Limits.PendingSYNsPerApp)
	p.table("node", "criu")
	p.set("command", n.CRIU.Command)
	p.table("node", "tls")
	p.set("cert", n.TLS.Cert)
	p.set("key", n.TLS.Key)
	p.set("ca", n.TLS.CA)
}

func (p *printer) app(name string, a *App) {
	p.table("apps", name)
	p.set("name", a.Name)
	p.set("vip", a.VIPs)
	p.set("nodes", a.Nodes)
	p.set("include_ports", a.IncludePorts)
	p.set("outgoing_ports", a.OutgoingPorts)
	p.set("exclude_ports", a.ExcludePorts)
	p.table("apps", name, "process")
	p.set("start", a.Process.Start)
	p.set("user", a.Process.User)
	p.set("working_directory", a.Process.WorkingDirectory)
	p.set("environment", a.Process.Environment)
	p.set("log_file", a.Process.LogFile)
	p.set("namespace", a.Process.Namespace)
	p.set("stop_signal", a.Process.StopSignal)
	p.set("stop_timeout", a.Process.StopTimeout)
	p.set("pid_file", a.Process.PidFile)
	p.set("systemd_unit", a.Process.SystemdUnit)
	p.set("ready_timeout", a.Process.ReadyTimeout)
	p.set("bind_vip", a.Process.BindVIP)
	p.table("apps", name, "checkpoint")
	p.set("engine", a.Checkpoint.Engine)
	p.set("before", a.Checkpoint.Before)
	p.set("drain_timeout", a.Checkpoint.DrainTimeout)
	p.set("boundary", a.Checkpoint.Boundary)
	p.set("quiet", a.Checkpoint.Quiet)
	p.set("pre_copy", a.Checkpoint.PreCopy)
	p.table("apps", name, "hibernate")
	p.set("after", a.Hibernate.After)
	for _, b := range a.Heartbeats {
		p.element("apps", name, "heartbeat")
		p.set("remote", b.Remote)
		p.bytes("match", b.Match)
		p.bytes("reply", b.Reply)
		p.bytes("send", b.Send)
		if len(b.Send) > 0 {
			p.set("interval", b.Interval)
			p.set("only_closed", b.OnlyClosed)
		}
	}
	p.hold(a.Hold, "apps", name, "hold")
}

// bytes writes text as it is and other bytes in hexadecimal digits.
func (p *printer) bytes(key string, b []byte) {
	switch {
	case len(b) == 0:
	case utf8.Valid(b):
		p.set(key, string(b))
	default:
		p.set(key+"_hex", hex.EncodeToString(b))
	}
}
