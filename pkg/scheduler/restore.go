package scheduler

import (
	"slices"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// restore decides whether an application is restored now, and where: where it
// is held, if it may run there, else on the least loaded node that may run it;
// each node once, then again after a while.
func (s *Scheduler) restore(now time.Time, name string, a *app) *Action {
	places := s.places(name, a)
	holder := s.holder(now, name, a, places)
	if holder == nil {
		return nil
	}
	if held := holder.name + "\x00" + holder.SnapshotID; a.held != held {
		a.held = held
		clear(a.tried)
		a.restore.Worked()
	}
	if a.asked.IsZero() && !holder.RestoreRequested || !a.restore.Due(now) {
		return nil
	}
	var to *place
	candidates, faults := s.candidates(name, *holder, places)
	for i := range candidates {
		if !a.tried[candidates[i].name] {
			to = &candidates[i]
			break
		}
	}
	if to == nil {
		if slices.ContainsFunc(places, func(p place) bool { return !p.fresh && !p.node.down && s.allowed(name, p.name) }) {
			return nil // not heard yet
		}
		a.restore.Failed(now, restoreFirst, restoreMost)
		clear(a.tried)
		if !holder.RestoreRequested {
			a.asked = time.Time{}
		}
		if len(candidates) == 0 {
			s.say(name, a, true, "held on node %s and no node can run it now: %s", holder.name, strings.Join(faults, "; "))
		} else {
			s.say(name, a, true, "the restore failed on every node that may run it; its connections stay held on node %s, it is tried again", holder.name)
		}
		return nil
	}
	act := &Action{Kind: Restore, App: name, Node: to.name, SnapshotID: holder.SnapshotID, Reason: "its node holds it and may run it"}
	if to.name != holder.name {
		act.Holder = holder.name
		act.Reason = "the least loaded node that may run it"
	}
	return act
}

// holder finds the one node that holds an application and that can be asked
// to give it away or to restore it. Nil: there is none, or it has to be waited
// for; a request that nothing can come of is dropped.
func (s *Scheduler) holder(now time.Time, name string, a *app, places []place) *place {
	var held, running []*place
	silent, unheard := "", false
	for i := range places {
		p := &places[i]
		switch {
		case p.fresh && p.busy():
			return nil // whoever does it ends it
		case p.fresh && p.State == appstate.SnapshotDone:
			held = append(held, p)
		case p.fresh && p.running():
			running = append(running, p)
		case !p.fresh && p.node.down && p.State == appstate.SnapshotDone:
			silent = p.name
		case p.fresh && p.State == appstate.BlockData && s.nodes[p.TakenBy] != nil && s.nodes[p.TakenBy].down:
			silent = p.TakenBy
		}
		unheard = unheard || !p.node.down && (!p.fresh || p.node.status.At.Before(a.asked))
	}
	switch {
	case len(held) > 1:
		s.say(name, a, true, "held on nodes %s and %s at once; restore it by hand on the right one: ckptctl restore %s", held[0].name, held[1].name, name)
	case len(held) == 1 && len(running) > 0:
		s.say(name, a, true, "held on node %s and running on node %s at once; stop it on one of them: ckptctl stop %s", held[0].name, running[0].name, name)
	case len(held) == 1:
		return held[0]
	case len(running) > 0:
		if !unheard {
			a.asked = time.Time{} // it runs
		}
	case silent != "":
		if !a.asked.IsZero() || s.wakes(silent, name) {
			s.say(name, a, true, "held on node %s, which does not answer, and not taken over; it is restored when the node is back", silent)
		}
		s.expire(now, a)
	case !unheard && s.allHeard():
		if !a.asked.IsZero() {
			s.say(name, a, true, "a restore was requested and no node holds it; start it: ckptctl start %s", name)
		}
		a.asked = time.Time{}
	default:
		s.expire(now, a)
	}
	return nil
}

// expire forgets a request that nobody has repeated.
func (s *Scheduler) expire(now time.Time, a *app) {
	if !a.asked.IsZero() && now.Sub(a.asked) > askLife {
		a.asked = time.Time{}
	}
}

// wakes tells whether remotes wait for an application, by the last word of a
// node.
func (s *Scheduler) wakes(node, app string) bool {
	return slices.ContainsFunc(s.nodes[node].status.Apps, func(p AppStatus) bool { return p.Name == app && p.RestoreRequested })
}

// allHeard tells that every node answers.
func (s *Scheduler) allHeard() bool {
	for _, n := range s.nodes {
		if !n.seen || n.down {
			return false
		}
	}
	return true
}

// candidates gives the nodes that may run an application that is held, the
// best first, and why the others may not.
func (s *Scheduler) candidates(name string, holder place, places []place) (list []place, faults []string) {
	for _, p := range places {
		switch {
		case p.node.down:
			faults = append(faults, p.name+": does not answer")
		case !p.fresh:
		case !s.allowed(name, p.name):
			faults = append(faults, p.name+": is not in its nodes")
		case !p.MayRun:
			why := p.Fault
			if why == "" {
				why = "may not run it"
			}
			faults = append(faults, p.name+": "+why)
		case p.name == holder.name, p.State == appstate.Unknown, p.State == appstate.BlockData:
			list = append(list, p)
		}
	}
	slices.SortStableFunc(list, func(a, b place) int {
		switch holder.name {
		case a.name:
			return -1
		case b.name:
			return 1
		}
		return byLoad(a.node, b.node)
	})
	return list, faults
}
