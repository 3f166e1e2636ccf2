package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// writeJSON writes v on one line.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// writeTable writes rows under a header, in aligned columns.
func writeTable(w io.Writer, header string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.ReplaceAll(header, " ", "\t"))
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}

// dash stands for an empty cell.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// stateWord names a state in text; the empty word is an unknown application.
func stateWord(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// notEmpty turns nil into an empty list, which JSON shows as [].
func notEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

type appJSON struct {
	App        string   `json:"app"`
	State      string   `json:"state"`
	SnapshotID string   `json:"snapshot_id,omitempty"`
	Notes      []string `json:"notes,omitempty"`

	Phases []phaseJSON `json:"phases,omitempty"`
}

// phaseJSON is how long a step of an operation took, and how much of that the
// filter.
type phaseJSON struct {
	Name     string  `json:"name"`
	MS       float64 `json:"ms"`
	FilterMS float64 `json:"filter_ms"`
}

func phasesOf(list []*nfconnfilterv1.Phase) []phaseJSON {
	out := make([]phaseJSON, 0, len(list))
	for _, p := range list {
		out = append(out, phaseJSON{p.Name, round3(p.Ms), round3(p.FilterMs)})
	}
	return out
}

func round3(ms float64) float64 { return math.Round(ms*1000) / 1000 }

// printApp prints the outcome of a request that leads to a state; notes are
// for the person at the terminal.
func (c *cli) printApp(a appJSON) error {
	if c.output == "json" {
		return writeJSON(c.out, a)
	}
	c.printNotes(a.Notes)
	line := a.App + ": " + stateWord(a.State)
	if a.SnapshotID != "" {
		line += " " + a.SnapshotID
	}
	_, err := fmt.Fprintln(c.out, line)
	return err
}

func (c *cli) printNotes(notes []string) {
	for _, n := range notes {
		fmt.Fprintln(c.err, n)
	}
}

type statusJSON struct {
	Node             string          `json:"node"`
	ConfigGeneration uint64          `json:"config_generation"`
	Apps             []appStatusJSON `json:"apps"`
	Limits           []limitJSON     `json:"limits,omitempty"`
}

type limitJSON struct {
	Name   string `json:"name"`
	Used   uint64 `json:"used"`
	Max    uint64 `json:"max"`
	PerApp bool   `json:"per_app"`
}

type appStatusJSON struct {
	Name             string            `json:"name"`
	VIP              vipJSON           `json:"vip"`
	State            string            `json:"state"`
	SnapshotID       string            `json:"snapshot_id"`
	RestoreRequested bool              `json:"restore_requested"`
	Connections      map[string]uint32 `json:"connections"`
	BytesIn          uint64            `json:"bytes_in"`
	BytesOut         uint64            `json:"bytes_out"`
	KeptBytes        uint32            `json:"kept_bytes"`
	PendingSYNs      uint32            `json:"pending_syns"`
	Reasons          map[string]uint64 `json:"reasons,omitempty"`
	OldNode          string            `json:"old_node,omitempty"`
	TakenBy          string            `json:"taken_by,omitempty"`
}

// vipJSON is written as an application's file has it: one address as text, two
// as a list.
type vipJSON []string

// MarshalJSON implements json.Marshaler.
func (v vipJSON) MarshalJSON() ([]byte, error) {
	switch len(v) {
	case 0:
		return []byte(`""`), nil
	case 1:
		return json.Marshal(v[0])
	}
	return json.Marshal([]string(v))
}

func statusOf(r *nfconnfilterv1.StatusReply) statusJSON {
	s := statusJSON{Node: r.Node, ConfigGeneration: r.ConfigGeneration, Apps: []appStatusJSON{}}
	for _, l := range r.Limits {
		s.Limits = append(s.Limits, limitJSON{l.Name, l.Used, l.Max, l.PerApp})
	}
	for _, a := range r.Apps {
		conns := map[string]uint32{}
		for state, n := range a.Connections {
			if n > 0 {
				conns[state] = n
			}
		}
		s.Apps = append(s.Apps, appStatusJSON{
			Name: a.Name, VIP: a.Vips, State: a.State, SnapshotID: a.SnapshotId, RestoreRequested: a.RestoreRequested,
			Connections: conns, BytesIn: a.BytesIn, BytesOut: a.BytesOut,
			KeptBytes: a.KeptBytes, PendingSYNs: a.PendingSyns, Reasons: a.Reasons, OldNode: a.OldNode, TakenBy: a.TakenBy,
		})
	}
	return s
}

func (s statusJSON) rows() [][]string {
	var rows [][]string
	for _, a := range s.Apps {
		var conns []string
		for _, state := range slices.Sorted(maps.Keys(a.Connections)) {
			conns = append(conns, fmt.Sprintf("%s=%d", state, a.Connections[state]))
		}
		state := stateWord(a.State)
		switch {
		case a.TakenBy != "":
			state += " (taken by " + a.TakenBy + ")"
		case a.OldNode != "":
			state += " (from " + a.OldNode + ")"
		}
		rows = append(rows, []string{a.Name, dash(strings.Join(a.VIP, ",")), state, dash(a.SnapshotID), yesNo(a.RestoreRequested),
			dash(strings.Join(conns, ",")), fmt.Sprint(a.BytesIn), fmt.Sprint(a.BytesOut), fmt.Sprint(a.KeptBytes), fmt.Sprint(a.PendingSYNs)})
	}
	return rows
}

type connJSON struct {
	Local        string `json:"local"`
	Remote       string `json:"remote"`
	Role         string `json:"role"`
	State        string `json:"state"`
	BytesIn      uint64 `json:"bytes_in"`
	BytesOut     uint64 `json:"bytes_out"`
	Translated   bool   `json:"translated"`
	Offloaded    bool   `json:"offloaded"`
	WindowClosed bool   `json:"window_closed"`
	connStatsJSON
}

func connOf(n *nfconnfilterv1.ConnInfo) connJSON {
	return connJSON{Local: n.Local, Remote: n.Remote, Role: n.Role, State: n.State, BytesIn: n.BytesIn, BytesOut: n.BytesOut,
		Translated: n.Translated, Offloaded: n.Offloaded, WindowClosed: n.WindowClosed, connStatsJSON: connStatsOf(n)}
}

func connsOf(list []*nfconnfilterv1.ConnInfo) []connJSON {
	conns := make([]connJSON, 0, len(list))
	for _, n := range list {
		conns = append(conns, connOf(n))
	}
	return conns
}

// flags lists what is special about a connection in one cell.
func (n connJSON) flags() string {
	var f []string
	for _, x := range []struct {
		set  bool
		name string
	}{{n.Translated, "translated"}, {n.Offloaded, "offloaded"}, {n.WindowClosed, "window-closed"}} {
		if x.set {
			f = append(f, x.name)
		}
	}
	return strings.Join(f, ",")
}

// connDetailJSON is everything that the filter tells of a connection.
type connDetailJSON struct {
	connJSON
	Frozen       bool   `json:"frozen"`
	Sealed       bool   `json:"sealed"`
	Learned      bool   `json:"learned"`
	UnackedOut   uint32 `json:"unacked_out"`
	DeliveredIn  uint64 `json:"delivered_in"`
	DiscardedOut uint64 `json:"discarded_out"`
	LocalIdleMS  int64  `json:"local_idle_ms"`
	Missing      string `json:"missing"`
	SndNxt       uint32 `json:"snd_nxt"`
	RcvNxt       uint32 `json:"rcv_nxt"`
	Restorable   bool   `json:"restorable"`
	RemoteClosed bool   `json:"remote_closed"`
}

func connDetailsOf(list []*nfconnfilterv1.ConnInfo) []connDetailJSON {
	conns := make([]connDetailJSON, 0, len(list))
	for _, n := range list {
		conns = append(conns, connDetailJSON{
			connJSON: connOf(n), Frozen: n.Frozen, Sealed: n.Sealed, Learned: n.Learned, UnackedOut: n.UnackedOut,
			DeliveredIn: n.DeliveredIn, DiscardedOut: n.DiscardedOut, LocalIdleMS: n.LocalIdleMs,
			Missing: n.Missing, SndNxt: n.SndNxt, RcvNxt: n.RcvNxt, Restorable: n.Restorable, RemoteClosed: n.RemoteClosed,
		})
	}
	return conns
}

type snapshotJSON struct {
	App        string   `json:"app"`
	SnapshotID string   `json:"snapshot_id"`
	Forced     []string `json:"forced"`
	Notes      []string `json:"notes,omitempty"`

	Phases []phaseJSON `json:"phases,omitempty"`
}

type snapshotInfoJSON struct {
	App    string `json:"app"`
	ID     string `json:"id"`
	Node   string `json:"node"`
	Time   string `json:"time"`
	Engine string `json:"engine"`
}
