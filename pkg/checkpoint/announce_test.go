package checkpoint

import (
	"slices"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// A socket that closes between the list and the answer to SNAPSHOTSTART is told
// of with a second look; nothing is said where nothing changed.
func TestSecondLook(t *testing.T) {
	for _, changed := range []bool{false, true} {
		w, a := newWorld(t, 2)
		w.hook["SNAPSHOTSTART"] = func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			if changed {
				w.socks, w.conns = w.socks[:1], w.conns[:1]
			}
		}
		if _, err := snapshotOnce(t.Context(), a, false); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(w.trace(), "list ADOPT sockets=1 SNAPSHOTFREEZE"); got != changed || strings.Contains(w.trace(), control.RequestAdopt) != changed {
			t.Errorf("changed %v: steps %s", changed, w.trace())
		}
	}
}

// The filter is told of the boundary when it begins to capture, so that it can
// follow what remotes say from then on.
func TestBoundaryIsAnnounced(t *testing.T) {
	for _, word := range []string{config.BoundaryTurn, config.BoundaryLine, config.BoundaryRESP} {
		w, a := newWorld(t, 2)
		a.config().Apps["redis"].Checkpoint.Boundary = word
		if _, err := snapshotOnce(t.Context(), a, false); err != nil {
			t.Fatal(err)
		}
		if want := []string{word + " 1", word + " 1"}; !slices.Equal(w.bounds, want) {
			t.Errorf("%s: the filter was told %q, want %q", word, w.bounds, want)
		}
	}
}
