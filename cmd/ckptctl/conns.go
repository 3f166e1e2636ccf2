package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) connsCommand() *cobra.Command {
	var stats, reasons bool
	cmd := &cobra.Command{
		Use:   "conns APP",
		Short: "List an application's connections",
		Long: `conns asks the filter for every connection of an application. Allowed in any
state. The columns:

  LOCAL, REMOTE   both addresses as the remote sees them
  ROLE            passive: accepted by the application; active: opened by it
  STATE           of the connection; CONNECTRMT: only its remote side is left
  BYTES-IN, -OUT  payload from and to the remote; while the data stays in the
                  kernel it is not counted, the next snapshot makes up for it
  IDLE            since the remote was heard; - while it speaks to the
                  application without the filter, or was not heard yet
  FLAGS           translated; offloaded: handled by the fast path;
                  window-closed: the remote's data waits

with --stats, counts of what came to the filter:

  SEGS-IN, -OUT   segments from the remote and from the application's stack
  ANSWERED        of these, answered by the filter in the other side's place
  TO-REMOTE, TO-LOCAL  segments that the filter sent
  KEPT            bytes/segments kept for the application

with --reasons, a line for each reason that the connection's segments met, the
most frequent first; the words are those of "What the filter counts" in
docs/operating.md.

Of a connection that is neither held nor translated only SYN, FIN and RST come
to the filter. Counts of segments and reasons begin anew when the filter is
restarted. JSON has all of them: idle_seconds is -1 for -.`,
		Example: "  ckptctl conns redis\n  ckptctl conns redis --stats\n  ckptctl conns redis --reasons | sort -k3,3 -k4,4nr\n  ckptctl conns redis -o json",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			table := connsTable
			switch {
			case stats:
				table = statsTable
			case reasons:
				table = reasonsTable
			}
			return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
				q := &nfconnfilterv1.GetConnInfoRequest{App: app, Reasons: reasons || c.output == "json"}
				r, err := f.GetConnInfo(ctx, connect.NewRequest(q))
				if err != nil {
					return err
				}
				conns := connsOf(r.Msg.Conns)
				if c.output == "json" {
					return writeJSON(c.out, conns)
				}
				rows := make([][]string, 0, len(conns))
				for _, n := range conns {
					rows = append(rows, table.rows(n)...)
				}
				return writeTable(c.out, table.header, rows)
			})
		}),
	}
	cmd.Flags().BoolVar(&stats, "stats", false, "show counts of segments instead")
	cmd.Flags().BoolVar(&reasons, "reasons", false, "show what became of the segments instead: a line for each reason")
	cmd.MarkFlagsMutuallyExclusive("stats", "reasons")
	return cmd
}
