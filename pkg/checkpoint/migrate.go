package checkpoint

import (
	"context"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func notYet(app, what string) error {
	return control.Error(connect.CodeUnimplemented, app, "", what+" is not served by this version")
}

// Migrate serves the request of the same name.
func (a *agent) Migrate(_ context.Context, r *connect.Request[pb.AgentMigrateRequest]) (*connect.Response[pb.AgentMigrateReply], error) {
	return nil, notYet(r.Msg.App, "migrate")
}

// Prepare serves the request of the same name.
func (a *agent) Prepare(_ context.Context, r *connect.Request[pb.AgentPrepareRequest]) (*connect.Response[pb.AgentPrepareReply], error) {
	return nil, notYet(r.Msg.App, "prepare")
}

// Yield serves the request of the same name.
func (a *agent) Yield(_ context.Context, r *connect.Request[pb.AgentYieldRequest]) (*connect.Response[pb.AgentReply], error) {
	return nil, notYet(r.Msg.App, "yield")
}
