package test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

var (
	killsFlag    = flag.Int("kills", 3, "how many times TestKills ends a filter or an agent in each of its settings")
	killSeedFlag = flag.Uint64("kill-seed", 1, "where TestKills begins in its list of points, and its random times")
)

// killStates are those in which a filter is killed; "": in any.
var killStates = []string{"CONNECTED", "SNAPSHOTSTART", "SNAPSHOTFREEZE", "SNAPSHOTDONE", "RESTORESTART", "RESTORED"}

// doom is one end of a program that a test has planned.
type doom struct {
	program string
	at      *failpoint.Point // nil: at a random time
}

func (d doom) daemon(n *harness.Node) *harness.Daemon {
	if d.program == "filter" {
		return n.Filter
	}
	return n.Agent
}

func (d doom) start(n *harness.Node) error {
	if d.program == "filter" {
		return n.StartFilter()
	}
	return n.StartAgent()
}

func (d doom) String() string {
	if d.at == nil {
		return d.program + " at any time"
	}
	return d.program + " " + d.at.Name
}

// dooms are all ends: the filter at each boundary in each state, the agent at each boundary the
// first, third and tenth time, and both at any time; in an order that rng makes.
func dooms(rng *rand.Rand) (out []doom) {
	for _, name := range failpoint.Filter {
		for _, state := range killStates {
			out = append(out, doom{"filter", &failpoint.Point{Name: name, State: state, Count: 1 + rng.IntN(3)}})
		}
	}
	for _, name := range failpoint.Agent {
		for _, n := range []int{1, 3, 10} {
			out = append(out, doom{"agent", &failpoint.Point{Name: name, Count: n}})
		}
	}
	for range 12 {
		out = append(out, doom{"filter", nil}, doom{"agent", nil})
	}
	rng.Shuffle(len(out), func(i, k int) { out[i], out[k] = out[k], out[i] })
	return out
}

// captured is how many kills a capture holds: packets are kept in memory.
const captured = 10

// slaughter is a cluster in which programs are ended again and again.
type slaughter struct {
	c     *harness.Cluster
	load  *clients.Load
	talk  *clients.Talk
	rng   *rand.Rand
	on    int // node that has the application
	kills map[string]map[string]int
	total int
	moves int // of the application, seen so far
	slow  time.Duration
}

// TestKills ends filter and agent with SIGKILL, at the boundaries of their effects and at any
// time, while 100 clients speak all the time with an application that is snapshotted, restored
// and, with two nodes, migrated; with both engines. No connection is lost, and every reply is
// right to the octet. make test-crash does it some hundred times.
func TestKills(t *testing.T) {
	for i, s := range []struct {
		name  string
		nodes int
		criu  bool
	}{{"restart, one node", 1, false}, {"restart, two nodes", 2, false}, {"criu, one node", 1, true}, {"criu, two nodes", 2, true}} {
		t.Run(s.name, func(t *testing.T) {
			app := harness.Redis("redis", vip)
			o := harness.ClusterOptions{Name: "kills", Nodes: s.nodes, Failpoints: true}
			if s.criu {
				command, err := criuCommand()
				must(t, err)
				o.CRIU = command
				app.Checkpoint, app.Before = "engine = \"criu\"\n", nil
			}
			o.Apps = []harness.App{app}
			c, load := clusterUp(t, o, 100)
			k := &slaughter{c: c, load: load, rng: rand.New(rand.NewPCG(*killSeedFlag, uint64(i))), kills: map[string]map[string]int{}}
			k.run(t, *killsFlag)
		})
	}
}

func (k *slaughter) run(t *testing.T, kills int) {
	t.Helper()
	watched := watchRoute(t, k.c, vip)
	rounds(t, k.load, 1) // the capture knows all numbers from here on
	talk, stop := talk(t, k.load, 20*time.Millisecond)
	k.talk = talk
	defer k.print(t)
	for list := dooms(k.rng); k.total < kills; {
		if len(list) == 0 {
			list = dooms(k.rng)
		}
		before := k.total
		k.one(t, list[0])
		list = list[1:]
		if k.total > before && k.total%captured == 0 {
			watched()
			watched = watchRoute(t, k.c, vip)
		}
	}
	everybody(t, talk, 2)
	must(t, stop())
	noRecords(t, k.c)
	watched()
}

// one has the application leave and come back, and a program end on the way.
func (k *slaughter) one(t *testing.T, d doom) {
	t.Helper()
	everybody(t, k.talk, 1)
	k.talk.Commands()
	victim := k.c.Nodes[k.rng.IntN(len(k.c.Nodes))]
	if d.at != nil && d.at.State != "" {
		victim = k.c.Nodes[k.on]
	}
	done := make(chan harness.Result, 1)
	op := k.operation()
	at := k.c.Nodes[k.on]
	how := "not reached"
	result := k.end(t, d, victim, done, func() { done <- at.Ctl(op...) })
	if !d.daemon(victim).Running() {
		how = "killed"
		k.note(d)
		time.Sleep(time.Duration(k.rng.IntN(300)) * time.Millisecond) // the length of the outage
		must(t, d.start(victim))
	}
	if result == nil {
		r := <-done
		result = &r
	}
	node, err := k.c.Settled("redis", vip, time.Minute)
	if err != nil {
		t.Fatalf("%v, in %v: %v; the command: %v", d, op, err, *result)
	}
	if k.on != node {
		k.on, k.moves = node, k.moves+1
	}
	everybody(t, k.talk, 1)
	select {
	case <-k.talk.Failed():
		t.Fatalf("%v, in %v: a client failed: %v", d, op, clients.Summary(k.talk.Stop()))
	default:
	}
	_, slowest := k.talk.Commands()
	k.slow = max(k.slow, slowest)
	t.Logf("%s: %v on %s %s in %s: exit %d, now on node %d, slowest reply %v", time.Now().Format("15:04:05.000"), d, victim.Name(), how, op[0], result.Code, node, slowest.Round(time.Millisecond))
}

// end begins the operation and waits for the planned end of a program, or until that is not to
// come any more. It gives what the operation gave, nil while it has not ended.
func (k *slaughter) end(t *testing.T, d doom, victim *harness.Node, done <-chan harness.Result, operation func()) (result *harness.Result) {
	t.Helper()
	const late = 600 * time.Millisecond // what is not reached so long behind the operation is not in it
	limit := time.Now().Add(reply)
	if d.at == nil {
		limit = time.Now().Add(time.Duration(k.rng.IntN(800)) * time.Millisecond)
	} else {
		must(t, victim.EndAt(d.program, d.at))
	}
	go operation()
	must(t, harness.Watch(2*reply, "the end of "+d.String(), func() bool {
		select {
		case r := <-done:
			result, limit = &r, time.Now().Add(late)
		default:
		}
		return !d.daemon(victim).Running() || time.Now().After(limit)
	}))
	if d.at == nil {
		d.daemon(victim).Kill()
		return result
	}
	must(t, victim.EndAt(d.program, nil))
	if result != nil && result.Code != 0 { // maybe for that end, which takes its time on a busy machine
		_ = harness.Wait(5*time.Second, "", func() bool { return !d.daemon(victim).Running() })
	}
	return result
}

// operation is what the operator does; clients that speak wake what was snapshotted.
func (k *slaughter) operation() []string {
	if len(k.c.Nodes) > 1 && k.rng.IntN(3) > 0 {
		return []string{"migrate", "redis", "--to", k.c.Nodes[1-k.on].Name()}
	}
	return []string{"snapshot", "redis"}
}

func (k *slaughter) note(d doom) {
	k.total++
	state := ""
	if d.at != nil {
		state = d.at.State
	}
	if k.kills[d.String()] == nil {
		k.kills[d.String()] = map[string]int{}
	}
	k.kills[d.String()][state]++
}

func (k *slaughter) print(t *testing.T) {
	t.Helper()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KILLED\tANY STATE\t"+strings.Join(killStates, "\t"))
	row := func(d doom) {
		n := k.kills[d.String()]
		if n == nil {
			return
		}
		fmt.Fprintf(w, "%v\t%d", d, n[""])
		for _, s := range killStates {
			fmt.Fprintf(w, "\t%d", n[s])
		}
		fmt.Fprintln(w)
	}
	for _, name := range failpoint.Filter {
		row(doom{"filter", &failpoint.Point{Name: name}})
	}
	row(doom{"filter", nil})
	for _, name := range failpoint.Agent {
		row(doom{"agent", &failpoint.Point{Name: name}})
	}
	row(doom{"agent", nil})
	_ = w.Flush()
	t.Logf("%d kills, %d clients, %d moves, slowest reply %v:\n%s", k.total, len(k.load.Clients), k.moves, k.slow.Round(time.Millisecond), b.String())
}

// watchRoute is watchCluster for an application whose moves the caller does not count, while filters
// are killed.
func watchRoute(t *testing.T, c *harness.Cluster, vip string) func() {
	t.Helper()
	capture, err := c.Net.Switch().Capture("client", "tcp")
	must(t, err)
	saveCapture(t, c.Net.Switch())
	return func() {
		t.Helper()
		packets := capture.Stop()
		must(t, capture.Err())
		check(t, wireFaultsLosing(vip, packets, reply)) // what is in the queue of a filter ends with it
	}
}
