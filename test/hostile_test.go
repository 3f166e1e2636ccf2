package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// asStranger runs f on a thread that belongs to another user and no group of
// ours. The raw system calls change that thread alone; it ends with f.
func asStranger(f func() error) error {
	res := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		for _, c := range []struct{ nr, a, b, c uintptr }{
			{syscall.SYS_SETGROUPS, 0, 0, 0},
			{syscall.SYS_SETRESGID, 65534, 65534, 65534},
			{syscall.SYS_SETRESUID, 65534, 65534, 65534},
		} {
			if _, _, errno := syscall.RawSyscall(c.nr, c.a, c.b, c.c); errno != 0 {
				res <- fmt.Errorf("become another user: %w", errno)
				return
			}
		}
		res <- f()
	}()
	return <-res
}

// TestUnknownCaller: a caller who is neither root nor in the control group is
// refused by the daemon, also where the file's mode would let it in.
func TestUnknownCaller(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "caller"}, 5)
	must(t, os.Chmod(n.Dir, 0o755))
	for socket, path := range map[string]string{
		"control.sock": "nfconnfilter.v1.Filter/Unregister",
		"agent.sock":   "nfconnfilter.v1.Agent/Stop",
	} {
		st, err := os.Stat(n.Path(socket))
		must(t, err)
		if st.Mode().Perm() != 0o660 {
			t.Errorf("%s has mode %v, want 0660", socket, st.Mode().Perm())
		}
		ask := func() (answer []byte, err error) {
			c, err := net.Dial("unix", n.Path(socket))
			if err != nil {
				return nil, err
			}
			defer c.Close()
			const body = `{"app":"redis","force":true}`
			if path != "nfconnfilter.v1.Filter/Unregister" {
				return answer, post(c, path, `{"app":"redis"}`, &answer)
			}
			return answer, post(c, path, body, &answer)
		}
		err = asStranger(func() error { _, err := ask(); return err })
		if !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: a stranger's connection: %v, want permission denied", socket, err)
		}
		must(t, os.Chmod(n.Path(socket), 0o666))
		var answer []byte
		must(t, asStranger(func() (err error) { answer, err = ask(); return err }))
		if !strings.Contains(string(answer), "permission_denied") {
			t.Errorf("%s: a stranger's request was answered %q", socket, answer)
		}
	}
	s, err := n.Status("redis")
	must(t, err)
	if s.State != "CONNECTED" {
		t.Errorf("state %q after refused requests", s.State)
	}
	rounds(t, load, 4)
}

// post sends one request over c and reads the answer to its end.
func post(c net.Conn, path, body string, answer *[]byte) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c, "POST /%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		path, len(body), body)
	if err != nil {
		return err
	}
	*answer, err = io.ReadAll(c)
	return err
}

// forge makes a packet with a TCP segment; damage may alter it. The TCP header
// begins at tcpAt.
func forge(src, dst net.Addr, tcp layers.TCP, payload []byte, damage func(ip []byte)) []byte {
	s, d := src.(*net.TCPAddr), dst.(*net.TCPAddr)
	var ip gopacket.SerializableLayer
	if s.IP.To4() != nil {
		l := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: s.IP.To4(), DstIP: d.IP.To4()}
		if err := tcp.SetNetworkLayerForChecksum(l); err != nil {
			panic(err)
		}
		ip = l
	} else {
		l := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: s.IP, DstIP: d.IP}
		if err := tcp.SetNetworkLayerForChecksum(l); err != nil {
			panic(err)
		}
		ip = l
	}
	tcp.SrcPort, tcp.DstPort = layers.TCPPort(s.Port), layers.TCPPort(d.Port)
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, &tcp, gopacket.Payload(payload))
	if err != nil {
		panic(err)
	}
	b := append([]byte(nil), buf.Bytes()...)
	if damage != nil {
		damage(b)
	}
	return b
}

// tcpAt is the offset of the TCP header of a forged packet.
func tcpAt(b []byte) int {
	if b[0]>>4 == 6 {
		return 40
	}
	return 20
}

// cut leaves eight octets of the TCP header.
func cut(b []byte) []byte {
	b = b[:tcpAt(b)+8]
	if b[0]>>4 == 6 { // with IPv4 the kernel writes the length
		b[4], b[5] = 0, 8
	}
	return b
}

// resum makes the TCP checksum right again, so that other damage is looked at.
func resum(b []byte) {
	t := b[tcpAt(b):]
	t[16], t[17] = 0, 0
	src, dst := b[12:16], b[16:20]
	if tcpAt(b) == 40 {
		src, dst = b[8:24], b[24:40]
	}
	sum := checksum(src, dst, t)
	t[16], t[17] = byte(sum>>8), byte(sum)
}

// inject sends raw packets from the client namespace.
func inject(t *testing.T, n *harness.Node, packets ...[]byte) {
	t.Helper()
	must(t, n.Net.Client().Do(func() error {
		family := syscall.AF_INET
		if packets[0][0]>>4 == 6 {
			family = syscall.AF_INET6
		}
		fd, err := syscall.Socket(family, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		for i, p := range packets {
			var to syscall.Sockaddr
			if family == syscall.AF_INET6 {
				to = &syscall.SockaddrInet6{Addr: [16]byte(p[24:40])}
			} else {
				to = &syscall.SockaddrInet4{Addr: [4]byte(p[16:20])}
			}
			if err := syscall.Sendto(fd, p, 0, to); err != nil {
				return fmt.Errorf("packet %d: %w", i, err)
			}
		}
		return nil
	}))
}

// numbers are those of the next segment of a client that would fit, after a
// round.
func numbers(t *testing.T, n *harness.Node, load *clients.Load, c *clients.Redis) (seq, ack uint32) {
	t.Helper()
	port := c.LocalAddr().(*net.TCPAddr).Port
	capt, err := n.Net.Client().Capture(testnet.Iface, fmt.Sprintf("tcp in data src %s dport %d", vip, port))
	must(t, err)
	rounds(t, load, 1)
	p, err := capt.WaitFor(5*time.Second, func(p gopacket.Packet) bool { return p.TransportLayer() != nil })
	must(t, err)
	capt.Stop()
	theirs := p.TransportLayer().(*layers.TCP)
	return theirs.Ack, theirs.Seq + uint32(len(theirs.Payload))
}

// TestMalformedPackets throws at held connections what an outsider or a broken
// device might send: it is counted, wakes nobody and harms no connection.
func TestMalformedPackets(t *testing.T) {
	// Nobody sends a keepalive: what is counted is the garbage alone.
	n, load := redisUp(t, harness.Options{Name: "bad"}, 20, clients.KeepAlive{})
	victim := load.Clients[0]
	seq, ack := numbers(t, n, load, victim)
	snapshot(t, n, "redis", "redis-server")
	before, err := n.Reasons("redis")
	must(t, err)

	src, dst := victim.LocalAddr(), victim.RemoteAddr()
	data := []byte("*1\r\n$4\r\nPING\r\n")
	ok := layers.TCP{Seq: seq, Ack: ack, ACK: true, PSH: true, Window: 500}
	with := func(f func(*layers.TCP)) layers.TCP { c := ok; f(&c); return c }
	garbage := [][]byte{
		forge(src, dst, ok, data, func(b []byte) { b[tcpAt(b)+16] ^= 0x55 }),          // checksum
		forge(src, dst, ok, data, func(b []byte) { b[len(b)-1]++ }),                   // payload altered
		forge(src, dst, ok, data, func(b []byte) { b[tcpAt(b)+12] = 0x40; resum(b) }), // data offset 4
		forge(src, dst, ok, nil, func(b []byte) { b[tcpAt(b)+12] = 0xf0; resum(b) }),  // data offset past the end
		cut(forge(src, dst, ok, data, nil)),                                           // a truncated header
		forge(src, dst, with(func(c *layers.TCP) { c.Seq += 1 << 30 }), data, nil),
		forge(src, dst, with(func(c *layers.TCP) { c.Seq -= 1 << 30 }), data, nil),
		forge(src, dst, with(func(c *layers.TCP) { c.Ack += 1 << 30 }), data, nil),
		forge(src, dst, with(func(c *layers.TCP) { c.Ack -= 1 << 30 }), data, nil),
		forge(src, dst, with(func(c *layers.TCP) { c.FIN, c.Seq = true, seq+(1<<30) }), nil, nil),
		forge(src, dst, layers.TCP{Seq: seq + 100, RST: true}, nil, nil), // RFC 5961: not the exact number
		forge(src, dst, layers.TCP{Seq: seq + (1 << 30), RST: true, ACK: true, Ack: ack}, nil, nil),
		forge(src, dst, layers.TCP{Seq: 12345, SYN: true, Window: 1000}, nil, nil), // RFC 5961: on a live connection
		forge(src, dst, layers.TCP{Seq: seq + (1 << 30), SYN: true, FIN: true, RST: true, PSH: true, URG: true, ACK: true}, data, nil),
		forge(src, dst, layers.TCP{Seq: seq}, data, nil), // no flag at all
		forge(&net.TCPAddr{IP: src.(*net.TCPAddr).IP, Port: 1}, dst, ok, data, nil),
	}
	for _, kind := range []layers.TCPOptionKind{2, 3, 5, 8, 30, 254} {
		for _, length := range []uint8{0, 1, 3, 40} {
			o := with(func(c *layers.TCP) {
				c.Seq += 1 << 30
				c.Options = []layers.TCPOption{{OptionType: kind, OptionLength: 6, OptionData: []byte{1, 2, 3, 4}}}
			})
			garbage = append(garbage, forge(src, dst, o, nil, func(b []byte) { b[tcpAt(b)+21] = length; resum(b) }))
		}
	}
	inject(t, n, garbage...)
	held(t, n, "redis", "redis-server", load, 5*time.Second)
	s, err := n.Status("redis")
	must(t, err)
	if s.RestoreRequested {
		t.Error("garbage has asked for a restore")
	}
	after, err := n.Reasons("redis")
	must(t, err)
	counted := uint64(0)
	for reason, k := range after {
		if d := k - before[reason]; d > 0 {
			t.Logf("%s: %d", reason, d)
			counted += d
		}
	}
	if counted < uint64(len(garbage)) {
		t.Errorf("%d packets were injected, only %d verdicts were counted", len(garbage), counted)
	}
	wake(t, n, "redis", victim)
	rounds(t, load, 4)
}

// TestCheckFaults: a faulty configuration is named with file, line and column.
func TestCheckFaults(t *testing.T) {
	n := newNode(t, harness.Options{Name: "check", Apps: []harness.App{harness.Redis("redis", vip)}})
	run := func() (string, int) {
		cmd := n.Net.Node().Command(n.Program("nfconnfilter"), append([]string{"check"}, n.Args()...)...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	if out, code := run(); code != 0 {
		t.Fatalf("exit %d for a right configuration: %s", code, out)
	}
	file := n.Path("shared", "apps", "redis.toml")
	text, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, append([]byte("nane = \"redis\"\n"), text...), 0o644))
	if out, code := run(); code != 2 || !strings.Contains(out, file+":1:1:") {
		t.Errorf("exit %d, want 2 and %s:1:1: %s", code, file, out)
	}
}

// TestRulesPurge: no rule and no set of ours is left.
func TestRulesPurge(t *testing.T) {
	n, _ := redisUp(t, harness.Options{Name: "purge"}, 5)
	must(t, n.Ctl("stop", "redis").Err())
	must(t, n.Down())
	out, err := n.Net.Node().Command(n.Program("nfconnfilter"), append(append([]string{"rules"}, n.Args()...), "--purge")...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, cmd := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"ipset", "save"}} {
		out, err := n.Net.Node().Command(cmd[0], cmd[1:]...).Output()
		must(t, err)
		if s := strings.ToLower(string(out)); strings.Contains(s, "nfcf") || strings.Contains(s, "nfqueue") {
			t.Errorf("%s after the purge:\n%s", cmd[0], out)
		}
	}
}

// TestRulesFlushed: another program flushes the packet rules while the
// application is away, and when its connections are translated.
func TestRulesFlushed(t *testing.T) {
	n, load := redisUp(t, harness.Options{Name: "flush"}, 50)
	flush := func() {
		t.Helper()
		began := time.Now()
		for _, c := range []string{iptables() + " -t raw -F", iptables() + " -t mangle -F", iptables() + " -t mangle -X"} {
			args := strings.Fields(c)
			if out, err := n.Net.Node().Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", c, err, out)
			}
		}
		must(t, harness.Wait(10*time.Second, "the packet rules are back", func() bool {
			for table, jumps := range map[string][]string{"raw": {"-A PREROUTING", "-A OUTPUT"}, "mangle": {"-A POSTROUTING"}} {
				out, err := n.Net.Node().Command(iptables(), "-t", table, "-S").Output()
				must(t, err)
				for _, j := range jumps {
					if !strings.Contains(string(out), j) {
						return false
					}
				}
			}
			return true
		}))
		t.Logf("the packet rules are back after %v", time.Since(began).Round(time.Millisecond))
	}
	snapshot(t, n, "redis", "redis-server")
	flush()
	held(t, n, "redis", "redis-server", load, time.Second)
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 2)
	flush()
	rounds(t, load, 2)
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[1])
	rounds(t, load, 2)
}

// TestSetsFlushed: another program empties the sets of the packet rules while
// the application is away, and when its connections are translated. Every
// client speaks meanwhile, to a kernel without a socket for it.
func TestSetsFlushed(t *testing.T) {
	const count = 50
	n, load := redisUp(t, harness.Options{Name: "sets"}, count, clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 6})
	run := func(args ...string) string {
		t.Helper()
		out, err := n.Net.Node().Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	reason := func(name string) uint64 {
		t.Helper()
		r, err := n.Reasons("redis")
		must(t, err)
		return r[name]
	}
	family, old := "nfcf4-", vip
	if overIPv6() {
		family, old = "nfcf6-", "["+vip+"]"
	}
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1) // the capture knows all numbers from here on
	snapshot(t, n, "redis", "redis-server")
	// What the kernel still has of the old sockets would answer, and not with RST.
	run("ss", "-tK", "state", "time-wait", "src", old)
	held(t, n, "redis", "redis-server", load, time.Second)
	for _, harm := range [][]string{{"ipset", "flush"}, {"ipset", "flush", family + "away"}, {"ipset", "del", "-exist", family + "away", vip}} {
		absorbed := reason("sealed-rst")
		// Again and again, so that every client has spoken to the kernel.
		must(t, harness.Wait(5*time.Second, "the kernel has answered every client", func() bool {
			run(harm...)
			return reason("sealed-rst") >= absorbed+count
		}))
		began, answered := time.Now(), reason("held-answered")
		must(t, harness.Wait(5*time.Second, "every client is answered again", func() bool { return reason("held-answered") >= answered+count }))
		t.Logf("%v: answered again after %v", harm, time.Since(began).Round(time.Millisecond))
		held(t, n, "redis", "redis-server", load, time.Second)
	}
	wake(t, n, "redis", load.Clients[0])
	rounds(t, load, 2)
	unnoticed()

	run("ipset", "flush")
	rounds(t, load, 2)
	must(t, harness.Wait(5*time.Second, "the flows are back", func() bool { return strings.Count(run("ipset", "list", family+"flow"), ","+vip) == count }))
	snapshot(t, n, "redis", "redis-server")
	wake(t, n, "redis", load.Clients[1])
	rounds(t, load, 2)
}
