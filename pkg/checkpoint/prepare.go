package checkpoint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// preparedFor is how long the answer to Prepare spares a restore the looks that
// take time.
const preparedFor = time.Minute

// suitor is a node whose application is to come here.
type suitor struct {
	node   string   // that holds or runs it
	links  []string // its link-layer addresses: only they may answer for the VIPs
	digest string   // of the configuration that it has read; "": not compared
	id     string   // the snapshot; "": none yet
}

// Prepare serves the request of the same name.
func (a *agent) Prepare(ctx context.Context, r *connect.Request[pb.AgentPrepareRequest]) (*connect.Response[pb.AgentPrepareReply], error) {
	m := r.Msg
	if err := fromItself(ctx, m.App, m.FromNode); err != nil {
		return nil, err
	}
	app, err := a.freshApp(m.App)
	if err != nil {
		return nil, err
	}
	st, checks, err := a.fit(ctx, app, suitor{m.FromNode, m.LinkAddresses, m.ConfigDigest, m.SnapshotId})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.prepared[m.App] = prepared{m.FromNode, time.Now()}
	a.mu.Unlock()
	return answer(&pb.AgentPrepareReply{App: m.App, Node: a.config().Node.Name, State: st.State, Checks: checks}, nil)
}

// prepared is a Prepare that went well.
type prepared struct {
	node string
	at   time.Time
}

// wasPrepared tells whether the application was just found to fit, and forgets
// it.
func (a *agent) wasPrepared(app, node string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.prepared[app]
	delete(a.prepared, app)
	return ok && p.node == node && time.Since(p.at) < preparedFor
}

// fit tells whether this node can take an application over, a line for each
// thing that was looked at. It changes nothing.
func (a *agent) fit(ctx context.Context, app *config.App, from suitor) (st *pb.AppStatus, checks []string, err error) {
	node := a.config().Node.Name
	cannot := func(err error) (*pb.AppStatus, []string, error) {
		return nil, nil, failed("take-over", app.Name, "", fmt.Errorf("node %s: %w", node, err))
	}
	if err := a.mayRunHere(app); err != nil {
		return cannot(err)
	}
	if own := configDigest(app, &a.config().Cluster); from.digest != "" && from.digest != own {
		return cannot(fmt.Errorf("its configuration is not the one that node %s has read; reload both agents (SIGHUP) and see that they share one directory", from.node))
	}
	checks = append(checks, fmt.Sprintf("the configuration is the same as on %s and allows %s", from.node, node))
	if st, err = a.status(ctx, app.Name); err != nil {
		return cannot(err)
	}
	if err := a.mayTake(st, from.node); err != nil {
		return cannot(err)
	}
	checks = append(checks, "the filter is there and does not know the application")
	if err := a.filterReaches(ctx, app.Name, from.node); err != nil {
		return cannot(err)
	}
	checks = append(checks, "the filter of "+from.node+" can be reached")
	if proc, err := a.processOf(app); err != nil {
		return cannot(err)
	} else if proc != nil {
		return cannot(fmt.Errorf("%s of it runs here; stop that first", proc.describe()))
	}
	if err := a.portsFree(app); err != nil {
		return cannot(err)
	}
	checks = append(checks, fmt.Sprintf("its ports %v are free", app.IncludePorts))
	if err := a.addressesFree(app, from); err != nil {
		return cannot(err)
	}
	checks = append(checks, fmt.Sprintf("nobody but %s answers for its VIPs", from.node))
	if err := a.store.writable(app.Name); err != nil {
		return cannot(err)
	}
	if from.digest != "" { // it waits for the answer, and has left its mark
		if err := a.store.shares(ctx, app.Name, from.node); err != nil {
			return cannot(err)
		}
		checks = append(checks, "the snapshot store is the one of "+from.node)
	}
	if from.id != "" {
		if err := a.store.await(ctx, app.Name, from.id); err != nil {
			return cannot(err)
		}
		checks = append(checks, "snapshot "+from.id+" can be read and is whole")
	}
	return st, append(checks, "the snapshot store can be written"), nil
}

// mayRunHere tells what in the configuration is against it.
func (a *agent) mayRunHere(app *config.App) error {
	cfg := a.config()
	if err := errors.Join(supported("restore", app), a.trusted(app)); err != nil {
		return err
	}
	if len(app.Nodes) > 0 && !slices.Contains(app.Nodes, cfg.Node.Name) {
		return fmt.Errorf("nodes = %q in the application's file does not allow it", app.Nodes)
	}
	if len(app.Process.Start) == 0 {
		return errors.New("process.start is empty, so it cannot be started here; set it")
	}
	if _, err := a.nodeInterface(); err != nil {
		return err
	}
	if ns := app.Process.Namespace; ns != "" {
		if _, err := os.Stat(namespacePath(ns)); err != nil {
			return fmt.Errorf("its network namespace: %w; make it", err)
		}
	}
	return nil
}

// mayTake looks at what this node's filter knows of the application.
func (a *agent) mayTake(st *pb.AppStatus, from string) error {
	switch {
	case st.State == control.StateUnknown:
		return nil
	case st.State == control.StateBlockData && st.TakenBy == from:
		return nil // its release was lost, and it comes back
	case st.State == control.StateBlockData:
		return fmt.Errorf("it was handed to node %s, which has not released it; ckptctl release %s here once that node has it no more", st.TakenBy, st.Name)
	}
	return fmt.Errorf("it is in state %s here already", st.State)
}

// filterReaches tells what keeps this node from the other one's filter.
func (a *agent) filterReaches(ctx context.Context, app, node string) error {
	f, done, err := a.dialFilter(node)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	if _, err := f.Status(ctx, connect.NewRequest(&pb.StatusRequest{App: app})); err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		return fmt.Errorf("the filter of node %s cannot be asked: %s", node, message(err))
	}
	return nil
}

// portsFree tells who listens on the application's ports.
func (a *agent) portsFree(app *config.App) error {
	if len(app.IncludePorts) == 0 {
		return nil
	}
	s, err := a.openSockets(app.Process.Namespace)
	if err != nil {
		return err
	}
	defer s.Close()
	return notTaken(s, app)
}

// notTaken tells who listens on the application's ports, by sockets of its
// network namespace.
func notTaken(s sockets, app *config.App) error {
	if len(app.IncludePorts) == 0 {
		return nil
	}
	taken, err := s.Listeners(app.VIPs, app.IncludePorts)
	if err == nil && len(taken) > 0 {
		err = fmt.Errorf("%s is listened on already by another process; stop that first", taken[0].Local)
	}
	return err
}

// addressesFree asks the link who has the VIPs.
func (a *agent) addressesFree(app *config.App, from suitor) error {
	iface, err := a.nodeInterface()
	if err != nil {
		return err
	}
	for _, v := range app.VIPs {
		for _, ns := range []string{hostNamespace, app.Process.Namespace} {
			if on, ok, err := a.addrs.has(ns, v); err != nil {
				return err
			} else if ok {
				return fmt.Errorf("its VIP %s is on interface %s here already; remove it (ip address del %[1]s dev %[2]s)", v, on)
			}
		}
		answers, err := a.addrs.probe(hostNamespace, iface, v)
		if err != nil {
			return err
		}
		for _, l := range answers {
			if !slices.ContainsFunc(from.links, func(own string) bool { return strings.EqualFold(own, l) }) {
				return fmt.Errorf("its VIP %s is answered for on %s by %s, which is not node %s; find that machine and take the address from it", v, iface, l, from.node)
			}
		}
	}
	return nil
}

// configDigest tells two readings of an application's configuration apart.
func configDigest(app *config.App, c *config.Cluster) string {
	b, err := json.Marshal(struct {
		App    *config.App
		Filter config.Filter
	}{app, c.Filter})
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// message is an error's text without the word for its code.
func message(err error) string {
	if ce := new(connect.Error); errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}
