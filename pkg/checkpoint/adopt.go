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
	var instance string
	var last time.Time
	tick := time.NewTicker(adoptLook)
	defer tick.Stop()
	for {
		if st, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{})); err == nil {
			if st.Msg.Instance != instance || time.Since(last) >= adoptEvery {
				if a.adoptAll(ctx, st.Msg.Apps) {
					instance, last = st.Msg.Instance, time.Now()
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// adoptAll looks at every running application that nothing is done with. It
// tells whether it got everywhere.
func (a *agent) adoptAll(ctx context.Context, apps []*pb.AppStatus) bool {
	all := true
	for _, st := range apps {
		app := a.config().Apps[st.Name]
		running := st.State == control.StateConnected || st.State == control.StateRestored
		if app == nil || !running || a.busy(st.Name) {
			continue
		}
		_, err := a.adopt(ctx, app)
		if connect.CodeOf(err) == connect.CodeFailedPrecondition { // an operation has begun
			continue
		}
		if err != nil && ctx.Err() == nil {
			a.log.Warn("the filter was not told of the application's sockets", "app", st.Name, "err", err)
			all = all && errors.Is(err, errElsewhere) // it is not elsewhere soon
		}
	}
	return all
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
