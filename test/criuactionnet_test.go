package test

import (
	"fmt"
	"os"
	"syscall"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Ino
}

// callerBehind is callerUp with a Redis in a network namespace of its own.
func callerBehind(t *testing.T, name string) (*caller, *clients.Load) {
	t.Helper()
	a := behind()
	a.Before = nil
	return callerUp(t, harness.Options{Name: name, Apps: []harness.App{a}}, 50, clients.Mixed...)
}

// TestCRIUActionBehind: the application's network namespace stays, CRIU is told of it as
// container engines tell it.
func TestCRIUActionBehind(t *testing.T) {
	c, load := callerBehind(t, "actns")
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	ns := c.n.Behind("redis").Path()
	pid := c.pid("redis-server")
	outside := fmt.Sprintf("net[%d]:redis-net", inode(t, ns))
	restore := func() error {
		f, err := os.Open(ns)
		must(t, err)
		defer f.Close()
		cmd := c.command("restore", "-d", "--inherit-fd", "fd[3]:redis-net")
		cmd.ExtraFiles = []*os.File{f}
		return c.run(cmd)
	}
	must(t, c.dump("--external", outside, "--leave-running"))
	c.stays(load, pid)
	for range 2 {
		must(t, c.dump("--external", outside))
		must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
		held(t, c.n, "redis", "redis-server", load, strictHold)
		c.write("[ $CRTOOLS_SCRIPT_ACTION = post-restore ] && exit 1")
		if err := restore(); err == nil {
			t.Error("the restore succeeds")
		}
		must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
		c.write("")
		must(t, restore())
		must(t, c.n.WaitState("redis", "RESTORED", reply))
		rounds(t, load, 2)
	}
	// Given up behind the lock: it runs on.
	pid = c.pid("redis-server")
	c.write("[ $CRTOOLS_SCRIPT_ACTION = post-dump ] && " + c.ckptctl() + " && exit 1")
	if err := c.dump("--external", outside); err == nil {
		t.Error("the dump succeeds")
	}
	c.stays(load, pid)
	unnoticed()
}

// TestCRIUActionNewNamespace: CRIU dumps the network namespace too, and makes another.
func TestCRIUActionNewNamespace(t *testing.T) {
	c, load := callerBehind(t, "actnew")
	unnoticed := watch(t, c.n.Net, vip)
	rounds(t, load, 1)
	must(t, c.dump())
	must(t, c.n.WaitState("redis", "SNAPSHOTDONE", reply))
	must(t, c.n.DropBehind("redis"))
	held(t, c.n, "redis", "redis-server", load, strictHold)

	name := fmt.Sprintf("nfcf-%d-new", os.Getpid())
	t.Cleanup(func() {
		_ = os.Remove(c.n.Path("redis.net"))
		if out, err := c.n.Net.Node().Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	// What is on the node's side of the link is its own.
	c.write(fmt.Sprintf(`set -e
case $CRTOOLS_SCRIPT_ACTION in
setup-namespaces)
	ip netns attach %[1]s $CRTOOLS_INIT_PID
	ln -sfn /run/netns/%[1]s %[2]s ;;
post-setup-namespaces)
	ip addr add 10.78.1.1/30 dev behind1
	ip link set behind1 up
	ip route add %[3]s/32 via 10.78.1.2 dev behind1 ;;
esac >>%[4]s 2>&1`, name, c.n.Path("redis.net"), vip, c.actions))
	must(t, c.restore("--external", fmt.Sprintf("veth[%s]:behind1", testnet.Iface)))
	must(t, c.n.WaitState("redis", "RESTORED", reply))
	rounds(t, load, 3)
	unnoticed()
}
