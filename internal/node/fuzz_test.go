package node

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

var (
	fuzzVIP = netip.MustParseAddr("10.0.0.100")
	fuzzID  = filter.ConnID{Local: netip.AddrPortFrom(fuzzVIP, 80), Remote: netip.MustParseAddrPort("10.0.0.2:4000")}
	other6  = filter.ConnID{Local: netip.MustParseAddrPort("[fd00::100]:80"), Remote: netip.MustParseAddrPort("[fd00::2]:4001")}
)

// FuzzRecords takes up an application and two connections from any octets, as if
// a journal held them. Damage is an error and nothing is taken up then; what is
// taken up can live any life.
func FuzzRecords(f *testing.F) {
	enc := func(v any) []byte {
		var b bytes.Buffer
		if err := encoding.MarshalToBuffer(v, &b); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	app := filter.AppRecord{Name: "a", VIPs: []netip.Addr{fuzzVIP, other6.Local.Addr()}, Include: []uint16{80}, Listen: []uint16{80}}
	conn := filter.ConnRecord{App: "a", Opt: tcpemu.Options{TS: true, SACK: true, WScale: true, LocalScale: 7, RemoteScale: 7, MSS: 1460},
		SndUna: 1, SndNxt: 1, RcvNxt: 1, Window: 500, Edge: 64001, RemoteWnd: 64000, TSVal: 1, TSRec: 1, TSAt: 1,
		Handshake: true, AckSeen: true, Learned: true, Frozen: true, Confirmed: true, Created: 1}
	for i, x := range []struct {
		app  appstate.App
		conn appstate.Conn
		life string
	}{
		{appstate.SnapshotDone, appstate.ConnectRmt, "dfrtcRsSfld"},
		{appstate.Restored, appstate.Connect, "dSFldrcR"},
		{appstate.SnapshotFreeze, appstate.Connect, "tldrcR"},
		{appstate.RestoreStart, appstate.Restoring, "rctRau"},
		{appstate.SnapshotFreeze, appstate.Closing, "atSFtAu"},
		{appstate.SnapshotDone, appstate.Rst, "ftrctRU"},
		{appstate.Connected, appstate.Connect, "SFlDrcR"},
	} {
		a, c := app, conn
		a.State, c.State = x.app, x.conn
		a.Sealed, a.Wake = i%2 == 0, i%3 == 0
		c.Sealed, c.FinIn, c.FinOut = a.Sealed, x.conn == appstate.Closing, i == 4
		if x.app == appstate.Restored {
			c.Translated, c.Tr, c.HsIRS = true, rewrite.Translation{Out: 7, In: 9, TSOut: 11, ScaleLocal: 3, ScaleSeen: 7}, 5
		}
		f.Add(enc(&a), connKey(fuzzID), enc(&c), connKey(other6), enc(&conn), byte(i), []byte(x.life))
	}
	empty, err := cbor.Marshal(map[int]any{1: "a"})
	if err != nil {
		f.Fatal(err)
	}
	app.State = appstate.SnapshotDone
	f.Add(enc(&app), connKey(fuzzID), empty, []byte{2, 1, 3}, []byte("not CBOR"), byte(0), []byte("rcRu"))
	f.Fuzz(func(t *testing.T, app, key1, conn1, key2, conn2 []byte, how byte, life []byte) {
		if len(life) > 64 {
			return
		}
		var l legacy
		if l.app([]byte("a"), app) != nil || l.conn(key1, conn1) != nil {
			return
		}
		if l.conn(key2, conn2) == nil && l.conns[0].ID == l.conns[1].ID {
			l.conns = l.conns[:1] // a journal has one value for a key
		}
		e := filter.New(filter.Config{MaxConns: 4, KeepTotal: 4096})
		var fx filter.Effects
		flows := func(filter.ConnID) bool { return how&1 == 0 }
		if err := e.Load(1e9, l.apps, l.conns, flows, how&2 != 0, &fx); err != nil {
			if n := len(fx.Records) + len(fx.Sets) + len(fx.Sends) + len(fx.Restores) + len(fx.Notes); n > 0 || e.Limits()[0].Used > 0 || len(status(e).Apps) > 0 {
				t.Fatalf("%v; and yet taken up: %+v, %+v", err, fx, status(e))
			}
			return
		}
		live(e, l, life)
	})
}

func status(e *filter.Engine) *filter.StatusList {
	var fx filter.Effects
	e.Step(2e9, filter.Event{Request: &filter.Request{Body: &filter.Status{}}}, &fx)
	return fx.Replies[0].Body.(*filter.StatusList)
}

// live has an engine go through requests, packets and time, one for each octet of
// life.
func live(e *filter.Engine, l legacy, life []byte) {
	var fx filter.Effects
	now := filter.Time(2e9)
	step := func(ev filter.Event) {
		e.Step(now, ev, &fx)
		fx.Reset()
	}
	name := l.apps[0].Name
	ids := []filter.ConnID{}
	for _, c := range l.conns {
		ids = append(ids, c.ID)
	}
	requests := map[byte]any{
		'S': &filter.SnapshotStart{App: name, LeaveOut: true}, 'F': &filter.SnapshotFreeze{App: name}, 'l': &filter.Seal{App: name},
		'D': &filter.SnapshotDone{App: name, ID: "s", Force: true}, 'r': &filter.RestoreStart{App: name}, 'c': &filter.RestoreConn{App: name, Kind: "syn", Conns: ids},
		'R': &filter.Restored{App: name, ResetMissing: true}, 'a': &filter.RestoreAbort{App: name}, 'A': &filter.SnapshotAbort{App: name},
		'u': &filter.Unregister{App: name}, 'U': &filter.Unregister{App: name, Force: true}, 's': &filter.Status{}, 'i': &filter.GetConnInfo{App: name},
		'p': &filter.Adopt{App: name, At: 1 << 62},
	}
	for i, op := range life {
		now += 1e6
		if b := requests[op]; b != nil {
			step(filter.Event{Request: &filter.Request{Body: b}})
			continue
		}
		if op == 't' {
			now = max(now, e.NextDeadline()) + 1e9
			step(filter.Event{})
			continue
		}
		for j := range l.conns {
			packets(&l.conns[j], op, byte(i), func(hook uint8, b []byte) {
				step(filter.Event{Packet: &filter.Packet{Hook: hook, Data: b}})
			})
		}
	}
}

// packets are a segment of either side of c with the flags of op, at the numbers
// of its record.
func packets(c *filter.ConnRecord, op, i byte, deliver func(hook uint8, b []byte)) {
	if !c.ID.Local.Addr().Unmap().IsValid() || c.ID.Local.Addr().BitLen() != c.ID.Remote.Addr().BitLen() {
		return
	}
	in := packet.Spec{Src: c.ID.Remote, Dst: c.ID.Local, Seq: c.RcvNxt, Ack: c.SndNxt, Flags: op, Window: 9, Payload: []byte("hello")[:i%6], HasTS: c.Opt.TS, TSVal: c.TSRec, TSEcr: c.TSVal}
	out := packet.Spec{Src: c.ID.Local, Dst: c.ID.Remote, Seq: c.SndNxt.Add(-c.Tr.Out), Ack: c.RcvNxt.Add(-c.Tr.In), Flags: op, Window: 9, HasTS: c.Opt.TS, TSVal: c.TSVal, TSEcr: c.TSRec}
	if op&packet.SYN != 0 {
		out.Ack = c.RcvNxt // the handshake's
		out.HasWScale, out.WScale, out.SACKPermitted, out.MSS = true, 7, true, 1460
	}
	deliver(filter.HookPrerouting, in.Build(make([]byte, in.Size())))
	deliver([]uint8{filter.HookOutput, filter.HookPostrouting}[i%2], out.Build(make([]byte, out.Size())))
}
