// Package nfq receives packets from one netfilter queue (NFQUEUE) and returns
// verdicts on them, many of each per system call.
//
// The loop that uses it is
//
//	for {
//		n, err := q.Recv(pkts, deadline)
//		...
//		for i := range pkts[:n] { q.Accept(pkts[i].ID) }
//		err = q.Flush()
//	}
//
// Received bytes stay in buffers that the queue reuses, and neither receiving
// nor verdicts allocate once the buffers have grown. Every packet received
// must get exactly one verdict: one without waits in the kernel, and counts
// against the queue's length, until the queue is closed.
//
// Recv, Flush and the verdict methods belong to one goroutine. Wake, Stats and
// Close may be called from any.
//
// The queue takes packets whole, before they are cut into segments, with
// checksums that may not have been filled in (Packet.SkbInfo). It asks for
// neither conntrack data nor socket owners and does not fail open: while
// nobody reads, packets are dropped.
package nfq

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	defaultBatch   = 64
	maxBatch       = 1024 // UIO_MAXIOV bounds recvmmsg too
	defaultRecvBuf = 16 << 20
	defaultMaxLen  = 65536
	sendBuf        = 1 << 20
	bindTimeout    = 5 * time.Second
)

// Config describes the queue to open. Zero values mean the defaults.
type Config struct {
	Queue   uint16 // number of the queue, as in the rule's --queue-num
	Batch   int    // packets received at most by one Recv; default 64, at most 1024; 66 KiB of memory each
	RecvBuf int    // bytes of the socket's receive buffer; default 16 MiB
	MaxLen  int    // packets that may wait in the kernel; default 65536
}

func (c *Config) setDefaults() error {
	for _, f := range []struct {
		name     string
		val      *int
		def, top int
	}{
		{"Batch", &c.Batch, defaultBatch, maxBatch},
		{"RecvBuf", &c.RecvBuf, defaultRecvBuf, 1 << 30},
		{"MaxLen", &c.MaxLen, defaultMaxLen, 1<<31 - 1},
	} {
		if *f.val == 0 {
			*f.val = f.def
		}
		if *f.val < 1 || *f.val > f.top {
			return fmt.Errorf("nfq: %s is %d: give a number from 1 to %d", f.name, *f.val, f.top)
		}
	}
	return nil
}

// Queue is one netfilter queue that this process owns.
type Queue struct {
	cfg  Config
	conn *netlink.Conn
	raw  syscall.RawConn
	proc *os.File // the namespace's nfnetlink_queue table; nil when unreadable

	recv recvState
	send sendState
	ctr  counters

	// wakeMu orders Wake against a Recv that sets its deadline and waits.
	wakeMu  sync.Mutex
	woken   atomic.Bool
	waiting bool
	armed   bool // the socket holds a read deadline from an earlier wait

	closed atomic.Bool
}

type counters struct {
	received, batches, truncated, parseErrors atomic.Uint64
	verdicts, sends, verdictErrors            atomic.Uint64
	lastVerdictErrno                          atomic.Uint32
	drops                                     atomic.Uint64 // last seen, so that Stats works after Close
	queueFull                                 atomic.Uint64
}

// Stats counts what a queue has done since it was opened.
type Stats struct {
	Received      uint64 // packets handed out by Recv
	Batches       uint64 // receive calls that brought something
	Truncated     uint64 // packets of which only a part was copied
	ParseErrors   uint64 // messages that could not be read; their packets, if known, were dropped
	Verdicts      uint64 // verdicts handed to the kernel
	Sends         uint64 // send calls that carried them
	VerdictErrors uint64 // verdicts that the kernel refused or that could not be sent
	Overruns      uint64 // packets lost because the receive buffer was full
	QueueFull     uint64 // packets lost because MaxLen packets waited already

	// LastVerdictError is the kernel's newest reason for a refused verdict, 0
	// for none; ENOENT means that the packet no longer waits.
	LastVerdictError syscall.Errno
}

// Open binds the queue in the network namespace of the calling thread; lock
// the goroutine to its thread first if that is not the process's own. It needs
// CAP_NET_ADMIN in that namespace. The error says so when the queue belongs to
// another process already.
func Open(cfg Config) (*Queue, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("nfq: open a netfilter netlink socket: %w", err)
	}
	q := &Queue{cfg: cfg, conn: conn}
	if err := q.setup(); err != nil {
		_ = q.Close()
		return nil, fmt.Errorf("nfq: queue %d: %w", cfg.Queue, err)
	}
	return q, nil
}

func (q *Queue) setup() error {
	// Without NO_ENOBUFS one overrun makes the kernel drop every packet until
	// the whole receive buffer is empty (netlink_overrun, NETLINK_S_CONGESTED).
	if err := q.conn.SetOption(netlink.NoENOBUFS, true); err != nil {
		return fmt.Errorf("set NETLINK_NO_ENOBUFS: %w", err)
	}
	// A refused verdict is otherwise returned with the payload it carried.
	if err := q.conn.SetOption(netlink.CapAcknowledge, true); err != nil {
		return fmt.Errorf("set NETLINK_CAP_ACK: %w", err)
	}
	// Both try the privileged option first and fall back to the limited one.
	if err := q.conn.SetReadBuffer(q.cfg.RecvBuf); err != nil {
		return fmt.Errorf("set the receive buffer: %w", err)
	}
	if err := q.conn.SetWriteBuffer(sendBuf); err != nil {
		return fmt.Errorf("set the send buffer: %w", err)
	}
	size, err := q.conn.WriteBuffer()
	if err != nil {
		return fmt.Errorf("read the send buffer's size: %w", err)
	}
	if q.raw, err = q.conn.SyscallConn(); err != nil {
		return err
	}
	q.proc, _ = os.Open("/proc/thread-self/net/netfilter/nfnetlink_queue")
	q.recv.init(q.cfg.Batch)
	if err := q.send.init(size); err != nil {
		return err
	}
	return q.bind()
}

// bind makes the kernel create the queue and waits for its answer. One message
// carries the whole configuration, so that hardly a packet can be queued
// before the copy mode is set. The answer is not read with Conn.Execute: a
// packet that is queued in between would come first and be lost there.
func (q *Queue) bind() error {
	body, err := configBody(q.cfg)
	if err != nil {
		return err
	}
	req, err := q.conn.Send(netlink.Message{
		Header: netlink.Header{Type: msgConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   body,
	})
	if err != nil {
		return fmt.Errorf("send the configuration: %w", err)
	}
	deadline := time.Now().Add(bindTimeout)
	for {
		if err := q.fill(q.cfg.Batch, deadline); err != nil {
			return fmt.Errorf("no answer from the kernel: %w", err)
		}
		if q.recv.have == 0 {
			return errors.New("no answer from the kernel in time; is it built with CONFIG_NETFILTER_NETLINK_QUEUE?")
		}
		errno, found := q.recv.findAnswer(req.Header.Sequence)
		switch {
		case !found:
			// More packets than one batch holds came before the answer.
			if err := q.dropAll(); err != nil {
				return err
			}
		case errno != 0:
			return q.bindError(errno)
		default:
			return nil // packets in this batch stay for the first Recv
		}
	}
}

// bindError explains the kernel's refusal: it answers EPERM both without the
// capability and for a queue of another socket (nfqnl_recv_config).
func (q *Queue) bindError(errno unix.Errno) error {
	if row, ok := q.procRow(); ok {
		return fmt.Errorf("already bound by netlink port %d (usually its process id); stop that process or choose another queue: %w", row.port, errno)
	}
	switch errno {
	case unix.EPERM:
		return fmt.Errorf("bind: %w; CAP_NET_ADMIN in this network namespace is needed", errno)
	case unix.EINVAL, unix.EOPNOTSUPP, unix.ENOPROTOOPT:
		return fmt.Errorf("bind: %w; the kernel needs CONFIG_NETFILTER_NETLINK_QUEUE", errno)
	}
	return fmt.Errorf("bind: %w", errno)
}

func configBody(cfg Config) ([]byte, error) {
	var params [5]byte // struct nfqnl_msg_config_params: be32 range, u8 mode
	binary.BigEndian.PutUint32(params[:], copyRange)
	params[4] = copyPacket

	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Bytes(cfgAttrCmd, []byte{cfgCmdBind, 0, 0, 0}) // the protocol family is ignored since Linux 3.8
	e.Bytes(cfgAttrParams, params[:])
	e.Uint32(cfgAttrMaxLen, uint32(cfg.MaxLen))
	e.Uint32(cfgAttrMask, cfgFlagGSO|cfgFlagUIDGID|cfgFlagFailOpen|cfgFlagConntrack)
	e.Uint32(cfgAttrFlags, cfgFlagGSO)
	attrs, err := e.Encode()
	if err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	head := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}
	head = binary.BigEndian.AppendUint16(head, cfg.Queue)
	return append(head, attrs...), nil
}

// Stats returns the counters. It may be called at any time, also after Close.
func (q *Queue) Stats() Stats {
	if !q.closed.Load() {
		if d, err := q.socketDrops(); err == nil {
			q.ctr.drops.Store(uint64(d))
		}
		if row, ok := q.procRow(); ok {
			q.ctr.queueFull.Store(row.dropped)
		}
	}
	return Stats{
		Received:         q.ctr.received.Load(),
		Batches:          q.ctr.batches.Load(),
		Truncated:        q.ctr.truncated.Load(),
		ParseErrors:      q.ctr.parseErrors.Load(),
		Verdicts:         q.ctr.verdicts.Load(),
		Sends:            q.ctr.sends.Load(),
		VerdictErrors:    q.ctr.verdictErrors.Load(),
		Overruns:         q.ctr.drops.Load(),
		QueueFull:        q.ctr.queueFull.Load(),
		LastVerdictError: syscall.Errno(q.ctr.lastVerdictErrno.Load()),
	}
}

// Close gives the queue back: waiting packets are dropped by the kernel and a
// blocked Recv returns net.ErrClosed. Closing twice is harmless.
func (q *Queue) Close() error {
	if q.raw != nil {
		q.Stats() // keep the kernel's last counts
	}
	if q.closed.Swap(true) {
		return nil
	}
	err := q.conn.Close()
	if q.proc != nil {
		_ = q.proc.Close()
	}
	return err
}

// ioError tells a closed queue from other failures.
func (q *Queue) ioError(what string, err error) error {
	if q.closed.Load() {
		return net.ErrClosed
	}
	return fmt.Errorf("nfq: queue %d: %s: %w", q.cfg.Queue, what, err)
}

type procRow struct {
	port    uint64 // netlink port of the owner
	dropped uint64 // packets refused because the queue was full
}

// procRow reads this queue's line of the namespace's nfnetlink_queue table
// (seq_show in net/netfilter/nfnetlink_queue.c): queue number, port, packets
// waiting, copy mode, copy range, dropped by length, dropped by receive buffer.
func (q *Queue) procRow() (procRow, bool) {
	if q.proc == nil {
		return procRow{}, false
	}
	buf := make([]byte, 64<<10)
	n, _ := q.proc.ReadAt(buf, 0)
	for line := range bytes.Lines(buf[:n]) {
		f := bytes.Fields(line)
		if len(f) < 7 || string(f[0]) != strconv.Itoa(int(q.cfg.Queue)) {
			continue
		}
		port, err1 := strconv.ParseUint(string(f[1]), 10, 64)
		dropped, err2 := strconv.ParseUint(string(f[5]), 10, 64)
		return procRow{port, dropped}, err1 == nil && err2 == nil
	}
	return procRow{}, false
}
