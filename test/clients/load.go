package clients

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// Load is many clients of one server.
type Load struct {
	Clients []*Redis
}

// OpenLoad connects n clients to addr, numbered from first on, their keepalive
// settings taken from mix in turn (Mixed when it is empty). Two clients with
// the same number must not speak to the same server: they would share keys. On
// failure everything is closed again.
func OpenLoad(d Dialer, addr string, first, n int, mix ...KeepAlive) (*Load, error) {
	if len(mix) == 0 {
		mix = Mixed
	}
	l := &Load{Clients: make([]*Redis, 0, n)}
	for i := range n {
		c, err := DialRedis(d, addr, first+i, mix[i%len(mix)])
		if err != nil {
			l.Close()
			return nil, err
		}
		l.Clients = append(l.Clients, c)
	}
	return l, nil
}

// each runs f for every client, some at a time, and gathers the errors.
func (l *Load) each(f func(*Redis) error) []error {
	const workers = 64
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
		next = make(chan *Redis)
	)
	for range min(workers, len(l.Clients)) {
		wg.Go(func() {
			for c := range next {
				if err := f(c); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	for _, c := range l.Clients {
		next <- c
	}
	close(next)
	wg.Wait()
	return errs
}

// Round lets every client send one command and check the reply; the errors
// are one a client.
func (l *Load) Round(timeout time.Duration) []error {
	return l.each(func(c *Redis) error { return c.Command(timeout) })
}

// Idle checks every connection without sending anything.
func (l *Load) Idle() []error {
	var errs []error
	for _, c := range l.Clients {
		if err := c.Idle(); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Close closes every connection.
func (l *Load) Close() {
	for _, c := range l.Clients {
		c.Close()
	}
}

// Summary joins at most ten of the errors and counts the rest; nil for none.
func Summary(errs []error) error {
	const most = 10
	if len(errs) == 0 {
		return nil
	}
	if len(errs) <= most {
		return errors.Join(errs...)
	}
	return fmt.Errorf("%w\nand %d more", errors.Join(errs[:most]...), len(errs)-most)
}
