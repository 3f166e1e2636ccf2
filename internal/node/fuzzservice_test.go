package node

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// loop carries requests out as Run does, with a clock of its own and no edges.
type loop struct {
	t   *testing.T
	n   *Node
	e   *filter.Engine
	fx  filter.Effects
	now filter.Time
	id  uint64
}

func (l *loop) do(_ context.Context, body any) (any, error) {
	l.id++
	l.step(filter.Event{Request: &filter.Request{ID: l.id, Body: body}})
	for range 2000 {
		for _, r := range l.fx.Replies {
			if r.ID == l.id {
				l.fx.Reset()
				return r.Body, r.Err
			}
		}
		l.fx.Reset()
		d := l.e.NextDeadline()
		if d == 0 {
			l.t.Fatalf("%T is never answered", body)
		}
		l.now = max(l.now, d)
		l.step(filter.Event{})
	}
	return nil, context.DeadlineExceeded
}

func (l *loop) step(ev filter.Event) {
	l.now += 1000
	l.e.Step(l.now, ev, &l.fx)
	for _, x := range l.fx.Notes {
		if l.n.states[x.App] = x.State.String(); x.State.String() == "" {
			delete(l.n.states, x.App)
		}
	}
	for _, r := range l.fx.Records {
		if r.App != nil && len(r.App.Name) > 255 {
			l.t.Fatalf("an application with a name of %d octets is recorded", len(r.App.Name))
		}
	}
}

// FuzzService gives lines of METHOD and JSON, one request after the other, to
// the filter's service with an engine behind it. Each is answered, or refused in
// Connect's words, and never by a fault of ours.
func FuzzService(f *testing.F) {
	const register = `Register {"app":"redis","vips":["10.0.0.100","fd00::100"],"includePorts":[6379]}` + "\n"
	const sockets = `"sockets":[{"local":"10.0.0.100:6379","remote":"10.0.0.2:4000","state":"ESTABLISHED","passive":true,"hasInfo":true,"optTimestamps":true,"sndWscale":99,"bytesAcked":"18446744073709551615"},{"local":"[fd00::100]:6379","remote":"[fd00::2]:1","state":"CLOSE_WAIT"}],"listenPorts":[6379]`
	for _, text := range []string{
		register + "Status {}\nGetConnCount {\"app\":\"redis\"}\nGetConnInfo {\"app\":\"redis\"}\nUnregister {\"app\":\"redis\",\"force\":true}",
		register + `SnapshotStart {"app":"redis","leaveOut":true,"learnTimeoutMs":"1",` + sockets + "}\n" +
			"SnapshotFreeze {\"app\":\"redis\",\"boundary\":\"turn\",\"quietMs\":\"50\",\"passCloses\":true}\nSeal {\"app\":\"redis\"}\n" +
			"SnapshotDone {\"app\":\"redis\",\"snapshotId\":\"s\",\"force\":true}\nRestoreStart {\"app\":\"redis\",\"ip\":\"10.0.0.100\",\"snapshotId\":\"s\"}\n" +
			"RestoreConn {\"app\":\"redis\",\"kind\":\"syn\",\"conns\":[{\"local\":\"10.0.0.100:6379\",\"remote\":\"10.0.0.2:4000\"}]}\n" +
			"RestoreAbort {\"app\":\"redis\"}\nRestoreStart {\"app\":\"redis\"}\nRestored {\"app\":\"redis\",\"resetMissing\":true}",
		register + "SnapshotStart {\"app\":\"redis\"}\nSnapshotFreeze {\"app\":\"redis\"}\nSeal {\"app\":\"redis\"}\nSnapshotDone {\"app\":\"redis\",\"snapshotId\":\"s\",\"force\":true}\n" +
			"Handover {\"app\":\"redis\",\"toNode\":\"b\"}\nHandback {\"app\":\"redis\",\"fromNode\":\"b\",\"structures\":\"ogEBAkA=\"}\nRestoreStart {\"app\":\"redis\",\"oldNode\":\"b\"}\nRestoreAbort {\"app\":\"redis\"}\nRelease {\"app\":\"redis\"}",
		register + `Adopt {"app":"redis","listedAtNs":"-9223372036854775808",` + sockets + "}\nSnapshotStart {\"app\":\"redis\"}\nSnapshotAbort {\"app\":\"redis\"}\nWait {\"app\":\"redis\",\"state\":\"RESTORED\"}",
		`SnapshotStart {"app":"redis","learnTimeoutMs":"9223372036854775807"}` + "\n" + `SnapshotFreeze {"quietMs":"-1"}` + "\nNothing {}\nSeal [\nWait {\"app\":\"\",\"state\":\"\"}",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n := &Node{states: map[string]string{}, changed: make(chan struct{})}
		n.cfg.Store(&config.Config{Apps: map[string]*config.App{"redis": {Name: "redis"}}})
		n.foreign.here = func(netip.Addr) (string, bool, error) { return "", false, nil }
		l := &loop{t: t, n: n, e: filter.New(filter.Config{MaxConns: 100}), now: 1e9}
		h := control.FilterHandler(service{n, l.do})
		for i, line := range strings.Split(text, "\n") {
			if method, body, _ := strings.Cut(line, " "); i < 20 && isMethod(method) {
				ask(t, h, method, body)
			}
		}
	})
}

// methods of the service.
var methods = []string{"Register", "Unregister", "Adopt", "SnapshotStart", "SnapshotFreeze", "Seal", "SnapshotDone", "SnapshotAbort",
	"RestoreStart", "RestoreConn", "Restored", "RestoreAbort", "Handover", "Handback", "Release", "GetConnCount", "GetConnInfo", "Status", "Wait"}

func isMethod(name string) bool { return slices.Contains(methods, name) }

// ask sends one request and judges the answer.
func ask(t *testing.T, h http.Handler, method, body string) {
	ctx, cancel := context.WithCancel(context.Background())
	if cancel(); method != "Wait" { // which would wait
		ctx = context.Background()
	}
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/"+nfconnfilterv1connect.FilterName+"/"+method, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var reply struct {
		Code    connect.Code
		Message string
	}
	if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
		t.Fatalf("%s %s: %v in %q", method, body, err, w.Body)
	}
	switch {
	case w.Code == http.StatusOK && reply.Code == 0:
	case w.Code == http.StatusOK, reply.Message == "", reply.Code == connect.CodeInternal, reply.Code == connect.CodeUnknown:
		t.Fatalf("%s %s: %d %s", method, body, w.Code, w.Body)
	}
}

// TestMethods: the fuzzer knows every method.
func TestMethods(t *testing.T) {
	typ := reflect.TypeFor[nfconnfilterv1connect.FilterHandler]()
	for i := range typ.NumMethod() {
		if m := typ.Method(i).Name; !isMethod(m) {
			t.Errorf("%s is not fuzzed", m)
		}
	}
	if typ.NumMethod() != len(methods) {
		t.Errorf("%d methods, %d are fuzzed", typ.NumMethod(), len(methods))
	}
}
