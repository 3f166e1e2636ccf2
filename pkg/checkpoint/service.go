package checkpoint

import (
	"context"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// answer wraps a result for Connect.
func answer[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}

// Start serves the request of the same name.
func (a *agent) Start(ctx context.Context, r *connect.Request[pb.AgentStartRequest]) (*connect.Response[pb.AgentReply], error) {
	return answer(a.start(ctx, r.Msg.App))
}

// Stop serves the request of the same name.
func (a *agent) Stop(ctx context.Context, r *connect.Request[pb.AgentStopRequest]) (*connect.Response[pb.AgentReply], error) {
	return answer(a.stop(ctx, r.Msg.App, r.Msg.Discard))
}

// Snapshot serves the request of the same name.
func (a *agent) Snapshot(ctx context.Context, r *connect.Request[pb.AgentSnapshotRequest]) (*connect.Response[pb.AgentSnapshotReply], error) {
	return answer(a.snapshot(ctx, r.Msg))
}

// Restore serves the request of the same name.
func (a *agent) Restore(ctx context.Context, r *connect.Request[pb.AgentRestoreRequest]) (*connect.Response[pb.AgentReply], error) {
	m, self := r.Msg, a.config().Node.Name
	switch {
	case m.ToNode != "" && m.OldNode != "":
		return nil, control.Error(connect.CodeInvalidArgument, m.App, "", "restore of "+m.App+": old_node and to_node exclude each other")
	case m.ToNode != "" && m.ToNode != self:
		return answer(a.restoreTo(ctx, m))
	case m.OldNode != "" && m.OldNode != self:
		return answer(a.restoreFrom(ctx, m))
	}
	return answer(a.restore(ctx, m.App, m.SnapshotId))
}

// Abort serves the request of the same name.
func (a *agent) Abort(ctx context.Context, r *connect.Request[pb.AgentAbortRequest]) (*connect.Response[pb.AgentReply], error) {
	return answer(a.abort(ctx, r.Msg.App))
}

// Snapshots serves the request of the same name. Damaged ones are left out and
// logged.
func (a *agent) Snapshots(_ context.Context, r *connect.Request[pb.AgentSnapshotsRequest]) (*connect.Response[pb.AgentSnapshotsReply], error) {
	app := r.Msg.App
	if app != "" {
		if _, err := a.app(app); err != nil {
			return nil, err
		}
	}
	all, err := a.store.list(app)
	if err != nil {
		if all == nil {
			return nil, control.Error(connect.CodeInternal, app, "", err.Error())
		}
		a.log.Warn("damaged snapshots", "dir", filepath.Join(a.store.dir, app), "err", err)
	}
	reply := &pb.AgentSnapshotsReply{}
	for _, m := range all {
		reply.Snapshots = append(reply.Snapshots, &pb.SnapshotInfo{
			App: m.App, Id: m.ID, Node: m.Node, Time: m.Time.UTC().Format(time.RFC3339), Engine: m.Engine})
	}
	return connect.NewResponse(reply), nil
}

// Progress serves the request of the same name.
func (a *agent) Progress(_ context.Context, r *connect.Request[pb.AgentProgressRequest]) (*connect.Response[pb.AgentProgressReply], error) {
	reply := &pb.AgentProgressReply{App: r.Msg.App}
	a.mu.Lock()
	o := a.ops[r.Msg.App]
	reply.Detail = a.awaited[r.Msg.App]
	a.mu.Unlock()
	if o != nil {
		reply.Operation = o.name
		reply.Phase, reply.Detail, _ = o.state()
		reply.ElapsedMs = time.Since(o.started).Milliseconds()
	}
	return connect.NewResponse(reply), nil
}

// abort cancels what is under way, or undoes what an agent that died has left.
func (a *agent) abort(ctx context.Context, name string) (reply *pb.AgentReply, err error) {
	app, err := a.app(name)
	if err != nil {
		return nil, err
	}
	running, err := a.abortRunning(ctx, name)
	if err != nil {
		return nil, err
	}
	if running {
		// A migration that was given up brings the application back.
		err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			return !a.returning[name], nil
		})
		if err != nil {
			return nil, err
		}
		st, err := a.status(ctx, name)
		if err != nil {
			return nil, err
		}
		return &pb.AgentReply{App: name, State: st.State}, nil
	}
	op, err := a.begin(ctx, name, opAbort)
	if err != nil {
		return nil, err
	}
	defer func() { a.finish(op, err) }()
	return a.undoLeft(op, app)
}
