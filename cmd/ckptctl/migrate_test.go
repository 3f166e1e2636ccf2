package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (a *fakeAgent) Migrate(ctx context.Context, r *connect.Request[nfconnfilterv1.AgentMigrateRequest]) (*connect.Response[nfconnfilterv1.AgentMigrateReply], error) {
	a.note("Migrate", r.Msg)
	if err := a.work(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&nfconnfilterv1.AgentMigrateReply{App: r.Msg.App, From: "node-a", To: r.Msg.ToNode, State: a.state,
		SnapshotId: "S-1", Phases: a.phases, Checks: []string{"the ports are free"}, Forced: a.forced}), nil
}

func TestMigrate(t *testing.T) {
	r := newRig(t)
	r.agent.state = "RESTORED"
	r.agent.phases = []*nfconnfilterv1.Phase{{Name: "freeze", Ms: 1.5}, {Name: "hand over", Ms: 20}}
	r.want(0, "PHASE      MS\nfreeze     1.5\nhand over  20.0\nredis: RESTORED on node-b\n", "migrate", "redis", "--to", "node-b")
	if got, want := r.agent.last(), `Migrate app:"redis" to_node:"node-b"`; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	r.want(0, `{"app":"redis","from":"node-a","to":"node-b","state":"RESTORED","snapshot_id":"S-1","phases":[{"name":"freeze","ms":1.5,"filter_ms":0},`+
		`{"name":"hand over","ms":20,"filter_ms":0}],"checks":["the ports are free"]}`+"\n", "migrate", "redis", "--to", "node-b", "-o", "json")
	r.want(0, "ok: the ports are free\nredis: can be moved from node-a to node-b\n",
		"migrate", "redis", "--to", "node-b", "--dry-run", "--force", "--drain-timeout", "2s")
	if got, want := r.agent.last(), `Migrate app:"redis" to_node:"node-b" dry_run:true force:true drain_timeout_ms:2000`; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	r.agent.forced = []string{"192.0.2.100:6379 198.51.100.7:1: 5 octets"}
	if got := r.do("migrate", "redis", "--to", "node-b", "--force"); got.code != 0 || !strings.Contains(got.err, "forced: 192.0.2.100:6379") {
		t.Errorf("%+v", got)
	}
	r.want(0, "redis: RESTORED\n", "restore", "redis", "--to", "node-b")
	if got, want := r.agent.last(), `Restore app:"redis" to_node:"node-b"`; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	r.agent.err = connect.NewError(connect.CodeFailedPrecondition, os.ErrInvalid)
	if got := r.do("migrate", "redis", "--to", "node-b"); got.code != 1 {
		t.Errorf("refused: %+v", got)
	}
}

// Only what another node has taken over is released.
func TestRelease(t *testing.T) {
	r := newRig(t)
	for _, state := range []string{"", "RESTORED", "SNAPSHOTDONE"} {
		r.filter.status = &nfconnfilterv1.StatusReply{Apps: []*nfconnfilterv1.AppStatus{{Name: "redis", State: state}}}
		if got := r.do("release", "redis"); got.code != 1 || !strings.Contains(got.err, "and not BLOCKDATA") || !strings.HasPrefix(r.filter.last(), "Status") {
			t.Errorf("in %q: %+v, last %s", state, got, r.filter.last())
		}
	}
	r.filter.status = &nfconnfilterv1.StatusReply{Apps: []*nfconnfilterv1.AppStatus{{Name: "redis", State: "BLOCKDATA", TakenBy: "node-b"}}}
	r.want(0, "redis: unknown\n", "release", "redis", "--force")
	if got, want := r.filter.last(), `Release app:"redis" force:true`; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
}

func TestCerts(t *testing.T) {
	r := newRig(t)
	dir := r.path("certs")
	got := r.do("certs", "--out", dir, "node-a=192.0.2.11", "node-b=192.0.2.12,2001:db8::12")
	if got.code != 0 || !strings.Contains(got.out, `cert = "/etc/nfconnfilter/node-b.crt"`) {
		t.Fatalf("%+v", got)
	}
	for _, f := range []string{"ca.crt", "ca.key", "node-a.crt", "node-a.key", "node-b.crt", "node-b.key"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Error(err)
		}
	}
	r.want(0, `{"dir":"`+dir+`","ca":"`+dir+`/ca.crt","new_ca":false,"nodes":["node-c"]}`+"\n", "certs", "--out", dir, "node-c=192.0.2.13", "-o", "json")
	if got := r.do("certs", "--out", dir, "node-c=192.0.2.13"); got.code != 1 || !strings.Contains(got.err, "--force replaces it") {
		t.Errorf("a certificate was replaced: %+v", got)
	}
	r.want(0, `{"dir":"`+dir+`","ca":"`+dir+`/ca.crt","new_ca":false,"nodes":["node-c"]}`+"\n", "certs", "--out", dir, "--force", "node-c=192.0.2.13", "-o", "json")
	for _, args := range [][]string{{"node-d"}, {"node-d=host"}, {"node-d="}, {"node-d=fe80::1%lo"}, {"--days", "0", "node-d=192.0.2.1"}, {"node-d=192.0.2.1", "node-d=192.0.2.2"}, {}} {
		if got := r.do(append([]string{"certs", "--out", dir}, args...)...); got.code != 2 {
			t.Errorf("%v: %+v", args, got)
		}
	}
	// All or none: what was wrong with one can be put right and asked again.
	for _, c := range [][2]string{{"../x=192.0.2.1", "not a node's name"}, {"node-c=192.0.2.13", "--force replaces it"}} {
		if got := r.do("certs", "--out", dir, "node-d=192.0.2.14", c[0]); got.code != 1 || !strings.Contains(got.err, c[1]) {
			t.Errorf("%+v", got)
		}
		if _, err := os.Stat(filepath.Join(dir, "node-d.key")); err == nil {
			t.Errorf("beside %s: node-d has a certificate", c[0])
		}
	}
}
