package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// entry is one element of a set, small: there is one for every translated flow.
// IPv4 addresses are mapped ones.
type entry struct {
	ip, peer [16]byte
	port     uint16
}

func entryOf(c Change) entry {
	e := entry{ip: c.IP.As16(), port: c.Port}
	if c.Set == Flow {
		e.peer = c.Peer.As16()
	}
	return e
}

func (e entry) change(s Set, add bool) Change {
	c := Change{Set: s, Add: add, IP: netip.AddrFrom16(e.ip).Unmap(), Port: e.port}
	if s == Flow {
		c.Peer = netip.AddrFrom16(e.peer).Unmap()
	}
	return c
}

// contents is what should be in the sets of one family.
type contents [numSets]map[entry]struct{}

// note follows a change, made or not: what fails is tried again by whoever wants it.
func (m *Manager) note(c Change) {
	f := &family4
	if c.IP.Is6() {
		f = &family6
	}
	set := &m.should[f.index()][c.Set]
	if !c.Add {
		delete(*set, entryOf(c))
		return
	}
	if *set == nil {
		*set = map[entry]struct{}{}
	}
	(*set)[entryOf(c)] = struct{}{}
}

// adoptContents takes what is in the sets for what should be there.
func (m *Manager) adoptContents() error {
	for _, f := range m.active() {
		for _, s := range AllSets() {
			list, err := m.sets.list(f, s, f.setName(s))
			if err != nil {
				return err
			}
			for _, c := range list {
				m.note(c)
			}
		}
	}
	return nil
}

// RepairSets compares what is in the sets with what Apply put there, adds what is missing and takes out what
// is not ours. It returns one line for each set that differed. The sets of VIPs and ports, a few entries each,
// are read whole; of the flows, which may be a million, the kernel is asked for their number alone, and only
// when that is wrong are they read too. So it may be called every second. No notification tells of changes in
// a set.
func (m *Manager) RepairSets() ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []string
	var errs []error
	for _, f := range m.active() {
		for _, s := range AllSets() {
			line, err := m.repairSet(f, s)
			if line != "" {
				found = append(found, line)
			}
			errs = append(errs, err)
		}
	}
	return found, errors.Join(errs...)
}

func (m *Manager) repairSet(f *family, s Set) (string, error) {
	want, name := m.should[f.index()][s], f.setName(s)
	if s == Flow {
		n, err := m.sets.count(f, name)
		if err != nil || n == len(want) {
			return "", err
		}
	}
	list, err := m.sets.list(f, s, name)
	if err != nil {
		return "", err
	}
	there, foreign := 0, []Change(nil)
	var have map[entry]struct{}
	for _, c := range list {
		e := entryOf(c)
		if _, ok := want[e]; !ok {
			foreign = append(foreign, e.change(s, false))
			continue
		}
		if have == nil {
			have = make(map[entry]struct{}, len(list))
		}
		have[e] = struct{}{}
		there++
	}
	if there == len(want) && len(foreign) == 0 {
		return "", nil
	}
	missing := make([]Change, 0, len(want)-there)
	for e := range want {
		if _, ok := have[e]; !ok {
			missing = append(missing, e.change(s, true))
		}
	}
	line := fmt.Sprintf("%s: set %s lacked %d of %d entries and had %d that are not ours", f.name(), name, len(missing), len(want), len(foreign))
	return line, errors.Join(m.sets.apply(missing), m.sets.apply(foreign))
}

// Numbers of include/uapi/linux/netfilter/ipset/ip_set.h.
const (
	attrFlags      = 6
	attrElements   = 24
	flagListHeader = 1 << 2
)

// count asks for the number of entries. The kernel counts them, and sends none.
func (s *setConn) count(f *family, name string) (int, error) {
	b := putBE32(putString(s.header(f), attrSetName, name), attrFlags, flagListHeader)
	msgs, err := s.do(cmdList, netlink.Dump, b)
	if err != nil {
		return 0, setErr("counting", name, err)
	}
	for _, m := range msgs {
		for a := range attrs(m.Data, 4) {
			if a.typ != attrData {
				continue
			}
			for d := range attrs(a.data, 0) {
				if d.typ == attrElements && len(d.data) == 4 {
					return int(binary.BigEndian.Uint32(d.data)), nil
				}
			}
		}
	}
	return 0, fmt.Errorf("rules: counting ipset %s: %w: the kernel does not tell the number of entries", name, unix.EPROTO)
}
