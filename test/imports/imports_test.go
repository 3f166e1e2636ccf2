// Package imports asserts which package may import which: the shape of the
// program, so that a short cut shows at once.
package imports

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/nfconnfilter/nfconnfilter/"

// packages reads the imports of every package's files outside of tests; names
// are relative to the module.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(p))
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		imports := all[rel]
		for _, i := range f.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			imports = append(imports, strings.TrimPrefix(name, module))
		}
		slices.Sort(imports)
		all[rel] = slices.Compact(imports)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// ours tells whether an import is of this module.
func ours(name string) bool {
	top, _, _ := strings.Cut(name, "/")
	return slices.Contains([]string{"cmd", "pkg", "internal", "test"}, top)
}

func match(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == prefix || strings.HasPrefix(name, prefix+"/")
	}
	ok, err := path.Match(pattern, name)
	if err != nil {
		panic(err)
	}
	return ok
}

func matchAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, name) })
}

var (
	edges = []string{"internal/nfq", "internal/inject", "internal/rules", "internal/offload", "internal/sockdiag", "internal/vip", "internal/journal", "internal/connhook", "internal/criu"}
	pure  = []string{"pkg/seqnum", "pkg/packet", "pkg/rewrite", "pkg/tcpemu", "pkg/appstate", "pkg/boundary", "pkg/filter", "pkg/scheduler"}
)

// forbidden are imports that a package must not have itself.
var forbidden = []struct {
	from   []string
	to     []string
	except []string
	reason string
}{
	{pure, []string{"os", "os/*", "net", "net/http", "log", "log/*", "sync", "syscall", "math/rand", "math/rand/v2", "crypto/rand",
		"golang.org/...", "github.com/...", "context"}, nil,
		"the core never touches the outside: clock, random numbers and packets come in as arguments"},
	{[]string{"pkg/seqnum"}, []string{"pkg/...", "internal/..."}, nil, "sequence numbers stand at the bottom"},
	{[]string{"pkg/packet"}, []string{"pkg/...", "internal/..."}, []string{"pkg/seqnum"}, "views over bytes know only numbers"},
	{[]string{"pkg/rewrite", "pkg/tcpemu"}, []string{"pkg/...", "internal/..."}, []string{"pkg/seqnum", "pkg/packet"}, "translation and emulation are joined by the filter alone"},
	{[]string{"pkg/appstate"}, []string{"pkg/...", "internal/..."}, []string{"pkg/seqnum", "pkg/packet"}, "states do not know how packets are answered"},
	{[]string{"pkg/boundary"}, []string{"pkg/...", "internal/..."}, nil, "what a stream means follows from its octets alone"},
	{[]string{"pkg/scheduler"}, []string{"pkg/...", "internal/..."}, []string{"pkg/appstate"}, "the scheduler decides on what nodes say; asking them is the driver's"},
	{[]string{"internal/cluster", "internal/restorereq"}, append([]string{"pkg/filter", "pkg/checkpoint", "internal/node"}, edges...), nil, "the scheduler speaks with agents and touches nothing else of a node"},
	{[]string{"pkg/filter", "pkg/filter/*"}, []string{"pkg/...", "internal/..."}, append([]string{"pkg/filter"}, pure...), "the engine decides; control and edges are the driver's"},
	{[]string{"pkg/..."}, []string{"internal/..."}, []string{"internal/sockdiag", "internal/vip", "internal/connhook", "internal/criu", "internal/restorereq", "internal/failpoint"}, "what others may import must not need the edges of the filter"},
	{[]string{"pkg/control", "pkg/config"}, []string{"internal/..."}, nil, "clients and tools use these without any edge"},
	{edges, append([]string{"pkg/filter", "pkg/tcpemu", "pkg/rewrite", "pkg/appstate", "pkg/checkpoint", "internal/node"}, edges...), nil,
		"an edge touches the outside and decides nothing, and knows no other edge"},
	{[]string{"cmd/...", "pkg/...", "internal/..."}, []string{"internal/testnet", "test/..."}, []string{}, "tools of the tests stay in tests"},
	{[]string{"cmd/...", "pkg/...", "internal/...", "test/..."}, []string{"C"}, nil, "static binaries need no C library"},
}

// unreachable are packages that must not be in a program at all.
var unreachable = []struct {
	from, to string
	reason   string
}{
	{"cmd/ckptctl", "pkg/filter", "the agent runs commands as root and parses no packets"},
	{"cmd/ckptctl", "internal/node", "the agent runs commands as root and parses no packets"},
	{"cmd/ckptctl", "internal/nfq", "the agent runs commands as root and parses no packets"},
	{"cmd/nfconnfilter", "internal/connhook", "the filter has no business with cgroups; hooking an application is the agent's, and takes more than its capabilities"},
	{"cmd/nfconnfilter", "internal/criu", "dumping and restoring processes is the agent's, and takes root"},
	{"cmd/nfconnfilter", "pkg/checkpoint", "the filter parses hostile bytes and runs no commands"},
}

func TestImportDirections(t *testing.T) {
	for _, fault := range faults(packages(t)) {
		t.Error(fault)
	}
}

// faults lists each import that is against a rule.
func faults(all map[string][]string) []string {
	var out []string
	for name, imports := range all {
		for _, rule := range forbidden {
			if !matchAny(rule.from, name) {
				continue
			}
			for _, imp := range imports {
				if imp != name && matchAny(rule.to, imp) && !matchAny(rule.except, imp) {
					out = append(out, name+" imports "+imp+": "+rule.reason)
				}
			}
		}
	}
	for _, rule := range unreachable {
		if way := reach(all, rule.from, rule.to, nil); way != nil {
			out = append(out, strings.Join(way, " -> ")+": "+rule.reason)
		}
	}
	slices.Sort(out)
	return out
}

// reach finds a chain of imports, nil when there is none.
func reach(all map[string][]string, from, to string, way []string) []string {
	if slices.Contains(way, from) {
		return nil
	}
	way = append(way, from)
	if from == to {
		return way
	}
	for _, imp := range all[from] {
		if !ours(imp) {
			continue
		}
		if found := reach(all, imp, to, way); found != nil {
			return found
		}
	}
	return nil
}

// TestRulesBite shows each kind of rule a package that breaks it.
func TestRulesBite(t *testing.T) {
	for name, all := range map[string]map[string][]string{
		"core with a clock's neighbour": {"pkg/tcpemu": {"os"}},
		"core with a library":           {"pkg/filter": {"golang.org/x/sys/unix"}},
		"upwards":                       {"pkg/seqnum": {"pkg/packet"}},
		"siblings":                      {"pkg/tcpemu": {"pkg/appstate"}},
		"edge to edge":                  {"internal/nfq": {"internal/inject"}},
		"edge to core":                  {"internal/rules": {"pkg/filter"}},
		"hook to edge":                  {"internal/connhook": {"internal/vip"}},
		"filter with hooks":             {"cmd/nfconnfilter": {"internal/node"}, "internal/node": {"internal/connhook"}},
		"public to internal":            {"pkg/control": {"internal/nfq"}},
		"test tools":                    {"cmd/ckptctl": {"internal/testnet"}},
		"scheduler with a network":      {"pkg/scheduler": {"net"}},
		"scheduler with an edge":        {"internal/cluster": {"internal/sockdiag"}},
		"cgo":                           {"internal/nfq": {"C"}},
		"agent with packets":            {"cmd/ckptctl": {"pkg/checkpoint"}, "pkg/checkpoint": {"pkg/filter"}},
	} {
		if len(faults(all)) == 0 {
			t.Errorf("%s: no rule bites", name)
		}
	}
	if f := faults(map[string][]string{
		"pkg/filter": {"pkg/packet", "time", "net/netip"}, "internal/node": {"pkg/filter", "internal/nfq"},
		"pkg/checkpoint": {"internal/sockdiag", "os", "pkg/control"},
	}); len(f) != 0 {
		t.Errorf("rules bite what is right: %v", f)
	}
}
