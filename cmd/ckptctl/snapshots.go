package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) snapshotsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "snapshots [APP]",
		Short: "List the stored snapshots",
		Long: `snapshots lists what is stored in the shared directory, of one application or
of all, with the node and the time (UTC) of each. Allowed in any state.`,
		Example: "  ckptctl snapshots redis -o json",
		Args:    maybeApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			if len(args) == 1 {
				if _, err := c.appArg(args); err != nil {
					return err
				}
			}
			return c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Snapshots(ctx, connect.NewRequest(&nfconnfilterv1.AgentSnapshotsRequest{App: c.app}))
				if err != nil {
					return err
				}
				list := make([]snapshotInfoJSON, 0, len(r.Msg.Snapshots))
				var rows [][]string
				for _, s := range r.Msg.Snapshots {
					list = append(list, snapshotInfoJSON{App: s.App, ID: s.Id, Node: s.Node, Time: s.Time, Engine: s.Engine})
					rows = append(rows, []string{s.App, s.Id, dash(s.Node), dash(s.Time), dash(s.Engine)})
				}
				if c.output == "json" {
					return writeJSON(c.out, list)
				}
				return writeTable(c.out, "APP ID NODE TIME ENGINE", rows)
			})
		}),
	}
}
