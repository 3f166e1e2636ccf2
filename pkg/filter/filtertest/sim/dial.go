package sim

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// dial is a connection that the application opens to a server of its own on a
// remote host. The application is the side that asks; what it knows of the
// connection outlives its process, and the next process opens it again.
type dial struct {
	w    *world
	id   int
	plan *plan
	vip  netip.Addr
	to   netip.AddrPort // where only this connection goes

	wanted    bool // the application wants it
	sock      *socket
	port      uint16 // of ours, as the remote knows it
	connected bool
	was       bool // the remote has seen it connected
	cur       int  // exchange under way
	allowed   uint64
	sent, got uint64
	eof, done bool   // the remote has closed; so has the application
	keptSent  uint64 // as it was at the snapshot
	keptWas   bool
	life      int // attempts that came to nothing before this one
	last      uint16
	dead      map[uint16]bool // ports of attempts that went with their process

	listener  *socket
	far       []farSocket // the remote's, more than one where an attempt was given up
	farGot    uint64
	farCur    int
	farReady  uint64
	farSent   uint64
	farClosed bool
}

// farSocket is one of the remote server.
type farSocket struct {
	*socket
	port uint16 // of the application
}

// makeDials draws what the application opens, at servers of the remote stack.
func (w *world) makeDials(r *rand.Rand) (addrs []netip.Addr) {
	w.byDial = map[netip.AddrPort]*dial{}
	if r.IntN(3) != 0 || w.opt.NoDials {
		return nil
	}
	addrs = []netip.Addr{netip.MustParseAddr("10.0.2.1"), netip.MustParseAddr("fd02::1")}
	for i := range 1 + r.IntN(4) {
		d := &dial{w: w, id: i, dead: map[uint16]bool{}, plan: randomPlan(r, &w.opt, 0xff)}
		six := 0
		if r.IntN(3) == 0 {
			six = 1
		}
		d.vip, d.to = w.vips[six], netip.AddrPortFrom(addrs[six], uint16(5000+i))
		if d.plan.end != serverCloses {
			d.plan.end = clientCloses
		}
		w.dials = append(w.dials, d)
		w.byDial[d.to] = d
		w.clk.after(time.Duration(r.Int64N(int64(3*time.Second))), func() {
			d.wanted = true
			w.local.settle()
		})
	}
	return addrs
}

// listen starts the remote servers.
func (w *world) listen() {
	for _, d := range w.dials {
		wq := &waiter.Queue{}
		ep, err := w.remote.st.NewEndpoint(tcp.ProtocolNumber, netProto(d.vip), wq)
		must(err)
		must(ep.Bind(fullAddr(d.to)))
		must(ep.Listen(8))
		d.listener = &socket{ep, wq}
	}
}

// pump lets the application do what it can with the connection.
func (d *dial) pump() bool {
	w := d.w
	switch {
	case !d.wanted || d.done:
		return false
	case d.sock == nil:
		return w.server.dials && d.open()
	case !d.connected:
		return d.connecting()
	}
	did := false
	for !d.eof {
		b, err := d.sock.read(1 << 20)
		if ended(err) {
			d.eof, did = true, true
			if !d.farClosed || d.got != d.plan.down {
				w.fail("connection %d of the application (%v) was closed after %d of %d octets", d.id, d.to, d.got, d.plan.down)
			}
			break
		}
		if wouldBlock(err) {
			break
		}
		if err != nil {
			return d.lost(err)
		}
		did = true
		w.shim.read(d.to, len(b))
		if i := d.plan.check(b, downward, d.got); i >= 0 || d.got+uint64(len(b)) > d.farSent {
			w.fail("the application got a wrong octet on its connection %d (%v) at %d", d.id, d.to, d.got+uint64(max(i, 0)))
			return true
		}
		d.got += uint64(len(b))
		for d.cur < len(d.plan.exchanges) && d.got >= d.plan.downEnds[d.cur] {
			d.cur++
			d.next()
		}
	}
	for d.sent < d.allowed {
		b := make([]byte, min(d.allowed-d.sent, 16<<10))
		d.plan.fill(b, upward, d.sent)
		n, err := d.sock.write(b)
		if err != nil {
			return d.lost(err)
		}
		if n == 0 {
			break
		}
		did = true
		d.sent += uint64(n)
		w.shim.wrote(d.to, n)
	}
	if d.eof || d.cur == len(d.plan.exchanges) && d.plan.end == clientCloses {
		w.trace.note("the application closes its connection %d", d.id)
		d.done = true
		d.sock.ep.Close()
		return true
	}
	return did
}

// next lets the application ask after a while.
func (d *dial) next() {
	if d.cur == len(d.plan.exchanges) {
		return
	}
	end, life := d.plan.ends[d.cur], d.life
	d.w.clk.after(d.plan.exchanges[d.cur].think, func() {
		if d.life != life {
			return
		}
		d.allowed = max(d.allowed, end)
		d.w.local.settle()
	})
}

func (d *dial) open() bool {
	w := d.w
	wq := &waiter.Queue{}
	ep, err := w.local.st.NewEndpoint(tcp.ProtocolNumber, netProto(d.vip), wq)
	must(err)
	d.sock, d.connected = &socket{ep, wq}, false
	must(ep.Bind(fullAddr(netip.AddrPortFrom(d.vip, 0))))
	a, err := ep.GetLocalAddress()
	must(err)
	d.last = a.Port
	delete(d.dead, a.Port)
	if !d.was {
		d.port = a.Port
	}
	w.trace.note("the application opens connection %d from port %d", d.id, a.Port)
	if err := ep.Connect(fullAddr(d.to)); err != nil {
		if _, ok := err.(*tcpip.ErrConnectStarted); !ok {
			panic(err.String())
		}
	}
	return true
}

func (d *dial) connecting() bool {
	switch d.sock.state() {
	case tcp.StateEstablished, tcp.StateCloseWait:
		d.w.trace.note("connection %d of the application is open", d.id)
		if d.connected = true; !d.was {
			if d.was = true; len(d.far) > 0 { // it is one that an earlier process had begun to open
				d.port = d.far[0].port
			}
			d.next()
		}
		return true
	case tcp.StateError, tcp.StateClose:
		d.w.trace.note("connection %d of the application cannot be opened: %v", d.id, d.sock.ep.LastError())
		d.sock.ep.Close()
		d.sock = nil
		d.wanted = false
		d.w.clk.after(50*time.Millisecond, func() {
			d.wanted = true
			d.w.local.settle()
		})
		return true
	}
	return false
}

func (d *dial) lost(err tcpip.Error) bool {
	d.sock.ep.Close()
	d.sock = nil
	d.done = true
	d.w.fail("the application lost its connection %d (%v): %v, with %d of %d octets sent and %d of %d received",
		d.id, d.to, err, d.sent, d.plan.up, d.got, d.plan.down)
	return true
}

// pumpFar lets the remote server do what it can.
func (d *dial) pumpFar() bool {
	did := false
	for {
		var from tcpip.FullAddress
		ep, wq, err := d.listener.ep.Accept(&from)
		if err != nil {
			break
		}
		if d.dead[from.Port] {
			(&socket{ep, wq}).reset()
			continue
		}
		if d.farGot > 0 {
			d.w.fail("the remote got connection %d of the application (%v) again, after %d octets", d.id, d.to, d.farGot)
		}
		d.far = append(d.far, farSocket{&socket{ep, wq}, from.Port})
		did = true
	}
	for i := 0; i < len(d.far); i++ {
		b, err := d.far[i].read(1 << 20)
		switch {
		case ended(err) || err != nil && !wouldBlock(err):
			if over := d.done || d.farClosed || d.farGot == 0 || !d.w.server.up && !d.keptWas; !over {
				d.w.fail("the remote lost connection %d of the application (%v) after %d of %d octets: %v", d.id, d.to, d.farGot, d.plan.up, err)
			}
			d.far[i].ep.Close()
			d.far = append(d.far[:i], d.far[i+1:]...)
			return true
		case err != nil:
			continue
		}
		did = true
		if i := d.plan.check(b, upward, d.farGot); i >= 0 || d.farGot+uint64(len(b)) > d.sent {
			d.w.fail("the remote got a wrong octet on connection %d of the application (%v) at %d", d.id, d.to, d.farGot+uint64(max(i, 0)))
			return true
		}
		d.farGot += uint64(len(b))
		d.far[0], d.far[i] = d.far[i], d.far[0] // that which is used
		for d.farCur < len(d.plan.exchanges) && d.farGot >= d.plan.ends[d.farCur] {
			end := d.plan.downEnds[d.farCur]
			d.farCur++
			life := d.life
			d.w.clk.after(d.plan.exchanges[d.farCur-1].work, func() {
				if d.life != life {
					return
				}
				d.farReady = max(d.farReady, end)
				d.w.remote.settle()
			})
		}
	}
	return d.answer() || did
}

// answer writes what the remote server has to say.
func (d *dial) answer() bool {
	if len(d.far) == 0 || d.w.hushed() || d.farClosed {
		return false
	}
	did := false
	for d.farSent < d.farReady {
		b := make([]byte, min(d.farReady-d.farSent, 16<<10))
		d.plan.fill(b, downward, d.farSent)
		n, err := d.far[0].write(b)
		if err != nil {
			d.w.fail("the remote cannot write on connection %d of the application (%v): %v", d.id, d.to, err)
			return true
		}
		if n == 0 {
			return did
		}
		did = true
		d.farSent += uint64(n)
	}
	if d.farSent == d.plan.down && d.plan.end == serverCloses {
		d.w.trace.note("the remote closes connection %d of the application", d.id)
		d.farClosed, did = true, true
		d.far[0].ep.Close()
		d.far = d.far[1:]
	}
	return did
}

// speaks tells whether the remote has said what the application has not heard.
func (d *dial) speaks() bool {
	return d.farSent > d.got || d.farClosed && !d.eof
}

func (d *dial) complete() bool {
	return d.done && d.sent == d.plan.up && d.farGot == d.plan.up && d.got == d.plan.down
}

// keep stores what the application knows of it, as its snapshot does.
func (d *dial) keep() { d.keptSent, d.keptWas = d.sent, d.was }

// back takes it to the snapshot. A connection that was opened in a restore that is
// given up goes with its process, whatever was said on it.
func (d *dial) back() {
	if d.sent = d.keptSent; d.keptWas || !d.was {
		return
	}
	d.w.trace.note("connection %d of the application goes with its process", d.id)
	d.dead[d.last] = true
	d.far = slices.DeleteFunc(d.far, func(k farSocket) bool {
		if k.port == d.last {
			k.reset()
		}
		return k.port == d.last
	})
	*d = dial{w: d.w, id: d.id, plan: d.plan, vip: d.vip, to: d.to, port: d.port, wanted: d.wanted, listener: d.listener, far: d.far, dead: d.dead, life: d.life + 1}
}

// hangUp ends the sockets of a process that is killed.
func (d *dial) hangUp() {
	if d.sock != nil && !d.done {
		d.sock.ep.Close()
	}
	d.sock, d.connected = nil, false
}

// dialAgain lets the restored application open its connections, marked before
// or not.
func (a *agent) dialAgain() {
	w := a.w
	if len(w.dials) == 0 {
		return
	}
	if a.more.IntN(2) == 0 {
		r := &filter.RestoreConn{App: app, Kind: "activate"}
		for _, c := range a.conns().Conns {
			if c.Role == appstate.Active && c.Restorable {
				r.Conns = append(r.Conns, c.ID)
			}
		}
		if _, err := a.request(r); err != nil {
			w.trace.note("not activated: %v", err)
		}
	}
	w.server.dials = true
	w.local.settle()
}

// overAtHome tells whether c is one that the application has closed: nobody opens it again.
func (w *world) overAtHome(c *filter.ConnInfo) bool {
	d := w.byDial[c.ID.Remote]
	return c.Role == appstate.Active && d != nil && (d.done || d.was && d.port != c.ID.Local.Port())
}

func (d *dial) String() string {
	return fmt.Sprintf("connection %d of the application (%v): open %v, %d of %d sent, %d of %d received, done %v; remote: %d received, %d of %d sent, closed %v",
		d.id, d.to, d.connected, d.sent, d.plan.up, d.got, d.plan.down, d.done, d.farGot, d.farSent, d.farReady, d.farClosed)
}
