package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status [APP]",
		Short: "Show applications, their states and counts",
		Long: `status asks the filter for one application or for all: state, current
snapshot, whether a client has asked for a restore, connections by state, and
payload bytes in and out. Allowed in any state.

A limit of the filter that is used to nine tenths or more is named on standard
error; in JSON limits has all of them.

In JSON, vip is text as in the application's file, or a list when there are
two addresses; connection states without a connection are left out; reasons
counts packets by what became of them, in the words of docs/operating.md.`,
		Example: "  ckptctl status\n  ckptctl status redis -o json",
		Args:    maybeApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			if len(args) == 1 {
				if _, err := c.appArg(args); err != nil {
					return err
				}
			}
			return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
				r, err := f.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{App: c.app}))
				if err != nil {
					return err
				}
				if c.app != "" && len(r.Msg.Apps) == 0 {
					return usagef("application %s is unknown on this node: ckptctl start %s makes it known", c.app, c.app)
				}
				s := statusOf(r.Msg)
				if c.output == "json" {
					return writeJSON(c.out, s)
				}
				c.printAwaited(ctx, r.Msg.Apps)
				for _, l := range s.Limits {
					if l.Used*10 >= l.Max*9 {
						fmt.Fprintf(c.err, "limit %s: %d of %d are used; see [limits] in the node's file\n", l.Name, l.Used, l.Max)
					}
				}
				return writeTable(c.out, "APP VIP STATE SNAPSHOT RESTORE-REQUESTED CONNECTIONS BYTES-IN BYTES-OUT KEPT-BYTES PENDING-SYNS", s.rows())
			})
		}),
	}
}

// printAwaited tells for which applications remotes wait that only a person can bring
// back. An agent that is not there has nothing to say.
func (c *cli) printAwaited(ctx context.Context, apps []*nfconnfilterv1.AppStatus) {
	var client *control.AgentClient
	for _, a := range apps {
		if !a.RestoreRequested {
			continue
		}
		if client == nil {
			path, err := c.agentSocketPath()
			if err != nil {
				return
			}
			client = control.DialAgent(path)
			defer client.Close()
		}
		r, err := client.Progress(ctx, connect.NewRequest(&nfconnfilterv1.AgentProgressRequest{App: a.Name}))
		if err == nil && r.Msg.Operation == "" && r.Msg.Detail != "" {
			fmt.Fprintf(c.err, "%s is waited for: %s\n", a.Name, r.Msg.Detail)
		}
	}
}
