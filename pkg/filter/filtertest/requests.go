package filtertest

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

func (w *World) requestLine(f []string) error {
	if len(f) == 0 {
		return fmt.Errorf("a request is needed")
	}
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	if w.between(f) {
		return nil
	}
	app := w.app
	switch f[0] {
	case "SNAPSHOTSTART":
		r := &filter.SnapshotStart{App: app, Listen: []uint16{6379}}
		how := ""
		if r.Silent = arg(1) == "silent"; r.Silent {
			f, how = f[1:], "silent"
		}
		r.LeaveOut = arg(1) == "leave-out"
		if arg(1) == "line" || arg(1) == "resp" {
			r.Boundary = arg(1)
		}
		if arg(1) != "blind" {
			r.Sockets = w.sockets(cmp.Or(arg(1), how), arg(2))
		}
		if arg(3) != "" {
			n, err := strconv.ParseUint(arg(3), 10, 32)
			if err != nil {
				return err
			}
			sendQueue(r.Sockets, uint32(n))
		}
		w.request(r)
		w.advance(20 * time.Millisecond)
	case "GETCONNINFO":
		w.request(&filter.GetConnInfo{App: app})
	case "ADOPT":
		r := &filter.Adopt{App: app, Listen: []uint16{6379}, At: w.now + w.skew}
		if arg(1) == "stale" { // as it was two seconds ago
			r.Sockets, r.At = w.sockets("without", arg(2)), w.now+w.skew-2e9
		} else {
			r.Sockets = w.sockets(arg(1), arg(2))
		}
		w.request(r)
	case "SNAPSHOTFREEZE":
		r := &filter.SnapshotFreeze{App: app}
		for _, word := range f[1:] {
			if err := freezeWord(r, word); err != nil {
				return err
			}
		}
		w.request(r)
	case "SEAL":
		r := &filter.Seal{App: app}
		if arg(1) == "image" {
			r.Image = w.image()
			r.Again = arg(2) == "again"
		}
		w.request(r)
	case "SNAPSHOTDONE":
		w.request(&filter.SnapshotDone{App: app, ID: arg(1), Force: arg(2) == "--force"})
	case "SNAPSHOTABORT":
		w.request(&filter.SnapshotAbort{App: app})
	case "RESTORECONN":
		r := &filter.RestoreConn{App: app, Kind: "syn"}
		if k := f[len(f)-1]; k == "activate" || k == "image" {
			r.Kind = k
		}
		for _, n := range f[1:] {
			if l := w.links[n]; l != nil {
				r.Conns = append(r.Conns, filter.ConnID{Local: l.laddr, Remote: l.raddr})
			}
		}
		w.request(r)
	case "RESTORED":
		w.request(&filter.Restored{App: app, ResetMissing: arg(1) == "--reset"})
	case "RESTOREABORT":
		w.request(&filter.RestoreAbort{App: app})
	case "UNREGISTER":
		w.request(&filter.Unregister{App: app, Force: arg(1) == "--force"})
	default:
		return fmt.Errorf("unknown request %q", f[0])
	}
	return nil
}

// sockets is what sock_diag would show. "without NAME" leaves one out: it was
// opened after the look; "closing NAME,..." shows some in FIN_WAIT1, "silent" all
// that have closed, as sockets that a process still has.
func (w *World) sockets(how, name string) []filter.Socket {
	out := []filter.Socket{}
	for _, l := range w.order {
		closing := how == "closing" && slices.Contains(strings.Split(name, ","), l.name) || how == "silent" && l.local.fin
		if l.local.nxt == l.local.iss || l.local.fin && !closing || how == "without" && l.name == name {
			continue
		}
		idle := w.now - l.local.at
		if idle < 24*3600e9 { // shorter times do not matter to any scenario
			idle = 0
		}
		sent := filter.Time(0)
		took := uint64(l.local.rcv.Size(l.remote.iss.Add(1)))
		if how == "line" && strings.TrimSuffix(name, "!") == l.name {
			idle, sent = 2e9, 2e9
			if l.name != name {
				took--
			}
		}
		out = append(out, filter.Socket{
			LastRecv: idle, LastSent: sent,
			ID:          filter.ConnID{Local: l.own, Remote: l.raddr},
			Established: !closing, LocalClosed: closing, RemoteClosed: how == "silent" && closing && l.local.peerFin, Owned: how == "silent", CloseWait: !closing && l.remote.fin && l.local.rcv == l.remote.nxt, Passive: !l.active, HasInfo: true,
			TS: l.ts, SACK: l.sack, WScale: l.scale >= 0, RemoteScale: uint8(max(l.scale, 0)), LocalScale: l.lscale,
			SndMSS: 1448, BytesReceived: took,
			BytesAcked: uint64(l.remote.rcv.Size(l.remote.rcvBase().Add(1))),
		})
	}
	return out
}

// sendQueue has those that are closing show n octets unacknowledged.
func sendQueue(socks []filter.Socket, n uint32) {
	for i := range socks {
		if socks[i].LocalClosed {
			socks[i].SendQueue = n
		}
	}
}
