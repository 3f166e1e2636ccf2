package test

import (
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// criuCommand is a CRIU that works on this kernel; make deps-test has brought it.
var criuCommand = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("../scripts/criu.sh").Output()
	return strings.TrimSpace(string(out)), err
})

// criuNode is a node whose applications are dumped with CRIU.
func criuNode(t *testing.T, o harness.Options) harness.Options {
	t.Helper()
	command, err := criuCommand()
	must(t, err)
	o.CRIU = command
	for i := range o.Apps {
		o.Apps[i].Checkpoint += "engine = \"criu\"\n"
		o.Apps[i].Before = nil
	}
	return o
}

// TestCRIURedis: the data is in memory only.
func TestCRIURedis(t *testing.T) {
	o := criuNode(t, harness.Options{Name: "criu", Apps: []harness.App{harness.Redis("redis", vip)}})
	n, load := redisUp(t, o, 10, clients.Mixed...)
	unnoticed := watch(t, n.Net, vip)
	rounds(t, load, 1)
	for i := range 3 {
		snapshot(t, n, "redis", "redis-server")
		held(t, n, "redis", "redis-server", load, 3*time.Second)
		took := wake(t, n, "redis", load.Clients[(i*7)%len(load.Clients)])
		t.Logf("cycle %d: the waking command took %v", i+1, took.Round(100*time.Microsecond))
		rounds(t, load, 4)
	}
	unnoticed()
}
