package filter

import (
	"fmt"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
)

// contradiction names the first record that no engine can have written, or that
// does not go with another one: the memory of it is damaged.
func contradiction(apps []AppRecord, conns []ConnRecord) error {
	byName, byVIP := map[string]*AppRecord{}, map[netip.Addr]*AppRecord{}
	for i := range apps {
		r := &apps[i]
		if !r.valid() || byName[r.Name] != nil {
			return fmt.Errorf("record of application %q is not valid", r.Name)
		}
		byName[r.Name] = r
		for _, v := range r.VIPs {
			if o := byVIP[v]; o != nil {
				return fmt.Errorf("records of applications %q and %q have the same VIP %v", o.Name, r.Name, v)
			}
			byVIP[v] = r
		}
	}
	known := make(map[ConnID]bool, len(conns))
	for i := range conns {
		r := &conns[i]
		a := byName[r.App]
		switch {
		case a == nil:
			return fmt.Errorf("record of connection %v %v belongs to application %q, which has none", r.ID.Local, r.ID.Remote, r.App)
		case byVIP[r.ID.Local.Addr()] != a:
			return fmt.Errorf("record of connection %v %v belongs to application %q, which has another VIP", r.ID.Local, r.ID.Remote, r.App)
		case !a.State.Captured() && (r.State == appstate.ConnectRmt || r.State == appstate.Restoring || r.State == appstate.Rst):
			return fmt.Errorf("record of connection %v %v is of one that is held, and its application runs", r.ID.Local, r.ID.Remote)
		case r.Spooled && r.spool() == nil:
			return fmt.Errorf("record of connection %v %v: octets that were acknowledged to its remote are missing", r.ID.Local, r.ID.Remote)
		case !r.valid() || known[r.ID]:
			return fmt.Errorf("record of connection %v %v is not valid", r.ID.Local, r.ID.Remote)
		}
		known[r.ID] = true
	}
	return nil
}

func (r *AppRecord) valid() bool {
	for _, v := range r.VIPs {
		if !v.IsValid() || v.Is4In6() {
			return false
		}
	}
	switch r.State {
	case appstate.Connected, appstate.SnapshotFreeze, appstate.SnapshotDone, appstate.RestoreStart, appstate.Restored:
		return r.Name != "" && len(r.VIPs) > 0
	case appstate.BlockData:
		return r.Name != "" && len(r.VIPs) > 0 && r.TakenBy != ""
	}
	return false // SNAPSHOTSTART is recorded as what was before it
}

func (r *ConnRecord) valid() bool {
	const most = 14 // scale (RFC 7323 section 2.3)
	return max(r.Opt.LocalScale, r.Opt.RemoteScale, r.Tr.ScaleLocal, r.Tr.ScaleSeen) <= most &&
		r.State > appstate.ConnNone && r.State < appstate.Removed && r.Role <= appstate.Active &&
		r.ID.Remote.IsValid() && !r.ID.Remote.Addr().Is4In6() && r.ID.Local.Addr().BitLen() == r.ID.Remote.Addr().BitLen()
}
