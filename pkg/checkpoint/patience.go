package checkpoint

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/failpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// filterPatience is how long an operation that has changed something waits for
// a filter that was restarted: the filter goes on where it was, and every
// request may be repeated.
const filterPatience = 60 * time.Second

// patience makes requests of operations under way wait for the filter. Others
// fail at once.
func patience(limit time.Duration) connect.Interceptor {
	return connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			sent := time.Now()
			res, err := next(ctx, req)
			o, _ := ctx.Value(operationKey{}).(*operation)
			if o != nil {
				o.inFilter(time.Since(sent))
			}
			if !away(err) || o == nil || !o.underWay() {
				return res, err
			}
			o.note("waiting for the filter, which is not there")
			began := time.Now()
			defer func() { o.outage(time.Since(began)) }()
			wait, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			_ = poll(wait, pollFirst, pollMost, func() (bool, error) {
				res, err = next(ctx, req)
				return !away(err), nil
			})
			return res, err
		}
	})
}

// crossing has the process end before or behind a request, for tests of crashes.
func crossing(ends *failpoint.Points) connect.Interceptor {
	return connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			ends.Here(failpoint.Ask, nil)
			defer ends.Here(failpoint.Asked, nil)
			return next(ctx, req)
		}
	})
}

// away tells whether the filter is not there, or about to go.
func away(err error) bool {
	return err != nil && (control.IsUnreachable(err) || connect.CodeOf(err) == connect.CodeUnavailable)
}
