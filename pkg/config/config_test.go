package config

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
)

const minimalNode = "interface = \"eth0\"\nname = \"node-a\"\naddress = \"192.0.2.11\"\n"

// write makes a configuration directory from file names and texts; node.toml
// is made when it is not among them.
func write(t testing.TB, files map[string]string) (shared, node string) {
	t.Helper()
	dir := t.TempDir()
	if _, ok := files["node.toml"]; !ok {
		files = maps.Clone(files)
		files["node.toml"] = minimalNode
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, filepath.Join(dir, "node.toml")
}

// load loads what must be without any fault.
func load(t *testing.T, files map[string]string) *Config {
	t.Helper()
	shared, node := write(t, files)
	c, err := Load(shared, node)
	if err != nil {
		t.Fatal(err)
	}
	if faults := c.AllFaults(); faults != nil {
		t.Fatal(faults)
	}
	return c
}

func TestDefaults(t *testing.T) {
	c := load(t, map[string]string{"apps/a.toml": `vip = "192.0.2.100"`})
	want := &App{
		Name: "a", VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.100")},
		Process: Process{StopSignal: "SIGKILL", StopTimeout: Duration(5 * time.Second), ReadyTimeout: Duration(10 * time.Second)},
		Checkpoint: Checkpoint{Engine: "restart", DrainTimeout: Duration(5 * time.Second), Boundary: "turn",
			Quiet: Duration(50 * time.Millisecond)},
		Hold: Hold{OnDataDuringSnapshot: "hold", Wake: "first-byte"},
	}
	if got := c.Apps["a"]; !reflect.DeepEqual(got, want) {
		t.Errorf("application\n got %+v\nwant %+v", got, want)
	}
	wantNode := Node{
		Name: "node-a", Interface: "eth0", Address: netip.MustParseAddr("192.0.2.11"), FilterPort: 7401, AgentPort: 7402,
		StateDir: "/var/lib/nfconnfilter", ControlSocket: "/run/nfconnfilter/control.sock",
		AgentSocket: "/run/nfconnfilter/agent.sock", ControlGroup: "nfconnfilter",
		Queue: Queue{First: 64, Count: 1, Mark: 0x4e460000, MarkMask: 0xffff0000, MaxConnections: 1048576},
		Limits: Limits{KeptBytes: 256 << 20, KeptBytesPerApp: 256 << 20, KeptBytesPerConnection: 60000,
			PendingSYNs: 65536, PendingSYNsPerApp: 4096},
		CRIU: CRIU{Command: "criu"},
	}
	if c.Node != wantNode {
		t.Errorf("node\n got %+v\nwant %+v", c.Node, wantNode)
	}
	wantCluster := Cluster{Filter: Filter{ExcludePorts: []uint16{22}}, Hold: Hold{OnDataDuringSnapshot: "hold", Wake: "first-byte"}, Snapshots: Snapshots{Keep: 5}}
	if !reflect.DeepEqual(c.Cluster, wantCluster) {
		t.Errorf("cluster\n got %+v\nwant %+v", c.Cluster, wantCluster)
	}
}

// TestSSH: the port of ssh is excluded unless the cluster includes it by name.
func TestSSH(t *testing.T) {
	for text, want := range map[string][]uint16{
		"": {22}, "filter.exclude_ports = []": nil, "filter.include_ports = [22, 80]": nil, "filter.include_ports = [80]": {22},
	} {
		c := load(t, map[string]string{"cluster.toml": text})
		if got := c.Cluster.Filter.ExcludePorts; !slices.Equal(got, want) {
			t.Errorf("%q excludes %v, want %v", text, got, want)
		}
	}
}

// everything sets every key to something else than its default.
var everything = map[string]string{
	"cluster.toml": `
[scheduler]
address = "192.0.2.10"
port = 7500
[[node]]
name = "node-a"
address = "192.0.2.11"
filter_port = 8401
agent_port = 8402
[[node]]
name = "node-b"
address = "2001:db8::12"
[filter]
include_ports = [80, 6379]
exclude_ports = [23]
include_addresses = ["198.51.100.0/24", "2001:db8::/32"]
exclude_addresses = ["198.51.100.7"]
[hold]
on_data_during_snapshot = "abort"
spool = "256KiB"
[balance]
high = 0.9
low = 1e-1
cooldown = "5m"
`,
	"node.toml": `
name = "node-a"
interface = "eth1"
allow_plaintext = true
state_dir = "/srv/state"
control_socket = "/srv/c.sock"
agent_socket = "/srv/a.sock"
control_group = ""
metrics_listen = "[::1]:7403"
[queue]
first = 7
count = 3
mark = 0x10
mark_mask = 0xf0
max_connections = 1000
[limits]
connections_per_app = 10
kept_bytes = "1MiB"
kept_bytes_per_app = "512KiB"
kept_bytes_per_connection = "4KiB"
pending_syns = 20
pending_syns_per_app = 5
[criu]
command = "/opt/criu"
[tls]
cert = "/etc/c.crt"
key = "/etc/c.key"
ca = "/etc/ca.crt"
`,
	"apps/redis.toml": `
name = "redis"
vip = ["192.0.2.100", "2001:db8::100"]
nodes = ["node-b"]
include_ports = [6379]
outgoing_ports = [5432]
exclude_ports = [6380]
[process]
start = ["redis-server", "/etc/a \"b\"\n", 'c:\d', """é
\u0001"""]
user = "redis"
working_directory = "/srv"
environment = ["A=1", "B="]
log_file = "/var/log/redis"
namespace = "blue"
stop_signal = "term"
stop_timeout = "1m"
pid_file = "/run/redis.pid"
ready_timeout = "1h30m"
bind_vip = true
[checkpoint]
engine = "criu"
before = ["save", "now"]
drain_timeout = "7s"
boundary = "resp"
quiet = "0s"
pre_copy = true
[hibernate]
after = "10m"
[[heartbeat]]
remote = "198.51.100.0/24"
match = "PING\r\n"
reply = "PONG\r\n"
[[heartbeat]]
remote = "2001:db8::7"
send_hex = "00 fF"
interval = "30s"
only_closed = true
[hold]
spool = "1MiB"
wake = "full"
`,
	"apps/odd.name.toml": `
vip = "2001:db8::101"
[process]
systemd_unit = "odd@1.service"
[[heartbeat]]
remote = "0.0.0.0/0"
match_hex = "ff"
reply = "\u0000"
`,
}

func TestEverything(t *testing.T) {
	c := load(t, everything)
	if c.Node.FilterPort != 8401 || c.Node.AgentPort != 8402 || c.Node.Address != netip.MustParseAddr("192.0.2.11") {
		t.Errorf("node did not take its [[node]]'s address and ports: %+v", c.Node)
	}
	if c.Node.Limits != (Limits{10, 1 << 20, 512 << 10, 4 << 10, 20, 5}) {
		t.Errorf("limits %+v", c.Node.Limits)
	}
	if c.Node.Queue != (Queue{First: 7, Count: 3, Mark: 0x10, MarkMask: 0xf0, MaxConnections: 1000}) {
		t.Errorf("queue %+v", c.Node.Queue)
	}
	a := c.Apps["redis"]
	if a.Hold != (Hold{OnDataDuringSnapshot: "abort", Spool: 1 << 20, Wake: "full"}) {
		t.Errorf("hold %+v is not the application's over the cluster's", a.Hold)
	}
	if got := c.Apps["odd.name"].Hold; got != (Hold{OnDataDuringSnapshot: "abort", Spool: 256 << 10, Wake: "first-byte"}) {
		t.Errorf("hold %+v is not the cluster's", got)
	}
	if a.Process.StopSignal != "SIGTERM" {
		t.Errorf("stop_signal %q", a.Process.StopSignal)
	}
	if want := []string{"redis-server", "/etc/a \"b\"\n", `c:\d`, "é\n\x01"}; !slices.Equal(a.Process.Start, want) {
		t.Errorf("start %q, want %q", a.Process.Start, want)
	}
	want := []Heartbeat{
		{Remote: netip.MustParsePrefix("198.51.100.0/24"), Match: []byte("PING\r\n"), Reply: []byte("PONG\r\n")},
		{Remote: netip.MustParsePrefix("2001:db8::7/128"), Send: []byte{0, 0xff}, Interval: Duration(30 * time.Second), OnlyClosed: true},
	}
	if !reflect.DeepEqual(a.Heartbeats, want) {
		t.Errorf("heartbeats %+v", a.Heartbeats)
	}
	if s := c.Cluster.Scheduler; s == nil || *s != (Scheduler{netip.MustParseAddr("192.0.2.10"), 7500}) {
		t.Errorf("scheduler %+v", s)
	}
	if c.Cluster.Balance != (Balance{High: 0.9, Low: 0.1, Cooldown: Duration(5 * time.Minute)}) {
		t.Errorf("balance %+v", c.Cluster.Balance)
	}
	if !slices.Equal(c.Cluster.Filter.ExcludeAddresses, []netip.Prefix{netip.MustParsePrefix("198.51.100.7/32")}) {
		t.Errorf("exclude_addresses %v", c.Cluster.Filter.ExcludeAddresses)
	}
	// Every field of every structure is set somewhere above, so that a key
	// that nobody reads would show.
	for _, v := range []any{c.Cluster, *c.Cluster.Scheduler, c.Cluster.Filter, c.Cluster.Hold, c.Cluster.Balance,
		a.Process, a.Checkpoint, a.Hibernate, c.Node.TLS, c.Node.CRIU, c.Node.Queue} {
		for i, rv := 0, reflect.ValueOf(v); i < rv.NumField(); i++ {
			name := rv.Type().Field(i).Name
			if rv.Field(i).IsZero() && name != "Quiet" && name != "SystemdUnit" {
				// pid_file and systemd_unit exclude one another; the unit is odd.name's.
				t.Errorf("%T.%s was not read", v, name)
			}
		}
	}
	if c.Apps["odd.name"].Process.SystemdUnit != "odd@1.service" {
		t.Error("systemd_unit was not read")
	}
}

// TestPrintRoundTrip takes Print's document apart into files and loads them.
func TestPrintRoundTrip(t *testing.T) {
	for name, files := range map[string]map[string]string{"everything": everything, "least": {}} {
		t.Run(name, func(t *testing.T) {
			c := load(t, files)
			var out bytes.Buffer
			if err := Print(&out, c); err != nil {
				t.Fatal(err)
			}
			var doc struct {
				Cluster, Node map[string]any
				Apps          map[string]map[string]any
			}
			if _, err := toml.Decode(out.String(), &doc); err != nil {
				t.Fatalf("%v in\n%s", err, &out)
			}
			again := map[string]string{"cluster.toml": encode(t, doc.Cluster), "node.toml": encode(t, doc.Node)}
			for name, app := range doc.Apps {
				again["apps/"+name+".toml"] = encode(t, app)
			}
			d := load(t, again)
			d.SharedDir, d.NodeFile, d.hasCluster, d.hasApps = c.SharedDir, c.NodeFile, c.hasCluster, c.hasApps
			if !reflect.DeepEqual(c, d) {
				t.Errorf("before %+v\nafter %+v\nprinted:\n%s", c, d, &out)
			}
			var second bytes.Buffer
			if err := Print(&second, d); err != nil || second.String() != out.String() {
				t.Errorf("printed again (%v):\n%s\nfirst:\n%s", err, &second, &out)
			}
		})
	}
}

func encode(t *testing.T, m map[string]any) string {
	t.Helper()
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(m); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, fs.ErrClosed }

func TestPrintError(t *testing.T) {
	if err := Print(brokenWriter{}, load(t, everything)); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

func TestLoadApp(t *testing.T) {
	shared, node := write(t, map[string]string{
		"apps/good.toml": `vip = "192.0.2.100"`,
		"apps/bad.toml":  `vip = "192.0.2"`,
	})
	if a, err := LoadApp(shared, node, "good"); err != nil || a.Name != "good" {
		t.Errorf("good: %+v, %v", a, err)
	}
	var faults Faults
	if _, err := LoadApp(shared, node, "bad"); !errors.As(err, &faults) || len(faults) != 1 {
		t.Errorf("bad: %v", err)
	}
	for _, name := range []string{"none", "", "../cluster", "a/b"} {
		if _, err := LoadApp(shared, node, name); !errors.Is(err, ErrUnknownApp) || !strings.Contains(err.Error(), `"`+name+`"`) {
			t.Errorf("%q: %v", name, err)
		}
	}
	// A fresh read sees what has changed since.
	if err := os.WriteFile(filepath.Join(shared, "apps", "good.toml"), []byte(`vip = "192.0.2.101"`), 0o644); err != nil {
		t.Fatal(err)
	}
	if a, err := LoadApp(shared, node, "good"); err != nil || a.VIPs[0] != netip.MustParseAddr("192.0.2.101") {
		t.Errorf("changed: %+v, %v", a, err)
	}
	if err := os.WriteFile(node, []byte("name = 1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadApp(shared, node, "good"); !errors.As(err, &faults) {
		t.Errorf("bad node file: %v", err)
	}
}

func TestLoadNode(t *testing.T) {
	_, node := write(t, map[string]string{"node.toml": `control_socket = "/x/c.sock"`})
	n, err := LoadNode(node)
	if err != nil || n.ControlSocket != "/x/c.sock" || n.AgentSocket != "/run/nfconnfilter/agent.sock" {
		t.Errorf("%+v, %v", n, err)
	}
	var faults Faults
	missing := node + ".none"
	if _, err := LoadNode(missing); !errors.As(err, &faults) || err.Error() != missing+":1:1: cannot be read: no such file or directory" {
		t.Errorf("missing file: %v", err)
	}
	_, node = write(t, map[string]string{"node.toml": "x = 1\nname = 2"})
	if _, err := LoadNode(node); !errors.As(err, &faults) || len(faults) != 2 {
		t.Errorf("faulty file: %v", err)
	}
	if _, err := os.Stat(DefaultNodeFile); errors.Is(err, fs.ErrNotExist) {
		if n, err := LoadNode(DefaultNodeFile); err != nil || *n != defaultNode() {
			t.Errorf("default file: %+v, %v", n, err)
		}
	}
}

func TestUnreadable(t *testing.T) {
	shared, node := write(t, map[string]string{"apps/a.toml": `vip = "192.0.2.100"`})
	check := func(want string, shared, node string) {
		t.Helper()
		var faults Faults
		if _, err := Load(shared, node); !errors.As(err, &faults) || err.Error() != want {
			t.Errorf("error\n got %v\nwant %v", err, want)
		}
	}
	check(node+".none:1:1: cannot be read: no such file or directory", shared, node+".none")
	check(shared+"/none:1:1: cannot be read: no such file or directory", shared+"/none", node)
	check(shared+":1:1: cannot be read: not a regular file", shared, shared)
	big := filepath.Join(shared, "cluster.toml")
	if err := os.WriteFile(big, bytes.Repeat([]byte("#\n"), maxFileSize), 0o644); err != nil {
		t.Fatal(err)
	}
	check(big+":1:1: cannot be read: larger than 256 KiB", shared, node)
}

// TestExamples loads the examples for operators.
func TestExamples(t *testing.T) {
	c, err := Load("../../configs", "../../configs/node.toml")
	if err != nil {
		t.Fatal(err)
	}
	if faults := c.AllFaults(); faults != nil {
		t.Fatal(faults)
	}
	if names := slices.Sorted(maps.Keys(c.Apps)); !slices.Equal(names, []string{"nginx", "redis"}) {
		t.Errorf("applications %v", names)
	}
	// They promise to show the defaults, apart from what each node sets.
	n := defaultNode()
	n.Name, n.Interface, n.Address = c.Node.Name, c.Node.Interface, c.Node.Address
	if c.Node != n {
		t.Errorf("node.toml: %+v", c.Node)
	}
	d := defaultCluster()
	d.Nodes = c.Cluster.Nodes
	if !reflect.DeepEqual(c.Cluster, d) {
		t.Errorf("cluster.toml: %+v", c.Cluster)
	}
}
