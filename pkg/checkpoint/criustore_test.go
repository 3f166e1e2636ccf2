package checkpoint

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// nextAgent takes over from one that has died.
func nextAgent(t *testing.T, a *agent) *agent {
	t.Helper()
	next := newAgent(t.Context(), a.o, a.cfg, a.filter)
	next.launch, next.addrs, next.images, next.openSockets, next.trust, next.readApp = a.launch, a.addrs, a.images, a.openSockets, a.trust, a.readApp
	t.Cleanup(next.wg.Wait)
	return next
}

// notStored takes a snapshot whose images do not get their name: way is in its place.
func notStored(t *testing.T, w *world, a *agent) (way string) {
	t.Helper()
	w.setHook("killed", func() {
		in, err := a.intents.load("redis")
		if err != nil || in == nil {
			t.Errorf("record %+v, %v", in, err)
			return
		}
		way = filepath.Join(a.store.dir, "redis", in.SnapshotID)
		if err := os.WriteFile(way, nil, 0o600); err != nil {
			t.Error(err)
		}
	})
	if _, err := snapshotOnce(t.Context(), a, false); err == nil || !strings.Contains(err.Error(), "its images are whole and stay in") {
		t.Fatal(err)
	}
	if w.running || w.state != control.StateSnapshotDone {
		t.Errorf("running %v, state %s", w.running, w.state)
	}
	return way
}

// TestImageStoredLater: images that could not be stored get their name as soon as there can
// be one, from the agent itself or from the next, without a restore.
func TestImageStoredLater(t *testing.T) {
	for _, who := range []string{"the same agent", "the next agent"} {
		t.Run(who, func(t *testing.T) {
			w, a, _ := imagedWorld(t, 2)
			if who == "the next agent" {
				w.setHook("SNAPSHOTDONE", w.stopAgent)
			}
			way := notStored(t, w, a)
			if who == "the next agent" {
				a.wg.Wait()
				a = nextAgent(t, a)
				a.recover(t.Context()) // the way is not free yet
			}
			if in, err := a.intents.load("redis"); err != nil || in == nil || !in.Sealed || in.Temp == "" {
				t.Errorf("record %+v, %v", in, err)
			}
			try(t, os.Remove(way))
			a.wg.Wait()
			if _, _, err := a.store.check("redis", filepath.Base(way)); err != nil {
				t.Error(err)
			}
			if got := inStore(t, a); !slices.Equal(got, []string{filepath.Base(way)}) {
				t.Errorf("left %q", got)
			}
			if in, err := a.intents.load("redis"); in != nil || err != nil {
				t.Errorf("a record stays: %+v, %v", in, err)
			}
			if strings.Contains(w.trace(), "RESTORE") {
				t.Errorf("it was restored: %s", w.trace())
			}
			if _, err := a.restore(t.Context(), "redis", ""); err != nil || !w.running {
				t.Errorf("%v, running %v", err, w.running)
			}
		})
	}
}

// TestImageTakeOverNotStored: the store fails while an agent brings the dump of another to
// its end: images and record stay until they have their name.
func TestImageTakeOverNotStored(t *testing.T) {
	w, a, in := halfDumped(t, true)
	in.Op, in.Ran, in.ToNode = opSnapshot, false, ""
	w.ended()
	way := filepath.Join(a.store.dir, "redis", leftID)
	writeFile(t, way, "")
	try(t, a.intents.save(in))
	a.recover(t.Context())
	if was, err := a.intents.load("redis"); err != nil || was == nil || *was != in || w.state != control.StateSnapshotDone {
		t.Errorf("record %+v, %v, state %s", was, err, w.state)
	}
	try(t, os.Remove(way))
	a.wg.Wait()
	if _, _, err := a.store.check("redis", leftID); err != nil {
		t.Error(err)
	}
}

// TestImageUndoneLater: what the filter could not take back may still go forward, so that
// the images stay; where it is taken back in the end they go.
func TestImageUndoneLater(t *testing.T) {
	refused := control.Error(connect.CodeFailedPrecondition, "redis", control.StateSnapshotFreeze, "local sides have ended already", "L R")
	for _, late := range []error{refused, nil} {
		w, a, _ := imagedWorld(t, 2)
		w.setFail("SEAL lost", connect.NewError(connect.CodeInternal, errTest)) // it was carried out
		w.setFail("SNAPSHOTABORT", connect.NewError(connect.CodeInternal, errTest))
		if _, err := snapshotOnce(t.Context(), a, false); err == nil || !strings.Contains(err.Error(), "could not be undone") {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(a.store.dir, "redis", inStore(t, a)[0], imagesDir, "pages-1.img")); err != nil {
			t.Error(err)
		}
		w.setFail("SEAL lost", nil)
		w.setFail("SNAPSHOTABORT", late)
		a.wg.Wait()
		if late == nil {
			wantRunning(t, w, control.StateRestored)
			if got := inStore(t, a); len(got) > 0 {
				t.Errorf("left %q", got)
			}
			continue
		}
		if w.state != control.StateSnapshotDone || w.running || !slices.Equal(w.seals, []bool{false, true}) {
			t.Errorf("state %s, running %v, SEAL repeats one: %v", w.state, w.running, w.seals)
		}
		if _, _, err := a.store.check("redis", w.id); err != nil {
			t.Error(err)
		}
	}
}
