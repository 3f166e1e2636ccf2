package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/internal/cluster"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// runScheduler is cluster.Run; tests replace it.
var runScheduler = cluster.Run

func (c *cli) schedulerCommand() *cobra.Command {
	var shared, listen string
	cmd := &cobra.Command{
		Use:   "scheduler --shared DIR",
		Short: "Run the application scheduler of the cluster",
		Long: `scheduler watches the agents of all nodes and asks them to act: one of the
cluster runs it, on a node or on a machine of its own.

  restore    A filter asks for it when a client of a held application speaks
             ("Restore ddd.ddd.ddd.ddd", CR LF; the answer is OK or ERR with
             the reason). The application comes back where it is held, if it
             may run there, else on the least loaded node that may run it;
             where that fails, on the next one. A node that holds it and does
             not answer is waited for; nothing is taken over from it.
  hibernate  [hibernate] after of an application: no payload for so long.
  balance    [balance] high, low and cooldown of cluster.toml: one application
             at a time moves off a node whose load is high.

It keeps nothing on disk: what it knows comes from the nodes and from the
configuration, and another one can be started in its place at any time. While
none runs, applications that are held stay held; restore them by hand with
ckptctl restore.

The node file names this machine's certificate ([tls]); agents accept it as
that of a node or under the name "scheduler". It needs no privileges, runs in
the foreground and logs to standard error.
SIGHUP makes it read its configuration again; SIGTERM and SIGINT end it.`,
		Example: `  ckptctl scheduler --shared /srv/nfconnfilter --node /etc/nfconnfilter/node.toml
  ckptctl scheduler --shared /srv/nfconnfilter --listen 192.0.2.10:7400`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("scheduler takes no arguments, got %q: see ckptctl scheduler --help", args[0])
			}
			return nil
		},
	}
	cmd.RunE = c.command(func(ctx context.Context, _ []string) error {
		for _, name := range []string{"timeout", "socket", "agent-socket", "output"} {
			if cmd.Flags().Changed(name) {
				return usagef("--%s is not for the scheduler: it speaks with the agents that cluster.toml names", name)
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
		err := runScheduler(ctx, cluster.Options{
			SharedDir: shared,
			NodeFile:  c.nodeFile,
			Listen:    listen,
			Logger:    slog.New(slog.NewTextHandler(c.err, nil)),
			Reload:    reload,
			Ready:     func() { _, _ = daemon.SdNotify(false, daemon.SdNotifyReady) },
		})
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil // asked to end, and ended
		}
		faults, mis := (config.Faults)(nil), cluster.Misconfigured{}
		if errors.As(err, &faults) || errors.As(err, &mis) {
			return usageError{err}
		}
		return err
	})
	cmd.Flags().StringVar(&shared, "shared", "", "the `DIR` that the nodes share: cluster.toml, apps/")
	cmd.Flags().StringVar(&listen, "listen", "", "`ADDR:PORT` for restore requests, instead of [scheduler] in cluster.toml")
	_ = cmd.MarkFlagRequired("shared") // fails only for a flag that is not there
	return cmd
}
