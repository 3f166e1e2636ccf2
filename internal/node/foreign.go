package node

import (
	"context"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (s service) notYet(app, request string) error {
	return control.Error(connect.CodeUnimplemented, app, s.n.state(app), request+" is not served by this version")
}

func (s service) Handover(_ context.Context, r *connect.Request[pb.HandoverRequest]) (*connect.Response[pb.HandoverReply], error) {
	return nil, s.notYet(r.Msg.App, control.RequestHandover)
}

func (s service) Handback(_ context.Context, r *connect.Request[pb.HandbackRequest]) (*connect.Response[pb.AppReply], error) {
	return nil, s.notYet(r.Msg.App, control.RequestHandback)
}

func (s service) Release(_ context.Context, r *connect.Request[pb.ReleaseRequest]) (*connect.Response[pb.AppReply], error) {
	return nil, s.notYet(r.Msg.App, control.RequestRelease)
}
