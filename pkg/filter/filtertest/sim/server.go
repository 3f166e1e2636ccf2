package sim

import (
	"cmp"
	"net/netip"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// server is the application behind the VIPs. What it knows of its clients
// outlives its process and its sockets, as that of an application does that
// keeps its data on disk.
type server struct {
	w         *world
	listeners []*socket
	socks     []*served
	sessions  map[netip.AddrPort]*session
	up        bool // its process runs
	dials     bool // and opens connections
	stopped   bool // and is stopped (SIGSTOP)
	backlog   int
	kept      map[netip.AddrPort]session // sessions as they were at the snapshot
}

// session is what the application knows of one client.
type session struct {
	c      *client
	got    uint64 // octets read
	ready  uint64 // octets that may be sent
	sent   uint64
	cur    int // exchange under way
	eof    bool
	closed bool // the application closed
	reset  bool

	lazyTill int64 // it does not read before then

	parser parser
	owed   []byte // answers to heartbeats
}

// served is a socket of the present process.
type served struct {
	socket
	s   *session
	key netip.AddrPort
}

const port = 6379

// start is a new process: it listens.
func (v *server) start() {
	v.up, v.stopped, v.socks = true, false, nil
	for _, vip := range v.w.vips {
		wq := &waiter.Queue{}
		ep, err := v.w.local.st.NewEndpoint(tcp.ProtocolNumber, netProto(vip), wq)
		must(err)
		ep.SocketOptions().SetReuseAddress(true)
		must(ep.Bind(fullAddr(netip.AddrPortFrom(vip, port))))
		must(ep.Listen(v.backlog))
		v.listeners = append(v.listeners, &socket{ep, wq})
	}
	v.w.trace.note("the server listens")
}

// kill ends the process: the kernel closes its sockets.
func (v *server) kill() {
	v.w.trace.note("the server is killed")
	v.up, v.dials = false, false
	for _, l := range v.listeners {
		l.ep.Close()
	}
	v.listeners = nil
	slices.SortFunc(v.socks, func(a, b *served) int { return a.key.Compare(b.key) })
	for _, k := range v.socks {
		k.ep.Close()
	}
	v.socks = nil
	for _, d := range v.w.dials {
		d.hangUp()
	}
	v.w.local.settle()
}

// keep stores what the application knows, as its snapshot does.
func (v *server) keep() {
	v.kept = map[netip.AddrPort]session{}
	for _, d := range v.w.dials {
		d.keep()
	}
	for a, s := range v.sessions {
		v.kept[a] = *s
	}
}

// back takes the application back to its snapshot: what a process said that
// was ended before RESTORED, nobody has heard.
func (v *server) back() {
	for _, d := range v.w.dials {
		d.back()
	}
	for a, s := range v.sessions {
		k, ok := v.kept[a]
		if !ok {
			delete(v.sessions, a)
			s.c.s = nil
			continue
		}
		k.ready, k.eof = s.ready, s.eof // work goes on in its own time
		*s = k
	}
}

// pump lets the application do what it can; true when it did something.
func (v *server) pump() bool {
	if !v.up || v.stopped {
		return false
	}
	did := false
	for _, l := range v.listeners {
		for {
			var from tcpip.FullAddress
			ep, wq, err := l.ep.Accept(&from)
			if err != nil {
				break
			}
			v.accept(&socket{ep, wq}, addrPort(from.Addr, from.Port))
			did = true
		}
	}
	for _, k := range v.socks {
		did = v.serve(k) || did
	}
	for _, d := range v.w.dials {
		did = d.pump() || did
	}
	v.socks = slices.DeleteFunc(v.socks, func(k *served) bool { return k.s.closed || k.s.reset })
	return did
}

func (v *server) accept(k *socket, from netip.AddrPort) {
	c := v.w.byAddr[from]
	if c == nil { // an outsider's: nobody answers its SYN-ACK
		k.reset()
		return
	}
	s := v.sessions[from]
	if s == nil || s.c != c {
		s = &session{c: c}
		v.sessions[from], c.s = s, s
	}
	v.w.trace.note("the server accepts client %d (%d octets before)", c.id, s.got)
	if s.closed || s.reset {
		if over := c.over() && s.got == c.plan.up && s.sent == c.plan.down; !c.aborted && !over { // a remote that has closed may answer with RST
			v.w.fail("the server got client %d (%v) again, which had ended", c.id, from)
		}
		k.reset()
		return
	}
	if len(v.socks) > 0 {
		for _, o := range v.socks {
			if o.key == from && !o.s.reset {
				v.w.fail("the server got client %d (%v) twice", c.id, from)
			}
		}
	}
	v.socks = append(v.socks, &served{*k, s, from})
}

// serve reads, works and answers.
func (v *server) serve(k *served) bool {
	did := false
	s, c := k.s, k.s.c
	for !s.eof && s.lazyTill <= v.w.clk.time() {
		b, err := k.read(1 << 20)
		switch {
		case ended(err):
			v.w.trace.note("the server sees the end of client %d after %d octets", c.id, s.got)
			s.eof, did = true, true
			if !c.shut && !c.aborted {
				v.w.fail("the server saw a close that client %d (%v) did not make", c.id, c.addr)
			}
			continue
		case err != nil && !wouldBlock(err):
			return v.lost(k, err)
		case err != nil:
		default:
			did = true
			if !v.took(k, b) {
				return true
			}
			continue
		}
		break
	}
	for len(s.owed) > 0 {
		n, err := k.write(s.owed)
		if err != nil {
			return v.lost(k, err)
		}
		if n == 0 {
			return did
		}
		did = true
		s.owed = s.owed[n:]
		v.w.shim.wrote(k.key, n)
	}
	for s.sent < s.ready {
		b := make([]byte, min(s.ready-s.sent, 16<<10))
		c.plan.fill(b, downward, s.sent)
		n, err := k.write(b)
		if err != nil {
			return v.lost(k, err)
		}
		if n == 0 {
			break
		}
		did = true
		s.sent += uint64(n)
		v.w.shim.wrote(k.key, n)
	}
	all := len(s.owed) == 0 && s.sent == c.plan.down && s.cur == len(c.plan.exchanges)
	if s.eof || all && c.plan.end == serverCloses {
		if s.eof && s.got != c.plan.up && !c.aborted {
			v.w.fail("the server saw the end of client %d (%v) after %d of %d octets", c.id, c.addr, s.got, c.plan.up)
		}
		if s.eof && !all && !c.aborted { // a reply is still worked on
			return did
		}
		v.w.trace.note("the server closes client %d", c.id)
		s.closed = true
		k.ep.Close()
		return true
	}
	return did
}

// took takes octets of a client; false when they are wrong.
func (v *server) took(k *served, b []byte) bool {
	s, c := k.s, k.s.c
	v.w.shim.read(k.key, len(b))
	if h := v.w.beats; h != nil {
		var ok bool
		b, ok = s.parser.data(b, [][]byte{h.ask}, func(byte) bool {
			s.owed = append(slices.Clip(s.owed), h.reply...) // a copy may be kept with the snapshot
			return true
		})
		if !ok {
			v.w.fail("the server got a broken heartbeat of client %d (%v) at %d", c.id, c.addr, s.got)
			return false
		}
	}
	if i := c.plan.check(b, upward, s.got); i >= 0 || s.got+uint64(len(b)) > c.sent {
		v.w.fail("the server got a wrong octet of client %d (%v) at %d", c.id, c.addr, s.got+uint64(max(i, 0)))
		return false
	}
	s.got += uint64(len(b))
	for s.cur < len(c.plan.exchanges) && s.got >= c.plan.ends[s.cur] {
		x := c.plan.exchanges[s.cur]
		end := c.plan.downEnds[s.cur]
		s.cur++
		if x.lazy != 0 {
			s.lazyTill = v.w.clk.time() + int64(x.lazy)
			v.w.clk.at(s.lazyTill, func() { v.w.local.settle() })
		}
		if x.work == 0 {
			s.ready = end
			continue
		}
		v.w.clk.after(x.work, func() {
			s.ready = max(s.ready, end)
			v.w.local.settle()
		})
	}
	return true
}

// lost takes note of a connection that was reset.
func (v *server) lost(k *served, err tcpip.Error) bool {
	c := k.s.c
	v.w.trace.note("the server lost client %d: %v", c.id, err)
	k.s.reset = true
	k.ep.Close()
	if !c.aborted && !(c.closed && k.s.got == c.plan.up && k.s.sent == c.plan.down) {
		v.w.fail("the server lost client %d (%v): %v", c.id, c.addr, err)
	}
	return true
}

// hasClosed tells whether the application has closed its side of a client.
func (v *server) hasClosed(c *client) bool {
	return c.s != nil && (c.s.closed || c.s.reset)
}

// sockInfo is a socket as sock_diag shows it.
type sockInfo struct {
	filter.Socket
	state        tcp.EndpointState
	recvQ, sendQ uint32
	ep           *tcp.Endpoint
}

// sockets lists what sock_diag shows of the VIPs, listeners left out.
func (v *server) sockets() []sockInfo {
	var out []sockInfo
	now := v.w.clk.time()
	for _, e := range v.w.local.st.RegisteredEndpoints() {
		ep, ok := e.(*tcp.Endpoint)
		if !ok {
			continue
		}
		st := ep.EndpointState()
		switch st {
		case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateFinWait2,
			tcp.StateClosing, tcp.StateLastAck, tcp.StateTimeWait, tcp.StateSynRecv:
		default:
			continue
		}
		id := ep.Info().(*stack.TransportEndpointInfo).ID
		key := addrPort(id.RemoteAddress, id.RemotePort)
		i := sockInfo{state: st, ep: ep}
		i.ID = filter.ConnID{Local: addrPort(id.LocalAddress, id.LocalPort), Remote: key}
		i.Established = st == tcp.StateEstablished || st == tcp.StateCloseWait
		i.CloseWait = st == tcp.StateCloseWait
		i.LocalClosed = st == tcp.StateFinWait1 || st == tcp.StateFinWait2 || st == tcp.StateClosing || st == tcp.StateLastAck
		i.RemoteClosed = st == tcp.StateClosing || st == tcp.StateLastAck
		i.Passive = id.LocalPort == port
		if t := v.w.shim.socks[key]; t != nil {
			v.queues(&i, t, now)
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b sockInfo) int {
		return cmp.Or(a.ID.Remote.Compare(b.ID.Remote), a.ID.Local.Compare(b.ID.Local), cmp.Compare(a.state, b.state))
	})
	return out
}

// queues fills in what the segments and the application tell of a socket.
func (v *server) queues(i *sockInfo, t *track, now int64) {
	n, err := i.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if err != nil {
		n = 0
	}
	i.recvQ = uint32(n)
	acked := t.una.Size(t.iss.Add(1))
	if t.una == t.iss {
		acked = 0
	}
	i.HasInfo = i.state != tcp.StateTimeWait && i.state != tcp.StateSynRecv
	i.BytesAcked, i.BytesReceived = uint64(min(acked, t.written)), uint64(t.read)+uint64(n)
	if t.written > acked {
		i.sendQ = t.written - acked
	}
	if i.LocalClosed && i.state != tcp.StateFinWait2 && acked <= t.written {
		i.sendQ++
	}
	if d := v.w.byDial[i.ID.Remote]; i.CloseWait && d != nil && !d.eof {
		i.recvQ++
	}
	if s := v.sessions[i.ID.Remote]; i.CloseWait && s != nil && !s.eof {
		i.recvQ++
	}
	i.SendQueue = i.sendQ
	i.TS, i.SACK = t.opt.HasTS && t.own.HasTS, t.opt.SACKPermitted && t.own.SACKPermitted
	if i.WScale = t.opt.HasWScale && t.own.HasWScale; i.WScale {
		i.RemoteScale, i.LocalScale = t.opt.WScale, t.own.WScale
	}
	i.SndMSS = uint32(t.opt.MSS)
	if i.TS {
		i.SndMSS -= 12
	}
	i.LastRecv, i.LastSent = now-t.lastIn, now-t.lastOut
}
