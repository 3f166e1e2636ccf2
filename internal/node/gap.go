package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// Gap is for how long nobody answered for what is held and translated before
// this filter did.
type Gap struct {
	Known bool
	Time  time.Duration
	// AtMost: the filter before was killed, somewhere within Time.
	AtMost bool
}

func (g Gap) String() string {
	t := g.Time.Round(time.Millisecond)
	switch {
	case !g.Known:
		return "it is not known for how long the queue was without a filter"
	case g.AtMost:
		return fmt.Sprintf("the queue was without a filter for at most %v", t)
	}
	return fmt.Sprintf("the queue was without a filter for %v", t)
}

// signEvery is the time between two signs of life: a filter that is killed
// leaves the last one behind.
const signEvery = time.Second

// standstill is from when on a sign of life that is late is worth a word: remotes
// with the strictest keepalive have given up by then.
const standstill = 3 * time.Second

// signs are a filter's signs of life in state_dir/alive, one line: the boot, the
// time (CLOCK_BOOTTIME, which nobody sets), and whether it is the last word.
// They are overwritten in place and never synced: that works on a full disk too,
// and after a reboot they mean nothing.
type signs struct {
	boot string

	mu   sync.Mutex
	f    *os.File // nil: none can be left
	over bool

	before string // what the filter before left
}

// signFormat has a fixed length.
const signFormat = "%-40.40s %20d %-7s\n"

func openSigns(dir, boot string) (*signs, error) {
	s := &signs{boot: boot}
	f, err := os.OpenFile(filepath.Join(dir, "alive"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return s, err
	}
	s.f = f
	b := make([]byte, 256)
	k, _ := f.ReadAt(b, 0)
	s.before = string(b[:k])
	return s, nil
}

// gap reads what the filter before left, at the time at.
func (s *signs) gap(at filter.Time) Gap {
	f := strings.Fields(s.before)
	if len(f) != 3 || f[0] != s.boot {
		return Gap{}
	}
	then, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil || then > at {
		return Gap{}
	}
	return Gap{Known: true, Time: time.Duration(at - then), AtMost: f[2] != "stopped"}
}

// sign leaves a sign of life, or the last one.
func (s *signs) sign(at filter.Time, last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil || s.over {
		return
	}
	word := "alive"
	if last {
		s.over, word = true, "stopped"
	}
	// One that is not written makes the next gap look longer, and no worse.
	_, _ = s.f.WriteAt(fmt.Appendf(nil, signFormat, s.boot, at, word), 0)
}

func (s *signs) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f != nil {
		_ = s.f.Close()
		s.f = nil
	}
}

// bootID is another one after each boot of the machine.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Ready measures for how long the queue was without a filter. It is called when
// everything is open, right before Run, which gives verdicts on what waits.
func (n *Node) Ready() Gap {
	at := now()
	g := n.signs.gap(at)
	n.gap.Store(&g)
	n.signs.sign(at, false)
	return g
}

// signLife leaves signs of life until ctx ends.
func (n *Node) signLife(ctx context.Context) {
	tick := time.NewTicker(signEvery)
	defer tick.Stop()
	lost := uint64(0)
	for last := now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		at := now()
		if still := time.Duration(at - last); still > standstill {
			n.log.Warn("the filter stood still, or the machine did; what came meanwhile is answered now", "for", still.Round(time.Millisecond))
		}
		last = at
		n.signs.sign(at, false)
		lost = n.tellLost(lost)
	}
}

// tellLost says how many packets the queue has lost since before, when it had lost
// that many, and returns how many by now.
func (n *Node) tellLost(before uint64) uint64 {
	st := n.queue.Stats()
	lost := st.Overruns + st.QueueFull
	if lost > before {
		n.log.Warn("packets came faster than they were filtered, and some were dropped; their senders repeat them", "packets", lost-before)
	}
	return lost
}
