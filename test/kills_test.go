package test

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

var (
	killsFlag    = flag.Int("kills", 3, "how many times TestKills ends a filter or an agent in each of its settings")
	killSeedFlag = flag.Uint64("kill-seed", 1, "where TestKills begins in its list of points, and its random times")
	everyFlag    = flag.Bool("every", false, "TestKills goes on until all of its list was tried, and fails where a boundary and a state that come together were not met")
)

// killStates are those in which a filter is killed; "": in any.
var killStates = []string{"CONNECTED", "SNAPSHOTSTART", "SNAPSHOTFREEZE", "SNAPSHOTDONE", "RESTORESTART", "RESTORED"}

// doom is one end of a program that a test has planned.
type doom struct {
	program string
	at      *failpoint.Point // nil: at a random time
	both    bool             // the other program of the node ends with it
	tries   int              // that did not meet the point
}

// tries is how often a point is tried that is not met, with another operation or on the other node.
const tries = 4

// together are the boundaries of the filter's effects and the states of an application, as they were
// before the step of an effect, that come together. Others are tried too: they are not to be met.
// A snapshot is begun, which changes the sets, in CONNECTED or RESTORED; restores begin in SNAPSHOTDONE,
// and with them the call for one and the removal of tracked connections; nothing is sent or recorded of
// an application that runs.
var together = map[string][]string{
	failpoint.Record:    killStates[1:5],
	failpoint.Recorded:  killStates[1:5],
	failpoint.Untracked: {"SNAPSHOTDONE"},
	failpoint.Sets:      {"CONNECTED", "SNAPSHOTSTART", "RESTORESTART", "RESTORED"},
	failpoint.Switched:  {"CONNECTED", "SNAPSHOTSTART", "RESTORESTART", "RESTORED"},
	failpoint.Verdicts:  killStates,
	failpoint.Judged:    killStates,
	failpoint.Send:      killStates[2:5],
	failpoint.Sent:      killStates[2:5],
	failpoint.Reply:     killStates,
	failpoint.Replied:   killStates,
	failpoint.Call:      {"SNAPSHOTDONE"},
}

// setting is what kills happen in.
type setting struct {
	name     string
	nodes    int
	criu     bool
	tracking string // of connections, with this tcp_loose; empty: none
	first    string // what begins the first snapshot, before which alone an application is CONNECTED
}

var settings = []setting{
	{"restart, one node", 1, false, "", failpoint.Sets},
	{"restart, two nodes, tracking", 2, false, "1", failpoint.Switched},
	{"criu, one node, tracking", 1, true, "0", failpoint.Sets},
	{"criu, two nodes", 2, true, "", failpoint.Switched},
}

// meets tells whether an end comes in a setting.
func (s setting) meets(d doom) bool {
	if d.at == nil {
		return true
	}
	switch d.at.Name {
	case failpoint.Untracked:
		if s.criu || s.tracking == "" { // what is in an image keeps its entry
			return false
		}
	case failpoint.Sets, failpoint.Switched:
		if d.at.State == "CONNECTED" {
			return d.at.Name == s.first
		}
	case failpoint.Address, failpoint.Moved:
		return s.nodes > 1
	case failpoint.Launch, failpoint.Launched:
		return !s.criu
	}
	return d.program == "agent" || slices.Contains(together[d.at.Name], d.at.State)
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

// state is that of an application in which it comes; "": in any.
func (d doom) state() string {
	if d.at == nil {
		return ""
	}
	return d.at.State
}

// other is the other program.
func (d doom) other() doom {
	if d.program == "filter" {
		return doom{program: "agent"}
	}
	return doom{program: "filter"}
}

func (d doom) String() string {
	if d.both {
		return "both at any time"
	}
	if d.at == nil {
		return d.program + " at any time"
	}
	return d.program + " " + d.at.Name
}

// dooms are all ends: the filter at each boundary in each state, the agent at each boundary the
// first and the following times, and both at any time, also together; in an order that rng makes.
// Those of CONNECTED come first, and the one that begins a snapshot behind them.
func (s setting) dooms(rng *rand.Rand, connected bool) (out []doom) {
	var first []doom
	for _, name := range failpoint.Filter {
		for _, state := range killStates {
			d := doom{program: "filter", at: &failpoint.Point{Name: name, State: state, Count: 1 + rng.IntN(3)}}
			if state != "CONNECTED" {
				out = append(out, d)
			} else if connected && name != s.first {
				first = append(first, d)
			}
		}
	}
	if connected {
		first = append(first, doom{program: "filter", at: &failpoint.Point{Name: s.first, State: "CONNECTED"}})
	}
	for _, name := range failpoint.Agent {
		times := 3
		switch name {
		case failpoint.Ask, failpoint.Asked, failpoint.Intent, failpoint.Intended: // in each phase of an operation
			times = 10
		}
		for n := range times {
			out = append(out, doom{program: "agent", at: &failpoint.Point{Name: name, Count: n + 1}})
		}
	}
	for i := range 12 {
		out = append(out, doom{program: "filter", both: i%3 == 0}, doom{program: "agent", both: i%3 == 1})
	}
	rng.Shuffle(len(out), func(i, k int) { out[i], out[k] = out[k], out[i] })
	return append(first, out...)
}

// captured is how many kills a capture holds: packets are kept in memory.
const captured = 10

// slaughter is a cluster in which programs are ended again and again.
type slaughter struct {
	setting
	c     *harness.Cluster
	load  *clients.Load
	talk  *clients.Talk
	rng   *rand.Rand
	on    int // node that has the application
	met   kills
	total int
	moves int // of the application, seen so far
	slow  time.Duration
}

// kills are their numbers by program and boundary, and by state.
type kills map[string]map[string]int

func (k kills) add(d doom) {
	what := d.String()
	if k[what] == nil {
		k[what] = map[string]int{}
	}
	k[what][d.state()]++
}

// TestKills ends filter and agent with SIGKILL, at the boundaries of their effects and at any
// time, while 100 clients speak all the time with an application that is snapshotted, restored
// and, with two nodes, migrated; with both engines. No connection is lost, and every reply is
// right to the octet. make test-crash does it some hundred times, at every boundary in every state.
func TestKills(t *testing.T) {
	for i, s := range settings {
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
			c := newCluster(t, o)
			if s.tracking != "" {
				for _, n := range c.Nodes {
					tracked(t, n.Net.Node(), s.tracking)
				}
			}
			must(t, c.Up())
			k := &slaughter{setting: s, c: c, load: clusterClients(t, c, 100), rng: rand.New(rand.NewPCG(*killSeedFlag, uint64(i))), met: kills{}}
			k.run(t, *killsFlag)
		})
	}
}

// tracked has a namespace track connections and drop what does not fit. loose is tcp_loose: "0" takes
// up none in its middle.
func tracked(t *testing.T, ns *testnet.NS, loose string) {
	t.Helper()
	out, err := ns.Command("sh", "-ec", "for c in INPUT OUTPUT; do "+iptables()+" -A $c -m conntrack --ctstate INVALID -j DROP; done").CombinedOutput()
	if err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	must(t, ns.Sysctl("net/netfilter/nf_conntrack_tcp_loose", loose))
}

func (k *slaughter) run(t *testing.T, kills int) {
	t.Helper()
	watched := watchRoute(t, k.c, vip)
	rounds(t, k.load, 1) // the capture knows all numbers from here on
	talk, stop := talk(t, k.load, 20*time.Millisecond)
	k.talk = talk
	defer k.print(t)
	list, all := k.dooms(k.rng, *everyFlag), *everyFlag
	for k.total < kills || all {
		if len(list) == 0 {
			list, all = k.dooms(k.rng, false), false
			continue
		}
		d, before := list[0], k.total
		list = list[1:]
		if k.one(t, d); k.total == before && k.meets(d) && d.tries+1 < tries {
			d.tries++
			d.at = &failpoint.Point{Name: d.at.Name, State: d.at.State, Count: 1}
			if d.state() == "CONNECTED" {
				list = slices.Insert(list, 0, d)
			} else {
				list = append(list, d)
			}
		}
		if k.total > before && k.total%captured == 0 {
			watched()
			watched = watchRoute(t, k.c, vip)
		}
	}
	everybody(t, talk, 2)
	must(t, stop())
	noRecords(t, k.c)
	watched()
	if *everyFlag {
		k.complete(t)
	}
}

// one has the application leave and come back, and a program end on the way.
func (k *slaughter) one(t *testing.T, d doom) {
	t.Helper()
	everybody(t, k.talk, 1)
	k.talk.Commands()
	op, name, on := k.operation(d)
	victim := k.c.Nodes[on]
	done := make(chan harness.Result, 1)
	how := "not met"
	result := k.end(t, d, victim, done, func() { done <- op() })
	if !d.daemon(victim).Running() {
		how = "killed"
		if d.both {
			how = "killed with the other one"
			d.other().daemon(victim).Kill()
		}
		k.total++
		k.met.add(d)
		time.Sleep(time.Duration(k.rng.IntN(300)) * time.Millisecond) // the length of the outage
		must(t, d.start(victim))
		if d.both {
			must(t, d.other().start(victim))
		}
	}
	if result == nil {
		r := <-done
		result = &r
	}
	if name == "visit" && result.Code != 0 {
		t.Fatalf("%v: a client that came failed: %v", d, result.Stderr)
	}
	node, err := k.c.Settled("redis", vip, time.Minute)
	if err != nil {
		t.Fatalf("%v, in %v: %v; the command: %v", d, name, err, *result)
	}
	if k.on != node {
		k.on, k.moves = node, k.moves+1
	}
	everybody(t, k.talk, 1)
	select {
	case <-k.talk.Failed():
		t.Fatalf("%v, in %v: a client failed: %v", d, name, clients.Summary(k.talk.Stop()))
	default:
	}
	_, slowest := k.talk.Commands()
	k.slow = max(k.slow, slowest)
	t.Logf("%s: %v on %s %s in %s: exit %d, now on node %d, slowest reply %v", time.Now().Format("15:04:05.000"), d, victim.Name(), how, name, result.Code, node, slowest.Round(time.Millisecond))
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

// operation is what happens while a program is to end, and on which node that is: the operator does
// something, and clients that speak wake what was snapshotted. While an application is CONNECTED a
// client comes and goes.
func (k *slaughter) operation(d doom) (op func() harness.Result, name string, on int) {
	if d.state() == "CONNECTED" && d.at.Name != k.first {
		return k.visit, "visit", k.on
	}
	on = k.rng.IntN(len(k.c.Nodes))
	migrate := k.rng.IntN(3) > 0
	if d.state() != "" {
		on = k.on
		switch d.tries {
		case 1:
			on, migrate = 1-k.on, true
		case 2:
			migrate = false
		case 3:
			migrate = true
		}
	}
	command := []string{"snapshot", "redis"}
	if len(k.c.Nodes) == 1 {
		on, migrate = 0, false
	}
	at := k.c.Nodes[k.on]
	if migrate {
		command = []string{"migrate", "redis", "--to", k.c.Nodes[1-k.on].Name()}
	}
	return func() harness.Result { return at.Ctl(command...) }, command[0], on
}

// visit is a client that comes, speaks and goes, and an operator who asks how things are.
func (k *slaughter) visit() harness.Result {
	r, err := clients.DialRedis(k.c.Dial, at(6379), nextClient, clients.KeepAlive{})
	nextClient++
	if err == nil {
		err = errors.Join(r.Command(reply), r.Close())
	}
	if err != nil {
		return harness.Result{Code: 1, Stderr: err.Error()}
	}
	_ = k.c.Nodes[k.on].Ctl("status", "redis") // the filter may end before it answers
	return harness.Result{}
}

func (k *slaughter) print(t *testing.T) {
	t.Helper()
	t.Logf("%d kills, %d clients, %d moves, slowest reply %v:%s", k.total, len(k.load.Clients), k.moves, k.slow.Round(time.Millisecond), k.met)
}

// String is a table.
func (k kills) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nKILLED\tANY STATE\t"+strings.Join(killStates, "\t"))
	row := func(d doom) {
		n := k[d.String()]
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
		row(doom{program: "filter", at: &failpoint.Point{Name: name}})
	}
	row(doom{program: "filter"})
	for _, name := range failpoint.Agent {
		row(doom{program: "agent", at: &failpoint.Point{Name: name}})
	}
	row(doom{program: "agent"})
	row(doom{program: "filter", both: true})
	_ = w.Flush()
	return b.String()
}

// complete fails the test for what was not met and should have been, and the other way round.
func (k *slaughter) complete(t *testing.T) {
	t.Helper()
	for _, d := range k.dooms(rand.New(rand.NewPCG(0, 0)), true) {
		if met := k.met[d.String()][d.state()] > 0; met != k.meets(d) {
			t.Errorf("%v in state %q: met is %v, it is %v that they come together", d, d.state(), met, !met)
		}
	}
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
