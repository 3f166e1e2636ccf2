package node

import (
	"bytes"
	"compress/gzip"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

var update = flag.String("update", "", "write the journal's fixture into this file")

// values are what the fields of a record hold, by name. They are set by name, so that
// this file compiles with the code of an earlier version, which leaves out what it
// does not have.
type values map[string]any

func (f values) set(record any) {
	v := reflect.ValueOf(record).Elem()
	for name, x := range f {
		field := v.FieldByName(name)
		if !field.IsValid() {
			continue
		}
		if sub, ok := x.(values); ok {
			sub.set(field.Addr().Interface())
			continue
		}
		if list, ok := x.([]values); ok {
			field.Set(reflect.MakeSlice(field.Type(), len(list), len(list)))
			for i, sub := range list {
				sub.set(field.Index(i).Addr().Interface())
			}
			continue
		}
		field.Set(reflect.ValueOf(x).Convert(field.Type()))
	}
}

// fixtureVIPs are of an application that is held, fixtureApp what is known of it.
var (
	fixtureVIPs = []netip.Addr{netip.MustParseAddr("192.0.2.100"), netip.MustParseAddr("2001:db8::100")}
	fixtureApp  = values{
		"Name": "redis", "VIPs": fixtureVIPs, "Include": []uint16{6379, 6380}, "Exclude": []uint16{22}, "Outgoing": []uint16{5432},
		"IncludeAddresses": []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:1::/48")},
		"ExcludeAddrs":     []netip.Prefix{netip.MustParsePrefix("198.51.100.200/32")}, "State": snapshotDone, "SnapshotID": "20261122T153000Z-1a2b3c",
		"Listen": []uint16{6379}, "Quiet": 70_000_000, "Sealed": true, "PassCloses": true, "Wake": true, "BytesIn": 1001, "BytesOut": 1002,
		"AbortOnData": true, "Spool": 65536, "WakeFull": true, "Term": 3,
		"Heartbeats": []values{{"Remote": netip.MustParsePrefix("198.51.100.0/24"), "Match": []byte("PING\r\n"), "Reply": []byte("+PONG\r\n")}},
	}
)

// fixtureConn is a held connection as it is without what makes it special.
func fixtureConn(n uint32, special values) values {
	f := values{
		"App":    "redis",
		"Opt":    values{"MSS": 1460, "TS": true, "SACK": true, "WScale": true, "RemoteScale": 7, "LocalScale": 9, "ECN": true},
		"SndUna": 0x81000010 + n, "SndNxt": 0x81000010 + n, "RcvNxt": 0x91000000 + n, "Window": 512, "Edge": 0x91040000 + n, "RemoteWnd": 65536,
		"RemoteLast": 502, "RemoteSeen": true, "TSVal": 0xa1000000 + n, "TSRec": 0xb1000000 + n, "TSAt": 1 << 40,
		"Handshake": true, "AckSeen": true, "Learned": true, "Frozen": true, "Confirmed": true, "Sealed": true, "LocalGone": true,
		"ISS": 0x80ffff00 + n, "IRS": 0x90ffff00 + n, "Created": 1<<40 - 1, "BytesIn": 100 + n, "BytesOut": 200 + n, "Discarded": 3,
	}
	for k, v := range special {
		f[k] = v
	}
	return f
}

type fixturePair struct {
	id     filter.ConnID
	fields values
	spool  []string
}

// fixtureConns are one of each kind.
func fixtureConns() []fixturePair {
	id := func(local, remote string) filter.ConnID {
		return filter.ConnID{Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
	}
	return []fixturePair{
		{id("192.0.2.100:6379", "198.51.100.1:40001"), fixtureConn(1, values{"Role": passive, "State": stateHeld}), nil},
		{id("[2001:db8::100]:6379", "[2001:db8:1::2]:40002"), fixtureConn(2, values{"Role": passive, "State": stateHeld, "Refused": "no", "SndUna": 0x81000002, "Hole": true}), nil},
		{id("192.0.2.100:6379", "198.51.100.3:40003"), fixtureConn(3, values{"Role": passive, "State": stateClosing, "FinIn": true, "FinInEnd": 0x91000003, "RemoteFirst": true, "CloseWait": true}), nil},
		{id("192.0.2.100:40404", "198.51.100.4:5432"), fixtureConn(4, values{"Role": active, "State": stateHeld, "Translated": true, "HsIRS": 0x90000004,
			"Tr": values{"Out": 0x10000001, "In": 0x10000002, "TSOut": 0x10000003, "TSIn": 0x10000004, "Port": 40405, "ScaleLocal": 8, "ScaleSeen": 9}}), nil},
		{id("192.0.2.100:6379", "198.51.100.5:40005"), fixtureConn(5, values{"Role": passive, "State": stateHeld, "Spooled": true, "KeptAt": 0x91000005 - 9}), []string{"SET ", "a 1\r\n"}},
	}
}

// States and roles, whose numbers never change.
const (
	snapshotDone            = 4
	stateClosing, stateHeld = 4, 5
	passive, active         = 0, 1
)

// fixtureRecords are what the engine would have kept.
func fixtureRecords() []filter.Record {
	app := new(filter.AppRecord)
	fixtureApp.set(app)
	out := []filter.Record{{App: app}}
	for _, p := range fixtureConns() {
		c := new(filter.ConnRecord)
		p.fields.set(c)
		c.ID = p.id
		out = append(out, filter.Record{Conn: c, ID: p.id})
		at, _ := p.fields["KeptAt"].(int)
		for _, data := range p.spool {
			r := filter.Record{ID: p.id}
			chunk := reflect.ValueOf(&r).Elem().FieldByName("Chunk")
			if !chunk.IsValid() {
				continue // there were none
			}
			chunk.Set(reflect.New(chunk.Type().Elem()))
			values{"At": at, "Data": []byte(data)}.set(chunk.Interface())
			out = append(out, r)
			at += len(data)
		}
	}
	return out
}

// compare looks whether the newest fixture holds what was made now; nil in an old checkout.
var compare func(t *testing.T, made []byte)

// TestFixture writes the fixture, with -update; testdata/README.md tells how. Without, it sees
// that what is written now is what the newest fixture holds: another encoding takes a new one.
func TestFixture(t *testing.T) {
	dir := t.TempDir()
	n := &Node{}
	if _, err := n.openJournal(dir); err != nil {
		t.Fatal(err)
	}
	n.unsaved = nil // this machine's boot
	if err := n.record(fixtureRecords()); err != nil {
		t.Fatal(err)
	}
	if err := n.journal.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	if *update == "" {
		compare(t, b)
		return
	}
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(*update, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}
