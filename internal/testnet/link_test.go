package testnet

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/vip"
)

// fates plays frames, one each millisecond, through a direction with a clock
// of its own and returns the numbers in the order in which they are carried.
func fates(imp Impairment, seed uint64, frames int) ([]int, LinkStats) {
	var carried []int
	d := newDirection(rand.New(rand.NewPCG(seed, 0)), func(b []byte) error {
		carried = append(carried, int(binary.BigEndian.Uint32(b)))
		return nil
	})
	d.imp = imp
	now := time.Unix(1, 0)
	for i := range frames + 1000 {
		now = now.Add(time.Millisecond)
		for {
			f, _ := d.pop(now)
			if f == nil {
				break
			}
			d.carry(f)
		}
		if i >= frames {
			continue
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(i))
		if d.take(now, b) {
			d.carry(b)
		}
	}
	return carried, d.stats
}

func TestLinkUnimpaired(t *testing.T) {
	carried, stats := fates(Impairment{}, 1, 500)
	if len(carried) != 500 || !slices.IsSorted(carried) || stats != (LinkStats{Carried: 500}) {
		t.Errorf("%d carried, %+v", len(carried), stats)
	}
}

func TestLinkSameSeedSameFate(t *testing.T) {
	imp := Impairment{Loss: 0.02, Duplicate: 0.01, Delay: 20 * time.Millisecond, Jitter: 5 * time.Millisecond}
	const frames = 20_000
	a, stats := fates(imp, 7, frames)
	b, _ := fates(imp, 7, frames)
	c, _ := fates(imp, 8, frames)
	if !slices.Equal(a, b) {
		t.Error("the same seed gave two fates")
	}
	if slices.Equal(a, c) {
		t.Error("another seed gave the same fate")
	}
	if stats.Lost < frames*15/1000 || stats.Lost > frames*25/1000 {
		t.Errorf("%d of %d lost, want about 2 %%", stats.Lost, frames)
	}
	if stats.Duplicated < frames*5/1000 || stats.Overtaken < frames/100 {
		t.Errorf("duplicates and overtaking: %+v", stats)
	}
	if want := frames - stats.Lost + stats.Duplicated; stats.Carried != want || uint64(len(a)) != want {
		t.Errorf("%d carried, %+v", len(a), stats)
	}
}

func TestLinkDelayKeepsOrder(t *testing.T) {
	carried, stats := fates(Impairment{Delay: 20 * time.Millisecond, Loss: 0.1}, 3, 2000)
	if !slices.IsSorted(carried) || stats.Overtaken != 0 {
		t.Errorf("a constant delay reorders: %+v", stats)
	}
	d := newDirection(rand.New(rand.NewPCG(1, 0)), func([]byte) error { return nil })
	now := time.Unix(1, 0)
	d.imp.Delay = 20 * time.Millisecond
	if d.take(now, []byte("first")) {
		t.Error("a delayed frame is to be written at once")
	}
	d.imp = Impairment{} // what comes now must not overtake
	if d.take(now, []byte("second")) {
		t.Error("a frame overtakes one that is under way")
	}
	if f, next := d.pop(now.Add(19 * time.Millisecond)); f != nil || !next.Equal(now.Add(20*time.Millisecond)) {
		t.Errorf("%q at 19 ms, next at %v", f, next)
	}
	for _, want := range []string{"first", "second"} {
		if f, _ := d.pop(now.Add(20 * time.Millisecond)); string(f) != want {
			t.Errorf("%q at 20 ms, want %q", f, want)
		}
	}
}

func TestLinkOverflow(t *testing.T) {
	d := newDirection(rand.New(rand.NewPCG(1, 0)), nil)
	d.imp.Delay = time.Hour
	for range linkQueue + 5 {
		d.take(time.Unix(1, 0), []byte("x"))
	}
	if len(d.queue) != linkQueue || d.stats.Overflowed != 5 {
		t.Errorf("%d wait, %+v", len(d.queue), d.stats)
	}
}

// pings sends datagrams, one after the other, to an echo server in node 0, and
// returns how long each took that came back.
func pings(t *testing.T, c *Cluster, host string, count int, patience time.Duration) []time.Duration {
	t.Helper()
	addr, err := net.ResolveUDPAddr("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	var server *net.UDPConn
	if err := c.Node(0).Do(func() (err error) {
		server, err = net.ListenUDP("udp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, from, err := server.ReadFromUDP(b)
			if err != nil {
				return
			}
			_, _ = server.WriteToUDP(b[:n], from)
		}
	}()
	defer func() { _ = server.Close(); <-done }()
	conn, err := c.Client().Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var took []time.Duration
	b := make([]byte, 64)
	for i := range count {
		begin := time.Now()
		binary.BigEndian.PutUint64(b, uint64(i))
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(begin.Add(patience))
		for {
			n, err := conn.Read(b)
			if err != nil {
				break // lost
			}
			if n == len(b) && binary.BigEndian.Uint64(b) == uint64(i) {
				took = append(took, time.Since(begin))
				break
			}
		}
	}
	return took
}

// TestCableDelayAndLoss measures what the impairment says on real packets, of
// both families.
func TestCableDelayAndLoss(t *testing.T) {
	RequireRoot(t)
	c := NewCluster(t, ClusterOptions{Name: "cable", Cable: true, Seed: 5})
	for _, host := range []string{"10.77.0.11", "fd77::11"} {
		c.Link().Impair(Impairment{})
		took := pings(t, c, host, 200, time.Second)
		if len(took) != 200 {
			t.Fatalf("%s: %d of 200 came back over a good link", host, len(took))
		}
		slices.Sort(took)
		if took[100] > 5*time.Millisecond {
			t.Errorf("%s: a round trip over a good link took %v (median)", host, took[100])
		}
		c.Link().Impair(Impairment{Delay: 20 * time.Millisecond})
		took = pings(t, c, host, 20, time.Second)
		slices.Sort(took)
		if len(took) != 20 || took[0] < 40*time.Millisecond || took[10] > 60*time.Millisecond {
			t.Errorf("%s: round trips with 20 ms each way: %v", host, took)
		}
		forth, back := c.Link().Stats()
		c.Link().Impair(Impairment{Loss: 0.2})
		// The address of a neighbour is known by now, so that no question for it is lost.
		took = pings(t, c, host, 200, 20*time.Millisecond)
		forth2, back2 := c.Link().Stats()
		lost := forth2.Lost - forth.Lost + back2.Lost - back.Lost
		t.Logf("%s: %d of 200 came back with 20 %% loss each way, %d frames lost", host, len(took), lost)
		// 64 % survive both ways; a machine that is busy loses a few more to the patience.
		if len(took) < 80 || len(took) > 165 || lost < 35 || 200-len(took) < int(lost)/2 {
			t.Errorf("%s: %d of 200 came back with 20 %% loss each way, %d frames lost", host, len(took), lost)
		}
	}
}

// TestCableReorders: jitter has frames overtake one another, and TCP bears it.
func TestCableReorders(t *testing.T) {
	RequireRoot(t)
	c := NewCluster(t, ClusterOptions{Name: "jitter", Cable: true, Seed: 6})
	addr := echo(t, c.Node(1), "10.77.0.12:0")
	conn, err := c.Client().Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c.Link().Impair(Impairment{Delay: 2 * time.Millisecond, Jitter: 3 * time.Millisecond, Loss: 0.02, Duplicate: 0.01})
	roundTrip(t, conn, 400_000)
	forth, back := c.Link().Stats()
	for name, s := range map[string]LinkStats{"forth": forth, "back": back} {
		if s.Overtaken == 0 || s.Lost == 0 || s.Duplicated == 0 || s.Overflowed != 0 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestCableRate: a link without impairment is no bottleneck for the tests.
func TestCableRate(t *testing.T) {
	RequireRoot(t)
	c := NewCluster(t, ClusterOptions{Name: "rate", Cable: true})
	conn, err := c.Client().Dial("tcp", echo(t, c.Node(0), "10.77.0.11:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	begin := time.Now()
	roundTrip(t, conn, 64<<20)
	forth, back := c.Link().Stats()
	rate := float64(forth.Carried+back.Carried) / time.Since(begin).Seconds()
	t.Logf("%.0f frames a second, %+v, %+v", rate, forth, back)
	if rate < 20_000 {
		t.Errorf("%.0f frames a second, want 20,000", rate)
	}
}

// TestClusterAddressMoves: what announces an address with its own link-layer
// address gets its packets from then on, whichever node had it before.
func TestClusterAddressMoves(t *testing.T) {
	RequireRoot(t)
	for _, cable := range []bool{false, true} {
		t.Run(fmt.Sprintf("cable %v", cable), func(t *testing.T) {
			c := NewCluster(t, ClusterOptions{Name: "move", Cable: cable})
			for i, ns := range []*NS{c.Node(0), c.Node(1)} {
				if i == 1 {
					if out, err := c.Node(0).Command("ip", "address", "flush", "to", "10.77.0.100").CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				}
				if err := ns.AddAddr(Iface, "10.77.0.100/32"); err != nil {
					t.Fatal(err)
				}
				if err := ns.Do(func() error { return vip.Announce(Iface, netip.MustParseAddr("10.77.0.100")) }); err != nil {
					t.Fatal(err)
				}
				ln, err := ns.Listen("tcp", "10.77.0.100:9")
				if err != nil {
					t.Fatal(err)
				}
				conn, err := c.Client().Dial("tcp", "10.77.0.100:9")
				if err != nil {
					t.Errorf("node %d does not get the connection: %v", i, err)
				} else {
					_ = conn.Close()
				}
				_ = ln.Close()
			}
		})
	}
}
