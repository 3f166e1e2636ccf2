package node

import (
	"bytes"
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/seqnum"
)

// envelope is how structures travel: the version can be read whatever the body is.
type envelope struct {
	Version uint32          `cbor:"1,keyasint"`
	Body    cbor.RawMessage `cbor:"2,keyasint"`
}

// parcel is the body. What a journal has in keys stands beside the records.
type parcel struct {
	At    int64               `cbor:"1,keyasint,omitempty"`
	App   filter.AppRecord    `cbor:"2,keyasint"`
	IDs   [][]byte            `cbor:"3,keyasint,omitempty"` // of Conns, as in the journal
	Conns []filter.ConnRecord `cbor:"4,keyasint,omitempty"`
	Spool []piece             `cbor:"5,keyasint,omitempty"` // in order
	Syns  [][]byte            `cbor:"6,keyasint,omitempty"`
}

// piece is a piece of a spool.
type piece struct {
	Conn int          `cbor:"1,keyasint,omitempty"` // index
	At   seqnum.Value `cbor:"2,keyasint,omitempty"`
	Data []byte       `cbor:"3,keyasint,omitempty"`
}

// mostConns is the most connections that structures may have: as many as
// queue.max_connections can be by default.
const mostConns = 1 << 20

// decoding of what another node sends. Nothing of it is trusted: lengths are
// bounded, and text is text.
var decoding = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxArrayElements: mostConns, MaxMapPairs: 256, MaxNestedLevels: 16, IndefLength: cbor.IndefLengthForbidden,
		DupMapKey: cbor.DupMapKeyEnforcedAPF, TagsMd: cbor.TagsForbidden}.DecMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return m
}()

// encodeStructures gives the octets of HandoverReply.structures.
func encodeStructures(st *filter.Structures) ([]byte, error) {
	p := parcel{At: st.At, App: st.App, Conns: st.Conns, IDs: make([][]byte, len(st.Conns)), Syns: st.Syns}
	size := 1024
	for i := range st.Conns {
		c := &st.Conns[i]
		p.IDs[i] = connKey(c.ID)
		size += usualRecord + len(c.Kept)
		for _, x := range c.Chunks {
			p.Spool = append(p.Spool, piece{i, x.At, x.Data})
			size += len(x.Data)
		}
	}
	var body, out bytes.Buffer
	body.Grow(size)
	if err := encoding.MarshalToBuffer(&p, &body); err != nil {
		return nil, fmt.Errorf("encode the structures: %w", err)
	}
	out.Grow(body.Len() + 32)
	if err := encoding.MarshalToBuffer(&envelope{st.Version, body.Bytes()}, &out); err != nil {
		return nil, fmt.Errorf("encode the structures: %w", err)
	}
	if out.Len() > control.MaxPeerMessage-4096 {
		return nil, fmt.Errorf("the structures take %d octets, and between nodes a message has at most %d; restore the application on this node", out.Len(), control.MaxPeerMessage)
	}
	return out.Bytes(), nil
}

// decodeStructures reads them. What is in them the engine judges.
func decodeStructures(b []byte) (*filter.Structures, error) {
	bad := func(err error) (*filter.Structures, error) {
		return nil, fmt.Errorf("%w: they cannot be read: %v", filter.ErrStructures, err)
	}
	var e envelope
	if err := decoding.Unmarshal(b, &e); err != nil {
		return bad(err)
	}
	st := &filter.Structures{Version: e.Version}
	if e.Version != filter.StructuresVersion {
		return st, nil // the engine says what that means
	}
	var p parcel
	if err := decoding.Unmarshal(e.Body, &p); err != nil {
		return bad(err)
	}
	if len(p.IDs) != len(p.Conns) {
		return bad(fmt.Errorf("%d addresses for %d connections", len(p.IDs), len(p.Conns)))
	}
	st.At, st.App, st.Conns, st.Syns = p.At, p.App, p.Conns, p.Syns
	for i, k := range p.IDs {
		var err error
		if st.Conns[i].ID, err = connOf(k); err != nil {
			return bad(err)
		}
	}
	for _, x := range p.Spool {
		if x.Conn < 0 || x.Conn >= len(st.Conns) {
			return bad(fmt.Errorf("a spool of connection %d of %d", x.Conn, len(st.Conns)))
		}
		c := &st.Conns[x.Conn]
		c.Chunks = append(c.Chunks, filter.Chunk{At: x.At, Data: x.Data})
	}
	return st, nil
}
