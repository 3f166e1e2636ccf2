package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) startCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "start APP",
		Short: "Bring an application and its VIP up on this node",
		Long: `start reads apps/APP.toml afresh, makes the application known to the
filter, adds its VIP to the node's interface and starts the process. It
returns when the listen ports are open. A process that runs already, with its
VIP in place and a pid_file that names it, is adopted instead of started.

Allowed while the application is unknown here. When it is running already
(CONNECTED, RESTORED) there is nothing to do and start succeeds. A failure
undoes what was done.`,
		Example: "  ckptctl start redis",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			return c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Start(ctx, connect.NewRequest(&nfconnfilterv1.AgentStartRequest{App: app}))
				return c.printAgent(r, err)
			})
		}),
	}
}

// printAgent prints the agent's reply to start, stop, restore and abort.
func (c *cli) printAgent(r *connect.Response[nfconnfilterv1.AgentReply], err error) error {
	if err != nil {
		return err
	}
	return c.printApp(appJSON{App: r.Msg.App, State: r.Msg.State, Notes: r.Msg.Notes, Phases: phasesOf(r.Msg.Phases)})
}
