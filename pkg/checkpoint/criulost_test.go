package checkpoint

import (
	"context"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// imageAway has the application dumped.
func imageAway(t *testing.T, n int) (w *world, a *agent, f *fakeImager) {
	t.Helper()
	w, a, f = imagedWorld(t, n)
	_, err := snapshotOnce(t.Context(), a, false)
	try(t, err)
	return w, a, f
}

// TestImageOpenedUnheard: the process goes on where clients may speak with it already, and
// is ended where they certainly do not.
func TestImageOpenedUnheard(t *testing.T) {
	away := connect.NewError(connect.CodeUnavailable, errTest)
	refused := control.Error(connect.CodeFailedPrecondition, "redis", control.StateRestoreStart, "RESTORED refused")
	for _, c := range []struct {
		name    string
		event   string
		err     error
		unknown bool // the filter cannot be asked either
		says    string
		resumed bool
		after   string
	}{
		{"carried out", "RESTORED lost", away, false, "but its connections are open again and it runs", true, control.StateRestored},
		{"carried out, and the filter is away", "RESTORED lost", away, true, "could not be undone", true, control.StateRestored},
		{"not carried out", "RESTORED", away, false, "stay held", false, control.StateSnapshotDone},
		{"refused, and the filter is away", "RESTORED", refused, true, "could not be undone", false, control.StateRestoreStart},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, _ := imageAway(t, 2)
			w.setFail(c.event, c.err)
			if c.unknown {
				w.setHook("RESTORED", func() { w.setFail("STATUS", away) })
			}
			_, err := a.restore(t.Context(), "redis", "")
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			w.mu.Lock()
			if w.running != c.resumed || w.state != c.after || strings.Contains(strings.Join(w.events, " "), "resume") != c.resumed {
				t.Errorf("running %v, state %s, did %v", w.running, w.state, w.events)
			}
			w.mu.Unlock()
			w.setHook("RESTORED", nil)
			w.setFail(c.event, nil)
			w.setFail("STATUS", nil)
			a.wg.Wait()
			w.mu.Lock()
			w.socks = nil // of what was ended
			w.mu.Unlock()
			if _, err := a.restore(t.Context(), "redis", ""); err != nil {
				t.Errorf("once more: %v", err)
			}
			wantRunning(t, w, control.StateRestored)
			if c.resumed && strings.Contains(w.trace(), "stop-SIGKILL RESTOREABORT") {
				t.Errorf("it was ended: %s", w.trace())
			}
		})
	}
}

// mute is a CRIU that does nothing and says that all went well.
type mute struct{ *fakeImager }

func (mute) dump(context.Context, *config.App, process, imageRun) error          { return nil }
func (mute) restore(context.Context, *config.App, imageRun, func(process)) error { return nil }

// TestImageCRIUSaysNothing: nothing is taken for done.
func TestImageCRIUSaysNothing(t *testing.T) {
	w, a, f := imagedWorld(t, 1)
	a.images = mute{f}
	if _, err := snapshotOnce(t.Context(), a, false); err == nil || !strings.Contains(err.Error(), "without asking") || strings.Contains(w.trace(), "SNAPSHOTDONE") {
		t.Errorf("dump: %v: %s", err, w.trace())
	}
	wantRunning(t, w, control.StateRestored)
	w, a, f = imageAway(t, 1)
	a.images = mute{f}
	if _, err := a.restore(t.Context(), "redis", ""); err == nil || !strings.Contains(err.Error(), "without telling") {
		t.Errorf("restore: %v", err)
	}
	if w.running || w.state != control.StateSnapshotDone {
		t.Errorf("running %v, state %s", w.running, w.state)
	}
}

// TestImageToldOnce: why a dump failed is told once, also where it was announced by itself.
func TestImageToldOnce(t *testing.T) {
	for _, event := range []string{"SNAPSHOTSTART", "listeners", "SNAPSHOTFREEZE", "SEAL"} {
		w, a, _ := imagedWorld(t, 1)
		w.setFail(event, errTest)
		if _, err := snapshotOnce(t.Context(), a, false); err == nil || strings.Count(err.Error(), errTest.Error()) != 1 {
			t.Errorf("%s: %v", event, err)
		}
	}
}

// TestImageCheckAborted: there may be much to read: whoever gives up does not wait for it,
// and it is read no further.
func TestImageCheckAborted(t *testing.T) {
	needRoot(t)
	w, a, _ := imageAway(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	reading := make(chan struct{})
	a.trust = func(path string) error { // the last that is looked at
		if strings.HasPrefix(path, a.store.dir) {
			cancel()
			<-reading
		}
		return nil
	}
	_, err := a.restore(ctx, "redis", "")
	if connect.CodeOf(err) != connect.CodeAborted || w.running || w.state != control.StateSnapshotDone {
		t.Errorf("%v, running %v, state %s", err, w.running, w.state)
	}
	close(reading)
	a.wg.Wait()
	m, err := a.store.imagesOf("redis", w.id)
	try(t, err)
	if err := a.store.checkImages(ctx, m); err != context.Canceled {
		t.Errorf("it was read on: %v", err)
	}
}
