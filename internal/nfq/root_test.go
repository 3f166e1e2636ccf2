package nfq

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

func openQueue(t testing.TB, cfg Config) *Queue {
	t.Helper()
	q, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	return q
}

// receive waits for exactly n packets, leaving them without verdict, and
// copies their payloads.
func receive(t *testing.T, q *Queue, n int) []Packet {
	t.Helper()
	var out []Packet
	pkts := make([]Packet, 64)
	deadline := time.Now().Add(patience)
	for len(out) < n {
		k, err := q.Recv(pkts[:min(n-len(out), len(pkts))], deadline)
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			t.Fatalf("%d of %d packets: %+v", len(out), n, q.Stats())
		}
		for _, p := range pkts[:k] {
			p.Payload = bytes.Clone(p.Payload)
			out = append(out, p)
		}
	}
	return out
}

func flush(t testing.TB, q *Queue) {
	t.Helper()
	if err := q.Flush(); err != nil {
		t.Fatal(err)
	}
}

// udpPair returns a listening socket on lo and one connected to it.
func udpPair(t testing.TB, ip string) (server, client *net.UDPConn) {
	t.Helper()
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(ip)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	client, err = net.DialUDP("udp", nil, server.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return server, client
}

func port(c *net.UDPConn) int { return c.LocalAddr().(*net.UDPAddr).Port }

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := c.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
}

func wantRead(t testing.TB, c *net.UDPConn, want string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 70000)
	n, _, err := c.ReadFromUDP(buf)
	if err != nil || string(buf[:n]) != want {
		t.Fatalf("read %q, %v; want %q", buf[:min(n, 80)], err, want)
	}
}

// ipv4Sum sets the header checksum of an IPv4 packet, RFC 791 section 3.1.
func ipv4Sum(p []byte) {
	h := p[:int(p[0]&15)*4]
	h[10], h[11] = 0, 0
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}

func TestVerdicts(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 7})
	server, client := udpPair(t, "127.0.0.1")
	run(t, fmt.Sprintf("iptables -w -t raw -A OUTPUT -p udp --dport %d -j MARK --set-mark 0x1234", port(server)))
	run(t, fmt.Sprintf("iptables -w -t raw -A OUTPUT -p udp --dport %d -j NFQUEUE --queue-num 7", port(server)))
	run(t, "iptables -w -t mangle -A OUTPUT -m mark --mark 0xfeedface")

	for _, s := range []string{"accept", "drop", "change", "longer", "mark"} {
		write(t, client, s)
	}
	pkts := receive(t, q, 5)
	for i, p := range pkts {
		if p.Hook != 3 || p.Protocol != 0x0800 || p.OutDev != 1 || p.InDev != 0 || p.Mark != 0x1234 || p.Truncated() {
			t.Errorf("packet %d: %+v", i, p)
		}
		if i > 0 && p.ID <= pkts[i-1].ID {
			t.Errorf("packet %d: ID %d after %d", i, p.ID, pkts[i-1].ID)
		}
	}
	q.Accept(pkts[0].ID)
	q.Drop(pkts[1].ID)
	changed := pkts[2].Payload
	copy(changed[28:], "CHANGE")
	changed[26], changed[27] = 0, 0 // no UDP checksum, RFC 768
	q.AcceptModified(pkts[2].ID, changed)
	longer := append(pkts[3].Payload, " than before!"...) // 47 bytes: needs padding
	binary.BigEndian.PutUint16(longer[2:], uint16(len(longer)))
	binary.BigEndian.PutUint16(longer[24:], uint16(len(longer)-20))
	longer[26], longer[27] = 0, 0
	ipv4Sum(longer)
	q.AcceptModified(pkts[3].ID, longer)
	q.AcceptMark(pkts[4].ID, 0xfeedface)
	flush(t, q)

	for _, s := range []string{"accept", "CHANGE", "longer than before!", "mark"} {
		wantRead(t, server, s)
	}
	if out := run(t, "iptables -w -t mangle -L OUTPUT -v -n -x"); !strings.Contains(out, " 1       32 ") {
		t.Errorf("the mark of the verdict was not seen once on 32 bytes:\n%s", out)
	}
	if s := q.Stats(); s.Received != 5 || s.Verdicts != 5 || s.Sends != 1 || s.VerdictErrors != 0 || s.ParseErrors != 0 {
		t.Errorf("%+v", s)
	}
}

func TestIPv6(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	server, client := udpPair(t, "::1")
	run(t, "ip6tables -w -t raw -A PREROUTING -p udp -j NFQUEUE --queue-num 1")
	write(t, client, "six")
	p := receive(t, q, 1)[0]
	if p.Protocol != 0x86dd || p.Hook != 0 || p.InDev != 1 || p.OutDev != 0 || p.Payload[0]>>4 != 6 || len(p.Payload) != 51 {
		t.Errorf("%+v", p)
	}
	q.Accept(p.ID)
	flush(t, q)
	wantRead(t, server, "six")
}

// A datagram of 65,535 bytes is more than an attribute holds.
func TestTruncated(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	server, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A PREROUTING -p udp -j NFQUEUE --queue-num 1")
	want := strings.Repeat("x", 65507)
	write(t, client, want)
	p := receive(t, q, 1)[0]
	if len(p.Payload) != MaxPayload || p.OrigLen != 65535 || !p.Truncated() || q.Stats().Truncated != 1 {
		t.Errorf("payload %d, original %d, %+v", len(p.Payload), p.OrigLen, q.Stats())
	}
	q.Accept(p.ID)
	flush(t, q)
	wantRead(t, server, want)
}

// The largest payload that can be written back, many of them in one Flush.
func TestLargePayloads(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1})
	server, client := udpPair(t, "127.0.0.1")
	_ = server.SetReadBuffer(4 << 20)
	_ = client.SetWriteBuffer(4 << 20)
	run(t, "iptables -w -t raw -A PREROUTING -p udp -j NFQUEUE --queue-num 1")
	const n = 20
	for i := range n {
		write(t, client, strings.Repeat(string(rune('a'+i)), MaxPayload-28))
	}
	for _, p := range receive(t, q, n) {
		p.Payload[MaxPayload-1] = '!'
		p.Payload[26], p.Payload[27] = 0, 0
		q.AcceptModified(p.ID, p.Payload)
	}
	flush(t, q)
	for i := range n {
		wantRead(t, server, strings.Repeat(string(rune('a'+i)), MaxPayload-29)+"!")
	}
	if s := q.Stats(); s.Verdicts != n || s.Sends != 3 || s.VerdictErrors != 0 {
		t.Errorf("%d verdicts of 64 KiB should go in 3 sends of 512 KiB at most: %+v", n, s)
	}
}

// More payloads in one Flush than one sendmsg has parts for.
func TestManyPayloads(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 1, Batch: 1024})
	_, client := udpPair(t, "127.0.0.1")
	_ = client.SetWriteBuffer(4 << 20)
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 1")
	run(t, "iptables -w -t mangle -A OUTPUT -p udp -m length --length 29 -j DROP")
	const n = 1200
	for range n {
		write(t, client, "x")
	}
	for _, p := range receive(t, q, n) {
		q.AcceptModified(p.ID, p.Payload)
	}
	flush(t, q)
	if s := q.Stats(); s.Verdicts != n || s.Sends != 3 || s.VerdictErrors != 0 {
		t.Errorf("%d payloads should go in 3 sends of 511 at most: %+v", n, s)
	}
	if out := run(t, "iptables -w -t mangle -L OUTPUT -v -n -x"); !strings.Contains(out, " 1200    34800 DROP") {
		t.Errorf("not all were accepted:\n%s", out)
	}
}

// serve gives verdicts until the queue is closed.
func serve(q *Queue, each func(p *Packet)) (done chan error) {
	done = make(chan error, 1)
	go func() {
		pkts := make([]Packet, 64)
		for {
			n, err := q.Recv(pkts, time.Time{})
			if err != nil {
				done <- err
				return
			}
			for i := range pkts[:n] {
				each(&pkts[i])
			}
			if err := q.Flush(); err != nil {
				done <- err
				return
			}
		}
	}()
	return done
}

// stop closes the queue and expects its loop to end for that reason.
func stop(t *testing.T, q *Queue, done chan error) {
	t.Helper()
	_ = q.Close()
	select {
	case err := <-done:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("the loop ended with: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("Recv did not return after Close")
	}
}

func TestGSOStream(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 2})
	run(t, "iptables -w -t raw -A OUTPUT -p tcp -j NFQUEUE --queue-num 2")
	run(t, "ip link set lo mtu 1500")
	largest, gso, notReady := 0, 0, 0
	done := serve(q, func(p *Packet) {
		largest = max(largest, len(p.Payload))
		if p.SkbInfo&SkbGSO != 0 {
			gso++
		}
		if p.SkbInfo&SkbCsumNotReady != 0 {
			notReady++
		}
		q.Accept(p.ID)
	})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const size = 32 << 20
	sent := make(chan []byte, 1)
	go func() {
		h := sha256.New()
		buf := make([]byte, 256<<10)
		for n := 0; n < size; n += len(buf) {
			for i := range buf {
				buf[i] = byte(n>>18 + i*7)
			}
			h.Write(buf)
			if _, err := c.Write(buf); err != nil {
				break
			}
		}
		_ = c.(*net.TCPConn).CloseWrite()
		sent <- h.Sum(nil)
	}()
	_ = s.SetReadDeadline(time.Now().Add(3 * patience))
	h := sha256.New()
	n, err := io.Copy(h, s)
	if want := <-sent; err != nil || n != size || !bytes.Equal(h.Sum(nil), want) {
		t.Errorf("%d of %d bytes, %v, same sum: %v", n, size, err, bytes.Equal(h.Sum(nil), want))
	}
	st := q.Stats()
	stop(t, q, done)
	if largest <= 1500 || gso == 0 || notReady == 0 {
		t.Errorf("largest packet %d, %d with GSO, %d with checksum not ready: %+v", largest, gso, notReady, st)
	}
	if st.Overruns != 0 || st.QueueFull != 0 || st.VerdictErrors != 0 {
		t.Errorf("%+v", st)
	}
}

func TestHundredThousand(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 2})
	server, client := udpPair(t, "127.0.0.1")
	run(t, fmt.Sprintf("iptables -w -t raw -A OUTPUT -p udp --dport %d -j NFQUEUE --queue-num 2", port(server)))
	run(t, "iptables -w -t mangle -A OUTPUT -p udp -j DROP") // counts what was accepted
	const total = 100_000
	n := 0
	all := make(chan struct{})
	var last uint32
	ordered := true
	done := serve(q, func(p *Packet) {
		ordered = ordered && p.ID == last+1 // the kernel numbers without gaps
		last = p.ID
		q.Accept(p.ID)
		if n++; n == total {
			close(all)
		}
	})
	msg := make([]byte, 100)
	for range total {
		if _, err := client.Write(msg); err != nil && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
	}
	select {
	case <-all:
	case <-time.After(patience):
		t.Errorf("not all packets came: %+v", q.Stats())
	}
	// The accepted packets of the last batch reach the next rule in Flush.
	deadline := time.Now().Add(patience)
	for q.Stats().Verdicts < total && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	st := q.Stats()
	out := run(t, "iptables -w -t mangle -L OUTPUT -v -n -x")
	stop(t, q, done)
	if !strings.Contains(out, " 100000 12800000 DROP") {
		t.Errorf("not 100000 packets were accepted:\n%s", out)
	}
	if !ordered || st.Received != total || st.Verdicts != total || st.Overruns != 0 || st.QueueFull != 0 ||
		st.VerdictErrors != 0 || st.ParseErrors != 0 {
		t.Errorf("ordered %v, %+v", ordered, st)
	}
	if st.Sends > st.Batches {
		t.Errorf("more sends than batches: %+v", st)
	}
	t.Logf("%+v", st)
}

func TestOverrunAndFullQueue(t *testing.T) {
	newNamespace(t)
	_, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 3")
	send := func(n int) {
		for range n {
			_, _ = client.Write([]byte("x")) // EPERM where the kernel drops
		}
	}
	q := openQueue(t, Config{Queue: 3, MaxLen: 4})
	send(50)
	if s := q.Stats(); s.QueueFull != 46 || s.Overruns != 0 {
		t.Errorf("4 of 50 packets fit: %+v", s)
	}
	_ = q.Close()
	if s := q.Stats(); s.QueueFull != 46 {
		t.Errorf("after Close: %+v", s)
	}

	q = openQueue(t, Config{Queue: 3, RecvBuf: 1})
	send(50)
	s := q.Stats()
	if s.Overruns == 0 || s.Overruns >= 50 {
		t.Fatalf("%+v", s)
	}
	// One packet taken makes room for another, though others still wait.
	first := receive(t, q, 1)[0]
	send(1)
	if now := q.Stats().Overruns; now != s.Overruns {
		t.Errorf("%d more packets lost though there was room", now-s.Overruns)
	}
	q.Accept(first.ID)
	// What did fit is still delivered, and the loop goes on.
	for _, p := range receive(t, q, 50-int(s.Overruns)) {
		q.Accept(p.ID)
	}
	flush(t, q)
	send(1)
	q.Accept(receive(t, q, 1)[0].ID)
	flush(t, q)
	if s2 := q.Stats(); s2.Overruns != s.Overruns || s2.VerdictErrors != 0 {
		t.Errorf("before %+v, after %+v", s, s2)
	}
}

func TestVerdictErrors(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 3})
	server, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 3")
	write(t, client, "one")
	id := receive(t, q, 1)[0].ID
	q.Accept(id + 1000)
	q.Accept(id)
	q.Drop(id) // has its verdict already
	flush(t, q)
	wantRead(t, server, "one")
	write(t, client, "two")
	q.Accept(receive(t, q, 1)[0].ID)
	flush(t, q)
	wantRead(t, server, "two")
	q.AcceptModified(id, make([]byte, 1000))
	flush(t, q)
	if err := q.fill(1, time.Now().Add(patience)); err != nil || q.recv.hdrs[0].len > 100 {
		t.Errorf("the answer to a bad verdict has %d bytes, so carries its payload: %v", q.recv.hdrs[0].len, err)
	}
	if s := q.Stats(); s.VerdictErrors != 2 || s.LastVerdictError != unix.ENOENT || s.Received != 2 {
		t.Errorf("%+v", s)
	}
}

func TestQueueTaken(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 3})
	_, err := Open(Config{Queue: 3})
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "already bound") {
		t.Errorf("second owner: %v", err)
	}
	_ = q.Close()
	openQueue(t, Config{Queue: 3})
}

// A packet whose message cannot be read must not stay in the kernel.
func TestUnreadableIsDropped(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 3})
	server, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 3")
	write(t, client, "lost")
	if err := q.fill(1, time.Now().Add(patience)); err != nil || q.recv.have != 1 {
		t.Fatal(err)
	}
	// Spoil the payload's attribute, which is the last.
	d := q.recv.mem[:q.recv.hdrs[0].len]
	at := bytes.LastIndex(d, []byte{36, 0, attrPayload, 0})
	d[at] = 255
	if n, err := q.Recv(make([]Packet, 1), time.Now()); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	s := q.Stats()
	row, ok := q.procRow()
	if s.ParseErrors != 1 || s.Verdicts != 1 || s.Received != 0 || !ok {
		t.Errorf("%+v, %+v", s, row)
	}
	write(t, client, "kept")
	q.Accept(receive(t, q, 1)[0].ID)
	flush(t, q)
	wantRead(t, server, "kept")
}

func TestRecvOnePacketAtATime(t *testing.T) {
	newNamespace(t)
	q := openQueue(t, Config{Queue: 3, Batch: 8})
	server, client := udpPair(t, "127.0.0.1")
	run(t, "iptables -w -t raw -A OUTPUT -p udp -j NFQUEUE --queue-num 3")
	for i := range 10 {
		write(t, client, fmt.Sprint(i))
	}
	// Eight datagrams in the buffers, handed out one by one.
	if err := q.fill(8, time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		p := receive(t, q, 1)[0]
		if got := string(p.Payload[28:]); got != fmt.Sprint(i) {
			t.Fatalf("packet %d holds %q", i, got)
		}
		q.Accept(p.ID)
	}
	flush(t, q)
	for i := range 10 {
		wantRead(t, server, fmt.Sprint(i))
	}
}

func TestQueueBelongsToNamespace(t *testing.T) {
	// Two namespaces may each have the queue of one number.
	newNamespace(t)
	openQueue(t, Config{Queue: 9})
	other := make(chan error, 1)
	t.Run("other", func(t *testing.T) {
		newNamespace(t)
		q, err := Open(Config{Queue: 9})
		if err == nil {
			_ = q.Close()
		}
		other <- err
	})
	if err := <-other; err != nil {
		t.Error(err)
	}
}
