package clients

import (
	"context"
	"errors"
	"net"
)

// Serve accepts connections to listen, IP:port, and hands each to f in a
// goroutine of its own, until ctx ends. They are plain TCP: an MPTCP subflow cannot
// be held.
func Serve(ctx context.Context, listen string, f func(*net.TCPConn)) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		go f(c.(*net.TCPConn))
	}
}
