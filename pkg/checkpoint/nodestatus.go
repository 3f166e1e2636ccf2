package checkpoint

import (
	"context"

	"connectrpc.com/connect"

	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// NodeStatus serves the request of the same name.
func (a *agent) NodeStatus(context.Context, *connect.Request[pb.AgentNodeStatusRequest]) (*connect.Response[pb.AgentNodeStatusReply], error) {
	return nil, nil
}
