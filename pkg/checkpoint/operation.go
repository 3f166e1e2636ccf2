package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
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
	sealed bool   // no way back: abort is refused
	fail   string // phase at which the process is to be killed
	held   string // file that names the phase at which to wait; "": nowhere

	intended bool   // there is a record of it
	handedOn bool   // to an operation that is begun anew: its record stays
	quiet    bool   // not worth a line in the log
	left     bool   // it could not be taken back: its record stays, and it is looked at again
	ran      bool   // of a migration: the application ran when it began
	toNode   string // of a migration
	result   error
	phases   []phase
	detail   string
	waited   time.Duration // for a filter that was not there
}

type phase struct {
	name     string
	started  time.Time
	inFilter time.Duration // of it, waiting for answers of the filter
}

type operationKey struct{}

// underWay tells whether the operation has changed anything yet: its first
// phase only looks.
func (o *operation) underWay() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.phases) > 1
}

// outage adds d to the time that the operation has waited for the filter, and
// returns the sum.
func (o *operation) outage(d time.Duration) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waited += d
	return o.waited
}

// enter begins the next phase.
func (o *operation) enter(name string) {
	defer o.hold(name) // whoever asks sees the phase meanwhile
	o.mu.Lock()
	defer o.mu.Unlock()
	o.phases = append(o.phases, phase{name: name, started: time.Now()})
	o.detail = ""
	if o.fail == name {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // not for long
	}
}

// hold waits while a line of the file of Options.Holdpoint names this phase. An abort ends
// that, unless the operation was aborted before: the phase undoes it then.
func (o *operation) hold(name string) {
	if o.held == "" {
		return
	}
	ctx := o.ctx
	if ctx.Err() != nil {
		ctx = context.WithoutCancel(ctx)
	}
	_ = poll(ctx, time.Millisecond, 2*time.Millisecond, func() (bool, error) {
		b, err := os.ReadFile(o.held)
		return err != nil || !slices.Contains(strings.Split(string(b), "\n"), o.name+"/"+name), nil
	})
}

// why replaces an error by the reason for which the operation was ended, where
// it is nothing but its consequence.
func (o *operation) why(err error) error {
	if o.ctx.Err() != nil && (errors.Is(err, context.Canceled) || connect.CodeOf(err) == connect.CodeCanceled) {
		return context.Cause(o.ctx)
	}
	return err
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

// takeBack says that what was to be the point of no return was refused.
func (o *operation) takeBack() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sealed = false
}

// inFilter adds the time of a request to the filter to the phase under way.
func (o *operation) inFilter(d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.phases); n > 0 {
		o.phases[n-1].inFilter += d
	}
}

// took gives how long each phase took until now; repeated ones are added up.
func (o *operation) took() []*pb.Phase {
	o.mu.Lock()
	defer o.mu.Unlock()
	const ms = float64(time.Millisecond)
	end := time.Now()
	var out []*pb.Phase
	for i, p := range o.phases {
		until := end
		if i+1 < len(o.phases) {
			until = o.phases[i+1].started
		}
		at := slices.IndexFunc(out, func(x *pb.Phase) bool { return x.Name == p.name })
		if at < 0 {
			at = len(out)
			out = append(out, &pb.Phase{Name: p.name})
		}
		out[at].Ms += float64(until.Sub(p.started)) / ms
		out[at].FilterMs += float64(p.inFilter) / ms
	}
	return out
}

// times gives "phase=1.2ms ..." for the log.
func (o *operation) times() slog.Attr {
	var attrs []any
	for _, p := range o.took() {
		d := time.Duration(p.Ms * float64(time.Millisecond))
		attrs = append(attrs, slog.String(strings.ReplaceAll(p.Name, " ", "-"), d.Round(time.Microsecond).String()))
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
	o := &operation{app: app, name: name, started: time.Now(), held: a.o.Holdpoint}
	o.ctx, o.cancel = context.WithCancelCause(context.WithValue(ctx, operationKey{}, o))
	o.unhook = context.AfterFunc(a.root, func() { o.cancel(errStopping) })
	if n, p, _ := strings.Cut(a.o.Failpoint, "/"); n == name {
		o.fail = p
	}
	a.ops[app] = o
	a.wg.Add(1)
	return o, nil
}

// finish ends an operation, logs how long each phase took, and starts the
// restore that was asked for meanwhile.
func (a *agent) finish(o *operation, err error) {
	now := time.Now()
	attrs := []any{"app", o.app, "took", now.Sub(o.started).Round(time.Microsecond).String(), o.times()}
	switch {
	case err != nil:
		a.log.Warn(o.name+" failed", append(attrs, "err", err)...)
	case !o.quiet:
		a.log.Info(o.name+" done", attrs...)
	}
	// What could neither be ended nor taken back is known to whoever tries next.
	ended := err == nil && (o.intended || o.name == opRecover || o.name == opAbort || o.name == opStart)
	undone := err != nil && o.intended && !o.sealed && o.name != opRecover
	if (ended || undone) && !o.handedOn && !o.left {
		a.o.Ends.Here(failpoint.Settled, nil)
		if err := a.intents.clear(o.app); err != nil {
			a.log.Error("the record of an operation stays", "app", o.app, "err", err)
		}
	}
	o.unhook()
	o.cancel(nil)
	a.mu.Lock()
	o.result = err
	delete(a.ops, o.app)
	if err == nil && !o.quiet { // it stands elsewhere now
		delete(a.awaited, o.app)
	}
	wanted := a.wanted[o.app] && a.root.Err() == nil
	delete(a.wanted, o.app)
	a.mu.Unlock()
	if wanted && o.name != opRestore && (o.name != opMigrate || err != nil) { // a migrated one is not here any more
		a.restoreSoon(o.app)
	}
	if o.left {
		a.recoverLater(o.app)
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
	if sealed || o.name == opStop || o.name == opRecover {
		return true, control.Error(connect.CodeFailedPrecondition, app, "",
			fmt.Sprintf("abort of %s: %s is in phase %q and cannot be taken back any more", app, o.name, phase))
	}
	o.cancel(errAborted)
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.ops[app] != o, nil
	})
	switch {
	case err != nil:
	case o.result == nil:
		err = control.Error(connect.CodeFailedPrecondition, app, "", fmt.Sprintf("abort of %s: it was too late, %s has ended well", app, o.name))
	case o.left:
		err = control.Error(connect.CodeFailedPrecondition, app, control.Info(o.result).GetState(), fmt.Sprintf("abort of %s: %v; it is tried again", app, o.result))
	}
	return true, err
}

// forward says that from here the operation only goes forward; its record
// stays until it has ended.
func (o *operation) forward() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sealed = true
}

// sleepless contexts: what undoes or finishes an operation must not end with
// its caller.
func (o *operation) cleanup() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(o.ctx), cleanupTimeout)
}

// cleanupTimeout bounds each request that undoes or ends an operation.
const cleanupTimeout = 30 * time.Second
