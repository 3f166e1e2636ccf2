package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// asProgram has the test binary be the program.
const asProgram = "NFCF_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// up is an interpreter on these addresses, or on a port of loopback.
func up(t *testing.T, source net.IP, addrs ...string) []string {
	t.Helper()
	if len(addrs) == 0 {
		addrs = []string{"127.0.0.1:0"}
	}
	all, err := listen(strings.Join(addrs, ","))
	if err != nil {
		t.Fatal(err)
	}
	p := newProcess(source)
	var wg sync.WaitGroup
	var at []string
	for _, l := range all {
		at = append(at, l.Addr().String())
		wg.Go(func() {
			if err := p.accept(l); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		for _, l := range all {
			l.Close()
		}
		wg.Wait()
		for name := range p.peers {
			p.hangUp(name)
		}
	})
	return at
}

func direct(addr string) (net.Conn, error) { return net.Dial("tcp", addr) }

func client(t *testing.T, addr string) *clients.Interp {
	t.Helper()
	c, err := clients.DialInterp(direct, addr, clients.KeepAlive{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expect makes requests, each followed by its right reply.
func expect(t *testing.T, c *clients.Interp, pairs ...string) {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if got, err := c.Do(pairs[i]); got != pairs[i+1] || err != nil != strings.HasPrefix(got, "! ") {
			t.Errorf("%s: %q, %v, want %q", pairs[i], got, err, pairs[i+1])
		}
	}
}

func TestExpressions(t *testing.T) {
	vars := map[string]value{"x": {n: 5}, "s": {s: "a", text: true}, "$g": {n: 9}}
	for expr, want := range map[string]string{
		"1":                       "1",
		" 1 + 2*3 ":               "7",
		"(1+2)*3":                 "9",
		"10-2-3":                  "5",
		"-x*2":                    "-10",
		"--x":                     "5",
		"2--2":                    "4",
		"x*x-$g":                  "16",
		"9223372036854775807+1":   "-9223372036854775808",
		`"a b"+s`:                 `"a ba"`,
		`"\n" + "\"" + "\\"`:      `"\n\"\\"`,
		`s+s+"x"`:                 `"aax"`,
		`""`:                      `""`,
		"y":                       "no y",
		"$x":                      "no $x",
		"":                        "unexpected end",
		"1+":                      "unexpected end",
		"1 2":                     `unexpected "2"`,
		"(1":                      "closing",
		"x+s":                     "only integers",
		"s-s":                     "only integers",
		"s*2":                     "only integers",
		"-s":                      "only integers",
		`"open`:                   "string",
		"1/2":                     "unexpected",
		"99999999999999999999999": "out of range",
		"'a'":                     "unexpected",
	} {
		v, err := eval(expr, func(name string) (value, bool) { v, ok := vars[name]; return v, ok })
		if err != nil && !strings.Contains(err.Error(), want) || err == nil && v.String() != want {
			t.Errorf("%q is %v, %v, want %s", expr, v, err, want)
		}
	}
}

func TestSession(t *testing.T) {
	addr := up(t, nil)[0]
	c := client(t, addr)
	local := c.LocalAddr().String()
	expect(t, c,
		"let x 6 * 7", "42",
		"let long_1 x", "42",
		`let s "a \"b\""`, `"a \"b\""`,
		"let s s + s", `"a \"b\"a \"b\""`,
		"print x - long_1 + 1", "1",
		"names", "3 long_1 s x",
		"history 1", "let x 6 * 7",
		"history 7", "history 1",
		"count", "9",
		"let x y", "! no y",
		"let 1x 2", `! "1x" is no name`,
		"let x", "! let takes 2 to 2 arguments",
		"count 1", "! count takes 0 to 0 arguments",
		"history 0", "! no request 0, there were 14",
		"history 16", "! no request 16, there were 15",
		"history x", "! no request x, there were 16",
		"nothing", `! unknown request "nothing"`,
		"", `! unknown request ""`,
		"print x", "42",
		"count", "20",
		"session", local,
		"session me", "me",
		"session", "me",
		"global none", "! no global none",
		"sum -1", "! -1 is negative",
		"blob x", `! strconv.ParseInt: parsing "x": invalid syntax`,
		"gen 1 -1", `! strconv.ParseUint: parsing "-1": invalid syntax`,
		"halved nobody", "! no half-closed session nobody",
	)
	// Another session has none of it but what is global.
	other := client(t, addr)
	expect(t, c, "global g x + 1", "43", "print $g", "43")
	expect(t, other, "count", "1", "names", "0", "print x", "! no x", "global g", "43", `global g $g * 2`, "86", "history 1", "count")
	expect(t, c, "global g", "86", "global g $none", "! no $none", "global g", "86")
	expect(t, c, "quit", "bye")
	must(t, c.Ended())
	expect(t, other, "count", "7")
}

func TestData(t *testing.T) {
	c := client(t, up(t, nil)[0])
	lines := "5\n-7\n \nprint 1\n100\n"
	expect(t, c, "sum 5\n"+strings.TrimSuffix(lines, "\n"), fmt.Sprintf("98 %x", sha256.Sum256([]byte(lines))))
	expect(t, c, "sum 0", fmt.Sprintf("0 %x", sha256.Sum256(nil)))
	total := uint64(0)
	for _, size := range []int{0, 1, longest - 1, longest, longest + 1, 3<<20 + 5} {
		b := make([]byte, size)
		clients.Fill(b, 3, 0)
		total += uint64(size)
		must(t, c.Blob(b, total))
		must(t, c.Gen(size, uint64(size)))
	}
	// Lines of a sum and octets of a blob are no requests.
	expect(t, c, "count", "15", "history 2", "sum 0")
}

func TestLongLine(t *testing.T) {
	c := client(t, up(t, nil)[0])
	expect(t, c, `let s "`+strings.Repeat("x", longest-10)+`"`, `"`+strings.Repeat("x", longest-10)+`"`)
	must(t, c.Write([]byte(strings.Repeat("x", longest))))
	if got, err := c.Reply(); !errors.Is(err, clients.ErrRefused) {
		t.Errorf("%q, %v", got, err)
	}
	must(t, c.Ended())
}

// TestGlobalsAddUp: what many sessions do to one global is done once each.
func TestGlobalsAddUp(t *testing.T) {
	addr := up(t, nil)[0]
	expect(t, client(t, addr), "global n 0", "0")
	var wg sync.WaitGroup
	for range 8 {
		c := client(t, addr)
		wg.Go(func() {
			for range 200 {
				if _, err := c.Do("global n $n + 1"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	expect(t, client(t, addr), "global n", "1600")
}

// TestEnd: everything that came before the end of the stream is answered, and
// nothing else.
func TestEnd(t *testing.T) {
	c := client(t, up(t, nil)[0])
	must(t, c.Write([]byte("let x 1\nprint x + 1\ngen 5 8\nblob 3\nabccount\nlet x")))
	must(t, c.CloseWrite())
	for _, want := range []string{"1", "2", "5"} {
		if got, err := c.Reply(); got != want || err != nil {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	must(t, c.Stream(5, 8))
	for _, want := range []string{fmt.Sprintf("%x 3", sha256.Sum256([]byte("abc"))), "5"} {
		if got, err := c.Reply(); got != want || err != nil {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	must(t, c.Ended())

	// The end in the middle of what belongs to a request.
	for _, cut := range []string{"blob 5\nabcd", "sum 2\n1\n2"} {
		c := client(t, up(t, nil)[0])
		must(t, c.Write([]byte(cut)))
		must(t, c.CloseWrite())
		must(t, c.Ended())
	}
}

// TestWait: a reply is held for a client that has ended its stream.
func TestWait(t *testing.T) {
	addr := up(t, nil)[0]
	held, gone, other := client(t, addr), client(t, addr), client(t, addr)
	must(t, held.Send("wait door\nprint 5"))
	must(t, gone.Send("wait door"))
	must(t, gone.CloseWrite())
	waiting(t, other, "door", "2")
	must(t, held.Idle())
	expect(t, other, "waiting gate", "0", "release door", "2")
	for _, c := range []*clients.Interp{held, gone} {
		if got, err := c.Reply(); got != "released door" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	if got, err := held.Reply(); got != "5" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	must(t, gone.Ended())
	// It stays open.
	expect(t, other, "release door", "! door is released", "wait door", "released door")
	waiting(t, other, "door", "0")
	// The release may come first.
	expect(t, other, "release early", "0")
	expect(t, held, "wait early", "released early")
}

// waiting asks until so many wait.
func waiting(t *testing.T, c *clients.Interp, name, n string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		got, err := c.Do("waiting " + name)
		must(t, err)
		if got == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s wait at %s, not %s", got, name, n)
		}
	}
}

// TestHalf: what a half-closed session receives is told in another one.
func TestHalf(t *testing.T) {
	addr := up(t, nil)[0]
	c, other := client(t, addr), client(t, addr)
	// What comes behind the request is no request.
	must(t, c.Send("half\nprint 1"))
	got, err := c.Reply()
	if want := "half " + c.LocalAddr().String(); got != want || err != nil {
		t.Fatalf("%q, %v, want %q", got, err, want)
	}
	must(t, c.Ended())
	name := c.LocalAddr().String()
	sent := []byte("print 1\n")
	must(t, other.Halved(name, sent, "open"))
	more := make([]byte, 1<<20)
	clients.Fill(more, 1, 0)
	must(t, c.Write(more))
	sent = append(sent, more...)
	must(t, other.Halved(name, sent, "open"))
	if err := other.Halved(name, sent[1:], "open"); !errors.Is(err, clients.ErrWrong) {
		t.Errorf("what was not sent is right: %v", err)
	}
	// It waits for more, and the end is as good.
	must(t, other.Send(fmt.Sprintf("halved %s %d", name, len(sent)+100)))
	must(t, c.Send("last"))
	must(t, c.CloseWrite())
	sent = append(sent, "last\n"...)
	if got, err := other.Reply(); got != fmt.Sprintf("%d %x ended", len(sent), sha256.Sum256(sent)) {
		t.Errorf("%q, %v", got, err)
	}
	must(t, other.Halved(name, sent, "ended"))
	must(t, other.Expect("halved "+name+" 0", fmt.Sprintf("%d %x ended", len(sent), sha256.Sum256(sent))))

	// A name of its own, once; and a reset is no end.
	c = client(t, addr)
	expect(t, c, "session third", "third")
	name, err = c.Half()
	if name != "third" || err != nil {
		t.Fatalf("%q, %v", name, err)
	}
	must(t, c.Write([]byte("x")))
	must(t, other.Halved("third", []byte("x"), "open"))
	must(t, other.Send("halved third end"))
	must(t, c.Conn().SetLinger(0))
	c.Close()
	if got, err := other.Reply(); got != fmt.Sprintf("1 %x failed", sha256.Sum256([]byte("x"))) {
		t.Errorf("%q, %v", got, err)
	}
	must(t, other.Halved("third", []byte("x"), "failed"))
	expect(t, other, "session third", "third", "half", "! there was a half-closed session third", "halved third x", `! strconv.ParseInt: parsing "x": invalid syntax`)
}

// TestOutgoing: the connections belong to the process and come from its address.
func TestOutgoing(t *testing.T) {
	to := up(t, nil)[0]
	addr := up(t, net.IPv4(127, 0, 0, 2))[0]
	c, other := client(t, addr), client(t, addr)
	got, err := c.Do("dial out " + to)
	must(t, err)
	from, peer, _ := strings.Cut(got, " ")
	if host, _, _ := net.SplitHostPort(from); host != "127.0.0.2" || peer != to {
		t.Errorf("dial: %q", got)
	}
	expect(t, c, "dial out "+to, "! there is a connection out", "tell out session", from, "tell out let x 1", "1")
	expect(t, c, "quit", "bye")
	expect(t, other, "tell out print x + 1", "2", "tell out count", "4", "tell in x", "! no connection in")
	// A reply that is held holds the one who asked.
	must(t, other.Send("tell out wait word"))
	far := client(t, to)
	waiting(t, far, "word", "1")
	expect(t, far, "release word", "1")
	if got, err := other.Reply(); got != "released word" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	expect(t, other, "tell out quit", "bye", "tell out count", "! EOF", "hangup out", "closed out", "hangup out", "! no connection out")
	if got, err := other.Do("dial bad 127.0.0.2:1"); !errors.Is(err, clients.ErrRefused) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestTypists: the interpreter and the typists' own idea of it agree.
func TestTypists(t *testing.T) {
	at := up(t, nil, "127.0.0.1:0", "[::1]:0")
	for i, addr := range at {
		all, err := clients.OpenTypists(direct, addr, 100*i, 20)
		must(t, err)
		defer all.Close()
		must(t, clients.Summary(all.Round()))
		w := all.Type(2*time.Millisecond, 4)
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			r := w.Report()
			least := r.Right
			for _, n := range r.Each {
				least = min(least, n)
			}
			// Every kind of request, and each variable a second time.
			if least > 150 {
				break
			}
			if len(r.Errors) > 0 || time.Now().After(deadline) {
				t.Fatalf("%d replies: %v", least, r.Err())
			}
		}
		r := w.Stop()
		if err := r.Err(); err != nil || r.Right != r.Sent || r.Wrong != 0 {
			t.Errorf("%+v", r)
		}
		must(t, clients.Summary(all.Idle()))
		// A session that has lost one request is noticed.
		_, err = all[0].Do("count")
		must(t, err)
		for range 10 {
			if err = all[0].Type(); err != nil {
				break
			}
		}
		if !errors.Is(err, clients.ErrWrong) {
			t.Errorf("a request that the typist has not sent: %v", err)
		}
	}
}

// TestProgram: two addresses, one process; it has nothing open but what it was given, its
// sockets and the runtime's means to wait.
func TestProgram(t *testing.T) {
	dir := t.TempDir()
	out, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	defer out.Close()
	start := func() (c *clients.Interp, c6 *clients.Interp, pid int) {
		cmd := exec.Command(os.Args[0], "-listen", "127.0.0.1:0,[::1]:0")
		cmd.Env = append(os.Environ(), asProgram+"=1")
		stdout, err := cmd.StdoutPipe()
		must(t, err)
		cmd.Stderr = out
		must(t, cmd.Start())
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		r := bufio.NewReader(stdout)
		var at [2]string
		for i := range at {
			line, err := r.ReadString('\n')
			must(t, err)
			at[i] = strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
		}
		return client(t, at[0]), client(t, at[1]), cmd.Process.Pid
	}
	c, c6, pid := start()
	one, err := c.Identity()
	must(t, err)
	six, err := c6.Identity()
	must(t, err)
	if number, nonce, _ := strings.Cut(one, " "); six != one || number != strconv.Itoa(pid) || len(nonce) < 20 {
		t.Errorf("process %d is %q and %q", pid, one, six)
	}
	again, _, _ := start()
	two, err := again.Identity()
	must(t, err)
	if _, nonce, _ := strings.Cut(two, " "); strings.Contains(one, nonce) {
		t.Errorf("two starts are %q and %q", one, two)
	}

	fds := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(fds)
	must(t, err)
	kinds := map[string]int{}
	for _, e := range list {
		n, err := strconv.Atoi(e.Name())
		must(t, err)
		if flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); n <= 2 || err == nil && flags&unix.FD_CLOEXEC == 0 {
			continue // inherited through this process
		}
		target, err := os.Readlink(filepath.Join(fds, e.Name()))
		must(t, err)
		kind, _, _ := strings.Cut(target, ":[")
		if kind == "anon_inode" {
			kind = target
		}
		kinds[kind]++
	}
	want := map[string]int{"socket": 4, "anon_inode:[eventpoll]": 1, "anon_inode:[eventfd]": 1}
	if fmt.Sprint(kinds) != fmt.Sprint(want) {
		t.Errorf("open: %v, want %v", kinds, want)
	}
}

// TestPlainTCP: also where the kernel would give MPTCP sockets.
func TestPlainTCP(t *testing.T) {
	all, err := listen("127.0.0.1:0")
	must(t, err)
	defer all[0].Close()
	raw, err := all[0].(*net.TCPListener).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		if proto, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL); proto != unix.IPPROTO_TCP || err != nil {
			t.Errorf("protocol %d, %v", proto, err)
		}
	}))
	if more, err := listen("127.0.0.1:0," + all[0].Addr().String()); err == nil {
		t.Errorf("%v twice", more)
	}
}
