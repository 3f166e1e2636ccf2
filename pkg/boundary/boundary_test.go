package boundary

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"unsafe"
)

// ends writes stream to a scanner in pieces and returns every boundary that one
// of the pieces ended behind or held last, as offsets in the stream.
func ends(s *Scanner, stream string, piece int) []int {
	var out []int
	for at := 0; at < len(stream); at += piece {
		p := stream[at:min(at+piece, len(stream))]
		if n := s.Write([]byte(p)); n > 0 {
			out = append(out, at+n)
		}
	}
	return out
}

// marked takes the marks "|" out of a stream, and gives their offsets.
func marked(text string) (stream string, at []int) {
	for i, part := range strings.Split(text, "|") {
		if i > 0 {
			at = append(at, len(stream))
		}
		stream += part
	}
	return stream, at
}

const (
	get  = "*2\r\n$3\r\nGET\r\n$1\r\na\r\n|"
	ping = "*1\r\n$4\r\nPING\r\n|"
	set  = "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$12\r\none\r\ntwo\r\n*9\r\n|"
)

func TestBoundaries(t *testing.T) {
	middle := strings.ReplaceAll(ping, "|", "")
	for _, tt := range []struct {
		name   string
		kind   Kind
		begin  bool
		stream string // with a mark behind every request that is to be found
		synced bool
	}{
		{"none", None, false, "a\nb\n", false},
		{"line", Line, false, "rest of one\n|two\r\n|\n|thr", true},
		{"line without an end", Line, false, "no end", false},
		{"line from its beginning", Line, true, "one\n|two", true},
		{"requests", Resp, true, get + ping + set + ping, true},
		{"empty string", Resp, true, "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n|" + ping, true},
		{"inline", Resp, true, "PING\r\n|GET a\n|\r\n|\n|" + get + "ECHO \"*1\"\r\n|", true},
		{"nothing is asked", Resp, true, "*0\r\n|*-1\r\n|" + get, true},
		{"most strings", Resp, true, "*1048576\r\n$1\r\nx\r\n", true},
		{"one string more", Resp, true, "*1048577\r\n$1\r\nx\r\n", false},
		{"longest string", Resp, true, "*1\r\n$536870912\r\nx", true},
		{"one octet more", Resp, true, "*1\r\n$536870913\r\nx", false},
		{"longest inline", Resp, true, strings.Repeat("x", maxInline-2) + "\r\n|", true},
		{"one octet more inline", Resp, true, strings.Repeat("x", maxInline) + "\r\n", false},
		{"no zero in front", Resp, true, "*01\r\n$4\r\nPING\r\n", false},
		{"no digits", Resp, true, "*\r\n$4\r\nPING\r\n", false},
		{"no negative length", Resp, true, "*1\r\n$-1\r\n", false},
		{"no sign", Resp, true, "*+1\r\n$4\r\nPING\r\n", false},
		{"two signs", Resp, true, "*--1\r\n", false},
		{"no dollar", Resp, true, "*1\r\n:4\r\nPING\r\n", false},
		{"no CR", Resp, true, "*1\n$4\r\nPING\r\n", false},
		{"no LF", Resp, true, "*1\r\n$4\rPING\r\n", false},
		{"string too long", Resp, true, "*1\r\n$3\r\nPING\r\n", false},
		{"CR alone", Resp, true, "\rPING\r\n", false},
		{"binary", Resp, true, "\x16\x03\x01\r\n", false},
		{"not text", Resp, true, "\xc3\xa4\r\n", false},
		{"NUL inline", Resp, true, "PI\x00NG\r\n", false},
		{"lost and found", Resp, true, ping + "*x\r\n" + middle + middle + ping + get, true},
		{"from the middle", Resp, false, "lue of one\r\n" + middle + middle + ping + get + set, true},
		{"from a request on", Resp, false, middle + middle + ping + get, true},
		{"two are not enough", Resp, false, "x\r\n" + middle + middle, false},
		{"two and a half", Resp, false, "x\r\n" + middle + middle + "*2\r\n$3\r\nGET\r\n", false},
		{"two and nonsense, three", Resp, false, "x\r\n" + middle + middle + "x\r\n" + middle + middle + ping + get, true},
		{"nonsense at a request's place", Resp, false, "x\r\n*1\r\n*1\r\n" + middle[4:] + middle + ping, true},
		{"nothing proves nothing", Resp, false, "x\r\n*0\r\n*0\r\n*0\r\n*0\r\n", false},
		{"and is passed over", Resp, false, "x\r\n*0\r\n" + middle + middle + ping, true},
		{"lines prove nothing", Resp, false, "GET a\r\nGET b\r\nGET c\r\nGET d\r\n", false},
		{"CR in front of CRLF", Resp, false, "x\r\r\n" + middle + middle + ping, true},
		{"a value that looks like it", Resp, false, "x\r\n*1\r\n$2\r\nno end\r\n" + middle + middle + ping, true},
	} {
		stream, want := marked(tt.stream)
		for _, piece := range []int{1, 2, 3, 7} {
			s := New(tt.kind)
			if tt.begin {
				s.Begin()
			}
			got := ends(&s, stream, piece)
			if piece == 1 && fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: boundaries at %v, want %v", tt.name, got, want)
			}
			if last := len(want) > 0; last && (len(got) == 0 || got[len(got)-1] != want[len(want)-1]) {
				t.Errorf("%s in pieces of %d: boundaries at %v, want %v", tt.name, piece, got, want)
			}
			if s.Synced() != tt.synced {
				t.Errorf("%s in pieces of %d: synced is %v", tt.name, piece, s.Synced())
			}
			if whole := len(want) > 0 && want[len(want)-1] == len(stream); s.Whole() != whole {
				t.Errorf("%s in pieces of %d: whole is %v", tt.name, piece, s.Whole())
			}
		}
	}
}

func TestBeginAndLose(t *testing.T) {
	for _, k := range []Kind{Line, Resp} {
		s := New(k)
		if s.Synced() || s.Whole() || s.Kind() != k {
			t.Errorf("%v: a new scanner knows where it stands", k)
		}
		if s.Begin(); !s.Synced() || !s.Whole() || s.Kind() != k {
			t.Errorf("%v: Begin does not begin", k)
		}
		if s.Lose(); s.Synced() || s.Whole() || s.Kind() != k {
			t.Errorf("%v: Lose does not lose", k)
		}
	}
}

func TestNames(t *testing.T) {
	for word, k := range map[string]Kind{"line": Line, "resp": Resp, "": None, "turn": None, "now": None} {
		if Named(word) != k {
			t.Errorf("%q is %v", word, Named(word))
		}
	}
}

// TestState: a scanner keeps no octets, so it is small, and takes the longest
// request without memory.
func TestState(t *testing.T) {
	if n := unsafe.Sizeof(Scanner{}); n > 32 {
		t.Errorf("a scanner has %d octets", n)
	}
	s := New(Resp)
	s.Begin()
	piece := make([]byte, 64<<10)
	head := []byte("*1\r\n$536870912\r\n")
	if n := testing.AllocsPerRun(1, func() {
		s.Begin()
		s.Write(head)
		for range 512 << 20 / len(piece) {
			s.Write(piece)
		}
		if n := s.Write([]byte("\r\n+")); n != 2 {
			t.Errorf("the end is at %d", n)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// request makes a random request.
func request(r *rand.Rand) string {
	if r.IntN(6) == 0 {
		return []string{"PING\r\n", "GET a\n", "\r\n", "*0\r\n"}[r.IntN(4)]
	}
	n := 1 + r.IntN(4)
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", n)
	for range n {
		v := make([]byte, r.IntN(40))
		for i := range v {
			v[i] = "ab\r\n*$123"[r.IntN(9)]
		}
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(v), v)
	}
	return b.String()
}

// TestRandomStreams: of a stream that is followed from its beginning exactly the
// ends of the requests are boundaries; from the middle none is reported that is
// not one, but for values that hold whole requests themselves, of which random
// ones have none.
func TestRandomStreams(t *testing.T) {
	late := 0
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 2))
		var stream string
		var want []int
		is := map[int]bool{}
		for range 50 {
			stream += request(r)
			want = append(want, len(stream))
			is[len(stream)] = true
		}
		s := New(Resp)
		s.Begin()
		if got := ends(&s, stream, 1); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("seed %d: boundaries at %v, want %v\n%q", seed, got, want, stream)
		}
		from := r.IntN(len(stream) / 2)
		s = New(Resp)
		got := ends(&s, stream[from:], 1)
		for _, at := range got {
			if !is[from+at] {
				t.Fatalf("seed %d from %d: %d is no boundary\n%q", seed, from, from+at, stream)
			}
		}
		if len(got) == 0 {
			late++
		}
	}
	if late > 30 {
		t.Errorf("%d of 300 streams were not understood from the middle", late)
	}
}

// FuzzSplit: how a stream is cut into pieces makes no difference.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{get + ping + set, "x\r\n" + ping + ping + ping, "PING\r\n*0\r\n", "*1\r\n$3\r\n*\r\n\r\n", "a\nb\n\n"} {
		stream, _ := marked(s)
		f.Add([]byte(stream), true, true)
		f.Add([]byte(stream), false, true)
		f.Add([]byte(stream), true, false)
	}
	f.Fuzz(func(t *testing.T, stream []byte, isResp, begin bool) {
		stream = stream[:min(len(stream), 300)]
		start := New(Line)
		if isResp {
			start = New(Resp)
		}
		if begin {
			start.Begin()
		}
		single := start
		at := make([]int, len(stream)+1) // the last boundary up to there
		states := make([]Scanner, len(stream)+1)
		states[0] = single
		for i := range stream {
			at[i+1] = at[i]
			if single.Write(stream[i:i+1]) == 1 {
				at[i+1] = i + 1
			}
			states[i+1] = single
			if single.Whole() != (at[i+1] == i+1) {
				t.Fatalf("octet %d: whole is %v, the last boundary %d", i, single.Whole(), at[i+1])
			}
		}
		if isResp == false && !bytes.Contains(stream, []byte("\n")) && at[len(stream)] != 0 {
			t.Fatal("a boundary without an LF")
		}
		for cut := range len(stream) + 1 {
			s := start
			for _, p := range []struct{ from, to int }{{0, cut}, {cut, len(stream)}} {
				n := s.Write(stream[p.from:p.to])
				want := 0
				if at[p.to] > p.from {
					want = at[p.to] - p.from
				}
				if n != want {
					t.Fatalf("octets %d to %d: a boundary at %d, one by one at %d\n%q", p.from, p.to, n, want, stream)
				}
				if s != states[p.to] {
					t.Fatalf("up to %d, cut at %d: %+v, one by one %+v\n%q", p.to, cut, s, states[p.to], stream)
				}
			}
		}
	})
}
