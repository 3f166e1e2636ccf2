package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Service answers nfconnfilter.v1.Filter.
func (n *Node) Service() nfconnfilterv1connect.FilterHandler { return service{n, n.do} }

// service puts the messages of the API into the engine's words and back.
type service struct {
	n  *Node
	do func(ctx context.Context, body any) (any, error) // carries out a request of package filter
}

// failure puts an error of the engine into Connect's words.
func (s service) failure(app string, err error) error {
	var se *appstate.StateError
	var fe *filter.Error
	switch {
	case errors.As(err, &se):
		code := connect.CodeFailedPrecondition
		if se.State == appstate.Unknown {
			code = connect.CodeNotFound
		}
		return control.Error(code, app, se.State.String(), err.Error())
	case errors.As(err, &fe):
		return control.Error(connect.CodeFailedPrecondition, app, fe.State.String(), err.Error(), fe.Conns...)
	case errors.Is(err, filter.ErrStructures):
		return control.Error(connect.CodeFailedPrecondition, app, s.n.state(app), err.Error())
	case errors.Is(err, filter.ErrInvalid):
		return control.Error(connect.CodeInvalidArgument, app, s.n.state(app), err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return control.Error(connect.CodeDeadlineExceeded, app, s.n.state(app), "the time-out of the call passed")
	case errors.Is(err, context.Canceled):
		return control.Error(connect.CodeCanceled, app, s.n.state(app), "the caller went away")
	case errors.Is(err, errStopping):
		return control.Error(connect.CodeUnavailable, app, s.n.state(app), err.Error())
	}
	return control.Error(connect.CodeInternal, app, s.n.state(app), err.Error())
}

// change carries out a request whose answer is the application's state.
func (s service) change(ctx context.Context, app string, body any) (*connect.Response[pb.AppReply], error) {
	r, err := s.do(ctx, body)
	if err != nil {
		return nil, s.failure(app, err)
	}
	res := r.(*filter.Result)
	return connect.NewResponse(&pb.AppReply{App: app, State: res.State.String(), SnapshotId: res.SnapshotID, Notes: res.Notes}), nil
}

// invalid refuses a request for an argument of it; where names both.
func (s service) invalid(app, where string, err error) error {
	return control.Error(connect.CodeInvalidArgument, app, s.n.state(app), fmt.Sprintf("%s: %v", where, err))
}

func (s service) Register(ctx context.Context, r *connect.Request[pb.RegisterRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	b := &filter.Register{App: m.App}
	bad := func(what string, err error) error {
		return s.invalid(m.App, "REGISTER: "+what, err)
	}
	if n := len(m.App); n > maxName {
		return nil, bad("app", fmt.Errorf("a name has at most %d octets, this one has %d", maxName, n))
	}
	var err error
	if b.VIPs, err = vips(m.Vips); err != nil {
		return nil, bad("vip", err)
	}
	if slices.ContainsFunc(b.VIPs, netip.Addr.Is6) && s.n.rules != nil && s.n.rules.IPv6() != nil {
		return nil, bad("vip", fmt.Errorf("IPv6 is not filtered on this node: %w", s.n.rules.IPv6()))
	}
	if b.IncludeAddresses, err = prefixes(m.IncludeAddresses); err != nil {
		return nil, bad("include_addresses", err)
	}
	if b.ExcludeAddrs, err = prefixes(m.ExcludeAddresses); err != nil {
		return nil, bad("exclude_addresses", err)
	}
	for _, l := range []struct {
		name string
		from []uint32
		to   *[]uint16
	}{{"include_ports", m.IncludePorts, &b.Include}, {"outgoing_ports", m.OutgoingPorts, &b.Outgoing}, {"exclude_ports", m.ExcludePorts, &b.Exclude}} {
		if *l.to, err = ports(l.from); err != nil {
			return nil, bad(l.name, err)
		}
	}
	return s.change(ctx, m.App, b)
}

// maxName is the longest name of an application, in octets, as of a file. The
// journal could not hold one of more than 32 KiB, nor anything after it.
const maxName = 255

// period reads a time in ms, up to a day: more would be a mistake.
func period(name string, ms int64) (filter.Time, error) {
	const most = 24 * 3600 * 1000
	if ms < 0 || ms > most {
		return 0, fmt.Errorf("%s: %d is not a time from 0 to %d ms", name, ms, most)
	}
	return ms * 1e6, nil
}

// vips reads one address, or one of each family.
func vips(in []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, v := range in {
		a, err := netip.ParseAddr(v)
		if err != nil {
			return nil, err
		}
		if a = a.Unmap(); !unicast(a) {
			return nil, fmt.Errorf("%s is not an address that a connection can have", v)
		}
		if slices.ContainsFunc(out, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
			return nil, fmt.Errorf("%s is a second address of its family; there can be one of each", v)
		}
		out = append(out, a)
	}
	return out, nil
}

func unicast(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func prefixes(in []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, p := range in {
		x, err := netip.ParsePrefix(p)
		if err != nil {
			return nil, err
		}
		out = append(out, x.Masked())
	}
	return out, nil
}

func ports(in []uint32) ([]uint16, error) {
	var out []uint16
	for _, p := range in {
		if p == 0 || p > 65535 {
			return nil, fmt.Errorf("%d is not a port", p)
		}
		out = append(out, uint16(p))
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (s service) Unregister(ctx context.Context, r *connect.Request[pb.UnregisterRequest]) (*connect.Response[pb.AppReply], error) {
	return s.change(ctx, r.Msg.App, &filter.Unregister{App: r.Msg.App, Force: r.Msg.Force})
}

func (s service) SnapshotStart(ctx context.Context, r *connect.Request[pb.SnapshotStartRequest]) (*connect.Response[pb.LearnReply], error) {
	m := r.Msg
	b := &filter.SnapshotStart{App: m.App, LeaveOut: m.LeaveOut, Boundary: m.Boundary, Silent: m.Silent}
	var err error
	if b.Timeout, err = period("learn_timeout_ms", m.LearnTimeoutMs); err != nil {
		return nil, s.invalid(m.App, "SNAPSHOTSTART", err)
	}
	if b.Quiet, err = period("quiet_ms", m.QuietMs); err != nil {
		return nil, s.invalid(m.App, "SNAPSHOTSTART", err)
	}
	if b.Listen, err = ports(m.ListenPorts); err != nil {
		return nil, s.invalid(m.App, "SNAPSHOTSTART: listen_ports", err)
	}
	if b.Sockets, err = sockets(m.Sockets); err != nil {
		return nil, s.invalid(m.App, "SNAPSHOTSTART: sockets", err)
	}
	x, err := s.do(ctx, b)
	if err != nil {
		return nil, s.failure(m.App, err)
	}
	res := x.(*filter.Result)
	return connect.NewResponse(&pb.LearnReply{App: m.App, State: res.State.String(), Learned: uint32(res.Learned), Unlearned: res.Notes}), nil
}

func (s service) Adopt(ctx context.Context, r *connect.Request[pb.AdoptRequest]) (*connect.Response[pb.AdoptReply], error) {
	m := r.Msg
	b := &filter.Adopt{App: m.App, At: m.ListedAtNs}
	var err error
	if b.Listen, err = ports(m.ListenPorts); err != nil {
		return nil, s.invalid(m.App, "ADOPT: listen_ports", err)
	}
	if b.Sockets, err = sockets(m.Sockets); err != nil {
		return nil, s.invalid(m.App, "ADOPT: sockets", err)
	}
	x, err := s.do(ctx, b)
	if err != nil {
		return nil, s.failure(m.App, err)
	}
	res := x.(*filter.Result)
	return connect.NewResponse(&pb.AdoptReply{App: m.App, State: res.State.String(), Adopted: uint32(res.Adopted), Forgotten: uint32(res.Forgotten)}), nil
}

func sockets(in []*pb.Socket) ([]filter.Socket, error) {
	out := make([]filter.Socket, 0, len(in))
	for _, k := range in {
		id, err := connID(k.Local, k.Remote)
		if err != nil {
			return nil, err
		}
		out = append(out, filter.Socket{
			ID: id, Established: k.State == "ESTABLISHED" || k.State == "CLOSE_WAIT", CloseWait: k.State == "CLOSE_WAIT",
			LocalClosed:  slices.Contains([]string{"FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK"}, k.State),
			RemoteClosed: k.State == "CLOSING" || k.State == "LAST_ACK",
			Passive:      k.Passive, Owned: k.Owned, SendQueue: k.SendQueue, HasInfo: k.HasInfo,
			TS: k.OptTimestamps, SACK: k.OptSack, WScale: k.OptWscale,
			RemoteScale: uint8(min(k.SndWscale, 14)), LocalScale: uint8(min(k.RcvWscale, 14)), SndMSS: k.SndMss,
			BytesAcked: k.BytesAcked, BytesReceived: k.BytesReceived,
			LastSent: int64(k.LastDataSentMs) * 1e6, LastRecv: int64(k.LastDataRecvMs) * 1e6,
		})
	}
	return out, nil
}

func connID(local, remote string) (id filter.ConnID, err error) {
	if id.Local, err = endpoint(local); err != nil {
		return id, fmt.Errorf("local address %q: %w", local, err)
	}
	if id.Remote, err = endpoint(remote); err != nil {
		return id, fmt.Errorf("remote address %q: %w", remote, err)
	}
	if id.Local.Addr().Is4() != id.Remote.Addr().Is4() {
		return id, fmt.Errorf("%q and %q are not of one family", local, remote)
	}
	return id, nil
}

func endpoint(s string) (netip.AddrPort, error) {
	p, err := netip.ParseAddrPort(s)
	if err != nil {
		return p, err
	}
	p = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	if !unicast(p.Addr()) || p.Port() == 0 {
		return p, errors.New("no connection has it")
	}
	return p, nil
}

// maxSpool bounds the spool of a connection: what a scaled window can announce.
const maxSpool = 1 << 30

func (s service) SnapshotFreeze(ctx context.Context, r *connect.Request[pb.SnapshotFreezeRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	quiet, err := period("quiet_ms", m.QuietMs)
	if err != nil {
		return nil, s.invalid(m.App, "SNAPSHOTFREEZE", err)
	}
	b := &filter.SnapshotFreeze{App: m.App, Boundary: m.Boundary, Quiet: quiet, PassCloses: m.PassCloses, AbortOnData: m.AbortOnData,
		Spool: int(min(m.Spool, maxSpool)), WakeFull: m.WakeFull, Silent: m.Silent}
	for _, h := range m.Heartbeats {
		every, err := period("interval_ms", h.IntervalMs)
		p, perr := netip.ParsePrefix(h.Remote)
		if perr != nil {
			err = fmt.Errorf("prefix %q of a heartbeat is none", h.Remote)
		}
		if err != nil {
			return nil, s.invalid(m.App, "SNAPSHOTFREEZE", err)
		}
		b.Heartbeats = append(b.Heartbeats, filter.Heartbeat{Remote: p, Match: h.Match, Reply: h.Reply, Send: h.Send,
			Interval: every, OnlyClosed: h.OnlyClosed})
	}
	return s.change(ctx, m.App, b)
}

func (s service) Seal(ctx context.Context, r *connect.Request[pb.SealRequest]) (*connect.Response[pb.AppReply], error) {
	b := &filter.Seal{App: r.Msg.App, Again: r.Msg.Again}
	for _, k := range r.Msg.Image {
		id, err := connID(k.Local, k.Remote)
		if err != nil {
			return nil, s.invalid(r.Msg.App, "SEAL: image", err)
		}
		b.Image = append(b.Image, filter.ImageSocket{
			ID: id, Passive: k.Passive, LocalClosed: k.LocalClosed, RemoteClosed: k.RemoteClosed,
			RcvNxt: seqnum.Value(k.RcvNxt), SndUna: seqnum.Value(k.SndUna), SndNxt: seqnum.Value(k.SndNxt), Unread: k.Unread,
			TS: k.OptTimestamps, SACK: k.OptSack, WScale: k.OptWscale, ECN: k.OptEcn,
			RemoteScale: uint8(min(k.SndWscale, 14)), LocalScale: uint8(min(k.RcvWscale, 14)), TSVal: k.Tsval,
			MSS: uint16(min(k.Mss, 65535)), RemoteWnd: k.RemoteWindow, LocalWnd: k.LocalWindow, LocalWup: seqnum.Value(k.LocalWup),
		})
	}
	return s.change(ctx, r.Msg.App, b)
}

func (s service) SnapshotDone(ctx context.Context, r *connect.Request[pb.SnapshotDoneRequest]) (*connect.Response[pb.AppReply], error) {
	return s.change(ctx, r.Msg.App, &filter.SnapshotDone{App: r.Msg.App, ID: r.Msg.SnapshotId, Force: r.Msg.Force})
}

func (s service) SnapshotAbort(ctx context.Context, r *connect.Request[pb.AppRequest]) (*connect.Response[pb.AppReply], error) {
	return s.change(ctx, r.Msg.App, &filter.SnapshotAbort{App: r.Msg.App})
}

func (s service) RestoreStart(ctx context.Context, r *connect.Request[pb.RestoreStartRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	b := &filter.RestoreStart{App: m.App, ID: m.SnapshotId, OldNode: m.OldNode}
	if m.Ip != "" {
		ip, err := netip.ParseAddr(m.Ip)
		if err != nil {
			return nil, s.invalid(m.App, "RESTORESTART", err)
		}
		b.IP = ip.Unmap()
	}
	if m.OldNode != "" {
		return s.restoreTaken(ctx, b)
	}
	return s.change(ctx, m.App, b)
}

func (s service) RestoreConn(ctx context.Context, r *connect.Request[pb.RestoreConnRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	b := &filter.RestoreConn{App: m.App, Kind: m.Kind}
	for _, c := range m.Conns {
		id, err := connID(c.Local, c.Remote)
		if err != nil {
			return nil, s.invalid(m.App, "RESTORECONN", err)
		}
		b.Conns = append(b.Conns, id)
	}
	return s.change(ctx, m.App, b)
}

func (s service) Restored(ctx context.Context, r *connect.Request[pb.RestoredRequest]) (*connect.Response[pb.AppReply], error) {
	return s.change(ctx, r.Msg.App, &filter.Restored{App: r.Msg.App, ResetMissing: r.Msg.ResetMissing})
}

func (s service) RestoreAbort(ctx context.Context, r *connect.Request[pb.AppRequest]) (*connect.Response[pb.AppReply], error) {
	return s.restoreAbort(ctx, r.Msg.App)
}

// list reads the connection structures of an application that is configured or
// known, with their reasons where these are asked for.
func (s service) list(ctx context.Context, app string, reasons bool) (*filter.ConnList, error) {
	x, err := s.do(ctx, &filter.GetConnInfo{App: app, Reasons: reasons})
	if err != nil {
		return nil, s.failure(app, err)
	}
	l := x.(*filter.ConnList)
	if l.State == appstate.Unknown && s.n.cfg.Load().Apps[app] == nil {
		return nil, s.unknown(app)
	}
	return l, nil
}

func (s service) unknown(app string) error {
	return control.Error(connect.CodeNotFound, app, "",
		fmt.Sprintf("application %q is not known: there is no valid apps/%s.toml in the shared directory", app, app))
}

func (s service) GetConnCount(ctx context.Context, r *connect.Request[pb.AppRequest]) (*connect.Response[pb.ConnCountReply], error) {
	l, err := s.list(ctx, r.Msg.App, false)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.ConnCountReply{App: l.App, State: l.State.String(), Count: uint32(len(l.Conns))}), nil
}

func (s service) GetConnInfo(ctx context.Context, r *connect.Request[pb.GetConnInfoRequest]) (*connect.Response[pb.ConnInfoReply], error) {
	l, err := s.list(ctx, r.Msg.App, r.Msg.Reasons)
	if err != nil {
		return nil, err
	}
	out := &pb.ConnInfoReply{App: l.App, State: l.State.String(), Conns: make([]*pb.ConnInfo, 0, len(l.Conns))}
	for i := range l.Conns {
		c := &l.Conns[i]
		socket := ""
		if c.Socket.IsValid() {
			socket = c.Socket.String()
		}
		out.Conns = append(out.Conns, &pb.ConnInfo{
			Socket: socket,
			Local:  c.ID.Local.String(), Remote: c.ID.Remote.String(), Role: c.Role.String(), State: c.State.String(),
			BytesIn: c.BytesIn, BytesOut: c.BytesOut, Translated: c.Translated, WindowClosed: c.Closed,
			Frozen: c.Frozen, Sealed: c.Sealed, Learned: c.Learned, UnackedOut: c.Unacked, KeptBytes: c.Kept,
			DeliveredIn: c.BytesIn, DiscardedOut: c.Discarded, LocalIdleMs: millis(c.LocalIdle), Missing: c.Missing,
			SndNxt: c.SndNxt, RcvNxt: c.RcvNxt, Restorable: c.Restorable, RemoteClosed: c.RemoteClosed, Image: c.Image,
			SegmentsIn: c.SegmentsIn, SegmentsOut: c.SegmentsOut, Answered: c.Answered,
			SentToRemote: c.ToRemote, SentToLocal: c.ToLocal, KeptSegments: c.KeptSegments,
			RemoteIdleMs: millis(c.RemoteIdle), Reasons: reasonsOf(c.Reasons),
		})
	}
	return connect.NewResponse(out), nil
}

// millis are the milliseconds of t, -1 where t is not known.
func millis(t filter.Time) int64 {
	if t < 0 {
		return -1
	}
	return t / int64(time.Millisecond)
}

func reasonsOf(list []filter.ReasonCount) map[string]uint64 {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]uint64, len(list))
	for _, r := range list {
		m[r.Reason.String()] = r.Count
	}
	return m
}

func (s service) Status(ctx context.Context, r *connect.Request[pb.StatusRequest]) (*connect.Response[pb.StatusReply], error) {
	app := r.Msg.App
	x, err := s.do(ctx, &filter.Status{App: app})
	if err != nil {
		return nil, s.failure(app, err)
	}
	cfg := s.n.cfg.Load()
	out := &pb.StatusReply{Node: cfg.Node.Name, ConfigGeneration: cfg.Generation, Instance: s.n.instance}
	known := map[string]bool{}
	list := x.(*filter.StatusList)
	for _, l := range list.Limits {
		out.Limits = append(out.Limits, &pb.Limit{Name: l.Name, Used: l.Used, Max: l.Max, PerApp: l.PerApp})
	}
	for _, a := range list.Apps {
		known[a.Name] = true
		out.Apps = append(out.Apps, &pb.AppStatus{
			Name: a.Name, Vips: a.VIPs, State: a.State.String(), SnapshotId: a.SnapshotID, RestoreRequested: a.RestoreRequested,
			Connections: a.Connections, BytesIn: a.BytesIn, BytesOut: a.BytesOut, KeptBytes: a.Kept,
			PendingSyns: uint32(a.PendingSyns), Reasons: a.Reasons,
			IncludePorts: widened(a.Include), OutgoingPorts: widened(a.Outgoing), ExcludePorts: widened(a.Exclude),
			IncludeAddresses: prefixTexts(a.IncludeAddresses), ExcludeAddresses: prefixTexts(a.ExcludeAddresses),
			OldNode: a.OldNode, TakenBy: a.TakenBy,
		})
	}
	for name, a := range cfg.Apps { // configured, and unknown on this node
		if known[name] || app != "" && app != name {
			continue
		}
		st := &pb.AppStatus{Name: name}
		for _, v := range a.VIPs {
			st.Vips = append(st.Vips, v.String())
		}
		out.Apps = append(out.Apps, st)
	}
	if app != "" && len(out.Apps) == 0 {
		return nil, s.unknown(app)
	}
	slices.SortFunc(out.Apps, func(a, b *pb.AppStatus) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return connect.NewResponse(out), nil
}

func (s service) Wait(ctx context.Context, r *connect.Request[pb.WaitRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	if _, ok := appstate.ParseApp(m.State); !ok {
		return nil, control.Error(connect.CodeInvalidArgument, m.App, s.n.state(m.App), fmt.Sprintf("WAIT: %q is not a state", m.State))
	}
	if s.n.state(m.App) == "" && s.n.cfg.Load().Apps[m.App] == nil {
		return nil, s.unknown(m.App)
	}
	if err := s.n.waitState(ctx, m.App, m.State); err != nil {
		return nil, s.failure(m.App, err)
	}
	return connect.NewResponse(&pb.AppReply{App: m.App, State: m.State}), nil
}

func widened(ports []uint16) []uint32 {
	out := make([]uint32, len(ports))
	for i, p := range ports {
		out[i] = uint32(p)
	}
	return out
}

func prefixTexts(list []netip.Prefix) []string {
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = p.String()
	}
	return out
}
