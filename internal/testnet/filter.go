package testnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// frame holds what a capture filter looks at.
type frame struct {
	outgoing     bool
	ethertype    uint16
	src, dst     netip.Addr
	proto        uint8
	sport, dport uint16
	flags        uint8
	payload      int
}

// TCP flag bits (RFC 9293, section 3.1).
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
)

// parseFrame reads the headers of a frame; what is missing or malformed stays zero. link is the length of the link
// header, 14 or 0.
func parseFrame(b []byte, link int, ethertype uint16) frame {
	f := frame{ethertype: ethertype}
	if len(b) < link {
		return f
	}
	b = b[link:]
	switch {
	case ethertype == unix.ETH_P_IP && len(b) >= 20 && b[0]>>4 == 4:
		header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		f.src, f.dst = addr4(b[12:16]), addr4(b[16:20])
		f.proto = b[9]
		if header < 20 || total < header || total > len(b) || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return f
		}
		f.transport(b[header:total])
	case ethertype == unix.ETH_P_IPV6 && len(b) >= 40 && b[0]>>4 == 6:
		total := 40 + int(binary.BigEndian.Uint16(b[4:]))
		f.src, f.dst = addr16(b[8:24]), addr16(b[24:40])
		f.proto = b[6]
		if total > len(b) {
			return f
		}
		f.transport(b[40:total])
	}
	return f
}

func (f *frame) transport(b []byte) {
	switch {
	case f.proto == unix.IPPROTO_TCP && len(b) >= 20:
		f.sport, f.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		f.flags = b[13]
		f.payload = max(0, len(b)-int(b[12]>>4)*4)
	case f.proto == unix.IPPROTO_UDP && len(b) >= 8:
		f.sport, f.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		f.payload = len(b) - 8
	}
}

func addr4(b []byte) netip.Addr  { return netip.AddrFrom4([4]byte(b)) }
func addr16(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)) }

type predicate func(*frame) bool

// plain are the terms without an argument.
var plain = map[string]predicate{
	"ip":   func(f *frame) bool { return f.ethertype == unix.ETH_P_IP },
	"ip6":  func(f *frame) bool { return f.ethertype == unix.ETH_P_IPV6 },
	"arp":  func(f *frame) bool { return f.ethertype == unix.ETH_P_ARP },
	"tcp":  func(f *frame) bool { return f.proto == unix.IPPROTO_TCP && f.src.IsValid() },
	"udp":  func(f *frame) bool { return f.proto == unix.IPPROTO_UDP && f.src.IsValid() },
	"syn":  func(f *frame) bool { return f.flags&flagSYN != 0 },
	"ack":  func(f *frame) bool { return f.flags&flagACK != 0 },
	"fin":  func(f *frame) bool { return f.flags&flagFIN != 0 },
	"rst":  func(f *frame) bool { return f.flags&flagRST != 0 },
	"psh":  func(f *frame) bool { return f.flags&flagPSH != 0 },
	"data": func(f *frame) bool { return f.payload > 0 },
	"in":   func(f *frame) bool { return !f.outgoing },
	"out":  func(f *frame) bool { return f.outgoing },
}

// compileFilter turns a filter, as described at Capture, into a function. The empty filter takes everything.
func compileFilter(filter string) (predicate, error) {
	var terms []predicate
	words := strings.Fields(filter)
	for i := 0; i < len(words); i++ {
		negate := false
		for i < len(words) && (words[i] == "not" || words[i] == "and") {
			negate = negate != (words[i] == "not")
			i++
		}
		if i == len(words) {
			return nil, fmt.Errorf("testnet: filter %q ends with %q", filter, words[i-1])
		}
		term, known := plain[words[i]]
		if !known {
			if i+1 == len(words) {
				return nil, fmt.Errorf("testnet: filter %q: unknown word or missing argument at %q", filter, words[i])
			}
			var err error
			if term, err = withArgument(words[i], words[i+1]); err != nil {
				return nil, fmt.Errorf("testnet: filter %q: %w", filter, err)
			}
			i++
		}
		if negate {
			inner := term
			term = func(f *frame) bool { return !inner(f) }
		}
		terms = append(terms, term)
	}
	return func(f *frame) bool {
		for _, t := range terms {
			if !t(f) {
				return false
			}
		}
		return true
	}, nil
}

func withArgument(word, arg string) (predicate, error) {
	switch word {
	case "host", "src", "dst":
		a, err := netip.ParseAddr(arg)
		if err != nil {
			return nil, err
		}
		return func(f *frame) bool {
			return word != "dst" && f.src == a || word != "src" && f.dst == a
		}, nil
	case "port", "sport", "dport":
		n, err := strconv.ParseUint(arg, 10, 16)
		if err != nil {
			return nil, err
		}
		p := uint16(n)
		return func(f *frame) bool {
			return word != "dport" && f.sport == p || word != "sport" && f.dport == p
		}, nil
	}
	return nil, fmt.Errorf("unknown word %q (known: host src dst port sport dport not and ip ip6 arp tcp udp syn ack "+
		"fin rst psh data in out)", word)
}
