package filter

import (
	"net/netip"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// ConnInfo is one connection structure as GETCONNINFO shows it; numbers are the
// remote's view.
type ConnInfo struct {
	ID                                      ConnID
	Socket                                  netip.AddrPort // local's own, where its port is translated
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
	Image                                   bool // its socket is in the image
	ConnStats
}

// ConnList answers GetConnInfo.
type ConnList struct {
	App   string
	State appstate.App
	Conns []ConnInfo
}

func (e *Engine) connInfo(now Time, b *GetConnInfo) (any, error) {
	a := e.apps[b.App]
	if a == nil {
		return &ConnList{App: b.App}, nil
	}
	l := &ConnList{App: b.App, State: a.state, Conns: make([]ConnInfo, 0, len(a.conns))}
	for _, c := range a.conns {
		i := ConnInfo{
			ID: c.id, Role: c.role, State: c.state, BytesIn: c.bytesIn, BytesOut: c.bytesOut,
			Translated: c.translated, Closed: c.ep.Closed, Frozen: c.frozen, Sealed: c.sealed,
			Learned: c.learned, Kept: uint32(len(c.kept)), Discarded: c.discarded, LocalIdle: -1,
			SndNxt: uint32(c.ep.SndNxt), RcvNxt: uint32(c.ep.RcvNxt),
			Restorable: c.restorable(), RemoteClosed: c.finIn, Reestablished: c.hsDone, Image: c.image,
			ConnStats: c.statistics(now, b.Reasons),
		}
		if c.tr.Port != 0 {
			i.Socket = c.localAddr()
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
	OldNode, TakenBy      string // it was taken over from; that has it, in BLOCKDATA
	VIPs                  []string
	State                 appstate.App
	Foreign, Yielding     bool // never restored here; in BLOCKDATA: the taker may not have it yet
	RestoreRequested      bool
	Connections           map[string]uint32
	BytesIn, BytesOut     uint64
	Kept                  uint32
	PendingSyns           int
	Reasons               map[string]uint64

	Include, Outgoing, Exclude         []uint16
	IncludeAddresses, ExcludeAddresses []netip.Prefix
}

// StatusList answers Status.
type StatusList struct {
	Apps   []AppStatus
	Limits []Limit
}

func (e *Engine) status(name string) (any, error) {
	var out []AppStatus
	for _, a := range e.order {
		if name != "" && name != a.name {
			continue
		}
		s := AppStatus{Name: a.name, State: a.state, SnapshotID: a.snapID, RestoreRequested: a.wake && a.state != appstate.BlockData,
			OldNode: a.oldNode, TakenBy: a.takenBy, Foreign: a.foreign, Yielding: a.yielding,
			Connections: map[string]uint32{}, BytesIn: a.bytesIn, BytesOut: a.bytesOut,
			PendingSyns: len(a.syns), Reasons: map[string]uint64{},
			Include: slices.Clone(a.include), Outgoing: slices.Clone(a.outgoing), Exclude: slices.Clone(a.exclude),
			IncludeAddresses: slices.Clone(a.includeNets), ExcludeAddresses: slices.Clone(a.excludeNets)}
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
	return &StatusList{Apps: out, Limits: e.Limits()}, nil
}

// Limit is one bound and how much of it is used.
type Limit struct {
	Name      string
	Used, Max uint64
	PerApp    bool // Used is that of the application that has most
}

// Limits returns the bounds of the engine.
func (e *Engine) Limits() []Limit {
	var conns, kept, syns, one int
	for _, a := range e.order {
		conns, kept, syns = max(conns, len(a.conns)), max(kept, a.kept), max(syns, len(a.syns))
		for _, c := range a.conns {
			if !c.spooled { // of those the application's spool is the bound
				one = max(one, len(c.kept))
			}
		}
	}
	return []Limit{
		{"connections", uint64(len(e.conns)), uint64(e.cfg.MaxConns), false},
		{"connections_per_app", uint64(conns), uint64(e.cfg.ConnsPerApp), true},
		{"kept_bytes", uint64(e.kept), uint64(e.cfg.KeepTotal), false},
		{"kept_bytes_per_app", uint64(kept), uint64(e.cfg.KeepPerApp), true},
		{"kept_bytes_per_connection", uint64(one), uint64(e.cfg.KeepPerConn), true},
		{"pending_syns", uint64(e.syns), uint64(e.cfg.SynsTotal), false},
		{"pending_syns_per_app", uint64(syns), uint64(e.cfg.MaxSyns), true},
	}
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
