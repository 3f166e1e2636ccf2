package testnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	nsDir    = "/run/netns"
	nsPrefix = "nfcf-"
)

var nsCounter atomic.Uint32

// NS is a named network namespace under /run/netns, with its loopback up.
type NS struct {
	name   string
	file   *os.File
	ctx    context.Context
	cancel context.CancelFunc
}

// NewNS makes a network namespace whose name starts with a prefix, this process's id and label. It needs
// CAP_SYS_ADMIN. Namespaces that dead processes left under the same prefix are removed first.
func NewNS(label string) (*NS, error) {
	if strings.ContainsAny(label, "/ \t\n") {
		return nil, fmt.Errorf("testnet: namespace label %q must hold no slash or blank", label)
	}
	if err := os.MkdirAll(nsDir, 0o755); err != nil {
		return nil, fmt.Errorf("testnet: %w", err)
	}
	sweep()
	name := fmt.Sprintf("%s%d-%d-%s", nsPrefix, os.Getpid(), nsCounter.Add(1), label)
	path := filepath.Join(nsDir, name)
	mount, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("testnet: %w", err)
	}
	_ = mount.Close()
	if err := bindNewNS(path); err != nil {
		_ = os.Remove(path)
		return nil, fmt.Errorf("testnet: make namespace %s (root is needed): %w", name, err)
	}
	file, err := os.Open(path)
	if err != nil {
		_ = removeNS(path)
		return nil, fmt.Errorf("testnet: %w", err)
	}
	ns := &NS{name: name, file: file}
	ns.ctx, ns.cancel = context.WithCancel(context.Background())
	if err := ns.withHandle(linkUp("lo")); err != nil {
		_ = ns.Close()
		return nil, err
	}
	return ns, nil
}

// bindNewNS makes a namespace on a thread of its own, which ends with it, and mounts it at path so that it lives on.
func bindNewNS(path string) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errs <- fmt.Errorf("unshare: %w", err)
			return
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
			errs <- fmt.Errorf("mount: %w", err)
			return
		}
		errs <- nil
	}()
	return <-errs
}

func removeNS(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) { // not mounted: the file alone is left
		err = nil
	}
	return errors.Join(err, os.Remove(path))
}

// sweep removes what test processes left that were killed before their clean-up.
func sweep() {
	entries, err := os.ReadDir(nsDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), nsPrefix)
		if !ours {
			continue
		}
		pid, err := strconv.Atoi(strings.SplitN(rest, "-", 2)[0])
		if err != nil || pid <= 0 || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		_ = removeNS(filepath.Join(nsDir, e.Name()))
	}
}

// Close kills the commands started with Command that still run and removes the namespace's name. The kernel frees
// the namespace once its last socket and process are gone.
func (ns *NS) Close() error {
	ns.cancel()
	return errors.Join(ns.file.Close(), removeNS(ns.Path()))
}

// Path returns the namespace's file, as setns(2) and nsenter take it.
func (ns *NS) Path() string { return filepath.Join(nsDir, ns.name) }

// Name returns the name that `ip netns` shows.
func (ns *NS) Name() string { return ns.name }

// Do runs f inside the namespace, on an OS thread of its own, and returns its error. Goroutines that f starts run
// outside. A panic in f, or a runtime.Goexit as testing's Fatal does, goes on in the caller.
func (ns *NS) Do(f func() error) error {
	var (
		err      error
		finished bool
		panicked any
		done     = make(chan struct{})
	)
	go func() {
		defer close(done)
		err = ns.enter(func() error {
			defer func() {
				if !finished {
					panicked = recover()
				}
			}()
			err := f()
			finished = true
			return err
		}, &finished)
	}()
	<-done
	switch {
	case finished:
		return err
	case panicked != nil:
		panic(panicked)
	}
	runtime.Goexit()
	return nil
}

// enter moves the current goroutine's thread into the namespace for f's time. The thread goes back to the pool only
// when its own namespace could be restored; otherwise it ends with the goroutine.
func (ns *NS) enter(f func() error, finished *bool) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err == nil {
		err = unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET)
	}
	if err != nil {
		*finished = true
		if own != nil {
			_ = own.Close()
		}
		return fmt.Errorf("testnet: enter namespace %s: %w", ns.name, err)
	}
	defer func() {
		if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		_ = own.Close()
	}()
	return f()
}

// withHandle runs f with a netlink handle whose socket lives in the namespace.
func (ns *NS) withHandle(f func(*netlink.Handle) error) error {
	var h *netlink.Handle
	err := ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("testnet: namespace %s: %w", ns.name, err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		return fmt.Errorf("testnet: namespace %s: %w", ns.name, err)
	}
	return nil
}

func linkUp(name string) func(*netlink.Handle) error {
	return func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		return h.LinkSetUp(link)
	}
}

// Command returns a command that will run inside the namespace. The started process is the command itself: nsenter
// replaces itself, so cmd.Process.Pid may be signalled. Close kills it when it still runs.
func (ns *NS) Command(name string, args ...string) *exec.Cmd {
	path, lookErr := exec.LookPath(name)
	if lookErr != nil {
		path = name
	}
	cmd := exec.CommandContext(ns.ctx, "nsenter", append([]string{"--net=" + ns.Path(), "--", path}, args...)...)
	if lookErr != nil {
		cmd.Err = lookErr
	}
	return cmd
}

// Sysctl writes one of the namespace's own settings; key is the path below /proc/sys, such as
// "net/ipv4/tcp_timestamps".
func (ns *NS) Sysctl(key, value string) error {
	path := filepath.Join("/proc/sys", filepath.Clean("/"+strings.ReplaceAll(key, ".", "/")))
	return ns.Do(func() error { return os.WriteFile(path, []byte(value), 0o644) })
}

// Dial connects from inside the namespace. addr must hold a literal IP address; the connection may be used from any
// goroutine. The attempt ends after 10 s.
func (ns *NS) Dial(network, addr string) (net.Conn, error) {
	return ns.DialFrom(network, "", addr)
}

// DialFrom is Dial from the local address laddr, "IP:port" with port 0 for any; empty lets the kernel choose.
func (ns *NS) DialFrom(network, laddr, addr string) (conn net.Conn, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	if laddr != "" {
		if err := literal(laddr); err != nil {
			return nil, err
		}
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr, err = net.ResolveUDPAddr(network, laddr)
		} else {
			d.LocalAddr, err = net.ResolveTCPAddr(network, laddr)
		}
		if err != nil {
			return nil, err
		}
	}
	err = ns.Do(func() (err error) {
		conn, err = d.Dial(network, addr)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace with plain TCP (not MPTCP, Go's default). addr as in net.Listen, with a literal
// IP address or none.
func (ns *NS) Listen(network, addr string) (ln net.Listener, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	err = ns.Do(func() (err error) {
		ln, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	return ln, err
}

// literal refuses host names: a lookup would run on goroutines outside the namespace.
func literal(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("testnet: address %q: %w", addr, err)
	}
	if host == "" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("testnet: address %q must hold an IP address, not a name", addr)
	}
	return nil
}
