package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
)

// talk has every client send one command after the other.
type talk struct {
	wg       sync.WaitGroup
	end      atomic.Bool
	commands atomic.Int64
	slowest  atomic.Int64 // ns
}

func startTalk(load *clients.Load) *talk {
	t := &talk{}
	for _, c := range load.Clients {
		t.wg.Go(func() {
			for !t.end.Load() {
				start := time.Now()
				if c.Command(replyIn) != nil { // a client that has failed stays failed
					return
				}
				t.commands.Add(1)
				for took := int64(time.Since(start)); ; {
					was := t.slowest.Load()
					if took <= was || t.slowest.CompareAndSwap(was, took) {
						break
					}
				}
			}
		})
	}
	return t
}

// until waits until that many more commands were answered.
func (t *talk) until(ctx context.Context, n int) error {
	want := t.commands.Load() + int64(n)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(replyIn)
	for t.commands.Load() < want {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			return errors.New("the clients get no replies")
		case <-tick.C:
		}
	}
	return nil
}

func (t *talk) stop() {
	t.end.Store(true)
	t.wg.Wait()
}

// sum gives the number of commands and the longest time of one; after stop.
func (t *talk) sum() (commands int64, slowest time.Duration) {
	return t.commands.Load(), time.Duration(t.slowest.Load())
}
