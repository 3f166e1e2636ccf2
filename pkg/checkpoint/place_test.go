package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// behindWorld has the application in a network namespace of its own.
func behindWorld(t *testing.T) (*world, *agent) {
	t.Helper()
	w, a := newWorld(t, 2)
	a.cfg.Apps["redis"].Process.Namespace = "red"
	a.sysctl = func(string, string) string { return "1\n" }
	w.vip = map[string]bool{"red": true}
	return w, a
}

// The VIP is the node's while the application is away, and only then.
func TestBehindSteps(t *testing.T) {
	w, a := behindWorld(t)
	if _, err := snapshotOnce(t.Context(), a, false); err != nil {
		t.Fatal(err)
	}
	wantTrace(t, w, snapshotSteps+" vip+eth0")
	w.events = nil
	w.away()
	w.vip["red"] = false // another namespace of that name
	if _, err := a.restore(t.Context(), "redis", ""); err != nil {
		t.Fatal(err)
	}
	if got := w.trace(); !strings.HasPrefix(got, "vip-eth0 vip+redlo RESTORESTART INFO list exec") {
		t.Errorf("steps: %s", got)
	}
	w.events = nil
	if _, err := a.stop(t.Context(), "redis", false); err != nil {
		t.Fatal(err)
	}
	wantTrace(t, w, "stop-SIGKILL UNREGISTER vip-redlo")
}

func TestBehindRestoreFails(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(*world, *agent)
		want string
	}{
		"route to the network": {func(w *world, _ *agent) { w.routed = "eth0" }, "ip route add 192.0.2.100 dev DEVICE"},
		"no route":             {func(w *world, _ *agent) { w.fail["route"] = errTest }, "made to fail"},
		"the node's own":       {func(w *world, _ *agent) { w.routed = "" }, "belongs to the node itself"},
		"no forwarding": {func(_ *world, a *agent) {
			a.sysctl = func(ns, name string) string {
				return map[string]string{"net/ipv4/ip_forward": "0\n"}[ns+name]
			}
		}, "sysctl -w net.ipv4.ip_forward=1"},
	} {
		t.Run(name, func(t *testing.T) {
			w, a := behindWorld(t)
			w.away()
			w.vip[""] = true
			c.harm(w, a)
			if _, err := a.restore(t.Context(), "redis", ""); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("restore: %v, want %q", err, c.want)
			}
			if !w.vip[""] || w.state != control.StateSnapshotDone {
				t.Errorf("VIP on the node %v, state %s; want it to be held as before", w.vip[""], w.state)
			}
		})
	}
}

// stop --discard works where the namespace has gone.
func TestBehindGone(t *testing.T) {
	w, a := behindWorld(t)
	w.away()
	w.vip = map[string]bool{"": true}
	w.fail["has-red"] = fmt.Errorf("network namespace red: %w", os.ErrNotExist)
	if _, err := a.stop(t.Context(), "redis", true); err != nil {
		t.Fatal(err)
	}
	if w.vip[""] {
		t.Error("the VIP is left on the node")
	}
	w.fail["has-red"] = errors.New("something else")
	w.state = control.StateSnapshotDone
	if _, err := a.stop(t.Context(), "redis", true); err == nil {
		t.Error("an error that says nothing of a missing namespace was swallowed")
	}
}

// A new agent finds an application that is away and puts its VIP on the node.
func TestBehindNewAgent(t *testing.T) {
	w, a := behindWorld(t)
	w.away()
	a.recover(t.Context())
	if !w.vip[""] {
		t.Errorf("the VIP is not on the node; steps: %s", w.trace())
	}
}

// The settings looked at are those of the application's namespace.
func TestBehindDSACK(t *testing.T) {
	w, a := behindWorld(t)
	w.socks[1].Info = &sockdiag.TCPInfo{Options: sockdiag.Options{SACK: true}}
	a.sysctl = func(ns, name string) string {
		return map[string]string{"red net/ipv4/tcp_dsack": "0\n", " net/ipv4/tcp_dsack": "1\n"}[ns+" "+name]
	}
	if _, err := snapshotOnce(t.Context(), a, false); err == nil || !strings.Contains(err.Error(), "namespace red") {
		t.Errorf("error %v", err)
	}
	wantRunning(t, w, control.StateConnected)
}

// A client behind another VIP of this node is on this node too.
func TestBehindSameNode(t *testing.T) {
	w, a := behindWorld(t)
	w.others = []*pb.AppStatus{{Name: "here", State: control.StateConnected, Vips: []string{client.String()}}}
	r, err := snapshotOnce(t.Context(), a, false)
	if err != nil || len(r.Notes) != 2 || !strings.Contains(w.trace(), "sockets=0") {
		t.Errorf("notes %q, error %v, steps %s", r.GetNotes(), err, w.trace())
	}
	w, a = behindWorld(t)
	w.others = []*pb.AppStatus{{Name: "elsewhere", Vips: []string{client.String()}}} // configured, not here
	if r, err := snapshotOnce(t.Context(), a, false); err != nil || len(r.Notes) != 0 {
		t.Errorf("notes %q, error %v", r.GetNotes(), err)
	}
}

// Where it is not known whether clients speak with the application already,
// its VIP stays with it.
func TestBehindLostAnswer(t *testing.T) {
	w, a := behindWorld(t)
	w.away()
	w.vip[""] = true
	w.hook["RESTORED"] = func() {
		w.mu.Lock()
		w.fail["RESTORED"], w.fail["STATUS"] = errTest, errTest
		w.mu.Unlock()
	}
	if _, err := a.restore(t.Context(), "redis", ""); err == nil {
		t.Fatal("no error")
	}
	if w.vip[""] || !w.running {
		t.Errorf("VIP on the node %v, running %v", w.vip[""], w.running)
	}
}

// A snapshot that was sealed is brought to its end where the namespace has gone
// with the process.
func TestBehindGoneAtSeal(t *testing.T) {
	w, a := behindWorld(t)
	w.state, w.running = control.StateSnapshotFreeze, false
	if err := a.intents.save(intent{App: "redis", Op: opSnapshot, Sealed: true, SnapshotID: newSnapshotID(time.Now())}); err != nil {
		t.Fatal(err)
	}
	a.openSockets = func(ns string) (sockets, error) { return nil, fmt.Errorf("%s: %w", ns, os.ErrNotExist) }
	a.recover(t.Context())
	if w.state != control.StateSnapshotDone || !w.vip[""] {
		t.Errorf("state %s, VIP on the node %v; steps %s", w.state, w.vip[""], w.trace())
	}
}
