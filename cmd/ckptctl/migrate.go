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

type migrateJSON struct {
	App        string      `json:"app"`
	From       string      `json:"from"`
	To         string      `json:"to"`
	State      string      `json:"state"`
	SnapshotID string      `json:"snapshot_id,omitempty"`
	DryRun     bool        `json:"dry_run,omitempty"`
	Phases     []phaseJSON `json:"phases"`
	Checks     []string    `json:"checks"`
	Forced     []string    `json:"forced,omitempty"`
	Notes      []string    `json:"notes,omitempty"`
}

func (c *cli) migrateCommand() *cobra.Command {
	var to string
	var force, dryRun bool
	var drain time.Duration
	cmd := &cobra.Command{
		Use:   "migrate APP --to NODE",
		Short: "Move an application, and its clients' connections, to another node",
		Long: `migrate takes a snapshot here, unless there is one, and restores it on another
node: the other node's filter has the connections handed over, the VIP moves,
the application starts there and its clients' connections come back to it. It
prints how long each phase took.

Everything that can be checked is checked before anything is changed: whether
the other node may run it and has read the same configuration, whether its
filter and this one's reach each other, whether its ports are free, whether a
stranger answers for the VIP, whether the snapshots can be read and written.
--dry-run does that and no more.

When anything fails before the connections are open there, or on abort, all of
it is given back, and an application that ran before runs here again.

Allowed in CONNECTED, RESTORED and SNAPSHOTDONE, on the node that has it.`,
		Example: "  ckptctl migrate redis --to node-b --dry-run\n  ckptctl migrate redis --to node-b\n  ckptctl migrate redis --to node-b -o json",
		Args:    oneApp,
	}
	cmd.RunE = c.command(func(ctx context.Context, args []string) error {
		app, err := c.appArg(args)
		if err != nil {
			return err
		}
		if to == "" {
			return usagef("--to is empty: name a [[node]] of cluster.toml")
		}
		if cmd.Flags().Changed("drain-timeout") && drain < time.Millisecond {
			return usagef("--drain-timeout %v: it must be at least 1ms", drain)
		}
		return c.withAgentAbort(ctx, func(ctx context.Context, a *control.AgentClient) error {
			r, err := a.Migrate(ctx, connect.NewRequest(&nfconnfilterv1.AgentMigrateRequest{
				App: app, ToNode: to, DryRun: dryRun, Force: force, DrainTimeoutMs: drain.Milliseconds(),
			}))
			if err != nil {
				return err
			}
			return c.printMigrate(r.Msg, dryRun)
		})
	})
	cmd.Flags().StringVar(&to, "to", "", "the `NODE` that it moves to")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check what can be checked, and change nothing")
	cmd.Flags().BoolVar(&force, "force", false, "go on where a connection is not accounted for, and name it")
	cmd.Flags().DurationVar(&drain, "drain-timeout", 0, "how long connections may take to get quiet, instead of the application's own `DURATION`")
	_ = cmd.MarkFlagRequired("to") // fails only for a flag that is not there
	return cmd
}

func (c *cli) printMigrate(r *nfconnfilterv1.AgentMigrateReply, dryRun bool) error {
	if c.output == "json" {
		return writeJSON(c.out, migrateJSON{App: r.App, From: r.From, To: r.To, State: r.State, SnapshotID: r.SnapshotId, DryRun: dryRun,
			Phases: phasesOf(r.Phases), Checks: notEmpty(r.Checks), Forced: r.Forced, Notes: r.Notes})
	}
	c.printNotes(r.Notes)
	for _, line := range r.Forced {
		fmt.Fprintf(c.err, "forced: %s\n", line)
	}
	if dryRun {
		for _, line := range r.Checks {
			fmt.Fprintf(c.out, "ok: %s\n", line)
		}
		_, err := fmt.Fprintf(c.out, "%s: can be moved from %s to %s\n", r.App, r.From, r.To)
		return err
	}
	var rows [][]string
	for _, p := range r.Phases {
		rows = append(rows, []string{p.Name, fmt.Sprintf("%.1f", p.Ms)})
	}
	if err := writeTable(c.out, "PHASE MS", rows); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.out, "%s: %s on %s\n", r.App, stateWord(r.State), r.To)
	return err
}

func (c *cli) releaseCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "release APP",
		Short: "Have this node forget what it handed to another one",
		Long: `release makes the filter of this node forget an application that another node
has taken over. Until then it swallows the segments that still come here. The
node that took it asks for that by itself; release is for when that node, or
its agent, does not come back. Look first that the application runs there: after
release nothing of it is left here.

Allowed in BLOCKDATA. It is refused while the VIP is on this node: its kernel
would answer the clients with RST then. --force does it all the same.`,
		Example: "  ckptctl release redis",
		Args:    oneApp,
	}
	cmd.RunE = c.command(func(ctx context.Context, args []string) error {
		app, err := c.appArg(args)
		if err != nil {
			return err
		}
		return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
			// In other states the filter takes it for a repetition, or for what the
			// taker says when it is done.
			if state, err := stateOf(ctx, f, app); err != nil {
				return err
			} else if state != control.StateBlockData {
				return control.Error(connect.CodeFailedPrecondition, app, state,
					fmt.Sprintf("release of %s refused: it is %s here and not BLOCKDATA; nothing that another node has taken over is left to be forgotten", app, stateWord(state)))
			}
			r, err := f.Release(ctx, connect.NewRequest(&nfconnfilterv1.ReleaseRequest{App: app, Force: force}))
			if err != nil {
				return err
			}
			return c.printFilter(app, r.Msg)
		})
	})
	cmd.Flags().BoolVar(&force, "force", false, "also while the VIP is on this node")
	return cmd
}

// stateOf asks the filter for an application's state.
func stateOf(ctx context.Context, f *control.FilterClient, app string) (string, error) {
	r, err := f.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{App: app}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		return control.StateUnknown, nil
	}
	if err != nil {
		return "", err
	}
	for _, a := range r.Msg.Apps {
		if a.Name == app {
			return a.State, nil
		}
	}
	return control.StateUnknown, nil
}
