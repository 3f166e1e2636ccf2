package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/node"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

func runCommand() *cobra.Command {
	var f files
	c := &cobra.Command{
		Use:   "run --shared DIR --node FILE",
		Short: "Run the filter in the foreground",
		Long: `Installs the packet rules, opens the packet queue and the control socket, and
filters until SIGTERM. SIGHUP reads the configuration again; a faulty one
leaves the old in force. The rules stay when the filter ends: applications that
run are passed by, those that are away stay silent.

Needs CAP_NET_ADMIN and CAP_NET_RAW.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			started = true
			return run(&f)
		},
	}
	f.flags(c)
	return c
}

func run(f *files) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg, err := f.load()
	if err != nil {
		return err
	}
	for app, faults := range cfg.AppFaults {
		log.Error("application disabled by its configuration", "app", app, "faults", faults)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	n, err := node.Open(cfg, log, failpoint.New(os.Getenv(failpoint.Env)))
	if err != nil {
		return err
	}
	defer n.Close()
	l, err := control.Listen(cfg.Node.ControlSocket, cfg.Node.ControlGroup)
	if err != nil {
		return err
	}
	if w := control.Warning(l); w != "" {
		log.Warn(w)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Those who ask something are done with first: packets are filtered until then.
	filtering, idle := context.WithCancel(context.WithoutCancel(ctx))
	defer idle()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := control.Serve(ctx, l, control.FilterHandler(n.Service()), control.AllowGroup(cfg.Node.ControlGroup)); err != nil {
			cancel(fmt.Errorf("control socket: %w", err))
		}
	}()
	if err := serveMetrics(ctx, cfg, n, log); err != nil {
		return err
	}
	go reloads(ctx, f, n, log)
	peers := make(chan struct{})
	go func() {
		defer close(peers)
		n.ServePeers(ctx)
	}()
	go func() {
		<-ctx.Done()
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
		<-served
		<-peers
		idle()
	}()
	gap := n.Ready().String()
	log.Info("filtering", "node", cfg.Node.Name, "queue", cfg.Node.Queue.First, "socket", cfg.Node.ControlSocket, "gap", gap)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS="+gap)
	err = n.Run(filtering)
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(nil)
	<-served
	<-peers
	log.Info("stopped; rules and sets stay as they are")
	return err
}

// reloads reads the configuration again at each SIGHUP.
func reloads(ctx context.Context, f *files, n *node.Node, log *slog.Logger) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
		}
		if cfg := reload(f, n.Config(), log); cfg != nil {
			n.SetConfig(cfg)
			log.Info("configuration read again", "generation", cfg.Generation)
		}
	}
}

// reload gives the configuration that is to replace old, nil when old stays in
// force.
func reload(f *files, old *config.Config, log *slog.Logger) *config.Config {
	r, err := config.Reload(old, f.load)
	if err != nil {
		log.Error("the configuration has faults; the old one stays in force", "error", err)
		return nil
	}
	for _, fault := range r.Faults {
		log.Error("an application's file has faults", "fault", fault.Error())
	}
	for app := range r.AppFaults {
		log.Error("application disabled by its configuration", "app", app)
	}
	for _, app := range r.Kept {
		log.Warn("what was read of the application before stays in force", "app", app)
	}
	return r.Config
}
