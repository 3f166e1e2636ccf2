package filter_test

import (
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// Octets that lay unacknowledged in local's send queue when the sockets were
// listed are so until the remote says otherwise, also when local speaks before
// it answers the ask.
func TestSendQueueCounts(t *testing.T) {
	for _, early := range []bool{false, true} {
		w := filtertest.New()
		if err := w.Play("app redis 10.0.0.100 6379\nlink c1 10.0.0.2:40000\nopen c1\nlocal c1 ACK data \"0123456789\"\nsilent on"); err != nil {
			t.Fatal(err)
		}
		var fx filter.Effects
		socks := w.Sockets()
		socks[0].SendQueue = 10
		w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.SnapshotStart{App: "redis", Listen: []uint16{6379}, Sockets: socks}}}, &fx)
		if early {
			b := w.Segment("c1", false, packet.ACK, 0, nil)
			w.Engine.Step(w.Now(), filter.Event{Packet: &filter.Packet{Hook: filter.HookPostrouting, Data: b}}, &fx)
		}
		if err := w.Play("silent off\nadvance 100ms\nrequest SNAPSHOTFREEZE\nadvance 100ms\nrequest SEAL"); err != nil {
			t.Fatal(err)
		}
		fx.Reset()
		w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{Body: &filter.SnapshotDone{App: "redis", ID: "s"}}}, &fx)
		if err := fx.Replies[0].Err; err == nil || !strings.Contains(err.Error(), "10 octets sent are not acknowledged") {
			t.Errorf("early %v: SNAPSHOTDONE with octets in flight: %v", early, err)
		}
	}
}
