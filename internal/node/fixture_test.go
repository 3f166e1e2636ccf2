package node

import (
	"bytes"
	"compress/gzip"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// unpacked is a directory with a copy of a journal in testdata.
func unpacked(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "journal.db"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sameFields compares got and want, of one struct type, but for fields that the
// writer did not know (lacks): those are zero.
func sameFields(t *testing.T, what string, got, want any, lacks []string) {
	t.Helper()
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		name, expected := g.Type().Field(i).Name, w.Field(i).Interface()
		if slices.Contains(lacks, name) {
			expected = reflect.Zero(g.Field(i).Type()).Interface()
		}
		if !reflect.DeepEqual(g.Field(i).Interface(), expected) {
			t.Errorf("%s: %s is %+v, want %+v", what, name, g.Field(i).Interface(), expected)
		}
	}
}

// The journal of every earlier filter is read and taken up, with all that was in it,
// and the second time too.
func TestJournalsOfOld(t *testing.T) {
	first := []string{"AbortOnData", "Spool", "WakeFull", "Heartbeats", "Term", "CloseWait", "Spooled", "KeptAt", "Chunks", "ECN"}
	for name, lacks := range map[string][]string{
		"journal-v1-names.db.gz":   first,
		"journal-v1-numbers.db.gz": first,
		"journal-v1-spool.db.gz":   {"Term"},
		"journal-v1.db.gz":         nil,
		"journal-v2.db.gz":         nil,
	} {
		t.Run(name, func(t *testing.T) {
			dir := unpacked(t, name)
			for range 2 {
				n, l := opened(t, dir)
				sameJournal(t, l, lacks)
				e := loaded(t, l)
				sameEngine(t, e, lacks)
				if err := n.journal.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// wanted are the records of the fixture as one that lacks fields has them, by
// connection.
func wanted(lacks []string) (app filter.AppRecord, conns map[filter.ConnID]filter.ConnRecord) {
	conns = map[filter.ConnID]filter.ConnRecord{}
	for _, r := range fixtureRecords() {
		switch {
		case r.App != nil:
			app = *r.App
		case r.Conn != nil:
			if slices.Contains(lacks, "ECN") {
				r.Conn.Opt.ECN = false
			}
			conns[r.ID] = *r.Conn
		case r.Chunk != nil && !slices.Contains(lacks, "Chunks"):
			c := conns[r.ID]
			c.Chunks = append(c.Chunks, *r.Chunk)
			conns[r.ID] = c
		}
	}
	return app, conns
}

// sameJournal compares what was read.
func sameJournal(t *testing.T, l legacy, lacks []string) {
	t.Helper()
	app, conns := wanted(lacks)
	if len(l.apps) != 1 || len(l.conns) != len(conns) || l.rebooted {
		t.Fatalf("%d applications, %d connections, rebooted %v", len(l.apps), len(l.conns), l.rebooted)
	}
	sameFields(t, "journal", l.apps[0], app, lacks)
	for _, c := range l.conns {
		sameFields(t, "journal: "+c.ID.Remote.String(), c, conns[c.ID], lacks)
	}
}

// loaded is an engine that has taken l up.
func loaded(t *testing.T, l legacy) *filter.Engine {
	t.Helper()
	e := filter.New(filter.Config{})
	var fx filter.Effects
	if err := e.Load(1<<41, l.apps, l.conns, func(filter.ConnID) bool { return true }, false, &fx); err != nil {
		t.Fatal(err)
	}
	away := map[netip.Addr]bool{}
	for _, c := range fx.Sets {
		if c.Set == filter.SetAway && c.Add {
			away[c.IP] = true
		}
	}
	for _, v := range fixtureVIPs {
		if !away[v] {
			t.Errorf("%v is not captured", v)
		}
	}
	return e
}

// sameEngine compares what the engine holds: what it shows, and what it would hand
// over to another node.
func sameEngine(t *testing.T, e *filter.Engine, lacks []string) {
	t.Helper()
	app, conns := wanted(lacks)
	s := status(e).Apps
	if len(s) != 1 || s[0].State != appstate.SnapshotDone || !s[0].RestoreRequested || s[0].SnapshotID != app.SnapshotID {
		t.Fatalf("status %+v", s)
	}
	var fx filter.Effects
	e.Step(1<<41, filter.Event{Request: &filter.Request{Body: &filter.Handover{App: app.Name, To: "b"}}}, &fx)
	st, ok := fx.Replies[0].Body.(*filter.Structures)
	if !ok {
		t.Fatal(fx.Replies[0].Err)
	}
	st.App.Term, app.Term = 0, 0 // each handover counts
	sameFields(t, "engine", st.App, app, lacks)
	if len(st.Conns) != len(conns) {
		t.Fatalf("%d connections of %d", len(st.Conns), len(conns))
	}
	for _, c := range st.Conns {
		want := conns[c.ID]
		if c.Spooled { // in one piece
			var all []byte
			for _, x := range want.Chunks {
				all = append(all, x.Data...)
			}
			if len(c.Chunks) != 1 || !bytes.Equal(c.Chunks[0].Data, all) || c.Chunks[0].At != want.KeptAt {
				t.Errorf("spool %+v, want %q", c.Chunks, all)
			}
		}
		if want.State == appstate.Closing { // it follows from the application's state, and is not recorded
			want.State = appstate.ConnectRmt
		}
		want.Reloaded, want.KeptSegments = true, uint16(len(want.Chunks))
		c.Chunks, want.Chunks = nil, nil
		sameFields(t, "engine: "+c.ID.Remote.String(), c, want, lacks)
	}
}

// newestFixture is the fixture of the encoding that is written now.
const newestFixture = "journal-v2.db.gz"

func init() {
	compare = func(t *testing.T, made []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "journal.db"), made, 0o600); err != nil {
			t.Fatal(err)
		}
		now, was := contents(t, dir), contents(t, unpacked(t, newestFixture))
		if len(now) == 0 || !maps.Equal(now, was) {
			t.Errorf("what is written now is not what %s holds: a new encoding takes a new fixture\n%q\n%q", newestFixture, now, was)
		}
	}
}

// contents are the records of a journal, by table and key.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	j, err := journal.Open(filepath.Join(dir, "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, table := range []journal.Table{journal.Apps, journal.Conns, journal.Spool} {
		if err := j.Read(table, func(k, v []byte) error { all[string(table)+"/"+string(k)] = string(v); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return all
}
