package filtertest

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Remote is the remote of a link as a test sees it that plays it by itself for a
// while.
type Remote struct {
	Local, Addr netip.AddrPort
	Next        seqnum.Value // of its own octets
	Expects     seqnum.Value // of local's
	Told        seqnum.Value // what was acknowledged to it
	Clock, Seen uint32       // its TSval; the newest of local's
	TS          bool
	LocalScale  uint8 // of the windows that it is told, 0: no scaling
	Window      uint16
	LocalWindow uint16 // field that local announces
}

// Remote gives the remote of link name.
func (w *World) Remote(name string) Remote {
	l := w.links[name]
	r := Remote{Local: l.laddr, Addr: l.raddr, Next: l.remote.nxt, Expects: l.remote.rcv, Told: l.remote.told,
		Clock: l.remote.ts, Seen: l.remote.seen, TS: l.ts, Window: l.remote.win, LocalWindow: l.local.win}
	if l.scale >= 0 {
		r.LocalScale = l.lscale
	}
	return r
}

// SetRemote gives the remote of link name back, with the numbers that it has come to.
func (w *World) SetRemote(name string, r Remote) {
	e := &w.links[name].remote
	e.nxt, e.rcv, e.told, e.ts, e.seen, e.seenAt = r.Next, r.Expects, r.Told, r.Clock, r.Seen, w.now
}

// Request hands a request to the engine of the node at hand.
func (w *World) Request(body any) { w.request(body) }

// SetTime moves the clock to where a test that has stepped the engine by itself has
// come to.
func (w *World) SetTime(now filter.Time) { w.now = now - w.skew }

// linkWord reads a word of a link line and its value, the first of f; false: it is
// another word.
func (l *link) linkWord(f []string) (bool, error) {
	if len(f) < 2 || !slices.Contains([]string{"lscale", "mss", "to", "clock", "without"}, f[0]) {
		return false, nil
	}
	if f[0] == "without" {
		switch f[1] {
		case "ts":
			l.ts = false
		case "sack":
			l.sack = false
		case "scale":
			l.scale, l.lscale = -1, 0
		default:
			return false, nil
		}
		return true, nil
	}
	v, err := strconv.ParseUint(f[1], 0, 32)
	if err != nil {
		return false, err
	}
	switch f[0] {
	case "lscale":
		l.lscale = uint8(v)
	case "mss":
		l.mss = uint16(v)
	case "to":
		l.laddr = netip.AddrPortFrom(l.laddr.Addr(), uint16(v))
	case "clock":
		l.remote.ts = uint32(v)
	}
	return true, nil
}
