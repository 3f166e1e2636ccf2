package checkpoint

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Which of the sockets on an application's addresses the filter is told of.

// scope tells which sockets are the application's connections: the same choice
// that the filter makes.
type scope struct {
	vips                               []netip.Addr
	include, exclude, outgoing         []uint32
	includeAddresses, excludeAddresses []netip.Prefix
	own                                []netip.Addr // addresses of this node
	listening                          map[uint16]bool
}

func (a *agent) newScope(ctx context.Context, app *config.App, listeners []sockdiag.Socket) (*scope, error) {
	own, err := a.addrs.local(app.Process.Namespace)
	if err != nil {
		return nil, fmt.Errorf("addresses of this node: %w", err)
	}
	all, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{}))
	if err != nil {
		return nil, filterError(err, app.Name, "STATUS")
	}
	f := a.config().Cluster.Filter
	s := &scope{
		vips:    app.VIPs,
		include: ports(app.IncludePorts, f.IncludePorts), exclude: ports(app.ExcludePorts, f.ExcludePorts),
		outgoing: ports(app.OutgoingPorts), includeAddresses: f.IncludeAddresses, excludeAddresses: f.ExcludeAddresses,
	}
	s.place(own, all.Msg.Apps, listeners)
	return s, nil
}

// place takes in what the scope does not know from its application: the
// addresses of this node, those of other applications, which may be in
// namespaces of it, and who listens.
func (s *scope) place(own []netip.Addr, apps []*pb.AppStatus, listeners []sockdiag.Socket) {
	s.own = slices.Concat(own, s.vips)
	for _, o := range apps {
		for _, v := range o.Vips {
			if ip, err := netip.ParseAddr(v); err == nil && o.State != control.StateUnknown {
				s.own = append(s.own, ip.Unmap())
			}
		}
	}
	s.listening = map[uint16]bool{}
	for _, l := range listeners {
		s.listening[l.Local.Port()] = true
	}
}

// sameHost tells that both ends are on this node: such a connection is never
// filtered.
func (s *scope) sameHost(k sockdiag.Socket) bool {
	r := k.Remote.Addr().Unmap()
	return r.IsLoopback() || slices.Contains(s.own, r)
}

// passive tells that local accepted the connection.
func (s *scope) passive(k sockdiag.Socket) bool { return s.listening[k.Local.Port()] }

// wants tells whether the filter looks at the connection.
func (s *scope) wants(k sockdiag.Socket) bool {
	has := func(list []uint32, p uint16) bool { return slices.Contains(list, uint32(p)) }
	holds := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(k.Remote.Addr().Unmap()) })
	}
	switch {
	case has(s.exclude, k.Local.Port()), holds(s.excludeAddresses):
		return false
	case len(s.includeAddresses) > 0 && !holds(s.includeAddresses):
		return false
	case s.passive(k):
		return len(s.include) == 0 || has(s.include, k.Local.Port())
	}
	return len(s.outgoing) == 0 || has(s.outgoing, k.Remote.Port())
}

// purpose is what sockets are picked for.
type purpose bool

const (
	forAdopt    purpose = false
	forSnapshot purpose = true // without what is in TIME_WAIT, or within this node: neither can be held
)

// pick gives the sockets that the filter is to be told of, and the others. What
// it follows already it is told of in any case: the configuration may have
// changed since, and a connection that it knows and is not told of is
// forgotten, with its translation. known is asked only where that matters.
func (s *scope) pick(all []sockdiag.Socket, why purpose, known func() (*pb.ConnInfoReply, error)) (picked []*pb.Socket, others []sockdiag.Socket, err error) {
	var follows map[string]bool
	for _, k := range all {
		within := s.sameHost(k)
		switch {
		case why == forSnapshot && k.State == sockdiag.TimeWait:
			continue
		case why == forSnapshot && within:
			others = append(others, k)
			continue
		case !within && s.wants(k):
			picked = append(picked, socketMessage(k, s.passive(k)))
			continue
		}
		if follows == nil {
			info, err := known()
			if err != nil {
				return nil, nil, err
			}
			follows = make(map[string]bool, len(info.Conns))
			for _, c := range info.Conns {
				follows[socketName(c)] = true
			}
		}
		if follows[pairName(k.Local.String(), k.Remote.String())] {
			picked = append(picked, socketMessage(k, s.passive(k)))
		} else {
			others = append(others, k)
		}
	}
	return picked, others, nil
}

// listenPorts are those of the listeners that the filter looks at.
func (s *scope) listenPorts(listeners []sockdiag.Socket) []uint32 {
	var out []uint32
	for _, l := range listeners {
		p := uint32(l.Local.Port())
		if (len(s.include) == 0 || slices.Contains(s.include, p)) && !slices.Contains(s.exclude, p) {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Found is what is on an application's addresses.
type Found struct {
	Sockets, Listeners []sockdiag.Socket
	Own                []netip.Addr // addresses of the node and of the namespace
}

// Find lists the TCP sockets on the addresses in a network namespace, "" for
// the caller's own, and what listens there.
func Find(namespace string, vips []netip.Addr) (f Found, err error) {
	s, err := openSockets(namespace)
	if err != nil {
		return f, err
	}
	defer s.Close()
	if f.Listeners, err = s.Listeners(vips, nil); err != nil {
		return f, err
	}
	if f.Sockets, err = s.List(sockdiag.Query{Local: vips, Info: true}); err != nil {
		return f, err
	}
	f.Own, err = osAddresses{log: slog.Default()}.local(namespace)
	return f, err
}

// Choose gives, for ADOPT and SNAPSHOTSTART by hand, what the agent would tell
// the filter of: sockets, and ports that are listened on. apps are all
// applications of the filter, with the lists that count there; known asks it
// for the connections that it follows.
func Choose(app string, apps []*pb.AppStatus, f Found, snapshot bool, known func() (*pb.ConnInfoReply, error)) ([]*pb.Socket, []uint32, error) {
	i := slices.IndexFunc(apps, func(a *pb.AppStatus) bool { return a.Name == app })
	if i < 0 {
		return nil, nil, fmt.Errorf("application %s is unknown", app)
	}
	st := apps[i]
	s := &scope{include: st.IncludePorts, exclude: st.ExcludePorts, outgoing: st.OutgoingPorts}
	for _, l := range []struct {
		texts []string
		to    *[]netip.Prefix
	}{{st.IncludeAddresses, &s.includeAddresses}, {st.ExcludeAddresses, &s.excludeAddresses}} {
		for _, t := range l.texts {
			p, err := netip.ParsePrefix(t)
			if err != nil {
				return nil, nil, fmt.Errorf("the filter names %q as a prefix of %s: %w", t, app, err)
			}
			*l.to = append(*l.to, p)
		}
	}
	s.place(f.Own, apps, f.Listeners)
	picked, _, err := s.pick(f.Sockets, purpose(snapshot), known)
	return picked, s.listenPorts(f.Listeners), err
}

// openSockets opens sock_diag in a network namespace, "" for the caller's own.
func openSockets(namespace string) (sockets, error) {
	if namespace == "" {
		return sockdiag.Open()
	}
	return sockdiag.OpenIn(namespacePath(namespace))
}
