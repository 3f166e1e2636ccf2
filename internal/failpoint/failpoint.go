// Package failpoint ends a process at the boundary of an effect: before or behind something
// that others can see of it, as a power failure or the kernel's want of memory might. Tests
// of crashes name the boundary in a file; without one nothing happens.
package failpoint

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Env is the environment variable that names the file for the programs.
const Env = "NFCONNFILTER_FAILPOINTS"

// Boundaries of the filter's effects.
const (
	Record    = "record"    // records are to be written
	Recorded  = "recorded"  // they are on the disk
	Untracked = "untracked" // entries of connection tracking are gone
	Sets      = "sets"      // the sets of the packet rules are to be changed
	Switched  = "switched"  // they are
	Verdicts  = "verdicts"  // verdicts are to be given, records and sets are as they say
	Judged    = "judged"    // they are given
	Send      = "send"      // packets are to be sent
	Sent      = "sent"      // they are
	Reply     = "reply"     // a request is to be answered
	Replied   = "replied"   // its answer is handed to the server of the API
	Call      = "call"      // the application is to be called back
)

// Boundaries of the agent's effects.
const (
	Intent   = "intent"   // what an operation is about to do is to be recorded
	Intended = "intended" // it is on the disk
	Ask      = "ask"      // a request is to be sent to the filter
	Asked    = "asked"    // it was answered
	Launch   = "launch"   // the application is to be started
	Launched = "launched" // its process is there
	Signal   = "signal"   // its processes are to be signalled
	Signaled = "signaled" // they were
	Address  = "address"  // an address is to be added or removed
	Moved    = "moved"    // it was
	Settled  = "settled"  // an operation has ended, its record is to be removed
)

// Filter and Agent are the boundaries of each program, in the order of their effects.
var (
	Filter = []string{Record, Recorded, Untracked, Sets, Switched, Verdicts, Judged, Send, Sent, Reply, Replied, Call}
	Agent  = []string{Intent, Intended, Ask, Asked, Launch, Launched, Signal, Signaled, Address, Moved, Settled}
)

// Point is one place and time of an end.
type Point struct {
	Name  string
	State string // of an application; "": in any
	Count int    // ends when it is reached so many times; 0: the first time
}

// String is how a file has it.
func (p Point) String() string {
	state := p.State
	if state == "" {
		state = "-"
	}
	return fmt.Sprintf("%s %s %d", p.Name, state, max(p.Count, 1))
}

// Points are those of a process; nil has none.
type Points struct {
	path string
	kill func()

	mu      sync.Mutex
	text    string // of the file when it was read last
	reached int    // since it reads so
}

// New gives the points that the file at path names, which is read at every boundary; it may come
// and go. It holds one Point. An empty path: none.
func New(path string) *Points {
	if path == "" {
		return nil
	}
	return &Points{path: path, kill: func() {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // not for long
	}}
}

// Here ends the process if the file says so. states gives those of the applications, where
// they are asked for; nil: they are not known.
func (p *Points) Here(name string, states func() []string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := os.ReadFile(p.path)
	if err != nil {
		p.text = ""
		return
	}
	if string(b) != p.text {
		p.text, p.reached = string(b), 0
	}
	at, ok := parse(p.text)
	if !ok || at.Name != name || at.State != "" && (states == nil || !slices.Contains(states(), at.State)) {
		return
	}
	if p.reached++; p.reached >= at.Count {
		p.kill()
	}
}

// parse reads one as String writes it.
func parse(text string) (p Point, ok bool) {
	f := strings.Fields(text)
	if len(f) != 3 {
		return p, false
	}
	n, err := strconv.Atoi(f[2])
	if f[1] == "-" {
		f[1] = ""
	}
	return Point{Name: f[0], State: f[1], Count: n}, err == nil
}
