package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// findSockets lists the TCP sockets on the addresses and what listens there;
// tests replace it.
var findSockets = func(namespace string, vips []netip.Addr) (socks, listeners []sockdiag.Socket, err error) {
	var d *sockdiag.Conn
	if namespace == "" {
		d, err = sockdiag.Open()
	} else {
		d, err = sockdiag.OpenIn(namespace)
	}
	if err != nil {
		return nil, nil, err
	}
	defer d.Close()
	if socks, err = d.List(sockdiag.Query{Local: vips, Info: true}); err != nil {
		return nil, nil, err
	}
	listeners, err = d.Listeners(vips, nil)
	return socks, listeners, err
}

// ioctlSnapshotStart finds the application's sockets as the agent does and
// hands them to the filter.
func ioctlSnapshotStart(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	if fl.learnTimeout < 0 {
		return usagef("--learn-timeout %v: it cannot be negative", fl.learnTimeout)
	}
	socks, listeners, err := appSockets(ctx, f, app, fl)
	if err != nil {
		return err
	}
	req := &nfconnfilterv1.SnapshotStartRequest{App: app, LearnTimeoutMs: fl.learnTimeout.Milliseconds(), LeaveOut: fl.leaveOut}
	req.Sockets, req.ListenPorts = describeSockets(socks, listeners, false)
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

// appSockets lists the sockets on the addresses of an application that the
// filter knows.
func appSockets(ctx context.Context, f *control.FilterClient, app string, fl *ioctlFlags) (socks, listeners []sockdiag.Socket, err error) {
	vips, err := appVIPs(ctx, f, app)
	if err != nil {
		return nil, nil, err
	}
	socks, listeners, err = findSockets(fl.namespace, vips)
	if err != nil && (errors.Is(err, unix.EPERM) || os.Geteuid() != 0) {
		err = fmt.Errorf("the application's sockets cannot be listed, be root: %w", err)
	} else if err != nil {
		err = fmt.Errorf("the application's sockets cannot be listed: %w", err)
	}
	return socks, listeners, err
}

// ioctlAdopt tells the filter of the application's sockets as the agent does.
func ioctlAdopt(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return err
	}
	socks, listeners, err := appSockets(ctx, f, app, fl)
	if err != nil {
		return err
	}
	req := &nfconnfilterv1.AdoptRequest{App: app, ListedAtNs: ts.Nano()}
	req.Sockets, req.ListenPorts = describeSockets(socks, listeners, true)
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

// appVIPs asks the filter for the application's addresses.
func appVIPs(ctx context.Context, f *control.FilterClient, app string) ([]netip.Addr, error) {
	st, err := f.Status(ctx, connect.NewRequest(&nfconnfilterv1.StatusRequest{App: app}))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(st.Msg.Apps, func(a *nfconnfilterv1.AppStatus) bool { return a.Name == app })
	if i < 0 {
		return nil, usagef("application %s is unknown on this node: ckptctl ioctl REGISTER makes it known", app)
	}
	var vips []netip.Addr
	for _, v := range st.Msg.Apps[i].Vips {
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

// describeSockets puts sockets into the filter's terms. What has no state that
// could be kept (handshakes not finished, and TIME_WAIT unless it is wanted)
// is left out.
func describeSockets(socks, listeners []sockdiag.Socket, timeWait bool) ([]*nfconnfilterv1.Socket, []uint32) {
	var ports []uint32
	for _, l := range listeners {
		ports = append(ports, uint32(l.Local.Port()))
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	var out []*nfconnfilterv1.Socket
	for _, s := range socks {
		switch s.State {
		case sockdiag.TimeWait:
			if !timeWait {
				continue
			}
		case sockdiag.SynSent, sockdiag.SynReceived, sockdiag.NewSynReceived, sockdiag.Listen, sockdiag.Closed:
			continue
		}
		_, passive := slices.BinarySearch(ports, uint32(s.Local.Port()))
		m := &nfconnfilterv1.Socket{Local: s.Local.String(), Remote: s.Remote.String(), State: s.State.String(), Passive: passive, RecvQueue: s.RecvQ, SendQueue: s.SendQ}
		if i := s.Info; i != nil {
			m.HasInfo = true
			m.OptTimestamps, m.OptSack, m.OptWscale = i.Options.Timestamps, i.Options.SACK, i.Options.WScale
			m.SndWscale, m.RcvWscale = uint32(i.SndWScale), uint32(i.RcvWScale)
			m.SndMss, m.AdvMss = i.SndMSS, i.AdvMSS
			m.BytesAcked, m.BytesReceived, m.BytesSent = i.BytesAcked, i.BytesReceived, i.BytesSent
			m.LastDataSentMs, m.LastDataRecvMs = ms(i.LastDataSent), ms(i.LastDataRecv)
			m.RcvSpace = i.RcvSpace
		}
		out = append(out, m)
	}
	return out, ports
}

func ms(d time.Duration) uint32 { return uint32(min(max(d.Milliseconds(), 0), 1<<32-1)) }
