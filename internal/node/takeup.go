package node

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/internal/rules"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// legacy is what an earlier filter left in the journal.
type legacy struct {
	apps     []filter.AppRecord
	conns    []filter.ConnRecord
	rebooted bool
	boot     string // the present one
}

var bootKey = []byte("boot")

// app reads the record of an application; the key is its name.
func (l *legacy) app(k, v []byte) error {
	var r filter.AppRecord
	if err := decode(v, &r); err != nil {
		return err
	}
	if string(k) != r.Name {
		return fmt.Errorf("the record of application %q is one of %q", k, r.Name)
	}
	l.apps = append(l.apps, r)
	return nil
}

// conn reads the record of a connection.
func (l *legacy) conn(k, v []byte) error {
	var r filter.ConnRecord
	err := decode(v, &r)
	if err == nil {
		r.ID, err = connOf(k)
	}
	if err != nil {
		return err
	}
	l.conns = append(l.conns, r)
	return nil
}

// openJournal opens the journal and reads what an earlier filter left in it.
func (n *Node) openJournal(dir string) (l legacy, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return l, err
	}
	path := filepath.Join(dir, "journal.db")
	if n.journal, err = journal.Open(path); err != nil {
		return l, err
	}
	before := ""
	chunks := map[filter.ConnID][]filter.Chunk{}
	err = errors.Join(
		n.journal.Read(journal.Spool, func(k, v []byte) error {
			id, serial, at, err := chunkOf(k)
			n.chunks = max(n.chunks, serial)
			chunks[id] = append(chunks[id], filter.Chunk{At: at, Data: bytes.Clone(v)})
			return err
		}),
		n.journal.Read(journal.Apps, l.app),
		n.journal.Read(journal.Conns, l.conn),
		n.journal.Read(journal.Meta, func(k, v []byte) error {
			if string(k) == string(bootKey) {
				before = string(v)
			}
			return nil
		}))
	if err != nil {
		return l, fmt.Errorf("%w: %s: %w; move it away to go on without what was held", journal.ErrDamaged, path, err)
	}
	for i := range l.conns {
		r := &l.conns[i]
		r.Chunks = chunks[r.ID]
		delete(chunks, r.ID)
	}
	for id := range chunks { // their connection is gone
		n.unsaved = append(n.unsaved, journal.Entry{Table: journal.Spool, Key: spoolKey(id), Prefix: true})
	}
	if l.boot, err = bootID(); err != nil {
		return l, err
	}
	if l.rebooted = before != "" && before != l.boot; before != l.boot { // written with what is taken up
		n.unsaved = append(n.unsaved, journal.Entry{Table: journal.Meta, Key: bootKey, Value: []byte(l.boot)})
	}
	return l, nil
}

// flowKey names a translated flow as the set does.
type flowKey struct {
	remote netip.AddrPort
	vip    netip.Addr
}

// takeUp goes on where an earlier filter stopped: its records and the sets that
// it left. Sets are the kernel's memory: a translated flow that they do not
// hold has ended.
func (n *Node) takeUp(l legacy) error {
	listed := map[rules.Set][]rules.Change{}
	for _, s := range rules.AllSets() {
		list, err := n.rules.List(s)
		if err != nil {
			return err
		}
		listed[s] = list
	}
	flows := map[flowKey]bool{}
	for _, c := range listed[rules.Flow] {
		flows[flowKey{netip.AddrPortFrom(c.IP, c.Port), c.Peer}] = true
	}
	// A VIP that is still captured whole: the filter ended when the connections were
	// recorded as re-established and not all in the set yet.
	away := map[netip.Addr]bool{}
	for _, c := range listed[rules.Away] {
		away[c.IP] = true
	}
	known := func(id filter.ConnID) bool {
		return flows[flowKey{id.Remote, id.Local.Addr()}] || away[id.Local.Addr()]
	}
	if err := n.engine.Load(now(), l.apps, l.conns, known, l.rebooted, &n.fx); err != nil {
		return fmt.Errorf("%w: %w; move journal.db away to go on without what was held", journal.ErrDamaged, err)
	}
	wanted := map[filter.SetChange]bool{}
	for _, c := range n.fx.Sets {
		wanted[c] = true
	}
	n.clearSets(l.apps, listed, wanted)
	n.takeUpConfigured(listed[rules.VIP], wanted)
	n.flush()
	if err := n.save(); err != nil {
		return err
	}
	n.engaged.Store(int32(len(n.active)))
	n.disengage()
	return nil
}

// clearSets has everything taken out of the sets that no record explains. A VIP
// that was away and of which there is no record stays blocked, so that nobody
// answers its remotes with RST, until the operator decides.
func (n *Node) clearSets(apps []filter.AppRecord, listed map[rules.Set][]rules.Change, wanted map[filter.SetChange]bool) {
	blocked, recorded := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, a := range apps {
		for _, v := range a.VIPs {
			recorded[v] = true
		}
	}
	for _, c := range listed[rules.Away] {
		if !recorded[c.IP] && !wanted[filter.SetChange{Set: filter.SetAway, Add: true, IP: c.IP}] {
			blocked[c.IP] = true
			n.engine.Block(c.IP)
			n.log.Error("an application on this VIP was away when an earlier filter ended, and there is no record of it; its connections are lost, and its traffic is dropped until 'ckptctl start' brings it up anew or 'nfconnfilter rules --purge' removes the rules", "vip", c.IP)
		}
	}
	lost := 0
	for s, set := range setOf {
		for _, c := range listed[set] {
			w := filter.SetChange{Set: filter.Set(s), Add: true, IP: c.IP, Port: c.Port, Peer: c.Peer}
			switch {
			case wanted[w]:
				continue
			case set == rules.Active && blocked[c.IP]:
				n.active[c.IP] = true
				continue
			case set == rules.Away && blocked[c.IP], set == rules.VIP: // see takeUpConfigured
				continue
			case set == rules.Flow:
				lost++
			}
			w.Add = false
			n.fx.Sets = append(n.fx.Sets, w)
		}
	}
	if lost > 0 {
		n.log.Error("there is no record of translated connections; they will be reset when either side speaks", "connections", lost)
	}
}

// takeUpConfigured registers applications that ran and of which there is no
// record: of those nothing needs to be known.
func (n *Node) takeUpConfigured(vips []rules.Change, wanted map[filter.SetChange]bool) {
	up := map[netip.Addr]bool{}
	for _, c := range vips {
		up[c.IP] = !wanted[filter.SetChange{Set: filter.SetVIP, Add: true, IP: c.IP}]
	}
	cfg := n.cfg.Load()
	for _, a := range cfg.Apps {
		if len(a.VIPs) == 0 || !up[a.VIPs[0]] || n.engine.Blocked(a.VIPs[0]) {
			continue
		}
		n.step(filter.Event{Request: &filter.Request{Body: registerApp(cfg, a)}})
		n.log.Info("taken up from an earlier filter", "app", a.Name)
	}
}
