package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket/layers"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// metric reads one of the filter's counters at address.
func metric(t *testing.T, ns *testnet.NS, address, name string) (v float64) {
	t.Helper()
	tr := &http.Transport{DialContext: func(_ context.Context, network, addr string) (net.Conn, error) { return ns.Dial(network, addr) }, DisableKeepAlives: true}
	res, err := (&http.Client{Transport: tr, Timeout: reply}).Get("http://" + address + "/metrics")
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(t, err)
	m := regexp.MustCompile(`(?m)^` + name + ` (.*)$`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("there is no %s in\n%s", name, b)
	}
	v, err = strconv.ParseFloat(string(m[1]), 64)
	must(t, err)
	return v
}

// TestQueueOverrun: the filter stands still while more packets come than its queue
// holds. What was dropped is counted and said, senders repeat it, and nobody is reset.
func TestQueueOverrun(t *testing.T) {
	t.Parallel()
	n := newNode(t, harness.Options{Name: "flood", Lines: fmt.Sprintf("metrics_listen = %q\n", metricsAt),
		Apps: []harness.App{harness.Redis("redis", vip), harness.Redis("second", vipBeside)}})
	must(t, n.Up())
	away, back, unnoticed := aside(t, n, 20, ordinary)
	talk := back.Talk(200*time.Millisecond, reply)
	lost := func() float64 {
		return metric(t, n.Net.Node(), metricsAt, "nfconnfilter_queue_overruns_total") + metric(t, n.Net.Node(), metricsAt, "nfconnfilter_queue_full_total")
	}
	if k := lost(); k != 0 {
		t.Errorf("%g packets were lost before", k)
	}
	// Far behind what the client has sent: the kernel and the filter pay it no heed.
	c := away.Clients[0]
	old := forge(c.LocalAddr(), c.RemoteAddr(), layers.TCP{Seq: 1, Ack: 1, ACK: true, Window: 500}, []byte("x"), func(b []byte) { b[len(b)-1]++ })
	flood := make([][]byte, 80_000)
	for i := range flood {
		flood[i] = old
	}
	must(t, n.Filter.Signal(syscall.SIGSTOP))
	t.Cleanup(func() { _ = n.Filter.Signal(syscall.SIGCONT) })
	inject(t, n, flood...)
	replies := talk.Replies()
	time.Sleep(time.Second) // the length of the outage, in which clients speak into a full queue
	must(t, n.Filter.Signal(syscall.SIGCONT))
	must(t, harness.Wait(reply, "every client is served again", func() bool {
		for i, k := range talk.Replies() {
			if k < replies[i]+2 {
				return false
			}
		}
		return true
	}))
	must(t, clients.Summary(talk.Stop()))
	t.Logf("%g packets were dropped", lost())
	if k := lost(); k < 10_000 || k > float64(len(flood)) {
		t.Errorf("%g packets are counted as dropped", k)
	}
	must(t, harness.Wait(5*time.Second, "the filter says so", func() bool { return strings.Contains(n.Filter.Log(), "packets came faster than they were filtered") }))
	must(t, clients.Summary(away.Idle()))
	wake(t, n, "redis", away.Clients[0])
	rounds(t, away, 1)
	rounds(t, back, 1)
	unnoticed()
}
