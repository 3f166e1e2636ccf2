package rules

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// watchBetween is the least time from a look that found nothing to the next, watchAgain from one that did.
	watchBetween = time.Second
	watchAgain   = 50 * time.Millisecond
)

// Repair looks as Verify does and, where something is amiss, writes sets, chains and jumps again. It returns
// what it found. Sets that it had to make are empty.
func (m *Manager) Repair() ([]string, error) {
	found, err := m.Verify()
	if err != nil || len(found) == 0 {
		return found, err
	}
	m.iptables.Lock()
	defer m.iptables.Unlock()
	return found, m.ns.do(func() error {
		for _, f := range m.active() {
			if err := m.install(f); err != nil {
				return err
			}
		}
		return nil
	})
}

// Watch calls look, in its own goroutine, when rules may have been changed by others: soon after a notification
// of the kernel (nftables, and with it iptables-nft, tells of every change; nfnetlink group NFNLGRP_NFTABLES),
// and every now and then, after what every returns: iptables-legacy tells nothing. look tells whether anything
// was amiss. Watch returns when ctx ends or the notifications cannot be had.
func (m *Manager) Watch(ctx context.Context, every func() time.Duration, look func() (found bool)) error {
	var c *netlink.Conn
	err := m.ns.do(func() (err error) {
		c, err = netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
		return err
	})
	if err != nil {
		return fmt.Errorf("rules: changes by others are not told: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	told := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			msgs, err := c.Receive()
			if err != nil && !errors.Is(err, unix.ENOBUFS) { // too many to read are news too
				return
			}
			if err == nil && !slices.ContainsFunc(msgs, byOthers) {
				continue
			}
			select {
			case told <- struct{}{}:
			default:
			}
		}
	}()
	defer func() { <-done }()
	m.wait(ctx, every, told, look)
	return nil
}

func (m *Manager) wait(ctx context.Context, every func() time.Duration, told <-chan struct{}, look func() (found bool)) {
	var next time.Time
	for {
		wait := time.NewTimer(every())
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-told:
			wait.Stop()
			if !sleep(ctx, time.Until(next)) {
				return
			}
		case <-wait.C:
		}
		select { // what came until now is looked at now
		case <-told:
		default:
		}
		pause := watchBetween
		if look() {
			pause = watchAgain
		}
		next = time.Now().Add(pause)
	}
}

// byOthers tells whether msg is the end of a change that none of our children made (NFT_MSG_NEWGEN of
// include/uapi/linux/netfilter/nf_tables.h).
func byOthers(msg netlink.Message) bool {
	const newGen, pid = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN, unix.NFTA_GEN_PROC_PID
	if msg.Header.Type != newGen {
		return false
	}
	for a := range attrs(msg.Data, 4) {
		if a.typ == pid && len(a.data) == 4 {
			return !children.has(int(binary.BigEndian.Uint32(a.data)))
		}
	}
	return true
}

// offspring are the last processes that this one started to look at rules or change them.
type offspring struct {
	mu   sync.Mutex
	pids [32]int
	next int
}

var children offspring

func (o *offspring) run(cmd *exec.Cmd) error {
	o.mu.Lock()
	err := cmd.Start()
	if err == nil {
		o.pids[o.next%len(o.pids)] = cmd.Process.Pid
		o.next++
	}
	o.mu.Unlock()
	if err != nil {
		return err
	}
	return cmd.Wait()
}

func (o *offspring) has(pid int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Contains(o.pids[:], pid)
}

func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
