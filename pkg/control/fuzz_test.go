package control

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
	"github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1/nfconnfilterv1connect"
)

// backend answers some methods with what it was asked, fails at some, and has
// not got the others. reached tells that a request has come through.
type backend struct {
	nfconnfilterv1connect.UnimplementedFilterHandler
	reached bool
}

func (b *backend) echo(app string) (*connect.Response[nfconnfilterv1.AppReply], error) {
	b.reached = true
	return connect.NewResponse(&nfconnfilterv1.AppReply{App: app, Notes: []string{app}}), nil
}

func (b *backend) Register(_ context.Context, r *connect.Request[nfconnfilterv1.RegisterRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	return b.echo(r.Msg.App + strings.Join(r.Msg.Vips, ","))
}

func (b *backend) RestoreConn(_ context.Context, r *connect.Request[nfconnfilterv1.RestoreConnRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	for _, c := range r.Msg.Conns {
		_ = c.Local + c.Remote
	}
	return b.echo(r.Msg.App)
}

func (b *backend) SnapshotStart(_ context.Context, r *connect.Request[nfconnfilterv1.SnapshotStartRequest]) (*connect.Response[nfconnfilterv1.LearnReply], error) {
	b.reached = true
	return connect.NewResponse(&nfconnfilterv1.LearnReply{App: r.Msg.App, Learned: uint32(len(r.Msg.Sockets))}), nil
}

func (b *backend) Seal(_ context.Context, r *connect.Request[nfconnfilterv1.SealRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	b.reached = true
	return nil, Error(connect.CodeFailedPrecondition, r.Msg.App, r.Msg.App, "refused: "+r.Msg.App, r.Msg.App)
}

func (b *backend) Wait(ctx context.Context, r *connect.Request[nfconnfilterv1.WaitRequest]) (*connect.Response[nfconnfilterv1.AppReply], error) {
	b.reached = true
	return nil, errors.New(r.Msg.State)
}

// agentBackend is an agent with one method that answers.
type agentBackend struct {
	nfconnfilterv1connect.UnimplementedAgentHandler
}

func (agentBackend) Stop(_ context.Context, r *connect.Request[nfconnfilterv1.AgentStopRequest]) (*connect.Response[nfconnfilterv1.AgentReply], error) {
	return connect.NewResponse(&nfconnfilterv1.AgentReply{App: r.Msg.App}), nil
}

// procedures are those of both services, and one that is not there.
func procedures() []string {
	out := []string{"/nothing"}
	for service, typ := range map[string]reflect.Type{
		nfconnfilterv1connect.FilterName: reflect.TypeFor[nfconnfilterv1connect.FilterHandler](),
		nfconnfilterv1connect.AgentName:  reflect.TypeFor[nfconnfilterv1connect.AgentHandler](),
	} {
		for i := range typ.NumMethod() {
			out = append(out, "/"+service+"/"+typ.Method(i).Name)
		}
	}
	slices.Sort(out)
	return out
}

var contentTypes = []string{"application/json", "application/proto", "application/grpc", "application/grpc+json", "application/grpc-web+proto", "application/connect+json", "text/plain", ""}

// FuzzHandler gives any octets to any method in any of the protocols. Nothing
// panics, and every caller gets a reply or an error in its protocol's words.
func FuzzHandler(f *testing.F) {
	all := procedures()
	at := func(method string) uint8 {
		return uint8(slices.Index(all, "/"+nfconnfilterv1connect.FilterName+"/"+method))
	}
	msg, err := proto.Marshal(&nfconnfilterv1.SnapshotStartRequest{App: "redis", Sockets: []*nfconnfilterv1.Socket{{Local: "10.0.0.1:1", HasInfo: true, BytesAcked: 1 << 40}}, ListenPorts: []uint32{1}})
	if err != nil {
		f.Fatal(err)
	}
	framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
	f.Add(at("SnapshotStart"), uint8(1), "", false, msg)
	f.Add(at("SnapshotStart"), uint8(2), "", false, framed)
	f.Add(at("SnapshotStart"), uint8(4), "1S", false, framed)
	f.Add(at("SnapshotStart"), uint8(2), "", false, []byte{1, 255, 255, 255, 255, 0})
	f.Add(at("GetConnInfo"), uint8(3), "", false, []byte("0"))
	f.Add(at("Register"), uint8(0), "1000", false, []byte(`{"app":"a","vips":["\u0000"],"includePorts":["1",2],"x":{}}`))
	f.Add(at("Seal"), uint8(0), "", true, []byte(`{"app":"\ud83d\ude00"}`))
	f.Add(at("Wait"), uint8(5), "-1", false, []byte(`{"state":7}`))
	f.Add(at("Status"), uint8(7), "99999999999999999999", true, []byte(`{`))
	f.Add(uint8(slices.Index(all, "/"+nfconnfilterv1connect.AgentName+"/Stop")), uint8(0), "", false, []byte(`{"discard":true}`))
	f.Add(uint8(slices.Index(all, "/nothing")), uint8(0), "", false, []byte(`{}`))
	f.Fuzz(func(t *testing.T, procedure, kind uint8, timeout string, zip bool, body []byte) {
		b := &backend{}
		mux := http.NewServeMux()
		mux.Handle("/"+nfconnfilterv1connect.FilterName+"/", FilterHandler(b))
		mux.Handle("/"+nfconnfilterv1connect.AgentName+"/", AgentHandler(agentBackend{}))
		path := all[int(procedure)%len(all)]
		content := contentTypes[int(kind)%len(contentTypes)]
		r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body))
		r.Header.Set("Content-Type", content)
		if timeout != "" {
			r.Header.Set("Connect-Timeout-Ms", timeout)
			r.Header.Set("Grpc-Timeout", timeout)
		}
		if zip {
			r.Header.Set("Content-Encoding", "gzip")
			r.Header.Set("Grpc-Encoding", "gzip")
			if len(body)%2 == 0 { // else it is not what it says
				var z bytes.Buffer
				w := gzip.NewWriter(&z)
				_, _ = w.Write(body)
				_ = w.Close()
				r = withBody(r, z.Bytes())
			}
		}
		w := httptest.NewRecorder()
		(&gate{next: mux, errors: connect.NewErrorWriter()}).ServeHTTP(w, r)
		judge(t, b, path, content, w)
	})
}

func withBody(r *http.Request, body []byte) *http.Request {
	n := httptest.NewRequest(r.Method, r.URL.Path, bytes.NewReader(body))
	n.Header = r.Header
	return n
}

// judge looks at an answer.
func judge(t *testing.T, b *backend, path, content string, w *httptest.ResponseRecorder) {
	res := w.Result()
	if said := fmt.Sprint(w.Body, res.Trailer, res.Header); strings.Contains(said, "internal error: ") {
		t.Fatalf("%s %s made the handler panic: %s", path, content, said)
	}
	switch {
	case path == "/nothing" && res.StatusCode == http.StatusNotFound:
	case res.StatusCode == http.StatusUnsupportedMediaType && !b.reached: // no protocol of ours
	case strings.HasPrefix(content, "application/grpc"):
		status := res.Trailer.Get("Grpc-Status") + res.Header.Get("Grpc-Status")
		if strings.Contains(content, "web") && status == "" { // in the body's last frame
			if !bytes.Contains(bytes.ToLower(w.Body.Bytes()), []byte("grpc-status: ")) {
				t.Fatalf("%s %s: no status in %q", path, content, w.Body)
			}
			return
		}
		code, err := strconv.Atoi(status)
		// Half a message is INTERNAL in gRPC's own words.
		if err != nil || code > 16 || code == int(connect.CodeInternal) && b.reached {
			t.Fatalf("%s %s: status %q, %v", path, content, status, res.Trailer)
		}
	case res.StatusCode == http.StatusOK:
		if !b.reached && !strings.HasSuffix(path, "Agent/Stop") && !strings.HasPrefix(content, "application/connect") {
			t.Fatalf("%s answered %q without being asked", path, w.Body)
		}
	default:
		var e struct {
			Code    connect.Code
			Message string
		}
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Code == 0 || e.Code == connect.CodeInternal {
			t.Fatalf("%s %s: %d %q, %v", path, content, res.StatusCode, w.Body, err)
		}
	}
}
