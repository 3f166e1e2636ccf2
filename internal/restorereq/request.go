// Package restorereq serves the port where restore requests arrive: one line
// each, answered OK (accepted, not done) or ERR with the reason. The agent
// serves it on a node without a scheduler, else the scheduler does.
package restorereq

import (
	"errors"
	"io"
	"net/netip"
	"strings"
)

const (
	// requestPrefix starts a restore request, 25 bytes for IPv4:
	// "Restore ddd.ddd.ddd.ddd" with zero-padded octets, CR LF.
	requestPrefix = "Restore "
	requestLen4   = 25
	// requestLen6 is the length with eight groups of four lower-case
	// hexadecimal digits.
	requestLen6 = len(requestPrefix) + 39 + 2
)

var errRequest = errors.New("not a restore request: want Restore ddd.ddd.ddd.ddd or eight groups of four hexadecimal digits, CR LF")

// parseRequest reads one restore request, CR LF included, and gives the VIP
// that it names.
func parseRequest(b []byte) (netip.Addr, error) {
	s, ok := strings.CutSuffix(string(b), "\r\n")
	text, ok2 := strings.CutPrefix(s, requestPrefix)
	switch {
	case !ok || !ok2:
		return netip.Addr{}, errRequest
	case len(b) == requestLen4:
		return parsePadded4(text)
	case len(b) == requestLen6:
		return parsePadded6(text)
	}
	return netip.Addr{}, errRequest
}

func parsePadded4(text string) (netip.Addr, error) {
	var a [4]byte
	for i := range a {
		n := 0
		for j := range 3 {
			c := text[4*i+j]
			if c < '0' || c > '9' {
				return netip.Addr{}, errRequest
			}
			n = n*10 + int(c-'0')
		}
		if n > 255 || (i < 3 && text[4*i+3] != '.') {
			return netip.Addr{}, errRequest
		}
		a[i] = byte(n)
	}
	return netip.AddrFrom4(a), nil
}

func parsePadded6(text string) (netip.Addr, error) {
	var a [16]byte
	for i := range 8 {
		n := 0
		for j := range 4 {
			d := strings.IndexByte("0123456789abcdef", text[5*i+j])
			if d < 0 {
				return netip.Addr{}, errRequest
			}
			n = n<<4 | d
		}
		if i < 7 && text[5*i+4] != ':' {
			return netip.Addr{}, errRequest
		}
		a[2*i], a[2*i+1] = byte(n>>8), byte(n)
	}
	return netip.AddrFrom16(a), nil
}

// readRequest reads up to the end of the first line, and never more than the
// longest request.
func readRequest(r io.Reader) ([]byte, error) {
	buf := make([]byte, 0, requestLen6)
	for len(buf) < cap(buf) {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if i := strings.IndexByte(string(buf), '\n'); i >= 0 {
			return buf[:i+1], nil
		}
		if err != nil {
			return buf, err
		}
	}
	return buf, errRequest
}
