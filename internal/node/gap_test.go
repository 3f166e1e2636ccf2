package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestGap(t *testing.T) {
	dir := t.TempDir()
	second := time.Second.Nanoseconds()
	begin := func(boot string) *signs {
		t.Helper()
		s, err := openSigns(dir, boot)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.close)
		return s
	}
	first := begin("boot-a")
	if g := first.gap(second); g.Known {
		t.Errorf("a gap before the first filter: %v", g)
	}
	first.sign(3*second, false)
	first.sign(4*second, false)
	killed := begin("boot-a") // it was killed
	if g := killed.gap(4*second + 84e6); g != (Gap{true, 84 * time.Millisecond, true}) || !strings.HasSuffix(g.String(), "for at most 84ms") {
		t.Errorf("behind a kill: %+v %v", g, g)
	}
	killed.sign(5*second, false)
	killed.sign(6*second, true)
	killed.sign(7*second, false) // a tick that came late
	stopped := begin("boot-a")
	if g := stopped.gap(6*second + 84_400_000); g != (Gap{true, 84_400 * time.Microsecond, false}) || !strings.HasSuffix(g.String(), "for 84ms") {
		t.Errorf("behind a stop: %+v %v", g, g)
	}
	// One that came to nothing leaves what was there.
	if g := begin("boot-a").gap(8 * second); g.Time != 2*time.Second {
		t.Errorf("at the second try: %+v", g)
	}
	if g := begin("boot-b").gap(9 * second); g.Known {
		t.Errorf("a gap over a boot: %+v", g)
	}
	if g := begin("boot-a").gap(second); g.Known {
		t.Errorf("a gap that ends before it begins: %+v", g)
	}
	for _, text := range []string{"", "boot-a", "boot-a x stopped", "boot-a 1", "\x00\x00\x00"} {
		if err := os.WriteFile(filepath.Join(dir, "alive"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if g := begin("boot-a").gap(9 * second); g.Known {
			t.Errorf("%q: %+v", text, g)
		}
	}
}
