package checkpoint

import (
	"sync"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/scheduler"
)

// sleeps spaces the snapshots by idle time, by application.
type sleeps map[string]*sleep

type sleep struct {
	mu    sync.Mutex
	under bool // one is being taken
	scheduler.Backoff
}

// sleepIfDue takes a snapshot of an application that has been idle for long
// enough, in the background: what the scheduler does where there is one.
func (a *agent) sleepIfDue(s sleeps, app *config.App, p *pb.AppStatus) {
	b := s[app.Name]
	if b == nil {
		b = &sleep{}
		s[app.Name] = b
	}
	state, known := appstate.ParseApp(p.State)
	idle := a.idle.idleMs(p)
	st := scheduler.AppStatus{State: state, RestoreRequested: p.RestoreRequested, Idle: time.Duration(idle) * time.Millisecond}
	b.mu.Lock()
	due := !b.under && known && idle >= 0 && b.Due(time.Now()) && scheduler.Sleepy(st, app.Hibernate.After.Std())
	b.under = b.under || due
	b.mu.Unlock()
	if !due {
		return
	}
	a.log.Info("snapshot by idle time", "app", app.Name, "idle", st.Idle)
	a.wg.Go(func() {
		_, err := a.snapshot(a.root, &pb.AgentSnapshotRequest{App: app.Name})
		b.mu.Lock()
		defer b.mu.Unlock()
		b.under = false
		if err != nil { // the operation has logged why
			b.Failed(time.Now(), scheduler.SleepFirst, scheduler.SleepMost)
			return
		}
		b.Worked()
	})
}
