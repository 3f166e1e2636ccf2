package sim

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// node is the kernel of the node as far as packets pass the filter: the sets
// and the packet rules (docs/architecture.md).
type node struct {
	sets  [filter.SetFlow]map[netip.Addr]bool
	flows map[flowKey]bool
}

// flowKey is an element of the set of translated flows.
type flowKey struct {
	remote netip.AddrPort
	vip    netip.Addr
}

func newNode() *node {
	n := &node{flows: map[flowKey]bool{}}
	for i := range n.sets {
		n.sets[i] = map[netip.Addr]bool{}
	}
	return n
}

func (n *node) change(c filter.SetChange) {
	if c.Set == filter.SetFlow {
		k := flowKey{netip.AddrPortFrom(c.IP, c.Port), c.Peer}
		if c.Add {
			n.flows[k] = true
		} else {
			delete(n.flows, k)
		}
		return
	}
	if c.Add {
		n.sets[c.Set][c.IP] = true
	} else {
		delete(n.sets[c.Set], c.IP)
	}
}

func (n *node) anyActive() bool { return len(n.sets[filter.SetActive]) > 0 }

// rule is what the packet rules do with a packet.
type rule uint8

const (
	pass   rule = iota
	queue       // dropped where there is no filter
	bypass      // queued, and let by where there is no filter
)

const edgeFlags = packet.SYN | packet.FIN | packet.RST

// prerouting is chain NFCF-IN.
func (n *node) prerouting(s *packet.Segment) rule {
	vip, edge := s.Dst.Addr(), s.Flags&edgeFlags != 0
	switch {
	case !edge && !n.sets[filter.SetActive][vip]:
		return pass
	case n.sets[filter.SetAway][vip], n.flows[flowKey{s.Src, vip}]:
		return queue
	case n.sets[filter.SetFull][vip], edge && n.sets[filter.SetVIP][vip]:
		return bypass
	}
	return pass
}

// output is chain NFCF-OUT.
func (n *node) output(s *packet.Segment) rule {
	vip, edge := s.Src.Addr(), s.Flags&edgeFlags != 0
	switch {
	case !edge && !n.sets[filter.SetActive][vip]:
		return pass
	case n.sets[filter.SetAway][vip]:
		return queue
	case edge && n.sets[filter.SetVIP][vip]:
		return bypass
	}
	return pass
}

// postrouting is chain NFCF-POST, which is there only while something is
// active.
func (n *node) postrouting(s *packet.Segment) rule {
	vip, edge := s.Src.Addr(), s.Flags&edgeFlags != 0
	switch {
	case !n.anyActive(), !edge && !n.sets[filter.SetActive][vip]:
		return pass
	case n.flows[flowKey{s.Dst, vip}]:
		return queue
	case edge && n.sets[filter.SetAway][vip]:
		return queue
	case n.sets[filter.SetFull][vip], edge && n.sets[filter.SetVIP][vip]:
		return bypass
	}
	return pass
}

// fromRemote takes a packet that came over the network.
func (w *world) fromRemote(b []byte) {
	if b[0]>>4 == 4 && (!header.IPv4(b).IsValid(len(b)) || !header.IPv4(b).IsChecksumValid()) {
		return // the kernel drops it before any rule
	}
	var s packet.Segment
	if s.Parse(b) == packet.NotTCP {
		return
	}
	w.trace.packet("arrives", "", b)
	w.rep.Packets++
	if w.rebooted { // nobody has the address
		w.emptyLost[src(b)] = true
		return
	}
	s.Parse(b)
	switch w.node.prerouting(&s) {
	case pass:
		w.toLocal(b)
	case bypass:
		if w.engine == nil {
			w.toLocal(b)
			return
		}
		w.queued(filter.HookPrerouting, filter.CsumNotVerified, b, w.toLocal)
	case queue:
		w.queued(filter.HookPrerouting, filter.CsumNotVerified, b, w.toLocal)
	}
}

// fromLocal takes a packet that the local stack sends.
func (w *world) fromLocal(b []byte) {
	b = w.shim.outbound(b)
	w.trace.packet("local", "", b)
	w.rep.Packets++
	var s packet.Segment
	switch s.Parse(b) {
	case packet.OK:
	case packet.NotTCP: // an ICMP message about a damaged header; no rule matches it
		w.toRemote(b)
		return
	default:
		panic("the local stack sent a broken segment")
	}
	before, info := uint8(filter.HookOutput), uint32(0)
	if w.behind {
		before = filter.HookPrerouting
	} else if w.offload {
		info = filter.CsumNotReady
		partial(b)
	}
	if r := w.node.output(&s); r == queue || r == bypass && w.engine != nil {
		var passed []byte
		w.queued(before, info, b, func(b []byte) { passed = b })
		if passed == nil {
			return
		}
		b = passed
		s.Parse(b)
		if info != 0 && s.ChecksumOK() {
			info = 0 // the filter has completed it
		}
	}
	out := func(b []byte) {
		if s.Parse(b); info != 0 && !s.ChecksumOK() {
			s.FillChecksum() // by the device
		}
		w.toRemote(b)
	}
	if r := w.node.postrouting(&s); r == queue || r == bypass && w.engine != nil {
		w.queued(filter.HookPostrouting, info, b, out)
		return
	}
	out(b)
}

// partial leaves the checksum of a segment to the device: the field holds
// something that is not the checksum.
func partial(b []byte) {
	at := tcpAt(b)
	b[at+16], b[at+17] = b[at+16]^0x5a, b[at+17]^0xa5
}

// queued hands a packet to the engine; on takes it when it goes on.
func (w *world) queued(hook uint8, info uint32, b []byte, on func([]byte)) {
	if w.engine == nil {
		w.rep.DroppedDown++
		w.emptyLost[src(b)] = true
		w.trace.packet("no filter", "", b)
		return
	}
	p := &filter.Packet{Hook: hook, Info: info, Data: b}
	w.step(filter.Event{Packet: p}, on)
}

// toLocal delivers a packet to the local stack, a moment later.
func (w *world) toLocal(b []byte) {
	c := append([]byte(nil), b...)
	h := w.local
	w.clk.at(w.clk.time()+w.localDelay, func() {
		w.trace.packet("to local", "", c)
		if w.local == h {
			w.shim.inbound(c)
			w.local.inject(c)
			w.shim.done()
		}
	})
}

// toRemote sends a packet to the remotes.
func (w *world) toRemote(b []byte) {
	w.check.leaves(b)
	w.down.send(b)
}
