package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// Requests of the control API (behaviour: requests). Times are in ns.
type (
	// Register makes an application known.
	Register struct {
		App                            string
		VIPs                           []netip.Addr
		Include, Exclude, Outgoing     []uint16
		IncludeAddresses, ExcludeAddrs []netip.Prefix
	}
	// Unregister forgets it. Force also resets held remotes and drops
	// translations.
	Unregister struct {
		App   string
		Force bool
	}
	// SnapshotStart announces a snapshot and learns every connection.
	SnapshotStart struct {
		App      string
		Sockets  []Socket
		Listen   []uint16
		Timeout  Time   // for learning, default 2 s
		LeaveOut bool   // reset what cannot be learned instead of refusing
		Boundary string // of the freeze that follows: what remotes say is followed from now on
		Quiet    Time   // of the freeze, default 50 ms
		Silent   bool   // of the freeze: what is not learned the image tells
	}
	// Adopt makes connections known that are older than the filter, and forgets
	// translated ones whose local socket is gone.
	Adopt struct {
		App     string
		Sockets []Socket // all, those in TIME_WAIT too
		Listen  []uint16
		At      Time // just before they were listed; what is younger is not missed
	}
	// SnapshotFreeze stops payload towards the application.
	SnapshotFreeze struct {
		App string
		// "turn", "line" or "resp"; or "now", which may be repeated: connections that
		// have not reached their boundary are frozen where they stand.
		Boundary string
		Quiet    Time // default 50 ms
		// The caller seals before it stops the application: until then a FIN
		// or RST of local is the application's own word and passes.
		PassCloses bool
		// Octets that come for a frozen connection give the snapshot up: SEAL is
		// refused then.
		AbortOnData bool
		// The process is dumped with its sockets: nothing passes from now on, in either
		// direction, and nothing is told to local. SEAL is to bring the image.
		Silent bool
		// While the application is away: octets of each connection that are
		// acknowledged and kept, whether the first of them wakes the application or
		// the last that has room, and the heartbeats that are spoken.
		Spool      int
		WakeFull   bool
		Heartbeats []Heartbeat
	}
	// Seal stops everything from local to the remotes.
	Seal struct {
		App   string
		Image []ImageSocket // all of a silent freeze
		Again bool          // it repeats one, by the same image, of which nobody knows the answer
	}
	// SnapshotDone tells that the application is gone and stored under ID.
	SnapshotDone struct {
		App, ID string
		Force   bool
	}
	// SnapshotAbort lets the application go on.
	SnapshotAbort struct{ App string }
	// RestoreStart announces that the application comes back. OldNode: the node
	// that held it, which has handed over Given, where that is not this one.
	RestoreStart struct {
		App, ID, OldNode string
		IP               netip.Addr
		Given            *Structures
	}
	// RestoreConn starts the handshakes of Conns.
	RestoreConn struct {
		App   string
		Conns []ConnID
		Kind  string // "syn", "activate", or "image": their sockets are there again
	}
	// Restored opens all connections.
	Restored struct {
		App          string
		ResetMissing bool
	}
	// RestoreAbort holds the connections again.
	RestoreAbort struct{ App string }
	// GetConnInfo returns the connection structures, with the reasons of their
	// verdicts where these are asked for.
	GetConnInfo struct {
		App     string
		Reasons bool
	}
	// Status returns one application, or all for "".
	Status struct{ App string }
)

// Socket is a socket of the application as sock_diag shows it.
type Socket struct {
	ID                        ConnID
	Established               bool // ESTABLISHED or CLOSE_WAIT
	CloseWait                 bool
	Owned                     bool // a process has it
	LocalClosed               bool // FIN_WAIT1, FIN_WAIT2, CLOSING or LAST_ACK: its stack may still have octets to send
	RemoteClosed              bool // of these: CLOSING, LAST_ACK
	Passive                   bool
	SendQueue                 uint32
	HasInfo                   bool
	TS, SACK, WScale          bool
	RemoteScale, LocalScale   uint8
	SndMSS                    uint32
	BytesAcked, BytesReceived uint64
	LastSent, LastRecv        Time // ago
}

// Result answers requests that change the state.
type Result struct {
	App, SnapshotID string
	State           appstate.App
	Notes           []string
	Learned         int // SNAPSHOTSTART

	Adopted, Forgotten int // ADOPT: connections that were not known; whose socket was gone
}

// Error is a refused request. Conns names connections and what each lacks.
type Error struct {
	App   string
	State appstate.App
	Text  string
	Conns []string
}

func (e *Error) Error() string {
	if len(e.Conns) == 0 {
		return e.Text
	}
	const most = 10
	list := e.Conns
	more := ""
	if len(list) > most {
		more = fmt.Sprintf("; and %d more", len(list)-most)
		list = list[:most]
	}
	return e.Text + ": " + strings.Join(list, "; ") + more
}

// ErrInvalid marks a request whose arguments are wrong.
var ErrInvalid = errors.New("invalid argument")

// pending is a request whose answer waits for packets or a deadline.
type pending struct {
	id       uint64
	app      *app
	body     any
	deadline Time
}

func (e *Engine) request(now Time, r *Request, fx *Effects) {
	reply := func(body any, err error) {
		fx.Replies = append(fx.Replies, Reply{ID: r.ID, Body: body, Err: err})
	}
	switch b := r.Body.(type) {
	case *GetConnInfo:
		reply(e.connInfo(now, b))
		return
	case *Status:
		reply(e.status(b.App))
		return
	case *Register:
		reply(e.register(b, fx))
		return
	}
	name, kind, forced := target(r.Body)
	a := e.apps[name]
	state := appstate.Unknown
	if a != nil {
		state = a.state
	}
	if r, ok := r.Body.(*Release); ok && state == appstate.Restored && a.oldNode != "" && r.From == "" {
		reply(e.oldNodeReleased(a), nil)
		return
	}
	done, err := appstate.Permit(name, kind, state, forced)
	if err != nil {
		reply(nil, err)
		return
	}
	if kind == appstate.ReqSnapshotAbort || kind == appstate.ReqRestoreAbort || kind == appstate.ReqYield {
		e.cancelPending(a, fx)
	}
	if e.waiting(a) {
		reply(nil, &Error{App: name, State: state, Text: fmt.Sprintf("%s refused: another request for application %q is being carried out", kind, name)})
		return
	}
	if res, err, ok := e.between(now, r, a, fx); ok {
		reply(res, err)
		return
	}
	if done {
		if d, ok := r.Body.(*SnapshotDone); ok && d.ID != a.snapID {
			reply(nil, &Error{App: name, State: state, Text: fmt.Sprintf("SNAPSHOTDONE refused: application %q already has snapshot %s", name, a.snapID)})
			return
		}
		if s, ok := r.Body.(*RestoreStart); ok {
			if err := a.belongs(s); err != nil {
				reply(nil, err)
				return
			}
		}
		if a == nil {
			reply(&Result{App: name}, nil)
			return
		}
		if f, ok := r.Body.(*SnapshotFreeze); ok && f.Boundary == boundaryNow {
			a.freezeAll()
		}
		reply(a.result(), nil)
		return
	}
	res, err, wait := e.apply(now, r, a, fx)
	if !wait {
		reply(res, err)
	}
}

func (a *app) result() *Result {
	return &Result{App: a.name, State: a.state, SnapshotID: a.snapID}
}

func (e *Engine) waiting(a *app) bool {
	return slices.ContainsFunc(e.pending, func(p *pending) bool { return p.app == a })
}

// cancelPending answers what waits for a with an error: it is given up.
func (e *Engine) cancelPending(a *app, fx *Effects) {
	e.pending = slices.DeleteFunc(e.pending, func(p *pending) bool {
		if p.app != a {
			return false
		}
		fx.Replies = append(fx.Replies, Reply{ID: p.id, Err: &Error{App: a.name, State: a.state, Text: "aborted by another request"}})
		return true
	})
}

// target names application and request of a body.
func target(body any) (string, appstate.Request, bool) {
	switch b := body.(type) {
	case *Unregister:
		return b.App, appstate.ReqUnregister, b.Force
	case *SnapshotStart:
		return b.App, appstate.ReqSnapshotStart, false
	case *Adopt:
		return b.App, appstate.ReqAdopt, false
	case *SnapshotFreeze:
		return b.App, appstate.ReqSnapshotFreeze, false
	case *Seal:
		return b.App, appstate.ReqSeal, false
	case *SnapshotDone:
		return b.App, appstate.ReqSnapshotDone, b.Force
	case *SnapshotAbort:
		return b.App, appstate.ReqSnapshotAbort, false
	case *RestoreStart:
		if b.OldNode != "" {
			return b.App, appstate.ReqRestoreTaken, false
		}
		return b.App, appstate.ReqRestoreStart, false
	case *RestoreConn:
		return b.App, appstate.ReqRestoreConn, false
	case *Restored:
		return b.App, appstate.ReqRestored, b.ResetMissing
	case *RestoreAbort:
		return b.App, appstate.ReqRestoreAbort, false
	case *Handover:
		return b.App, appstate.ReqHandover, false
	case *Handback:
		return b.App, appstate.ReqHandback, false
	case *Release:
		return b.App, appstate.ReqRelease, b.Force
	case *Yield:
		return b.App, appstate.ReqYield, false
	case *Unyield:
		return b.App, appstate.ReqUnyield, false
	}
	panic(fmt.Sprintf("filter: unknown request %T", body))
}

// apply carries out a permitted request. wait: the reply comes later.
func (e *Engine) apply(now Time, r *Request, a *app, fx *Effects) (res any, err error, wait bool) {
	switch b := r.Body.(type) {
	case *Unregister:
		res, err = e.unregister(b, a, fx)
	case *SnapshotStart:
		return e.snapshotStart(now, r, b, a, fx)
	case *Adopt:
		res = e.adopt(now, b, a, fx)
	case *SnapshotFreeze:
		res, err = e.snapshotFreeze(now, b, a, fx)
	case *Seal:
		if a.silent {
			res, err = e.sealImage(now, b, a, fx)
			break
		}
		return e.seal(now, r, b, a)
	case *SnapshotDone:
		res, err = e.snapshotDone(now, b, a, fx)
	case *SnapshotAbort:
		res, err = e.snapshotAbort(now, a, fx)
	case *RestoreStart:
		res, err = e.restoreStart(now, b, a, fx)
	case *RestoreConn:
		res, err = e.restoreConn(now, b, a, fx)
	case *Restored:
		return e.restored(now, r, b, a, fx)
	case *RestoreAbort:
		res, err = e.restoreAbort(now, a, fx)
	}
	return res, err, false
}

// seal seals at once; after a restart of the filter it waits until local has told
// its numbers again: they were accounted for with the filter before, and nobody
// asks behind the seal. So it does for a connection of local that its remote has
// answered since everything was accounted for.
func (e *Engine) seal(now Time, r *Request, b *Seal, a *app) (res any, err error, wait bool) {
	const learnAgain = 3e9
	late := a.restarted || slices.ContainsFunc(a.conns, func(c *conn) bool { return c.role == appstate.Active && c.created >= a.froze })
	if !late || a.sealed || len(a.unaccounted(now)) == 0 {
		res, err = a.seal()
		return res, err, false
	}
	e.pending = append(e.pending, &pending{id: r.ID, app: a, body: b, deadline: now + learnAgain})
	return nil, nil, true
}

// sealedAgain answers a SEAL that waited.
func (e *Engine) sealedAgain(now Time, p *pending, fx *Effects) bool {
	a := p.app
	reply := Reply{ID: p.id}
	if lacking := a.unaccounted(now); len(lacking) == 0 {
		reply.Body, reply.Err = a.seal()
	} else if now >= p.deadline {
		reply.Err = &Error{App: a.name, State: a.state, Text: "SEAL refused: the filter was started anew during the snapshot, or connections were opened, which are not accounted for since", Conns: lacking}
	} else {
		return false
	}
	fx.Replies = append(fx.Replies, reply)
	return true
}

// unaccounted names the connections that lack something before the seal.
func (a *app) unaccounted(now Time) []string {
	var out []string
	for _, c := range a.conns {
		if why := c.missing(now); why != "" {
			out = append(out, fmt.Sprintf("%v %v: %s", c.id.Local, c.id.Remote, why))
		}
	}
	return out
}

func (a *app) seal() (any, error) {
	if kept := a.keeping(); a.abortOnData && len(kept) > 0 {
		return nil, &Error{App: a.name, State: a.state, Text: "SEAL refused: data came during the snapshot, which is to be given up for that", Conns: kept}
	}
	a.sealed, a.restarted = true, false
	a.markAll() // nothing moves any more: these are the numbers
	return a.result(), nil
}

// keeping names the connections of which octets are kept.
func (a *app) keeping() []string {
	var out []string
	for _, c := range a.conns {
		if c.app.engine.trimKept(c); len(c.kept) > 0 {
			out = append(out, fmt.Sprintf("%v %v: %d octets came", c.id.Local, c.id.Remote, len(c.kept)))
		}
	}
	return out
}

func (e *Engine) register(b *Register, fx *Effects) (any, error) {
	if a := e.apps[b.App]; a != nil {
		if a.state == appstate.Connected && slices.Equal(a.vips, b.VIPs) {
			return a.result(), nil
		}
		return nil, &appstate.StateError{App: b.App, Request: appstate.ReqRegister, State: a.state}
	}
	if b.App == "" || len(b.VIPs) == 0 {
		return nil, fmt.Errorf("%w: REGISTER needs a name and at least one VIP", ErrInvalid)
	}
	for _, v := range b.VIPs {
		if o := e.byVIP[v]; o != nil {
			return nil, &Error{App: b.App, Text: fmt.Sprintf("REGISTER refused: %v is the VIP of application %q", v, o.name)}
		}
	}
	a := &app{engine: e, name: b.App, vips: slices.Clone(b.VIPs),
		include: b.Include, exclude: b.Exclude, outgoing: b.Outgoing,
		includeNets: b.IncludeAddresses, excludeNets: b.ExcludeAddrs}
	e.enter(a)
	a.listen = slices.Clone(a.include)
	for _, p := range a.exclude {
		for _, v := range a.vips {
			fx.Sets = append(fx.Sets, SetChange{Set: SetSkip, Add: true, IP: v, Port: p})
		}
	}
	for _, v := range a.vips {
		if e.blocked[v] {
			delete(e.blocked, v)
			a.setVIP(fx, false, SetAway, SetFull)
		}
	}
	a.setVIP(fx, true, SetVIP)
	a.set(appstate.Connected, fx, "registered")
	return a.result(), nil
}

// enter makes a known to the engine.
func (e *Engine) enter(a *app) {
	e.apps[a.name] = a
	e.order = append(e.order, a)
	slices.SortFunc(e.order, func(x, y *app) int { return strings.Compare(x.name, y.name) })
	for _, v := range a.vips {
		e.byVIP[v] = a
	}
}

// allSets adds everything that belongs to the application to the sets.
func (a *app) allSets(fx *Effects) {
	for _, p := range a.exclude {
		for _, v := range a.vips {
			fx.Sets = append(fx.Sets, SetChange{Set: SetSkip, Add: true, IP: v, Port: p})
		}
	}
	for _, c := range a.conns {
		if c.translated {
			fx.Sets = append(fx.Sets, flowChange(c, true))
		}
	}
	switch {
	case a.state.Captured():
		a.setVIP(fx, true, SetActive, SetAway)
	case a.state == appstate.SnapshotStart:
		a.setVIP(fx, true, SetActive, SetFull)
	case a.translated > 0:
		a.setVIP(fx, true, SetActive)
	}
	a.setVIP(fx, true, SetVIP)
}

// setVIP adds the application's VIPs to sets or takes them out.
func (a *app) setVIP(fx *Effects, add bool, sets ...Set) {
	for _, s := range sets {
		for _, v := range a.vips {
			fx.Sets = append(fx.Sets, SetChange{Set: s, Add: add, IP: v})
		}
	}
}

func (e *Engine) unregister(b *Unregister, a *app, fx *Effects) (any, error) {
	translated := 0
	for _, c := range a.conns {
		if c.translated && (c.expire == 0 || c.alive()) {
			translated++
		}
	}
	if translated > 0 && !b.Force {
		return nil, &Error{App: a.name, State: a.state,
			Text: fmt.Sprintf("UNREGISTER refused: %d connections of application %q are translated and would break; force resets them", translated, a.name)}
	}
	for i := len(a.conns) - 1; i >= 0; i-- {
		c := a.conns[i]
		if (c.translated || a.state.Away()) && c.alive() && c.learned {
			sp := c.ep.Rst()
			fx.send(&sp, false)
		}
		e.remove(c, fx)
	}
	e.forget(a, fx, "unregistered")
	return &Result{App: a.name}, nil
}

// forget ends an application that has no connections any more.
func (e *Engine) forget(a *app, fx *Effects, why string) {
	a.setVIP(fx, false, SetFull, SetActive, SetVIP, SetAway)
	for _, p := range a.exclude {
		for _, v := range a.vips {
			fx.Sets = append(fx.Sets, SetChange{Set: SetSkip, IP: v, Port: p})
		}
	}
	a.dropSyns()
	for _, v := range a.vips {
		delete(e.byVIP, v)
	}
	delete(e.apps, a.name)
	e.order = slices.DeleteFunc(e.order, func(x *app) bool { return x == a })
	a.set(appstate.Unknown, fx, why)
}
