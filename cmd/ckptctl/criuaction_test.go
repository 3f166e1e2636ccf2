package main

import (
	"context"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (a *fakeAgent) CriuAction(_ context.Context, r *connect.Request[nfconnfilterv1.AgentCriuActionRequest]) (*connect.Response[nfconnfilterv1.AgentCriuActionReply], error) {
	a.action = r.Msg
	switch r.Msg.App {
	case "refused":
		return nil, control.Error(connect.CodeFailedPrecondition, "redis", control.StateRestored, "SEAL refused", "L R")
	case "none":
		return connect.NewResponse(&nfconnfilterv1.AgentCriuActionReply{}), nil
	}
	return connect.NewResponse(&nfconnfilterv1.AgentCriuActionReply{App: "redis", State: control.StateSnapshotFreeze, Note: "its connections are frozen"}), nil
}

// criuSays sets the environment in which CRIU runs its script.
func criuSays(t *testing.T, action, dir, pid string) {
	t.Helper()
	t.Setenv("CRTOOLS_SCRIPT_ACTION", action)
	t.Setenv("CRTOOLS_IMAGE_DIR", dir)
	t.Setenv("CRTOOLS_INIT_PID", pid)
	t.Setenv("NFCONNFILTER_APP", "")
}

func TestCriuAction(t *testing.T) {
	r := newRig(t)
	criuSays(t, "pre-dump", "/proc/77/fd/5", "99")
	got := r.do("criu-action")
	if got.code != 0 || got.out != "redis: pre-dump: its connections are frozen\n" || got.err != "" {
		t.Errorf("%+v", got)
	}
	if m := r.agent.action; m.App != "" || m.Action != "pre-dump" || m.Pid != 99 || m.CriuPid != 77 || m.ImageDir != "/proc/77/fd/5" {
		t.Errorf("asked %v", m)
	}
	if got := r.do("criu-action", "-o", "json"); got.code != 0 || !strings.Contains(got.out, `"state":"SNAPSHOTFREEZE"`) {
		t.Errorf("json: %+v", got)
	}
	for name, want := range map[string]int{"refused": 1, "none": 0} {
		t.Setenv("NFCONNFILTER_APP", name)
		if got := r.do("criu-action"); got.code != want || got.out != "" || (want != 0) != strings.Contains(got.err, "SEAL refused") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if r.do("criu-action", "--app", "redis"); r.agent.action.App != "redis" {
		t.Errorf("--app is not preferred: %v", r.agent.action)
	}
	t.Setenv("CRTOOLS_INIT_PID", "")
	t.Setenv("CRTOOLS_IMAGE_DIR", "/somewhere")
	if r.do("criu-action"); r.agent.action.Pid != 0 || r.agent.action.CriuPid <= 1 {
		t.Errorf("by its parent: %v", r.agent.action)
	}
}

// TestCriuActionPasses: what does not concern connections needs no agent.
func TestCriuActionPasses(t *testing.T) {
	for _, action := range []string{"setup-namespaces", "post-setup-namespaces", "post-resume", "orphan-pts-master", "pre-stream"} {
		criuSays(t, action, "/proc/77/fd/5", "")
		r := newRig(t)
		if got := r.do("criu-action"); got.code != 0 || got.out+got.err != "" || r.agent.action != nil {
			t.Errorf("%s: %+v, asked %v", action, got, r.agent.action)
		}
	}
}

func TestCriuActionUsage(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct{ action, dir, pid string }{{"", "/proc/77/fd/5", "1"}, {"pre-dump", "", "1"}, {"pre-dump", "/proc/77/fd/5", "x"}} {
		criuSays(t, c.action, c.dir, c.pid)
		if got := r.do("criu-action"); got.code != exitUsage || got.err == "" {
			t.Errorf("%+v: %+v", c, got)
		}
	}
	criuSays(t, "pre-dump", "/proc/77/fd/5", "1")
	if got := r.do("criu-action", "dump"); got.code != exitUsage {
		t.Errorf("an argument: %+v", got)
	}
	if got := r.do("--agent-socket", "/nowhere", "criu-action"); got.code != exitUnreachable {
		t.Errorf("no agent: %+v", got)
	}
}

// TestArguments: CRIU runs a link without arguments.
func TestArguments(t *testing.T) {
	for _, c := range []struct{ argv, want string }{
		{"/usr/sbin/ckptctl-criu-action", "criu-action"}, {"ckptctl-criu-action --app x", "criu-action --app x"},
		{"/usr/sbin/ckptctl status redis", "status redis"}, {"ckptctl", ""}, {"", ""},
	} {
		if got := arguments(strings.Fields(c.argv)); !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%q: %q", c.argv, got)
		}
	}
}
