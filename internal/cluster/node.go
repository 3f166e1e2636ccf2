package cluster

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/scheduler"
)

// node is one node that is watched.
type node struct {
	name   string
	where  config.ClusterNode
	stop   context.CancelFunc
	kicked chan struct{}

	mu     sync.Mutex
	client agentClient

	// Under the driver's lock.
	silent time.Time                                // since when it does not answer; zero: it does
	cuts   map[*scheduler.Action]context.CancelFunc // actions under way here
}

// kick has the node asked at once.
func (n *node) kick() {
	select {
	case n.kicked <- struct{}{}:
	default: // it will be
	}
}

// agent gives the node's client, which is made with the first call.
func (n *node) agent(d *driver) (agentClient, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client == nil {
		c, err := d.dial(n.name)
		if err != nil {
			return nil, err
		}
		n.client = c
	}
	return n.client, nil
}

// close ends connections that are not in use; the next call opens others.
func (n *node) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client != nil {
		n.client.Close()
	}
}

// watch begins to ask nodes that are new, and leaves those that are gone.
func (d *driver) watch(ctx context.Context, wg *sync.WaitGroup) {
	d.mu.Lock()
	defer d.mu.Unlock()
	there := map[string]config.ClusterNode{}
	for _, c := range d.cfg.Cluster.Nodes {
		there[c.Name] = c
	}
	for name, n := range d.nodes {
		if there[name] != n.where {
			n.stop()
			delete(d.nodes, name)
		}
	}
	for name, c := range there {
		if d.nodes[name] != nil {
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		n := &node{name: name, where: c, stop: stop, kicked: make(chan struct{}, 1), cuts: map[*scheduler.Action]context.CancelFunc{}}
		d.nodes[name] = n
		wg.Go(func() { d.ask(ctx, n) })
	}
}

// ask asks one node again and again until ctx ends. Each has its own goroutine:
// one that does not answer delays no other.
func (d *driver) ask(ctx context.Context, n *node) {
	defer n.close()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		at := time.Now()
		st, err := d.status(ctx, n)
		if ctx.Err() != nil {
			return
		}
		d.heard(n, at, st, err)
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-n.kicked:
			select { // however many requests come
			case <-ctx.Done():
			case <-time.After(time.Until(at.Add(pollLeast))):
			}
		}
	}
}

// heard hands a node's answer to the scheduler.
func (d *driver) heard(n *node, at time.Time, st scheduler.NodeStatus, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nodes[n.name] != n {
		return // configured otherwise meanwhile
	}
	if err == nil {
		st.At = at
		n.silent = time.Time{}
		d.sched.Observe(st)
	} else {
		if n.silent.IsZero() {
			n.silent = at
		}
		// Its host may be gone without a word.
		if time.Since(n.silent) > deadAfter {
			for _, cut := range n.cuts {
				cut()
			}
		}
		d.sched.Unreachable(n.name, at, message(err))
	}
	d.step()
}

// status asks a node once.
func (d *driver) status(ctx context.Context, n *node) (scheduler.NodeStatus, error) {
	c, err := n.agent(d)
	if err != nil {
		return scheduler.NodeStatus{}, err
	}
	late := fmt.Errorf("no answer within %s", pollTimeout)
	ctx, cancel := context.WithTimeoutCause(ctx, pollTimeout, late)
	defer cancel()
	r, err := c.NodeStatus(ctx, connect.NewRequest(&pb.AgentNodeStatusRequest{}))
	if err != nil {
		if context.Cause(ctx) == late {
			err = late
		}
		return scheduler.NodeStatus{}, err
	}
	if r.Msg.Node != n.name {
		return scheduler.NodeStatus{}, fmt.Errorf("node %q answers at %s; correct the [[node]] tables of cluster.toml", r.Msg.Node, n.where.Address)
	}
	return nodeStatus(r.Msg), nil
}

// nodeStatus reads an agent's answer. What it says is not trusted to make
// sense.
func nodeStatus(r *pb.AgentNodeStatusReply) scheduler.NodeStatus {
	out := scheduler.NodeStatus{Node: r.Node, Load: r.Load}
	if !(r.Load >= 0) || math.IsInf(r.Load, 0) { // NaN too
		out.Load = -1
	}
	for _, a := range r.Apps {
		if a == nil {
			continue
		}
		s := scheduler.AppStatus{
			Name: a.Name, SnapshotID: a.SnapshotId, Operation: a.Operation, MayRun: a.MayRun, Fault: a.Fault,
			Idle: -1, RestoreRequested: a.RestoreRequested, Connections: int(a.Connections),
			OldNode: a.OldNode, TakenBy: a.TakenBy,
		}
		if a.IdleMs >= 0 {
			s.Idle = time.Duration(min(a.IdleMs, math.MaxInt64/int64(time.Millisecond))) * time.Millisecond
		}
		var known bool
		if s.State, known = appstate.ParseApp(a.State); !known {
			// A later version's: nobody knows what may be done in it.
			s.MayRun, s.Fault, s.Operation = false, fmt.Sprintf("its state %q is not known to this version", a.State), a.State
		}
		out.Apps = append(out.Apps, s)
	}
	return out
}

// begin asks an agent for an action, in the background. Called with the lock
// held.
func (d *driver) begin(a scheduler.Action) {
	attrs := []any{"app", a.App, "node", a.Node}
	if a.Holder != "" {
		attrs = append(attrs, "held_on", a.Holder)
	}
	if a.To != "" {
		attrs = append(attrs, "to", a.To)
	}
	d.log.Info(string(a.Kind)+" begins", append(attrs, "reason", a.Reason)...)
	n := d.nodes[a.Node]
	ctx, cancel := context.WithTimeout(d.calls, actionTimeout)
	if n != nil {
		n.cuts[&a] = cancel
	}
	d.wg.Go(func() {
		defer cancel()
		err := errors.New("the node is not configured any more")
		if n != nil {
			err = d.act(ctx, n, a)
		}
		failure := ""
		if err != nil {
			failure = message(err)
			d.log.Warn(string(a.Kind)+" failed", append(attrs, "err", failure)...)
		} else {
			d.log.Info(string(a.Kind)+" done", attrs...)
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if n != nil {
			delete(n.cuts, &a)
		}
		d.sched.Done(time.Now(), a, failure)
		if n != nil && d.nodes[n.name] != n {
			n.close()
		}
		for _, other := range d.nodes { // what came of it is seen at once
			other.kick()
		}
	})
}

// act is one request to an agent.
func (d *driver) act(ctx context.Context, n *node, a scheduler.Action) error {
	c, err := n.agent(d)
	if err != nil {
		return err
	}
	switch a.Kind {
	case scheduler.Restore:
		_, err = c.Restore(ctx, connect.NewRequest(&pb.AgentRestoreRequest{App: a.App, SnapshotId: a.SnapshotID, OldNode: a.Holder}))
	case scheduler.Snapshot:
		_, err = c.Snapshot(ctx, connect.NewRequest(&pb.AgentSnapshotRequest{App: a.App}))
	case scheduler.Migrate:
		_, err = c.Migrate(ctx, connect.NewRequest(&pb.AgentMigrateRequest{App: a.App, ToNode: a.To}))
	}
	return err
}

// message is an error without Connect's word for its code.
func message(err error) string {
	if ce := (*connect.Error)(nil); errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}
