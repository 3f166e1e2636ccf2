package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

const (
	// outcomeWait is how long a migration waits for a taker that went away in
	// the middle of it, before it leaves the rest to the background.
	outcomeWait = time.Minute
	// progressRelay is how often the taker is asked how far it is.
	progressRelay = 100 * time.Millisecond
)

// errLater: nothing can be done yet, look again.
var errLater = errors.New("not decided yet")

// migrateRun is one migration, on the node that the application leaves.
type migrateRun struct {
	a      *agent
	op     *operation
	app    *config.App
	to     string
	target nfconnfilterv1connect.AgentClient
	id     string
}

// Migrate serves the request of the same name.
func (a *agent) Migrate(ctx context.Context, r *connect.Request[pb.AgentMigrateRequest]) (*connect.Response[pb.AgentMigrateReply], error) {
	return answer(a.migrate(ctx, r.Msg, false))
}

// restoreTo restores on another node what is held here.
func (a *agent) restoreTo(ctx context.Context, m *pb.AgentRestoreRequest) (*pb.AgentReply, error) {
	if m.SnapshotId != "" {
		st, err := a.status(ctx, m.App)
		if err == nil && st.SnapshotId != m.SnapshotId {
			err = refused(opRestore, m.App, st.State, fmt.Sprintf("the current snapshot is %s and not %s", st.SnapshotId, m.SnapshotId))
		}
		if err != nil {
			return nil, err
		}
	}
	r, err := a.migrate(ctx, &pb.AgentMigrateRequest{App: m.App, ToNode: m.ToNode}, true)
	if err != nil {
		return nil, err
	}
	return &pb.AgentReply{App: r.App, State: r.State, Phases: r.Phases, Notes: r.Notes}, nil
}

// migrate takes an application to another node; held: only one that is held.
func (a *agent) migrate(ctx context.Context, m *pb.AgentMigrateRequest, held bool) (*pb.AgentMigrateReply, error) {
	app, err := a.app(m.App)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(supported(opMigrate, app), a.trusted(app), a.mayLeave(app, m.ToNode)); err != nil {
		return nil, err
	}
	reply, ran, err := a.migrateOnce(ctx, app, m, held)
	if err == nil || !ran {
		return reply, err
	}
	// It ran when this began, so it does again, and whoever asks learns whether.
	defer a.returned(m.App)
	_, rerr := a.restore(a.root, m.App, "")
	if rerr != nil { // a client may have asked for it just before
		_ = poll(a.root, pollFirst, pollMost, func() (bool, error) { return !a.busy(m.App), nil })
	}
	st, serr := a.status(a.root, m.App)
	switch {
	case serr == nil && st.State == control.StateRestored:
		return nil, failed(opMigrate, m.App, st.State, noted(err, "; it was restored here and runs"))
	case rerr != nil:
		err = noted(err, "; and it is not restored here yet: "+message(rerr))
	}
	return nil, failed(opMigrate, m.App, st.GetState(), err)
}

// mayLeave refuses a target that can be told to be wrong without asking.
func (a *agent) mayLeave(app *config.App, to string) error {
	cfg := a.config()
	var names []string
	for _, n := range cfg.Cluster.Nodes {
		names = append(names, n.Name)
	}
	bad := func(format string, args ...any) error {
		return control.Error(connect.CodeInvalidArgument, app.Name, "", fmt.Sprintf("migrate of %s: ", app.Name)+fmt.Sprintf(format, args...))
	}
	switch {
	case to == "":
		return bad("no node is named; there is %q", names)
	case to == cfg.Node.Name:
		return bad("%s is this node", to)
	case !slices.Contains(names, to):
		return bad("no node %q in cluster.toml; there is %q", to, names)
	case len(app.Nodes) > 0 && !slices.Contains(app.Nodes, to):
		return bad("nodes = %q in its file does not allow %s", app.Nodes, to)
	}
	return nil
}

// migrateOnce is one try; ran tells, with an error, that the application ran
// and is held here now.
func (a *agent) migrateOnce(ctx context.Context, app *config.App, m *pb.AgentMigrateRequest, held bool) (reply *pb.AgentMigrateReply, ran bool, err error) {
	op, err := a.begin(ctx, app.Name, opMigrate)
	if err != nil {
		return nil, false, err
	}
	defer func() { a.finish(op, err) }()
	op.enter("check")
	st, err := a.status(op.ctx, app.Name)
	if err != nil {
		return nil, false, err
	}
	switch {
	case st.State == control.StateSnapshotDone:
	case held:
		return nil, false, refused(opRestore, app.Name, st.State, "with another node it is allowed in SNAPSHOTDONE; ckptctl migrate moves one that runs")
	case st.State == control.StateConnected, st.State == control.StateRestored:
		op.ran = true
	case st.State == control.StateBlockData:
		return nil, false, refused(opMigrate, app.Name, st.State, fmt.Sprintf("node %s has taken it over; migrate it there", st.TakenBy))
	default:
		return nil, false, refused(opMigrate, app.Name, st.State, "it is allowed in CONNECTED, RESTORED and SNAPSHOTDONE")
	}
	if !op.ran {
		if err := a.callersImages(app.Name, st.SnapshotId); err != nil {
			return nil, false, failed(opMigrate, app.Name, st.State, err)
		}
	}
	target, done, err := a.dialAgent(m.ToNode)
	if err != nil {
		return nil, false, failed(opMigrate, app.Name, st.State, noted(err, "; nothing was changed"))
	}
	defer done()
	r := &migrateRun{a: a, op: op, app: app, to: m.ToNode, target: target, id: st.SnapshotId}
	op.toNode = m.ToNode
	checks, err := r.check()
	if err != nil {
		return nil, false, failed(opMigrate, app.Name, st.State, noted(err, "; nothing was changed"))
	}
	reply = &pb.AgentMigrateReply{App: app.Name, From: a.config().Node.Name, To: m.ToNode, State: st.State, SnapshotId: r.id, Checks: checks}
	if m.DryRun {
		return reply, false, nil
	}
	if op.ran {
		snap, err := a.takeSnapshot(op, app, &pb.AgentSnapshotRequest{App: app.Name, Force: m.Force, DrainTimeoutMs: m.DrainTimeoutMs}, st)
		if err != nil {
			return nil, a.comesBack(op), err
		}
		r.id, reply.Notes, reply.Forced = snap.SnapshotId, snap.Notes, snap.Forced
		op.takeBack() // until RESTORED there is a way back again
	}
	if err := a.intend(op, intent{SnapshotID: r.id}); err != nil {
		return nil, a.comesBack(op), failed(opMigrate, app.Name, control.StateSnapshotDone, err)
	}
	moved, err := r.handOver()
	if err != nil {
		return nil, a.comesBack(op), err
	}
	reply.State, reply.SnapshotId, reply.Phases = moved.State, r.id, migratePhases(op.took(), moved.Phases)
	return reply, false, nil
}

// check asks the other node whether it can take the application.
func (r *migrateRun) check() ([]string, error) {
	ctx, cancel := context.WithTimeout(r.op.ctx, peerTimeout)
	defer cancel()
	iface, err := r.a.nodeInterface()
	if err != nil {
		return nil, err
	}
	if err := r.a.store.writable(r.app.Name); err != nil {
		return nil, err
	}
	unmark, err := r.a.store.mark(r.app.Name, r.a.config().Node.Name)
	if err != nil {
		return nil, err
	}
	defer unmark()
	req := &pb.AgentPrepareRequest{App: r.app.Name, FromNode: r.a.config().Node.Name, SnapshotId: r.id,
		LinkAddresses: r.a.addrs.links(iface), ConfigDigest: configDigest(r.app, &r.a.config().Cluster)}
	reply, err := r.target.Prepare(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, peerError(err, r.app.Name, r.to)
	}
	return append(reply.Msg.Checks, "the agent of "+r.to+" can be reached and would take it"), nil
}

// comesBack tells whether an application that ran is held here now, after its
// migration failed; until it is restored its record says so.
func (a *agent) comesBack(op *operation) bool {
	if !op.ran {
		return false
	}
	ctx, cancel := op.cleanup()
	defer cancel()
	st, err := a.status(ctx, op.app)
	switch {
	case err != nil, st.State == control.StateBlockData:
		op.left = true // nobody knows yet whether it comes back
		return false
	case st.State != control.StateSnapshotDone:
		return false
	}
	op.handedOn = true
	a.mu.Lock()
	defer a.mu.Unlock()
	a.returning[op.app] = true
	return true
}

// returned says that nobody needs to wait for the application any more.
func (a *agent) returned(app string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.returning, app)
}

// comeBack restores here what an earlier agent was about to restore or migrate.
func (a *agent) comeBack(app string) func() error {
	return func() error {
		_, err := a.restore(a.root, app, "")
		return err
	}
}

// resumeHanded waits for what a migration that an earlier agent began comes to:
// the taker releases it here or gives it back.
func (a *agent) resumeHanded(in *intent) (string, func() error, error) {
	if in.Op == opMigrate && in.Ran {
		return "", nil, errLater
	}
	return "", nil, nil
}

// moved is an answer of the taker.
type moved struct {
	reply *pb.AgentReply
	err   error
}

// handOver has the other node restore the application, and finds out what came
// of it even where that node's agent, or this one's way to it, is lost.
func (r *migrateRun) handOver() (*pb.AgentReply, error) {
	r.op.enter("hand over")
	r.op.note("to %s", r.to)
	if r.op.ctx.Err() != nil { // aborted before the other node knows of it
		return nil, failed(opMigrate, r.app.Name, control.StateSnapshotDone, context.Cause(r.op.ctx))
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.op.ctx))
	defer cancel()
	answered := make(chan moved, 1)
	r.a.wg.Go(func() {
		reply, err := r.target.Restore(ctx, connect.NewRequest(&pb.AgentRestoreRequest{
			App: r.app.Name, SnapshotId: r.id, OldNode: r.a.config().Node.Name}))
		if err != nil {
			answered <- moved{err: err}
			return
		}
		answered <- moved{reply: reply.Msg}
	})
	got := r.await(ctx, answered)
	if got.err == nil {
		return got.reply, nil
	}
	if connect.IsWireError(got.err) { // its own words
		return nil, failed(opMigrate, r.app.Name, "", peerError(got.err, r.app.Name, r.to))
	}
	return r.outcome(got.err)
}

// await waits for the taker's answer, shows how far it is, and has it abort
// when this operation is.
func (r *migrateRun) await(ctx context.Context, answered <-chan moved) moved {
	tick := time.NewTicker(progressRelay)
	defer tick.Stop()
	aborted, aborting := r.op.ctx.Done(), false
	for {
		select {
		case got := <-answered:
			return got
		case <-aborted:
			aborted = nil
			aborting = !r.abort(ctx)
		case <-tick.C:
			if aborting { // it had not begun, or did not hear it
				aborting = !r.abort(ctx)
				continue
			}
			r.relay(ctx)
		}
	}
}

// relay shows the taker's progress as this operation's.
func (r *migrateRun) relay(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, progressRelay)
	defer cancel()
	p, err := r.target.Progress(ctx, connect.NewRequest(&pb.AgentProgressRequest{App: r.app.Name}))
	if err != nil || p.Msg.Phase == "" {
		return
	}
	text := groupOf(p.Msg.Phase)
	if p.Msg.Detail != "" {
		text += ", " + p.Msg.Detail
	}
	r.op.note("on %s: %s", r.to, text)
}

// abort has the taker abort; false: it did not, and may if it is asked again.
func (r *migrateRun) abort(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if _, err := r.target.Abort(ctx, connect.NewRequest(&pb.AgentAbortRequest{App: r.app.Name})); err != nil {
		r.a.log.Warn("the taker does not abort", "app", r.app.Name, "node", r.to, "err", err)
		return false
	}
	return true
}

// outcome looks what became of a migration whose taker was lost, until it is
// decided.
func (r *migrateRun) outcome(cause error) (*pb.AgentReply, error) {
	r.op.note("the agent of %s went away, waiting for what comes of it", r.to)
	late := fmt.Errorf("the agent of node %s went away: %s; it is not decided yet which node has the application", r.to, message(cause))
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(r.op.ctx), outcomeWait, late)
	defer cancel()
	defer context.AfterFunc(r.a.root, cancel)()
	var reply *pb.AgentReply
	gone := time.Time{}
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		here, err := r.a.status(ctx, r.app.Name)
		if err != nil {
			return false, nil
		}
		there, _, err := r.a.askOld(ctx, r.target, r.to, r.app.Name)
		if err != nil {
			if gone.IsZero() {
				gone = time.Now()
			}
			// What it may still ask of this node's filter is refused from here on.
			if here.State == control.StateSnapshotDone && time.Since(gone) > peerPatience {
				return false, fmt.Errorf("the agent of node %s went away before it took the application: %s", r.to, message(cause))
			}
			return false, nil
		}
		gone = time.Time{}
		switch {
		case there.Operation != "":
			return false, nil
		case there.State == control.StateRestored:
			reply = &pb.AgentReply{App: r.app.Name, State: there.State}
			return true, nil
		case there.State == control.StateSnapshotDone: // it goes on there
			again, err := r.target.Restore(ctx, connect.NewRequest(&pb.AgentRestoreRequest{App: r.app.Name, OldNode: r.a.config().Node.Name}))
			if err == nil {
				reply = again.Msg
			}
			return err == nil, nil
		case here.State == control.StateSnapshotDone:
			return false, fmt.Errorf("the agent of node %s went away (%s) and has given it back", r.to, message(cause))
		}
		return false, nil
	})
	if err != nil {
		return nil, failed(opMigrate, r.app.Name, "", err)
	}
	return reply, nil
}

// Phases of a migration as its operators know them, in their order.
var migrateGroups = []struct {
	name string
	of   []string
}{
	{"check", []string{"check", "look"}},
	{"freeze", []string{"announce", "freeze"}},
	{"drain", []string{"drain", "before"}},
	{"stop", []string{"stop", "account", "prepare", "seal", "kill", "store", "hold"}},
	{"hand over", []string{"hand over", "address", "addresses"}},
	{"start", []string{"clear", "process", "listen"}},
	{"re-establish", []string{"reconnect"}},
	{"open", []string{"open"}},
	{"release", []string{"release"}},
}

// groupOf gives the name under which operators know a phase.
func groupOf(phase string) string {
	for _, g := range migrateGroups {
		if slices.Contains(g.of, phase) {
			return g.name
		}
	}
	return phase
}

// migratePhases joins what both nodes have measured: the taker's phases lie
// within this node's "hand over".
func migratePhases(here, there []*pb.Phase) []*pb.Phase {
	var out []*pb.Phase
	for _, g := range migrateGroups {
		out = append(out, &pb.Phase{Name: g.name})
	}
	at := func(name string) *pb.Phase {
		i := slices.IndexFunc(out, func(p *pb.Phase) bool { return p.Name == name })
		if i < 0 {
			return nil
		}
		return out[i]
	}
	add := func(group string, p *pb.Phase) {
		if g := at(group); g != nil {
			g.Ms += p.Ms
			g.FilterMs += p.FilterMs
		}
	}
	for _, p := range here {
		add(groupOf(p.Name), p)
	}
	whole := at("hand over")
	for _, p := range there {
		whole.Ms -= p.Ms
		group := groupOf(p.Name)
		if group == "check" { // the clients are held meanwhile
			group = "hand over"
		}
		add(group, p)
	}
	whole.Ms = max(whole.Ms, 0)
	return out
}
