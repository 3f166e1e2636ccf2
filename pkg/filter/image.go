package filter

import (
	"fmt"
	"slices"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Snapshots by an image: the process is dumped with its sockets (CRIU), so that
// nothing is drained and no handshake follows. From SNAPSHOTFREEZE on local is told
// nothing: what was acknowledged to it would be missing in the image. Its queues are in
// the image, and what it had sent and the remote has not acknowledged is its own to send
// again. Until the seal what it says for the first time still passes: it is in the image,
// whenever that is made, and a restored socket would wait a second before it sends it again.
//
// SEAL brings what the image says of each socket. The numbers must agree, and from
// then on the structures say where the restored socket stands: imgSnd and imgRcv.
// What moves the remote's view behind that, heartbeats, is translated at RESTORED.

// ImageSocket is a TCP socket in an image. Numbers are local's own (criu/images/tcp-stream.proto,
// soccr/soccr.c).
type ImageSocket struct {
	ID           ConnID
	Passive      bool
	LocalClosed  bool // its FIN counts in SndNxt
	RemoteClosed bool // its FIN counts in RcvNxt

	RcvNxt, SndUna, SndNxt seqnum.Value // SndNxt: behind all that the process has written
	Unread                 uint32       // octets in its receive queue
	TS, SACK, WScale, ECN  bool
	RemoteScale            uint8
	LocalScale             uint8
	TSVal                  uint32 // where its clock goes on
	MSS                    uint16 // that the remote announced
	RemoteWnd              uint32 // octets that the remote announced last
	LocalWnd               uint32 // octets that local announced last, from LocalWup on
	LocalWup               seqnum.Value
}

// silence makes the freeze one of an image.
func (e *Engine) silence(now Time, a *app) {
	a.silent, a.sealed, a.imaged = true, true, false
	for _, c := range a.conns {
		c.silence()
	}
}

// silence has the remote answered at the number that it expects: what local has said
// behind it may have been dropped.
func (c *conn) silence() {
	c.frozen, c.confirmed, c.ep.Behind = true, true, true
}

// silentOut is a segment of local, which is being dumped or restored.
func (e *Engine) silentOut(now Time, a *app, c *conn, fx *Effects) {
	s := &e.seg
	fx.drop(SealedSilent)
	switch {
	case c == nil:
	case a.state == appstate.SnapshotFreeze && e.isAnswer(now, c, s, fx):
		fx.drop(AskAnswer)
	case a.state == appstate.SnapshotFreeze && !a.imaged && c.news(s):
		fx.accept(FrozenPass)
		if !c.translated { // else it is seen again behind routing
			c.observeOut(now, s, true)
			if e.mark(c); c.aborts(s) { // nobody asks local again: a filter that starts anew is to know what it said
				e.remove(c, fx)
			}
		}
	case a.state == appstate.RestoreStart && c.image && c.hsDone: // before that it is the old socket
		e.restoredSays(c, fx)
	}
}

// news tells whether s, a segment of local in its own numbers, says something for the
// first time.
func (c *conn) news(s *packet.Segment) bool {
	if s.Has(packet.SYN) || !c.alive() && !s.Has(packet.RST) {
		return false
	}
	return s.Has(packet.RST) || s.Len() > 0 && (!c.learned || c.localSeqOut(c.ep.SndNxt).Less(s.End()))
}

// silentFor tells whether a segment of local, on c, which may be nil, is one for silentOut.
func (c *conn) silentFor(a *app, s *packet.Segment) bool {
	switch {
	case !a.silent || c != nil && c.fresh:
		return false
	case a.state == appstate.SnapshotFreeze:
		return true
	case c == nil || !c.image:
		return false
	}
	return a.state == appstate.SnapshotDone || !s.Has(packet.SYN)
}

// sealImage compares the structures with the image and takes from it what they lack.
// Where something differs nothing may be stopped: the caller gives the snapshot up.
// What says that it repeats one that was carried out is not compared: answers to remotes
// have moved the numbers since, and the process may be gone.
func (e *Engine) sealImage(now Time, b *Seal, a *app, fx *Effects) (any, error) {
	if b.Again && a.imaged {
		return a.result(), nil
	}
	if kept := a.keeping(); a.abortOnData && len(kept) > 0 {
		return nil, &Error{App: a.name, State: a.state, Text: "SEAL refused: data came during the snapshot, which is to be given up for that", Conns: kept}
	}
	a.imaged = false
	for _, c := range a.conns {
		c.image = false
	}
	var lacking []string
	named := map[*conn]bool{}
	for i := range b.Image {
		k := &b.Image[i]
		if !a.wants(k.ID) || e.byVIP[k.ID.Local.Addr()] != a {
			continue
		}
		if why := e.imaged(now, a, k, fx); why != "" {
			named[e.bySocket(k.ID)] = true
			lacking = append(lacking, fmt.Sprintf("%v %v: %s", k.ID.Local, k.ID.Remote, why))
		}
	}
	for _, c := range a.conns {
		if why := c.notImaged(); why != "" && !named[c] {
			lacking = append(lacking, fmt.Sprintf("%v %v: %s", c.id.Local, c.id.Remote, why))
		}
	}
	if len(lacking) > 0 {
		slices.Sort(lacking)
		return nil, &Error{App: a.name, State: a.state, Text: "SEAL refused: the image does not agree with what was seen of these connections", Conns: lacking}
	}
	a.imaged = true
	a.markAll()
	return a.result(), nil
}

// imaged takes one socket of the image; it tells what does not agree.
func (e *Engine) imaged(now Time, a *app, k *ImageSocket, fx *Effects) string {
	c := e.bySocket(k.ID)
	if c != nil && (c.state == appstate.SynRcvd || c.state == appstate.SynSent) {
		c.set(appstate.Connect)
	}
	if c == nil {
		role := appstate.Active
		if k.Passive {
			role = appstate.Passive
		} else if !a.opens(k.ID.Remote.Port()) {
			return ""
		}
		if c = e.newConn(now, a, k.ID, role, appstate.Connect, fx); c == nil {
			return "there is no room for it in the filter's table"
		}
		c.silence()
	}
	switch {
	case c.refused != "":
		return c.refused
	case c.state == appstate.Rst: // the restored socket is told, where it stands
		c.image, c.imgRcv, c.imgWup = true, k.RcvNxt, k.RcvNxt
		c.imgUna, c.imgSnd, c.imgEnd = k.SndUna, c.localSeqOut(c.ep.SndNxt), k.SndNxt
		return ""
	case k.LocalClosed && k.RemoteClosed: // both ends know
		return ""
	}
	if !c.learned {
		c.learnImage(now, k)
	}
	if why := c.disagrees(k); why != "" {
		return why
	}
	c.takeImage(now, k)
	e.trimImage(now, c, fx)
	return ""
}

// learnImage takes everything from the image where local has not told its numbers.
func (c *conn) learnImage(now Time, k *ImageSocket) {
	ep := &c.ep
	if !c.handshake && !c.translated {
		o := &ep.Opt
		o.TS, o.SACK, o.WScale, o.ECN, o.RemoteScale, o.LocalScale, o.MSS = k.TS, k.SACK, k.WScale, k.ECN, k.RemoteScale, k.LocalScale, k.MSS
	}
	ep.RcvNxt = k.RcvNxt.Add(c.tr.In)
	ep.SndUna, ep.Guess = k.SndUna.Add(c.tr.Out), false
	ep.SndNxt = k.SndNxt.Add(c.tr.Out)
	ep.TSVal = k.TSVal + c.tr.TSOut
	ep.RemoteWnd = max(ep.RemoteWnd, k.RemoteWnd)
	wnd := k.LocalWnd - min(k.RcvNxt.Size(k.LocalWup), k.LocalWnd)
	ep.Announced(ep.RcvNxt, uint16(min(wnd>>ep.Opt.LocalScale, 65535)), true)
	c.learned, c.spokeAt = true, now
}

// disagrees names the first number of the image that cannot be.
func (c *conn) disagrees(k *ImageSocket) string {
	// What a socket says while its numbers are read, after its clock was.
	const lastTicks = 10
	ep := &c.ep
	rcv, una, nxt := k.RcvNxt.Add(c.tr.In), k.SndUna.Add(c.tr.Out), k.SndNxt.Add(c.tr.Out)
	owed := c.base()
	if c.owesFin() && !c.spooled {
		owed = owed.Add(^uint32(0))
	}
	switch {
	case rcv.Less(owed):
		return fmt.Sprintf("%d octets that local had acknowledged are not in the image", owed.Size(rcv))
	case ep.Edge.Max(ep.RcvNxt).Add(1).Less(rcv):
		return fmt.Sprintf("the image holds %d octets more than local had a window for", rcv.Size(ep.Edge))
	case nxt.Less(ep.SndNxt):
		return fmt.Sprintf("%d octets that the remote was sent are not in the image", ep.SndNxt.Size(nxt))
	case nxt.Less(una):
		return fmt.Sprintf("the image says that %d octets more are acknowledged than local has sent", una.Size(nxt))
	case nxt.Less(ep.SndUna) && !ep.Guess:
		return fmt.Sprintf("the remote has acknowledged %d octets more than the image says to be sent", ep.SndUna.Size(nxt))
	case ep.Opt.TS != k.TS:
		return "the image and the connection differ in timestamps (RFC 7323)"
	case ep.Opt.TS && seqnum.NewerTS(ep.TSVal, k.TSVal+c.tr.TSOut+lastTicks):
		return fmt.Sprintf("the remote was shown a timestamp %d ahead of the image's", ep.TSVal-k.TSVal-c.tr.TSOut)
	}
	return ""
}

// takeImage notes where the restored socket will stand.
func (c *conn) takeImage(now Time, k *ImageSocket) {
	ep := &c.ep
	rcv, una := k.RcvNxt.Add(c.tr.In), k.SndUna.Add(c.tr.Out)
	if ep.Guess || ep.SndUna.Less(una) {
		ep.SndUna, ep.Guess = una, false
	}
	if !c.spooled && ep.RcvNxt.Less(rcv) { // it took more, and was not heard to say so
		c.bytesIn += uint64(rcv.Size(ep.RcvNxt))
		ep.RcvNxt = rcv
	}
	c.imgUna, c.imgSnd, c.imgRcv, c.imgEnd, c.unread = k.SndUna, ep.SndNxt.Add(-c.tr.Out), k.RcvNxt, k.SndNxt, k.Unread > 0
	c.imgWup = k.RcvNxt
	if back := k.RcvNxt.Sub(k.LocalWup); back > 0 && back < 1<<20 {
		c.imgWup = k.LocalWup
	}
	c.hsIRS = k.RcvNxt.Add(-k.Unread - 1) // where the restored socket begins to count what it received
	c.image, c.ackSeen, c.half = true, true, k.LocalClosed
	if c.finIn = k.RemoteClosed; c.finIn {
		c.finInEnd, c.closeWait = rcv, true
	}
	switch closed := k.RemoteClosed || k.LocalClosed; {
	case closed && c.state == appstate.Connect:
		c.set(appstate.Closing)
		c.remoteFirst = k.RemoteClosed
	case !closed && c.state == appstate.Closing: // what was seen was an outsider's
		c.finOut = false
		c.set(appstate.Connect)
	}
	if c.half && !c.finOut {
		c.finOut, c.finOutEnd, c.finOutAt = true, k.SndNxt.Add(c.tr.Out), now
	}
	c.expire = 0
}

// trimImage forgets what of the kept octets the image holds.
func (e *Engine) trimImage(now Time, c *conn, fx *Effects) {
	if c.spooled {
		rcv := c.imgRcv.Add(c.tr.In)
		e.spoolTaken(now, c, rcv, rcv, fx)
		c.redoAt = 0
	}
	e.trimKept(c)
}

// imageWaits tells whether a remote waits for something that only the process in the image
// can do, and that nobody would say again: octets that it has not read, or that the remote
// has not got, or a reply to what was said just before the freeze.
func (a *app) imageWaits() bool {
	const just = 5e9
	return slices.ContainsFunc(a.conns, func(c *conn) bool {
		return c.image && c.state != appstate.Rst && (c.unread || c.ep.SndUna.Less(c.imgEnd.Add(c.tr.Out)) ||
			c.role == appstate.Passive && c.last == remoteSpoke && a.froze-c.lastIn < just)
	})
}

// notImaged tells why c would be lost: local's socket is not in the image and no
// handshake can bring it back. One that nobody has accepted yet comes back by a
// handshake, if it has said nothing.
func (c *conn) notImaged() string {
	switch {
	case c.image || !c.alive() || !c.learned && !c.listed:
		return ""
	case !c.learned:
		return "its socket is not in the image and its numbers are not known"
	case c.role == appstate.Active, !c.handshake:
		return "its socket is not in the image"
	case c.ep.RcvNxt != c.irs.Add(1) || c.ep.SndNxt != c.iss.Add(1):
		return "its socket is not in the image: the application has not accepted it, and its remote has sent what would be lost; try again"
	}
	return ""
}
