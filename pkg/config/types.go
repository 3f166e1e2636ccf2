package config

import "net/netip"

// Paths and ports that hold when a configuration does not name them.
const (
	// DefaultNodeFile is where a node's own configuration is looked for.
	DefaultNodeFile = "/etc/nfconnfilter/node.toml"
	// DefaultSchedulerPort is the TCP port of restore requests, also of the
	// agent's loopback listener on a node without a scheduler.
	DefaultSchedulerPort = 7400
	// DefaultFilterPort is the TCP port of the connection filter daemon.
	DefaultFilterPort = 7401
	// DefaultKeep is how many snapshots of an application are kept.
	DefaultKeep = 5
	// DefaultAgentPort is the TCP port of the snapshot and restore daemon.
	DefaultAgentPort = 7402
)

// Words of hold.on_data_during_snapshot.
const (
	// WakeFirst wakes the application as soon as data comes for it.
	WakeFirst = "first-byte"
	// WakeFull wakes it when a spool has no room left, or its remote has closed.
	WakeFull = "full"
	// OnDataHold keeps a remote's payload waiting until the restore.
	OnDataHold = "hold"
	// OnDataAbort gives the snapshot up when payload arrives.
	OnDataAbort = "abort"
)

// Words of checkpoint.engine.
const (
	// EngineRestart starts the application anew.
	EngineRestart = "restart"
	// EngineCRIU dumps and restores the process with CRIU.
	EngineCRIU = "criu"
)

// Words of checkpoint.boundary.
const (
	// BoundaryTurn freezes when the application has answered.
	BoundaryTurn = "turn"
	// BoundaryLine freezes after a whole line.
	BoundaryLine = "line"
	// BoundaryRESP freezes between whole RESP commands and replies.
	BoundaryRESP = "resp"
)

// Config is the merged configuration of one node.
type Config struct {
	Cluster Cluster
	Node    Node
	// Apps holds the valid applications by name.
	Apps map[string]*App
	// AppFaults holds the faults of the applications that are disabled, by
	// the name that their file's name gives. No name is in Apps as well.
	AppFaults map[string]Faults
	// SharedDir and NodeFile are the paths given to Load.
	SharedDir, NodeFile string
	// Generation is for the caller to count its accepted configurations;
	// Load leaves 1.
	Generation uint64

	hasCluster, hasApps bool // there is a cluster.toml, a directory apps
}

// Cluster is cluster.toml.
type Cluster struct {
	// Scheduler is nil when the file has no [scheduler].
	Scheduler *Scheduler
	Nodes     []ClusterNode
	Filter    Filter
	Hold      Hold
	Balance   Balance
	Snapshots Snapshots
}

// Snapshots is [snapshots]: which of an application's are kept.
type Snapshots struct {
	// Keep is how many, at least 1.
	Keep int
	// MaxAge removes older ones, the current one aside; 0: none for its age.
	MaxAge Duration
}

// Scheduler is where restore requests go.
type Scheduler struct {
	Address netip.Addr
	Port    uint16
}

// ClusterNode is one [[node]]: a node and what others dial.
type ClusterNode struct {
	Name       string
	Address    netip.Addr
	FilterPort uint16
	AgentPort  uint16
}

// Filter is what the filter looks at besides the applications' own lists.
type Filter struct {
	// IncludePorts are local ports; empty means all.
	IncludePorts []uint16
	ExcludePorts []uint16
	// IncludeAddresses are remote prefixes; empty means all.
	IncludeAddresses []netip.Prefix
	ExcludeAddresses []netip.Prefix
}

// Hold says what happens to payload that arrives for a stopped application.
type Hold struct {
	// OnDataDuringSnapshot is OnDataHold or OnDataAbort.
	OnDataDuringSnapshot string
	// Spool is the most payload kept for each connection; 0 keeps none.
	Spool ByteSize
	// Wake is WakeFirst or WakeFull: which octets of a spool wake the application.
	Wake string
}

// Balance is [balance]: when applications move between nodes by themselves.
// High and Low are thresholds of a node's load, 1 for one that is fully used,
// Cooldown the least time between two moves of a node. High 0 is off.
type Balance struct {
	High, Low float64
	Cooldown  Duration
}

// Node is node.toml: what is local to one node.
type Node struct {
	Name      string
	Interface string
	// Address is the zero Addr when the file names none.
	Address    netip.Addr
	FilterPort uint16
	AgentPort  uint16
	// AllowPlaintext permits traffic between nodes without TLS.
	AllowPlaintext bool
	StateDir       string
	ControlSocket  string
	AgentSocket    string
	// ControlGroup is the group that may use the sockets besides root.
	ControlGroup string
	// MetricsListen is empty (off) or ADDRESS:PORT.
	MetricsListen string
	// LoadFile holds the node's load as a number, 1 for one that is fully used;
	// empty: the kernel's load average for each CPU.
	LoadFile string
	Queue    Queue
	Limits   Limits
	CRIU     CRIU
	TLS      TLS
}

// Queue is [queue]: NFQUEUE numbers, packet marks and capacity.
type Queue struct {
	First, Count   uint16
	Mark, MarkMask uint32
	MaxConnections int
}

// Limits is [limits]: what the filter keeps at most.
type Limits struct {
	// ConnectionsPerApp is 0 (as many as max_connections) or the most
	// connections of one application.
	ConnectionsPerApp int
	// Payload kept for applications that are away, in bytes.
	KeptBytes, KeptBytesPerApp, KeptBytesPerConnection ByteSize
	// Handshakes kept for applications that are away.
	PendingSYNs, PendingSYNsPerApp int
}

// CRIU is [criu].
type CRIU struct {
	// Command is a name on PATH or an absolute path.
	Command string
}

// TLS is [tls]: files of the mutual TLS between nodes; all empty is off.
type TLS struct {
	Cert, Key, CA string
}

// App is one application: apps/NAME.toml.
type App struct {
	Name string
	// VIPs are one address, or one IPv4 and one IPv6, in the file's order.
	VIPs []netip.Addr
	// Nodes are the nodes that may run it; empty means every node.
	Nodes []string
	// IncludePorts are local ports of accepted connections.
	IncludePorts []uint16
	// OutgoingPorts are remote ports of opened connections; empty means all.
	OutgoingPorts []uint16
	ExcludePorts  []uint16
	Process       Process
	Checkpoint    Checkpoint
	Hibernate     Hibernate
	Heartbeats    []Heartbeat
	// Hold is the application's own, where it has none the cluster's.
	Hold Hold
}

// Process is [process]: how the application runs.
type Process struct {
	// Start is the command and its arguments; empty means that the
	// application is started by others and adopted.
	Start            []string
	User             string
	WorkingDirectory string
	// Environment are additions of the form NAME=VALUE.
	Environment []string
	LogFile     string
	// Namespace is a network namespace's name or path; empty is the host's.
	Namespace string
	// StopSignal is the signal's name with SIG, for example SIGKILL.
	StopSignal   string
	StopTimeout  Duration
	PidFile      string
	SystemdUnit  string
	ReadyTimeout Duration
	BindVIP      bool
}

// Checkpoint is [checkpoint].
type Checkpoint struct {
	// Engine is EngineRestart or EngineCRIU.
	Engine string
	// Before is run once connections are frozen and drained.
	Before       []string
	DrainTimeout Duration
	// Boundary is BoundaryTurn, BoundaryLine or BoundaryRESP.
	Boundary string
	// Quiet is the silence that counts as finished.
	Quiet Duration
	// PreCopy has the memory copied before the process is stopped, with EngineCRIU.
	PreCopy bool
}

// Hibernate is [hibernate].
type Hibernate struct {
	// After is the time without payload before a snapshot; 0 is never.
	After Duration
}

// Heartbeat is one [[heartbeat]]: a Match that is answered with Reply (no
// Reply: only acknowledged), a Send every Interval, or both.
type Heartbeat struct {
	Remote             netip.Prefix
	Match, Reply, Send []byte
	Interval           Duration
	// OnlyClosed sends only while the remote is told to wait with its data.
	OnlyClosed bool
}
