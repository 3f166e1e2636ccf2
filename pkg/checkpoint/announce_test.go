package checkpoint

import (
	"slices"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
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

// Connections that the filter follows are told in both looks, also when the
// configuration has been narrowed since: they would be forgotten.
func TestSnapshotTellsKnown(t *testing.T) {
	w, a := newWorld(t, 3)
	w.state = control.StateRestored
	a.cfg.Apps["redis"].IncludePorts = []uint16{7000}
	// One that the filter does not know is left alone, as the configuration says.
	w.socks = append(w.socks, sock("198.51.100.7:30000", sockdiag.Established))
	w.hook["SNAPSHOTSTART"] = func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.socks, w.conns = w.socks[1:], w.conns[1:]
	}
	if _, err := snapshotOnce(t.Context(), a, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"SNAPSHOTSTART sockets=3,", "ADOPT sockets=2 SNAPSHOTFREEZE"} {
		if !strings.Contains(w.trace(), want) {
			t.Errorf("no %q in %s", want, w.trace())
		}
	}
}

// What such a connection has in its queues counts.
func TestSnapshotAccountsForKnown(t *testing.T) {
	w, a := newWorld(t, 1)
	a.cfg.Apps["redis"].IncludePorts = []uint16{7000}
	w.socks[0].RecvQ = 5
	_, err := snapshotOnce(t.Context(), a, false)
	if err == nil || !strings.Contains(err.Error(), "5 bytes not read by the application") {
		t.Errorf("error %v", err)
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
