package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// connStatsJSON is what the filter counted of a connection.
type connStatsJSON struct {
	SegmentsIn   uint64            `json:"segments_in"`
	SegmentsOut  uint64            `json:"segments_out"`
	Answered     uint32            `json:"answered"`
	SentToRemote uint32            `json:"sent_to_remote"`
	SentToLocal  uint32            `json:"sent_to_local"`
	KeptBytes    uint32            `json:"kept_bytes"`
	KeptSegments uint32            `json:"kept_segments"`
	IdleSeconds  float64           `json:"idle_seconds"` // -1: not known
	Reasons      map[string]uint64 `json:"reasons"`
}

func connStatsOf(n *nfconnfilterv1.ConnInfo) connStatsJSON {
	s := connStatsJSON{SegmentsIn: n.SegmentsIn, SegmentsOut: n.SegmentsOut, Answered: n.Answered,
		SentToRemote: n.SentToRemote, SentToLocal: n.SentToLocal, KeptBytes: n.KeptBytes, KeptSegments: n.KeptSegments,
		IdleSeconds: -1, Reasons: n.Reasons}
	if n.RemoteIdleMs >= 0 {
		s.IdleSeconds = float64(n.RemoteIdleMs) / 1000
	}
	if s.Reasons == nil {
		s.Reasons = map[string]uint64{}
	}
	return s
}

// idle is a short cell: one unit, cut off.
func (s connStatsJSON) idle() string {
	d := time.Duration(s.IdleSeconds * float64(time.Second))
	switch {
	case d < 0:
		return "-"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// connTable is one of the tables of conns.
type connTable struct {
	header string
	rows   func(n connJSON) [][]string
}

var (
	connsTable = connTable{"LOCAL REMOTE ROLE STATE BYTES-IN BYTES-OUT IDLE FLAGS", func(n connJSON) [][]string {
		return [][]string{{n.Local, n.Remote, n.Role, n.State, fmt.Sprint(n.BytesIn), fmt.Sprint(n.BytesOut), n.idle(), dash(n.flags())}}
	}}
	statsTable = connTable{"LOCAL REMOTE SEGS-IN SEGS-OUT ANSWERED TO-REMOTE TO-LOCAL KEPT", func(n connJSON) [][]string {
		kept := ""
		if n.KeptBytes > 0 || n.KeptSegments > 0 { // a FIN is a segment without octets
			kept = fmt.Sprintf("%d/%d", n.KeptBytes, n.KeptSegments)
		}
		return [][]string{{n.Local, n.Remote, fmt.Sprint(n.SegmentsIn), fmt.Sprint(n.SegmentsOut), fmt.Sprint(n.Answered),
			fmt.Sprint(n.SentToRemote), fmt.Sprint(n.SentToLocal), dash(kept)}}
	}}
	reasonsTable = connTable{"LOCAL REMOTE REASON COUNT", func(n connJSON) (rows [][]string) {
		if len(n.Reasons) == 0 {
			return [][]string{{n.Local, n.Remote, "-", "0"}}
		}
		words := slices.SortedFunc(maps.Keys(n.Reasons), func(a, b string) int {
			return cmp.Or(cmp.Compare(n.Reasons[b], n.Reasons[a]), cmp.Compare(a, b))
		})
		for _, w := range words {
			rows = append(rows, []string{n.Local, n.Remote, w, fmt.Sprint(n.Reasons[w])})
		}
		return rows
	}}
)
