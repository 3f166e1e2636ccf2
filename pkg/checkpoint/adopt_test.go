package checkpoint

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// An adoption that fails is tried ever more seldom, and said once for each
// change of the error.
func TestAdoptionFails(t *testing.T) {
	w, a := newWorld(t, 1)
	w.state = control.StateRestored
	var log bytes.Buffer
	a.log = slog.New(slog.NewTextHandler(&log, nil))
	tries := 0
	w.hook["list"] = func() { tries++ }
	now := time.Now()
	var s adoptions
	instance := "one"
	pass := func(d time.Duration) (tried, said int) {
		t.Helper()
		before, warned := tries, strings.Count(log.String(), "level=WARN")
		for end := now.Add(d); now.Before(end); now = now.Add(adoptLook) {
			st, err := w.Status(t.Context(), connect.NewRequest(&pb.StatusRequest{}))
			if err != nil {
				t.Fatal(err)
			}
			st.Msg.Instance = instance
			a.adoptDue(t.Context(), &s, st.Msg, now)
		}
		return tries - before, strings.Count(log.String(), "level=WARN") - warned
	}
	want := func(what string, d time.Duration, tried, said int) {
		t.Helper()
		if gotTried, gotSaid := pass(d); gotTried != tried || gotSaid != said {
			t.Errorf("%s: %d tries and %d warnings in %s, want %d and %d", what, gotTried, gotSaid, d, tried, said)
		}
	}
	want("all well", 10*time.Minute, 10, 0)
	w.fail["list"] = errTest
	want("failing", time.Minute, 5, 1) // at 0, 2, 6, 14 and 30 s
	want("failing on", 10*time.Minute, 10, 0)
	w.fail["list"] = errors.New("something else")
	want("failing otherwise", 10*time.Minute, 10, 1)
	instance = "two"
	want("with another filter", adoptLook, 1, 0) // at once, with nothing new to say
	delete(w.fail, "list")
	want("well again", 10*time.Minute, 10, 0)
	if n := strings.Count(log.String(), "told of the application's sockets again"); n != 1 {
		t.Errorf("said %d times that it works again:\n%s", n, log.String())
	}
	w.fail["elsewhere"] = errElsewhere
	want("elsewhere", 10*time.Minute, 0, 1) // it is not even listed
}
