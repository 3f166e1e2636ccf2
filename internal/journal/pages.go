package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// bbolt follows what its pages say without a look at their bounds: in a damaged
// file it reads where nothing is mapped, also in goroutines of its own, and the
// process dies. So the pages are walked here before: every page is inside the file
// and in one place of the tree, everything in a page is inside it. Order of keys
// and lost pages are left to bbolt's own check.

// Layout of a file (bbolt, internal/common); numbers are the machine's.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	element     = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4
	bucketValue = 16 // root 8, sequence 8
	metaLen     = 64 // magic, version, page size, flags; root, sequence, freelist, high water, transaction, checksum

	branchPage, leafPage, metaPage, freelistPage = 1, 2, 4, 16
	metaMagic, metaVersion                       = 0xed0cdaed, 2
	noFreelist                                   = ^uint64(0)
)

var ne = binary.NativeEndian

// lookAt checks the file at path while nobody writes it. One that is not there
// is right.
func lookAt(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close() // and the lock is gone
	if err := lock(f, unix.LOCK_SH, time.Second); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(b) }()
	if err := checkPages(b); err != nil {
		return damaged(path, err)
	}
	return nil
}

// lock waits for the lock that a writer has, as bbolt takes it.
func lock(f *os.File, how int, wait time.Duration) error {
	for end := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(end) {
			return held(f.Name())
		}
	}
}

// meta is one of the two meta pages.
type meta struct {
	pageSize                   int
	root, freelist, high, txid uint64
}

// metaAt reads the meta page at an offset; false: it is not one.
func metaAt(b []byte, off int) (m meta, ok bool) {
	if len(b) < off+pageHeader+metaLen {
		return m, false
	}
	b = b[off+pageHeader:][:metaLen]
	h := fnv.New64a()
	_, _ = h.Write(b[:metaLen-8])
	if ne.Uint32(b) != metaMagic || ne.Uint32(b[4:]) != metaVersion || ne.Uint64(b[metaLen-8:]) != h.Sum64() {
		return m, false
	}
	return meta{int(ne.Uint32(b[8:])), ne.Uint64(b[16:]), ne.Uint64(b[32:]), ne.Uint64(b[40:]), ne.Uint64(b[48:])}, true
}

// mendHeader gives a meta page that is none the header that it always has. A disk that
// loses its power within a sector may leave anything there: the other meta page counts
// then, but bbolt's check wants to find both headers. undo takes it back.
func mendHeader(path string, pageSize int) (undo func() error, err error) {
	undo = func() error { return nil }
	b := make([]byte, pageSize+pageHeader+metaLen)
	f, err := os.Open(path)
	if err != nil {
		return undo, err
	}
	_, err = f.ReadAt(b, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return undo, err
	}
	for id, off := range []int{0, pageSize} {
		want := ne.AppendUint16(ne.AppendUint64(nil, uint64(id)), metaPage)
		was := b[off:][:len(want)]
		if _, ok := metaAt(b, off); ok || bytes.Equal(was, want) {
			continue
		}
		undo = func() error { return put(path, was, off) }
		return undo, put(path, want, off)
	}
	return undo, nil
}

// put writes b into the file at path.
func put(path string, b []byte, off int) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, int64(off))
	return errors.Join(err, f.Close())
}

// newest finds the meta page that counts, as bbolt does.
func newest(b []byte) (meta, error) {
	first, ok := metaAt(b, 0)
	var second meta
	ok2 := false
	if ok {
		second, ok2 = metaAt(b, first.pageSize)
	} else {
		for size := 1024; size <= 16<<20 && !ok2; size *= 2 {
			second, ok2 = metaAt(b, size)
		}
	}
	switch {
	case !ok && !ok2:
		return meta{}, errors.New("both meta pages are damaged")
	case !ok || ok2 && second.txid > first.txid:
		first = second
	}
	if s := first.pageSize; s < 1024 || s > 16<<20 || s&(s-1) != 0 {
		return meta{}, fmt.Errorf("page size %d", s)
	}
	return first, nil
}

// walker goes through a file.
type walker struct {
	b    []byte
	size int
	seen []bool // by page
}

func checkPages(b []byte) error {
	m, err := newest(b)
	if err != nil {
		return err
	}
	if m.high < 2 || m.high > uint64(len(b)/m.pageSize) {
		return fmt.Errorf("%d octets for %d pages", len(b), m.high)
	}
	w := &walker{b, m.pageSize, make([]bool, m.high)}
	if m.freelist != noFreelist {
		if err := w.freelist(m.freelist); err != nil {
			return err
		}
	}
	return w.tree(m.root)
}

// page returns a page with those that belong to it, and marks them as seen.
func (w *walker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= uint64(len(w.seen)) {
		return nil, fmt.Errorf("page %d is none", id)
	}
	b := w.b[int(id)*w.size:]
	n := uint64(ne.Uint32(b[12:])) + 1
	if ne.Uint64(b) != id || id+n > uint64(len(w.seen)) {
		return nil, fmt.Errorf("page %d says that it is page %d, and %d more", id, ne.Uint64(b), n-1)
	}
	for i := id; i < id+n; i++ {
		if err := w.mark(i); err != nil {
			return nil, err
		}
	}
	return b[:int(n)*w.size], nil
}

func (w *walker) mark(id uint64) error {
	if id < 2 || id >= uint64(len(w.seen)) || w.seen[id] {
		return fmt.Errorf("page %d is in two places, or none", id)
	}
	w.seen[id] = true
	return nil
}

func (w *walker) freelist(id uint64) error {
	b, err := w.page(id)
	if err != nil {
		return err
	}
	if ne.Uint16(b[8:]) != freelistPage {
		return fmt.Errorf("page %d is not the list of free pages", id)
	}
	n, b := uint64(ne.Uint16(b[10:])), b[pageHeader:]
	if n == 0xffff { // the number stands before the list
		n, b = ne.Uint64(b), b[8:]
	}
	if n > uint64(len(b)/8) {
		return fmt.Errorf("%d free pages do not fit into their list", n)
	}
	for ; n > 0; n, b = n-1, b[8:] {
		if err := w.mark(ne.Uint64(b)); err != nil {
			return err
		}
	}
	return nil
}

// tree walks the page id and everything below it.
func (w *walker) tree(id uint64) error {
	b, err := w.page(id)
	if err != nil {
		return err
	}
	return w.node(b, id)
}

// node walks a page whose octets are b.
func (w *walker) node(b []byte, id uint64) error {
	flags, n := ne.Uint16(b[8:]), int(ne.Uint16(b[10:]))
	if pageHeader+n*element > len(b) || flags != leafPage && flags != branchPage || flags == branchPage && n == 0 {
		return fmt.Errorf("page %d: flags %#x, %d elements", id, flags, n)
	}
	for i := range n {
		e := b[pageHeader+i*element:] // positions are from here on
		var err error
		if flags == branchPage {
			if uint64(ne.Uint32(e))+uint64(ne.Uint32(e[4:])) > uint64(len(e)) {
				return fmt.Errorf("page %d: the key of element %d is outside", id, i)
			}
			err = w.tree(ne.Uint64(e[8:]))
		} else {
			err = w.leaf(e, id, i)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leaf looks at element i of a leaf page, and into it where it is a bucket.
func (w *walker) leaf(e []byte, id uint64, i int) error {
	from := uint64(ne.Uint32(e[4:])) + uint64(ne.Uint32(e[8:]))
	to := from + uint64(ne.Uint32(e[12:]))
	if to > uint64(len(e)) {
		return fmt.Errorf("page %d: element %d is outside", id, i)
	}
	if ne.Uint32(e)&1 == 0 {
		return nil
	}
	v := e[from:to]
	switch {
	case len(v) < bucketValue:
	case ne.Uint64(v) != 0:
		return w.tree(ne.Uint64(v))
	case len(v) >= bucketValue+pageHeader && ne.Uint16(v[bucketValue+8:]) == leafPage: // a small bucket lies in its value
		return w.node(v[bucketValue:], id)
	}
	return fmt.Errorf("page %d: bucket %d is none", id, i)
}
