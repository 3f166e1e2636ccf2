package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) connsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "conns APP",
		Short: "List an application's connections",
		Long: `conns asks the filter for every connection of an application: both addresses
as the remote sees them, who opened it (passive: accepted by the application),
its state, payload bytes in and out, and whether it is translated, handled by
the fast path, or held with a closed window. Allowed in any state.`,
		Example: "  ckptctl conns redis\n  ckptctl conns redis -o json",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
				r, err := f.GetConnInfo(ctx, connect.NewRequest(&nfconnfilterv1.GetConnInfoRequest{App: app}))
				if err != nil {
					return err
				}
				conns := connsOf(r.Msg.Conns)
				if c.output == "json" {
					return writeJSON(c.out, conns)
				}
				rows := make([][]string, 0, len(conns))
				for _, n := range conns {
					rows = append(rows, []string{n.Local, n.Remote, n.Role, n.State, fmt.Sprint(n.BytesIn), fmt.Sprint(n.BytesOut), dash(n.flags())})
				}
				return writeTable(c.out, "LOCAL REMOTE ROLE STATE BYTES-IN BYTES-OUT FLAGS", rows)
			})
		}),
	}
}
