package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// filterError says which request failed, keeping code, state and connections
// of the filter's answer.
func filterError(err error, app, request string) error {
	if err == nil {
		return nil
	}
	if control.IsUnreachable(err) {
		return control.Error(connect.CodeUnavailable, app, "",
			request+": the filter is not reachable ("+err.Error()+"); start nfconnfilter run")
	}
	state, conns := "", []string(nil)
	if info := control.Info(err); info != nil {
		state, conns = info.State, info.Connections
	}
	return control.Error(connect.CodeOf(err), app, state, request+": "+message(err), conns...)
}

// failed makes the error of an operation. An error that carries a code keeps
// it, with what it knows of state and connections.
func failed(op, app, state string, err error) error {
	code, msg := connect.CodeFailedPrecondition, err.Error()
	var conns []string
	if ce := new(connect.Error); errors.As(err, &ce) {
		// The inner code's word would stand in the middle of the sentence.
		code, msg = ce.Code(), strings.Replace(msg, ce.Error(), ce.Message(), 1)
		if info := control.Info(err); info != nil {
			conns = info.Connections
			if state == "" {
				state = info.State
			}
		}
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errAborted), errors.Is(err, errStopping):
		code = connect.CodeAborted
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	}
	prefix := fmt.Sprintf("%s of %s: ", op, app) // what failed within it says so already
	return control.Error(code, app, state, prefix+strings.TrimPrefix(msg, prefix), conns...)
}

// refused is the error of an operation that the state does not allow.
func refused(op, app, state, remedy string) error {
	shown := state
	if shown == control.StateUnknown {
		shown = "unknown (not started on this node)"
	}
	return control.Error(connect.CodeFailedPrecondition, app, state,
		fmt.Sprintf("%s of %s is not allowed in state %s; %s", op, app, shown, remedy))
}

// status asks the filter for an application; one that it does not know has
// the state "".
func (a *agent) status(ctx context.Context, app string) (*pb.AppStatus, error) {
	r, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{App: app}))
	if connect.CodeOf(err) == connect.CodeNotFound && !control.IsUnreachable(err) {
		return &pb.AppStatus{Name: app}, nil
	}
	if err != nil {
		return nil, filterError(err, app, "STATUS")
	}
	for _, s := range r.Msg.Apps {
		if s.Name == app {
			return s, nil
		}
	}
	return &pb.AppStatus{Name: app}, nil
}

func (a *agent) connInfo(ctx context.Context, app string) (*pb.ConnInfoReply, error) {
	r, err := a.filter.GetConnInfo(ctx, connect.NewRequest(&pb.GetConnInfoRequest{App: app}))
	if err != nil {
		return nil, filterError(err, app, control.RequestGetConnInfo)
	}
	return r.Msg, nil
}

// register tells the filter about an application, its lists joined with those
// of the cluster.
func (a *agent) register(ctx context.Context, app *config.App) error {
	f := a.config().Cluster.Filter
	req := &pb.RegisterRequest{
		App:              app.Name,
		IncludePorts:     ports(app.IncludePorts, f.IncludePorts),
		OutgoingPorts:    ports(app.OutgoingPorts),
		ExcludePorts:     ports(app.ExcludePorts, f.ExcludePorts),
		IncludeAddresses: prefixes(f.IncludeAddresses),
		ExcludeAddresses: prefixes(f.ExcludeAddresses),
	}
	for _, v := range app.VIPs {
		req.Vips = append(req.Vips, v.String())
	}
	_, err := a.filter.Register(ctx, connect.NewRequest(req))
	return filterError(err, app.Name, control.RequestRegister)
}

// ports joins lists, sorted and without repetitions.
func ports(lists ...[]uint16) []uint32 {
	var out []uint32
	for _, p := range slices.Concat(lists...) {
		out = append(out, uint32(p))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func prefixes(list []netip.Prefix) []string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return out
}

// socketMessage is the socket as the filter is told about it.
func socketMessage(k sockdiag.Socket, passive bool) *pb.Socket {
	m := &pb.Socket{
		Local: k.Local.String(), Remote: k.Remote.String(), State: k.State.String(), Passive: passive,
		RecvQueue: k.RecvQ, SendQueue: k.SendQ, Owned: k.Inode != 0,
	}
	if i := k.Info; i != nil {
		m.HasInfo = true
		m.OptTimestamps, m.OptSack, m.OptWscale = i.Options.Timestamps, i.Options.SACK, i.Options.WScale
		m.SndWscale, m.RcvWscale = uint32(i.SndWScale), uint32(i.RcvWScale)
		m.SndMss, m.AdvMss = i.SndMSS, i.AdvMSS
		m.BytesAcked, m.BytesReceived, m.BytesSent = i.BytesAcked, i.BytesReceived, i.BytesSent
		m.LastDataSentMs, m.LastDataRecvMs = milliseconds(i.LastDataSent), milliseconds(i.LastDataRecv)
		m.RcvSpace = i.RcvSpace
	}
	return m
}

func milliseconds(d time.Duration) uint32 { return uint32(min(max(d.Milliseconds(), 0), 1<<32-1)) }

// pairName names a connection as messages do.
func pairName(local, remote string) string { return local + " " + remote }

// socketName names the socket of a connection: its local port can be another
// than the one that the remote sees.
func socketName(c *pb.ConnInfo) string {
	if c.Socket != "" {
		return pairName(c.Socket, c.Remote)
	}
	return pairName(c.Local, c.Remote)
}
