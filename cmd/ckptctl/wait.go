package main

import (
	"context"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) waitCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "wait APP --state STATE",
		Short: "Wait until an application is in a state",
		Long: `wait returns as soon as the application is in the state, at once when it is
already. States: ` + strings.Join(control.States(), ", ") + `,
and unknown for an application that the filter does not know. Without
--timeout it waits for ever; with it, exit code 4 says that the time passed.`,
		Example: "  ckptctl wait redis --state RESTORED --timeout 10s",
		Args:    oneApp,
	}
	cmd.RunE = c.command(func(ctx context.Context, args []string) error {
		app, err := c.appArg(args)
		if err != nil {
			return err
		}
		want, err := parseState(state)
		if err != nil {
			return err
		}
		return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
			r, err := f.Wait(ctx, connect.NewRequest(&nfconnfilterv1.WaitRequest{App: app, State: want}))
			if err != nil {
				return err
			}
			return c.printFilter(app, r.Msg)
		})
	})
	cmd.Flags().StringVar(&state, "state", "", "the `STATE` to wait for")
	_ = cmd.MarkFlagRequired("state") // fails only for a flag that is not there
	return cmd
}

// parseState reads a state as a person writes it.
func parseState(s string) (string, error) {
	up := strings.ToUpper(s)
	if up == "UNKNOWN" {
		return control.StateUnknown, nil
	}
	if up == "" || !control.IsState(up) {
		return "", usagef("--state %q: it is %s", s, words(append(control.States(), "unknown")))
	}
	return up, nil
}

// printFilter prints the filter's reply to a request that leads to a state.
func (c *cli) printFilter(app string, r *nfconnfilterv1.AppReply) error {
	a := appJSON{App: r.App, State: r.State, SnapshotID: r.SnapshotId, Notes: r.Notes}
	if a.App == "" {
		a.App = app
	}
	return c.printApp(a)
}
