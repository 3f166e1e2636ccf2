package boundary

import "bytes"

// The Redis protocol, as a server reads it (redis.io/docs/reference/protocol-spec,
// and readQueryFromClient of Redis for the limits): a request is an array of bulk
// strings, *N CRLF and N times $LEN CRLF, LEN octets, CRLF; or an inline command,
// which is a line.
const (
	maxStrings = 1 << 20   // of one request
	maxString  = 512 << 20 // octets of one string: proto-max-bulk-len, as it is by default
	maxInline  = 64 << 10  // octets of an inline command

	// sure is how many requests in a row must follow from a place in the middle of
	// a stream until it counts as one where a request begins.
	sure = 3
)

// place is what the next octet of a stream belongs to.
type place uint8

const (
	nowhere  place = iota // not known; a request may begin behind CRLF
	nowhere2              // the same, behind CR
	first                 // the first octet of a request
	inline                // an inline command
	inlineCR              // what can only be the end of an empty inline command
	strings0              // the first digit of N
	strings1              // its other digits
	stringsN              // the LF behind
	dollar                // the $ of a string
	length0               // the first digit of LEN
	length1               // its other digits
	lengthN               // the LF behind
	octets                // those of a string
	stringR               // the CR behind
	stringN               // the LF behind
)

// resp is where a stream of requests stands.
type resp struct {
	at    place
	minus bool
	n     int32 // of the number under way; octets of the inline command
	args  int32 // strings of the request that have not ended
	skip  int32 // octets of the string that have not come
	good  uint8 // requests since the place that is being tried
	begun bool  // octets were seen since the scanner lost its way
}

// requests is Write for Resp.
func (s *Scanner) requests(p []byte) int {
	r := &s.resp
	if !r.begun {
		r.begun, r.at = true, first // a segment often begins with a request
	}
	end := 0
	for i := 0; i < len(p); {
		if n := r.run(p[i:]); n > 0 {
			i += n
			s.whole = false
			continue
		}
		switch r.step(p[i], s.synced) {
		case more:
			s.whole = false
		case ended:
			r.at = first
			if !s.synced {
				if r.good++; r.good == sure {
					s.synced, r.good = true, 0
				}
			}
			if s.whole = s.synced; s.synced {
				end = i + 1
			}
		case wrong:
			s.synced, s.whole = false, false
			r.again(p[i])
		}
		i++
	}
	return end
}

// again looks for another place where requests begin, from octet b on, which did
// not fit.
func (r *resp) again(b byte) {
	behindCRLF := r.at == first || r.at == dollar
	emptied := r.at == stringsN
	switch r.good = 0; {
	case b == '*' && behindCRLF:
		r.at, r.n, r.minus = strings0, 0, false
	case b == '\n' && emptied:
		r.at = first
	case b == '\r':
		r.at = nowhere2
	default:
		r.at = nowhere
	}
}

// run passes over octets that need no look one by one, and returns how many.
func (r *resp) run(p []byte) int {
	switch r.at {
	case octets:
		n := min(int(r.skip), len(p))
		if r.skip -= int32(n); r.skip == 0 {
			r.at = stringR
		}
		return n
	case nowhere:
		n := bytes.IndexByte(p, '\r')
		if n < 0 {
			return len(p)
		}
		return n
	}
	return 0
}

// outcome of one octet.
type outcome uint8

const (
	more  outcome = iota // the request goes on
	ended                // with it the request has ended
	wrong                // no request has it there
)

func (r *resp) step(b byte, synced bool) outcome {
	switch r.at {
	case nowhere, nowhere2:
		switch {
		case b == '\r':
			r.at = nowhere2
		case b == '\n' && r.at == nowhere2:
			r.at = first
		default:
			r.at = nowhere
		}
		return more
	case first:
		return r.firstOctet(b, synced)
	case inline, inlineCR:
		switch r.n++; {
		case b == '\n':
			return ended
		case r.n >= maxInline || r.at == inlineCR || b == 0:
			return wrong
		}
		return more
	case strings0, strings1, length0, length1:
		return r.number(b)
	case stringsN, lengthN, stringN:
		if b != '\n' {
			return wrong
		}
		return r.lineEnd(synced)
	case dollar:
		if b != '$' {
			return wrong
		}
		r.at, r.n, r.minus = length0, 0, false
		return more
	case stringR:
		if b != '\r' {
			return wrong
		}
		r.at = stringN
		return more
	}
	panic("boundary: a place that takes no octet by itself")
}

// firstOctet is the first of a request. In the middle of a stream only arrays
// count: any text is an inline command.
func (r *resp) firstOctet(b byte, synced bool) outcome {
	switch {
	case b == '*':
		r.at, r.n, r.minus = strings0, 0, false
		return more
	case !synced:
		return wrong
	case b == '\n': // an empty one is passed over
		return ended
	case b == '\r':
		r.at, r.n = inlineCR, 1
		return more
	case b < ' ' || b >= 0x7f: // no command begins so
		return wrong
	}
	r.at, r.n = inline, 1
	return more
}

// number takes one octet of N or LEN up to CR: no sign but that of a negative N,
// no zero in front.
func (r *resp) number(b byte) outcome {
	head := r.at == strings0 || r.at == length0
	strings := r.at == strings0 || r.at == strings1
	switch {
	case b == '-' && r.at == strings0 && !r.minus:
		r.minus = true
		return more
	case b == '\r' && !head:
		r.at++ // the LF
		return more
	case b < '0' || b > '9' || !head && r.n == 0:
		return wrong
	}
	r.n = r.n*10 + int32(b-'0')
	if strings && r.n > maxStrings || r.n > maxString {
		return wrong
	}
	if head {
		r.at++
	}
	return more
}

// lineEnd is the LF behind N, behind LEN or behind a string.
func (r *resp) lineEnd(synced bool) outcome {
	switch r.at {
	case stringsN:
		switch nothing := r.n == 0 || r.minus; {
		case nothing && !synced: // it proves nothing
			return wrong
		case nothing:
			return ended
		}
		r.args, r.at = r.n, dollar
	case lengthN:
		if r.skip, r.at = r.n, octets; r.skip == 0 {
			r.at = stringR
		}
	default:
		if r.args--; r.args == 0 {
			return ended
		}
		r.at = dollar
	}
	return more
}
