package checkpoint

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func someConns() *pb.ConnInfoReply {
	return &pb.ConnInfoReply{App: "redis", Conns: []*pb.ConnInfo{{Local: "192.0.2.100:6379", Remote: "198.51.100.7:1", BytesIn: 1 << 60}}}
}

func put(t *testing.T, s store, app, id string) {
	t.Helper()
	p, err := s.begin(Manifest{App: app, ID: id, Node: "node-a", Time: time.Now().UTC(), Engine: "restart"}, someConns())
	if err != nil {
		t.Fatal(err)
	}
	if ids, _ := s.ids(app); len(ids) > 0 && ids[len(ids)-1] == id {
		t.Error("the snapshot shows before it is whole")
	}
	if err := p.commit(someConns()); err != nil {
		t.Fatal(err)
	}
}

func TestStore(t *testing.T) {
	s := store{filepath.Join(t.TempDir(), "snapshots")}
	if l, err := s.list(""); err != nil || len(l) != 0 {
		t.Errorf("empty store: %v, %v", l, err)
	}
	id := newSnapshotID(time.Date(2026, 11, 22, 15, 30, 0, 0, time.UTC))
	if !strings.HasPrefix(id, "20261122T153000Z-") || !validSnapshotID(id) {
		t.Errorf("ID %s", id)
	}
	put(t, s, "redis", id)
	m, conns, err := s.load("redis", id)
	if err != nil || m.Version != 1 || conns.Conns[0].BytesIn != 1<<60 {
		t.Fatal(m, conns, err)
	}
	if st, err := os.Stat(filepath.Join(s.dir, "redis", id)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	for _, bad := range []string{"", "..", "../redis", "20261122T153000Z-1A2b3c", "20261122T153000Z-1a2b3", "20261122T153000Z-../..x"} {
		if _, _, err := s.load("redis", bad); err == nil || !strings.Contains(err.Error(), "not a snapshot ID") {
			t.Errorf("ID %q: %v", bad, err)
		}
	}
	// A changed byte, a file missing, a manifest cut short.
	path := filepath.Join(s.dir, "redis", id)
	b, _ := os.ReadFile(filepath.Join(path, connectionsFile))
	b[len(b)/2] ^= 1
	writeFile(t, filepath.Join(path, connectionsFile), string(b))
	if _, _, err := s.load("redis", id); err == nil || !strings.Contains(err.Error(), "checksum") || !strings.Contains(err.Error(), connectionsFile) {
		t.Errorf("changed byte: %v", err)
	}
	os.Remove(filepath.Join(path, connectionsFile))
	if _, _, err := s.load("redis", id); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("missing file: %v", err)
	}
	writeFile(t, filepath.Join(path, manifestFile), `{"version":1,"app":"redis","id":"`+id+`","files":{"../x":""}}`)
	if _, _, err := s.load("redis", id); err == nil {
		t.Error("a manifest that leads out of the directory is taken")
	}
	writeFile(t, filepath.Join(path, manifestFile), `{"version":1`)
	put(t, s, "redis", newSnapshotID(time.Now()))
	if l, err := s.list("redis"); err == nil || !strings.Contains(err.Error(), id) || len(l) != 1 {
		t.Errorf("list with a damaged one: %v, %v", l, err)
	}
}

func TestStorePrune(t *testing.T) {
	s := store{t.TempDir()}
	id := func(i int) string { return fmt.Sprintf("20260101T00000%dZ-00000%d", i, i) }
	for i := range 8 {
		put(t, s, "redis", id(i))
	}
	other := ""
	for _, node := range []string{"node-a", "node-b"} {
		p, err := s.begin(Manifest{App: "redis", ID: id(9), Node: node}, someConns())
		if err != nil {
			t.Fatal(err)
		}
		other = filepath.Base(p.temp)
	}
	left := func(want ...string) {
		t.Helper()
		entries, _ := os.ReadDir(filepath.Join(s.dir, "redis"))
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if fmt.Sprint(names) != fmt.Sprint(want) {
			t.Errorf("left %v, want %v", names, want)
		}
	}
	now := time.Now()
	try(t, s.prune("redis", id(1), "node-a", config.Snapshots{Keep: 5}, now))
	left(other, id(1), id(3), id(4), id(5), id(6), id(7))
	at := func(i int, after time.Duration) time.Time { return stamp(id(i)).Add(after) }
	try(t, s.prune("redis", id(1), "node-a", config.Snapshots{Keep: 5, MaxAge: config.Duration(time.Hour)}, at(5, time.Hour)))
	left(other, id(1), id(5), id(6), id(7))
	// What agents that were killed left of a mark and of a look for room.
	writeFile(t, filepath.Join(s.dir, "redis", "."+tempName("node-a", "shared.1a2b")), "")
	writeFile(t, filepath.Join(s.dir, "redis", tempName("", "1a2b")), "")
	try(t, s.prune("redis", id(1), "node-a", config.Snapshots{Keep: 4}, now))
	left(tempName("", "1a2b"), other, id(1), id(5), id(6), id(7))
	try(t, s.prune("redis", id(1), "node-a", config.Snapshots{Keep: 1}, now.Add(tempAge+time.Minute)))
	left(id(1), id(7))
}

func TestStoreWritable(t *testing.T) {
	s := store{filepath.Join(t.TempDir(), "snapshots")}
	try(t, s.writable("redis"))
	if entries, err := os.ReadDir(filepath.Join(s.dir, "redis")); err != nil || len(entries) != 0 {
		t.Errorf("it leaves %v, %v", entries, err)
	}
	writeFile(t, filepath.Join(s.dir, "nginx"), "") // in the way
	if err := s.writable("nginx"); err == nil || !strings.Contains(err.Error(), s.dir) || !strings.Contains(err.Error(), "make it writable") {
		t.Errorf("%v", err)
	}
	if err := os.Symlink(t.TempDir(), filepath.Join(s.dir, "away")); err != nil {
		t.Fatal(err)
	}
	if err := s.writable("away"); err == nil {
		t.Error("it follows a link out of the store")
	}
}
