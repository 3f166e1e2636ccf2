// Package boundary finds the places in a stream of requests at which one has
// ended and the next has not begun. It looks at octets as they come, in pieces
// of any size, and keeps a few numbers of them, never the octets.
package boundary

import "bytes"

// Kind is what a stream consists of.
type Kind uint8

// Kinds.
const (
	None Kind = iota
	Line      // lines that end in LF
	Resp      // requests of the Redis protocol
)

var words = [...]string{"", "line", "resp"}

func (k Kind) String() string { return words[k] }

// Named is the kind of that name; None for any other.
func Named(word string) Kind {
	for k := Line; k <= Resp; k++ {
		if words[k] == word {
			return k
		}
	}
	return None
}

// Scanner follows one stream. It may begin anywhere in it: until it knows where
// requests begin it reports nothing. The zero value follows a stream of no kind.
type Scanner struct {
	kind   Kind
	synced bool
	whole  bool // the last octet was the last of a request
	resp   resp
}

// New makes a scanner of kind k that does not know where it stands.
func New(k Kind) Scanner { return Scanner{kind: k} }

// Kind is what the scanner takes the stream for.
func (s *Scanner) Kind() Kind { return s.kind }

// Begin tells that the next octet is the first of a request.
func (s *Scanner) Begin() {
	*s = Scanner{kind: s.kind, synced: true, whole: true, resp: resp{at: first, begun: true}}
}

// Lose tells that octets were missed.
func (s *Scanner) Lose() { *s = Scanner{kind: s.kind} }

// Synced tells whether the scanner knows where requests begin.
func (s *Scanner) Synced() bool { return s.synced }

// Whole tells whether the stream stands between two requests, as far as the
// scanner knows.
func (s *Scanner) Whole() bool { return s.synced && s.whole }

// Maybe tells whether the stream may stand between two requests though the
// scanner does not know it: what was seen last ends as requests do.
func (s *Scanner) Maybe() bool {
	return s.Whole() || s.kind == Resp && s.resp.begun && s.resp.at == first
}

// Write takes the next octets of the stream. It returns the offset in p behind
// the last request that ends in p, 0 where none does.
func (s *Scanner) Write(p []byte) int {
	switch {
	case len(p) == 0 || s.kind == None:
		return 0
	case s.kind == Line:
		return s.line(p)
	}
	return s.requests(p)
}

// line: every LF ends a request, also the first one that is seen.
func (s *Scanner) line(p []byte) int {
	end := bytes.LastIndexByte(p, '\n') + 1
	s.synced = s.synced || end > 0
	s.whole = end == len(p)
	return end
}
