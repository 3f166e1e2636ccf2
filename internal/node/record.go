package node

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
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
	var buf bytes.Buffer // one for all; values lie in it one behind the other
	buf.Grow(len(records) * usualRecord)
	first := len(n.unsaved)
	ends := make([]int, 0, len(records))
	for i := range records {
		r := &records[i]
		lasting = lasting || r.Lasting()
		e := journal.Entry{Table: journal.Conns}
		var err error
		switch {
		case r.App != nil:
			e.Table, e.Key = journal.Apps, []byte(r.App.Name)
			err = encoding.MarshalToBuffer(r.App, &buf)
		case r.Name != "":
			e.Table, e.Key = journal.Apps, []byte(r.Name)
		case r.Chunk != nil:
			e.Table, e.Key = journal.Spool, n.chunkKey(r)
			_, err = buf.Write(r.Chunk.Data)
		case r.Unspool:
			e.Table, e.Key, e.Prefix = journal.Spool, spoolKey(r.ID), true
		case r.Conn != nil:
			e.Key = connKey(r.ID)
			err = encoding.MarshalToBuffer(r.Conn, &buf)
		default:
			e.Key = connKey(r.ID)
		}
		if err != nil {
			n.unsaved = n.unsaved[:first]
			return fmt.Errorf("encode a record: %w", err)
		}
		n.unsaved = append(n.unsaved, e)
		ends = append(ends, buf.Len())
	}
	begin := 0
	for i, end := range ends {
		if end > begin {
			n.unsaved[first+i].Value = buf.Bytes()[begin:end:end]
		}
		begin = end
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
	n.reach(failpoint.Record)
	err := n.journal.Apply(n.unsaved)
	if err != nil { // tried again with the next record, and before a request is answered
		n.unsaved, n.owed, n.unsavedAt = newest(n.unsaved), true, now()
		n.spool(false)
		return fmt.Errorf("the journal cannot be written, a filter that starts anew would not know of this: %w; see that %s can be written and has room", err, filepath.Dir(n.journal.Path()))
	}
	n.reach(failpoint.Recorded)
	clear(n.unsaved)
	n.unsaved, n.owed, n.unsavedAt = n.unsaved[:0], false, 0
	n.spool(true)
	return nil
}

// spool tells the engine whether what it acknowledges for an application that is
// away would outlive it.
func (n *Node) spool(on bool) {
	if n.engine != nil {
		n.engine.Spool(on)
	}
}

// newest leaves the last entry of each key, and no piece of a spool that is
// deleted behind it: a disk that stays full must not have what waits grow with
// every change. Values get memory of their own, so that they do not hold that of
// all others.
func newest(entries []journal.Entry) []journal.Entry {
	type name struct {
		table journal.Table
		key   string
	}
	seen := make(map[name]bool, len(entries))
	out := len(entries)
	for i := len(entries) - 1; i >= 0; i-- {
		e := entries[i]
		if e.Table == journal.Spool && !e.Prefix && seen[name{e.Table, string(e.Key[:len(e.Key)-chunkTail])}] {
			continue
		}
		if k := (name{e.Table, string(e.Key)}); !seen[k] {
			seen[k] = true
			out--
			e.Value = bytes.Clone(e.Value)
			entries[out] = e
		}
	}
	return slices.Delete(entries, 0, out)
}

// payOwed writes, before a request is answered, what could not be written when
// it was due: a repeated request has no records of its own.
func (n *Node) payOwed() error {
	if !n.owed || !slices.ContainsFunc(n.fx.Replies, func(r filter.Reply) bool { return changes(r.Body) }) {
		return nil
	}
	return n.save()
}

// changes tells whether the answer body says that something was done.
func changes(body any) bool {
	switch body.(type) {
	case *filter.Result, *filter.Structures:
		return true
	}
	return false
}

// connKey is the key of a connection: its two addresses.
func connKey(id filter.ConnID) []byte {
	b := make([]byte, 0, 37)
	b, _ = id.Local.AppendBinary(b) // a valid address has no error
	b = append(b, byte(len(b)))
	b, _ = id.Remote.AppendBinary(b)
	return b
}

// spoolKey begins the keys of a connection's spool; no such key begins that of
// another one.
func spoolKey(id filter.ConnID) []byte {
	k := connKey(id)
	return append([]byte{byte(len(k))}, k...)
}

// chunkTail is how much longer the key of a piece is than its connection's.
const chunkTail = 8 + 4

// chunkKey is the key of a piece of a spool: its connection's, the order in which
// pieces came, and its sequence number.
func (n *Node) chunkKey(r *filter.Record) []byte {
	n.chunks++
	b := binary.BigEndian.AppendUint64(spoolKey(r.ID), n.chunks)
	return binary.BigEndian.AppendUint32(b, uint32(r.Chunk.At))
}

// chunkOf reads a key of chunkKey.
func chunkOf(key []byte) (id filter.ConnID, serial uint64, at seqnum.Value, err error) {
	n := len(key) - chunkTail
	if n < 1 || int(key[0]) != n-1 {
		return id, 0, 0, fmt.Errorf("key %x is not a spool's", key)
	}
	id, err = connOf(key[1:n])
	return id, binary.BigEndian.Uint64(key[n:]), seqnum.Value(binary.BigEndian.Uint32(key[n+8:])), err
}

// connOf reads a key of connKey.
func connOf(key []byte) (id filter.ConnID, err error) {
	n := len(key) / 2 // both are of one family
	if len(key) != 2*n+1 || int(key[n]) != n {
		return id, fmt.Errorf("key %x is not a connection's", key)
	}
	return id, errors.Join(id.Local.UnmarshalBinary(key[:n]), id.Remote.UnmarshalBinary(key[n+1:]))
}

// usualRecord is about the length of a connection, octets.
const usualRecord = 192

// encoding of records.
var encoding = func() cbor.UserBufferEncMode {
	m, err := cbor.EncOptions{}.UserBufferEncMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return m
}()
