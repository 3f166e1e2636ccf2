package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A scheduler's machine need not be a node, but must be let in by the nodes.
func TestLoadScheduler(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("cluster.toml", "[scheduler]\naddress = \"192.0.2.10\"\n[[node]]\nname = \"node-a\"\naddress = \"192.0.2.11\"\n")
	node := write("node.toml", "name = \"elsewhere\"\nallow_plaintext = true\nload_file = \"/run/load\"\n")
	c, err := LoadScheduler(dir, node)
	if err != nil {
		t.Fatal(err)
	}
	if c.Node.Name != "elsewhere" || len(c.Cluster.Nodes) != 1 || c.Node.LoadFile != "/run/load" {
		t.Errorf("%+v", c)
	}
	if _, err := Load(dir, node); err == nil || !strings.Contains(err.Error(), "no [[node]]") || !strings.Contains(err.Error(), "interface") {
		t.Errorf("as a node: %v", err)
	}
	for text, says := range map[string]string{
		"name = \"elsewhere\"\n":                           "allow_plaintext = true",
		"allow_plaintext = true\nload_file = \"load\"\n":   "absolute",
		"allow_plaintext = true\nname = \"node-a\"\nx = 1": "unknown key",
	} {
		var f Faults
		if _, err := LoadScheduler(dir, write("node.toml", text)); !errors.As(err, &f) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
