package checkpoint

import (
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// An operation stands still in the phase that the holdpoint names, can be seen
// and aborted there, and goes on when the file names another one.
func TestHoldpoint(t *testing.T) {
	for _, how := range []string{"another", "abort"} {
		t.Run(how, func(t *testing.T) {
			w, a := newWorld(t, 2)
			a.o.Holdpoint = filepath.Join(t.TempDir(), "holdpoint")
			writeFile(t, a.o.Holdpoint, "snapshot/undo\nsnapshot/freeze\n")
			ended := make(chan error, 1)
			go func() {
				_, err := snapshotOnce(t.Context(), a, false)
				ended <- err
			}()
			err := poll(t.Context(), time.Millisecond, time.Millisecond, func() (bool, error) {
				p, err := a.Progress(t.Context(), connect.NewRequest(&pb.AgentProgressRequest{App: "redis"}))
				return err == nil && p.Msg.Phase == "freeze", err
			})
			if err != nil {
				t.Fatal(err)
			}
			wantTrace(t, w, "list SNAPSHOTSTART sockets=2,ports=[6379] list")
			want, state := connect.Code(0), control.StateSnapshotDone
			if how == "another" {
				writeFile(t, a.o.Holdpoint, "restore/freeze")
			} else {
				want, state = connect.CodeAborted, control.StateRestored
				writeFile(t, a.o.Holdpoint, "snapshot/freeze") // not the undoing
				if _, err := a.Abort(t.Context(), connect.NewRequest(&pb.AgentAbortRequest{App: "redis"})); err != nil {
					t.Error(err)
				}
			}
			if err := <-ended; (err == nil) != (want == 0) || err != nil && connect.CodeOf(err) != want {
				t.Errorf("it ends with %v", err)
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.state != state {
				t.Errorf("state %s, want %s", w.state, state)
			}
		})
	}
}
