package filter_test

import (
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
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
		socks[0].SendQueue, socks[0].BytesAcked = 10, 0
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

// The list of sockets is older than the capture: what local says in between
// passes unseen and may be lost on the way. Local is handed no acknowledgement
// that the remote has not given, or its octets would be gone for good.
func TestListOlderThanCapture(t *testing.T) {
	for _, adopted := range []bool{false, true} {
		w := filtertest.New()
		script := "app redis 10.0.0.100 6379\nlink c1 10.0.0.2:40000\nopen c1\nremote c1 ACK\n"
		if adopted {
			script += "restart\nrequest ADOPT\n"
		}
		if err := w.Play(script + "silent on"); err != nil {
			t.Fatal(err)
		}
		var fx filter.Effects
		step := func(ev filter.Event) {
			fx.Reset()
			w.Engine.Step(w.Now(), ev, &fx)
		}
		deliver := func(hook uint8, b []byte) { step(filter.Event{Packet: &filter.Packet{Hook: hook, Data: b}}) }
		socks := w.Sockets()
		// Ten octets of local pass and are lost; nobody sees them.
		lost := w.Segment("c1", false, packet.ACK|packet.PSH, 0, []byte("0123456789"))
		answer := w.Segment("c1", false, packet.ACK, 10, nil)
		step(filter.Event{Request: &filter.Request{Body: &filter.SnapshotStart{App: "redis", Listen: []uint16{6379}, Sockets: socks}}})
		deliver(filter.HookPostrouting, answer) // tells SND.NXT
		if err := w.Play("advance 20ms"); err != nil {
			t.Fatal(err)
		}
		step(filter.Event{Request: &filter.Request{Body: &filter.SnapshotFreeze{App: "redis", Boundary: "now"}}})
		una := seqOf(t, lost)
		// The remote, which waits for them, says what it has.
		deliver(filter.HookPrerouting, w.Segment("c1", true, packet.ACK, -1, []byte("x")))
		for _, s := range fx.Sends {
			var seg packet.Segment
			if seg.Parse(s.Data) != packet.OK {
				t.Fatal("a packet that is none")
			}
			if seg.Dst.Port() == 6379 && seg.Ack != una {
				t.Errorf("adopted %v: local is told that %d octets arrived that the remote has not got", adopted, seg.Ack.Size(una))
			}
		}
		step(filter.Event{Request: &filter.Request{Body: &filter.Seal{App: "redis"}}})
		step(filter.Event{Request: &filter.Request{Body: &filter.SnapshotDone{App: "redis", ID: "s"}}})
		if err := fx.Replies[0].Err; err == nil || !strings.Contains(err.Error(), "10 octets sent are not acknowledged") {
			t.Errorf("adopted %v: SNAPSHOTDONE with octets that are lost: %v", adopted, err)
		}
	}
}

func seqOf(t *testing.T, b []byte) seqnum.Value {
	t.Helper()
	var s packet.Segment
	if s.Parse(b) != packet.OK {
		t.Fatal("a packet that is none")
	}
	return s.Seq
}

// A local side that has never said anything has not answered, though its first
// request came in the millisecond of its handshake.
func TestSilentLocalOwesAnswer(t *testing.T) {
	w := filtertest.New()
	if err := w.Play("app redis 10.0.0.100 6379\nlink c1 10.0.0.2:40000\nopen c1\nremote c1 ACK data \"GET \""); err != nil {
		t.Fatal(err)
	}
	socks := w.Sockets()
	socks[0].LastRecv, socks[0].LastSent, socks[0].BytesAcked, socks[0].BytesReceived = 3e6, 3e6, 0, 4
	var fx filter.Effects
	for _, body := range []any{
		&filter.SnapshotStart{App: "redis", Sockets: socks, Listen: []uint16{6379}},
		&filter.Status{App: "redis"},
	} {
		w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{ID: 1, Body: body}}, &fx)
	}
	if err := w.Play("request SNAPSHOTABORT"); err != nil {
		t.Fatal(err)
	}
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{ID: 2, Body: &filter.SnapshotStart{App: "redis", Sockets: socks, Listen: []uint16{6379}}}}, &fx)
	if err := w.Play("local c1 ACK\nadvance 5ms\nrequest SNAPSHOTFREEZE"); err != nil {
		t.Fatal(err)
	}
	fx.Reset()
	w.Engine.Step(w.Now(), filter.Event{Request: &filter.Request{ID: 3, Body: &filter.GetConnInfo{App: "redis"}}}, &fx)
	for _, r := range fx.Replies {
		if l, ok := r.Body.(*filter.ConnList); ok && (len(l.Conns) != 1 || l.Conns[0].Frozen) {
			t.Errorf("frozen before local has answered: %+v", l.Conns)
		}
	}
}
