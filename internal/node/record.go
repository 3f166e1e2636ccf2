package node

import (
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// lazyFor is how long the end of a connection may wait to be recorded: a
// record that is left over is recognised by the packet rules, which do not
// know its flow any more.
const lazyFor = time.Second

// record keeps what the engine wants kept. It returns when everything that must
// be there before packets and answers leave is on the disk.
func (n *Node) record(records []filter.Record) error {
	if len(records) == 0 {
		return nil
	}
	lasting := false
	for i := range records {
		r := &records[i]
		lasting = lasting || r.Lasting()
		e := journal.Entry{Table: journal.Conns}
		var err error
		switch {
		case r.App != nil:
			e.Table, e.Key = journal.Apps, []byte(r.App.Name)
			e.Value, err = cbor.Marshal(r.App)
		case r.Name != "":
			e.Table, e.Key = journal.Apps, []byte(r.Name)
		case r.Conn != nil:
			e.Key = connKey(r.ID)
			e.Value, err = cbor.Marshal(r.Conn)
		default:
			e.Key = connKey(r.ID)
		}
		if err != nil {
			return fmt.Errorf("encode a record: %w", err)
		}
		n.unsaved = append(n.unsaved, e)
	}
	if n.unsavedAt == 0 {
		n.unsavedAt = now()
	}
	if !lasting {
		return nil
	}
	return n.save()
}

// save writes what waits.
func (n *Node) save() error {
	if len(n.unsaved) == 0 {
		return nil
	}
	err := n.journal.Apply(n.unsaved)
	if err != nil { // tried again with the next record
		n.unsavedAt = now()
		return fmt.Errorf("the journal cannot be written, a filter that starts anew would not know of this: %w", err)
	}
	clear(n.unsaved)
	n.unsaved, n.unsavedAt = n.unsaved[:0], 0
	return nil
}

func connKey(id filter.ConnID) []byte {
	b, _ := id.Local.AppendBinary(nil) // a valid address has no error
	b = append(b, byte(len(b)))
	b, _ = id.Remote.AppendBinary(b)
	return b
}
