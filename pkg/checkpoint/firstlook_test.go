package checkpoint

import (
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// Where connections come to a node that has nothing of them their remotes are
// asked before the first handshake, which begins without another look.
func TestForeignFirstLook(t *testing.T) {
	p := newPair(t, 3)
	b := p.w[1]
	b.backlog = 511
	r, err := p.migrate(t.Context(), 0)
	if err != nil || r.State != control.StateRestored {
		t.Fatal(r, err)
	}
	before, _, begun := strings.Cut(b.trace(), "RESTORECONN-syn")
	if !begun || strings.Count(before, "RESTORECONN-activate") != 1 || strings.Count(before, "INFO") != 1 {
		t.Errorf("steps: %s", b.trace())
	}
}

// Where an old socket was in the way another look tells whether one still is,
// before anything is begun: it would swallow the handshake.
func TestForeignOldSocket(t *testing.T) {
	p := newPair(t, 2)
	a, b := p.w[0], p.w[1]
	b.backlog = 511
	old := a.socks[0]
	old.State = sockdiag.TimeWait
	b.socks = []sockdiag.Socket{old}
	r, err := p.migrate(t.Context(), 0)
	if err != nil || r.State != control.StateRestored {
		t.Fatal(r, err)
	}
	before, _, begun := strings.Cut(b.trace(), "RESTORECONN-syn")
	if !begun || !strings.Contains(before, "destroy") || strings.Count(before, "INFO") != 2 {
		t.Errorf("steps: %s", b.trace())
	}
}

// What keeps the remotes from being asked is not lost, and all goes back.
func TestForeignAskFails(t *testing.T) {
	p := newPair(t, 2)
	p.w[1].fail["RESTORECONN-activate"] = errAborted
	if _, err := p.migrate(t.Context(), 0); err == nil || !strings.Contains(err.Error(), message(errAborted)) {
		t.Errorf("error %v", err)
	}
	p.at(t, 0, control.StateRestored)
}
