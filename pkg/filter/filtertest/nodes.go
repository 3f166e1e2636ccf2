package filtertest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// nodeOf is a node that the script does not speak of at the moment.
type nodeOf struct {
	engine *filter.Engine
	store  Store
	flows  map[netip.AddrPort]bool
	away   bool
	skew   filter.Time
}

// goTo lets the script speak of another node, with a clock that is skew ahead of
// node a's.
func (w *World) goTo(name string, skew time.Duration) {
	if w.others == nil {
		w.others = map[string]*nodeOf{}
	}
	if name == w.node {
		return
	}
	n := w.others[name]
	if n == nil {
		n = &nodeOf{engine: filter.New(filter.Config{Seed: 3}), flows: map[netip.AddrPort]bool{}, skew: int64(skew)}
	}
	delete(w.others, name)
	w.others[w.node] = &nodeOf{w.Engine, w.store, w.flows, w.away, w.skew}
	w.node, w.Engine, w.store, w.flows, w.away, w.skew = name, n.engine, n.store, n.flows, n.away, n.skew
}

// advanceOthers lets time pass on the other nodes. What they do is named.
func (w *World) advanceOthers() {
	if len(w.others) == 0 {
		return
	}
	here, silent := w.node, w.silent
	defer func() { w.silent = silent }()
	w.silent = true // the local stack is the one of the node at hand
	for _, name := range slices.Sorted(maps.Keys(w.others)) {
		w.goTo(name, 0)
		for {
			at := w.Engine.NextDeadline()
			if at == 0 || at-w.skew > w.now {
				break
			}
			w.Engine.Step(max(at, w.now+w.skew), filter.Event{}, &w.fx)
			if len(w.fx.Sends)+len(w.fx.Replies)+len(w.fx.Restores)+len(w.fx.Notes)+len(w.fx.Sets) > 0 {
				w.printf("    on node %s\n", name)
			}
			w.effects()
		}
		w.goTo(here, 0)
	}
}

// statuses prints what two nodes have to do with an application.
func (w *World) statuses(l *filter.StatusList) {
	for _, a := range l.Apps {
		var b strings.Builder
		fmt.Fprintf(&b, "%s %q snapshot %q", a.Name, a.State.String(), a.SnapshotID)
		if a.OldNode != "" {
			b.WriteString(" from " + a.OldNode)
		}
		if a.TakenBy != "" {
			b.WriteString(" taken by " + a.TakenBy)
		}
		if a.Yielding {
			b.WriteString(" if it answers")
		}
		if a.Kept > 0 {
			fmt.Fprintf(&b, " %d octets kept", a.Kept)
		}
		w.printf("    %s\n", b.String())
	}
}

// between plays a request between nodes; false: it is another one.
func (w *World) between(f []string) bool {
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	app := w.app
	switch f[0] {
	case "HANDOVER":
		w.request(&filter.Handover{App: app, To: arg(1), ID: arg(2)})
	case "HANDBACK":
		w.request(&filter.Handback{App: app, From: arg(1), Given: w.parcel})
	case "RELEASE":
		r := &filter.Release{App: app, Force: arg(1) == "--force"}
		if !r.Force {
			r.From = arg(1)
		}
		w.request(r)
	case "YIELD":
		w.request(&filter.Yield{App: app})
	case "UNYIELD":
		w.request(&filter.Unyield{App: app})
	case "STATUS":
		w.request(&filter.Status{})
	case "RESTORESTART":
		r := &filter.RestoreStart{App: app, ID: arg(1)}
		if arg(2) == "from" {
			if r.OldNode = arg(3); arg(4) != "alone" {
				r.Given = w.parcel
			}
		}
		w.request(r)
	default:
		return false
	}
	return true
}

// Node lets what follows speak of the node of that name.
func (w *World) Node(name string) { w.goTo(name, 0) }

// Parcel is what was handed over last.
func (w *World) Parcel() *filter.Structures { return w.parcel }

// SetParcel puts another one in its place, as a way between two nodes does.
func (w *World) SetParcel(st *filter.Structures) { w.parcel = st }

// Attach makes e the engine of node name, which somebody else steps too.
func (w *World) Attach(name string, e *filter.Engine) {
	if w.others == nil {
		w.others = map[string]*nodeOf{}
	}
	w.others[name] = &nodeOf{engine: e, flows: map[netip.AddrPort]bool{}}
}

// Look takes note of what others have done with the engine at hand, at time now.
func (w *World) Look(now filter.Time) {
	w.now = max(w.now, now-w.skew)
	w.Engine.Step(w.now+w.skew, filter.Event{Request: &filter.Request{Body: &filter.Status{App: w.app}}}, &w.fx)
	for _, r := range w.fx.Replies {
		if l, ok := r.Body.(*filter.StatusList); ok {
			w.away = len(l.Apps) > 0 && l.Apps[0].State.Captured()
		}
	}
	w.effects()
}
