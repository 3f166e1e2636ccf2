package nfq

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxVec is the kernel's limit on the parts of one sendmsg, UIO_MAXIOV.
	maxVec = 1024
	// maxSend bounds the bytes of one sendmsg: the kernel copies them into one
	// contiguous buffer.
	maxSend = 512 << 10
	// maxVerdictHead is the length of a verdict without its payload.
	maxVerdictHead = nlmsgHdrLen + nfgenLen + (nlaHdrLen + 8) + (nlaHdrLen + 4) + nlaHdrLen
)

// verdict is one gathered verdict: the bytes head[off:mid], its payload, then
// the padding head[mid:end].
type verdict struct {
	off, mid, end int
	payload       []byte
}

// sendState gathers verdicts between flushes. Heads lie in one buffer and
// payloads stay where the caller has them.
type sendState struct {
	limit int // bytes of one sendmsg
	head  []byte
	list  []verdict
	iovs  []unix.Iovec

	hdr   unix.Msghdr
	errno unix.Errno
	do    func(fd uintptr)
}

func (s *sendState) init(sndbuf int) error {
	// netlink_sendmsg refuses more than the send buffer less 32 bytes.
	s.limit = min(maxSend, sndbuf-32)
	if s.limit < MaxPayload+maxVerdictHead+3 {
		return fmt.Errorf("the send buffer of %d bytes is too small for a verdict with a payload; raise net.core.wmem_max to 212992", sndbuf)
	}
	s.do = func(fd uintptr) {
		for {
			_, _, s.errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.hdr)), unix.MSG_DONTWAIT)
			if s.errno != unix.EINTR {
				return
			}
		}
	}
	return nil
}

// Accept lets the packet go on unchanged.
func (q *Queue) Accept(id uint32) { q.gather(id, nfAccept, nil, false, 0) }

// AcceptMark lets the packet go on unchanged with this mark.
func (q *Queue) AcceptMark(id, mark uint32) { q.gather(id, nfAccept, nil, true, mark) }

// AcceptModified lets the packet go on with payload in the place of its bytes,
// from the IP header on. It must be a whole packet with right lengths and
// checksums: the kernel takes it as it is and no longer fills in a checksum
// (nfqnl_mangle). payload must stay valid until Flush. An empty payload or one
// of more than MaxPayload bytes cannot be written back; the packet is then
// dropped and counted as a verdict error.
func (q *Queue) AcceptModified(id uint32, payload []byte) {
	q.acceptModified(id, payload, false, 0)
}

// AcceptModifiedMark is AcceptModified that also sets the packet's mark.
func (q *Queue) AcceptModifiedMark(id uint32, payload []byte, mark uint32) {
	q.acceptModified(id, payload, true, mark)
}

func (q *Queue) acceptModified(id uint32, payload []byte, hasMark bool, mark uint32) {
	if len(payload) == 0 || len(payload) > MaxPayload {
		q.ctr.verdictErrors.Add(1)
		q.ctr.lastVerdictErrno.Store(uint32(unix.EMSGSIZE))
		q.Drop(id)
		return
	}
	q.gather(id, nfAccept, payload, hasMark, mark)
}

// Drop throws the packet away.
func (q *Queue) Drop(id uint32) { q.gather(id, nfDrop, nil, false, 0) }

// gather appends one verdict message: netlink header, nfgenmsg, verdict
// header, then mark and payload if given. No acknowledgement is asked for; the
// kernel answers errors only.
func (q *Queue) gather(id, code uint32, payload []byte, hasMark bool, mark uint32) {
	s := &q.send
	ne, be := binary.NativeEndian, binary.BigEndian
	off := len(s.head)
	b := ne.AppendUint32(s.head, 0) // the length is filled in below
	b = ne.AppendUint16(b, msgVerdict)
	b = ne.AppendUint16(b, unix.NLM_F_REQUEST)
	b = ne.AppendUint32(b, id) // sequence: comes back in the answer to a bad verdict
	b = ne.AppendUint32(b, 0)
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0)
	b = be.AppendUint16(b, q.cfg.Queue)
	b = ne.AppendUint16(b, nlaHdrLen+8)
	b = ne.AppendUint16(b, attrVerdictHdr)
	b = be.AppendUint32(b, code)
	b = be.AppendUint32(b, id)
	if hasMark {
		b = ne.AppendUint16(b, nlaHdrLen+4)
		b = ne.AppendUint16(b, attrMark)
		b = be.AppendUint32(b, mark)
	}
	if payload != nil {
		b = ne.AppendUint16(b, uint16(nlaHdrLen+len(payload)))
		b = ne.AppendUint16(b, attrPayload)
	}
	mid := len(b)
	for pad := align4(len(payload)) - len(payload); pad > 0; pad-- {
		b = append(b, 0)
	}
	ne.PutUint32(b[off:], uint32(len(b)-off+len(payload)))
	s.head = b
	s.list = append(s.list, verdict{off, mid, len(b), payload})
}

// Flush hands the gathered verdicts to the kernel, in order, in as few calls
// as their size allows. The kernel acts on each before Flush returns. A
// verdict that it refuses is counted in Stats when a later Recv meets its
// answer, and does not stop the others. The error, if any, is the first that
// kept verdicts from being sent; their packets wait until the queue is closed.
func (q *Queue) Flush() error {
	s := &q.send
	if len(s.list) == 0 {
		return nil
	}
	var first error
	for from := 0; from < len(s.list); {
		to, size, vecs := from, 0, 1
		for to < len(s.list) {
			v := &s.list[to]
			n := v.end - v.off + len(v.payload)
			if to > from && (size+n > s.limit || vecs+2 > maxVec) {
				break
			}
			size += n
			if v.payload != nil {
				vecs += 2
			}
			to++
		}
		if err := q.sendRange(s.list[from:to]); err != nil && first == nil {
			first = err
		}
		from = to
	}
	clear(s.list) // let go of the payloads
	clear(s.iovs)
	s.list, s.iovs, s.head = s.list[:0], s.iovs[:0], s.head[:0]
	return first
}

// sendRange sends verdicts in one call. When the kernel has no memory for that
// many it halves the number, so that as few packets as possible get stuck.
func (q *Queue) sendRange(list []verdict) error {
	s := &q.send
	s.vectors(list)
	s.hdr.Iov = &s.iovs[0]
	s.hdr.SetIovlen(len(s.iovs))
	s.errno = 0
	err := q.raw.Control(s.do)
	if err == nil && s.errno != 0 {
		err = s.errno
	}
	if err == nil {
		q.ctr.sends.Add(1)
		q.ctr.verdicts.Add(uint64(len(list)))
		return nil
	}
	if s.errno == unix.ENOBUFS && len(list) > 1 {
		half := len(list) / 2
		err1 := q.sendRange(list[:half])
		err2 := q.sendRange(list[half:])
		if err1 != nil {
			return err1
		}
		return err2
	}
	q.ctr.verdictErrors.Add(uint64(len(list)))
	q.ctr.lastVerdictErrno.Store(uint32(s.errno))
	return q.ioError(fmt.Sprintf("send %d verdicts", len(list)), err)
}

// vectors fills iovs with the bytes of list: neighbouring heads become one
// part, and padding joins the head that follows it.
func (s *sendState) vectors(list []verdict) {
	s.iovs = s.iovs[:0]
	start := list[0].off
	for i := range list {
		v := &list[i]
		if v.payload == nil {
			continue
		}
		s.vector(s.head[start:v.mid])
		s.vector(v.payload)
		start = v.mid
	}
	s.vector(s.head[start:list[len(list)-1].end])
}

func (s *sendState) vector(b []byte) {
	if len(b) == 0 {
		return
	}
	var v unix.Iovec
	v.Base = &b[0]
	v.SetLen(len(b))
	s.iovs = append(s.iovs, v)
}
