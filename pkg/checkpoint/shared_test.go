package checkpoint

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Nodes whose snapshot stores are two directories learn it before anything is
// changed, and nothing stays in either.
func TestMigrateStoreNotShared(t *testing.T) {
	p := newPair(t, 3)
	shared := p.a[1].store
	p.a[1].store = store{t.TempDir()}
	for _, dry := range []bool{true, false} {
		_, err := p.a[0].migrate(t.Context(), &pb.AgentMigrateRequest{App: "redis", ToNode: "node-b", DryRun: dry}, false)
		if err == nil || !strings.Contains(err.Error(), "see that all nodes have the same directory there; nothing was changed") {
			t.Errorf("dry run %v: error %v", dry, err)
		}
		p.at(t, 0, control.StateConnected)
	}
	if strings.Contains(p.w[0].trace(), "SNAPSHOT") {
		t.Errorf("it was begun: %s", p.w[0].trace())
	}
	for _, a := range p.a {
		if left, _ := filepath.Glob(filepath.Join(a.store.dir, "redis", ".*")); len(left) > 0 {
			t.Errorf("left in a store: %v", left)
		}
	}
	p.a[1].store = shared
	if _, err := p.migrate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	p.at(t, 1, control.StateRestored)
	if left, _ := filepath.Glob(filepath.Join(shared.dir, "redis", ".*")); len(left) > 0 {
		t.Errorf("left in the store: %v", left)
	}
}
