package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/cluster"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

func TestScheduler(t *testing.T) {
	old := runScheduler
	defer func() { runScheduler = old }()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", notify.LocalAddr().String())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got cluster.Options
	runScheduler = func(ctx context.Context, o cluster.Options) error {
		got = o
		o.Ready()
		o.Logger.Info("ready")
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}
	var out, errs bytes.Buffer
	args := []string{"scheduler", "--shared", "/srv/x", "--node", "/etc/n.toml", "--listen", "127.0.0.1:7400"}
	if code := run(ctx, args, &out, &errs); code != 0 {
		t.Fatalf("code %d: %s", code, errs.String())
	}
	if got.SharedDir != "/srv/x" || got.NodeFile != "/etc/n.toml" || got.Listen != "127.0.0.1:7400" || got.Reload == nil ||
		out.String() != "" || !strings.Contains(errs.String(), "msg=ready") {
		t.Errorf("%+v %q %q", got, out.String(), errs.String())
	}
	b := make([]byte, 64)
	_ = notify.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := notify.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("systemd was told %q, %v", b[:n], err)
	}
}

func TestSchedulerErrors(t *testing.T) {
	old := runScheduler
	defer func() { runScheduler = old }()
	var result error
	runScheduler = func(ctx context.Context, o cluster.Options) error {
		if result == nil {
			return old(ctx, o)
		}
		return result
	}
	dir := t.TempDir()
	node := filepath.Join(dir, "node.toml")
	if err := os.WriteFile(node, []byte("name = \"node-a\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		code   int
		says   string
		result error
		args   []string
	}{
		{2, `required flag(s) "shared"`, nil, []string{"scheduler"}},
		{2, "--shared is empty", nil, []string{"scheduler", "--shared", ""}},
		{2, "takes no arguments", nil, []string{"scheduler", "redis", "--shared", "x"}},
		{2, "--timeout is not for the scheduler", nil, []string{"scheduler", "--shared", "x", "--timeout", "1s"}},
		{2, "--agent-socket is not for the scheduler", nil, []string{"scheduler", "--shared", "x", "--agent-socket", "y"}},
		{2, "n.toml:1:2: bad", config.Faults{{File: "n.toml", Line: 1, Col: 2, Message: "bad"}}, []string{"scheduler", "--shared", "x"}},
		{2, "no [scheduler]", nil, []string{"scheduler", "--shared", dir, "--node", node}},
		{2, "is not ADDR:PORT", nil, []string{"scheduler", "--shared", dir, "--node", node, "--listen", "7400"}},
		{1, "port taken", errors.New("port taken"), []string{"scheduler", "--shared", "x"}},
	} {
		result = tc.result
		var out, errs bytes.Buffer
		if code := run(t.Context(), tc.args, &out, &errs); code != tc.code || !strings.Contains(errs.String(), tc.says) || out.String() != "" {
			t.Errorf("%v: %d %q %q", tc.args, code, out.String(), errs.String())
		}
	}
}
