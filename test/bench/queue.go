package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/nfq"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

const (
	queueNumber = 7
	loadPort    = 9
)

//go:embed acceptall/acceptall.c
var acceptAll string

// queueTargets are the least ratios of our loop to its peers.
var queueTargets = map[string]float64{"C": 1.0, "go-nfqueue": 5.0}

// queueLoops measures packets a second through one queue that accepts
// everything: our loop, a C program with libnetfilter_queue, and go-nfqueue,
// in turn, on one processor each while another makes the load.
func queueLoops(pairs int, length time.Duration) error {
	dir, err := os.MkdirTemp("", "nfcf-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	peer := filepath.Join(dir, "acceptall")
	build := exec.Command("gcc", "-O2", "-Wall", "-Wextra", "-o", peer, "-x", "c", "-", "-lnetfilter_queue", "-lnfnetlink")
	build.Stdin = strings.NewReader(acceptAll)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("acceptall.c: %w\n%s; scripts/deps.sh bench installs what it needs", err, out)
	}
	ns, err := testnet.NewNS("queue")
	if err != nil {
		return err
	}
	defer ns.Close()
	rule := fmt.Sprintf("-t raw -A OUTPUT -p udp --dport %d -j NFQUEUE --queue-num %d", loadPort, queueNumber)
	if out, err := ns.Command("iptables", strings.Fields(rule)...).CombinedOutput(); err != nil {
		return fmt.Errorf("iptables %s: %w\n%s", rule, err, out)
	}
	names := []string{"nfq", "C", "go-nfqueue"}
	commands := map[string][]string{
		"nfq": {self, "-consume", "nfq"}, "go-nfqueue": {self, "-consume", "go-nfqueue"}, "C": {peer, strconv.Itoa(queueNumber)},
	}
	fmt.Printf("packets accepted a second, one queue, %d rounds of %v, thousands\n  round     nfq       C  go-nfqueue   nfq/C  nfq/go-nfqueue\n", pairs, length)
	ratios := map[string][]float64{}
	for i := range pairs {
		rate := map[string]float64{}
		for k := range names {
			name := names[(i+k)%len(names)]
			if rate[name], err = consumeUnderLoad(ns, self, commands[name], length); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		for name := range queueTargets {
			ratios[name] = append(ratios[name], rate["nfq"]/rate[name])
		}
		fmt.Printf("  %5d %7.0f %7.0f  %10.0f  %6.2f  %14.2f\n", i+1, rate["nfq"]/1e3, rate["C"]/1e3, rate["go-nfqueue"]/1e3,
			rate["nfq"]/rate["C"], rate["nfq"]/rate["go-nfqueue"])
	}
	for _, name := range names[1:] {
		m := median(ratios[name])
		fmt.Printf("  median of nfq / %s %.2f, target %.1f\n", name, m, queueTargets[name])
		if m < queueTargets[name] {
			err = errors.Join(err, fmt.Errorf("queue loop against %s: median ratio %.2f, target %.1f", name, m, queueTargets[name]))
		}
	}
	return err
}

// consumeUnderLoad runs one consumer on processor 1 with the load on
// processor 0 and returns verdicts a second.
func consumeUnderLoad(ns *testnet.NS, self string, command []string, length time.Duration) (float64, error) {
	consumer := ns.Command("taskset", append([]string{"-c", "1"}, command...)...)
	consumer.Stderr = os.Stderr
	out, err := consumer.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := consumer.Start(); err != nil {
		return 0, err
	}
	defer func() { _ = consumer.Process.Kill(); _ = consumer.Wait() }()
	lines := bufio.NewReader(out)
	if s, err := lines.ReadString('\n'); err != nil || s != "ready\n" {
		return 0, fmt.Errorf("it says %q: %w", s, err)
	}
	load := ns.Command("taskset", "-c", "0", self, "-load", length.String())
	if out, err := load.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("load: %w\n%s", err, out)
	}
	// nsenter and taskset have become the consumer by exec.
	if err := consumer.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	var n, ns64 uint64
	if _, err := fmt.Fscan(lines, &n, &ns64); err != nil || n == 0 || ns64 == 0 {
		return 0, fmt.Errorf("no count: %d in %d ns, %w", n, ns64, err)
	}
	return float64(n) / (float64(ns64) / 1e9), nil
}

// load sends small datagrams to a socket that is never read, as fast as it
// can.
func load(length time.Duration) error {
	sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: loadPort})
	if err != nil {
		return err
	}
	defer sink.Close()
	_ = sink.SetReadBuffer(1)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: loadPort}); err != nil {
		return err
	}
	msg := make([]byte, 64)
	for end := time.Now().Add(length); time.Now().Before(end); {
		for range 64 {
			_, err := unix.Write(fd, msg)
			// The queue is full: what counts is what comes out of it.
			if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
	}
	return nil
}

// consume accepts everything with one of the Go loops until SIGTERM, and says
// the number of verdicts and the nanoseconds from the first to the last.
func consume(kind string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var n, first, last int64
	count := func(k int) {
		if n == 0 {
			first = nanotime()
		}
		if n += int64(k); n&^63 != (n-int64(k))&^63 {
			last = nanotime()
		}
	}
	var err error
	switch kind {
	case "nfq":
		err = consumeNFQ(ctx, count)
	case "go-nfqueue":
		err = consumePeer(ctx, count)
	default:
		err = fmt.Errorf("there is no loop %q", kind)
	}
	if err == nil {
		_, err = fmt.Println(n, last-first)
	}
	return err
}

func nanotime() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}

func consumeNFQ(ctx context.Context, count func(int)) error {
	q, err := nfq.Open(nfq.Config{Queue: queueNumber, RecvBuf: 64 << 20})
	if err != nil {
		return err
	}
	defer q.Close()
	defer context.AfterFunc(ctx, q.Wake)()
	fmt.Println("ready")
	pkts := make([]nfq.Packet, 64)
	for ctx.Err() == nil {
		k, err := q.Recv(pkts, time.Time{})
		if err != nil {
			return err
		}
		for i := range pkts[:k] {
			q.Accept(pkts[i].ID)
		}
		if err := q.Flush(); err != nil {
			return err
		}
		if k > 0 {
			count(k)
		}
	}
	return nil
}

func consumePeer(ctx context.Context, count func(int)) error {
	nf, err := nfqueue.Open(&nfqueue.Config{NfQueue: queueNumber, MaxPacketLen: 0xffff, MaxQueueLen: 65536,
		Copymode: nfqueue.NfQnlCopyPacket, Flags: nfqueue.NfQaCfgFlagGSO})
	if err != nil {
		return err
	}
	defer nf.Close()
	if err := nf.Con.SetReadBuffer(64 << 20); err != nil {
		return err
	}
	if err := nf.SetOption(2 /* netlink.NoENOBUFS */, true); err != nil {
		return err
	}
	err = nf.RegisterWithErrorFunc(ctx, func(a nfqueue.Attribute) int {
		if err := nf.SetVerdict(*a.PacketID, nfqueue.NfAccept); err == nil {
			count(1)
		}
		return 0
	}, func(e error) int {
		if ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "go-nfqueue:", e)
		}
		return 0
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	<-ctx.Done()
	return nil
}
