package checkpoint

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// Data that comes during the snapshot gives it up where the policy says so, and
// only without force.
func TestSnapshotDataDuring(t *testing.T) {
	for _, c := range []struct {
		policy string
		force  bool
		ended  bool
	}{{config.OnDataHold, false, true}, {config.OnDataAbort, true, true}, {config.OnDataAbort, false, false}} {
		w, a := newWorld(t, 2)
		a.config().Apps["redis"].Hold.OnDataDuringSnapshot = c.policy
		w.hook["before"] = func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.conns[1].KeptBytes = 6
		}
		_, err := snapshotOnce(t.Context(), a, c.force)
		if c.ended {
			if err != nil {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), pairName(w.conns[1].Local, w.conns[1].Remote)+": 6 bytes came") || len(control.Info(err).GetConnections()) != 1 {
			t.Errorf("%+v: %v", c, err)
		}
		wantRunning(t, w, control.StateRestored)
		wantNoSnapshot(t, a)
	}
}

// The filter may see data later than the last account: what it then refuses to
// seal is taken back, and no agent that comes later goes forward.
func TestSealRefused(t *testing.T) {
	w, a := newWorld(t, 2)
	w.fail["SEAL"] = control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotFreeze, "SEAL refused: data came", "L R: 6 octets came")
	if _, err := snapshotOnce(t.Context(), a, false); err == nil || !strings.Contains(err.Error(), "data came") {
		t.Errorf("error %v", err)
	}
	wantRunning(t, w, control.StateRestored)
	if in, err := a.intents.load("redis"); in != nil || err != nil {
		t.Errorf("the record of a snapshot that was taken back: %+v, %v", in, err)
	}
}
