package filtertest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// image is what an image of the application holds: the local sides as they are, but for
// the words behind a name. The restored socket is the same end of the link.
func (w *World) image(words []string) ([]filter.ImageSocket, error) {
	var out []filter.ImageSocket
	for _, l := range w.order {
		if l.local.nxt == l.local.iss || slices.Contains(words, "-"+l.name) {
			continue
		}
		k := filter.ImageSocket{
			ID: filter.ConnID{Local: l.own, Remote: l.raddr}, Passive: !l.active,
			RcvNxt: l.local.rcv, SndUna: l.local.nxt, SndNxt: l.local.nxt,
			TS: l.ts, SACK: l.sack, WScale: l.scale >= 0, ECN: l.ecn, RemoteScale: uint8(max(l.scale, 0)), LocalScale: l.lscale,
			TSVal: l.local.ts, MSS: l.mss, RemoteWnd: uint32(l.remote.win) << max(l.scale, 0),
			LocalWnd: uint32(l.local.win) << l.lscale, LocalWup: l.local.rcv,
		}
		for _, word := range words {
			name, list, ok := strings.Cut(word, ":")
			if !ok || name != l.name {
				continue
			}
			for _, x := range strings.Split(list, ",") {
				if err := imageWord(&k, x); err != nil {
					return nil, err
				}
			}
		}
		out = append(out, k)
	}
	return out, nil
}

// imageWord changes what the image says: una, nxt, rcv, wup and ts by ±N, unread=N,
// closed=local or remote.
func imageWord(k *filter.ImageSocket, word string) error {
	key, value, _ := strings.Cut(word, "=")
	if key == "closed" {
		k.LocalClosed, k.RemoteClosed = k.LocalClosed || value == "local", k.RemoteClosed || value == "remote"
		return nil
	}
	n, err := strconv.ParseInt(value, 10, 32)
	if err != nil {
		return fmt.Errorf("image: %q: %w", word, err)
	}
	numbers := map[string]*seqnum.Value{"una": &k.SndUna, "nxt": &k.SndNxt, "rcv": &k.RcvNxt, "wup": &k.LocalWup}
	switch v := numbers[key]; {
	case v != nil:
		*v = v.Add(uint32(n))
	case key == "ts":
		k.TSVal += uint32(n)
	case key == "unread":
		k.Unread = uint32(n)
	default:
		return fmt.Errorf("image: unknown word %q", word)
	}
	return nil
}
