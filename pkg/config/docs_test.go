package config

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocumentation compares the tables of docs/configuration.md with the keys
// that the reader asks for.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, reference, _ := strings.Cut(string(text), "\n## cluster.toml")
	var documented []string
	row := regexp.MustCompile("(?m)^\\| ((?:`[a-z_]+`(?:, )?)+) \\|")
	for _, m := range row.FindAllStringSubmatch(reference, -1) {
		for _, key := range strings.Split(m[1], ", ") {
			documented = append(documented, strings.Trim(key, "`"))
		}
	}
	known := knownKeys(t)
	slices.Sort(documented)
	slices.Sort(known)
	if !reflect.DeepEqual(documented, known) {
		t.Errorf("documented %v\n     known %v", documented, known)
	}
}

// knownKeys collects the keys of all tables by what the reader says of an
// unknown one.
func knownKeys(t *testing.T) (known []string) {
	list := regexp.MustCompile(`known here: (.*)`)
	const q = "\nQQQQQQQQ = 1\n"
	for _, d := range []func() *doc{
		func() *doc {
			_, d, _, _ := readCluster("", q+"[scheduler]"+q+"[[node]]"+q+"[filter]"+q+"[hold]"+q+"[balance]"+q+"[snapshots]"+q)
			return d
		},
		func() *doc { _, d, _ := readNode("", q+"[queue]"+q+"[limits]"+q+"[criu]"+q+"[tls]"+q); return d },
		func() *doc {
			_, d, _ := readApp("", q+"[process]"+q+"[checkpoint]"+q+"[hibernate]"+q+"[[heartbeat]]"+q, "a", Hold{})
			return d
		},
	} {
		tables := []string{"scheduler", "node", "filter", "hold", "balance", "snapshots", "queue", "limits", "criu", "tls",
			"process", "checkpoint", "hibernate", "heartbeat"}
		n := 0
		for _, f := range d().faults {
			if m := list.FindStringSubmatch(f.Message); m != nil {
				n++
				for _, key := range strings.Split(m[1], ", ") {
					if !slices.Contains(tables, key) {
						known = append(known, key)
					}
				}
			}
		}
		if n < 4 {
			t.Fatalf("only %d tables answered", n)
		}
	}
	return known
}
