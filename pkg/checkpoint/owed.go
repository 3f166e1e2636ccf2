package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// owed keeps which nodes an application was taken over from that still swallow
// its segments (BLOCKDATA) and have to be told when it is here for good:
// state_dir/agent/APP@old.json. It is written before the first of them is asked
// for anything, so that no crash leaves one waiting for ever.
type owed struct {
	stateDir string
	mu       *sync.Mutex // reading and writing go together
}

const owedSuffix = "@old.json"

type owedRecord struct {
	App   string   `json:"app"`
	Nodes []string `json:"nodes"`
}

func (o owed) name(app string) string { return app + owedSuffix }

// nodes lists them; none where the record is missing.
func (o owed) nodes(app string) ([]string, error) {
	b, err := readPrivate(o.stateDir, o.name(app))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var r owedRecord
	if err = json.Unmarshal(b, &r); err == nil && r.App != app {
		err = fmt.Errorf("it is of application %q", r.App)
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged and is not looked at (%w); release the application on the node that it came from", o.path(app), err)
	}
	return r.Nodes, nil
}

func (o owed) path(app string) string { return filepath.Join(o.stateDir, recordsDir, o.name(app)) }

// add puts a node on the list. What cannot be read is written anew: it keeps no
// application from moving.
func (o owed) add(app, node string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	list, err := o.nodes(app)
	if err == nil && slices.Contains(list, node) {
		return nil
	}
	return o.save(app, append(list, node))
}

// drop takes it off again.
func (o owed) drop(app, node string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	list, err := o.nodes(app)
	if err != nil || !slices.Contains(list, node) {
		return nil // it is not on a list that can be read
	}
	return o.save(app, slices.DeleteFunc(list, func(n string) bool { return n == node }))
}

func (o owed) save(app string, list []string) error {
	if len(list) == 0 {
		return removePrivate(o.stateDir, o.name(app))
	}
	b, err := json.Marshal(owedRecord{app, list})
	if err == nil {
		err = writePrivate(o.stateDir, o.name(app), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("record of the old node of %s: %w", app, err)
	}
	return nil
}

// apps lists the applications with an old node.
func (o owed) apps() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(o.stateDir, recordsDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		if app, ok := strings.CutSuffix(e.Name(), owedSuffix); ok {
			out = append(out, app)
		}
	}
	return out, err
}
