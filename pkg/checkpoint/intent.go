package checkpoint

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// intent is what an operation is about to do, on the disk before it does it
// and gone when it has ended: state_dir/agent/APP.op.json. With the filter's
// state and the process it tells a new agent how to go on.
type intent struct {
	App    string `json:"app"`
	Op     string `json:"op"`
	BootID string `json:"boot_id"`
	// Sealed: the snapshot cannot be taken back, it is brought to its end.
	Sealed     bool   `json:"sealed,omitempty"`
	SnapshotID string `json:"snapshot_id,omitempty"`
	Force      bool   `json:"force,omitempty"`
	Discard    bool   `json:"discard,omitempty"`
	// Fresh: the start found the application unknown, so that a failure makes
	// it unknown again.
	Fresh bool `json:"fresh,omitempty"`
	// OldNode holds what is restored here.
	OldNode string `json:"old_node,omitempty"`
	// Ran: the application ran when its migration to ToNode began, and is
	// restored here where that fails.
	Ran    bool   `json:"ran,omitempty"`
	ToNode string `json:"to_node,omitempty"`
	// Temp is where the images of the snapshot are written, CRIU the number of the
	// process that writes them.
	Temp string `json:"temp,omitempty"`
	CRIU int    `json:"criu,omitempty"`
	// Images is the directory of a CRIU that somebody else has started, which began at
	// CRIUStart (proc_pid_stat(5), field 22).
	Images    string `json:"images,omitempty"`
	CRIUStart uint64 `json:"criu_start,omitempty"`
	// Back: what it restores is there, with its sockets.
	Back bool `json:"back,omitempty"`
}

// engine is what a snapshot was begun with, whatever is configured now.
func (in *intent) engine() string {
	if in.Temp != "" || in.Images != "" {
		return config.EngineCRIU
	}
	return config.EngineRestart
}

// intents keeps them.
type intents struct{ stateDir string }

func (s intents) path(app string) string {
	return filepath.Join(s.stateDir, recordsDir, app+".op.json")
}

// save writes an intent durably.
func (s intents) save(in intent) error {
	in.BootID = cmp.Or(in.BootID, bootID())
	b, err := json.Marshal(in)
	if err == nil {
		err = writePrivate(s.stateDir, filepath.Base(s.path(in.App)), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("record of the %s of %s: %w; see that %s can be written and has room", in.Op, in.App, err, s.stateDir)
	}
	return nil
}

// load reads what an earlier agent was about to do with the application; nil
// when nothing. One that cannot be read counts as none: state and process
// decide alone.
func (s intents) load(app string) (*intent, error) {
	b, err := readPrivate(s.stateDir, filepath.Base(s.path(app)))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var in intent
	if err = json.Unmarshal(b, &in); err == nil && in.App != app {
		err = fmt.Errorf("it is of application %q", in.App)
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged and is not looked at (%w)", s.path(app), err)
	}
	return &in, nil
}

func (s intents) clear(app string) error {
	if err := removePrivate(s.stateDir, filepath.Base(s.path(app))); err != nil {
		return fmt.Errorf("record %s: %w; see that %s can be written", s.path(app), err, s.stateDir)
	}
	return nil
}

// intend records what the operation is about to do.
func (a *agent) intend(op *operation, in intent) error {
	in.App, in.Op, in.Ran, in.ToNode = op.app, op.name, op.ran, op.toNode
	if err := a.saveIntent(in); err != nil {
		return fmt.Errorf("%w; nothing was done", err)
	}
	op.intended = true
	return nil
}

// intend records how far a snapshot is. What the record of an earlier agent says stays:
// what it has sealed cannot be taken back, and what wrote the images is looked at first.
func (r *snapshotRun) intend(in intent) error {
	if r.earlier == nil {
		return r.a.intend(r.op, in)
	}
	was := *r.earlier
	was.Op = cmp.Or(was.Op, r.op.name)
	was.Sealed, was.Force = was.Sealed || in.Sealed, was.Force || in.Force
	was.SnapshotID = cmp.Or(was.SnapshotID, in.SnapshotID)
	return r.a.saveIntent(was)
}

func (a *agent) saveIntent(in intent) error {
	a.o.Ends.Here(failpoint.Intent, nil)
	defer a.o.Ends.Here(failpoint.Intended, nil)
	return a.intents.save(in)
}
