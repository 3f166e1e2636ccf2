package main

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) snapshotCommand() *cobra.Command {
	var force bool
	var drain time.Duration
	cmd := &cobra.Command{
		Use:   "snapshot APP",
		Short: "Stop an application and keep its clients connected",
		Long: `snapshot freezes every connection at a request's boundary, waits until each
byte is accounted for, ends the process and stores a snapshot. From then on
the filter answers the clients, and asks for a restore when one speaks. The
snapshot's ID is printed alone on the last line.

Allowed in CONNECTED and RESTORED. In SNAPSHOTDONE the ID of the snapshot that
is there is printed. When a connection does not get quiet within the drain
time-out the snapshot is aborted, the application runs on and the connection
is named; --force goes on nevertheless and names what may be lost.`,
		Example: "  ckptctl snapshot redis\n  ID=$(ckptctl snapshot redis --drain-timeout 30s)",
		Args:    oneApp,
	}
	cmd.RunE = c.command(func(ctx context.Context, args []string) error {
		app, err := c.appArg(args)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("drain-timeout") && drain < time.Millisecond {
			return usagef("--drain-timeout %v: it must be at least 1ms", drain)
		}
		return c.withAgentAbort(ctx, func(ctx context.Context, a *control.AgentClient) error {
			r, err := a.Snapshot(ctx, connect.NewRequest(&nfconnfilterv1.AgentSnapshotRequest{
				App: app, Force: force, DrainTimeoutMs: drain.Milliseconds(),
			}))
			if err != nil {
				return err
			}
			if c.output == "json" {
				return writeJSON(c.out, snapshotJSON{App: r.Msg.App, SnapshotID: r.Msg.SnapshotId, Forced: notEmpty(r.Msg.Forced), Notes: r.Msg.Notes, Phases: phasesOf(r.Msg.Phases)})
			}
			for _, line := range r.Msg.Notes {
				fmt.Fprintf(c.err, "note: %s\n", line)
			}
			for _, line := range r.Msg.Forced {
				fmt.Fprintf(c.err, "forced: %s\n", line)
			}
			_, err = fmt.Fprintln(c.out, r.Msg.SnapshotId)
			return err
		})
	})
	cmd.Flags().BoolVar(&force, "force", false, "go on where a connection is not accounted for, and name it")
	cmd.Flags().DurationVar(&drain, "drain-timeout", 0, "how long connections may take to get quiet, instead of the application's own `DURATION`")
	return cmd
}
