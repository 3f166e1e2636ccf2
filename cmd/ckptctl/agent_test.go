package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/checkpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

func TestAgent(t *testing.T) {
	old := runAgent
	defer func() { runAgent = old }()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got checkpoint.Options
	runAgent = func(ctx context.Context, o checkpoint.Options) error {
		got = o
		for range 2 {
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				return err
			}
			select {
			case <-o.Reload:
			case <-time.After(10 * time.Second):
				return errors.New("no reload")
			}
		}
		o.Logger.Info("reloaded")
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}
	var out, errs bytes.Buffer
	if code := run(ctx, []string{"agent", "--shared", "/srv/x", "--node", "/etc/n.toml"}, &out, &errs); code != 0 {
		t.Fatalf("code %d: %s", code, errs.String())
	}
	if got.SharedDir != "/srv/x" || got.NodeFile != "/etc/n.toml" || out.String() != "" || !strings.Contains(errs.String(), "msg=reloaded") {
		t.Errorf("%+v %q %q", got, out.String(), errs.String())
	}
}

func TestAgentErrors(t *testing.T) {
	old := runAgent
	defer func() { runAgent = old }()
	var result error
	runAgent = func(context.Context, checkpoint.Options) error { return result }
	for _, tc := range []struct {
		code   int
		says   string
		result error
		args   []string
	}{
		{2, `required flag(s) "shared"`, nil, []string{"agent"}},
		{2, "--shared is empty", nil, []string{"agent", "--shared", ""}},
		{2, "takes no arguments", nil, []string{"agent", "redis", "--shared", "x"}},
		{2, "--timeout is not for the agent", nil, []string{"agent", "--shared", "x", "--timeout", "1s"}},
		{2, "--socket is not for the agent", nil, []string{"agent", "--shared", "x", "--socket", "y"}},
		{2, "n.toml:1:2: bad", config.Faults{{File: "n.toml", Line: 1, Col: 2, Message: "bad"}}, []string{"agent", "--shared", "x"}},
		{1, "port taken", errors.New("port taken"), []string{"agent", "--shared", "x"}},
		{0, "", nil, []string{"agent", "--shared", "x"}},
	} {
		result = tc.result
		var out, errs bytes.Buffer
		if code := run(t.Context(), tc.args, &out, &errs); code != tc.code || !strings.Contains(errs.String(), tc.says) || out.String() != "" {
			t.Errorf("%v: %d %q %q", tc.args, code, out.String(), errs.String())
		}
	}
}
