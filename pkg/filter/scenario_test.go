package filter_test

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter/filtertest"
)

var update = flag.Bool("update", false, "write the golden traces anew")

// TestScenarios plays testdata/*.txt and compares with the golden traces.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			script, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			trace, err := filtertest.Run(string(script))
			if err != nil {
				t.Fatalf("%v\n%s", err, trace)
			}
			if again, _ := filtertest.Run(string(script)); again != trace {
				t.Error("the same events gave another trace")
			}
			golden := strings.TrimSuffix(f, ".txt") + ".trace"
			if *update {
				if err := os.WriteFile(golden, []byte(trace), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if string(want) != trace {
				t.Errorf("the trace differs from %s (go test -update writes it anew)\n%s", golden, diff(string(want), trace))
			}
		})
	}
}

// TestScenariosBehind: where the application is in a network namespace behind
// the node, its segments come from another hook, and nothing else differs.
func TestScenariosBehind(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		script, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(strings.TrimSuffix(f, ".txt") + ".trace")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := filtertest.RunBehind(string(script)); err != nil || got != string(want) {
			t.Errorf("%s: %v\n%s", f, err, diff(string(want), got))
		}
	}
}

// TestScenariosIPv6: the other family has other headers, checksums and ICMP
// messages, and nothing else differs. Octets in
// hexadecimal are of one family, and some scenarios have both.
func TestScenariosIPv6(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		script, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(strings.TrimSuffix(f, ".txt") + ".trace")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(script), "\nraw ") || strings.Contains(string(script), "fd00::") {
			continue
		}
		other := filtertest.ToIPv6(string(want))
		if got, err := filtertest.Run(filtertest.ToIPv6(string(script))); err != nil || got != other {
			t.Errorf("%s: %v\n%s", f, err, diff(other, got))
		}
	}
}

// diff shows the first lines that differ.
func diff(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		var a, b string
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			from := max(i-4, 0)
			return strings.Join(w[from:i], "\n") + "\nwant: " + a + "\ngot:  " + b
		}
	}
	return ""
}

// TestIndex: docs/scenarios.md names every scenario, and none that is not there.
func TestIndex(t *testing.T) {
	page, err := os.ReadFile("../../docs/scenarios.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`([0-9]+-[a-z0-9-]+\\.txt)`").FindAllStringSubmatch(string(page), -1) {
		named[m[1]] = true
		if _, err := os.Stat(filepath.Join("testdata", m[1])); err != nil {
			t.Errorf("docs/scenarios.md: %v", err)
		}
	}
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !named[filepath.Base(f)] {
			t.Errorf("docs/scenarios.md does not name %s", f)
		}
	}
}
