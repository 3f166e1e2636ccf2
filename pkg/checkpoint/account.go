package checkpoint

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// account compares what the sockets and the filter say. It names, sorted, each
// connection that is not accounted for: "LOCAL REMOTE: what is missing". The
// filter must have been read after the sockets: what moved in between shows in
// its counts.
func account(s *scope, socks []sockdiag.Socket, conns []*pb.ConnInfo, leftOut map[string]bool) []string {
	missing := map[string][]string{}
	known := make(map[string]string, len(conns)) // by socket: as the remote sees it
	for _, c := range conns {
		name := pairName(c.Local, c.Remote)
		known[socketName(c)] = name
		if c.Missing != "" && !leftOut[name] {
			missing[name] = append(missing[name], c.Missing)
		}
	}
	for _, k := range socks {
		name := pairName(k.Local.String(), k.Remote.String())
		seen, there := known[name]
		if there {
			name = seen
		}
		if leftOut[name] || s.sameHost(k) || !there && !s.wants(k) {
			continue
		}
		if m := queues(k); len(m) > 0 {
			missing[name] = append(m, missing[name]...)
		}
		if !there && (k.State == sockdiag.Established || k.State == sockdiag.CloseWait) {
			missing[name] = append(missing[name], "the filter does not know it")
		}
	}
	out := make([]string, 0, len(missing))
	for name, m := range missing {
		out = append(out, name+": "+strings.Join(m, ", "))
	}
	slices.Sort(out)
	return out
}

// keeping names the connections of which the filter keeps data.
func keeping(conns []*pb.ConnInfo) []string {
	var out []string
	for _, c := range conns {
		if c.KeptBytes > 0 {
			out = append(out, fmt.Sprintf("%s: %d bytes came", pairName(c.Local, c.Remote), c.KeptBytes))
		}
	}
	return out
}

// queues tells what a socket still holds. A FIN counts 1 in each queue.
func queues(k sockdiag.Socket) []string {
	var m []string
	switch k.State {
	case sockdiag.Established, sockdiag.CloseWait:
		if k.State == sockdiag.CloseWait && k.RecvQ == 1 {
			m = append(m, "the application has not read that the remote closed")
		} else if k.RecvQ > 0 {
			m = append(m, fmt.Sprintf("%d bytes not read by the application", k.RecvQ))
		}
		if k.SendQ > 0 {
			m = append(m, fmt.Sprintf("%d bytes not acknowledged by the remote", k.SendQ))
		}
	case sockdiag.FinWait1, sockdiag.Closing, sockdiag.LastAck:
		if k.SendQ > 1 {
			m = append(m, fmt.Sprintf("%d bytes not acknowledged by the remote", k.SendQ-1))
		}
	}
	return m
}

// look takes one account.
func (r *snapshotRun) look(ctx context.Context) ([]string, error) {
	socks, err := r.socks.List(sockdiag.Query{Local: r.app.VIPs})
	if err != nil {
		return nil, err
	}
	info, err := r.a.connInfo(ctx, r.app.Name)
	if err != nil {
		return nil, err
	}
	r.info = info
	if r.abortOnData() {
		if spoke := keeping(info.Conns); len(spoke) > 0 {
			return nil, control.Error(connect.CodeFailedPrecondition, r.app.Name, "",
				fmt.Sprintf("data came during the snapshot, and hold.on_data_during_snapshot is %q: %s; try again in quieter times", config.OnDataAbort, named(spoke)), spoke...)
		}
	}
	return account(r.scope, socks, info.Conns, r.leftOut), nil
}
