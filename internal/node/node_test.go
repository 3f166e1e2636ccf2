package node

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/nfconnfilter/nfconnfilter/internal/rules"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRestoreMessage(t *testing.T) {
	for in, want := range map[string]string{
		"10.77.0.100":   "Restore 010.077.000.100\r\n",
		"255.1.20.0":    "Restore 255.001.020.000\r\n",
		"2001:db8::1:a": "Restore 2001:0db8:0000:0000:0000:0000:0001:000a\r\n",
	} {
		got := string(RestoreMessage(netip.MustParseAddr(in)))
		if got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
		if netip.MustParseAddr(in).Is4() && len(got) != 25 {
			t.Errorf("%s: %d octets, want 25", in, len(got))
		}
	}
}

func TestAskRestore(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 25)
		if _, err := io.ReadFull(bufio.NewReader(c), b); err != nil {
			t.Error(err)
		}
		got <- string(b)
		_, _ = io.WriteString(c, "ERR no such node\r\n")
	}()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	answer, err := askRestore(t.Context(), to, netip.MustParseAddr("10.0.0.9"), 5*time.Second)
	if err != nil || answer != "ERR no such node" {
		t.Fatalf("answer %q, %v", answer, err)
	}
	if m := <-got; m != "Restore 010.000.000.009\r\n" {
		t.Fatalf("message %q", m)
	}
	_ = l.Close()
	if _, err := askRestore(t.Context(), to, netip.MustParseAddr("10.0.0.9"), time.Second); err == nil {
		t.Fatal("no error without a scheduler")
	}
}

// A filter that stops does not wait for a scheduler that says nothing.
func TestAskRestoreEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.ReadFull(c, make([]byte, 25))
		cancel()
		_, _ = io.ReadAll(c) // until the filter goes
	}()
	begin := time.Now()
	if answer, err := askRestore(ctx, l.Addr().(*net.TCPAddr).AddrPort(), netip.MustParseAddr("10.0.0.9"), time.Minute); err == nil {
		t.Errorf("answer %q", answer)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestConntrackEntries(t *testing.T) {
	const head = "entries  clashres found new\n"
	for in, want := range map[string]int64{
		head + "00000000  00000000 00000000\n": 0,
		head + "0000001f  00000000 00000000\n": 31,
		head:                                   -1,
		"":                                     -1,
		head + "zz\n":                          -1,
	} {
		if got := conntrackEntries([]byte(in)); got != want {
			t.Errorf("%q: %d, want %d", in, got, want)
		}
	}
}

// renamed lets an error that says text pass as one that says name.
func renamed(err error, text, name string) error {
	if err == nil || !strings.Contains(err.Error(), text) {
		return err
	}
	return connect.NewError(connect.CodeOf(err), errors.New(name))
}

// A request whose caller has gone is not carried out any more.
func TestCallerGone(t *testing.T) {
	n := &Node{states: map[string]string{}, calls: map[uint64]*call{}, engine: filter.New(filter.Config{}), log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	c := &call{body: &filter.Register{App: "a", VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}, gone: ctx.Done(), done: make(chan result, 1)}
	cancel()
	n.inbox = append(n.inbox, c)
	n.takeCalls()
	if r := <-c.done; !errors.Is(r.err, context.Canceled) {
		t.Errorf("carried out: %v, %v", r.body, r.err)
	}
}

func TestLatest(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	add := func(s rules.Set) rules.Change { return rules.Change{Set: s, Add: true, IP: ip} }
	del := func(s rules.Set) rules.Change { return rules.Change{Set: s, IP: ip} }
	got := latest([]rules.Change{add(rules.VIP), add(rules.Away), add(rules.Full), del(rules.Away), add(rules.VIP), del(rules.Full), add(rules.Full)})
	want := []rules.Change{del(rules.Away), add(rules.VIP), add(rules.Full)}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Arguments that cannot be read are refused before the engine sees them.
func TestBadArguments(t *testing.T) {
	n := &Node{states: map[string]string{}}
	n.cfg.Store(&config.Config{})
	s := n.Service()
	ctx := context.Background()
	for name, call := range map[string]func() error{
		"vip": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "a", Vips: []string{"10.0.0"}}))
			return err
		},
		"vip: multicast": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "a", Vips: []string{"224.0.0.1"}}))
			return renamed(err, "224.0.0.1 is not an address", "vip: multicast")
		},
		"vip: second": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "a", Vips: []string{"10.0.0.1", "::1", "10.0.0.2"}}))
			return renamed(err, "second address of its family", "vip: second")
		},
		"sockets: families": func() error {
			_, err := s.SnapshotStart(ctx, connect.NewRequest(&pb.SnapshotStartRequest{App: "a", Sockets: []*pb.Socket{{Local: "[fd00::1]:80", Remote: "10.0.0.1:4000"}}}))
			return renamed(err, "not of one family", "sockets: families")
		},
		"ADOPT": func() error {
			_, err := s.Adopt(ctx, connect.NewRequest(&pb.AdoptRequest{App: "a", Sockets: []*pb.Socket{{Local: "10.0.0.1:80", Remote: "10.0.0.1:0"}}}))
			return err
		},
		"include_ports": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "a", Vips: []string{"10.0.0.1"}, IncludePorts: []uint32{70000}}))
			return err
		},
		"exclude_addresses": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: "a", Vips: []string{"10.0.0.1"}, ExcludeAddresses: []string{"10.0.0.0/33"}}))
			return err
		},
		"sockets": func() error {
			_, err := s.SnapshotStart(ctx, connect.NewRequest(&pb.SnapshotStartRequest{App: "a", Sockets: []*pb.Socket{{Local: "10.0.0.1:1", Remote: "x"}}}))
			return err
		},
		"RESTORECONN": func() error {
			_, err := s.RestoreConn(ctx, connect.NewRequest(&pb.RestoreConnRequest{App: "a", Conns: []*pb.ConnID{{Local: "10.0.0.1", Remote: "10.0.0.2:3"}}}))
			return err
		},
		"RESTORESTART": func() error {
			_, err := s.RestoreStart(ctx, connect.NewRequest(&pb.RestoreStartRequest{App: "a", Ip: "nowhere"}))
			return err
		},
		"app: ": func() error {
			_, err := s.Register(ctx, connect.NewRequest(&pb.RegisterRequest{App: strings.Repeat("a", 256), Vips: []string{"10.0.0.1"}}))
			return err
		},
		"learn_timeout_ms": func() error {
			_, err := s.SnapshotStart(ctx, connect.NewRequest(&pb.SnapshotStartRequest{App: "a", LearnTimeoutMs: 1 << 62}))
			return err
		},
		"quiet_ms": func() error {
			_, err := s.SnapshotFreeze(ctx, connect.NewRequest(&pb.SnapshotFreezeRequest{App: "a", QuietMs: -1}))
			return err
		},
		"state": func() error {
			_, err := s.Wait(ctx, connect.NewRequest(&pb.WaitRequest{App: "a", State: "ASLEEP"}))
			return err
		},
	} {
		err := call()
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := s.Wait(ctx, connect.NewRequest(&pb.WaitRequest{App: "a", State: "RESTORED"}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unknown application: %v", err)
	}
}
