package seqnum

import "testing"

func TestWrapAround(t *testing.T) {
	top := Value(0xffffff00)
	low := top.Add(0x200)
	if low != 0x100 {
		t.Fatalf("Add: %#x", uint32(low))
	}
	for _, c := range []struct {
		name string
		got  bool
		want bool
	}{
		{"top<low", top.Less(low), true},
		{"low<top", low.Less(top), false},
		{"equal less", top.Less(top), false},
		{"equal lesseq", top.LessEq(top), true},
		{"in range over the top", Value(0).InRange(top, low), true},
		{"end is out", low.InRange(top, low), false},
		{"empty range", top.InRange(top, top), false},
		{"below", top.Add(^uint32(0)).InRange(top, low), false},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v", c.name, c.got)
		}
	}
	if top.Max(low) != low || low.Max(top) != low {
		t.Error("Max over the wrap")
	}
	if low.Sub(top) != 0x200 || top.Sub(low) != -0x200 || low.Size(top) != 0x200 {
		t.Error("distances")
	}
	if !NewerTS(1, 0xffffffff) || NewerTS(7, 7) {
		t.Error("timestamps")
	}
}
