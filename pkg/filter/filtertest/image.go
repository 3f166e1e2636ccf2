package filtertest

import (
	"fmt"
	"strconv"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// imageLine keeps what of a link's socket the image tells otherwise.
func (w *World) imageLine(f []string) error {
	if len(f) < 2 || w.links[f[0]] == nil {
		return fmt.Errorf("image needs a link and words")
	}
	w.links[f[0]].override = f[1:]
	return nil
}

// image is what a dump of the local sockets says.
func (w *World) image() []filter.ImageSocket {
	var out []filter.ImageSocket
	for _, l := range w.order {
		words := l.override
		l.override, l.imaged = nil, nil
		if l.local.nxt == l.local.iss || len(words) == 1 && words[0] == "none" {
			continue
		}
		k := l.dump()
		for i := 0; i+1 < len(words); i += 2 {
			if err := overrideWord(&k, words[i], words[i+1]); err != nil {
				w.fail(err.Error())
			}
		}
		l.imaged = &k
		out = append(out, k)
	}
	return out
}

// dump is the socket as it is.
func (l *link) dump() filter.ImageSocket {
	e := &l.local
	return filter.ImageSocket{
		ID: filter.ConnID{Local: l.own, Remote: l.raddr}, Passive: !l.active, LocalClosed: e.fin, RemoteClosed: e.peerFin,
		RcvNxt: e.rcv, SndUna: e.una, SndNxt: e.nxt,
		TS: l.ts, SACK: l.sack, WScale: l.scale >= 0, ECN: l.ecn, RemoteScale: uint8(max(l.scale, 0)), LocalScale: l.lscale,
		TSVal: e.ts, MSS: l.mss, RemoteWnd: uint32(l.remote.win) << max(l.scale, 0), LocalWnd: uint32(e.win) << l.lscale, LocalWup: e.rcv,
	}
}

func overrideWord(k *filter.ImageSocket, name, value string) error {
	switch name + " " + value {
	case "closed local", "closed remote", "closed both", "closed none":
		k.LocalClosed = value == "local" || value == "both"
		k.RemoteClosed = value == "remote" || value == "both"
		return nil
	case "without ts":
		k.TS = false
		return nil
	}
	v, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return err
	}
	n := uint32(v)
	switch name {
	case "una":
		k.SndUna = k.SndUna.Add(n)
	case "nxt":
		k.SndNxt = k.SndNxt.Add(n)
	case "rcv":
		k.RcvNxt = k.RcvNxt.Add(n)
	case "ts":
		k.TSVal += n
	case "unread":
		k.Unread = n
	case "wup":
		k.LocalWup = k.LocalWup.Add(n)
	case "lwin":
		k.LocalWnd = n
	case "rwin":
		k.RemoteWnd = n
	default:
		return fmt.Errorf("unknown word %q of an image", name)
	}
	return nil
}

// restoredLine makes local sockets what the image says. Neither the remote's clock
// nor what it has acknowledged since is in it.
func (w *World) restoredLine(f []string) error {
	for _, name := range f {
		l := w.links[name]
		if l == nil || l.imaged == nil {
			return fmt.Errorf("no socket of %q is in an image", name)
		}
		k, e := l.imaged, &l.local
		e.nxt, e.una, e.rcv, e.ts = k.SndNxt, k.SndUna, k.RcvNxt, k.TSVal
		e.fin, e.peerFin, e.ahead = k.LocalClosed, k.RemoteClosed, nil
		e.seen, e.at = 0, w.now
		e.clockless, e.wup = true, k.LocalWup
	}
	return nil
}

// acked notes what s, a segment for local, acknowledges.
func (e *end) acked(s *packet.Segment) {
	if s.Has(packet.ACK) && e.una.Less(s.Ack) && s.Ack.LessEq(e.nxt) {
		e.una = s.Ack
	}
}

// noteFin notes that s, a segment for this end, brings the other side's FIN in order.
func (e *end) noteFin(s *packet.Segment) {
	if s.Has(packet.FIN) && !s.Has(packet.SYN) && s.Seq == e.rcv {
		e.peerFin = true
	}
}

// RemoteTakes has remotes take the octets that the filter itself sends them.
func (w *World) RemoteTakes() { w.takes = true }
