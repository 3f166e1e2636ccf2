package node

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// Every field arrives.
func TestStructuresRound(t *testing.T) {
	var st filter.Structures
	var k uint64
	fill(t, reflect.ValueOf(&st).Elem(), &k)
	st.Version = filter.StructuresVersion
	b, err := encodeStructures(&st)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeStructures(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, &st) {
		t.Errorf("\n%+v\nwant\n%+v", got, &st)
	}
}

// Those of another version are named, whatever is in them.
func TestStructuresVersion(t *testing.T) {
	for version, b := range map[string][]byte{"99": {0x18, 99, 0x60, 0xff}, "1": {1, 0x60}} {
		st, err := decodeStructures(b)
		if err != nil {
			t.Fatal(err)
		}
		e := filter.New(filter.Config{})
		var fx filter.Effects
		e.Step(1, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: "a", OldNode: "b", Given: st}}}, &fx)
		if err := fx.Replies[0].Err; err == nil || !errors.Is(err, filter.ErrStructures) || !strings.Contains(err.Error(), "of version "+version+", this filter takes version 2; run the same version") {
			t.Error(err)
		}
	}
}

// heldStructures are n connections that are held, each with what of it takes room.
func heldStructures(n int) *filter.Structures {
	vip := netip.MustParseAddr("192.0.2.100")
	st := &filter.Structures{Version: filter.StructuresVersion, At: 1 << 50, App: filter.AppRecord{Name: "redis", VIPs: []netip.Addr{vip}, Include: []uint16{6379},
		Listen: []uint16{6379}, State: appstate.SnapshotDone, SnapshotID: "20261122T153000Z-1a2b3c", Quiet: 50e6, Sealed: true, Wake: true, Term: 1}}
	for i := range n {
		id := filter.ConnID{Local: netip.AddrPortFrom(vip, 6379), Remote: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), uint16(30000+i%30000))}
		st.Conns = append(st.Conns, filter.ConnRecord{
			App: "redis", ID: id, State: appstate.ConnectRmt,
			Opt:    tcpemu.Options{MSS: 1460, TS: true, SACK: true, WScale: true, RemoteScale: 7, LocalScale: 9},
			SndUna: 0x81234567, SndNxt: 0x81234567, RcvNxt: 0x91234567, Window: 512, Edge: 0x91275567, RemoteWnd: 65536,
			RemoteLast: 502, RemoteSeen: true, TSVal: 0xa1234567, TSRec: 0xb1234567, TSAt: 1 << 50,
			Handshake: true, AckSeen: true, Learned: true, Frozen: true, Confirmed: true, Sealed: true, ISS: 0x81230000, IRS: 0x91230000,
			Created: 1 << 50, BytesIn: 0x4567, BytesOut: 0x4567, HsIRS: 0x91230000, Translated: i%2 == 0,
			Tr:     rewrite.Translation{Out: 0x12345678, In: 0x12345678, ScaleLocal: 9, ScaleSeen: 9},
			KeptAt: 0x91234567, Kept: []byte("SET key:000000 value\r\n"), Stopped: true, SpokeAt: 1 << 50, SegmentsIn: 9, Reasons: []uint64{1 << 56, 20<<56 | 7},
		})
	}
	return st
}

// Structures that contradict themselves, or for which there is no room, are
// refused before anything of them is taken.
func TestStructuresRefused(t *testing.T) {
	for name, x := range map[string]struct {
		change func(st *filter.Structures)
		want   string
	}{
		"right":              {func(*filter.Structures) {}, ""},
		"another name":       {func(st *filter.Structures) { st.App.Name = "web" }, `of application "web", not "redis"`},
		"long name":          {func(st *filter.Structures) { st.App.SnapshotID = strings.Repeat("x", 256) }, "not valid"},
		"no snapshot":        {func(st *filter.Structures) { st.App.SnapshotID = "" }, "not valid"},
		"runs":               {func(st *filter.Structures) { st.App.State = appstate.Restored }, "not held"},
		"handed over":        {func(st *filter.Structures) { st.App.State = appstate.BlockData }, "not held"},
		"no VIP":             {func(st *filter.Structures) { st.App.VIPs = nil }, "not valid"},
		"two VIPs":           {func(st *filter.Structures) { st.App.VIPs = append(st.App.VIPs, netip.MustParseAddr("10.0.0.1")) }, "one of each family"},
		"multicast":          {func(st *filter.Structures) { st.App.VIPs[0] = netip.MustParseAddr("224.0.0.1") }, "is no VIP"},
		"zone":               {func(st *filter.Structures) { st.App.VIPs[0] = netip.MustParseAddr("fe80::1%eth0") }, "is no VIP"},
		"heartbeats":         {func(st *filter.Structures) { st.App.Heartbeats = make([]filter.Heartbeat, 257) }, "too many"},
		"a long heartbeat":   {func(st *filter.Structures) { st.App.Heartbeats = []filter.Heartbeat{{Reply: make([]byte, 1025)}} }, "too long"},
		"heartbeats of 1 ns": {func(st *filter.Structures) { st.App.Heartbeats = []filter.Heartbeat{{Send: []byte("x"), Interval: 1}} }, "too frequent"},
		"ports":              {func(st *filter.Structures) { st.App.Listen = make([]uint16, 1<<17) }, "more ports"},
		"another VIP":        {func(st *filter.Structures) { st.Conns[0].ID.Local = netip.MustParseAddrPort("10.0.0.1:80") }, "another VIP"},
		"of another":         {func(st *filter.Structures) { st.Conns[0].App = "web" }, "which has none"},
		"twice":              {func(st *filter.Structures) { st.Conns[1].ID = st.Conns[0].ID }, "not valid"},
		"restoring":          {func(st *filter.Structures) { st.Conns[0].State = appstate.Restoring }, "none of a held connection"},
		"opening":            {func(st *filter.Structures) { st.Conns[0].State = appstate.SynSent }, "none of a held connection"},
		"no port":            {func(st *filter.Structures) { st.Conns[0].ID.Remote = netip.MustParseAddrPort("10.0.0.2:0") }, "addresses"},
		"scale":              {func(st *filter.Structures) { st.Conns[0].Opt.LocalScale = 15 }, "not valid"},
		"own":                {func(st *filter.Structures) { st.Conns[0].Own = make([]byte, 1<<17) }, "too many"},
		"reasons":            {func(st *filter.Structures) { st.Conns[0].Reasons = make([]uint64, 1000) }, "too long"},
		"spool is missing":   {func(st *filter.Structures) { st.Conns[0].Spooled, st.Conns[0].KeptAt = true, 0x51234567 }, "are missing"},
		"too many":           {func(st *filter.Structures) { *st = *heldStructures(5) }, "queue.max_connections = 4"},
		"too many for one":   {func(st *filter.Structures) { *st = *heldStructures(4) }, "limits.connections_per_app = 3"},
		"too much":           {func(st *filter.Structures) { spooled(&st.Conns[0], 90); spooled(&st.Conns[1], 90) }, "limits.kept_bytes_per_app = 150"},
		"too much of all":    {func(st *filter.Structures) { spooled(&st.Conns[0], 120) }, "limits.kept_bytes = 140"},
		"a head is only cut": {func(st *filter.Structures) { st.Conns[0].Kept = make([]byte, 1<<20) }, ""},
		"nonsense for SYNs":  {func(st *filter.Structures) { st.Syns = [][]byte{nil, {0x45}, make([]byte, 60)} }, ""},
		"times": {func(st *filter.Structures) {
			st.At = -1 << 63
			st.Conns[0].Expire, st.Conns[0].Created = 1<<63-1, 1<<63-1
		}, ""},
	} {
		perApp := 3
		if name == "too many" {
			perApp = 0
		}
		e := filter.New(filter.Config{MaxConns: 4, ConnsPerApp: perApp, KeepTotal: 140, KeepPerApp: 150, KeepPerConn: 32})
		st := heldStructures(2)
		x.change(st)
		var fx filter.Effects
		e.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: "redis", OldNode: "b", Given: st}}}, &fx)
		err := fx.Replies[0].Err
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", name, err)
		}
		used := uint64(0)
		for _, l := range e.Limits() {
			if used += l.Used; l.Used > l.Max {
				t.Errorf("%s: %s: %d of %d", name, l.Name, l.Used, l.Max)
			}
		}
		if err != nil && (used > 0 || len(fx.Notes)+len(fx.Sets)+len(fx.Records)+len(fx.Sends) > 0) {
			t.Errorf("%s: taken up", name)
		}
	}
}

func spooled(c *filter.ConnRecord, n int) {
	c.Spooled, c.RcvNxt = true, c.KeptAt.Add(uint32(n))
	c.Kept, c.Chunks = nil, []filter.Chunk{{At: c.KeptAt, Data: make([]byte, n)}}
}

// FuzzStructures takes over what any octets describe. Damage is an error and nothing
// is taken then; what is taken can live any life, and goes on to a third node.
func FuzzStructures(f *testing.F) {
	add := func(change func(st *filter.Structures), life string) {
		st := heldStructures(2)
		change(st)
		b, err := encodeStructures(st)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte(life))
	}
	add(func(*filter.Structures) {}, "dfcRSFlDrR")
	add(func(st *filter.Structures) { spooled(&st.Conns[0], 20); st.Conns[1].State = appstate.Rst }, "dtcRsft")
	add(func(st *filter.Structures) {
		st.Conns[0].State, st.Conns[0].FinOut, st.Conns[0].Lingers, st.Conns[0].Expire = appstate.Closing, true, true, 1<<50
		st.Conns[1].State, st.Conns[1].FinIn, st.Conns[1].HeadFin = appstate.Closing, true, true
	}, "tdcRt")
	add(func(st *filter.Structures) {
		st.App.Spool, st.App.Heartbeats = 64, []filter.Heartbeat{{Send: []byte("x"), Interval: 1e6}}
	}, "dtttcR")
	add(func(st *filter.Structures) {
		st.App.Silent, st.App.Imaged = true, true
		for i := range st.Conns {
			c := &st.Conns[i]
			c.Image, c.ImgUna, c.ImgSnd, c.ImgEnd, c.ImgRcv, c.ImgWup, c.Unread = true, c.SndUna, c.SndNxt, c.SndNxt, c.RcvNxt, c.RcvNxt, i > 0
			c.Half = i == 1
		}
	}, "dtcRSfD")
	f.Add([]byte{filter.StructuresVersion, 0x60}, []byte{})
	f.Fuzz(func(t *testing.T, b, life []byte) {
		if len(life) > 64 {
			return
		}
		st, err := decodeStructures(b)
		if err != nil {
			if !errors.Is(err, filter.ErrStructures) {
				t.Fatal(err)
			}
			return
		}
		e := filter.New(filter.Config{MaxConns: 4, KeepTotal: 4096, KeepPerConn: 100, MaxSyns: 2})
		var fx filter.Effects
		name := st.App.Name
		e.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: name, OldNode: "b", Given: st}}}, &fx)
		for _, l := range e.Limits() {
			if l.Used > l.Max {
				t.Fatalf("%s: %d of %d", l.Name, l.Used, l.Max)
			}
		}
		if fx.Replies[0].Err != nil {
			if n := len(fx.Records) + len(fx.Sets) + len(fx.Sends) + len(fx.Notes); n > 0 || len(status(e).Apps) > 0 {
				t.Fatalf("%v; and yet taken", fx.Replies[0].Err)
			}
			return
		}
		fx.Reset()
		e.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.Yield{App: name}}}, &fx)
		back := fx.Replies[0].Body.(*filter.Structures)
		if len(back.Conns) != len(st.Conns) {
			t.Fatalf("%d connections of %d go back", len(back.Conns), len(st.Conns))
		}
		third := filter.New(filter.Config{MaxConns: 4, KeepTotal: 4096, KeepPerConn: 100, MaxSyns: 2})
		fx.Reset()
		third.Step(5, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: name, OldNode: "b", Given: back}}}, &fx)
		if err := fx.Replies[0].Err; err != nil {
			t.Fatalf("what was taken cannot be taken again: %v", err)
		}
		live(third, legacy{apps: []filter.AppRecord{back.App}, conns: back.Conns}, life)
	})
}

// BenchmarkHandover is what a node's filter does until it answers in the place of
// another: what is given, encoded and decoded, and taken; without the disk.
func BenchmarkHandover(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			st := heldStructures(n)
			var fx filter.Effects
			give := filter.New(filter.Config{})
			give.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: "redis", OldNode: "z", Given: st}}}, &fx)
			give.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.Yield{App: "redis"}}}, &fx)
			give.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.Unyield{App: "redis"}}}, &fx)
			octets := 0
			for b.Loop() {
				fx.Reset()
				give.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.Yield{App: "redis"}}}, &fx)
				enc, err := encodeStructures(fx.Replies[0].Body.(*filter.Structures))
				if err != nil {
					b.Fatal(err)
				}
				octets = len(enc)
				dec, err := decodeStructures(enc)
				if err != nil {
					b.Fatal(err)
				}
				take := filter.New(filter.Config{})
				fx.Reset()
				take.Step(1<<51, filter.Event{Request: &filter.Request{Body: &filter.RestoreStart{App: "redis", OldNode: "a", Given: dec}}}, &fx)
				if err := fx.Replies[0].Err; err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(octets)/float64(n), "octets/conn")
		})
	}
}
