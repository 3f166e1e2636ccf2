package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/checkpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// findSockets lists what is on the addresses; tests replace it.
var findSockets = checkpoint.Find

// ioctlSnapshotStart finds the application's sockets as the agent does and
// hands them to the filter.
func ioctlSnapshotStart(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	if fl.learnTimeout < 0 {
		return usagef("--learn-timeout %v: it cannot be negative", fl.learnTimeout)
	}
	req := &nfconnfilterv1.SnapshotStartRequest{App: app, LearnTimeoutMs: fl.learnTimeout.Milliseconds(), LeaveOut: fl.leaveOut}
	var err error
	if req.Sockets, req.ListenPorts, err = appSockets(ctx, f, app, fl, true); err != nil {
		return err
	}
	r, err := f.SnapshotStart(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	if c.output == "json" {
		return writeJSON(c.out, struct {
			App       string   `json:"app"`
			State     string   `json:"state"`
			Learned   uint32   `json:"learned"`
			Unlearned []string `json:"unlearned"`
		}{app, r.Msg.State, r.Msg.Learned, notEmpty(r.Msg.Unlearned)})
	}
	for _, u := range r.Msg.Unlearned {
		fmt.Fprintf(c.err, "not learned: %s\n", u)
	}
	_, err = fmt.Fprintf(c.out, "%s: %s, %d connections learned, %d not\n", app, stateWord(r.Msg.State), r.Msg.Learned, len(r.Msg.Unlearned))
	return err
}

// appSockets gives the sockets of an application that the filter knows, and
// the ports that it listens on, as the agent would choose them.
func appSockets(ctx context.Context, f *control.FilterClient, app string, fl *ioctlFlags, snapshot bool) ([]*nfconnfilterv1.Socket, []uint32, error) {
	st, err := f.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{}))
	if err != nil {
		return nil, nil, err
	}
	vips, err := appVIPs(st.Msg.Apps, app)
	if err != nil {
		return nil, nil, err
	}
	found, err := findSockets(fl.namespace, vips)
	if err != nil && (errors.Is(err, unix.EPERM) || os.Geteuid() != 0) {
		return nil, nil, fmt.Errorf("the application's sockets cannot be listed, be root: %w", err)
	} else if err != nil {
		return nil, nil, fmt.Errorf("the application's sockets cannot be listed: %w", err)
	}
	return checkpoint.Choose(app, st.Msg.Apps, found, snapshot, func() (*nfconnfilterv1.ConnInfoReply, error) {
		r, err := f.GetConnInfo(ctx, connect.NewRequest(&nfconnfilterv1.GetConnInfoRequest{App: app}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	})
}

// ioctlAdopt tells the filter of the application's sockets as the agent does.
func ioctlAdopt(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return err
	}
	req := &nfconnfilterv1.AdoptRequest{App: app, ListedAtNs: ts.Nano()}
	var err error
	if req.Sockets, req.ListenPorts, err = appSockets(ctx, f, app, fl, false); err != nil {
		return err
	}
	r, err := f.Adopt(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	if c.output == "json" {
		return writeJSON(c.out, struct {
			App       string `json:"app"`
			State     string `json:"state"`
			Adopted   uint32 `json:"adopted"`
			Forgotten uint32 `json:"forgotten"`
		}{app, r.Msg.State, r.Msg.Adopted, r.Msg.Forgotten})
	}
	_, err = fmt.Fprintf(c.out, "%s: %s, %d connections adopted, %d forgotten\n", app, stateWord(r.Msg.State), r.Msg.Adopted, r.Msg.Forgotten)
	return err
}

// appVIPs gives the application's addresses.
func appVIPs(apps []*nfconnfilterv1.AppStatus, app string) ([]netip.Addr, error) {
	i := slices.IndexFunc(apps, func(a *nfconnfilterv1.AppStatus) bool { return a.Name == app })
	if i < 0 {
		return nil, usagef("application %s is unknown on this node: ckptctl ioctl REGISTER makes it known", app)
	}
	var vips []netip.Addr
	for _, v := range apps[i].Vips {
		a, err := netip.ParseAddr(v)
		if err != nil {
			return nil, fmt.Errorf("the filter names %q as a VIP of %s, which is no address", v, app)
		}
		vips = append(vips, a)
	}
	if len(vips) == 0 {
		return nil, fmt.Errorf("the filter names no VIP of %s", app)
	}
	return vips, nil
}
