package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

var (
	errAborted  = errors.New("aborted by request")
	errStopping = errors.New("the agent is being stopped")
)

// operation is one thing being done to an application; at most one at a time.
type operation struct {
	app, name string
	// ctx ends when the caller goes away, when the operation is aborted and
	// when the agent is stopped.
	ctx     context.Context
	cancel  context.CancelCauseFunc
	unhook  func() bool
	started time.Time

	mu     sync.Mutex
	sealed bool // no way back: abort is refused
	phases []phase
	detail string
}

type phase struct {
	name    string
	started time.Time
}

// enter begins the next phase.
func (o *operation) enter(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.phases = append(o.phases, phase{name, time.Now()})
	o.detail = ""
}

// note sets what a terminal shows beside the phase.
func (o *operation) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.detail = fmt.Sprintf(format, args...)
}

func (o *operation) state() (phase, detail string, sealed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.phases); n > 0 {
		phase = o.phases[n-1].name
	}
	return phase, o.detail, o.sealed
}

// commit says that from here the operation cannot be taken back, unless it was
// cancelled already.
func (o *operation) commit() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ctx.Err() != nil {
		return context.Cause(o.ctx)
	}
	o.sealed = true
	return nil
}

// times gives "phase=1.2ms ..." for the log; repeated phases are added up.
func (o *operation) times(end time.Time) slog.Attr {
	o.mu.Lock()
	defer o.mu.Unlock()
	var order []string
	sum := map[string]time.Duration{}
	for i, p := range o.phases {
		until := end
		if i+1 < len(o.phases) {
			until = o.phases[i+1].started
		}
		if _, ok := sum[p.name]; !ok {
			order = append(order, p.name)
		}
		sum[p.name] += until.Sub(p.started)
	}
	attrs := make([]any, 0, len(order))
	for _, name := range order {
		attrs = append(attrs, slog.String(strings.ReplaceAll(name, " ", "-"), sum[name].Round(time.Microsecond).String()))
	}
	return slog.Group("phases", attrs...)
}

// begin makes an operation the application's only one.
func (a *agent) begin(ctx context.Context, app, name string) (*operation, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.root.Err() != nil {
		return nil, control.Error(connect.CodeUnavailable, app, "", errStopping.Error())
	}
	if other := a.ops[app]; other != nil {
		return nil, control.Error(connect.CodeFailedPrecondition, app, "",
			fmt.Sprintf("%s of %s: %s is under way since %s; wait for it or abort it",
				name, app, other.name, time.Since(other.started).Round(time.Millisecond)))
	}
	o := &operation{app: app, name: name, started: time.Now()}
	o.ctx, o.cancel = context.WithCancelCause(ctx)
	o.unhook = context.AfterFunc(a.root, func() { o.cancel(errStopping) })
	a.ops[app] = o
	a.wg.Add(1)
	return o, nil
}

// finish ends an operation, logs how long each phase took, and starts the
// restore that was asked for meanwhile.
func (a *agent) finish(o *operation, err error) {
	now := time.Now()
	attrs := []any{"app", o.app, "took", now.Sub(o.started).Round(time.Microsecond).String(), o.times(now)}
	if err != nil {
		a.log.Warn(o.name+" failed", append(attrs, "err", err)...)
	} else {
		a.log.Info(o.name+" done", attrs...)
	}
	o.unhook()
	o.cancel(nil)
	a.mu.Lock()
	delete(a.ops, o.app)
	wanted := a.wanted[o.app] && a.root.Err() == nil
	delete(a.wanted, o.app)
	a.mu.Unlock()
	if wanted && o.name != opRestore {
		a.restoreSoon(o.app)
	}
	a.wg.Done()
}

// abortRunning cancels the operation under way and waits until it is undone;
// false when there is none.
func (a *agent) abortRunning(ctx context.Context, app string) (bool, error) {
	a.mu.Lock()
	o := a.ops[app]
	a.mu.Unlock()
	if o == nil {
		return false, nil
	}
	phase, _, sealed := o.state()
	if sealed || o.name == opStop {
		return true, control.Error(connect.CodeFailedPrecondition, app, "",
			fmt.Sprintf("abort of %s: %s is in phase %q and cannot be taken back any more", app, o.name, phase))
	}
	o.cancel(errAborted)
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.ops[app] != o, nil
	})
	return true, err
}

// sleepless contexts: what undoes or finishes an operation must not end with
// its caller.
func (o *operation) cleanup() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(o.ctx), cleanupTimeout)
}

// cleanupTimeout bounds each request that undoes or ends an operation.
const cleanupTimeout = 30 * time.Second
