package scheduler

import "time"

// Back-off of snapshots by idle time that were refused or failed.
const (
	SleepFirst = 10 * time.Second
	SleepMost  = 10 * time.Minute
)

// Sleepy tells whether an application that runs has been without payload for
// long enough that it is to hibernate: after is its [hibernate] after, 0 never.
// The agent of a node without a scheduler decides by it too.
func Sleepy(st AppStatus, after time.Duration) bool {
	return after > 0 && st.running() && st.Operation == "" && !st.RestoreRequested && st.Idle >= after
}

// hibernate decides whether an application goes to sleep now.
func (s *Scheduler) hibernate(now time.Time, name string, a *app) *Action {
	if !a.asked.IsZero() || !a.sleep.Due(now) {
		return nil
	}
	after := s.cfg.Apps[name].HibernateAfter
	for _, p := range s.places(name, a) {
		if p.fresh && Sleepy(p.AppStatus, after) {
			return &Action{Kind: Snapshot, App: name, Node: p.name, Reason: "no payload for " + p.Idle.Round(time.Millisecond).String()}
		}
	}
	return nil
}
