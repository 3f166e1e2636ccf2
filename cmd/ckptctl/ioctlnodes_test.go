package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"connectrpc.com/connect"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (f *fakeFilter) Handover(_ context.Context, r *connect.Request[nfconnfilterv1.HandoverRequest]) (*connect.Response[nfconnfilterv1.HandoverReply], error) {
	f.note("Handover", r.Msg)
	if f.err != nil {
		return nil, f.err
	}
	return connect.NewResponse(&nfconnfilterv1.HandoverReply{App: r.Msg.App, State: "BLOCKDATA", SnapshotId: "S-1", Structures: []byte("parcel"), Connections: 3}), nil
}
func (f *fakeFilter) Handback(ctx context.Context, r *connect.Request[nfconnfilterv1.HandbackRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Handback", r.Msg.App, "SNAPSHOTDONE", r.Msg)
}
func (f *fakeFilter) Release(ctx context.Context, r *connect.Request[nfconnfilterv1.ReleaseRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return f.reply(ctx, "Release", r.Msg.App, "", r.Msg)
}

// What is handed over is in the file, which no other user can read, and goes back from it.
func TestIoctlHandoverFile(t *testing.T) {
	r := newRig(t)
	file := r.path("parcel")
	r.want(0, "redis: BLOCKDATA S-1, 3 connections handed over to node node-b, 6 bytes\n", "ioctl", "HANDOVER", "redis", "node-b", "--out", file)
	b, err := os.ReadFile(file)
	if err != nil || string(b) != "parcel" {
		t.Fatalf("%q, %v", b, err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if got := r.do("ioctl", "HANDOVER", "redis", "node-b", "--out", file); got.code != 2 || !strings.Contains(got.err, "already") {
		t.Errorf("an old file: %+v", got)
	}
	r.want(0, "redis: SNAPSHOTDONE\n", "ioctl", "HANDBACK", "redis", "node-b", file)
	if got, want := r.filter.last(), `Handback app:"redis" from_node:"node-b" structures:"parcel"`; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	if got := r.do("ioctl", "HANDBACK", "redis", "node-b", r.path("nothing")); got.code != 2 {
		t.Errorf("no file: %+v", got)
	}
	r.filter.err = connect.NewError(connect.CodeFailedPrecondition, os.ErrInvalid)
	if got := r.do("ioctl", "HANDOVER", "redis", "node-b", "--out", r.path("other")); got.code != 1 {
		t.Errorf("refused: %+v", got)
	}
	if _, err := os.Stat(r.path("other")); !os.IsNotExist(err) {
		t.Errorf("a refused handover leaves a file: %v", err)
	}
}

// Whose the connections are is told beside the state.
func TestStatusOfTwoNodes(t *testing.T) {
	r := newRig(t)
	r.filter.status = &nfconnfilterv1.StatusReply{Node: "node-a", Apps: []*nfconnfilterv1.AppStatus{
		{Name: "redis", State: "BLOCKDATA", TakenBy: "node-b"}, {Name: "web", State: "RESTORED", OldNode: "node-c"}}}
	if got := r.do("status"); !strings.Contains(got.out, "BLOCKDATA (taken by node-b)") || !strings.Contains(got.out, "RESTORED (from node-c)") {
		t.Errorf("%+v", got)
	}
	if got := r.do("status", "-o", "json"); !strings.Contains(got.out, `"taken_by":"node-b"`) || !strings.Contains(got.out, `"old_node":"node-c"`) {
		t.Errorf("%+v", got)
	}
}
