// Command nfconnfilter is the connection filter of one node.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/internal/node"
	"github.com/nfconnfilter/nfconnfilter/internal/rules"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// Exit codes, as runbooks know them.
const (
	exitFailed = 1
	exitUsage  = 2
)

// files are the two places that every subcommand reads its configuration from.
type files struct{ shared, node string }

func (f *files) flags(c *cobra.Command) {
	c.Flags().StringVar(&f.shared, "shared", "", "directory with cluster.toml and apps/*.toml, shared by all nodes")
	c.Flags().StringVar(&f.node, "node", config.DefaultNodeFile, "configuration of this node")
	_ = c.MarkFlagRequired("shared")
}

func (f *files) load() (*config.Config, error) {
	cfg, err := config.Load(f.shared, f.node)
	if err != nil {
		return nil, usageError{err}
	}
	return cfg, nil
}

// usageError ends the program with exit code 2.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

func main() {
	root := &cobra.Command{
		Use:   "nfconnfilter",
		Short: "Keeps the TCP connections of applications that are away",
		Long: `nfconnfilter is the connection filter of one node. It follows the TCP
connections of applications behind virtual IPs; while an application is away
it speaks for it, and when a client speaks it has the application brought back.
ckptctl drives it.`,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(), checkCommand(), rulesCommand())
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "nfconnfilter: "+err.Error())
		var u usageError
		var faults config.Faults
		if errors.As(err, &u) || errors.As(err, &faults) || !started {
			os.Exit(exitUsage)
		}
		os.Exit(exitFailed)
	}
}

// started is set when a subcommand was reached: errors before that are of
// usage.
var started bool

func checkCommand() *cobra.Command {
	var f files
	c := &cobra.Command{
		Use:     "check --shared DIR --node FILE",
		Short:   "Read the configuration; print it merged, or every fault as FILE:LINE:COL",
		Example: `  nfconnfilter check --shared /srv/nfconnfilter --node /etc/nfconnfilter/node.toml`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			started = true
			cfg, err := f.load()
			if err != nil {
				return err
			}
			if faults := cfg.AllFaults(); len(faults) > 0 {
				return usageError{faults}
			}
			return config.Print(c.OutOrStdout(), cfg)
		},
	}
	f.flags(c)
	return c
}

func rulesCommand() *cobra.Command {
	var f files
	var purge bool
	c := &cobra.Command{
		Use:   "rules --shared DIR --node FILE [--purge]",
		Short: "Print the packet rules, or remove every rule and set of ours",
		Long: `Prints the ipset and iptables commands that make the rules which 'run' installs.
With --purge every rule, chain and set of ours is removed: applications that are
away lose their connections then, because the kernel answers for them.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			started = true
			cfg, err := f.load()
			if err != nil {
				return err
			}
			if purge {
				return rules.Purge(node.RulesConfig(cfg))
			}
			return rules.Print(c.OutOrStdout(), node.RulesConfig(cfg))
		},
	}
	f.flags(c)
	c.Flags().BoolVar(&purge, "purge", false, "remove every rule and set of ours")
	return c
}
