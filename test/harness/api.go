package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// FilterAPI calls one method of the filter's control API with plain JSON over
// its Unix socket, and decodes the answer into out when that is not nil. It is
// quicker than a command: times taken with it are good to a millisecond.
func (n *Node) FilterAPI(timeout time.Duration, method string, in, out any) error {
	return n.api("control.sock", "Filter", timeout, method, in, out)
}

// AgentAPI calls one method of the agent's; see FilterAPI.
func (n *Node) AgentAPI(timeout time.Duration, method string, in, out any) error {
	return n.api("agent.sock", "Agent", timeout, method, in, out)
}

func (n *Node) api(socket, service string, timeout time.Duration, method string, in, out any) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.Path(socket))
	}
	tr := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://node/nfconnfilter.v1."+service+"/"+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", method, res.Status, text)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(text, out)
}

// AwaitState blocks until the application is in the state and tells when.
func (n *Node) AwaitState(app, state string, timeout time.Duration) (time.Time, error) {
	err := n.FilterAPI(timeout, "Wait", map[string]string{"app": app, "state": state}, nil)
	return time.Now(), err
}

// Reasons are the filter's counters of verdicts for an application, by reason.
func (n *Node) Reasons(app string) (map[string]uint64, error) {
	var reply struct {
		Apps []struct {
			// 64-bit numbers are strings in protobuf's JSON.
			Reasons map[string]json.Number `json:"reasons"`
		} `json:"apps"`
	}
	if err := n.FilterAPI(5*time.Second, "Status", map[string]string{"app": app}, &reply); err != nil {
		return nil, err
	}
	all := map[string]uint64{}
	for _, a := range reply.Apps {
		for k, v := range a.Reasons {
			i, err := v.Int64()
			if err != nil {
				return nil, fmt.Errorf("reason %s: %w", k, err)
			}
			all[k] += uint64(i)
		}
	}
	return all, nil
}
