package checkpoint

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	// adoptLook is how often the agent looks whether the filter was started anew.
	adoptLook = 2 * time.Second
	// adoptEvery is how often the filter is told which sockets there are: the
	// end of a translated connection may have been silent.
	adoptEvery = time.Minute
)

// keepAdopted tells the filter of the sockets of running applications, at
// once after a start of it and now and then, until ctx ends.
func (a *agent) keepAdopted(ctx context.Context) {
	s := adoptions{}
	tick := time.NewTicker(adoptLook)
	defer tick.Stop()
	for {
		if st, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{})); err == nil {
			a.adoptDue(ctx, &s, st.Msg, time.Now())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// adoptions is what keepAdopted knows of earlier times.
type adoptions struct {
	instance string // of the filter
	apps     map[string]adoption
}

// adoption is how the last one of an application went.
type adoption struct {
	next time.Time     // when it is due again
	wait time.Duration // until then, after a failure
	said string        // the failure that is in the log
}

// failed puts the next one off, ever longer.
func (d *adoption) failed(now time.Time, err error) {
	d.wait = min(max(2*d.wait, adoptLook), adoptEvery)
	if errors.Is(err, errElsewhere) { // it is not here soon
		d.wait = adoptEvery
	}
	d.next = now.Add(d.wait)
}

// adoptDue looks at every running application that is due and that nothing is
// done with.
func (a *agent) adoptDue(ctx context.Context, s *adoptions, st *pb.StatusReply, now time.Time) {
	fresh := s.instance != st.Instance
	s.instance = st.Instance
	was := s.apps
	s.apps = make(map[string]adoption, len(st.Apps))
	for _, p := range st.Apps {
		app := a.config().Apps[p.Name]
		running := p.State == control.StateConnected || p.State == control.StateRestored
		if app == nil || !running {
			continue
		}
		d := was[p.Name]
		if a.busy(p.Name) || !fresh && now.Before(d.next) {
			s.apps[p.Name] = d
			continue
		}
		_, err := a.adopt(ctx, app)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && d.said != "":
			a.log.Info("the filter is told of the application's sockets again", "app", p.Name)
			fallthrough
		case err == nil, connect.CodeOf(err) == connect.CodeFailedPrecondition: // an operation has begun
			d = adoption{next: now.Add(adoptEvery)}
		default:
			d.failed(now, err)
			if text := err.Error(); text != d.said {
				d.said = text
				a.log.Warn("the filter was not told of the application's sockets; it is tried again, ever more seldom", "app", p.Name, "err", err)
			}
		}
		s.apps[p.Name] = d
	}
}

func (a *agent) busy(app string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ops[app] != nil
}

// adopt hands the application's sockets to the filter.
func (a *agent) adopt(ctx context.Context, app *config.App) (*pb.AdoptReply, error) {
	// A list of another namespace would have the filter forget everything.
	if proc, err := a.processOf(app); err != nil {
		return nil, err
	} else if proc != nil {
		if err := proc.within(app.Process.Namespace); err != nil {
			return nil, err
		}
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return nil, err
	}
	ls, err := s.Listeners(app.VIPs, nil)
	if err != nil {
		return nil, err
	}
	scope, err := a.newScope(ctx, app, ls)
	if err != nil {
		return nil, err
	}
	all, err := s.List(sockdiag.Query{Local: app.VIPs, Info: true})
	if err != nil {
		return nil, err
	}
	req := &pb.AdoptRequest{App: app.Name, ListenPorts: scope.listenPorts(ls), ListedAtNs: ts.Nano()}
	if req.Sockets, _, err = scope.pick(all, forAdopt, func() (*pb.ConnInfoReply, error) { return a.connInfo(ctx, app.Name) }); err != nil {
		return nil, err
	}
	r, err := a.filter.Adopt(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, filterError(err, app.Name, control.RequestAdopt)
	}
	if r.Msg.Adopted > 0 || r.Msg.Forgotten > 0 {
		a.log.Info("the filter was told of the application's sockets", "app", app.Name, "new", r.Msg.Adopted, "gone", r.Msg.Forgotten)
	}
	return r.Msg, nil
}
