package imports

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// named finds tests as docs/security.md writes them: `FILE: TestName`, and behind
// it `TestOther` of the same file.
var named = regexp.MustCompile("`(?:([a-zA-Z0-9_/.-]+_test\\.go): )?((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)`")

// TestSecurityPage: every test that docs/security.md names is where it says, and no
// claim of its tables is without one.
func TestSecurityPage(t *testing.T) {
	root := filepath.Join("..", "..")
	page, err := os.ReadFile(filepath.Join(root, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]map[string]bool{}
	claims := false // the table at hand is one of claims
	n := 0
	for i, line := range strings.Split(string(page), "\n") {
		file, found := "", false
		for _, m := range named.FindAllStringSubmatch(line, -1) {
			if m[1] != "" {
				file = m[1]
			}
			found = true
			if file == "" {
				t.Errorf("docs/security.md:%d: %s is in no file", i+1, m[2])
				continue
			}
			if tests[file] == nil {
				tests[file] = testsOf(t, filepath.Join(root, file))
			}
			if !tests[file][m[2]] {
				t.Errorf("docs/security.md:%d: there is no %s in %s", i+1, m[2], file)
			}
			n++
		}
		switch {
		case strings.HasPrefix(line, "| claim |"):
			claims = true
		case !strings.HasPrefix(line, "|"):
			claims = false
		case claims && !found && !strings.HasPrefix(line, "|---"):
			t.Errorf("docs/security.md:%d: a claim without a test", i+1)
		}
	}
	if n == 0 {
		t.Error("docs/security.md names no test")
	}
}

// testsOf lists the tests and fuzz targets of a file.
func testsOf(t *testing.T, path string) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Error(err)
		return all
	}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
			all[fn.Name.Name] = true
		}
	}
	return all
}

// TestUnits: the daemons have no more privileges than docs/security.md says.
func TestUnits(t *testing.T) {
	for unit, want := range map[string][]string{
		"nfconnfilter.service": {
			"User=nfconnfilter", "AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW",
			"NoNewPrivileges=yes", "ProtectSystem=strict", "RuntimeDirectoryMode=0750", "StateDirectoryMode=0750",
		},
		"ckptctl-scheduler.service": {"User=nfconnfilter", "CapabilityBoundingSet=", "NoNewPrivileges=yes", "ProtectSystem=strict"},
	} {
		b, err := os.ReadFile(filepath.Join("..", "..", "packaging", unit))
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(b), "\n")
		for _, w := range want {
			if !slices.Contains(lines, w) {
				t.Errorf("%s lacks %s", unit, w)
			}
		}
	}
}
