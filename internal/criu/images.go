package criu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	sk_inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
)

// Socket is a TCP connection in images. Numbers are the socket's own.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 in IPv6 is folded to IPv4
	// LocalClosed and RemoteClosed: its own FIN was written, the remote's was received.
	LocalClosed, RemoteClosed bool

	RcvNxt uint32 // behind the remote's FIN
	SndUna uint32
	SndNxt uint32 // behind everything written, and the FIN
	Unread uint32 // octets

	Timestamps, SACK, WScale, ECN bool
	SndWScale, RcvWScale          uint8
	TSVal                         uint32
	MSS                           uint32
	SndWnd, RcvWnd, RcvWup        uint32

	finWaits bool // its FIN is not acknowledged
}

// The kernel's numbers of TCP states (include/net/tcp_states.h).
const (
	established = 1
	finWait1    = 4
	finWait2    = 5
	closed      = 7
	closeWait   = 8
	lastAck     = 9
	listen      = 10
	closing     = 11
)

// TCPI_OPT_ bits (include/uapi/linux/tcp.h).
const (
	optTimestamps = 1 << iota
	optSACK
	optWScale
	optECN
)

const (
	inet, inet6 = 2, 10 // families
	ipprotoTCP  = 6
	// mostEntry bounds an entry of an image that is read: they are some hundred octets.
	mostEntry = 1 << 20
	// streamHead is how much of a socket's file is read for its numbers.
	streamHead   = 4 << 10
	streamPrefix = "tcp-stream-"
)

// Sockets reads the TCP connections of images.
func Sockets(dir string) ([]Socket, error) { return sockets(dir, nil) }

// sockets does so with what was read early; nil: nothing was.
func sockets(dir string, early *Follower) ([]Socket, error) {
	var inos []uint32
	var out []Socket
	err := entries(filepath.Join(dir, "files.img"), magicFiles, func(b []byte) error {
		var f fdinfo.FileEntry
		if err := proto.Unmarshal(b, &f); err != nil {
			return err
		}
		k := f.GetIsk()
		if k == nil || k.GetProto() != ipprotoTCP || k.GetType() != 1 {
			return nil
		}
		switch k.GetState() {
		case established, finWait1, finWait2, closeWait, lastAck, closing:
		default:
			return nil
		}
		s, err := addressed(k)
		if err != nil {
			return err
		}
		inos, out = append(inos, k.GetIno()), append(out, s)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, streams(dir, inos, out, early)
}

// addressed takes addresses and state of a socket.
func addressed(k *sk_inet.InetSkEntry) (Socket, error) {
	var s Socket
	local, ok1 := address(k.GetFamily(), k.GetSrcAddr())
	remote, ok2 := address(k.GetFamily(), k.GetDstAddr())
	if !ok1 || !ok2 {
		return s, fmt.Errorf("socket %d: it has no address of family %d", k.GetIno(), k.GetFamily())
	}
	s.Local, s.Remote = netip.AddrPortFrom(local, uint16(k.GetSrcPort())), netip.AddrPortFrom(remote, uint16(k.GetDstPort()))
	switch k.GetState() {
	case finWait1:
		s.LocalClosed, s.finWaits = true, true
	case finWait2:
		s.LocalClosed = true
	case closeWait:
		s.RemoteClosed = true
	case lastAck, closing:
		s.LocalClosed, s.RemoteClosed, s.finWaits = true, true, true
	}
	return s, nil
}

// address reads one as CRIU writes it: words whose octets are those of the address.
func address(family uint32, words []uint32) (netip.Addr, bool) {
	var b [16]byte
	for i := range min(len(words), 4) {
		binary.LittleEndian.PutUint32(b[4*i:], words[i])
	}
	switch {
	case family == inet && len(words) >= 1:
		return netip.AddrFrom4([4]byte(b[:])), true
	case family == inet6 && len(words) == 4:
		return netip.AddrFrom16(b).Unmap(), true
	}
	return netip.Addr{}, false
}

// streams reads the numbers of every socket, several at a time: there is a file for each,
// and the process stands still meanwhile.
func streams(dir string, inos []uint32, out []Socket, early *Follower) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	var wg sync.WaitGroup
	n := runtime.GOMAXPROCS(0)
	errs := make([]error, n)
	for w := range n {
		wg.Go(func() {
			buf := make([]byte, streamHead)
			for i := w; i < len(out); i += n {
				name := fmt.Sprintf(streamPrefix+"%x.img", inos[i])
				t := early.stream(int(d.Fd()), name)
				if t == nil {
					var err error
					if t, err = readStream(int(d.Fd()), name, buf); err != nil {
						errs[w] = fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
						return
					}
				}
				out[i].numbers(t)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// readStream reads the numbers of a socket from its file with as few calls as there can be.
func readStream(dir int, name string, buf []byte) (*tcp_stream.TcpStreamEntry, error) {
	b, err := head(dir, name, buf)
	if err != nil {
		return nil, err
	}
	return stream(b)
}

// stream reads them from the first octets of the file, at most streamHead. The queues stand
// behind the entry.
func stream(b []byte) (*tcp_stream.TcpStreamEntry, error) {
	full := len(b) == streamHead
	if err := ofKind(b, magicImage, magicStream); err != nil {
		return nil, err
	}
	switch b = b[2*magicSize:]; {
	case len(b) == 0:
		return nil, errNone
	case len(b) < 4:
		return nil, errCutOff
	}
	n := binary.LittleEndian.Uint32(b)
	if b = b[4:]; uint64(n) > uint64(len(b)) {
		if full {
			return nil, fmt.Errorf("an entry of %d octets is none of CRIU's", n)
		}
		return nil, errCutOff
	}
	t := new(tcp_stream.TcpStreamEntry)
	if err := proto.Unmarshal(b[:n], t); err != nil {
		return nil, err
	}
	return t, nil
}

// numbers takes what the file of a socket says of it.
func (s *Socket) numbers(t *tcp_stream.TcpStreamEntry) {
	s.RcvNxt, s.SndNxt, s.Unread = t.GetInqSeq(), t.GetOutqSeq(), t.GetInqLen()
	s.SndUna = s.SndNxt - t.GetOutqLen()
	if s.finWaits {
		s.SndUna-- // it does not count in the length (soccr/soccr.c)
	}
	m := t.GetOptMask()
	s.Timestamps, s.SACK, s.WScale, s.ECN = m&optTimestamps != 0, m&optSACK != 0, m&optWScale != 0, m&optECN != 0
	s.SndWScale, s.RcvWScale = uint8(t.GetSndWscale()), uint8(t.GetRcvWscale())
	s.TSVal, s.MSS = t.GetTimestamp(), t.GetMssClamp()
	s.SndWnd, s.RcvWnd, s.RcvWup = t.GetSndWnd(), t.GetRcvWnd(), t.GetRcvWup()
}

// PIDs reads the numbers of all threads in images.
func PIDs(dir string) ([]int, error) {
	var out []int
	err := entries(filepath.Join(dir, "pstree.img"), magicTree, func(b []byte) error {
		var p pstree.PstreeEntry
		if err := proto.Unmarshal(b, &p); err != nil {
			return err
		}
		for _, t := range p.GetThreads() {
			out = append(out, int(t))
		}
		return nil
	})
	if err == nil && len(out) == 0 {
		err = fmt.Errorf("%s: %w", filepath.Join(dir, "pstree.img"), errNone)
	}
	return out, err
}

// head reads the begin of a file into buf.
func head(dir int, name string, buf []byte) ([]byte, error) {
	fd, err := again(func() (int, error) { return unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n, err := again(func() (int, error) { return unix.Read(fd, buf) })
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// again repeats a system call that a signal has interrupted.
func again(f func() (int, error)) (n int, err error) {
	for n, err = f(); err == unix.EINTR; n, err = f() {
	}
	return n, err
}

var (
	errNone   = errors.New("it has no entry")
	errNoFile = errors.New("it is no regular file")
	errCutOff = errors.New("it is cut off")
	errKind   = errors.New("it is no image of that kind")
)

// What images begin with (criu/include/magic.h), each number in magicSize octets.
const (
	magicImage     = 0x54564319 // of all that are read here but the inventory
	magicFiles     = 0x56303138
	magicTree      = 0x50273030
	magicStream    = 0x51465506
	magicInventory = 0x58313116

	magicSize = 4
)

// ofKind tells why a file that begins with b does not begin with those numbers: one that is
// empty would else look like an image without entries.
func ofKind(b []byte, magics ...uint32) error {
	if len(b) < magicSize*len(magics) {
		return errCutOff
	}
	for i, m := range magics {
		if binary.LittleEndian.Uint32(b[magicSize*i:]) != m {
			return errKind
		}
	}
	return nil
}

// entries calls f for each entry of an image of that kind: two magic numbers, then each
// entry behind its length (criu/image.c).
func entries(path string, kind uint32, f func([]byte) error) error {
	return entriesBehind(path, f, magicImage, kind)
}

// entriesBehind is entries of an image that begins with those numbers.
func entriesBehind(path string, f func([]byte) error, magics ...uint32) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	in := bufio.NewReader(file)
	begin, err := in.Peek(magicSize * len(magics))
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := ofKind(begin, magics...); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if _, err := in.Discard(len(begin)); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var length [4]byte
	for {
		switch _, err := io.ReadFull(in, length[:]); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%s: it is cut off: %w", path, err)
		}
		n := binary.LittleEndian.Uint32(length[:])
		if n > mostEntry {
			return fmt.Errorf("%s: an entry of %d octets is none of CRIU's", path, n)
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(in, b); err != nil {
			return fmt.Errorf("%s: it is cut off: %w", path, err)
		}
		if err := f(b); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
}
