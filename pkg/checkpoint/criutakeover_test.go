package checkpoint

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

const (
	leftID   = "20261122T153000Z-1a2b3c"
	leftTemp = "redis/.new-node-a@" + leftID + "-0badcafe"
)

// halfDumped is what an agent has left that was killed during a dump.
func halfDumped(t *testing.T, sealed bool) (w *world, a *agent, in intent) {
	t.Helper()
	w, a, _ = imagedWorld(t, 2)
	w.state = control.StateSnapshotFreeze
	in = intent{App: "redis", Op: opMigrate, Ran: true, ToNode: "node-b", Sealed: sealed, SnapshotID: leftID, Temp: leftTemp, CRIU: 99, CRIUStart: 1, BootID: bootID()}
	for _, name := range []string{"files.img", "pages-1.img"} {
		writeFile(t, filepath.Join(a.store.dir, leftTemp, imagesDir, name), "octets of "+name)
	}
	return w, a, in
}

// ended is the end of the application's process, of which its sockets say nothing.
func (w *world) ended() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running, w.listening, w.socks = false, false, nil
}

// TestImageTakeOver: an agent that goes on behind the seal says that it repeats SEAL, and
// what it cannot bring to its end at once stays known as it was, with its images.
func TestImageTakeOver(t *testing.T) {
	for _, event := range []string{"SEAL", "INFO", "SNAPSHOTDONE"} {
		t.Run(event, func(t *testing.T) {
			w, a, in := halfDumped(t, true)
			in.Op, in.Ran, in.ToNode = opSnapshot, false, ""
			w.ended()
			try(t, a.intents.save(in))
			w.setFail(event, connect.NewError(connect.CodeInternal, errTest))
			w.setFail(event+"-force", connect.NewError(connect.CodeInternal, errTest))
			a.recover(t.Context())
			was, err := a.intents.load("redis")
			if err != nil || was == nil || *was != in {
				t.Errorf("record %+v, %v, want %+v", was, err, in)
			}
			w.setFail(event, nil)
			w.setFail(event+"-force", nil)
			a.wg.Wait()
			m, _, err := a.store.check("redis", leftID)
			if err != nil || m.Engine != config.EngineCRIU || w.state != control.StateSnapshotDone || w.id != leftID {
				t.Errorf("%+v, %v, state %s of %s", m, err, w.state, w.id)
			}
			if len(w.seals) < 2 && event != "INFO" || slices.Contains(w.seals, false) {
				t.Errorf("SEAL repeats one: %v", w.seals)
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
		})
	}
}

// TestImageTakeOverMigration: a migration that ended behind the seal stays one in the
// record, whoever goes on dies.
func TestImageTakeOverMigration(t *testing.T) {
	w, a, in := halfDumped(t, true)
	w.ended()
	try(t, a.intents.save(in))
	w.setFail("SEAL", connect.NewError(connect.CodeInternal, errTest))
	w.setHook("SEAL", w.stopAgent)
	a.recover(t.Context())
	a.wg.Wait()
	if was, err := a.intents.load("redis"); err != nil || was == nil || *was != in {
		t.Errorf("record %+v, %v, want %+v", was, err, in)
	}
	if _, err := os.Stat(filepath.Join(a.store.dir, leftTemp, imagesDir, "files.img")); err != nil {
		t.Error(err)
	}
}

// TestImageFirstSeal repeats nothing.
func TestImageFirstSeal(t *testing.T) {
	w, a, _ := imagedWorld(t, 1)
	if _, err := snapshotOnce(t.Context(), a, false); err != nil || !slices.Equal(w.seals, []bool{false}) {
		t.Errorf("%v, SEAL repeats one: %v", err, w.seals)
	}
}
