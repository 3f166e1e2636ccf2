package criu

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
)

// mostEarly is the size of files that are read early, in octets: what waits in the queues of
// a socket is seldom more, and the end of one that is long would be waited for.
const mostEarly = 64 << 10

// Follower reads the small files of images while CRIU writes them, each when it is closed
// (inotify(7)). There is one for every socket; what is left to read when the process
// stands still and CRIU has come to the end is little. What it misses is read then.
type Follower struct {
	dir     string
	inotify *os.File
	ended   chan struct{} // run has

	mu    sync.Mutex
	files map[string]early // by their names
}

// early is what was read of a file that was of this size and age then.
type early struct {
	size   int64
	at     unix.Timespec
	sum    string
	stream *tcp_stream.TcpStreamEntry // the numbers of a socket; nil: it has none
}

// Follow begins to read what is written into dir, until Stop.
func Follow(dir string) *Follower {
	f := &Follower{dir: dir, ended: make(chan struct{}), files: map[string]early{}}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		f.inotify = os.NewFile(uintptr(fd), "inotify")
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_ONLYDIR)
	}
	if err != nil { // the limits of inotify: everything is read in the end
		close(f.ended)
		return f
	}
	go f.run()
	return f
}

// Stop ends it: what is closed by now has been read.
func (f *Follower) Stop() {
	if f.inotify == nil {
		return
	}
	_ = f.inotify.SetReadDeadline(time.Unix(1, 0))
	<-f.ended
	f.inotify.Close()
}

func (f *Follower) run() {
	defer close(f.ended)
	raw, err := f.inotify.SyscallConn()
	if err != nil {
		return
	}
	d, err := os.Open(f.dir)
	if err != nil {
		return
	}
	defer d.Close()
	events, buf := make([]byte, 16<<10), make([]byte, mostEarly+1)
	drain := func(fd uintptr) (over bool) {
		for {
			n, err := again(func() (int, error) { return unix.Read(int(fd), events) })
			if err != nil {
				return err != unix.EAGAIN
			}
			for _, name := range closedFiles(events[:n]) {
				f.read(int(d.Fd()), name, buf)
			}
		}
	}
	_ = raw.Read(drain)
	_ = raw.Control(func(fd uintptr) { drain(fd) }) // what came before Stop
}

// closedFiles are the names in events of inotify.
func closedFiles(b []byte) (names []string) {
	for len(b) >= unix.SizeofInotifyEvent {
		n := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if n > len(b) {
			return names
		}
		if name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:n], []byte{0}); len(name) > 0 {
			names = append(names, string(name))
		}
		b = b[n:]
	}
	return names
}

// read takes one file, where it is a small one.
func (f *Follower) read(dir int, name string, buf []byte) {
	b, st, err := wholeFile(dir, name, buf)
	if err != nil || len(b) > mostEarly {
		return
	}
	sum := sha256.Sum256(b)
	e := early{size: st.Size, at: st.Mtim, sum: hex.EncodeToString(sum[:])}
	if strings.HasPrefix(name, streamPrefix) {
		e.stream, _ = stream(b[:min(len(b), streamHead)]) // what is wrong with it is found in the end
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[name] = e
}

// wholeFile reads a regular file into buf, as far as that goes.
func wholeFile(dir int, name string, buf []byte) (b []byte, st unix.Stat_t, err error) {
	fd, err := again(func() (int, error) {
		return unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, st, err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil { // before: who writes after it changes the time
		return nil, st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, st, errNoFile
	}
	for {
		n, err := again(func() (int, error) { return unix.Read(fd, buf[len(b):]) })
		if err != nil {
			return nil, st, err
		}
		if b = buf[:len(b)+n]; n == 0 || len(b) == len(buf) {
			return b, st, nil
		}
	}
}

// Sum gives the SHA-256 in hexadecimal of a file that was read and has not been changed
// since, which st, its state now, tells.
func (f *Follower) Sum(name string, st *unix.Stat_t) (string, bool) {
	e, ok := f.unchanged(name, st)
	return e.sum, ok
}

func (f *Follower) unchanged(name string, st *unix.Stat_t) (early, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.files[name]
	if !ok || e.size != st.Size || e.at != st.Mtim {
		return early{}, false
	}
	return e, true
}

// Sockets is the function of that name for the directory that is followed.
func (f *Follower) Sockets() ([]Socket, error) { return sockets(f.dir, f) }

// stream gives what a socket's file tells; nil: it was not read.
func (f *Follower) stream(dir int, name string) *tcp_stream.TcpStreamEntry {
	if f == nil {
		return nil
	}
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return nil
	}
	e, _ := f.unchanged(name, &st)
	return e.stream
}
