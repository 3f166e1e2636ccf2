package failpoint

import (
	"os"
	"path/filepath"
	"testing"
)

// TestHere: a process ends at the boundary that the file names, when an application is in the
// state, after so many times; never without a file.
func TestHere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "failpoints")
	p, kills := New(path), 0
	p.kill = func() { kills++ }
	state := "CONNECTED"
	here := func(name string) bool {
		before := kills
		p.Here(name, func() []string { return []string{"RESTORED", state} })
		return kills > before
	}
	write := func(at Point) {
		t.Helper()
		if err := os.WriteFile(path, []byte(at.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if here(Send) {
		t.Error("it ends without a file")
	}
	write(Point{Name: Send})
	if here(Sent) || !here(Send) {
		t.Error("it ends at another boundary, or not at its own")
	}
	write(Point{Name: Send, State: "SNAPSHOTDONE"})
	if here(Send) {
		t.Error("it ends in another state")
	}
	if state = "SNAPSHOTDONE"; !here(Send) {
		t.Error("it does not end in the state")
	}
	write(Point{Name: Send, Count: 3})
	for i := range 3 {
		if here(Send) != (i == 2) {
			t.Errorf("time %d of 3", i+1)
		}
	}
	write(Point{Name: Sent, Count: 2})
	if here(Sent) || !here(Sent) {
		t.Error("what was reached under another point counts")
	}
	if err := os.WriteFile(path, []byte("send - many\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if here(Send) {
		t.Error("it ends for a file that makes no sense")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if here(Sent) {
		t.Error("it ends when the file is gone")
	}
	New("").Here(Send, nil)
}
