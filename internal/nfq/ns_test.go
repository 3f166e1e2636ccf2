package nfq

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func sliceOf(v unix.Iovec) []byte { return unsafe.Slice(v.Base, int(v.Len)) }

// newNamespace puts the rest of the test into a network namespace of its own
// that has only lo. The namespace has no name and goes with the test's
// thread, which ends with the test because it is never unlocked.
func newNamespace(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare: %v", err)
	}
	run(t, "ip link set lo up")
}

// run runs a command in the test's namespace and returns its output.
func run(t testing.TB, cmd string) string {
	t.Helper()
	f := strings.Fields(cmd)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}
