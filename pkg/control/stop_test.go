package control

import (
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// A daemon that is to end for an upgrade does not wait for clients who do not
// go on with a request or do not take their reply.
func TestServeEndsBesideStuckClients(t *testing.T) {
	f := &fake{status: &nfconnfilterv1.StatusReply{Node: strings.Repeat("n", 8<<20)}} // no socket's buffer holds it
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	stop := serveOn(t, l, f, nil)
	half := strings.TrimSuffix(post("Status", `{"app":"x"}`), `"x"}`)
	for _, text := range []string{"", "POST /nfconn", half, post("Status", `{"app":"x"}`)} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		if text != half && strings.HasSuffix(text, "}") { // its reply has begun
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	begin := time.Now()
	stop()
	if took := time.Since(begin); took > partingTimeout+2*time.Second {
		t.Errorf("it took %v to end", took)
	}
}
