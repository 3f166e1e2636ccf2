package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// FuzzStore loads a snapshot from any two files; SUM in the manifest stands for
// the checksum of the other file. What loads is whole and the one that was asked
// for; else the error names it.
func FuzzStore(f *testing.F) {
	const app, id = "redis", "20261122T153000Z-0a1b2c"
	manifest, err := json.Marshal(Manifest{Version: manifestVersion, App: app, ID: id, Node: "node-a", NodeAddress: "192.0.2.11",
		Time: time.Unix(1, 0).UTC(), Engine: "restart", Files: map[string]string{connectionsFile: "SUM"}})
	if err != nil {
		f.Fatal(err)
	}
	conns, err := protojson.Marshal(&pb.ConnInfoReply{App: app, Conns: []*pb.ConnInfo{{Local: "192.0.2.100:6379", Remote: "198.51.100.7:1", BytesIn: 1 << 60}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(manifest, conns, id)
	f.Add(bytes.ReplaceAll(manifest, []byte("SUM"), []byte("00")), conns, id)
	f.Add(bytes.ReplaceAll(manifest, []byte(connectionsFile), []byte("../../"+connectionsFile)), conns, id)
	f.Add(manifest, []byte(`{"conns":[{"bytesIn":"x"}]}`), id)
	f.Add(manifest[:40], conns[:9], "20261122T153000.5Z-0a1b2c")
	f.Add([]byte("null"), []byte("{}"), "../redis")
	s := store{f.TempDir()}
	f.Fuzz(func(t *testing.T, manifest, conns []byte, id string) {
		if validSnapshotID(id) {
			if id != filepath.Base(id) || id == "." || id == ".." {
				t.Fatalf("%q is no name of a directory", id)
			}
		} else if _, _, err := s.load(app, id); err == nil || !strings.Contains(err.Error(), "is not a snapshot ID") {
			t.Fatalf("%q was taken for an ID: %v", id, err)
		} else {
			id = "20261122T153000Z-0a1b2c"
		}
		dir := filepath.Join(s.dir, app, id)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		sum := sha256.Sum256(conns)
		manifest = bytes.ReplaceAll(manifest, []byte("SUM"), []byte(hex.EncodeToString(sum[:])))
		for name, b := range map[string][]byte{manifestFile: manifest, connectionsFile: conns} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		m, c, err := s.load(app, id)
		list, listErr := s.list(app)
		if err != nil {
			if m != nil || c != nil || !strings.Contains(err.Error(), id) {
				t.Fatalf("%v, %v, %v", m, c, err)
			}
		} else if m.App != app || m.ID != id || m.Version != manifestVersion || protojson.Unmarshal(conns, new(pb.ConnInfoReply)) != nil {
			t.Fatalf("taken for whole: %+v", m)
		}
		if (len(list) == 1) == (listErr != nil) || len(list) == 0 && err == nil {
			t.Fatalf("listed %v, %v, loaded %v", list, listErr, err)
		}
	})
}

// FuzzRecords reads what an earlier agent left of an application: BOOT stands for
// this boot. A process that is not to be touched is never taken for one of ours.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"app":"a","pid":77,"start_time":5,"boot_id":"BOOT","own_session":true,"own_group":true}`), []byte(`{"app":"a","op":"snapshot","boot_id":"BOOT","sealed":true,"snapshot_id":"s"}`))
	f.Add([]byte(`{"app":"a","pid":0,"boot_id":"BOOT","mark":"m"}`), []byte(`{"app":"b"}`))
	f.Add([]byte(`{"app":"a","pid":-1,"boot_id":"BOOT"}`), []byte(`[]`))
	f.Add([]byte(`{"app":"a","pid":1,"boot_id":"BOOT"}`), []byte(``))
	f.Add([]byte(`{"app":"a","pid":77,"boot_id":"another"}`), []byte("null"))
	dir := f.TempDir()
	if err := os.MkdirAll(filepath.Dir(recordPath(dir, "a")), 0o700); err != nil {
		f.Fatal(err)
	}
	boot := []byte(bootID())
	f.Fuzz(func(t *testing.T, rec, op []byte) {
		in := intents{dir}
		for path, b := range map[string][]byte{recordPath(dir, "a"): rec, in.path("a"): op} {
			if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte("BOOT"), boot), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r, err := loadRecord(dir, "a")
		switch {
		case err != nil && (r != nil || !strings.Contains(err.Error(), recordPath(dir, "a"))):
			t.Fatalf("%+v, %v", r, err)
		case r != nil && (r.App != "a" || r.BootID != string(boot) || r.PID < 0 || r.PID == 1 || r.PID == 0 && r.Mark == ""):
			t.Fatalf("taken for a record: %+v", r)
		}
		i, err := in.load("a")
		if err != nil && (i != nil || !strings.Contains(err.Error(), in.path("a")) || strings.Contains(err.Error(), "%!")) || err == nil && (i == nil || i.App != "a") {
			t.Fatalf("%+v, %v", i, err)
		}
	})
}
