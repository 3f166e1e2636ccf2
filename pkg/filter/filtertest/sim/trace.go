package sim

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/packet"
)

// line is one line of the trace. It is put into words only when somebody reads
// it.
type line struct {
	at       int64
	where    string // what happened, a constant
	text     string
	src, dst netip.AddrPort
	seq, ack uint32
	val, ecr uint32
	n        int
	win      uint16
	flags    uint8
	ts       bool
	sack     int
	l, r     uint32
}

// trace keeps the last lines of a run and a hash over all of them.
type trace struct {
	clk   *scheduler
	ring  []line
	count int
	hash  uint64
	w     io.Writer
}

const ringSize = 4096

func (t *trace) add(l line) {
	l.at = t.clk.time()
	t.mix(uint64(l.at))
	t.mixString(l.where)
	t.mixString(l.text)
	t.mix(uint64(l.seq)<<32 | uint64(l.ack))
	t.mix(uint64(l.val)<<32 | uint64(l.ecr))
	t.mix(uint64(l.n)<<32 | uint64(l.win)<<16 | uint64(l.flags)<<8 | uint64(l.sack))
	t.mix(uint64(l.src.Port())<<16 | uint64(l.dst.Port()))
	if len(t.ring) < ringSize {
		t.ring = append(t.ring, l)
	} else {
		t.ring[t.count%ringSize] = l
	}
	t.count++
	if t.w != nil {
		fmt.Fprintln(t.w, l.String())
	}
}

// mix is the step of FNV-1a over eight octets at a time.
func (t *trace) mix(v uint64) { t.hash = (t.hash ^ v) * 1099511628211 }

func (t *trace) mixString(s string) {
	for i := range len(s) {
		t.mix(uint64(s[i]))
	}
}

func (t *trace) note(format string, a ...any) {
	t.add(line{where: "--", text: fmt.Sprintf(format, a...)})
}

// packet notes what happens to b, which begins with the IP header.
func (t *trace) packet(where, text string, b []byte) {
	var s packet.Segment
	l := line{where: where, text: text}
	if f := s.Parse(b); f != packet.OK {
		l.text += " not a segment: " + f.String()
		t.add(l)
		return
	}
	l.src, l.dst, l.seq, l.ack, l.flags, l.win, l.n = s.Src, s.Dst, uint32(s.Seq), uint32(s.Ack), s.Flags, s.Window, s.PayloadLen()
	l.ts, l.val, l.ecr, l.sack = s.Opt.HasTS, s.Opt.TSVal, s.Opt.TSEcr, s.Opt.SACKBlocks
	if l.sack > 0 {
		x, y := s.SACKBlock(0)
		l.l, l.r = uint32(x), uint32(y)
	}
	t.add(l)
}

func (l line) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%14.6f %-9s", time.Duration(l.at).Seconds(), l.where)
	if l.src.IsValid() {
		fmt.Fprintf(&b, " %v>%v %s seq %d", l.src, l.dst, flagNames(l.flags), l.seq)
		if l.flags&packet.ACK != 0 {
			fmt.Fprintf(&b, " ack %d", l.ack)
		}
		fmt.Fprintf(&b, " win %d len %d", l.win, l.n)
		if l.ts {
			fmt.Fprintf(&b, " ts %d/%d", l.val, l.ecr)
		}
		if l.sack > 0 {
			fmt.Fprintf(&b, " sack %d:%d-%d", l.sack, l.l, l.r)
		}
	}
	if l.text != "" {
		b.WriteString(" " + l.text)
	}
	return b.String()
}

func flagNames(f uint8) string {
	var n []byte
	for i, c := range []byte("FSRPAUEC") {
		if f&(1<<i) != 0 {
			n = append(n, c)
		}
	}
	return string(n)
}

// last gives the last n lines.
func (t *trace) last(n int) string {
	var b strings.Builder
	for i := max(t.count-min(n, len(t.ring)), 0); i < t.count; i++ {
		b.WriteString(t.ring[i%ringSize].String() + "\n")
	}
	return b.String()
}
