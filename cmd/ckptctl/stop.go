package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) stopCommand() *cobra.Command {
	var discard bool
	cmd := &cobra.Command{
		Use:   "stop APP",
		Short: "Take an application and its VIP down for good",
		Long: `stop ends the process with its stop signal, makes the filter forget the
application and removes the VIP. Its clients lose their connections; to keep
them, take a snapshot instead.

Allowed in CONNECTED and RESTORED. In SNAPSHOTDONE the process is gone already
and the filter holds the clients: --discard gives them up, each gets a reset. In
SNAPSHOTFREEZE --discard first ends a snapshot that nobody carries on.`,
		Example: "  ckptctl stop redis\n  ckptctl stop redis --discard",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			return c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Stop(ctx, connect.NewRequest(&nfconnfilterv1.AgentStopRequest{App: app, Discard: discard}))
				return c.printAgent(r, err)
			})
		}),
	}
	cmd.Flags().BoolVar(&discard, "discard", false, "in SNAPSHOTDONE: reset the connections that are held")
	return cmd
}
