package control

import (
	"context"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// maxReply bounds one reply: a hundred thousand connections take some 20 MiB.
const maxReply = 256 << 20

// FilterClient calls the connection filter, one method a request. It may be
// used by many goroutines. Close it when it is no longer needed.
type FilterClient struct {
	nfconnfilterv1connect.FilterClient
	transport *http.Transport
}

// Close closes connections that are not in use. Calls under way are not ended.
func (c *FilterClient) Close() { c.transport.CloseIdleConnections() }

// AgentClient calls the snapshot and restore daemon. It may be used by many
// goroutines. Close it when it is no longer needed.
type AgentClient struct {
	nfconnfilterv1connect.AgentClient
	transport *http.Transport
}

// Close closes connections that are not in use. Calls under way are not ended.
func (c *AgentClient) Close() { c.transport.CloseIdleConnections() }

// Dial returns a client of the filter behind the control socket at path. It
// connects with the first call and anew after the filter was restarted;
// IsUnreachable tells a call's error that comes from the way there.
func Dial(path string, opts ...connect.ClientOption) *FilterClient {
	t, hc := unixClient(path)
	return &FilterClient{nfconnfilterv1connect.NewFilterClient(hc, baseURL, clientOptions(opts)...), t}
}

// DialAgent returns a client of the agent behind the agent socket at path; see
// Dial.
func DialAgent(path string, opts ...connect.ClientOption) *AgentClient {
	t, hc := unixClient(path)
	return &AgentClient{nfconnfilterv1connect.NewAgentClient(hc, baseURL, clientOptions(opts)...), t}
}

// baseURL only fills the Host header; the address comes from the dialer.
const baseURL = "http://localhost"

func clientOptions(opts []connect.ClientOption) []connect.ClientOption {
	return append([]connect.ClientOption{
		connect.WithReadMaxBytes(maxReply),
		// Nothing is won by compressing what stays on this machine.
		connect.WithAcceptCompression("gzip", nil, nil),
	}, opts...)
}

func unixClient(path string) (*http.Transport, *http.Client) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true) // gRPC needs it, Connect takes either
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		Protocols: protocols,
		// Shorter than the server's, so that no call meets a connection that
		// the server is about to close.
		IdleConnTimeout: idleTimeout / 2,
		HTTP2:           &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}
	return t, &http.Client{Transport: t}
}
