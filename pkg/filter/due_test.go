package filter_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

const beaten = `app redis 10.0.0.100 6379
%s
request SNAPSHOTSTART
request SNAPSHOTFREEZE heartbeat=PING>PONG
advance 400ms
request SEAL
request SNAPSHOTDONE s1
`

// What is due because a heartbeat was answered is of its connection alone: of
// thousands of connections each is answered at a moment of its own, and to look at
// all of them each time takes a processor's time.
func TestDeadlineOfOne(t *testing.T) {
	w := filtertest.New()
	if err := w.Play(fmt.Sprintf(beaten, "link c1 10.0.0.2:40000\nlink c2 10.0.0.2:40001\nopen c1\nopen c2") + "remote c1 ACK data \"PING\""); err != nil {
		t.Fatal(err)
	}
	if n := w.Engine.DueAt(w.Now() + 1e9); n != 1 {
		t.Errorf("what is due in a second is of %d connections", n)
	}
	if err := w.Play("advance 1s"); err != nil { // it was not acknowledged
		t.Fatal(err)
	}
	if n := w.Engine.DueAt(w.Now() + 2e9); n != 1 {
		t.Errorf("what is due in two seconds is of %d connections", n)
	}
}

// Many that are due at one moment are found by looking, as if they had asked for
// it together; each once.
func TestDeadlineOfMany(t *testing.T) {
	const conns = 200
	var open, ping strings.Builder
	for i := range conns {
		fmt.Fprintf(&open, "link c%d 10.0.0.2:%d\nopen c%[1]d\n", i, 1000+i)
		fmt.Fprintf(&ping, "remote c%d ACK data \"PING\"\n", i)
	}
	for _, n := range []int{3, conns} {
		w := filtertest.New()
		lines := strings.SplitAfterN(ping.String(), "\n", n+1)[:n]
		if err := w.Play(fmt.Sprintf(beaten, open.String()) + strings.Join(lines, "")); err != nil {
			t.Fatal(err)
		}
		want := n
		if n == conns {
			want = -1
		}
		if got := w.Engine.DueAt(w.Now() + 1e9); got != want {
			t.Errorf("%d heartbeats: what is due in a second is of %d connections, want %d", n, got, want)
		}
		var fx filter.Effects
		w.Engine.Step(w.Now()+1e9, filter.Event{}, &fx)
		if got := len(fx.Sends); got != n {
			t.Errorf("%d heartbeats: %d are repeated when nobody acknowledges them", n, got)
		}
	}
}
