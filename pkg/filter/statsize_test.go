package filter

import (
	"testing"
	"unsafe"
)

// There may be a million connections: what their statistics take is bounded.
func TestStatisticsAreSmall(t *testing.T) {
	if n := unsafe.Sizeof(connStats{}); n > 56 {
		t.Errorf("%d octets for each connection", n)
	}
	var st connStats
	for n := range 1000 * NumReasons { // whatever its packets meet
		st.add(Reason(n % NumReasons))
	}
	if len(st.reasons) != NumReasons || cap(st.reasons) > 2*NumReasons || st.reasons[NumReasons-1].count() != 1000 {
		t.Errorf("%d of %d places, the last one counted %d times", len(st.reasons), cap(st.reasons), st.reasons[NumReasons-1].count())
	}
}
