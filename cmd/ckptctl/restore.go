package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) restoreCommand() *cobra.Command {
	var id, to string
	cmd := &cobra.Command{
		Use:   "restore APP",
		Short: "Bring an application and its held connections back",
		Long: `restore starts the application from its snapshot and gives it back every
connection that the filter held; then what clients have sent in the meantime
is delivered. It returns when the application serves them. The filter asks for
the same by itself when a client speaks.

Allowed in SNAPSHOTDONE. In RESTORED there is nothing to do and restore
succeeds. Only the current snapshot can be restored, for its connections
are the ones that are held; --snapshot makes sure that it is the one you mean.
When restore fails, the connections stay held and it can be tried again.

With --to the application is restored on another node, as ckptctl migrate does
with one that runs; when that fails its connections are held here again.`,
		Example: "  ckptctl restore redis\n  ckptctl restore redis --snapshot 20261122T153000Z-1a2b3c\n  ckptctl restore redis --to node-b",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			return c.withAgentAbort(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Restore(ctx, connect.NewRequest(&nfconnfilterv1.AgentRestoreRequest{App: app, SnapshotId: id, ToNode: to}))
				return c.printAgent(r, err)
			})
		}),
	}
	cmd.Flags().StringVar(&id, "snapshot", "", "refuse unless the current snapshot has this `ID`")
	cmd.Flags().StringVar(&to, "to", "", "restore it on this `NODE` of cluster.toml")
	return cmd
}
