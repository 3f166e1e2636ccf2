package filtertest

import (
	"bufio"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// Run plays a script and returns its trace: every line of the script behind
// "> ", and under it what the engine did. An error names a faulty line, or a
// packet of the engine that no TCP could take.
//
//	app NAME VIP[,VIP] PORT... [!PREFIX]     registers an application; !: not for these remotes
//	link NAME ADDR:PORT [plain|md5|ao|mptcp|ecn|tfo] [lscale N] [mss N] [to PORT]
//	     [without ts|sack|scale] [clock N]   a remote; plain: no options at all; clock: its first
//	                                         TSval; tfo: local takes
//	                                         octets of its SYN; it speaks to port 6379 of 10.0.0.100,
//	                                         or of fd00::100 by its family
//	open NAME                                its handshake with the running local stack
//	dial NAME                                the same, opened by local
//	remote NAME FLAGS [seq ±N] [ack ±N] [win N] [ts ±N] [ecr N] [urg N] [sack L..R] [data TEXT]
//	local  NAME FLAGS [seq ±N] [ack ±N] [win N] [ts ±N] [ecr N] [urg N] [sack L..R] [data TEXT]
//	                                         ecr: its TSecr, as it is in the segment; urg: urgent
//	                                         pointer; sack: a block of what has come behind ack
//	lost remote|local ...                    the same, lost between the filter and the other end
//	icmp NAME MTU                            a router on the way to the remote says that local's
//	                                         last segment was too big
//	newlocal NAME ISS TS [lscale N | without ts|sack|scale | port N]
//	                                         the next local socket of the connection; port: its
//	                                         own, where the application opens it
//	image NAME none | WORDS...               what of the socket is in the image that the next SEAL
//	                                         image brings, where it is not what the socket is: una ±N
//	                                         nxt ±N rcv ±N ts ±N unread N wup ±N (LocalWup), lwin N
//	                                         rwin N (octets), closed local|remote|both|none,
//	                                         without ts
//	restored NAME...                         the local socket is again what the image says, with its
//	                                         numbers, and without the remote's clock
//	behind                                   the application is in a network namespace behind the node
//	raw HEX                                  octets from the network, or from behind the node
//	silent on|off                            whether the local stack answers by itself
//	advance DURATION
//	restart [reboot | lost NAME]             a new filter takes up what was recorded; the set of
//	                                         translated flows has lost that of NAME
//	node NAME [SKEW]                         what follows is on that node, the first is a; its clock
//	                                         is SKEW ahead of node a's
//	request WORDS...                         as in ckptctl ioctl, GETCONNINFO too; besides
//	                                         SNAPSHOTSTART silent ..., SNAPSHOTFREEZE silent,
//	                                         SEAL image [again], RESTORECONN NAME... image;
//	                                         SNAPSHOTSTART and ADOPT without|closing NAME,
//	                                         ADOPT stale NAME, SNAPSHOTSTART line|resp
//	                                         or line NAME, whose socket shows 2 s of silence;
//	                                         NAME!: from before its remote's last octet,
//	                                         SNAPSHOTSTART closing NAME,... OCTETS (unacknowledged),
//	                                         SNAPSHOTFREEZE pass-closes, abort-on-data and a boundary,
//	                                         spool=N, wake=full, heartbeat=MATCH>REPLY,
//	                                         beat=SEND@INTERVAL, beat-closed=SEND@INTERVAL;
//	                                         RESTORECONN NAME... [activate],
//	                                         HANDOVER NODE [ID], HANDBACK NODE, RELEASE [NODE|--force],
//	                                         YIELD and UNYIELD (of RESTOREABORT), STATUS,
//	                                         RESTORESTART ID from NODE [alone]: with what was handed
//	                                         over last, or without
//
// Flags are joined by +, e.g. ACK or FIN+ACK. Numbers are relative: seq to the
// next octet of that end, ack to what it has received. A segment in order moves
// the end's numbers, and the other end's when it is let through.
func Run(script string) (string, error) { return New().run(script) }

// RunBehind is Run with the application in a network namespace behind the node.
func RunBehind(script string) (string, error) {
	w := New()
	w.before = filter.HookPrerouting
	return w.run(script)
}

func (w *World) run(script string) (string, error) {
	sc := bufio.NewScanner(strings.NewReader(script))
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			w.printf("%s\n", line)
			continue
		}
		w.printf("> %s\n", line)
		if err := w.line(line); err != nil {
			return w.out.String(), fmt.Errorf("line %d: %s: %w", n, line, err)
		}
	}
	w.memory()
	if len(w.errs) > 0 {
		return w.out.String(), fmt.Errorf("%s", strings.Join(w.errs, "; "))
	}
	return w.out.String(), nil
}

func (w *World) line(line string) error {
	f := strings.Fields(line)
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	switch f[0] {
	case "app":
		return w.appLine(f[1:])
	case "link":
		return w.linkLine(f[1:])
	case "open":
		l := w.links[arg(1)]
		if l == nil {
			return fmt.Errorf("no link %q", arg(1))
		}
		w.open(l)
		return nil
	case "dial":
		l := w.links[arg(1)]
		if l == nil {
			return fmt.Errorf("no link %q", arg(1))
		}
		w.dial(l)
		return nil
	case "remote", "local":
		return w.segmentLine(f[0] == "remote", line)
	case "newlocal":
		return w.newLocal(f[1:])
	case "lost":
		w.lose = true
		err := w.line(strings.TrimPrefix(line, "lost "))
		w.lose = false
		return err
	case "icmp":
		return w.tooBig(w.links[arg(1)], arg(2))
	case "silent":
		w.silent = arg(1) == "on"
		return nil
	case "behind":
		w.before = filter.HookPrerouting
		return nil
	case "raw":
		var b []byte
		if _, err := fmt.Sscanf(arg(1), "%x", &b); err != nil {
			return err
		}
		w.deliver(filter.HookPrerouting, b)
		return nil
	case "advance":
		d, err := time.ParseDuration(arg(1))
		if err != nil {
			return err
		}
		w.advance(d)
		return nil
	case "node":
		skew := time.Duration(0)
		if arg(2) != "" {
			var err error
			if skew, err = time.ParseDuration(arg(2)); err != nil {
				return err
			}
		}
		w.goTo(arg(1), skew)
		return nil
	case "image":
		return w.imageLine(f[1:])
	case "restored":
		return w.restoredLine(f[1:])
	case "restart":
		if l := w.links[arg(2)]; arg(1) == "lost" && l != nil {
			delete(w.flows, l.raddr)
		}
		return w.restart(arg(1) == "reboot")
	case "request":
		return w.requestLine(f[1:])
	}
	return fmt.Errorf("unknown word %q", f[0])
}

func (w *World) appLine(f []string) error {
	if len(f) < 2 {
		return fmt.Errorf("app needs a name, a VIP and ports")
	}
	r := &filter.Register{App: f[0]}
	for _, v := range strings.Split(f[1], ",") {
		vip, err := netip.ParseAddr(v)
		if err != nil {
			return err
		}
		r.VIPs = append(r.VIPs, vip)
	}
	for _, p := range f[2:] {
		if x, ok := strings.CutPrefix(p, "!"); ok {
			n, err := netip.ParsePrefix(x)
			if err != nil {
				return err
			}
			r.ExcludeAddrs = append(r.ExcludeAddrs, n)
			continue
		}
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return err
		}
		r.Include = append(r.Include, uint16(n))
	}
	w.app = f[0]
	w.request(r)
	return nil
}

func (w *World) linkLine(f []string) error {
	if len(f) < 2 {
		return fmt.Errorf("link needs a name and ADDR:PORT")
	}
	r, err := netip.ParseAddrPort(f[1])
	if err != nil {
		return err
	}
	n := seqnum.Value(len(w.order))
	l := &link{name: f[0], raddr: r, laddr: netip.AddrPortFrom(vips[r.Addr().Is6()], 6379), ts: true, mss: 1460, scale: 7, sack: true, lscale: 7}
	l.remote = end{iss: 0xffffff00 + n*0x1000, win: 500, ts: 1000}
	l.local = end{iss: 0x7ffffff0 + n*0x1000, win: 510, ts: 5000}
	for i := 2; i < len(f); i++ {
		switch f[i] {
		case "plain":
			l.ts, l.scale, l.sack, l.lscale = false, -1, false, 0
		case "ecn":
			l.ecn = true
		case "tfo":
			l.tfo = true
		case "md5", "ao", "mptcp":
			l.option, l.ts = synOptions[f[i]], f[i] == "mptcp"
		default:
			ok, err := l.linkWord(f[i:])
			if err != nil {
				return err
			}
			if !ok {
				return fmt.Errorf("unknown word %q", f[i])
			}
			i++
		}
	}
	l.remote.nxt, l.local.nxt = l.remote.iss, l.local.iss
	w.links[l.name] = l
	w.order = append(w.order, l)
	l.own = l.laddr
	w.byID[filter.ConnID{Local: l.laddr, Remote: l.raddr}] = l
	w.byOwn[filter.ConnID{Local: l.own, Remote: l.raddr}] = l
	return nil
}

// dial plays a handshake of three segments that local begins.
func (w *World) dial(l *link) {
	l.active = true
	l.own = l.laddr
	w.byOwn[filter.ConnID{Local: l.own, Remote: l.raddr}] = l
	w.deliverLocal(l, w.segment(l, false, packet.SYN, 0, 0, nil, nil))
	l.local.nxt = l.local.nxt.Add(1)
	l.remote.rcv, l.remote.base, l.remote.seen = l.local.nxt, l.local.iss, l.local.ts
	w.deliver(filter.HookPrerouting, w.segment(l, true, packet.SYN|packet.ACK, 0, 0, nil, nil))
	l.remote.nxt = l.remote.nxt.Add(1)
	l.local.rcv, l.local.seen, l.local.at = l.remote.nxt, l.remote.ts, w.now
	l.local.una = l.local.nxt
	l.local.seenAt, l.remote.seenAt = w.now, w.now
	l.remote.told = l.remote.nxt
}

// rcvBase is the local's first number as the remote saw it.
func (e *end) rcvBase() seqnum.Value { return e.base }

// open plays a handshake of three segments; a link that was open before begins
// anew with other numbers.
func (w *World) open(l *link) {
	for _, e := range []*end{&l.remote, &l.local} {
		if e.nxt != e.iss {
			e.iss = e.nxt.Add(0x10000)
			e.nxt, e.fin = e.iss, false
		}
	}
	w.deliver(filter.HookPrerouting, w.segment(l, true, packet.SYN, 0, 0, nil, nil))
	l.remote.nxt = l.remote.nxt.Add(1)
	l.local.rcv, l.local.seen, l.local.at = l.remote.nxt, l.remote.ts, w.now
	l.local.seenAt, l.remote.seenAt = w.now, w.now
	w.deliver(filter.HookPostrouting, w.segment(l, false, packet.SYN|packet.ACK, 0, 0, nil, nil))
	l.local.nxt = l.local.nxt.Add(1)
	l.local.una, l.local.peerFin, l.local.clockless = l.local.nxt, false, false
	l.remote.rcv, l.remote.base, l.remote.told, l.remote.seen = l.local.nxt, l.local.iss, l.remote.iss.Add(1), l.local.ts
}

func (w *World) newLocal(f []string) error {
	if len(f) < 3 || w.links[f[0]] == nil {
		return fmt.Errorf("newlocal NAME ISS TS")
	}
	l := w.links[f[0]]
	iss, err := strconv.ParseUint(f[1], 0, 32)
	if err != nil {
		return err
	}
	ts, err := strconv.ParseUint(f[2], 0, 32)
	if err != nil {
		return err
	}
	if l.lacks = ""; len(f) == 5 && f[3] == "without" {
		l.lacks = f[4]
	}
	if len(f) == 5 && f[3] == "lscale" {
		v, err := strconv.Atoi(f[4])
		if err != nil {
			return err
		}
		l.lscale = uint8(v)
	}
	if len(f) == 5 && f[3] == "port" {
		v, err := strconv.ParseUint(f[4], 10, 16)
		if err != nil {
			return err
		}
		l.own = netip.AddrPortFrom(l.laddr.Addr(), uint16(v))
		w.byOwn[filter.ConnID{Local: l.own, Remote: l.raddr}] = l
	}
	l.local = end{iss: seqnum.Value(iss), nxt: seqnum.Value(iss), ts: uint32(ts), win: 400, at: w.now, got: l.local.got, rcv: l.local.rcv, seen: l.local.seen}
	return nil
}

var flagBits = map[string]uint8{"FIN": packet.FIN, "SYN": packet.SYN, "RST": packet.RST, "PSH": packet.PSH, "ACK": packet.ACK, "URG": packet.URG, "ECE": packet.ECE, "CWR": packet.CWR}

// segmentLine plays one segment of an end.
func (w *World) segmentLine(fromRemote bool, line string) error {
	text, data, hasData := strings.Cut(line, " data ")
	f := strings.Fields(text)
	if len(f) < 3 || w.links[f[1]] == nil {
		return fmt.Errorf("a link and flags are needed")
	}
	l := w.links[f[1]]
	var flags uint8
	for _, n := range strings.Split(f[2], "+") {
		b, ok := flagBits[n]
		if !ok && n != "NONE" {
			return fmt.Errorf("unknown flag %q", n)
		}
		flags |= b
	}
	e := &l.local
	if fromRemote {
		e = &l.remote
	}
	var dseq, dack int64
	var win *uint16
	var more extras
	for i := 3; i+1 < len(f); i += 2 {
		if ok, err := more.word(f[i], f[i+1]); err != nil {
			return err
		} else if ok {
			continue
		}
		v, err := strconv.ParseInt(f[i+1], 10, 64)
		if err != nil {
			return err
		}
		switch f[i] {
		case "seq":
			dseq = v
		case "ack":
			dack = v
		case "win":
			x := uint16(v)
			win = &x
		case "ts":
			e.ts += uint32(v)
		default:
			return fmt.Errorf("unknown word %q", f[i])
		}
	}
	var payload []byte
	if hasData {
		s, err := strconv.Unquote(data)
		if err != nil {
			return fmt.Errorf("data %s: %w", data, err)
		}
		payload = []byte(s)
	}
	b := more.apply(w.segment(l, fromRemote, flags, dseq, dack, payload, win))
	if dseq == 0 {
		n := uint32(len(payload))
		if flags&(packet.FIN|packet.SYN) != 0 {
			n++
		}
		e.nxt = e.nxt.Add(n)
		e.fin = e.fin || flags&packet.FIN != 0
	}
	if fromRemote {
		w.deliver(filter.HookPrerouting, b)
	} else {
		w.deliverLocal(l, b)
	}
	w.arrive(l, fromRemote)
	return nil
}

// arrive lets the other end take what the engine let through.
func (w *World) arrive(l *link, fromRemote bool) {
	var s packet.Segment
	if w.passed == nil || w.lose || s.Parse(w.passed) != packet.OK {
		return
	}
	other := &l.local
	if !fromRemote {
		other = &l.remote
	}
	if !fromRemote && s.Has(packet.ACK) && l.remote.told.Less(s.Ack) {
		l.remote.told = s.Ack
	}
	other.noteFin(&s)
	if other.heard(w.now, &s); s.Seq == other.rcv && s.Flags&packet.SYN == 0 {
		if s.PayloadLen() > 0 {
			other.at = w.now
			other.got = append(other.got, s.Payload()...)
		}
		other.rcv = s.End()
	} else if other.rcv.Less(s.Seq) && s.PayloadLen() > 0 {
		other.ahead = []seqnum.Value{s.Seq, s.End()}
	}
}

// Sockets lists the local sockets as the agent does.
func (w *World) Sockets() []filter.Socket { return w.sockets("", "") }

// Play runs a script without looking at its trace.
func (w *World) Play(script string) error {
	for n, line := range strings.Split(script, "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := w.line(line); err != nil {
			return fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	return nil
}

// Segment builds a segment of an end of link name as a script line would.
func (w *World) Segment(name string, fromRemote bool, flags uint8, dseq int64, data []byte) []byte {
	return w.segment(w.links[name], fromRemote, flags, dseq, 0, data, nil)
}

// Now is the time of the node at hand, ns.
func (w *World) Now() filter.Time { return w.now + w.skew }
