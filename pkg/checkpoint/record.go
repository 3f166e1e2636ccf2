package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// record is what a restarted agent needs to find an application's processes
// again: state_dir/agent/APP.json.
type record struct {
	App        string `json:"app"`
	PID        int    `json:"pid"`
	StartTime  uint64 `json:"start_time"` // clock ticks since boot, proc_pid_stat(5) field 22
	BootID     string `json:"boot_id"`
	Cgroup     string `json:"cgroup,omitempty"`
	OwnSession bool   `json:"own_session"`
	OwnGroup   bool   `json:"own_group"`
	Adopted    bool   `json:"adopted"`
	// Mark is in the environment of the processes; with PID 0 nothing else is
	// known of them yet.
	Mark string `json:"mark,omitempty"`
}

func (r record) tree() tree {
	return tree{pid: r.PID, start: r.StartTime, session: r.OwnSession, group: r.OwnGroup}
}

// bootID tells this boot from every other: process numbers and start times
// mean nothing in the next.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

func recordPath(stateDir, app string) string {
	return filepath.Join(stateDir, recordsDir, app+".json")
}

// loadRecord reads an application's record; nil when there is none of this
// boot.
func loadRecord(stateDir, app string) (*record, error) {
	path := recordPath(stateDir, app)
	b, err := readPrivate(stateDir, filepath.Base(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w); remove it once the application's process is known to be gone", path, err)
	}
	if r.App != app || r.PID <= 1 && (r.PID != 0 || r.Mark == "") {
		return nil, fmt.Errorf("%s is not a record of %s; remove it once the application's process is known to be gone", path, app)
	}
	if r.BootID != bootID() {
		return nil, nil
	}
	return &r, nil
}

func saveRecord(stateDir string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writePrivate(stateDir, filepath.Base(recordPath(stateDir, r.App)), append(b, '\n'))
}

func removeRecord(stateDir, app string) error {
	return removePrivate(stateDir, filepath.Base(recordPath(stateDir, app)))
}
