package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// NodeStatus serves the request of the same name. Without the filter there is
// no status: nobody can tell then what is held here.
func (a *agent) NodeStatus(ctx context.Context, _ *connect.Request[pb.AgentNodeStatusRequest]) (*connect.Response[pb.AgentNodeStatusReply], error) {
	st, err := a.filter.Status(ctx, connect.NewRequest(&pb.StatusRequest{}))
	if err != nil {
		return nil, filterError(err, "", "STATUS")
	}
	cfg := a.config()
	reply := &pb.AgentNodeStatusReply{Node: cfg.Node.Name, Load: a.load(cfg.Node.LoadFile)}
	if i := cfg.Node.Interface; i != "" {
		reply.LinkAddresses = a.addrs.links(i)
	}
	known := make(map[string]*pb.AppStatus, len(st.Msg.Apps))
	names := slices.AppendSeq(slices.Collect(maps.Keys(cfg.Apps)), maps.Keys(cfg.AppFaults))
	for _, s := range st.Msg.Apps {
		known[s.Name] = s
		names = append(names, s.Name)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		s := known[name]
		if s == nil {
			s = &pb.AppStatus{}
		}
		n := &pb.NodeApp{
			Name: name, State: s.State, SnapshotId: s.SnapshotId, RestoreRequested: s.RestoreRequested,
			OldNode: s.OldNode, TakenBy: s.TakenBy, IdleMs: a.idle.idleMs(s),
		}
		for _, c := range s.Connections {
			n.Connections += c
		}
		n.Fault = a.runFault(cfg, name)
		if s.State == control.StateSnapshotDone && n.Fault == "" {
			if err := a.callersImages(name, s.SnapshotId); err != nil {
				n.Fault = err.Error()
			}
		}
		n.MayRun = n.Fault == ""
		a.mu.Lock()
		if o := a.ops[name]; o != nil {
			n.Operation = o.name
		}
		a.mu.Unlock()
		reply.Apps = append(reply.Apps, n)
	}
	return connect.NewResponse(reply), nil
}

// runFault says why an application may not run on this node; "" when it may.
func (a *agent) runFault(cfg *config.Config, name string) string {
	app := cfg.Apps[name]
	if f := cfg.AppFaults[name]; len(f) > 0 {
		return "its file is invalid: " + f[0].Error()
	}
	switch {
	case app == nil:
		return fmt.Sprintf("there is no %s", filepath.Join(cfg.SharedDir, "apps", name+".toml"))
	case len(app.Nodes) > 0 && !slices.Contains(app.Nodes, cfg.Node.Name):
		return "its nodes are " + strings.Join(app.Nodes, ", ")
	}
	for _, err := range []error{supported(opRestore, app), a.trusted(app)} {
		if ce := (*connect.Error)(nil); errors.As(err, &ce) {
			return ce.Message()
		} else if err != nil {
			return err.Error()
		}
	}
	return ""
}

// load gives the node's load, 1 for one that is fully used: what the load file
// says, or the average number of processes that ran or waited in the last
// minute (proc_loadavg(5)) for each CPU. It is -1 where it cannot be told.
func (a *agent) load(file string) float64 {
	path, cpus := file, 1
	if file == "" {
		path, cpus = "/proc/loadavg", runtime.NumCPU()
	}
	b, err := os.ReadFile(path)
	var load float64
	if err == nil {
		load, err = parseLoad(string(b))
	}
	said := ""
	if err != nil {
		said = fmt.Sprintf("load of this node: %s: %v", path, err)
	}
	a.mu.Lock()
	fresh := said != a.loadSaid
	a.loadSaid = said
	a.mu.Unlock()
	if err == nil {
		return load / float64(cpus)
	}
	if fresh {
		a.log.Warn("the load is not known: applications move neither here nor away", "err", said)
	}
	return -1
}

// parseLoad reads the first number of a text.
func parseLoad(text string) (float64, error) {
	f := strings.Fields(text)
	if len(f) == 0 {
		return 0, fmt.Errorf("is empty; write one number, such as 0.75")
	}
	load, err := strconv.ParseFloat(f[0], 64)
	if err != nil || math.IsNaN(load) || math.IsInf(load, 0) || load < 0 {
		return 0, fmt.Errorf("%.40q is not a load; write one number, such as 0.75", f[0])
	}
	return load, nil
}
