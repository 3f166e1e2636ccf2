package config

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

// places lists every key and element with the text that begins there.
func places(text string, name string, p *place, out *[]string) {
	head := func(offset int) string {
		s := text[offset:]
		if i := strings.IndexAny(s, "\n"); i >= 0 {
			s = s[:i]
		}
		return s[:min(len(s), 4)]
	}
	for _, k := range slices.Sorted(maps.Keys(p.keys)) {
		c := p.keys[k]
		*out = append(*out, fmt.Sprintf("%s%q %q %q", name, k, head(c.key), head(c.val)))
		places(text, name+k+".", c, out)
	}
	for i, c := range p.items {
		*out = append(*out, fmt.Sprintf("%s%d %q", name, i, head(c.val)))
		places(text, fmt.Sprintf("%s%d.", name, i), c, out)
	}
}

func TestScan(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []string
	}{
		{"", nil},
		{"# only a comment", nil},
		{"a=1\r\n  b  =\t2 # c = 3\n", []string{`"a" "a=1\r" "1\r"`, `"b" "b  =" "2 # "`}},
		{`"q\t.\"" = 'x\'` + "\nb = 2", []string{`"b" "b = " "2"`, `"q\t.\"" "\"q\\t" "'x\\'"`}},
		{"'l.i' . x . \"\" = 5", []string{`"l.i" "'l.i" "'l.i"`, `l.i."x" "x . " "x . "`, `l.i.x."" "\"\" =" "5"`}},
		{"m = \"\"\"\n a = \\\"\"\" \"\"\"\"\"\nn = '''\n'x''' \no = ''''a'''\np=\"\"",
			[]string{`"m" "m = " "\"\"\""`, `"n" "n = " "'''"`, `"o" "o = " "''''"`, `"p" "p=\"\"" "\"\""`}},
		{"a = [ 1 , # ]\n [2, '],'], {x.y = 3, z = [4]}, ]\nb = 5", []string{
			`"a" "a = " "[ 1 "`, `a.0 "1 , "`, `a.1 "[2, "`, `a.1.0 "2, '"`, `a.1.1 "'],'"`, `a.2 "{x.y"`,
			`a.2."x" "x.y " "x.y "`, `a.2.x."y" "y = " "3, z"`, `a.2."z" "z = " "[4]}"`, `a.2.z.0 "4]},"`, `"b" "b = " "5"`}},
		{"d = 2000-01-01 10:00:00\ne=[2000-01-01 10:00:00,1]", []string{`"d" "d = " "2000"`, `"e" "e=[2" "[200"`, `e.0 "2000"`, `e.1 "1]"`}},
		{"[ a . b ] # x\nc = 1\n[a]\nd = 2", []string{`"a" "a]" "a]"`, `a."b" "b ] " "b ] "`, `a.b."c" "c = " "1"`, `a."d" "d = " "2"`}},
		{"[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n[[a.e]]\nf=4", []string{
			`"a" "a]]" "a]]"`, `a.0 "a]]"`, `a.0."b" "b = " "1"`, `a.1 "a]]"`, `a.1."b" "b = " "2"`,
			`a.1."c" "c]" "c]"`, `a.1.c."d" "d = " "3"`, `a.1."e" "e]]" "e]]"`, `a.1.e.0 "e]]"`, `a.1.e.0."f" "f=4" "4"`}},
		{"t = {\n a = 1, # one\n b = {},\n}\nc = 2", []string{`"c" "c = " "2"`, `"t" "t = " "{"`, `t."a" "a = " "1, #"`, `t."b" "b = " "{},"`}},
	} {
		if _, err := toml.Decode(tt.text, new(map[string]any)); err != nil {
			t.Errorf("%q is not TOML: %v", tt.text, err)
		}
		var got []string
		root, deep := scan(tt.text)
		if deep != -1 {
			t.Errorf("%q is too deep at %d", tt.text, deep)
		}
		places(tt.text, "", root, &got)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s\n got %s\nwant %s", tt.text, strings.Join(got, "\n     "), strings.Join(tt.want, "\n     "))
		}
	}
}

// TestDepth: what nests deep is refused before the library spends minutes on
// it, what does not is not, however much of it there is.
func TestDepth(t *testing.T) {
	const n = 50000
	for name, tt := range map[string]struct {
		text, fault string
	}{
		"arrays":        {"a=" + strings.Repeat("[", n), "f:1:34: nests deeper than 32 levels"},
		"inline tables": {"a=" + strings.Repeat("{a=", n), "f:1:97: nests deeper than 32 levels"},
		"dots":          {"b=1\n" + strings.Repeat("a.", n) + "a=1", "f:2:1: nests deeper than 32 levels"},
		"header":        {"[" + strings.Repeat("a.", n) + "a]", "f:1:2: nests deeper than 32 levels"},
		"just right":    {"a=" + strings.Repeat("[", maxDepth-1) + strings.Repeat("]", maxDepth-1) + "\nb.c=[1]\n[d.e]\nf=[[1]]", ""},
		"wide":          {"a=[" + strings.Repeat("[{b=1}],", 1000) + "]\n" + strings.Repeat("[[t.u]]\nv=[1]\n", 1000), ""},
	} {
		d, _ := parse("f", tt.text)
		if got := d.result().Error(); got != tt.fault {
			t.Errorf("%s: %q, want %q", name, got, tt.fault)
		}
	}
}

// covers tells whether the scanner knows the place of everything that the
// library decoded.
func covers(p *place, v any) error {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			c := p.keys[k]
			if c == nil {
				return fmt.Errorf("no place for key %q", k)
			}
			if err := covers(c, e); err != nil {
				return fmt.Errorf("%q: %w", k, err)
			}
		}
	case []any:
		if len(p.items) != len(v) {
			return fmt.Errorf("%d places for %d elements", len(p.items), len(v))
		}
		for i, e := range v {
			if err := covers(p.items[i], e); err != nil {
				return err
			}
		}
	case []map[string]any:
		if len(p.items) != len(v) {
			return fmt.Errorf("%d places for %d tables", len(p.items), len(v))
		}
		for i, e := range v {
			if err := covers(p.items[i], e); err != nil {
				return err
			}
		}
	}
	return nil
}

// FuzzScan: nothing that the library accepts is without a place.
func FuzzScan(f *testing.F) {
	for _, text := range everything {
		f.Add(text)
	}
	f.Add("a = [[1, 2], [{b = '''x'''}], # c\n]\n[[t]]\n[t.u.v]\n'' = \"\\\"\"")
	f.Fuzz(func(t *testing.T, text string) {
		d, root := parse("f", text)
		if root == nil {
			if len(d.faults) != 1 {
				t.Fatalf("%d faults", len(d.faults))
			}
			return
		}
		if err := covers(root.where, root.m); err != nil {
			t.Errorf("%v in %q", err, text)
		}
	})
}

// FuzzLoad gives the same bytes to all three kinds of file: never a panic, every
// fault inside its file, and what loads can be printed and loaded again.
func FuzzLoad(f *testing.F) {
	for _, text := range everything {
		f.Add([]byte(text))
	}
	f.Add([]byte(minimalNode))
	f.Add([]byte("vip = ['192.0.2.1', 7, {}]\n[[heartbeat]]\nmatch_hex = '0'\n[process]\nstart = [1]"))
	f.Add([]byte("[[node]]\n[node.x]\n[filter]\nexclude_ports = [[]]\nhold = 1"))
	dir := f.TempDir()
	node := filepath.Join(dir, "node.toml")
	files := []string{filepath.Join(dir, "cluster.toml"), node, filepath.Join(dir, "apps", "a.toml")}
	if err := os.Mkdir(filepath.Dir(files[2]), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for i, file := range files {
			for _, other := range files {
				_ = os.Remove(other)
			}
			if err := os.WriteFile(node, []byte(minimalNode), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, text, 0o644); err != nil {
				t.Fatal(err)
			}
			c, err := Load(dir, node)
			faults, _ := err.(Faults)
			if err == nil {
				faults = c.AllFaults()
				if err := Print(new(strings.Builder), c); err != nil {
					t.Error(err)
				}
			}
			if err != nil && len(faults) == 0 || i == 2 && err != nil {
				t.Errorf("error %v", err)
			}
			for _, ft := range faults {
				of := string(text)
				if ft.File == node && file != node {
					of = minimalNode // disagrees with the cluster
				} else if ft.File != file {
					t.Errorf("fault %v is of another file than %s", ft, file)
				}
				lines := strings.Split(of, "\n")
				if ft.Message == "" || ft.Line < 1 || ft.Line > len(lines) ||
					ft.Col < 1 || ft.Col > len(lines[ft.Line-1])+1 {
					t.Errorf("fault %v outside of %q", ft, text)
				}
			}
			if i == 2 && err == nil && (len(faults) > 0) == (c.Apps["a"] != nil) {
				t.Errorf("faults %v and application %v", faults, c.Apps["a"])
			}
		}
	})
}
