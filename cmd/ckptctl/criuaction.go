package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// actionName is the name under which CRIU, which passes no arguments, can run ckptctl.
const actionName = "ckptctl-criu-action"

// arguments gives those of a command line, program first.
func arguments(argv []string) []string {
	if len(argv) == 0 {
		return nil
	}
	if filepath.Base(argv[0]) == actionName {
		return append([]string{"criu-action"}, argv[1:]...)
	}
	return argv[1:]
}

// criuActions are those that concern the connections; the others pass.
var criuActions = []string{"pre-dump", "network-lock", "post-dump", "network-unlock", "pre-restore", "post-restore", "pre-resume"}

func (c *cli) criuActionCommand() *cobra.Command {
	var app string
	cmd := &cobra.Command{
		Use:   "criu-action",
		Short: "Action script for CRIU: hold the connections of what it dumps",
		Long:  criuActionHelp,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("criu-action takes no arguments, got %q: see ckptctl criu-action --help", args[0])
			}
			return nil
		},
		Example: criuActionExamples,
	}
	cmd.RunE = c.command(func(ctx context.Context, _ []string) error {
		req, err := criuRequest(os.Getenv, os.Getppid())
		if err != nil || !slices.Contains(criuActions, req.Action) {
			return err
		}
		req.App = app
		if !cmd.Flags().Changed("app") {
			req.App = os.Getenv("NFCONNFILTER_APP")
		}
		c.app = req.App
		return c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
			r, err := a.CriuAction(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return c.printAction(req, r.Msg)
		})
	})
	cmd.Flags().StringVar(&app, "app", "", "the application's `NAME`, instead of $NFCONNFILTER_APP and of looking whose process it is")
	return cmd
}

type criuActionJSON struct {
	App    string `json:"app"`
	Action string `json:"action"`
	State  string `json:"state"`
	Note   string `json:"note,omitempty"`
}

func (c *cli) printAction(req *nfconnfilterv1.AgentCriuActionRequest, r *nfconnfilterv1.AgentCriuActionReply) error {
	if c.output == "json" {
		return writeJSON(c.out, criuActionJSON{App: r.App, Action: req.Action, State: r.State, Note: r.Note})
	}
	if r.App == "" {
		return nil
	}
	_, err := fmt.Fprintf(c.out, "%s: %s: %s\n", r.App, req.Action, r.Note)
	return err
}

// ownImages is how CRIU names the directory (criu/action-scripts.c): by its own number.
var ownImages = regexp.MustCompile(`^/proc/([1-9][0-9]*)/fd/[0-9]+$`)

// criuRequest reads what CRIU tells in the environment; parent is who has run the script.
func criuRequest(env func(string) string, parent int) (*nfconnfilterv1.AgentCriuActionRequest, error) {
	r := &nfconnfilterv1.AgentCriuActionRequest{Action: env("CRTOOLS_SCRIPT_ACTION"), ImageDir: env("CRTOOLS_IMAGE_DIR"), CriuPid: int32(parent)}
	if r.Action == "" || r.ImageDir == "" {
		return nil, usagef("criu-action is for CRIU to run, which sets CRTOOLS_SCRIPT_ACTION and CRTOOLS_IMAGE_DIR: criu dump --action-script PATH; see ckptctl criu-action --help")
	}
	if m := ownImages.FindStringSubmatch(r.ImageDir); m != nil { // a shell may stand between
		n, err := strconv.ParseInt(m[1], 10, 32)
		if err != nil {
			return nil, usagef("CRTOOLS_IMAGE_DIR=%s: %w", r.ImageDir, err)
		}
		r.CriuPid = int32(n)
	}
	if p := env("CRTOOLS_INIT_PID"); p != "" {
		n, err := strconv.ParseInt(p, 10, 32)
		if err != nil || n <= 0 {
			return nil, usagef("CRTOOLS_INIT_PID=%s is no process number", p)
		}
		r.Pid = int32(n)
	}
	return r, nil
}
