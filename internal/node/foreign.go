package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// What two filters do together. Of both at most one answers for a VIP: who hands
// structures over is silent before they leave, and stays so until it knows that
// the other one does not have them.

func (s service) Handover(ctx context.Context, r *connect.Request[pb.HandoverRequest]) (*connect.Response[pb.HandoverReply], error) {
	m := r.Msg
	if m.ToNode == s.n.cfg.Load().Node.Name {
		return nil, s.invalid(m.App, "HANDOVER", fmt.Errorf("node %s is this one", m.ToNode))
	}
	x, err := s.do(ctx, &filter.Handover{App: m.App, To: m.ToNode, ID: m.SnapshotId})
	if err != nil {
		return nil, s.failure(m.App, err)
	}
	st := x.(*filter.Structures)
	b, err := encodeStructures(st)
	if err != nil { // it cannot leave: it is held here as before
		_, back := s.do(context.WithoutCancel(ctx), &filter.Handback{App: m.App, From: m.ToNode, Given: st})
		return nil, control.Error(connect.CodeFailedPrecondition, m.App, s.n.state(m.App), errors.Join(err, back).Error())
	}
	return connect.NewResponse(&pb.HandoverReply{App: m.App, State: appstate.BlockData.String(), SnapshotId: st.App.SnapshotID,
		Structures: b, Connections: uint32(len(st.Conns))}), nil
}

func (s service) Handback(ctx context.Context, r *connect.Request[pb.HandbackRequest]) (*connect.Response[pb.AppReply], error) {
	m := r.Msg
	st, err := decodeStructures(m.Structures)
	if err != nil {
		return nil, s.failure(m.App, fmt.Errorf("HANDBACK: %w", err))
	}
	return s.change(ctx, m.App, &filter.Handback{App: m.App, From: m.FromNode, Given: st})
}

func (s service) Release(ctx context.Context, r *connect.Request[pb.ReleaseRequest]) (*connect.Response[pb.AppReply], error) {
	return s.release(ctx, r.Msg.App, "", r.Msg.Force)
}

func (s service) release(ctx context.Context, app, from string, force bool) (*connect.Response[pb.AppReply], error) {
	a, err := s.app(ctx, app)
	if err != nil {
		return nil, s.failure(app, err)
	}
	if a != nil && a.State == appstate.BlockData && !force {
		if err := s.absent("RELEASE", a); err != nil {
			return nil, err
		}
	}
	return s.change(ctx, app, &filter.Release{App: app, From: from, Force: force})
}

// app reads an application's status; nil: it is unknown here.
func (s service) app(ctx context.Context, app string) (*filter.AppStatus, error) {
	if app == "" {
		return nil, fmt.Errorf("%w: the application has no name", filter.ErrInvalid)
	}
	x, err := s.do(ctx, &filter.Status{App: app})
	if err != nil {
		return nil, err
	}
	if l := x.(*filter.StatusList); len(l.Apps) > 0 {
		return &l.Apps[0], nil
	}
	return nil, nil
}

// absent refuses request while an interface of this node has a VIP of a: its kernel
// would answer the remotes with RST.
func (s service) absent(request string, a *filter.AppStatus) error {
	for _, v := range a.VIPs {
		ip, err := netip.ParseAddr(v)
		if err != nil {
			return s.failure(a.Name, err)
		}
		switch iface, ok, err := s.n.vipHere(ip); {
		case err != nil:
			return s.failure(a.Name, fmt.Errorf("%s: whether %s is on this node cannot be told: %w", request, v, err))
		case ok:
			return control.Error(connect.CodeFailedPrecondition, a.Name, a.State.String(), fmt.Sprintf(
				"%s refused: interface %s of this node has the VIP %s, and its kernel would reset the connections; remove it first: ip addr del %s dev %s", request, iface, v, v, iface))
		}
	}
	return nil
}

// attempt calls a filter of another node. sent: the request left, or may have.
func attempt[T any](ctx context.Context, call func(context.Context) (*connect.Response[T], error)) (m *T, sent bool, err error) {
	var left atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { left.Store(true) }})
	r, err := call(ctx)
	if err != nil {
		return nil, left.Load(), err
	}
	return r.Msg, true, nil
}

// refused tells whether err is the answer of the other filter that it has not
// done, and will not do, what was asked.
func refused(err error) bool {
	if !connect.IsWireError(err) {
		return false
	}
	switch connect.CodeOf(err) {
	case connect.CodeCanceled, connect.CodeDeadlineExceeded, connect.CodeUnavailable, connect.CodeInternal, connect.CodeUnknown, connect.CodeAborted, connect.CodeDataLoss:
		return false
	}
	return true
}

// words are what err says, without Connect's code.
func words(err error) string {
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}

// wait waits before the next try; false: there is no time for one.
func wait(ctx context.Context, end time.Time, d time.Duration) bool {
	if time.Now().Add(d).After(end) {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// untilAnswered calls node's filter until it answers, for the time that it takes
// one to be started again. maybe: a try that was not answered may have been heard.
func untilAnswered[T any](ctx context.Context, s service, node string, call func(context.Context, nfconnfilterv1connect.FilterClient) (*connect.Response[T], error)) (m *T, maybe bool, err error) {
	f := &s.n.foreign
	client, done, err := s.n.peer(node)
	if err != nil {
		return nil, false, err
	}
	defer done()
	patience := cmp.Or(f.patience, 15*time.Second)
	end := time.Now().Add(patience)
	for {
		m, sent, err := attempt(ctx, func(ctx context.Context) (*connect.Response[T], error) {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			return call(ctx, client)
		})
		if err == nil || refused(err) {
			return m, false, err
		}
		maybe = maybe || sent
		if !sent && !control.IsUnreachable(err) || !wait(ctx, end, cmp.Or(f.again, 200*time.Millisecond)) {
			return nil, maybe, err
		}
	}
}

// restoreTaken is RESTORESTART of what the filter of another node holds.
func (s service) restoreTaken(ctx context.Context, b *filter.RestoreStart) (*connect.Response[pb.AppReply], error) {
	self := s.n.cfg.Load().Node.Name
	if b.OldNode == self {
		return nil, s.invalid(b.App, "RESTORESTART", fmt.Errorf("old_node %s is this node; leave it out", b.OldNode))
	}
	s.n.foreign.cancelUndo(b.App)
	unlock, err := s.n.foreign.lock(ctx, b.App)
	if err != nil {
		return nil, s.failure(b.App, err)
	}
	defer unlock()
	a, err := s.app(ctx, b.App)
	if err != nil {
		return nil, s.failure(b.App, err)
	}
	if a != nil && (a.State != appstate.BlockData || a.Yielding || a.TakenBy != b.OldNode) {
		return s.change(ctx, b.App, b)
	}
	state := s.n.state(b.App)
	m, maybe, err := untilAnswered(ctx, s, b.OldNode, func(ctx context.Context, c nfconnfilterv1connect.FilterClient) (*connect.Response[pb.HandoverReply], error) {
		return c.Handover(ctx, connect.NewRequest(&pb.HandoverRequest{App: b.App, ToNode: self, SnapshotId: b.ID}))
	})
	switch {
	case err != nil && refused(err):
		return nil, control.Error(connect.CodeFailedPrecondition, b.App, state, fmt.Sprintf("RESTORESTART: the filter of node %s: %s", b.OldNode, words(err)))
	case err != nil && !maybe:
		return nil, control.Error(connect.CodeUnavailable, b.App, state, fmt.Sprintf(
			"RESTORESTART: the filter of node %s cannot be reached (%s); connections stay held there, nothing changed here", b.OldNode, words(err)))
	case err != nil:
		s.pursue(&job{app: b.App, node: b.OldNode})
		return nil, control.Error(connect.CodeUnavailable, b.App, state, fmt.Sprintf(
			"RESTORESTART: the filter of node %s has not answered (%s); nothing changed here, and should it have handed over, the connections are handed back as soon as it can be reached", b.OldNode, words(err)))
	}
	return s.takeOver(ctx, b, m.Structures)
}

// takeOver gives the engine what the old node has handed over, or hands it back. What
// was begun is not left half done because a caller goes away.
func (s service) takeOver(ctx context.Context, b *filter.RestoreStart, structures []byte) (*connect.Response[pb.AppReply], error) {
	ctx = context.WithoutCancel(ctx)
	var err error
	if b.Given, err = decodeStructures(structures); err == nil {
		err = s.asConfigured(b.App, b.Given)
	}
	if err == nil {
		var r *connect.Response[pb.AppReply]
		if r, err = s.change(ctx, b.App, b); err == nil || s.n.state(b.App) == appstate.RestoreStart.String() {
			s.n.foreign.forgetGiven(b.App)
			return r, err
		}
	} else {
		err = s.failure(b.App, err)
	}
	j := &job{app: b.App, node: b.OldNode, structures: structures}
	end := "; the connections are held on node " + b.OldNode + " as before"
	if s.undo(ctx, j) != settled {
		s.pursue(j)
		end = "; the connections are handed back to node " + b.OldNode + " as soon as it can be reached"
	}
	return nil, control.Error(connect.CodeOf(err), b.App, s.n.state(b.App), words(err)+end)
}

// asConfigured tells why what another node hands over is not the application that
// this node's files describe: its filter could have this one swallow what is sent
// to any address.
func (s service) asConfigured(app string, st *filter.Structures) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", filter.ErrStructures, fmt.Sprintf(format, args...))
	}
	vips := slices.SortedFunc(slices.Values(st.App.VIPs), netip.Addr.Compare)
	if a := s.n.cfg.Load().Apps[app]; a != nil {
		if own := slices.SortedFunc(slices.Values(a.VIPs), netip.Addr.Compare); !slices.Equal(own, vips) {
			return bad("they are of the VIPs %v, and application %q has %v in this node's files", vips, app, own)
		}
		return nil
	}
	for _, v := range vips { // not read yet
		switch iface, ok, err := s.n.vipHere(v); {
		case err != nil:
			return fmt.Errorf("whether %v is on this node cannot be told: %w", v, err)
		case ok:
			return bad("they are of %v, which is on interface %s of this node already", v, iface)
		}
	}
	return nil
}

// restoreAbort is RESTOREABORT: an application that another node has handed over
// goes back there until it was restored here once.
func (s service) restoreAbort(ctx context.Context, app string) (*connect.Response[pb.AppReply], error) {
	unlock, err := s.n.foreign.lock(ctx, app)
	if err != nil {
		return nil, s.failure(app, err)
	}
	defer unlock()
	a, err := s.app(ctx, app)
	switch {
	case err != nil:
		return nil, s.failure(app, err)
	case a == nil && s.n.foreign.handedBack(app, ""): // a repetition
		return connect.NewResponse(&pb.AppReply{App: app}), nil
	case a == nil || !a.Foreign || !slices.Contains([]appstate.App{appstate.RestoreStart, appstate.SnapshotDone, appstate.BlockData}, a.State),
		a.State == appstate.BlockData && !a.Yielding:
		return s.change(ctx, app, &filter.RestoreAbort{App: app})
	}
	if err := s.absent("RESTOREABORT", a); err != nil {
		return nil, err
	}
	if !a.Yielding {
		// While it cannot be reached, the connections are answered here.
		_, _, err := untilAnswered(ctx, s, a.OldNode, func(ctx context.Context, c nfconnfilterv1connect.FilterClient) (*connect.Response[pb.StatusReply], error) {
			return c.Status(ctx, connect.NewRequest(&pb.StatusRequest{App: app}))
		})
		if err != nil && !refused(err) {
			return nil, control.Error(connect.CodeUnavailable, app, a.State.String(), fmt.Sprintf(
				"RESTOREABORT: the filter of node %s cannot be reached (%s); the connections stay held on this node", a.OldNode, words(err)))
		}
	}
	j := &job{app: app, node: a.OldNode, yield: true, maybe: a.Yielding}
	out, err := s.yield(context.WithoutCancel(ctx), j)
	switch {
	case out == settled && err == nil:
		s.n.foreign.drop(app)
		return connect.NewResponse(&pb.AppReply{App: app, Notes: j.notes}), nil
	case out == settled:
		s.n.foreign.drop(app)
		return nil, err
	}
	s.pursue(j)
	return nil, control.Error(connect.CodeUnavailable, app, s.n.state(app), fmt.Sprintf(
		"RESTOREABORT: the filter of node %s has not answered (%s); nobody answers the remotes until it can be reached again, then they are handed back by themselves", j.node, words(err)))
}
