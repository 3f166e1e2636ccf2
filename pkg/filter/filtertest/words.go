package filtertest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// freezeWord reads one of SNAPSHOTFREEZE's words.
func freezeWord(r *filter.SnapshotFreeze, word string) error {
	key, value, ok := strings.Cut(word, "=")
	switch {
	case word == "pass-closes":
		r.PassCloses = true
		return nil
	case word == "silent":
		r.Silent = true
		return nil
	case word == "abort-on-data":
		r.AbortOnData = true
		return nil
	case !ok:
		r.Boundary = word
		return nil
	}
	anyRemote := netip.MustParsePrefix("0.0.0.0/0")
	both := func(h filter.Heartbeat) {
		h.Remote = anyRemote
		r.Heartbeats = append(r.Heartbeats, h)
		h.Remote = netip.MustParsePrefix("::/0")
		r.Heartbeats = append(r.Heartbeats, h)
	}
	switch key {
	case "spool":
		n, err := strconv.Atoi(value)
		r.Spool = n
		return err
	case "wake":
		r.WakeFull = value == "full"
		return nil
	case "heartbeat":
		match, reply, _ := strings.Cut(value, ">")
		both(filter.Heartbeat{Match: []byte(match), Reply: []byte(reply)})
		return nil
	case "beat", "beat-closed":
		send, every, _ := strings.Cut(value, "@")
		d, err := time.ParseDuration(every)
		both(filter.Heartbeat{Send: []byte(send), Interval: int64(d), OnlyClosed: key == "beat-closed"})
		return err
	}
	return fmt.Errorf("unknown word %q", word)
}

// vips are the addresses of local, by whether they are of IPv6.
var vips = map[bool]netip.Addr{false: netip.MustParseAddr("10.0.0.100"), true: netip.MustParseAddr("fd00::100")}

// synOptions are options that a connection cannot be held with (RFC 2385, RFC
// 5925, RFC 8684), padded to 4 octets.
var synOptions = map[string][]byte{
	"md5":   {1, 1, 19, 18, 19: 0},
	"ao":    {29, 16, 1, 1, 15: 0},
	"mptcp": {30, 12, 1, 1, 11: 0},
}

// extras are the words of a segment line that few scenarios need.
type extras struct {
	ecr         *uint32
	urg         uint16
	left, right int32 // SACK block, relative to the acknowledgement
}

// word takes one word and its value; false: it is another word.
func (x *extras) word(name, value string) (bool, error) {
	switch name {
	case "ecr":
		v, err := strconv.ParseUint(value, 10, 32)
		x.ecr = new(uint32)
		*x.ecr = uint32(v)
		return true, err
	case "urg":
		v, err := strconv.ParseUint(value, 10, 16)
		x.urg = uint16(v)
		return true, err
	case "sack":
		_, err := fmt.Sscanf(value, "%d..%d", &x.left, &x.right)
		return true, err
	}
	return false, nil
}

// apply writes the words into segment b.
func (x *extras) apply(b []byte) []byte {
	var s packet.Segment
	s.Parse(b)
	if x.left != x.right {
		b = withSACK(b, s.Ack.Add(uint32(x.left)), s.Ack.Add(uint32(x.right)))
		s.Parse(b)
	}
	if x.ecr != nil && s.Opt.HasTS {
		s.SetTS(s.Opt.TSVal, *x.ecr)
	}
	if x.urg != 0 {
		binary.BigEndian.PutUint16(b[ipLen(b)+18:], x.urg)
		s.Parse(b)
		s.FillChecksum()
	}
	return b
}

func ipLen(b []byte) int {
	if b[0]>>4 == 6 {
		return 40
	}
	return 20
}

// withSACK rebuilds b with SACK blocks, by their edges, in front of the other options.
func withSACK(b []byte, edges ...seqnum.Value) []byte {
	o := []byte{1, 1, 5, byte(2 + 4*len(edges))}
	for _, e := range edges {
		o = binary.BigEndian.AppendUint32(o, uint32(e))
	}
	return withOption(b, o)
}

// withOption rebuilds b with more options, padded to 4 octets, behind its own.
func withOption(b, opt []byte) []byte {
	ip := ipLen(b)
	hl := int(b[ip+12]>>4) * 4
	out := append([]byte(nil), b[:ip+hl]...)
	out = append(out, opt...)
	out = append(out, b[ip+hl:]...)
	out[ip+12] = byte((hl+len(opt))/4) << 4
	if ip == 40 {
		binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	} else {
		binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
		out[10], out[11] = 0, 0
		binary.BigEndian.PutUint16(out[10:], ^packet.Sum(out[:20], 0))
	}
	var s packet.Segment
	if s.Parse(out) == packet.OK {
		s.FillChecksum()
	}
	return out
}

// tooBig plays "fragmentation needed" (RFC 1191) or "packet too big" (RFC 8201)
// about the last octet that the remote side of the network saw of local.
func (w *World) tooBig(l *link, mtu string) error {
	v, err := strconv.ParseUint(mtu, 10, 16)
	if l == nil || err != nil {
		return fmt.Errorf("icmp needs a link and an MTU: %w", err)
	}
	quote := packet.Spec{Src: l.laddr, Dst: l.raddr, Seq: l.remote.rcv.Add(^uint32(0)), Flags: packet.ACK, Ack: l.remote.nxt}
	q := quote.Build(make([]byte, quote.Size()))
	ip := ipLen(q)
	q = q[:ip+8] // what every router quotes
	b := append(make([]byte, ip+8), q...)
	proto := byte(1)
	if copy(b, q[:ip]); ip == 40 {
		proto, b[40] = 58, 2
		b[6] = proto
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		binary.BigEndian.PutUint32(b[44:], uint32(v))
		copy(b[8:], l.raddr.Addr().AsSlice()) // the router is in the remote's place
		copy(b[24:], l.laddr.Addr().AsSlice())
	} else {
		b[9], b[20], b[21] = proto, 3, 4
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[26:], uint16(v))
		copy(b[12:], l.raddr.Addr().AsSlice())
		copy(b[16:], l.laddr.Addr().AsSlice())
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^packet.Sum(b[:20], 0))
	}
	w.icmpSum(b, ip)
	w.deliver(filter.HookPrerouting, b)
	var e packet.ICMPError
	if w.passed == nil {
		return nil
	}
	if !e.Parse(w.passed) {
		return fmt.Errorf("the ICMP error was broken")
	}
	had := binary.BigEndian.Uint16(w.passed[ip+2:])
	if w.icmpSum(w.passed, ip); had != binary.BigEndian.Uint16(w.passed[ip+2:]) {
		w.fail("an ICMP error has a wrong checksum")
	}
	w.printf("    about local's octet %d\n", e.Seq.Sub(l.local.iss))
	return nil
}

// icmpSum gives the ICMP message behind an IP header of ip octets its checksum.
func (w *World) icmpSum(b []byte, ip int) {
	m := b[ip:]
	m[2], m[3] = 0, 0
	var pseudo uint32
	if ip == 40 {
		pseudo = uint32(packet.Sum(b[8:40], 0)) + 58 + uint32(len(m))
	}
	binary.BigEndian.PutUint16(m[2:], ^packet.Sum(m, pseudo))
}

// conns prints connection structures as GETCONNINFO gives them, in the order
// of the links.
func (w *World) conns(list *filter.ConnList) {
	w.printf("    %d connections\n", len(list.Conns))
	for _, l := range w.order {
		for _, c := range list.Conns {
			if c.ID != (filter.ConnID{Local: l.laddr, Remote: l.raddr}) || w.byID[c.ID] != l {
				continue
			}
			w.printf("    %s %v %v in %d out %d", l.name, c.Role, c.State, c.BytesIn, c.BytesOut)
			if c.Kept > 0 {
				w.printf(" kept %d", c.Kept)
			}
			for _, f := range []struct {
				is   bool
				name string
			}{{c.Translated, "translated"}, {c.Closed, "window closed"}, {c.RemoteClosed, "remote closed"}, {c.Image, "in the image"}, {c.Image && c.Reestablished, "back"}} {
				if f.is {
					w.printf(", %s", f.name)
				}
			}
			if c.Missing != "" {
				w.printf(": %s", c.Missing)
			}
			w.printf("\n")
		}
	}
}

var v4 = regexp.MustCompile(`\b10\.0\.0\.(\d+)(:\d+)?`)

// ToIPv6 rewrites the IPv4 addresses of a script or a trace into IPv6 addresses:
// 10.0.0.2:40000 becomes [fd00::2]:40000.
func ToIPv6(text string) string {
	text = strings.ReplaceAll(text, "10.9.0.0/16", "fd09::/16")
	return v4.ReplaceAllStringFunc(text, func(a string) string {
		m := v4.FindStringSubmatch(a)
		if m[2] == "" {
			return "fd00::" + m[1]
		}
		return "[fd00::" + m[1] + "]" + m[2]
	})
}

// memory checks that none is counted where nothing is kept.
func (w *World) memory() {
	w.Engine.Step(w.now, filter.Event{Request: &filter.Request{Body: &filter.GetConnInfo{App: w.app}}}, &w.fx)
	kept := uint32(0)
	for _, r := range w.fx.Replies {
		if list, ok := r.Body.(*filter.ConnList); ok {
			for _, c := range list.Conns {
				kept += c.Kept
			}
		}
	}
	w.fx.Reset()
	for _, m := range w.Engine.Limits() {
		if m.Name == "kept_bytes" && m.Used > 0 && kept == 0 {
			w.fail(fmt.Sprintf("nothing is kept, and %d octets of memory are counted", m.Used))
		}
	}
}

// Taken gives the octets that the two sides of a link have taken from each
// other, local's over all of its sockets.
func (w *World) Taken(name string) (local, remote []byte) {
	if l := w.links[name]; l != nil {
		return l.local.got, l.remote.got
	}
	return nil, nil
}

// Acknowledged is how many octets of the remote were acknowledged to it.
func (w *World) Acknowledged(name string) int {
	l := w.links[name]
	if l == nil || l.remote.base == 0 {
		return 0
	}
	return int(l.remote.told.Size(l.remote.iss.Add(1)))
}

// Faults lists what no TCP could take of what the engine did so far.
func (w *World) Faults() []string { return w.errs }
