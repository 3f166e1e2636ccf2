package filtertest

import (
	"cmp"
	"maps"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// Store is a journal in memory: it keeps what an engine wants kept.
type Store struct {
	apps  map[string]filter.AppRecord
	conns map[filter.ConnID]filter.ConnRecord

	chunks map[filter.ConnID][]filter.Chunk
}

// Apply keeps records, in their order.
func (s *Store) Apply(records []filter.Record) {
	if s.apps == nil {
		s.apps, s.conns = map[string]filter.AppRecord{}, map[filter.ConnID]filter.ConnRecord{}
		s.chunks = map[filter.ConnID][]filter.Chunk{}
	}
	for _, r := range records {
		switch {
		case r.App != nil:
			s.apps[r.App.Name] = *r.App
		case r.Name != "":
			delete(s.apps, r.Name)
		case r.Chunk != nil:
			s.chunks[r.ID] = append(s.chunks[r.ID], *r.Chunk)
		case r.Unspool:
			delete(s.chunks, r.ID)
		case r.Conn != nil:
			s.conns[r.ID] = *r.Conn
		default:
			delete(s.conns, r.ID)
		}
	}
}

// Spools is of how many connections pieces of a spool are kept.
func (s *Store) Spools() int { return len(s.chunks) }

// Records gives everything kept, in a fixed order.
func (s *Store) Records() (apps []filter.AppRecord, conns []filter.ConnRecord) {
	for _, n := range slices.Sorted(maps.Keys(s.apps)) {
		apps = append(apps, s.apps[n])
	}
	ids := slices.SortedFunc(maps.Keys(s.conns), func(a, b filter.ConnID) int {
		return cmp.Or(a.Local.Compare(b.Local), a.Remote.Compare(b.Remote))
	})
	for _, id := range ids {
		c := s.conns[id]
		c.Chunks = s.chunks[id]
		conns = append(conns, c)
	}
	return apps, conns
}
