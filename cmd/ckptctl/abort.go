package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) abortCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "abort APP",
		Short: "Give up a snapshot or a restore that is under way",
		Long: `abort ends the operation that another command has begun. A snapshot leaves
the application running with all its connections (RESTORED); a restore leaves
it stopped with its connections held (SNAPSHOTDONE).

Allowed in SNAPSHOTSTART, SNAPSHOTFREEZE (until the process is being ended;
from then on the snapshot is completed) and RESTORESTART.`,
		Example: "  ckptctl abort redis",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			return c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Abort(ctx, connect.NewRequest(&nfconnfilterv1.AgentAbortRequest{App: app}))
				return c.printAgent(r, err)
			})
		}),
	}
}
