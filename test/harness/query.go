package harness

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// AppStatus is an application in `ckptctl status -o json`.
type AppStatus struct {
	Name             string         `json:"name"`
	State            string         `json:"state"`
	SnapshotID       string         `json:"snapshot_id"`
	RestoreRequested bool           `json:"restore_requested"`
	Connections      map[string]int `json:"connections"`
	BytesIn          uint64         `json:"bytes_in"`
	BytesOut         uint64         `json:"bytes_out"`
}

// Total is the number of connections in all states.
func (s AppStatus) Total() int {
	n := 0
	for _, c := range s.Connections {
		n += c
	}
	return n
}

// Conn is one entry of `ckptctl conns -o json`.
type Conn struct {
	Local        string `json:"local"`
	Remote       string `json:"remote"`
	Role         string `json:"role"`
	State        string `json:"state"`
	BytesIn      uint64 `json:"bytes_in"`
	BytesOut     uint64 `json:"bytes_out"`
	Translated   bool   `json:"translated"`
	WindowClosed bool   `json:"window_closed"`

	SegmentsIn   uint64            `json:"segments_in"`
	SegmentsOut  uint64            `json:"segments_out"`
	Answered     uint64            `json:"answered"`
	SentToRemote uint64            `json:"sent_to_remote"`
	IdleSeconds  float64           `json:"idle_seconds"`
	Reasons      map[string]uint64 `json:"reasons"`
}

// Status asks for one application.
func (n *Node) Status(app string) (AppStatus, error) {
	r := n.Ctl("-o", "json", "status", app)
	if err := r.Err(); err != nil {
		return AppStatus{}, err
	}
	var all struct {
		Apps []AppStatus `json:"apps"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil {
		return AppStatus{}, fmt.Errorf("status: %w in %q", err, r.Stdout)
	}
	for _, s := range all.Apps {
		if s.Name == app {
			return s, nil
		}
	}
	return AppStatus{}, fmt.Errorf("status: no application %s in %q", app, r.Stdout)
}

// Conns lists an application's connections.
func (n *Node) Conns(app string) ([]Conn, error) {
	r := n.Ctl("-o", "json", "conns", app)
	if err := r.Err(); err != nil {
		return nil, err
	}
	var all []Conn
	if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil {
		return nil, fmt.Errorf("conns: %w in %q", err, r.Stdout)
	}
	return all, nil
}

// Snapshot takes a snapshot and returns its ID, the last line of the output.
func (n *Node) Snapshot(app string, flags ...string) (string, error) {
	r := n.Ctl(append([]string{"snapshot", app}, flags...)...)
	if err := r.Err(); err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	id := strings.TrimSpace(lines[len(lines)-1])
	if id == "" || strings.ContainsAny(id, " \t") {
		return "", fmt.Errorf("snapshot: the last line of %q is no ID", r.Stdout)
	}
	return id, nil
}

// WaitState waits until the application is in a state.
func (n *Node) WaitState(app, state string, timeout time.Duration) error {
	return n.Ctl("wait", app, "--state", state, "--timeout", timeout.String()).Err()
}
