// Package appstate holds the states of applications and connections and the
// one table of what may follow what.
//
//	            REGISTER              SNAPSHOTSTART           SNAPSHOTFREEZE
//	unknown ──────────────▶ CONNECTED ─────────────▶ SNAPSHOTSTART ──────────▶ SNAPSHOTFREEZE
//	                            ▲ (first time)             │ SNAPSHOTABORT        │    │ SNAPSHOTDONE
//	                            │                          ▼                      ▼    ▼
//	                        SNAPSHOTSTART ◀──────────── RESTORED ◀──────────── (abort) SNAPSHOTDONE
//	                                                       ▲      RESTORED             │   ▲
//	                                                       └───────────── RESTORESTART ◀┘   │ RESTOREABORT
//	                                                                            └───────────┘
//
// Between nodes:
//
//	SNAPSHOTDONE ── HANDOVER ──▶ BLOCKDATA ── RELEASE ──▶ unknown
//	          ▲──── HANDBACK ─────┘   │
//	unknown ── RESTORESTART with an old node ──▶ RESTORESTART ── RESTOREABORT ──▶ BLOCKDATA, until
//	                       (BLOCKDATA too)                       the old node has them back; unknown
package appstate

import "fmt"

// App is the state of an application on this node.
type App uint8

// Application states.
const (
	Unknown App = iota
	Connected
	SnapshotStart
	SnapshotFreeze
	SnapshotDone
	RestoreStart
	Restored
	BlockData
)

var appNames = [...]string{"", "CONNECTED", "SNAPSHOTSTART", "SNAPSHOTFREEZE", "SNAPSHOTDONE", "RESTORESTART", "RESTORED", "BLOCKDATA"}

func (a App) String() string { return appNames[a] }

// ParseApp reads a state's name; "" is Unknown.
func ParseApp(s string) (App, bool) {
	for i, n := range appNames {
		if n == s {
			return App(i), true
		}
	}
	return Unknown, false
}

// Away tells whether the filter speaks for the application in this state.
func (a App) Away() bool {
	return a == SnapshotFreeze || a == SnapshotDone || a == RestoreStart
}

// Captured tells whether nothing of the application passes by the filter in
// this state: it speaks for it, or, in BLOCKDATA, nobody here does.
func (a App) Captured() bool { return a.Away() || a == BlockData }

// Request is one request of the control API that looks at the state.
type Request uint8

// Requests.
const (
	ReqRegister Request = iota
	ReqUnregister
	ReqSnapshotStart
	ReqSnapshotFreeze
	ReqSeal
	ReqSnapshotDone
	ReqSnapshotAbort
	ReqRestoreStart
	ReqRestoreConn
	ReqRestored
	ReqRestoreAbort
	ReqAdopt
	ReqHandover
	ReqHandback
	ReqRelease
	ReqRestoreTaken // RESTORESTART with an old node
	ReqYield        // RESTOREABORT of what another node handed over: first step
	ReqUnyield      // the other node does not take it back
)

var reqNames = [...]string{"REGISTER", "UNREGISTER", "SNAPSHOTSTART", "SNAPSHOTFREEZE", "SEAL", "SNAPSHOTDONE",
	"SNAPSHOTABORT", "RESTORESTART", "RESTORECONN", "RESTORED", "RESTOREABORT", "ADOPT",
	"HANDOVER", "HANDBACK", "RELEASE", "RESTORESTART", "RESTOREABORT", "RESTOREABORT"}

func (r Request) String() string { return reqNames[r] }

// rule is one row of the request table.
type rule struct {
	from []App
	to   App
	stay bool // the request leaves the state as it is
}

var table = [...]rule{
	ReqRegister:       {from: []App{Unknown}, to: Connected},
	ReqUnregister:     {from: []App{Connected, Restored}, to: Unknown},
	ReqSnapshotStart:  {from: []App{Connected, Restored}, to: SnapshotStart},
	ReqSnapshotFreeze: {from: []App{SnapshotStart}, to: SnapshotFreeze},
	ReqSeal:           {from: []App{SnapshotFreeze}, stay: true},
	ReqSnapshotDone:   {from: []App{SnapshotFreeze}, to: SnapshotDone},
	ReqSnapshotAbort:  {from: []App{SnapshotStart, SnapshotFreeze}, to: Restored},
	ReqRestoreStart:   {from: []App{SnapshotDone}, to: RestoreStart},
	ReqRestoreConn:    {from: []App{RestoreStart}, stay: true},
	ReqRestored:       {from: []App{RestoreStart}, to: Restored},
	ReqRestoreAbort:   {from: []App{RestoreStart}, to: SnapshotDone},
	ReqAdopt:          {from: []App{Connected, Restored, SnapshotStart}, stay: true},
	ReqHandover:       {from: []App{SnapshotDone}, to: BlockData},
	ReqHandback:       {from: []App{BlockData}, to: SnapshotDone},
	ReqRelease:        {from: []App{BlockData}, to: Unknown},
	ReqRestoreTaken:   {from: []App{SnapshotDone, BlockData, Unknown}, to: RestoreStart},
	ReqYield:          {from: []App{RestoreStart, SnapshotDone}, to: BlockData},
	ReqUnyield:        {from: []App{BlockData}, to: RestoreStart},
}

// StateError is a request that the state does not allow.
type StateError struct {
	App     string
	Request Request
	State   App
}

func (e *StateError) Error() string {
	if e.State == Unknown {
		return fmt.Sprintf("%s refused: application %q is not known on this node; start it first", e.Request, e.App)
	}
	return fmt.Sprintf("%s refused: application %q is in state %s", e.Request, e.App, e.State)
}

// Permit looks request r up for an application in state a. done is true where
// r already took effect and the state is still the one it led to: helpers
// crash and repeat themselves. forced widens UNREGISTER to SNAPSHOTDONE.
func Permit(app string, r Request, a App, forced bool) (done bool, err error) {
	ru := table[r]
	for _, f := range ru.from {
		if f == a {
			return false, nil
		}
	}
	if r == ReqUnregister && forced && a == SnapshotDone {
		return false, nil
	}
	if !ru.stay && ru.to == a {
		return true, nil
	}
	return false, &StateError{App: app, Request: r, State: a}
}

// To is the state that request r leads to from a.
func To(r Request, a App) App {
	if table[r].stay {
		return a
	}
	return table[r].to
}

// Conn is the state of one connection structure.
type Conn uint8

// Connection states.
const (
	ConnNone Conn = iota
	SynSent
	SynRcvd
	Connect
	Closing    // one side has closed
	ConnectRmt // the local side is closed, the remote side is held
	Rst        // the remote reset while the local side was away
	Restoring  // the handshake with the returning local side is under way
	Removed
)

var connNames = [...]string{"", "SYNSENT", "SYNRCVD", "CONNECT", "CLOSING", "CONNECTRMT", "RST", "RESTORING", "REMOVED"}

func (c Conn) String() string { return connNames[c] }

var connNext = [...][]Conn{
	ConnNone:   {SynSent, SynRcvd, Connect, Closing},
	SynSent:    {Connect, Removed},
	SynRcvd:    {Connect, Closing, ConnectRmt, Removed},
	Connect:    {Closing, ConnectRmt, Rst, SynRcvd, Removed},
	Closing:    {Connect, ConnectRmt, Rst, SynRcvd, SynSent, Removed},
	ConnectRmt: {Restoring, Rst, Connect, Closing, Removed},
	Rst:        {Restoring, Removed},
	Restoring:  {Connect, Closing, ConnectRmt, Rst, Removed},
	Removed:    nil,
}

// CanFollow tells whether a connection may go from c to n. Staying is allowed.
func (c Conn) CanFollow(n Conn) bool {
	if c == n {
		return true
	}
	for _, x := range connNext[c] {
		if x == n {
			return true
		}
	}
	return false
}

// Role tells who opened a connection.
type Role uint8

// Roles.
const (
	Passive Role = iota // accepted by local
	Active              // opened by local
)

func (r Role) String() string {
	if r == Active {
		return "active"
	}
	return "passive"
}
