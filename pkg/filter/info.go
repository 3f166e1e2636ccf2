package filter

import (
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// ConnInfo is one connection structure as GETCONNINFO shows it; numbers are the
// remote's view.
type ConnInfo struct {
	ID                                      ConnID
	Role                                    appstate.Role
	State                                   appstate.Conn
	BytesIn, BytesOut                       uint64
	Translated, Closed                      bool
	Frozen, Sealed, Learned                 bool
	Unacked, Kept                           uint32
	Discarded                               uint64
	LocalIdle                               Time // since local's last payload, -1: none seen
	Missing                                 string
	SndNxt, RcvNxt                          uint32
	Restorable, RemoteClosed, Reestablished bool
}

// ConnList answers GetConnInfo.
type ConnList struct {
	App   string
	State appstate.App
	Conns []ConnInfo
}

func (e *Engine) connInfo(now Time, name string) (any, error) {
	a := e.apps[name]
	if a == nil {
		return &ConnList{App: name}, nil
	}
	l := &ConnList{App: name, State: a.state, Conns: make([]ConnInfo, 0, len(a.conns))}
	for _, c := range a.conns {
		i := ConnInfo{
			ID: c.id, Role: c.role, State: c.state, BytesIn: c.bytesIn, BytesOut: c.bytesOut,
			Translated: c.translated, Closed: c.ep.Closed, Frozen: c.frozen, Sealed: c.sealed,
			Learned: c.learned, Kept: uint32(len(c.kept)), Discarded: c.discarded, LocalIdle: -1,
			SndNxt: uint32(c.ep.SndNxt), RcvNxt: uint32(c.ep.RcvNxt),
			Restorable: c.restorable(), RemoteClosed: c.finIn, Reestablished: c.hsDone,
		}
		if c.learned {
			i.Unacked = c.ep.SndNxt.Size(c.ep.SndUna)
		}
		if c.lastOut != 0 {
			i.LocalIdle = now - c.lastOut
		}
		switch a.state {
		case appstate.SnapshotStart, appstate.SnapshotFreeze:
			i.Missing = c.missing(now)
		case appstate.RestoreStart:
			i.Missing = c.hsError
		}
		l.Conns = append(l.Conns, i)
	}
	return l, nil
}

// AppStatus is one application as STATUS shows it.
type AppStatus struct {
	Name, VIP, SnapshotID string
	VIPs                  []string
	State                 appstate.App
	RestoreRequested      bool
	Connections           map[string]uint32
	BytesIn, BytesOut     uint64
	Kept                  uint32
	PendingSyns           int
	Reasons               map[string]uint64
}

func (e *Engine) status(name string) (any, error) {
	var out []AppStatus
	for _, a := range e.order {
		if name != "" && name != a.name {
			continue
		}
		s := AppStatus{Name: a.name, State: a.state, SnapshotID: a.snapID, RestoreRequested: a.wake,
			Connections: map[string]uint32{}, BytesIn: a.bytesIn, BytesOut: a.bytesOut,
			PendingSyns: len(a.syns), Reasons: map[string]uint64{}}
		for _, v := range a.vips {
			s.VIPs = append(s.VIPs, v.String())
		}
		for st, n := range a.count {
			if n > 0 {
				s.Connections[appstate.Conn(st).String()] = n
			}
		}
		for _, c := range a.conns {
			s.BytesIn += c.bytesIn
			s.BytesOut += c.bytesOut
			s.Kept += uint32(len(c.kept))
		}
		for r, n := range a.reasons {
			if n > 0 {
				s.Reasons[Reason(r).String()] = n
			}
		}
		out = append(out, s)
	}
	return out, nil
}

// Reasons returns the counters of verdicts by reason, over all applications.
func (e *Engine) Reasons() [NumReasons]uint64 {
	t := e.reasons
	for _, a := range e.order {
		for i, n := range a.reasons {
			t[i] += n
		}
	}
	return t
}
