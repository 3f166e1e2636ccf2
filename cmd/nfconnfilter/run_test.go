package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A filter whose application is held must not forget it for a file that is bad,
// nor take an empty mount point for a configuration.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	f := &files{shared: filepath.Join(dir, "shared"), node: filepath.Join(dir, "node.toml")}
	app := filepath.Join(f.shared, "apps", "redis.toml")
	write := func(path, text string) {
		t.Helper()
		hour := time.Now().Add(-time.Hour) // not being written any more
		for _, err := range []error{
			os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644),
			os.Chtimes(path, hour, hour), os.Chtimes(filepath.Dir(path), hour, hour),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	write(f.node, "name = \"node-a\"\ninterface = \"eth0\"\nstate_dir = \""+dir+"\"\n")
	write(filepath.Join(f.shared, "cluster.toml"), "[[node]]\nname = \"node-a\"\naddress = \"192.0.2.11\"\n")
	good := "name = \"redis\"\nvip = \"192.0.2.100\"\ninclude_ports = [6379]\n[process]\nstart = [\"/bin/true\"]\n"
	write(app, good)
	old, err := f.load()
	if err != nil || old.Apps["redis"] == nil {
		t.Fatal(old, err)
	}
	var logs strings.Builder
	log := slog.New(slog.NewTextHandler(&logs, nil))
	write(app, good[:20])
	c := reload(f, old, log)
	if c == nil || c.Apps["redis"] != old.Apps["redis"] || !strings.Contains(logs.String(), "redis.toml:") || !strings.Contains(logs.String(), "stays in force") {
		t.Fatalf("%+v\n%s", c, &logs)
	}
	write(app, good+"[hibernate]\nafter = \"1h\"\n")
	if c = reload(f, c, log); c == nil || c.Apps["redis"].Hibernate.After.Std() != time.Hour {
		t.Fatalf("%+v\n%s", c, &logs)
	}
	if err := os.Rename(f.shared, f.shared+"-away"); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(f.shared, "lost+found", "x"), "")
	if got := reload(f, c, log); got != nil || !strings.Contains(logs.String(), "see that the shared directory is mounted") {
		t.Errorf("%+v\n%s", got, &logs)
	}
}
