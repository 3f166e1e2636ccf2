package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/checkpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// runAgent is checkpoint.Run; tests replace it.
var runAgent = checkpoint.Run

func (c *cli) agentCommand() *cobra.Command {
	var shared string
	cmd := &cobra.Command{
		Use:   "agent --shared DIR",
		Short: "Run the snapshot and restore daemon of this node",
		Long: `agent serves the other commands on the agent socket and takes restore
requests from the filter. It starts and stops applications, which outlive it,
and needs to be root for that. It runs in the foreground and logs to standard
error. SIGHUP makes it read its configuration again; SIGTERM and SIGINT end
it, after a snapshot or restore under way was undone or finished.`,
		Example: "  ckptctl agent --shared /srv/nfconnfilter --node /etc/nfconnfilter/node.toml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("agent takes no arguments, got %q: see ckptctl agent --help", args[0])
			}
			return nil
		},
	}
	cmd.RunE = c.command(func(ctx context.Context, _ []string) error {
		for _, name := range []string{"timeout", "socket", "agent-socket", "output"} {
			if cmd.Flags().Changed(name) {
				return usagef("--%s is not for the agent: its sockets are in the node file", name)
			}
		}
		if shared == "" {
			return usagef("--shared is empty: it names the directory with cluster.toml and apps/")
		}
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		reload, stop := reloads(hup)
		defer stop()
		err := runAgent(ctx, checkpoint.Options{
			SharedDir: shared,
			NodeFile:  c.nodeFile,
			Logger:    slog.New(slog.NewTextHandler(c.err, nil)),
			Reload:    reload,
			Failpoint: os.Getenv("NFCONNFILTER_AGENT_FAILPOINT"),
			Holdpoint: os.Getenv("NFCONNFILTER_AGENT_HOLDPOINT"),
			Ends:      failpoint.New(os.Getenv(failpoint.Env)),
		})
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil // asked to end, and ended
		}
		if faults := (config.Faults)(nil); errors.As(err, &faults) {
			return usageError{err}
		}
		return err
	})
	cmd.Flags().StringVar(&shared, "shared", "", "the `DIR` that the nodes share: cluster.toml, apps/, snapshots/")
	_ = cmd.MarkFlagRequired("shared") // fails only for a flag that is not there
	return cmd
}

// reloads turns signals into reload requests; several that arrive while one is
// being worked on become one.
func reloads(signals <-chan os.Signal) (<-chan struct{}, func()) {
	out, quit, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			case <-signals:
			}
			select {
			case <-quit:
				return
			case out <- struct{}{}:
			}
		}
	}()
	return out, func() { close(quit); <-done }
}
