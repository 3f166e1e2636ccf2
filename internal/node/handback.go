package node

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// job hands an application back to the node that has handed it over, until that
// one has answered in a way that leaves no doubt.
type job struct {
	app, node  string
	structures []byte // as they go back; nil: not known, they are asked for
	yield      bool   // the engine has them and is silent; else it never took them
	maybe      bool   // a try that was not answered may have been heard
	own        bool   // the other node has forgotten the application
	notes      []string

	ctx    context.Context
	cancel context.CancelFunc
}

// outcome of a try.
type outcome bool

const (
	open    outcome = false // nobody knows, or it was not sent
	settled outcome = true
)

// handbackTime is for one try: structures can be large.
const handbackTime = time.Minute

// callBack sends HANDBACK once.
func (s service) callBack(ctx context.Context, j *job) (sent bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, handbackTime)
	defer cancel()
	client, done, err := s.n.peer(j.node)
	if err != nil {
		return false, err
	}
	defer done()
	_, sent, err = attempt(ctx, func(ctx context.Context) (*connect.Response[pb.AppReply], error) {
		return client.Handback(ctx, connect.NewRequest(&pb.HandbackRequest{App: j.app, FromNode: s.n.cfg.Load().Node.Name, Structures: j.structures}))
	})
	return sent, err
}

// undo hands back what the engine never took.
func (s service) undo(ctx context.Context, j *job) outcome {
	if j.structures == nil {
		if needed, known := s.askedFor(ctx, j); !known {
			return open
		} else if !needed {
			return settled
		}
	}
	_, err := s.callBack(ctx, j)
	if err != nil && !refused(err) {
		return open
	}
	if i := control.Info(err); i != nil && i.State == appstate.BlockData.String() {
		j.structures = nil // these were damaged, or are old: it is asked again
		return open
	}
	if err != nil { // it has gone on without us
		s.n.log.Warn("an application was not taken back", "app", j.app, "node", j.node, "error", words(err))
	}
	return settled
}

// askedFor finds out whether the other node waits for us, and has the structures
// in j then. known: it has told.
func (s service) askedFor(ctx context.Context, j *job) (needed, known bool) {
	ctx, cancel := context.WithTimeout(ctx, handbackTime)
	defer cancel()
	client, done, err := s.n.peer(j.node)
	if err != nil {
		return false, false
	}
	defer done()
	self := s.n.cfg.Load().Node.Name
	r, err := client.Status(ctx, connect.NewRequest(&pb.StatusRequest{App: j.app}))
	if err != nil {
		return false, refused(err)
	}
	for _, a := range r.Msg.Apps {
		if a.Name != j.app || a.State != appstate.BlockData.String() || a.TakenBy != self {
			continue
		}
		h, err := client.Handover(ctx, connect.NewRequest(&pb.HandoverRequest{App: j.app, ToNode: self}))
		if err != nil {
			return false, refused(err)
		}
		j.structures = h.Msg.Structures
		return true, true
	}
	return false, true
}

// yield hands back what the engine has. err with settled: it goes on here.
func (s service) yield(ctx context.Context, j *job) (outcome, error) {
	x, err := s.do(ctx, &filter.Yield{App: j.app})
	if err != nil {
		return settled, s.failure(j.app, err)
	}
	if j.structures, err = encodeStructures(x.(*filter.Structures)); err != nil {
		return s.keep(ctx, j, err)
	}
	sent, err := s.callBack(ctx, j)
	switch {
	case err == nil:
		return s.gone(ctx, j)
	case refused(err):
		state := ""
		if i := control.Info(err); i != nil {
			state = i.State
		}
		if state == "" || state == appstate.BlockData.String() {
			j.own = connect.CodeOf(err) == connect.CodeNotFound
			return s.keep(ctx, j, fmt.Errorf("the filter of node %s: %s", j.node, words(err)))
		}
		j.notes = append(j.notes, fmt.Sprintf("node %s has the application already, in state %s", j.node, state))
		return s.gone(ctx, j)
	case !sent && !j.maybe:
		return s.keep(ctx, j, fmt.Errorf("the filter of node %s cannot be reached: %s", j.node, words(err)))
	}
	j.maybe = true
	return open, err
}

// gone forgets what the other node has.
func (s service) gone(ctx context.Context, j *job) (outcome, error) {
	s.n.foreign.handedBack(j.app, j.node)
	if _, err := s.do(ctx, &filter.Release{App: j.app, Force: true}); err != nil {
		return settled, s.failure(j.app, err)
	}
	return settled, nil
}

// keep has the engine answer again: the other node does not have the structures.
func (s service) keep(ctx context.Context, j *job, why error) (outcome, error) {
	if _, err := s.do(ctx, &filter.Unyield{App: j.app, Own: j.own}); err != nil {
		return settled, s.failure(j.app, err)
	}
	return settled, control.Error(connect.CodeFailedPrecondition, j.app, s.n.state(j.app),
		fmt.Sprintf("RESTOREABORT: %v; the connections stay held on this node", why))
}

// pursue goes on with j in the background.
func (s service) pursue(j *job) {
	f := &s.n.foreign
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	if f.jobs == nil {
		f.jobs = map[string]*job{}
	}
	if o := f.jobs[j.app]; o != nil {
		o.cancel()
	}
	j.ctx, j.cancel = context.WithCancel(context.Background())
	f.jobs[j.app] = j
	f.wg.Go(func() { s.work(j) })
}

func (s service) work(j *job) {
	defer j.cancel()
	f := &s.n.foreign
	tick := time.NewTicker(cmp.Or(f.again, time.Second))
	defer tick.Stop()
	for {
		select {
		case <-j.ctx.Done():
			return
		case <-tick.C:
		}
		unlock, err := f.lock(j.ctx, j.app)
		if err != nil {
			return
		}
		over := j.ctx.Err() != nil
		if !over {
			over = s.try(j)
		}
		unlock()
		if over {
			return
		}
	}
}

// try is one of a job in the background; true: it is over.
func (s service) try(j *job) bool {
	out, err := open, error(nil)
	if j.yield {
		out, err = s.yield(j.ctx, j)
	} else {
		out = s.undo(j.ctx, j)
	}
	if out == open || j.ctx.Err() != nil {
		return j.ctx.Err() != nil
	}
	s.n.foreign.finished(j)
	if err != nil {
		s.n.log.Error("an application was not handed back", "app", j.app, "node", j.node, "error", words(err))
	} else {
		s.n.log.Info("an application was handed back", "app", j.app, "node", j.node)
	}
	return true
}

// finished takes j out of the list.
func (f *foreign) finished(j *job) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.jobs[j.app] == j {
		delete(f.jobs, j.app)
	}
}

// drop ends the application's job, whatever it is.
func (f *foreign) drop(app string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if j := f.jobs[app]; j != nil {
		j.cancel()
		delete(f.jobs, app)
	}
}

// cancelUndo ends a job for what the engine never took: it is asked for again.
func (f *foreign) cancelUndo(app string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if j := f.jobs[app]; j != nil && !j.yield {
		j.cancel()
		delete(f.jobs, app)
	}
}

// resumeYields goes on handing back what an earlier filter could not.
func (s service) resumeYields(ctx context.Context) {
	x, err := s.do(ctx, &filter.Status{})
	if err != nil {
		return
	}
	for _, a := range x.(*filter.StatusList).Apps {
		if a.Yielding {
			s.pursue(&job{app: a.Name, node: a.TakenBy, yield: true, maybe: true})
		}
	}
}
