package control

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"

	"connectrpc.com/connect"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Error makes the error of a request: msg under one of Connect's codes, with
// an ErrorInfo detail that holds the application, its state and, where single
// connections are the reason, a line for each ("LOCAL REMOTE: what is
// missing"). Info reads the detail back on the client's side.
func Error(code connect.Code, app, state, msg string, conns ...string) error {
	e := connect.NewError(code, errors.New(msg))
	// NewErrorDetail fails only for text that is not UTF-8; the error itself
	// matters more than its detail then.
	if d, err := connect.NewErrorDetail(&nfconnfilterv1.ErrorInfo{App: app, State: state, Connections: conns}); err == nil {
		e.AddDetail(d)
	}
	return e
}

// Info returns the ErrorInfo detail of err, or nil when it has none.
func Info(err error) *nfconnfilterv1.ErrorInfo {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce == nil {
		return nil
	}
	for _, d := range ce.Details() {
		v, err := d.Value()
		if err != nil {
			continue
		}
		if info, ok := v.(*nfconnfilterv1.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

// IsUnreachable reports whether err says that the daemon could not be reached
// or went away before it answered, in contrast to an error that it answered.
// After such an error of a call that was already sent nobody knows whether the
// request took effect; repeating it is safe (requests are idempotent).
func IsUnreachable(err error) bool {
	if err == nil || connect.IsWireError(err) {
		return false
	}
	// A host that is down answers no SYN: that is no deadline of the caller's.
	var nd notDelivered
	var op *net.OpError
	if errors.As(err, &nd) && errors.As(err, &op) && op.Op == "dial" && op.Timeout() {
		return true
	}
	// Not by the code: a broken pipe comes as canceled too.
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	if errors.As(err, &nd) { // a certificate, say: trying again does not help
		return false
	}
	for _, e := range []error{syscall.ECONNREFUSED, syscall.ENOENT, syscall.ECONNRESET, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return connect.CodeOf(err) == connect.CodeUnavailable
}
