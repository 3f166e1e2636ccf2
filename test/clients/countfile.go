package clients

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CountFile is the memory of a byte-counting server: a mapped file with a
// record for each remote port. Bytes are received into the record itself, over
// a prepared pattern that differs from the stream in every byte, so what was
// received can be told from the file alone. A process that dies between the
// system call and its own bookkeeping therefore loses nothing: a byte read is
// a byte counted.
type CountFile struct {
	mem []byte
	mu  sync.Mutex
}

const (
	recordCount = 64
	recordBuf   = 16 << 10
	recordSize  = 64 + 2*recordBuf
)

// Record is the part of a CountFile that belongs to one remote port. Its words
// are written by one process and may be read by others.
//
//	word 0: port + 1, 0 when free    word 1: position of the current buffer, times two, plus its index
//	word 2: bytes that were wrong    word 3: connections accepted
type Record struct {
	mem []byte
}

// OpenCountFile maps the file, which is made when it is not there.
func OpenCountFile(path string) (*CountFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const size = recordCount * recordSize
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() != 0 && st.Size() != size {
		return nil, fmt.Errorf("%s: %d bytes long, a count file has %d", path, st.Size(), size)
	}
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return &CountFile{mem: mem}, nil
}

// Close unmaps the file; records must not be used afterwards.
func (f *CountFile) Close() error { return unix.Munmap(f.mem) }

func (f *CountFile) record(i int) *Record {
	return &Record{mem: f.mem[i*recordSize : (i+1)*recordSize]}
}

// Find returns the record of a remote port, nil when there is none.
func (f *CountFile) Find(port uint16) *Record {
	for i := range recordCount {
		if r := f.record(i); r.word(0).Load() == uint64(port)+1 {
			return r
		}
	}
	return nil
}

// Claim returns the record of a remote port, a new one when there is none.
func (f *CountFile) Claim(port uint16) (*Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.Find(port); r != nil {
		return r, nil
	}
	for i := range recordCount {
		if r := f.record(i); r.word(0).Load() == 0 {
			invert(r.buffer(0), uint64(port), 0)
			r.word(0).Store(uint64(port) + 1)
			return r, nil
		}
	}
	return nil, errors.New("no free record: a count file is for 64 remote ports")
}

func (r *Record) word(i int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&r.mem[8*i]))
}

func (r *Record) buffer(i uint64) []byte {
	off := 64 + int(i)*recordBuf
	return r.mem[off : off+recordBuf]
}

// invert prepares b so that no byte equals the stream's.
func invert(b []byte, seed, pos uint64) {
	Fill(b, seed, pos)
	for i := range b {
		b[i] = ^b[i]
	}
}

// Port is the remote port that the record belongs to.
func (r *Record) Port() uint16 { return uint16(r.word(0).Load() - 1) }

// Count is the number of right bytes received so far, in order.
func (r *Record) Count() uint64 {
	cur := r.word(1).Load()
	return cur>>1 + uint64(Match(r.buffer(cur&1), uint64(r.Port()), cur>>1))
}

// Wrong is the number of bytes received that were not the stream's.
func (r *Record) Wrong() uint64 { return r.word(2).Load() }

// Accepted is the number of connections accepted from this port.
func (r *Record) Accepted() uint64 { return r.word(3).Load() }

// Accept counts a connection.
func (r *Record) Accept() { r.word(3).Add(1) }

// Receive calls read once with the place where the next bytes of the stream
// belong, and checks them. It returns what read returned; a wrong byte is
// counted and is an error.
func (r *Record) Receive(read func([]byte) (int, error)) (int, error) {
	cur := r.word(1).Load()
	pos, seed := cur>>1, uint64(r.Port())
	buf := r.buffer(cur & 1)
	// A predecessor that was killed may have left bytes in the buffer.
	have := Match(buf, seed, pos)
	n, err := 0, error(nil)
	if have < len(buf) {
		n, err = read(buf[have:])
	}
	if n < 0 {
		n = 0
	}
	if good := Match(buf[have:have+n], seed, pos+uint64(have)); good != n {
		r.word(2).Add(uint64(n - good))
		return n, fmt.Errorf("remote port %d: wrong byte at position %d", seed, pos+uint64(have+good))
	}
	// The other buffer is ready before it becomes the current one.
	next, idx := pos+uint64(have+n), cur&1^1
	invert(r.buffer(idx), seed, next)
	r.word(1).Store(next<<1 | idx)
	return n, err
}
