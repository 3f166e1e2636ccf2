package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// What the filters of two nodes ask each other, by hand.

// ioctlHandover writes what is handed over to a file of its own: it is the
// connections' only copy that is not of the filter. The file is there before
// anything is asked.
func ioctlHandover(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, fl *ioctlFlags) (err error) {
	if args[0] == "" {
		return usagef("the node's name is empty")
	}
	var out *os.File
	if fl.out != "" {
		if out, err = os.OpenFile(fl.out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return usagef("--out %s: there is such a file already", fl.out)
			}
			return err
		}
		defer func() {
			if cerr := out.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				_ = os.Remove(fl.out)
			}
		}()
	}
	r, err := f.Handover(ctx, connect.NewRequest(&nfconnfilterv1.HandoverRequest{App: app, ToNode: args[0]}))
	if err != nil {
		return err
	}
	m := r.Msg
	if out != nil {
		_, err := out.Write(m.Structures)
		if err == nil {
			err = out.Sync()
		}
		if err != nil {
			return fmt.Errorf("handed over, and the file cannot be written; ask again: %w", err)
		}
	}
	if c.output == "json" {
		return writeJSON(c.out, struct {
			App         string `json:"app"`
			State       string `json:"state"`
			SnapshotID  string `json:"snapshot_id"`
			Connections uint32 `json:"connections"`
			Bytes       int    `json:"bytes"`
		}{app, m.State, m.SnapshotId, m.Connections, len(m.Structures)})
	}
	_, err = fmt.Fprintf(c.out, "%s: %s %s, %d connections handed over to node %s, %d bytes\n", app, stateWord(m.State), m.SnapshotId, m.Connections, args[0], len(m.Structures))
	return err
}

func ioctlHandback(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, _ *ioctlFlags) error {
	b, err := os.ReadFile(args[1])
	if err != nil {
		return usagef("%w", err)
	}
	r, err := f.Handback(ctx, connect.NewRequest(&nfconnfilterv1.HandbackRequest{App: app, FromNode: args[0], Structures: b}))
	return c.reply(app, r, err)
}

func ioctlRelease(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	r, err := f.Release(ctx, connect.NewRequest(&nfconnfilterv1.ReleaseRequest{App: app, Force: fl.force}))
	return c.reply(app, r, err)
}
