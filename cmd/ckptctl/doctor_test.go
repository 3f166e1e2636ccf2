package main

import (
	"context"
	"testing"

	"connectrpc.com/connect"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (a *fakeAgent) Doctor(_ context.Context, r *connect.Request[nfconnfilterv1.AgentDoctorRequest]) (*connect.Response[nfconnfilterv1.AgentDoctorReply], error) {
	a.note("Doctor", r.Msg)
	if a.err != nil {
		return nil, a.err
	}
	return connect.NewResponse(&nfconnfilterv1.AgentDoctorReply{App: r.Msg.App, Engine: "criu", Findings: a.findings}), nil
}

func TestDoctor(t *testing.T) {
	r := newRig(t)
	r.want(0, "redis (engine criu): a snapshot can be expected to work\n", "doctor", "redis")
	if got := r.agent.last(); got != `Doctor app:"redis"` {
		t.Errorf("sent %s", got)
	}
	r.want(0, `{"app":"redis","engine":"criu","ok":true,"findings":[]}`+"\n", "doctor", "redis", "-o", "json")

	warning := &nfconnfilterv1.Finding{Level: "warning", Check: "backlog", What: "1 connection waits", Remedy: "accept it"}
	r.agent.findings = []*nfconnfilterv1.Finding{warning}
	r.want(0, "warning  backlog: 1 connection waits\n         remedy: accept it\n"+
		"redis (engine criu): a snapshot can be expected to work, but look at 1 warning\n", "doctor", "redis")

	fault := &nfconnfilterv1.Finding{Level: "fault", Check: "pipe", What: "descriptor 1 <is> a pipe", Remedy: "redirect it"}
	r.agent.findings = []*nfconnfilterv1.Finding{fault, fault, warning}
	got := r.want(1, "fault    pipe: descriptor 1 <is> a pipe\n         remedy: redirect it\n"+
		"fault    pipe: descriptor 1 <is> a pipe\n         remedy: redirect it\n"+
		"warning  backlog: 1 connection waits\n         remedy: accept it\n"+
		"redis (engine criu): a snapshot cannot be expected to work: 2 faults\n", "doctor", "redis")
	if got.err != "" {
		t.Errorf("standard error %q, the result has said it", got.err)
	}
	r.agent.findings = r.agent.findings[1:2]
	r.want(1, `{"app":"redis","engine":"criu","ok":false,"findings":[{"level":"fault","check":"pipe","what":"descriptor 1 <is> a pipe","remedy":"redirect it"}]}`+"\n",
		"doctor", "redis", "-o", "json")
	r.want(2, "", "doctor")
}
