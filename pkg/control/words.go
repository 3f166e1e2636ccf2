package control

import "slices"

// Application states. StateUnknown stands for an application that is not
// registered on this node.
const (
	StateUnknown        = ""
	StateConnected      = "CONNECTED"
	StateSnapshotStart  = "SNAPSHOTSTART"
	StateSnapshotFreeze = "SNAPSHOTFREEZE"
	StateSnapshotDone   = "SNAPSHOTDONE"
	StateRestoreStart   = "RESTORESTART"
	StateRestored       = "RESTORED"
	StateBlockData      = "BLOCKDATA"
)

// Requests to the filter.
const (
	RequestRegister       = "REGISTER"
	RequestUnregister     = "UNREGISTER"
	RequestAdopt          = "ADOPT"
	RequestSnapshotStart  = "SNAPSHOTSTART"
	RequestSnapshotFreeze = "SNAPSHOTFREEZE"
	RequestSeal           = "SEAL"
	RequestSnapshotDone   = "SNAPSHOTDONE"
	RequestSnapshotAbort  = "SNAPSHOTABORT"
	RequestRestoreStart   = "RESTORESTART"
	RequestRestoreConn    = "RESTORECONN"
	RequestRestored       = "RESTORED"
	RequestRestoreAbort   = "RESTOREABORT"
	RequestHandover       = "HANDOVER"
	RequestHandback       = "HANDBACK"
	RequestRelease        = "RELEASE"
	RequestGetConnCount   = "GETCONNCOUNT"
	RequestGetConnInfo    = "GETCONNINFO"
)

// Connection states.
const (
	ConnSynSent    = "SYNSENT"
	ConnSynRcvd    = "SYNRCVD"
	ConnConnect    = "CONNECT"
	ConnClosing    = "CLOSING"
	ConnConnectRmt = "CONNECTRMT" // local side closed, remote side held
	ConnRst        = "RST"        // the remote reset it while the application was away
	ConnRestoring  = "RESTORING"
)

// Roles of a connection, and the kinds of RESTORECONN that bring each back.
const (
	RolePassive = "passive" // accepted by local
	RoleActive  = "active"  // opened by local

	KindSyn      = "syn"      // passive: a handshake towards the listen port
	KindActivate = "activate" // active: the next connect of local is answered
	KindImage    = "image"    // its socket was restored with the process
)

// What Yield asks of the old node.
const (
	YieldAddresses = "addresses"
	YieldBack      = "back"
	YieldRelease   = "release"
)

// Boundaries at which a connection may freeze.
const (
	BoundaryTurn = "turn"
	BoundaryLine = "line"
	BoundaryResp = "resp"
	BoundaryNow  = "now" // of the request alone: freezes where things stand
)

var states = []string{
	StateConnected, StateSnapshotStart, StateSnapshotFreeze, StateSnapshotDone,
	StateRestoreStart, StateRestored, StateBlockData,
}

var requests = []string{
	RequestRegister, RequestUnregister, RequestAdopt, RequestSnapshotStart, RequestSnapshotFreeze,
	RequestSeal, RequestSnapshotDone, RequestSnapshotAbort, RequestRestoreStart,
	RequestRestoreConn, RequestRestored, RequestRestoreAbort, RequestHandover, RequestHandback, RequestRelease, RequestGetConnCount,
	RequestGetConnInfo,
}

// States returns every named application state (StateUnknown, the empty word,
// is not among them) in the order of an application's life.
func States() []string { return slices.Clone(states) }

// Requests returns every request in the order in which a snapshot and a
// restore use them.
func Requests() []string { return slices.Clone(requests) }

// IsState reports whether s is an application state, StateUnknown included.
func IsState(s string) bool { return s == StateUnknown || slices.Contains(states, s) }
