package filter

import (
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// Time is a moment of the caller's monotonic clock, in ns. It must outlast a
// suspended machine (CLOCK_BOOTTIME).
type Time = int64

// Netfilter hooks that packets come from (include/uapi/linux/netfilter.h). Local
// segments come from the output hook, or, where the application is in a network
// namespace behind the node, from the one before routing.
const (
	HookPrerouting  = 0
	HookOutput      = 3
	HookPostrouting = 4
)

// Flags of NFQA_SKB_INFO (include/uapi/linux/netfilter/nfnetlink_queue.h).
const (
	CsumNotReady    = 1 // the checksum field holds a partial sum
	GSO             = 2
	CsumNotVerified = 4
)

// Packet is one queued packet. Its octets belong to the event until Step
// returns; an accepted packet may be rewritten in them.
type Packet struct {
	Hook      uint8
	Info      uint32
	Truncated bool
	Data      []byte // from the IP header on
}

// Event is one input of the engine: a packet, a request, or neither when a
// deadline passed.
type Event struct {
	Packet  *Packet
	Request *Request
}

// Request is a request of the control API. ID comes back in its Reply.
type Request struct {
	ID   uint64
	Body any
}

// Verdict on a queued packet.
type Verdict uint8

// Verdicts. Modified: accepted with the octets of Effects.Out.
const (
	Drop Verdict = iota
	Accept
	Modified
)

// Send is a packet to inject. Tracked ones are seen by connection tracking.
type Send struct {
	Data    []byte
	Tracked bool
}

// Set is one of the address sets that the packet rules look into.
type Set uint8

// Sets, as in the rules' description.
const (
	SetVIP Set = iota
	SetFull
	SetAway
	SetActive
	SetSkip
	SetFlow
)

// SetChange adds an element to a set or deletes it. Flow: IP and Port are the
// remote's, Peer the VIP; Skip: IP is the VIP; others: only IP, the VIP.
type SetChange struct {
	Set  Set
	Add  bool
	IP   netip.Addr
	Port uint16
	Peer netip.Addr
}

// ConnID names a connection by its addresses as the remote sees them.
type ConnID struct{ Local, Remote netip.AddrPort }

// Reply answers the request with this ID.
type Reply struct {
	ID   uint64
	Body any // a result type of this package
	Err  error
}

// RestoreRequest asks the application scheduler to bring App back.
type RestoreRequest struct {
	App string
	IP  netip.Addr
}

// Note is something that an operator wants in the log.
type Note struct {
	App   string
	State appstate.App
	Text  string
}

// Effects is what Step wants done, in a struct that is reused. The caller
// does, in this order: Records, Untrack, Sets, the verdict, Sends, Replies, Restores.
// Verdict, Reason and Out are those of the last packet; everything else
// gathers until Reset.
type Effects struct {
	Records  []Record
	Verdict  Verdict
	Reason   Reason
	Out      []byte
	Untrack  []ConnID
	Sets     []SetChange
	Sends    []Send
	Replies  []Reply
	Restores []RestoreRequest
	Notes    []Note

	arena arena
}

// Reset empties e for the next batch.
func (e *Effects) Reset() {
	clear(e.Records)
	e.Records = e.Records[:0]
	e.Untrack, e.Sets, e.Sends = e.Untrack[:0], e.Sets[:0], e.Sends[:0]
	e.Replies, e.Restores, e.Notes = e.Replies[:0], e.Restores[:0], e.Notes[:0]
	e.arena.reset()
}

// Heavy tells that the gathered sends should be done before more are added.
func (e *Effects) Heavy() bool { return len(e.Sends) >= 1024 || e.arena.used > 4<<20 }

// send builds the segment of sp and queues it.
func (e *Effects) send(sp *packet.Spec, tracked bool) {
	e.Sends = append(e.Sends, Send{Data: sp.Build(e.arena.alloc(sp.Size())), Tracked: tracked})
}

func (e *Effects) drop(r Reason)   { e.Verdict, e.Reason, e.Out = Drop, r, nil }
func (e *Effects) accept(r Reason) { e.Verdict, e.Reason, e.Out = Accept, r, nil }

func (e *Effects) modified(r Reason, b []byte) { e.Verdict, e.Reason, e.Out = Modified, r, b }

// arena hands out octets that stay where they are until reset.
type arena struct {
	chunks [][]byte
	cur    int
	off    int
	used   int
}

const chunkSize = 256 << 10

func (a *arena) alloc(n int) []byte {
	for {
		if a.cur == len(a.chunks) {
			a.chunks = append(a.chunks, make([]byte, max(chunkSize, n)))
		}
		if c := a.chunks[a.cur]; a.off+n <= len(c) {
			b := c[a.off : a.off+n : a.off+n]
			a.off += n
			a.used += n
			return b
		}
		a.cur++
		a.off = 0
	}
}

func (a *arena) reset() {
	if len(a.chunks) > 32 { // a burst is over: give its memory back
		a.chunks = a.chunks[:32:32]
	}
	a.cur, a.off, a.used = 0, 0, 0
}
