package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// faultTest has one file's text; want are its faults as LINE:COL: message.
type faultTest struct {
	name, text string
	want       []string
}

// check loads a file together with others and compares all faults that it has.
func (ft faultTest) check(t *testing.T, file string, others map[string]string) {
	t.Run(ft.name, func(t *testing.T) {
		files := map[string]string{file: ft.text}
		for name, text := range others {
			files[name] = text
		}
		shared, node := write(t, files)
		c, err := Load(shared, node)
		var all Faults
		if err == nil {
			all = c.AllFaults()
		} else if !errors.As(err, &all) {
			t.Fatalf("error of type %T: %v", err, err)
		}
		var got []string
		for _, f := range all {
			line, ok := strings.CutPrefix(f.Error(), filepath.Join(shared, file)+":")
			if !ok {
				t.Errorf("fault elsewhere: %v", f)
			}
			got = append(got, strings.ReplaceAll(line, shared, "DIR"))
		}
		if g, w := strings.Join(got, "\n"), strings.Join(ft.want, "\n"); g != w {
			t.Errorf("faults\n got %s\nwant %s", g, w)
		}
		if isApp := strings.HasPrefix(file, "apps/"); isApp && err != nil {
			t.Errorf("an application's fault made everything invalid: %v", err)
		} else if !isApp && len(ft.want) > 0 && err == nil {
			t.Error("no error")
		}
	})
}

func TestAppFaults(t *testing.T) {
	const vip = "vip = \"192.0.2.100\"\n"
	for _, ft := range []faultTest{
		{"syntax", "name = \n", []string{`1:8: expected value but found '\n' instead`}},
		{"syntax behind characters of two bytes", "name = \"é\" x\n",
			[]string{`1:12: expected a top-level item to end with a newline, comment, or EOF, but got 'x' instead`}},
		{"defined twice", vip + "vip = \"192.0.2.101\"", []string{`2:1: Key 'vip' has already been defined.`}},
		{"not UTF-8", vip + "# \xff", []string{`2:3: byte 0xff is not UTF-8; save the file as UTF-8`}},
		{"UTF-16", "\xff\xfea\x00", []string{`1:1: byte 0xff is not UTF-8; save the file as UTF-8`}},
		{"byte order mark", "\ufeffvip = 1", []string{`1:7: vip: want an IP address in quotes, have an integer`}},
		{"nothing", "", []string{`1:1: vip is missing; write the application's address, such as vip = "192.0.2.100"`}},
		{"empty vip", "vip = ''", []string{`1:7: vip: is empty; write the application's address, such as vip = "192.0.2.100"`}},
		{"unknown keys", "nmae = \"a\"\n" + vip + "\n[zzz]\n  [process]\n\tstop_singal = 1\r\n [[wat.ever]]\n",
			[]string{
				`1:1: unknown key "nmae"; did you mean "name"?`,
				`4:2: unknown key "zzz"; known here: name, vip, nodes, include_ports, outgoing_ports, exclude_ports, process, checkpoint, hibernate, heartbeat, hold`,
				`6:2: unknown key "process.stop_singal"; did you mean "stop_signal"?`,
				`7:4: unknown key "wat"; known here: name, vip, nodes, include_ports, outgoing_ports, exclude_ports, process, checkpoint, hibernate, heartbeat, hold`,
			}},
		{"other name", "name = 'b'\n" + vip, []string{`1:8: name: "b" differs from the file's name; write "a" or rename the file to b.toml`}},
		{"bad name", "name = 'a/b'\n" + vip, []string{`1:8: name: "a/b" is not a name; use up to 63 letters, digits, '.', '_' and '-', a letter or digit first`}},
		{"wrong types", "name = 1\nvip = 1.5\nnodes = 'a'\ninclude_ports = ['1', 2]\nprocess = 3\nheartbeat = 2000-01-01 10:00:00\nhibernate = []\nhold = {spool = true}",
			[]string{
				`1:8: name: want a string, have an integer`,
				`2:7: vip: want an IP address in quotes, have a float`,
				`3:9: nodes: want an array, have a string`,
				`4:18: include_ports: want an integer, have a string`,
				`5:11: process: want a table [process], have an integer`,
				`6:13: heartbeat: want tables [[heartbeat]], have a date or time`,
				`7:13: hibernate: want a table [hibernate], have an array`,
				`8:17: hold.spool: want a size in quotes such as "256KiB", have a boolean`,
			}},
		{"addresses", "vip = [\n  'x', # comment ]\n  '::ffff:192.0.2.1', '0.0.0.0', 'fe80::1%eth0',\n  '224.0.0.1', '127.0.0.1', '192.0.2.1', '192.0.2.2', '::1',\n]",
			[]string{
				`2:3: vip: "x" is not an IP address`,
				`3:3: vip: "::ffff:192.0.2.1" is an IPv4 address inside IPv6; write 192.0.2.1`,
				`3:23: vip: "0.0.0.0" is not the address of one host`,
				`3:34: vip: "fe80::1%eth0" names a zone; write the address alone`,
				`4:3: vip: "224.0.0.1" is not the address of one host`,
				`4:16: vip: 127.0.0.1 is a loopback address, whose traffic is never filtered`,
				`4:42: vip: 192.0.2.2 is a second address of one family; a list has one IPv4 and one IPv6 address`,
				`4:55: vip: ::1 is a loopback address, whose traffic is never filtered`,
			}},
		{"empty list of addresses", "vip = []", []string{`1:7: vip: is empty; write one address, or one IPv4 and one IPv6 address`}},
		{"node's address", "vip = '192.0.2.11'", []string{`1:7: vip: 192.0.2.11 is the address of node "node-a" itself; a VIP is an address of the application alone`}},
		{"ports", vip + "include_ports = [0, 80, 65536, 22]\nexclude_ports = [81,\n80]", []string{
			`2:18: include_ports: 0 is not between 1 and 65535`,
			`2:25: include_ports: 65536 is not between 1 and 65535`,
			`2:32: include_ports: 22 is in exclude_ports of [filter] in cluster.toml, by default [22]; take it out of one of them`,
			`4:1: exclude_ports: 80 is in include_ports too; take it out of one of them`,
		}},
		{"nodes", vip + "nodes = ['a', 'a']", []string{`2:15: nodes: "a" stands there twice`}},
		{"process", vip + `[process]
start = [""]
user = "\u0000"
working_directory = "srv"
environment = ["A=1", "B", "=C"]
log_file = "x"
namespace = "a/b"
stop_signal = "SIGNOTHING"
stop_timeout = "-1s"
pid_file = "/run/x.pid"
systemd_unit = "x.service"
ready_timeout = "10"
bind_vip = "yes"
`, []string{
			`3:10: process.start: the program's name is empty`,
			`4:8: process.user: holds a NUL character`,
			`5:21: process.working_directory: "srv" is not an absolute path; begin it with /`,
			`6:23: process.environment: "B" is not NAME=VALUE`,
			`6:28: process.environment: "=C" is not NAME=VALUE`,
			`7:12: process.log_file: "x" is not an absolute path; begin it with /`,
			`8:13: process.namespace: "a/b" is neither a name nor an absolute path`,
			`9:15: process.stop_signal: "SIGNOTHING" is not a signal; write one such as "SIGTERM"`,
			`10:16: process.stop_timeout: "-1s" is negative; write a duration of 0s or more`,
			`12:16: process.systemd_unit: pid_file is set too; take one of them out`,
			`13:17: process.ready_timeout: "10" is not a duration; write one such as "50ms", "5s" or "1h30m"`,
			`14:12: process.bind_vip: want true or false, have a string`,
		}},
		{"unit and signal", vip + "process.systemd_unit = 'a/b'\nprocess.stop_signal = 'stop'", []string{
			`2:24: process.systemd_unit: "a/b" is not the name of a unit, such as "redis.service"`,
			`3:23: process.stop_signal: "stop" does not end a process; write one that does, such as "SIGTERM"`,
		}},
		{"checkpoint", vip + `[checkpoint]
engine = "dmtcp"
before = ["", "x"]
drain_timeout = 5
boundary = "message"
quiet = "99999999h"
[hibernate]
after = "-0.5s"
[hold]
on_data_during_snapshot = "drop"
spool = "1KB"
`, []string{
			`3:10: checkpoint.engine: "dmtcp" is none of "restart", "criu"`,
			`4:11: checkpoint.before: the program's name is empty`,
			`5:17: checkpoint.drain_timeout: want a duration in quotes such as "5s", have an integer`,
			`6:12: checkpoint.boundary: "message" is none of "turn", "line", "resp"`,
			`7:9: checkpoint.quiet: "99999999h" is not a duration; write one such as "50ms", "5s" or "1h30m"`,
			`9:9: hibernate.after: "-0.5s" is negative; write a duration of 0s or more`,
			`11:27: hold.on_data_during_snapshot: "drop" is none of "hold", "abort"`,
			`12:9: hold.spool: "1KB" is not a size; write one such as "0", "4096", "256KiB" or "1MiB"`,
		}},
		{"heartbeats", vip + `
[[heartbeat]]
[[heartbeat]]
remote = "198.51.100.7/24"
match = "a"
match_hex = "61"
[[heartbeat]]
remote = "198.51.100.0/33"
match_hex = "6"
reply = ""
[[heartbeat]]
remote = ""
send = "x"
reply_hex = "00"
[[heartbeat]]
remote = "::/0"
send = "x"
interval = "0h"
[[heartbeat]]
remote = "::/0"
match = "x"
interval = "1s"
reply = 1
only_closed = true
[[heartbeat]]
remote = "::/0"
reply = "x"
send_hexx = ""
`, []string{
			`3:3: heartbeat.remote is missing; write the remotes' prefix, such as "198.51.100.0/24"`,
			`3:3: heartbeat has neither match nor send; write what remotes send or what they are sent`,
			`5:10: heartbeat.remote: "198.51.100.7/24" has bits set after the prefix; write "198.51.100.0/24"`,
			`7:13: heartbeat.match_hex: match is set too; take one of them out`,
			`9:10: heartbeat.remote: "198.51.100.0/33" is not a prefix; write one such as "198.51.100.0/24"`,
			`10:13: heartbeat.match_hex: "6" is not hexadecimal; write two digits a byte`,
			`11:9: heartbeat.reply: is 0 bytes long; it must be 1 to 536`,
			`13:10: heartbeat.remote: is empty; write the remotes' prefix, such as "198.51.100.0/24"`,
			`14:8: heartbeat.send: interval is missing; write how often, such as interval = "30s"`,
			`15:13: heartbeat.reply_hex: nothing to answer; write match too`,
			`19:12: heartbeat.interval: is zero; write how often send goes out, such as "30s"`,
			`23:12: heartbeat.interval: nothing goes out at an interval; write send too`,
			`24:9: heartbeat.reply: want a string, have an integer`,
			`25:15: heartbeat.only_closed: nothing goes out; write send too`,
			`26:3: heartbeat has neither match nor send; write what remotes send or what they are sent`,
			`29:1: unknown key "heartbeat.send_hexx"; did you mean "send_hex"?`,
		}},
	} {
		ft.check(t, "apps/a.toml", nil)
	}
	(faultTest{"bad file name", "vip = '192.0.2.100'\n", []string{
		`1:1: "a b" is not the name of an application; rename the file: use up to 63 letters, digits, '.', '_' and '-', a letter or digit first`,
	}}).check(t, "apps/a b.toml", nil)
}

func TestNodeFaults(t *testing.T) {
	const least = "interface = 'eth0'\n"
	for _, ft := range []faultTest{
		{"no interface", "name = 'x'", []string{`1:1: interface is missing; name the network interface that carries the VIPs, such as "eth0"`}},
		{"top", `name = ""
interface = "ether/0"
address = "192.0.2.256"
filter_port = 7402
allow_plaintext = 0
state_dir = ""
control_socket = "run/c.sock"
agent_socket = "run/c.sock"
metrics_listen = "localhost:7403"
shared = "x"
`, []string{
			`1:8: name: "" is not a name; use up to 63 letters, digits, '.', '_' and '-', a letter or digit first`,
			`2:13: interface: "ether/0" is not the name of a network interface (up to 15 characters)`,
			`3:11: address: "192.0.2.256" is not an IP address`,
			`4:15: filter_port: filter_port and agent_port are both 7402; two daemons listen there`,
			`5:19: allow_plaintext: want true or false, have an integer`,
			`6:13: state_dir: is empty; leave the key out for the default`,
			`7:18: control_socket: "run/c.sock" is not an absolute path; begin it with /`,
			`8:16: agent_socket: "run/c.sock" is not an absolute path; begin it with /`,
			`8:16: agent_socket: is the same path as control_socket`,
			`9:18: metrics_listen: "localhost:7403" is not ADDRESS:PORT, such as "127.0.0.1:7403"`,
			`10:1: unknown key "shared"; known here: name, interface, address, filter_port, agent_port, allow_plaintext, state_dir, control_socket, agent_socket, control_group, metrics_listen, load_file, queue, limits, criu, tls`,
		}},
		{"long socket", least + "agent_socket = '/" + strings.Repeat("x", 107) + "'",
			[]string{`2:16: agent_socket: is 108 bytes long; the path of a Unix socket has at most 107`}},
		{"mark outside the mask", least + "[queue]\nmark = 0x4e460100\nfirst = 65535\ncount = 2\nmax_connections = 0", []string{
			`3:8: queue.mark: 0x4e460100 has bits outside mark_mask 0xffff0000`,
			`5:9: queue.count: queues 65535 to 65536 go past the last one, 65535`,
			`6:19: queue.max_connections: 0 is not between 1 and 2147483647`,
		}},
		{"limits", least + "[limits]\nkept_bytes = '1'\nkept_bytes_per_app = '2TiB'\npending_syns = 0\nconnections_per_app = -1", []string{
			`3:14: limits.kept_bytes: 1B is not between 1460 (one segment) and 1TiB`,
			`4:22: limits.kept_bytes_per_app: 2TiB is not between 1460 (one segment) and 1TiB`,
			`5:16: limits.pending_syns: 0 is not between 1 and 2147483647`,
			`6:23: limits.connections_per_app: -1 is not between 0 and 2147483647`,
		}},
		{"mask covers our bits", least + "queue.mark = 1\nqueue.mark_mask = 0xff",
			[]string{`3:19: queue.mark_mask: 0xff covers the two lowest bits, which tell our packets apart; clear them`}},
		{"mark of no bits", least + "queue.mark = 0", []string{`2:14: queue.mark: 0 is not between 1 and 4294967295`}},
		{"criu and tls", least + "[criu]\ncommand = ''\n[tls]\ncert = '/c'\nca = 'ca'", []string{
			`3:11: criu.command: is empty; write a name on PATH or a path, such as "criu"`,
			`4:2: tls.key: is missing; TLS needs cert, key and ca together`,
			`6:6: tls.ca: "ca" is not an absolute path; begin it with /`,
		}},
	} {
		ft.check(t, "node.toml", nil)
	}
}

func TestClusterFaults(t *testing.T) {
	for _, ft := range []faultTest{
		{"scheduler", "[scheduler]\nport = 0", []string{
			`1:2: scheduler.address is missing; write the scheduler's address, or leave [scheduler] out on a single node`,
			`2:8: scheduler.port: 0 is not between 1 and 65535`,
		}},
		{"empty address", "scheduler = {address = ''}", []string{
			`1:24: scheduler.address: is empty; write the scheduler's address, or leave [scheduler] out on a single node`,
		}},
		{"nodes", `[[node]]
name = "node-a"
address = "192.0.2.11"
filter_port = 7402
[[node]]
name = "node-a"
address = "192.0.2.11"
agent_port = 7403
[[node]]
address = 1
`, []string{
			`1:3: node.agent_port: filter_port and agent_port are both 7402; two daemons listen there`,
			`6:8: node.name: "node-a" is the name of an earlier [[node]] too`,
			`9:3: node.name is missing; write the name that the node's own file has`,
			`10:11: node.address: want an IP address in quotes, have an integer`,
		}},
		{"lists", `[filter]
include_ports = [80, 443]
exclude_ports = [443]
include_addresses = ["198.51.100.0/24", 'x']
exclude_addresses = ["203.0.113.0/24", "198.51.0.0/16", "198.51.100.7"]
[hold]
spool = "-1"
[balance]
high = -1
low = "x"
[[balance.x]]
`, []string{
			`3:18: filter.exclude_ports: 443 is in include_ports too; take it out of one of them`,
			`4:41: filter.include_addresses: "x" is not a prefix; write one such as "198.51.100.0/24"`,
			`5:40: filter.exclude_addresses: 198.51.0.0/16 leaves nothing of an entry of include_addresses; take one of them out`,
			`7:9: hold.spool: "-1" is not a size; write one such as "0", "4096", "256KiB" or "1MiB"`,
			`9:8: balance.high: -1 is not a number of 0 or more`,
			`10:7: balance.low: want a number, have a string`,
			`11:11: unknown key "balance.x"; known here: high, low, cooldown`,
		}},
		{"balance", "balance.high = 1\nbalance.low = 2.5", []string{`2:15: balance.low: 2.5 is above high, which is 1`}},
	} {
		ft.check(t, "cluster.toml", map[string]string{"node.toml": minimalNode + "allow_plaintext = true"})
	}
	// The same address with ports of its own is another daemon; with shared ones it is not.
	(faultTest{"shared ports", "[[node]]\nname='node-a'\naddress='127.0.0.1'\n[[node]]\nname='b'\naddress='127.0.0.1'\nfilter_port=7402\nagent_port=7403",
		[]string{`6:9: node.address: 127.0.0.1 has a port that an earlier [[node]] "node-a" uses too`}}).
		check(t, "cluster.toml", map[string]string{"node.toml": "interface = 'eth0'\nname = 'node-a'"})
}

func TestDisagreements(t *testing.T) {
	cluster := map[string]string{"cluster.toml": `
[[node]]
name = "node-a"
address = "192.0.2.11"
[[node]]
name = "node-b"
address = "192.0.2.12"
`}
	for _, ft := range []faultTest{
		{"agrees", minimalNode + "allow_plaintext = true", nil},
		{"with TLS", minimalNode + "[tls]\ncert = '/c'\nkey = '/k'\nca = '/a'", nil},
		{"plain text", minimalNode, []string{
			`1:1: tls: node "node-a" is at 192.0.2.11, which is not loopback, and there is no TLS; set cert, key and ca in [tls], or allow_plaintext = true`}},
		{"plain text denied", minimalNode + "allow_plaintext = false", []string{
			`4:19: allow_plaintext: node "node-a" is at 192.0.2.11, which is not loopback, and there is no TLS; set cert, key and ca in [tls], or allow_plaintext = true`}},
		{"other name", "interface = 'eth0'\nname = 'node-c'\nallow_plaintext = true", []string{
			`2:8: name: "node-c" is the name of no [[node]] in DIR/cluster.toml; add one, or correct the name`}},
		{"other address and ports", "interface = 'eth0'\nname = 'node-b'\nallow_plaintext = true\naddress = '192.0.2.11'\nfilter_port = 1\nagent_port = 2", []string{
			`4:11: address: 192.0.2.11 disagrees with 192.0.2.12 of [[node]] "node-b" in DIR/cluster.toml`,
			`5:15: filter_port: 1 disagrees with 7401 of [[node]] "node-b" in DIR/cluster.toml`,
			`6:14: agent_port: 2 disagrees with 7402 of [[node]] "node-b" in DIR/cluster.toml`}},
	} {
		ft.check(t, "node.toml", cluster)
	}
	loopback := map[string]string{"cluster.toml": "[[node]]\nname='node-a'\naddress='127.0.0.1'\n[[node]]\nname='b'\naddress='127.0.0.2'"}
	(faultTest{"loopback needs no TLS", "interface = 'eth0'\nname = 'node-a'", nil}).check(t, "node.toml", loopback)
	single := map[string]string{"cluster.toml": "[[node]]\nname='node-a'\naddress='192.0.2.11'"}
	(faultTest{"one node needs no TLS", minimalNode, nil}).check(t, "node.toml", single)

	cluster["node.toml"] = minimalNode + "allow_plaintext = true"
	cluster["cluster.toml"] += "[filter]\ninclude_ports = [80]\n"
	(faultTest{"application", "vip = ['2001:db8::1', '192.0.2.12']\nnodes = ['node-b', 'node-c']\ninclude_ports = [80, 81]", []string{
		`1:23: vip: 192.0.2.12 is the address of node "node-b"; a VIP is an address of the application alone`,
		`2:20: nodes: "node-c" is the name of no [[node]] in cluster.toml`,
		`3:22: include_ports: 81 is not in include_ports of [filter] in cluster.toml; add it there`,
	}}).check(t, "apps/a.toml", cluster)
}

// TestDuplicateVIP: two sound applications with one VIP disable one another, an
// application that is disabled anyway disables no other.
func TestDuplicateVIP(t *testing.T) {
	shared, node := write(t, map[string]string{
		"apps/a.toml": "vip = '192.0.2.100'",
		"apps/b.toml": "vip = [\n'2001:db8::1', '192.0.2.100']",
		"apps/c.toml": "vip = '192.0.2.101'",
		"apps/d.toml": "name = 'c'\nvip = '192.0.2.101'", // a copy of c
		"apps/e.toml": "vip = '192.0.2.102'",
	})
	c, err := Load(shared, node)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`%[1]s/a.toml:1:7: vip: 192.0.2.100 is the VIP of application "b" too (%[1]s/b.toml)
%[1]s/b.toml:2:16: vip: 192.0.2.100 is the VIP of application "a" too (%[1]s/a.toml)
%[1]s/d.toml:1:8: name: "c" differs from the file's name; write "d" or rename the file to c.toml
%[1]s/d.toml:2:7: vip: 192.0.2.101 is the VIP of application "c" too (%[1]s/c.toml)`, shared+"/apps")
	if got := c.AllFaults().Error(); got != want {
		t.Errorf("faults\n got %s\nwant %s", got, want)
	}
	if len(c.Apps) != 2 || c.Apps["c"] == nil || c.Apps["e"] == nil {
		t.Errorf("applications %v", c.Apps)
	}
}

// TestAllFilesAtOnce: one run names the faults of every file.
func TestAllFilesAtOnce(t *testing.T) {
	shared, node := write(t, map[string]string{
		"cluster.toml": "x = 1", "node.toml": "interface = 'eth0'\ny = 1", "apps/a.toml": "vip = '192.0.2.1'\nz = 1",
	})
	_, err := Load(shared, node)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"/cluster.toml:1:1: ", "/node.toml:2:1: ", "/apps/a.toml:2:1: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no fault at %s in\n%v", want, err)
		}
	}
	if n := strings.Count(err.Error(), "\n"); n != 2 {
		t.Errorf("%d lines in\n%v", n+1, err)
	}
}

func TestManyFaults(t *testing.T) {
	shared, node := write(t, map[string]string{
		"cluster.toml": "[filter]\ninclude_ports = [" + strings.Repeat("0,", 60000) + "]",
	})
	var faults Faults
	if _, err := Load(shared, node); !errors.As(err, &faults) || len(faults) != maxFaults+1 {
		t.Fatalf("%d faults, %v", len(faults), err)
	}
	if m := faults[maxFaults].Message; m != "more faults follow; only 100 are shown" {
		t.Error(m)
	}
}
