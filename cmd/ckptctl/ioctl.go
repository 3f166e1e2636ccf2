package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// ioctlFlags are the flags of all requests; each request names its own.
type ioctlFlags struct {
	force, leaveOut, resetMissing, abortOnData bool

	ports, outgoing, exclude string
	learnTimeout, quiet      time.Duration
	boundary, namespace, out string
}

// ioctlRequest is one request of the filter on the command line.
type ioctlRequest struct {
	word  string
	args  []string // after APP, for usage; the last in brackets: may be left out
	flags []string
	run   func(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, fl *ioctlFlags) error
}

var ioctlRequests = []ioctlRequest{
	{control.RequestRegister, []string{"VIP[,VIP]"}, []string{"ports", "outgoing-ports", "exclude-ports"}, ioctlRegister},
	{control.RequestUnregister, nil, []string{"force"}, ioctlUnregister},
	{control.RequestAdopt, nil, []string{"namespace"}, ioctlAdopt},
	{control.RequestSnapshotStart, nil, []string{"learn-timeout", "leave-out", "namespace"}, ioctlSnapshotStart},
	{control.RequestSnapshotFreeze, nil, []string{"boundary", "quiet", "abort-on-data"}, ioctlSnapshotFreeze},
	{control.RequestSeal, nil, nil, ioctlSeal},
	{control.RequestSnapshotDone, []string{"ID"}, []string{"force"}, ioctlSnapshotDone},
	{control.RequestSnapshotAbort, nil, nil, ioctlSnapshotAbort},
	{control.RequestRestoreStart, []string{"IP", "ID", "[OLDNODE]"}, nil, ioctlRestoreStart},
	{control.RequestRestoreConn, []string{"LOCAL", "REMOTE", "syn|activate|image"}, nil, ioctlRestoreConn},
	{control.RequestRestored, nil, []string{"reset-missing"}, ioctlRestored},
	{control.RequestRestoreAbort, nil, nil, ioctlRestoreAbort},
	{control.RequestHandover, []string{"NODE"}, []string{"out"}, ioctlHandover},
	{control.RequestHandback, []string{"NODE", "FILE"}, nil, ioctlHandback},
	{control.RequestRelease, nil, []string{"force"}, ioctlRelease},
	{control.RequestGetConnCount, nil, nil, ioctlGetConnCount},
	{control.RequestGetConnInfo, nil, nil, ioctlGetConnInfo},
}

func (q ioctlRequest) usage() string {
	s := q.word + " APP"
	for _, a := range q.args {
		s += " " + a
	}
	for _, f := range q.flags {
		s += " [--" + f + "]"
	}
	return s
}

// least is how many arguments there are at least.
func (q ioctlRequest) least() int {
	n := len(q.args)
	if n > 0 && strings.HasPrefix(q.args[n-1], "[") {
		n--
	}
	return n
}

func ioctlUsage() string {
	var b strings.Builder
	for _, q := range ioctlRequests {
		b.WriteString("\n  " + q.usage())
	}
	return b.String()
}

func (c *cli) ioctlCommand() *cobra.Command {
	fl := &ioctlFlags{}
	cmd := &cobra.Command{
		Use:   "ioctl REQUEST APP [ARGS]",
		Short: "Send the filter one request, as is",
		Long: `ioctl sends one single request, for tests and repairs by hand; start, snapshot
and restore send them in the right order and look after the process too.
A request that the application's state does not allow changes nothing and
exits with 1; one that took effect already succeeds again.

Requests:` + ioctlUsage() + `

HANDOVER writes the connections to --out, for HANDBACK; without it they are asked for
again by HANDOVER with the same node. Until HANDBACK or RELEASE this node drops
everything of the application. These three are what filters ask each other.

ADOPT and SNAPSHOTSTART find the application's sockets themselves and need root.`,
		Example: `  ckptctl ioctl GETCONNCOUNT redis
  ckptctl ioctl REGISTER redis 192.0.2.100 --ports 6379
  ckptctl ioctl RESTORECONN redis 192.0.2.100:6379 198.51.100.7:40000 syn`,
		Args: cobra.ArbitraryArgs, // checked with the request's own usage
	}
	cmd.RunE = c.command(func(ctx context.Context, args []string) error {
		q, err := parseIoctl(cmd.Flags(), args)
		if err != nil {
			return err
		}
		app, err := c.appArg(args[1:])
		if err != nil {
			return err
		}
		return c.withFilter(ctx, func(ctx context.Context, f *control.FilterClient) error {
			return q.run(c, ctx, f, app, args[2:], fl)
		})
	})
	f := cmd.Flags()
	f.BoolVar(&fl.force, "force", false, "UNREGISTER, SNAPSHOTDONE: although connections are translated, held or not accounted for; RELEASE: although the VIP is on this node or the other node may not have taken it back")
	f.StringVar(&fl.out, "out", "", "HANDOVER: `FILE` for what is handed over")
	f.StringVar(&fl.ports, "ports", "", "REGISTER: `PORTS` of accepted connections, as 80,443; none: all")
	f.StringVar(&fl.outgoing, "outgoing-ports", "", "REGISTER: remote `PORTS` of opened connections; none: all")
	f.StringVar(&fl.exclude, "exclude-ports", "", "REGISTER: `PORTS` that are left alone")
	f.DurationVar(&fl.learnTimeout, "learn-timeout", 0, "SNAPSHOTSTART: how long learning may take, as a `DURATION`; 0: the filter's own")
	f.BoolVar(&fl.leaveOut, "leave-out", false, "SNAPSHOTSTART: leave out and reset what cannot be learned")
	f.StringVar(&fl.namespace, "namespace", "", "ADOPT, SNAPSHOTSTART: network namespace (`NAME` or path) that the application runs in")
	f.StringVar(&fl.boundary, "boundary", control.BoundaryTurn, "SNAPSHOTFREEZE: where a connection may freeze: `turn|line|resp|now`")
	f.BoolVar(&fl.abortOnData, "abort-on-data", false, "SNAPSHOTFREEZE: refuse SEAL once data has come for a frozen connection")
	f.DurationVar(&fl.quiet, "quiet", 50*time.Millisecond, "SNAPSHOTFREEZE: silence that counts as finished, as a `DURATION`")
	f.BoolVar(&fl.resetMissing, "reset-missing", false, "RESTORED: reset connections that did not come back")
	return cmd
}

// parseIoctl finds the request and checks arguments and flags against it.
func parseIoctl(flags *pflag.FlagSet, args []string) (*ioctlRequest, error) {
	if len(args) == 0 {
		return nil, usagef("which request? It is one of:%s", ioctlUsage())
	}
	word := strings.ToUpper(args[0])
	i := slices.IndexFunc(ioctlRequests, func(q ioctlRequest) bool { return q.word == word })
	if i < 0 {
		return nil, usagef("unknown request %q; it is one of:%s", args[0], ioctlUsage())
	}
	q := &ioctlRequests[i]
	if n := len(args) - 2; n > len(q.args) || n < q.least() {
		return nil, usagef("usage: ckptctl ioctl %s", q.usage())
	}
	var err error
	flags.Visit(func(f *pflag.Flag) {
		own := slices.ContainsFunc(ioctlRequests, func(q ioctlRequest) bool { return slices.Contains(q.flags, f.Name) })
		if own && !slices.Contains(q.flags, f.Name) && err == nil {
			err = usagef("--%s is not for %s; usage: ckptctl ioctl %s", f.Name, q.word, q.usage())
		}
	})
	return q, err
}

// reply prints the outcome of a request that answers with an AppReply.
func (c *cli) reply(app string, r *connect.Response[nfconnfilterv1.AppReply], err error) error {
	if err != nil {
		return err
	}
	return c.printFilter(app, r.Msg)
}

func ioctlRegister(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, fl *ioctlFlags) error {
	req := &nfconnfilterv1.RegisterRequest{App: app}
	for v := range strings.SplitSeq(args[0], ",") {
		a, err := netip.ParseAddr(v)
		if err != nil || a.Zone() != "" {
			return usagef("VIP %q is not an IP address", v)
		}
		req.Vips = append(req.Vips, a.String())
	}
	for _, l := range []struct {
		flag, text string
		to         *[]uint32
	}{{"ports", fl.ports, &req.IncludePorts}, {"outgoing-ports", fl.outgoing, &req.OutgoingPorts}, {"exclude-ports", fl.exclude, &req.ExcludePorts}} {
		ports, err := parsePorts(l.text)
		if err != nil {
			return usagef("--%s: %w", l.flag, err)
		}
		*l.to = ports
	}
	r, err := f.Register(ctx, connect.NewRequest(req))
	return c.reply(app, r, err)
}

// parsePorts reads ports separated by commas.
func parsePorts(s string) ([]uint32, error) {
	if s == "" {
		return nil, nil
	}
	var ports []uint32
	for w := range strings.SplitSeq(s, ",") {
		n, err := strconv.ParseUint(strings.TrimSpace(w), 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%q is not a port: it is 1 to 65535", w)
		}
		ports = append(ports, uint32(n))
	}
	return ports, nil
}

func ioctlUnregister(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	r, err := f.Unregister(ctx, connect.NewRequest(&nfconnfilterv1.UnregisterRequest{App: app, Force: fl.force}))
	return c.reply(app, r, err)
}

func ioctlSnapshotFreeze(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	if !slices.Contains([]string{control.BoundaryTurn, control.BoundaryLine, control.BoundaryResp, control.BoundaryNow}, fl.boundary) {
		return usagef("--boundary %s: it is turn, line, resp or now", fl.boundary)
	}
	if fl.quiet < 0 {
		return usagef("--quiet %v: it cannot be negative", fl.quiet)
	}
	r, err := f.SnapshotFreeze(ctx, connect.NewRequest(&nfconnfilterv1.SnapshotFreezeRequest{App: app, Boundary: fl.boundary, QuietMs: fl.quiet.Milliseconds(), AbortOnData: fl.abortOnData}))
	return c.reply(app, r, err)
}

func ioctlSeal(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, _ *ioctlFlags) error {
	r, err := f.Seal(ctx, connect.NewRequest(&nfconnfilterv1.SealRequest{App: app}))
	return c.reply(app, r, err)
}

func ioctlSnapshotDone(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, fl *ioctlFlags) error {
	if args[0] == "" {
		return usagef("the snapshot's ID is empty")
	}
	r, err := f.SnapshotDone(ctx, connect.NewRequest(&nfconnfilterv1.SnapshotDoneRequest{App: app, SnapshotId: args[0], Force: fl.force}))
	return c.reply(app, r, err)
}

func ioctlSnapshotAbort(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, _ *ioctlFlags) error {
	r, err := f.SnapshotAbort(ctx, connect.NewRequest(&nfconnfilterv1.AppRequest{App: app}))
	return c.reply(app, r, err)
}

func ioctlRestoreStart(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, _ *ioctlFlags) error {
	ip, err := netip.ParseAddr(args[0])
	if err != nil || ip.Zone() != "" {
		return usagef("IP %q is not an IP address", args[0])
	}
	if args[1] == "" {
		return usagef("the snapshot's ID is empty")
	}
	req := &nfconnfilterv1.RestoreStartRequest{App: app, Ip: ip.String(), SnapshotId: args[1]}
	if len(args) > 2 {
		req.OldNode = args[2]
	}
	r, err := f.RestoreStart(ctx, connect.NewRequest(req))
	return c.reply(app, r, err)
}

func ioctlRestoreConn(c *cli, ctx context.Context, f *control.FilterClient, app string, args []string, _ *ioctlFlags) error {
	id := &nfconnfilterv1.ConnID{}
	for _, e := range []struct {
		name, text string
		to         *string
	}{{"LOCAL", args[0], &id.Local}, {"REMOTE", args[1], &id.Remote}} {
		ap, err := netip.ParseAddrPort(e.text)
		if err != nil || ap.Addr().Zone() != "" {
			return usagef("%s %q is not IP:port or [IP]:port", e.name, e.text)
		}
		*e.to = ap.String()
	}
	if k := args[2]; k != control.KindSyn && k != control.KindActivate && k != control.KindImage {
		return usagef("%q: it is syn (accepted by the application), activate (opened by it) or image (restored with its process)", k)
	}
	r, err := f.RestoreConn(ctx, connect.NewRequest(&nfconnfilterv1.RestoreConnRequest{App: app, Conns: []*nfconnfilterv1.ConnID{id}, Kind: args[2]}))
	return c.reply(app, r, err)
}

func ioctlRestored(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, fl *ioctlFlags) error {
	r, err := f.Restored(ctx, connect.NewRequest(&nfconnfilterv1.RestoredRequest{App: app, ResetMissing: fl.resetMissing}))
	return c.reply(app, r, err)
}

func ioctlRestoreAbort(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, _ *ioctlFlags) error {
	r, err := f.RestoreAbort(ctx, connect.NewRequest(&nfconnfilterv1.AppRequest{App: app}))
	return c.reply(app, r, err)
}

func ioctlGetConnCount(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, _ *ioctlFlags) error {
	r, err := f.GetConnCount(ctx, connect.NewRequest(&nfconnfilterv1.AppRequest{App: app}))
	if err != nil {
		return err
	}
	if c.output == "json" {
		return writeJSON(c.out, struct {
			App   string `json:"app"`
			State string `json:"state"`
			Count uint32 `json:"count"`
		}{app, r.Msg.State, r.Msg.Count})
	}
	_, err = fmt.Fprintln(c.out, r.Msg.Count)
	return err
}

func ioctlGetConnInfo(c *cli, ctx context.Context, f *control.FilterClient, app string, _ []string, _ *ioctlFlags) error {
	r, err := f.GetConnInfo(ctx, connect.NewRequest(&nfconnfilterv1.GetConnInfoRequest{App: app, Reasons: c.output == "json"}))
	if err != nil {
		return err
	}
	conns := connDetailsOf(r.Msg.Conns)
	if c.output == "json" {
		return writeJSON(c.out, conns)
	}
	rows := make([][]string, 0, len(conns))
	for _, n := range conns {
		rows = append(rows, []string{n.Local, n.Remote, n.Role, n.State, fmt.Sprint(n.BytesIn), fmt.Sprint(n.BytesOut),
			fmt.Sprint(n.SndNxt), fmt.Sprint(n.RcvNxt), fmt.Sprint(n.UnackedOut), fmt.Sprint(n.KeptBytes), dash(n.flags()), dash(n.Missing)})
	}
	return writeTable(c.out, "LOCAL REMOTE ROLE STATE BYTES-IN BYTES-OUT SND.NXT RCV.NXT UNACKED KEPT FLAGS MISSING", rows)
}
