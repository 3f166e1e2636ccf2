package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// opMigrate is the agents' word for a migration under way.
const opMigrate = "migrate"

// balance decides which applications move off loaded nodes: one at a time for
// each node, and none back to a node that it was moved off, unless its own node
// was well loaded with it meanwhile.
//
// So a row of moves ends, whatever the loads are: while no node gets below
// High with an application on it, that application comes to each node once.
func (s *Scheduler) balance(now time.Time) []Action {
	if s.cfg.High <= 0 {
		return nil
	}
	moving := s.moving()
	free := func(name string) bool {
		n := s.nodes[name]
		return n.seen && !n.down && n.status.Load >= 0 && !moving[name] && !now.Before(n.rested) && !n.status.At.Before(n.rested)
	}
	nodes := slices.Clone(s.cfg.Nodes)
	slices.SortStableFunc(nodes, func(a, b string) int { return byLoad(s.nodes[a], s.nodes[b]) })
	var out []Action
	for _, from := range slices.Backward(nodes) {
		if !free(from) || s.nodes[from].status.Load < s.cfg.High {
			continue
		}
		for _, to := range nodes {
			if to == from || !free(to) || s.nodes[to].status.Load > s.cfg.Low {
				continue
			}
			name := s.movable(from, to)
			if name == "" {
				continue
			}
			moving[from], moving[to] = true, true
			out = append(out, Action{Kind: Migrate, App: name, Node: from, To: to,
				Reason: fmt.Sprintf("load %.2f of node %s is not below %.2f, that of node %s is %.2f", s.nodes[from].status.Load, from, s.cfg.High, to, s.nodes[to].status.Load)})
			break
		}
	}
	return out
}

// moving gives the nodes that are part of a migration, whoever began it.
func (s *Scheduler) moving() map[string]bool {
	out := map[string]bool{}
	for _, a := range s.apps {
		if a.running != nil && a.running.Kind == Migrate {
			out[a.running.Node], out[a.running.To] = true, true
		}
	}
	for name, n := range s.nodes {
		if slices.ContainsFunc(n.status.Apps, func(p AppStatus) bool { return p.Operation == opMigrate }) {
			out[name] = true
		}
	}
	return out
}

// movable chooses the application that moves between two nodes: one that did
// not fail to before, else that with the fewest connections; "" when none can.
func (s *Scheduler) movable(from, to string) string {
	var best place
	found := false
	for _, name := range s.names() {
		a := s.apps[name]
		if a.running != nil || !a.asked.IsZero() || a.left[to] || !s.allowed(name, to) {
			continue
		}
		places := s.places(name, a)
		p := places[slices.Index(s.cfg.Nodes, from)]
		q := places[slices.Index(s.cfg.Nodes, to)]
		if !p.fresh || !p.running() || p.busy() || !q.fresh || !q.MayRun || q.State != appstate.Unknown || q.Operation != "" {
			continue
		}
		if !found || cmp.Or(cmp.Compare(a.moveFails, s.apps[best.Name].moveFails), cmp.Compare(p.Connections, best.Connections)) < 0 {
			best, found = p, true
		}
	}
	return best.Name
}
