package checkpoint

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// What the old node of an application does for the one that takes it over. No
// operation is begun for it: while the filter is in BLOCKDATA none is allowed,
// and the migration that the old node may have begun itself waits for the
// outcome.

// Yield serves the request of the same name.
func (a *agent) Yield(ctx context.Context, r *connect.Request[pb.AgentYieldRequest]) (*connect.Response[pb.AgentReply], error) {
	m := r.Msg
	if err := fromItself(ctx, m.App, m.Taker); err != nil {
		return nil, err
	}
	return answer(a.yield(ctx, m))
}

// fromItself refuses a node that speaks for another. A request of this node's
// own socket is root's.
func fromItself(ctx context.Context, app, node string) error {
	if p, ok := control.PeerFrom(ctx); ok && p.Name != node {
		return control.Error(connect.CodePermissionDenied, app, "",
			fmt.Sprintf("node %s asks in the name of node %q", p.Name, node))
	}
	return nil
}

func (a *agent) yield(ctx context.Context, m *pb.AgentYieldRequest) (*pb.AgentReply, error) {
	app, err := a.app(m.App)
	if err != nil {
		return nil, err
	}
	a.yielding.Lock()
	defer a.yielding.Unlock()
	if err := ctx.Err(); err != nil { // whoever asked may want something else by now
		return nil, err
	}
	// Half of it helps nobody: it does not end with the caller.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	st, err := a.status(ctx, app.Name)
	if err != nil {
		return nil, err
	}
	taken := st.State == control.StateBlockData && st.TakenBy == m.Taker
	reply := &pb.AgentReply{App: app.Name, State: st.State}
	what := fmt.Sprintf("%s of the old node", m.What)
	switch m.What {
	case control.YieldAddresses:
		if !taken {
			return nil, refused(what, app.Name, st.State, fmt.Sprintf("node %q has not taken its connections over", m.Taker))
		}
		err = a.removeVIPs(app)
	case control.YieldBack:
		switch {
		case st.State == control.StateBlockData:
			return nil, refused(what, app.Name, st.State, "its connections were not handed back")
		case st.State == control.StateSnapshotDone:
			err = a.takeAddresses(app)
		}
	case control.YieldRelease:
		if !taken {
			return reply, nil // it is not, or not any more, ours to forget
		}
		if err = a.leave(app); err == nil {
			err = a.release(ctx, app.Name)
			reply.State = control.StateUnknown
		}
	default:
		return nil, control.Error(connect.CodeInvalidArgument, app.Name, st.State,
			fmt.Sprintf("yield of %q: want %s, %s or %s", m.What, control.YieldAddresses, control.YieldBack, control.YieldRelease))
	}
	if err != nil {
		return nil, failed(what, app.Name, st.State, err)
	}
	a.log.Info("asked by the node that takes the application over", "app", app.Name, "node", m.Taker, "what", m.What)
	return reply, nil
}

// leave takes what is left of sockets, and the VIPs, from this node while the
// filter swallows all that they might still say. On the old node the addresses
// alone went when the taker asked for them: until it has them nobody answers the
// clients.
func (a *agent) leave(app *config.App) error {
	if s, err := a.openSockets(app.Process.Namespace); err == nil { // a namespace that is gone has none
		_, err = a.destroyOld(s, app, nil)
		s.Close()
		if err != nil {
			return err
		}
	}
	return a.removeVIPs(app)
}

// takeAddresses puts the VIPs of an application that is held on this node and
// tells the link so.
func (a *agent) takeAddresses(app *config.App) error {
	if err := a.heldVIPs(&undo{}, app); err != nil {
		return err
	}
	return a.announceVIPs(app)
}

// announceAgain is when an announcement is repeated: a single frame may be
// lost.
var announceAgain = []time.Duration{50 * time.Millisecond, time.Second, 2 * time.Second}

// announceVIPs tells the link which node has the VIPs now, and repeats it as
// long as that is so.
func (a *agent) announceVIPs(app *config.App) error {
	iface, err := a.nodeInterface()
	if err != nil {
		return err
	}
	for _, v := range app.VIPs {
		if err := a.addrs.announce(iface, v); err != nil {
			// Neighbours that still know another owner learn it with time.
			a.log.Warn("VIP is not announced", "interface", iface, "vip", v, "err", err)
		}
	}
	a.wg.Go(func() {
		for _, wait := range announceAgain {
			select {
			case <-a.root.Done():
				return
			case <-time.After(wait):
			}
			for _, v := range app.VIPs {
				if _, ok, err := a.addrs.has(app.Process.Namespace, v); err != nil || !ok {
					if _, ok, err = a.addrs.has(hostNamespace, v); err != nil || !ok {
						continue
					}
				}
				_ = a.addrs.announce(iface, v) // the first was logged
			}
		}
	})
	return nil
}

func (a *agent) release(ctx context.Context, app string) error {
	_, err := a.filter.Release(ctx, connect.NewRequest(&pb.ReleaseRequest{App: app}))
	return filterError(err, app, control.RequestRelease)
}
