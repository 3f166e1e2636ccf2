package filter_test

import (
	"math/rand/v2"
	"runtime/debug"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// byImage is one request of a snapshot by an image; its sockets stand near where the
// engine and the records say.
func byImage(e *filter.Engine, now filter.Time, store *filtertest.Store, next func() byte, conn func(byte) filter.ConnID, req func(any)) {
	op := next()
	all := []filter.ConnID{conn(0), conn(1), conn(2)}
	switch op % 6 {
	case 0:
		b := &filter.SnapshotStart{App: "a", Listen: []uint16{80}, Silent: true, LeaveOut: op&0x80 != 0}
		how := next()
		for i, id := range all {
			k := filter.Socket{ID: id, Owned: true, Passive: op&0x40 != 0, HasInfo: op&0x20 != 0, TS: true, SACK: true, SendQueue: uint32(op >> 4 & 1)}
			switch how >> (2 * i) & 3 {
			case 0:
				k.Established = true
			case 1:
				k.Established, k.CloseWait = true, true
			case 2:
				k.LocalClosed, k.RemoteClosed = true, how&0x40 != 0
			case 3:
				continue
			}
			b.Sockets = append(b.Sockets, k)
		}
		if how&0x80 != 0 {
			b.Sockets = nil
		}
		req(b)
	case 1:
		b := &filter.SnapshotFreeze{App: "a", Silent: true, AbortOnData: op&0x80 != 0}
		if op&0x40 != 0 {
			speaks(b, next())
		}
		req(b)
	case 2, 3:
		req(&filter.Seal{App: "a", Image: imageNear(e, now, store, all, op, next), Again: op&0x08 != 0})
	case 4:
		req(&filter.RestoreConn{App: "a", Kind: "image", Conns: all[:1+op>>6%3]})
	case 5: // the way back in one go
		req(&filter.RestoreStart{App: "a"})
		req(&filter.RestoreConn{App: "a", Kind: "image", Conns: all})
		if op&0x80 != 0 {
			req(&filter.RestoreConn{App: "a", Kind: "syn", Conns: all})
		}
		req(&filter.Restored{App: "a", ResetMissing: op&0x40 != 0})
	}
}

// imageNear makes an image of the connections that e has, some of them left out,
// closed or off by a little.
func imageNear(e *filter.Engine, now filter.Time, store *filtertest.Store, all []filter.ConnID, op byte, next func() byte) []filter.ImageSocket {
	var fx filter.Effects
	e.Step(now, filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: "a"}}}, &fx)
	known := map[filter.ConnID]filter.ConnInfo{}
	for _, r := range fx.Replies {
		for _, c := range r.Body.(*filter.ConnList).Conns {
			known[c.ID] = c
		}
	}
	records := map[filter.ConnID]filter.ConnRecord{}
	_, conns := store.Records()
	for _, r := range conns {
		records[r.ID] = r
	}
	var out []filter.ImageSocket
	for _, id := range all {
		how := next()
		c, r := known[id], records[id]
		k := filter.ImageSocket{ID: id, Passive: c.Role == appstate.Passive, SACK: true, TS: r.Opt.TS, TSVal: r.TSVal - r.Tr.TSOut + uint32(how>>7),
			RcvNxt: seqnum.Value(c.RcvNxt).Add(-r.Tr.In), SndNxt: seqnum.Value(c.SndNxt).Add(-r.Tr.Out), MSS: 1000, RemoteWnd: 1000, LocalWnd: 1000}
		if c.Socket.IsValid() {
			k.ID.Local = c.Socket
		}
		k.SndUna = k.SndNxt.Add(-min(c.Unacked, uint32(how>>6&1)*c.Unacked))
		switch how & 3 {
		case 1:
			k.RcvNxt = k.RcvNxt.Add(uint32(how >> 5 & 3))
		case 2:
			k.SndNxt = k.SndNxt.Add(uint32(how >> 5 & 3))
		case 3:
			if op&0x40 != 0 {
				continue
			}
			k.Unread = uint32(how >> 5)
		}
		k.LocalWup = k.RcvNxt.Add(-uint32(how >> 6 & 1))
		k.LocalClosed, k.RemoteClosed = how&0x10 != 0, how&0x08 != 0
		out = append(out, k)
	}
	return out
}

// FuzzImage is FuzzStep from where connections are held by an image, or about to be.
func FuzzImage(f *testing.F) {
	for _, life := range [][]byte{
		{},
		{209, 2, 0, 0, 0, 2, 4, 0, 0x10, 0, 1, 0, 209, 5},
		{209, 2, 0, 0x10, 0x18, 2, 4, 0, 4, 0, 1, 0, 0, 2, 0, 1, 0, 209, 5, 3, 30},
		{209, 2, 0, 0x10, 0x18, 2, 0x84, 249, 0, 2, 5, 209, 4, 2, 8, 209, 5, 3, 30, 209, 0, 0, 209, 1, 209, 2, 0, 0, 0, 2, 4},
		{209, 2, 0x40, 3, 0, 0, 2, 4, 2, 0, 2, 0x10, 209, 5, 3, 30},
		{2, 9, 2, 1, 2, 2, 209, 2, 0, 0, 0},
	} {
		f.Add(byte(0), life)
		f.Add(byte(0x95), life)
	}
	f.Fuzz(func(t *testing.T, how byte, life []byte) {
		if len(life) > 2048 {
			return
		}
		in := []byte{0, 2, 0, 0, 0, 0, 1, 0x12, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 1, 0x12, 1, 0, 0, 0, 0, 0x10, 0, 1, 1, 0, 0, 0x10, 1, 1, 1, 0,
			209, 0x60, how, 3, 50, 209, 0x41, how}
		in = append(in, life...)
		if a, b := play(t, in), play(t, in); a != b {
			t.Fatalf("two runs of the same events differ: %d, %d", a, b)
		}
	})
}

// TestImageLives plays random lives whose events mostly fit: what the fuzzer reaches only
// after a long time.
func TestImageLives(t *testing.T) {
	lives := 4000 / slower
	for seed := range lives {
		in := imageLife(rand.New(rand.NewPCG(uint64(seed), 1)))
		func() {
			defer func() {
				if r := recover(); r != nil {
					t.Fatalf("seed %d: %v\n%s", seed, r, debug.Stack())
				}
			}()
			play(t, in)
		}()
	}
}

func imageLife(r *rand.Rand) []byte {
	pick := func(b ...byte) byte { return b[r.IntN(len(b))] }
	ts := pick(0, 10) // whether the connections have timestamps
	in := []byte{ts, 2, 0, 0, 0, 0, ts + 1, 0x12, 0, 0, 0, 0, ts, 2, 1, 0, 0, 0, ts + 1, 0x12, 1, 0, 0, 0, ts, 0x10, 0, 1, 1, 1, ts, 0x10, 1, 1, 1, 1}
	for range 20 + r.IntN(60) {
		c, seq, ack := byte(r.IntN(3)), byte(r.IntN(8)), byte(r.IntN(10))
		switch r.IntN(16) {
		case 0, 1, 2:
			in = append(in, pick(0, 160, 40, 130, 10), pick(0x10, 0x18, 0x11, 4, 0x14, 2, 0x10), c, pick(0, 9), seq, ack)
		case 3, 4:
			in = append(in, pick(1, 66, 161, 36, 11, 76, 196), pick(0x10, 0x18, 0x11, 4, 0x14, 2, 0x12, 0x10), c, 9, seq, ack)
		case 5:
			in = append(in, 209, 0+6*byte(r.IntN(42)), pick(0, 1, 2, 0x15, 0x40, 0x80, byte(r.Uint32())))
		case 6:
			in = append(in, 3, 50, 209, 1+6*byte(r.IntN(42)), byte(r.Uint32()))
		case 7, 8:
			in = append(in, 209, 2+6*byte(r.IntN(42)), pick(0, byte(r.Uint32())), pick(0, 0x10, 8, 0x18, byte(r.Uint32())), pick(0, byte(r.Uint32())))
		case 9:
			in = append(in, 2, pick(4, 0x84))
		case 10:
			in = append(in, 209, 5+6*byte(r.IntN(42)))
		case 11:
			in = append(in, 2, pick(5, 6, 7, 0x87, 8, 9, 12), 209, 4+6*byte(r.IntN(42)))
		case 12:
			in = append(in, 249, pick(0, 7, byte(r.Uint32())))
		case 13:
			in = append(in, 2, 16*byte(r.IntN(16))) // between nodes
		case 14:
			in = append(in, 3, pick(1, 30, 255), 2, 15)
		case 15:
			in = append(in, 2, pick(1, 0x21, 2, 3, 13), byte(r.Uint32()))
		}
	}
	return in
}
