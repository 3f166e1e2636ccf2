package checkpoint

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Everything that the agent waits for is measured by the monotonic clock, and
// processes are told apart by the boot's. Only ages in the store are by the wall
// clock, which somebody may set: what is removed for its age does not come back.

const (
	// clockJump is by how much the wall clock must move against the boot's to have been set.
	clockJump = time.Minute
	// clockTrust is how long it must run on then until it is believed.
	clockTrust = 24 * time.Hour
)

// wallClock tells whether the wall clock can be trusted with ages.
type wallClock struct {
	mu     sync.Mutex
	begun  bool
	offset time.Duration // to CLOCK_BOOTTIME
	set    bool
	setAt  time.Duration // CLOCK_BOOTTIME
}

// steady tells whether the clock has not been set since it was looked at first, or
// not for long; boot is CLOCK_BOOTTIME.
func (c *wallClock) steady(wall time.Time, boot time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	offset := time.Duration(wall.UnixNano()) - boot
	if c.begun && (offset-c.offset).Abs() > clockJump {
		c.set, c.setAt = true, boot
	}
	c.begun, c.offset = true, offset
	if c.set && boot-c.setAt >= clockTrust {
		c.set = false
	}
	return !c.set
}

// now is the time for ages, zero while there is none to trust.
func (c *wallClock) now() time.Time {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	wall := time.Now()
	if !c.steady(wall, time.Duration(ts.Nano())) {
		return time.Time{}
	}
	return wall
}

// prune removes what the store need not keep any more beside the application's
// current snapshot.
func (a *agent) prune(app, current string) {
	cfg, now := a.config(), a.clock.now()
	if now.IsZero() && cfg.Cluster.Snapshots.MaxAge > 0 {
		a.log.Warn("the clock was set; snapshots are not removed for their age until it has run on for a while", "app", app, "while", clockTrust)
	}
	if err := a.store.prune(app, current, cfg.Node.Name, cfg.Cluster.Snapshots, now); err != nil {
		a.log.Warn("old snapshots stay", "app", app, "err", err)
	}
}
