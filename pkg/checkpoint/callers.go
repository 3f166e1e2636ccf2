package checkpoint

import (
	"context"
	"fmt"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// Snapshots whose images somebody else had CRIU write: only he can restore them.

// callersImages tells why the agent cannot restore a snapshot; nil where it may try.
func (a *agent) callersImages(app, id string) error {
	m, err := a.store.callersOf(app, id)
	if err != nil || m == nil { // a damaged one is told of where it is read
		return nil
	}
	return fmt.Errorf("the images of its snapshot %s were written by CRIU to %s on node %s; restore it with criu restore --action-script (ckptctl criu-action --help)", id, m.Images, m.Node)
}

// awaitsCaller tells, where an application is held, why it is the caller who brings it
// back; nil where the agent may try.
func (a *agent) awaitsCaller(ctx context.Context, app string) error {
	st, err := a.status(ctx, app)
	if err != nil || st.State != control.StateSnapshotDone {
		return nil
	}
	return a.callersImages(app, st.SnapshotId)
}

// sayAwaited notes a request that only the caller can fulfil, once in the log.
func (a *agent) sayAwaited(app string, why error) {
	a.mu.Lock()
	fresh := a.awaited[app] != why.Error()
	a.awaited[app] = why.Error()
	a.mu.Unlock()
	if fresh {
		a.log.Warn("a client waits for an application that the agent cannot restore", "app", app, "err", why)
	}
}
