package journal

import (
	"crypto/sha256"
	"encoding/binary"

	bolt "go.etcd.io/bbolt"
)

// bbolt's pages have no checksums: a disk that loses what it said was written can
// leave an old page in a new tree, where it fits. So the contents have a sum, which
// each transaction brings up to date. It is the sum of all entries, whatever their
// order: it changes by what changes.

var sumKey = []byte("sum")

// sum is the exclusive or of a hash of each entry of a file but the sum's.
type sum struct {
	now [16]byte
	buf []byte
}

// read takes up the sum of the transaction before; false: there is none.
func (s *sum) read(meta *bolt.Bucket) bool {
	return copy(s.now[:], meta.Get(sumKey)) == len(s.now)
}

// write has it written with the transaction.
func (s *sum) write(meta *bolt.Bucket) error {
	return meta.Put(sumKey, append([]byte(nil), s.now[:]...))
}

// change counts an entry in that is not, and out that is.
func (s *sum) change(t Table, key, value []byte) {
	s.buf = append(append(s.buf[:0], t...), 0)
	s.buf = binary.BigEndian.AppendUint32(s.buf, uint32(len(key)))
	s.buf = append(append(s.buf, key...), value...)
	h := sha256.Sum256(s.buf)
	for i := range s.now {
		s.now[i] ^= h[i]
	}
}

// all counts everything in that the file holds.
func (s *sum) all(tx *bolt.Tx) error {
	for _, t := range tables {
		b := tx.Bucket([]byte(t))
		if b == nil {
			continue
		}
		err := b.ForEach(func(k, v []byte) error {
			if t != Meta || string(k) != string(sumKey) {
				s.change(t, k, v)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
