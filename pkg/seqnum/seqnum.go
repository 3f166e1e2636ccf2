// Package seqnum holds TCP sequence numbers as a type of their own, so that
// wrap-around is handled in one place (RFC 9293 section 3.4).
package seqnum

// Value is a sequence number. Comparisons are modulo 2^32: they are right for
// values less than 2^31 apart.
type Value uint32

// Add returns v advanced by n octets.
func (v Value) Add(n uint32) Value { return v + Value(n) }

// Sub returns the signed distance from w to v, in octets.
func (v Value) Sub(w Value) int32 { return int32(v - w) }

// Size returns the number of octets from w up to v, v not included.
func (v Value) Size(w Value) uint32 { return uint32(v - w) }

// Less tells whether v comes before w.
func (v Value) Less(w Value) bool { return int32(v-w) < 0 }

// LessEq tells whether v comes before w or is w.
func (v Value) LessEq(w Value) bool { return int32(v-w) <= 0 }

// InRange tells whether a <= v < b.
func (v Value) InRange(a, b Value) bool { return uint32(v-a) < uint32(b-a) }

// Max returns the later of v and w.
func (v Value) Max(w Value) Value {
	if v.Less(w) {
		return w
	}
	return v
}

// NewerTS tells whether timestamp a is later than b (RFC 7323 section 5.2).
func NewerTS(a, b uint32) bool { return int32(a-b) > 0 }
