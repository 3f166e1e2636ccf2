package filter_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// Records that no engine writes, or that contradict each other, are damage:
// they are named and nothing is taken up.
func TestContradictions(t *testing.T) {
	vip, other := netip.MustParseAddr("10.0.0.100"), netip.MustParseAddr("10.0.0.101")
	app := func(name string, state appstate.App, vips ...netip.Addr) filter.AppRecord {
		return filter.AppRecord{Name: name, VIPs: vips, State: state}
	}
	conn := func(change func(*filter.ConnRecord)) []filter.ConnRecord {
		r := filter.ConnRecord{App: "a", State: appstate.ConnectRmt, ID: filter.ConnID{Local: netip.AddrPortFrom(vip, 80), Remote: netip.MustParseAddrPort("10.0.0.2:4000")}}
		change(&r)
		return []filter.ConnRecord{r}
	}
	twice := conn(func(*filter.ConnRecord) {})
	held := []filter.AppRecord{app("a", appstate.SnapshotDone, vip), app("b", appstate.Connected, other)}
	for name, x := range map[string]struct {
		apps  []filter.AppRecord
		conns []filter.ConnRecord
		want  string
	}{
		"right":            {held, twice, ""},
		"no name":          {[]filter.AppRecord{app("", appstate.Connected, vip)}, nil, `"" is not valid`},
		"no VIP":           {[]filter.AppRecord{app("a", appstate.Connected)}, nil, `"a" is not valid`},
		"VIP of nothing":   {[]filter.AppRecord{app("a", appstate.Connected, netip.Addr{})}, nil, `"a" is not valid`},
		"no state":         {[]filter.AppRecord{app("a", appstate.Unknown, vip)}, nil, `"a" is not valid`},
		"SNAPSHOTSTART":    {[]filter.AppRecord{app("a", appstate.SnapshotStart, vip)}, nil, `"a" is not valid`},
		"no such state":    {[]filter.AppRecord{app("a", appstate.BlockData+1, vip)}, nil, `"a" is not valid`},
		"name twice":       {[]filter.AppRecord{app("a", appstate.Connected, vip), app("a", appstate.Connected, other)}, nil, `"a" is not valid`},
		"VIP twice":        {[]filter.AppRecord{app("a", appstate.Connected, vip), app("b", appstate.Connected, other, vip)}, nil, "the same VIP 10.0.0.100"},
		"whose":            {held, conn(func(r *filter.ConnRecord) { r.App = "c" }), "which has none"},
		"VIP of another":   {held, conn(func(r *filter.ConnRecord) { r.App = "b" }), "another VIP"},
		"without a state":  {held, conn(func(r *filter.ConnRecord) { r.State = appstate.ConnNone }), "is not valid"},
		"removed":          {held, conn(func(r *filter.ConnRecord) { r.State = appstate.Removed }), "is not valid"},
		"no such role":     {held, conn(func(r *filter.ConnRecord) { r.Role = 2 }), "is not valid"},
		"scale":            {held, conn(func(r *filter.ConnRecord) { r.Opt.RemoteScale = 15 }), "is not valid"},
		"families":         {held, conn(func(r *filter.ConnRecord) { r.ID.Remote = netip.MustParseAddrPort("[fd00::2]:4000") }), "is not valid"},
		"no application":   {nil, twice, "which has none"},
		"VIP of nobody":    {held, conn(func(r *filter.ConnRecord) { r.ID.Local = netip.MustParseAddrPort("10.0.0.102:80") }), "another VIP"},
		"no remote":        {held, conn(func(r *filter.ConnRecord) { r.ID.Remote = netip.AddrPort{} }), "is not valid"},
		"held and runs":    {[]filter.AppRecord{app("a", appstate.Restored, vip)}, twice, "and its application runs"},
		"connection twice": {held, append(conn(func(*filter.ConnRecord) {}), twice...), "is not valid"},
	} {
		e := filter.New(filter.Config{})
		var fx filter.Effects
		err := e.Load(1, x.apps, x.conns, func(filter.ConnID) bool { return true }, false, &fx)
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", name, err)
		}
		if used := e.Limits()[0].Used; err != nil && (used > 0 || len(fx.Notes)+len(fx.Sets)+len(fx.Records)+len(fx.Sends) > 0) {
			t.Errorf("%s: taken up", name)
		}
	}
}

// A connection that has ended meanwhile leaves nothing of its spool behind.
func TestForgottenSpool(t *testing.T) {
	vip := netip.MustParseAddr("10.0.0.100")
	apps := []filter.AppRecord{{Name: "a", VIPs: []netip.Addr{vip}, State: appstate.Restored}}
	conns := []filter.ConnRecord{{App: "a", State: appstate.Connect, Translated: true, Spooled: true, KeptAt: 1, RcvNxt: 4,
		Chunks: []filter.Chunk{{At: 1, Data: []byte("abc")}},
		ID:     filter.ConnID{Local: netip.AddrPortFrom(vip, 80), Remote: netip.MustParseAddrPort("10.0.0.2:4000")}}}
	e := filter.New(filter.Config{})
	var fx filter.Effects
	if err := e.Load(1, apps, conns, func(filter.ConnID) bool { return false }, false, &fx); err != nil {
		t.Fatal(err)
	}
	if n := len(fx.Records); n != 2 || !fx.Records[0].Unspool || fx.Records[1].Unspool || fx.Records[1].ID != conns[0].ID {
		t.Errorf("%+v", fx.Records)
	}
}
