package node

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// fill gives every field of v, however deep, a value of its own.
func fill(t *testing.T, v reflect.Value, n *uint64) {
	t.Helper()
	*n++
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(*n))))
		return
	case *netip.AddrPort:
		b := make([]byte, 16)
		binary.BigEndian.PutUint64(b, *n<<32)
		*x = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)), uint16(*n))
		return
	case *netip.Prefix:
		*x = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(*n)}), 16)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if !v.Type().Field(i).IsExported() {
				t.Fatalf("%v.%s would not be recorded", v.Type(), v.Type().Field(i).Name)
			}
			fill(t, v.Field(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, v.Index(0), n)
		fill(t, v.Index(1), n)
	case reflect.String:
		v.SetString(string(rune('a' + *n%26)))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(*n)
	default:
		t.Fatalf("a record has a field of kind %v", v.Kind())
	}
}

func opened(t *testing.T, dir string) (*Node, legacy) {
	t.Helper()
	n := &Node{}
	l, err := n.openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.journal.Close() })
	return n, l
}

// Every field of a record comes back.
func TestRecords(t *testing.T) {
	dir := t.TempDir()
	n, _ := opened(t, dir)
	var app filter.AppRecord
	var conn, gone filter.ConnRecord
	var k uint64
	fill(t, reflect.ValueOf(&app).Elem(), &k)
	fill(t, reflect.ValueOf(&conn).Elem(), &k)
	fill(t, reflect.ValueOf(&gone).Elem(), &k)
	records := []filter.Record{{ID: conn.ID, Chunk: &filter.Chunk{}}, {ID: conn.ID, Unspool: true}, {ID: gone.ID, Chunk: &filter.Chunk{}}, {App: &app}, {Conn: &gone, ID: gone.ID}, {Conn: &conn, ID: conn.ID}, {ID: gone.ID}, {App: &filter.AppRecord{Name: "other"}}, {Name: "other"}}
	for i := range conn.Chunks {
		records = append(records, filter.Record{ID: conn.ID, Chunk: &conn.Chunks[i]})
	}
	if err := n.record(records); err != nil {
		t.Fatal(err)
	}
	if err := n.journal.Close(); err != nil {
		t.Fatal(err)
	}
	_, l := opened(t, dir)
	if !reflect.DeepEqual(l.apps, []filter.AppRecord{app}) {
		t.Errorf("applications:\n%+v\nwant\n%+v", l.apps, app)
	}
	if !reflect.DeepEqual(l.conns, []filter.ConnRecord{conn}) {
		t.Errorf("connections:\n%+v\nwant\n%+v", l.conns, conn)
	}
	if l.rebooted {
		t.Error("rebooted, in the same boot")
	}
}

// The end of a connection waits for the next record that must not wait, or
// for the end of the process.
func TestEndsAreLazy(t *testing.T) {
	dir := t.TempDir()
	n, _ := opened(t, dir)
	n.unsaved = nil // the boot identification
	id := filter.ConnID{Local: netip.MustParseAddrPort("10.0.0.1:80"), Remote: netip.MustParseAddrPort("10.0.0.2:1000")}
	if err := n.record([]filter.Record{{Conn: &filter.ConnRecord{ID: id}, ID: id}}); err != nil || len(n.unsaved) != 0 {
		t.Fatalf("%d records wait, %v", len(n.unsaved), err)
	}
	if err := n.record([]filter.Record{{ID: id}}); err != nil || len(n.unsaved) != 1 {
		t.Fatalf("%d records wait, want 1, %v", len(n.unsaved), err)
	}
	if err := n.record([]filter.Record{{App: &filter.AppRecord{Name: "a"}}}); err != nil || len(n.unsaved) != 0 {
		t.Fatalf("%d records wait, %v", len(n.unsaved), err)
	}
	_ = n.journal.Close()
	if _, l := opened(t, dir); len(l.conns) != 0 || len(l.apps) != 1 {
		t.Errorf("taken up: %+v", l)
	}
}

// What cannot be written is not forgotten: it goes with the next record.
func TestJournalFails(t *testing.T) {
	dir := t.TempDir()
	n, _ := opened(t, dir)
	_ = n.journal.Close()
	if err := n.record([]filter.Record{{App: &filter.AppRecord{Name: "a"}}}); err == nil {
		t.Fatal("written to a closed journal")
	}
	waiting := n.unsaved
	n, _ = opened(t, dir)
	n.unsaved = waiting
	if err := n.record([]filter.Record{{App: &filter.AppRecord{Name: "b"}}}); err != nil {
		t.Fatal(err)
	}
	_ = n.journal.Close()
	if _, l := opened(t, dir); len(l.apps) != 2 {
		t.Errorf("taken up: %+v", l.apps)
	}
}

// While a disk is full, the newest record of each key waits and no other; and
// a request that is repeated is answered with the error, not as if it were done.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	n, _ := opened(t, dir)
	n.unsaved = nil
	_ = n.journal.Close()
	id := filter.ConnID{Local: netip.MustParseAddrPort("10.0.0.1:80"), Remote: netip.MustParseAddrPort("10.0.0.2:1000")}
	for i := range 100 {
		err := n.record([]filter.Record{{App: &filter.AppRecord{Name: "a", BytesIn: uint64(i)}}, {Conn: &filter.ConnRecord{App: "a"}, ID: id}, {ID: id}})
		if err == nil {
			t.Fatal("written to a closed journal")
		}
	}
	if len(n.unsaved) != 2 {
		t.Fatalf("%d records wait, want one of each key", len(n.unsaved))
	}
	spool := &Node{journal: n.journal}
	for range 100 {
		_ = spool.record([]filter.Record{{Chunk: &filter.Chunk{At: 1, Data: []byte("x")}, ID: id}, {Unspool: true, ID: id}, {Chunk: &filter.Chunk{At: 2, Data: []byte("y")}, ID: id}})
	}
	if len(spool.unsaved) != 2 {
		t.Fatalf("%d records wait, want the end of a spool and what came behind it", len(spool.unsaved))
	}
	n.fx.Replies = []filter.Reply{{ID: 1, Body: &filter.StatusList{}}}
	if err := n.payOwed(); err != nil {
		t.Errorf("a question waits for the disk: %v", err)
	}
	n.fx.Replies = append(n.fx.Replies, filter.Reply{ID: 2, Body: &filter.Result{App: "a"}})
	if err := n.payOwed(); err == nil {
		t.Error("a repeated request was done, with nothing on the disk")
	}
	waiting := n.unsaved
	n, _ = opened(t, dir)
	n.unsaved, n.owed = waiting, true
	n.fx.Replies = []filter.Reply{{ID: 3, Body: &filter.Result{App: "a"}}}
	if err := n.payOwed(); err != nil || n.owed || len(n.unsaved) != 0 {
		t.Fatalf("owed %v, %d records, %v", n.owed, len(n.unsaved), err)
	}
	_ = n.journal.Close()
	if _, l := opened(t, dir); len(l.apps) != 1 || l.apps[0].BytesIn != 99 || len(l.conns) != 0 {
		t.Errorf("taken up: %+v", l)
	}
}

func TestReboot(t *testing.T) {
	dir := t.TempDir()
	n, _ := opened(t, dir)
	if err := n.save(); err != nil {
		t.Fatal(err)
	}
	if err := n.journal.Apply([]journal.Entry{{Table: journal.Meta, Key: bootKey, Value: []byte("an earlier one")}}); err != nil {
		t.Fatal(err)
	}
	_ = n.journal.Close()
	if _, l := opened(t, dir); !l.rebooted {
		t.Error("a reboot was not noticed")
	}
}

func TestRecordsOfNonsense(t *testing.T) {
	dir := t.TempDir()
	j, err := journal.Open(filepath.Join(dir, "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Apply([]journal.Entry{{Table: journal.Conns, Key: []byte("x"), Value: []byte("not CBOR")}}); err != nil {
		t.Fatal(err)
	}
	_ = j.Close()
	n := &Node{}
	if _, err := n.openJournal(dir); !errors.Is(err, journal.ErrDamaged) {
		t.Errorf("taken up: %v", err)
	}
	_ = n.journal.Close()
}
