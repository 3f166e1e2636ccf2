package config

import (
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxHeartbeat bounds reply and send, in bytes: what fits into one segment to
// any remote (RFC 9293, section 3.7.1: the default MSS of IPv4).
const maxHeartbeat = 536

// maxMatch bounds match, in bytes: the largest payload of one TCP segment
// (an IPv4 packet of 65535 bytes less two headers of 20).
const maxMatch = 65495

// defaultApp is an application whose file says nothing.
func defaultApp(name string, hold Hold) *App {
	return &App{
		Name: name,
		Process: Process{
			StopSignal:   "SIGKILL",
			StopTimeout:  Duration(5 * time.Second),
			ReadyTimeout: Duration(10 * time.Second),
		},
		Checkpoint: Checkpoint{
			Engine:       EngineRestart,
			DrainTimeout: Duration(5 * time.Second),
			Boundary:     BoundaryTurn,
			Quiet:        Duration(50 * time.Millisecond),
		},
		Hold: hold,
	}
}

// readApp reads apps/NAME.toml with the hold of the cluster; root is nil
// after a syntax error.
func readApp(file, text, name string, hold Hold) (a *App, d *doc, root *table) {
	a = defaultApp(name, hold)
	d, root = parse(file, text)
	if !plainName.MatchString(name) {
		d.fault(0, "%q is not the name of an application; rename the file: %s", name, plainNameRule)
	}
	if root == nil {
		return a, d, nil
	}
	t := root
	t.plain("name", &a.Name)
	if a.Name != name {
		t.fault("name", nil, "%q differs from the file's name; write %q or rename the file to %s.toml", a.Name, name, a.Name)
	}
	t.vips("vip", &a.VIPs)
	t.strings("nodes", &a.Nodes)
	for i, n := range a.Nodes {
		if slices.Contains(a.Nodes[:i], n) {
			t.fault("nodes", index(a.Nodes, t.m["nodes"], i), "%q stands there twice", n)
		}
	}
	t.ports("include_ports", &a.IncludePorts)
	t.ports("outgoing_ports", &a.OutgoingPorts)
	t.ports("exclude_ports", &a.ExcludePorts)
	notBoth(t, a.ExcludePorts, a.IncludePorts)
	readProcess(t.sub("process"), &a.Process)
	readCheckpoint(t.sub("checkpoint"), &a.Checkpoint)
	h := t.sub("hibernate")
	h.duration("after", &a.Hibernate.After)
	h.done()
	for _, b := range t.subs("heartbeat") {
		a.Heartbeats = append(a.Heartbeats, readHeartbeat(b))
	}
	readHold(t.sub("hold"), &a.Hold)
	t.done()
	return a, d, root
}

// vips reads one address, or a list of one IPv4 and one IPv6 address.
func (t *table) vips(key string, dst *[]netip.Addr) {
	if !t.require(key, `write the application's address, such as vip = "192.0.2.100"`) {
		return
	}
	v := t.m[key]
	items, isList := v.([]any)
	if !isList {
		items = []any{v}
	}
	for i, v := range items {
		var at []int
		if isList {
			at = []int{i}
		}
		var a netip.Addr
		if !t.host(key, at, v, &a) {
			continue
		}
		if a.IsLoopback() {
			t.fault(key, at, "%s is a loopback address, whose traffic is never filtered", a)
			continue
		}
		if slices.ContainsFunc(*dst, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			t.fault(key, at, "%s is a second address of one family; a list has one IPv4 and one IPv6 address", a)
			continue
		}
		*dst = append(*dst, a)
	}
	if len(items) == 0 {
		t.fault(key, nil, "is empty; write one address, or one IPv4 and one IPv6 address")
	}
}

func readProcess(t *table, p *Process) {
	t.strings("start", &p.Start)
	t.program("start", p.Start)
	t.str("user", &p.User)
	t.absolute("working_directory", &p.WorkingDirectory, false)
	t.strings("environment", &p.Environment)
	for i, e := range p.Environment {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			t.fault("environment", index(p.Environment, t.m["environment"], i), "%q is not NAME=VALUE", e)
		}
	}
	t.absolute("log_file", &p.LogFile, false)
	t.str("namespace", &p.Namespace)
	if ns := p.Namespace; ns != "" && !strings.HasPrefix(ns, "/") && (strings.Contains(ns, "/") || ns == "." || ns == "..") {
		t.fault("namespace", nil, "%q is neither a name nor an absolute path", ns)
	}
	t.signal("stop_signal", &p.StopSignal)
	t.duration("stop_timeout", &p.StopTimeout)
	t.absolute("pid_file", &p.PidFile, false)
	t.str("systemd_unit", &p.SystemdUnit)
	if strings.ContainsAny(p.SystemdUnit, "/ \t\n") || strings.HasPrefix(p.SystemdUnit, "-") {
		t.fault("systemd_unit", nil, "%q is not the name of a unit, such as \"redis.service\"", p.SystemdUnit)
	}
	if p.PidFile != "" && p.SystemdUnit != "" {
		t.fault("systemd_unit", nil, "pid_file is set too; take one of them out")
	}
	t.duration("ready_timeout", &p.ReadyTimeout)
	t.boolean("bind_vip", &p.BindVIP)
	t.done()
}

// program checks that a command that is there names a program.
func (t *table) program(key string, command []string) {
	if len(command) > 0 && command[0] == "" {
		t.fault(key, []int{0}, "the program's name is empty")
	}
}

// signal reads a signal's name, with SIG or without, and keeps it with SIG.
func (t *table) signal(key string, dst *string) {
	s := *dst
	t.str(key, &s)
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	switch {
	case unix.SignalNum(name) == 0:
		t.fault(key, nil, "%q is not a signal; write one such as \"SIGTERM\"", s)
	case slices.Contains([]string{"SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCONT"}, name):
		t.fault(key, nil, "%q does not end a process; write one that does, such as \"SIGTERM\"", s)
	default:
		*dst = name
	}
}

func readCheckpoint(t *table, c *Checkpoint) {
	t.word("engine", &c.Engine, EngineRestart, EngineCRIU)
	t.strings("before", &c.Before)
	t.program("before", c.Before)
	t.duration("drain_timeout", &c.DrainTimeout)
	t.word("boundary", &c.Boundary, BoundaryTurn, BoundaryLine, BoundaryRESP)
	t.duration("quiet", &c.Quiet)
	t.boolean("pre_copy", &c.PreCopy)
	t.done()
}

func readHeartbeat(t *table) (b Heartbeat) {
	if t.require("remote", `write the remotes' prefix, such as "198.51.100.0/24"`) {
		t.network("remote", nil, t.m["remote"], &b.Remote)
	}
	t.bytes("match", maxMatch, &b.Match)
	t.bytes("reply", maxHeartbeat, &b.Reply)
	t.bytes("send", maxHeartbeat, &b.Send)
	interval := t.duration("interval", &b.Interval)
	match, send := t.has("match") || t.has("match_hex"), t.has("send") || t.has("send_hex")
	if !match && !send {
		t.d.fault(t.where.key, "heartbeat has neither match nor send; write what remotes send or what they are sent")
	}
	if reply := t.either("reply"); reply != "" && !match && send {
		t.fault(reply, nil, "nothing to answer; write match too")
	}
	if send && !t.has("interval") {
		t.fault(t.either("send"), nil, "interval is missing; write how often, such as interval = \"30s\"")
	}
	if send && interval && b.Interval == 0 {
		t.fault("interval", nil, "is zero; write how often send goes out, such as \"30s\"")
	}
	t.boolean("only_closed", &b.OnlyClosed)
	if !send && t.has("only_closed") {
		t.fault("only_closed", nil, "nothing goes out; write send too")
	}
	if !send && t.has("interval") {
		t.fault("interval", nil, "nothing goes out at an interval; write send too")
	}
	t.done()
	return b
}

// either is key or key_hex, whichever the file has; "" for none.
func (t *table) either(key string) string {
	for _, k := range []string{key, key + "_hex"} {
		if t.has(k) {
			return k
		}
	}
	return ""
}

// bytes reads key as text or key_hex as hexadecimal digits, spaces aside.
func (t *table) bytes(key string, most int, dst *[]byte) {
	text, isText := t.get(key)
	digits, isHex := t.get(key + "_hex")
	if isText && isHex {
		t.fault(key+"_hex", nil, "%s is set too; take one of them out", key)
		return
	}
	var b []byte
	at := key
	switch {
	case isText:
		s, ok := as[string](t, key, nil, text, "a string")
		if !ok {
			return
		}
		b = []byte(s)
	case isHex:
		at = key + "_hex"
		s, ok := as[string](t, at, nil, digits, "a string")
		if !ok {
			return
		}
		var err error
		if b, err = hex.DecodeString(strings.Join(strings.Fields(s), "")); err != nil {
			t.fault(at, nil, "%q is not hexadecimal; write two digits a byte", s)
			return
		}
	default:
		return
	}
	if len(b) == 0 || len(b) > most {
		t.fault(at, nil, "is %d bytes long; it must be 1 to %d", len(b), most)
		return
	}
	*dst = b
}
