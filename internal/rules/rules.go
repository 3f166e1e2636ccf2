// Package rules writes the packet rules of the filter and switches them.
//
// The iptables rules are written once, by Install, and never change while the filter runs. They refer to
// ipsets; what is queued for whom is changed by Manager.Apply, which adds and deletes set entries over
// netlink. A set change takes effect for the next packet and needs no rule reload.
//
// Six sets exist for each address family, named nfcf4-NAME and nfcf6-NAME:
//
//	vip   registered VIPs: SYN, FIN and RST are queued, with bypass
//	full  everything of the VIP is queued, both directions, with bypass
//	away  everything of the VIP is queued, both directions, without bypass
//	active hash:ip of VIPs in full or away, or with translated flows: the bulk of all others returns
//	      at the first rule; ICMP errors for the VIP are queued, with bypass
//	skip  (VIP, local port) that is never captured
//	flow  (remote address, remote port, VIP) of translated flows: queued without bypass
//
// "With bypass" means that packets pass when no process listens on the queue; without it they are dropped.
// Rules without bypass stand before those with it, so that a held or translated flow never bypasses.
//
// Five chains hold the rules: NFCF-IN (called from raw PREROUTING), NFCF-OUT and NFCF-RST (raw OUTPUT), NFCF-FWD
// (raw PREROUTING too) and NFCF-POST (mangle POSTROUTING). raw comes before connection tracking and mangle POSTROUTING
// after it, so that conntrack sees local numbers only and never a segment of a dying socket.
//
// NFCF-FWD does what NFCF-OUT does for applications in a network namespace behind the node: what these send
// comes in like packets of the network. It is theirs when it came by the device to which the node routes the
// VIP (match rpfilter); other packets with a VIP as their source are forged, and dropped.
//
// NFCF-RST is there while anything is away or translated and looks into no set: with the sets emptied by another
// program the kernel's RST for a held connection still comes to the filter, which takes it. RSTs of others pass.
//
// Fragments: only the first fragment holds ports, so later ones match neither skip nor flow; they match the
// sets that hold an address alone (away, full) and are queued as fragments, unless the kernel reassembles
// before raw PREROUTING, which it does as soon as connection tracking is in use in the namespace.
package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
)

// Chain names. Everything in these chains belongs to the filter.
const (
	ChainIn      = "NFCF-IN"   // called from raw PREROUTING
	ChainForward = "NFCF-FWD"  // called from NFCF-IN and raw PREROUTING
	ChainOut     = "NFCF-OUT"  // called from raw OUTPUT
	ChainReset   = "NFCF-RST"  // called from raw OUTPUT
	ChainPost    = "NFCF-POST" // called from mangle POSTROUTING
)

// Low bits that are or-ed into Config.Mark to say what an injected packet is.
const (
	MarkNoTrack uint32 = 1 // injected, not seen by connection tracking
	MarkTracked uint32 = 2 // injected, tracked
)

// Defaults of Config.
const (
	DefaultQueue   uint16 = 64
	DefaultMark    uint32 = 0x4e460000
	DefaultMask    uint32 = 0xffff0000
	DefaultMaxElem uint32 = 1048576

	smallMaxElem uint32 = 65536 // sets that hold VIPs or ports
)

// Config says how the rules look. The zero value of a field other than Queue means its default.
type Config struct {
	Queue   uint16 // number of the NFQUEUE
	Count   int    // number of queues; 0 and 1 are the same, more is not supported yet
	Mark    uint32 // marks of the filter's own packets, under Mask
	Mask    uint32
	MaxElem uint32 // size of the flow sets, in entries
	// LockDir is where iptables-legacy keeps its lock file when /run/xtables.lock cannot be opened, as by a
	// process that is not root. The nftables variant of iptables needs no lock.
	LockDir string

	// See Manager.Engage.
	idle bool // without the chain behind routing and the jumps for active VIPs
	near bool // without the jump for those of them that are behind the node
}

func (c Config) withDefaults() Config {
	if c.Count == 0 {
		c.Count = 1
	}
	if c.Mark == 0 && c.Mask == 0 {
		c.Mark, c.Mask = DefaultMark, DefaultMask
	}
	if c.MaxElem == 0 {
		c.MaxElem = DefaultMaxElem
	}
	return c
}

func (c Config) validate() error {
	switch {
	case c.Count != 1:
		return fmt.Errorf("rules: %d queues are configured but only one is supported yet: set count = 1 in [queue]", c.Count)
	case c.Mark == 0 || c.Mask == 0:
		return errors.New("rules: mark and mark_mask must both be set and not be 0, or both be left out")
	case c.Mark&^c.Mask != 0:
		return fmt.Errorf("rules: mark %#x has bits outside mark_mask %#x", c.Mark, c.Mask)
	case c.Mask&(MarkNoTrack|MarkTracked) != 0:
		return fmt.Errorf("rules: mark_mask %#x must leave the two lowest bits free", c.Mask)
	}
	return nil
}

// Set names one of the sets; each exists once for an address family.
type Set uint8

// The sets, as the package comment describes them.
const (
	VIP Set = iota
	Full
	Away
	Active
	Skip
	Flow
	numSets
)

var setNames = [numSets]string{"vip", "full", "away", "active", "skip", "flow"}

// AllSets returns every set.
func AllSets() []Set { return []Set{VIP, Full, Away, Active, Skip, Flow} }

// String is the set's name without its family prefix.
func (s Set) String() string {
	if s < numSets {
		return setNames[s]
	}
	return fmt.Sprintf("set(%d)", uint8(s))
}

func (s Set) typeName() string {
	switch s {
	case Skip:
		return "hash:ip,port"
	case Flow:
		return "hash:ip,port,ip"
	default:
		return "hash:ip"
	}
}

func (s Set) maxElem(cfg Config) uint32 {
	if s == Flow {
		return cfg.MaxElem
	}
	return smallMaxElem
}

// Change adds one entry to a set or deletes it. In VIP, Full, Away and Active the entry is IP, a VIP. In Skip
// it is the VIP IP and its TCP port Port. In Flow it is the remote's address IP and TCP port Port, and the
// VIP Peer. The family follows from IP; an IPv4-mapped IPv6 address counts as IPv4.
type Change struct {
	Set  Set
	Add  bool
	IP   netip.Addr
	Port uint16
	Peer netip.Addr
}

// normalize returns the change with plain addresses, or an error that names what does not fit its set.
func (c Change) normalize() (Change, error) {
	if c.Set >= numSets {
		return c, fmt.Errorf("rules: there is no set number %d", uint8(c.Set))
	}
	if !c.IP.IsValid() || c.IP.Zone() != "" {
		return c, fmt.Errorf("rules: set %s: %q is not an address that a set can hold", c.Set, c.IP)
	}
	c.IP = c.IP.Unmap()
	if c.IP.IsUnspecified() {
		return c, fmt.Errorf("rules: set %s: the unspecified address %s cannot be in a set", c.Set, c.IP)
	}
	if c.Set != Flow && c.Peer.IsValid() {
		return c, fmt.Errorf("rules: set %s holds no second address, got %s", c.Set, c.Peer)
	}
	if c.Set == Flow {
		if !c.Peer.IsValid() || c.Peer.Zone() != "" {
			return c, fmt.Errorf("rules: set flow: %q is not an address that a set can hold", c.Peer)
		}
		c.Peer = c.Peer.Unmap()
		if c.Peer.Is4() != c.IP.Is4() {
			return c, fmt.Errorf("rules: set flow: %s and %s are of different families", c.IP, c.Peer)
		}
	}
	if c.Set != Skip && c.Set != Flow && c.Port != 0 {
		return c, fmt.Errorf("rules: set %s holds no port, got %d", c.Set, c.Port)
	}
	return c, nil
}

// family is one address family's variant of the rules.
type family struct {
	v6       bool
	afi      uint8 // AF_INET or AF_INET6, as ipset and conntrack number it
	prefix   string
	iptables string // command; "-restore" is appended for the batch form
	icmp     string // protocol as iptables prints it
	icmpOpt  string // its match with the option that takes the type
	errTypes []icmpType
}

type icmpType struct {
	num  uint8
	name string
}

var (
	family4 = family{
		afi: 2, prefix: "nfcf4-", iptables: "iptables", icmp: "icmp", icmpOpt: "-m icmp --icmp-type",
		errTypes: []icmpType{{3, "destination unreachable"}, {11, "time exceeded"}, {12, "parameter problem"}},
	}
	family6 = family{
		v6: true, afi: 10, prefix: "nfcf6-", iptables: "ip6tables", icmp: "ipv6-icmp", icmpOpt: "-m icmp6 --icmpv6-type",
		errTypes: []icmpType{{1, "destination unreachable"}, {2, "packet too big"}, {3, "time exceeded"}, {4, "parameter problem"}},
	}
)

func families() []*family { return []*family{&family4, &family6} }

// index is the family's place in Manager.should.
func (f *family) index() int {
	if f.v6 {
		return 1
	}
	return 0
}

func (f *family) setName(s Set) string { return f.prefix + s.String() }

func (f *family) name() string {
	if f.v6 {
		return "IPv6"
	}
	return "IPv4"
}

// Manager switches the sets and looks after the rules that Install wrote. Its methods may be called from any
// goroutine; they work in the network namespace in which Install was called.
type Manager struct {
	iptables sync.Mutex // one change of the rules at a time; before mu

	mu     sync.Mutex // the sets' socket: packets wait for it
	cfg    Config
	ns     *netns
	sets   *setConn
	should [2]contents         // of IPv4 and IPv6, see RepairSets
	want   map[string][]string // what Verify expects: rule lines of a chain as iptables prints them
	v6     error               // why IPv6 is not filtered; nil when it is
}

// Install creates the sets that are missing and writes the rules where they are missing or differ. What is
// there already stays, set contents included, so that a restarted filter opens no gap; chains that differ are
// replaced in one transaction. It works in the calling thread's network namespace.
//
// Without a working ip6tables only IPv4 is filtered, see Manager.IPv6. Errors name what is missing: the
// package iptables, a capability, or a kernel feature.
func Install(cfg Config) (*Manager, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	ns, err := currentNetns()
	if err != nil {
		return nil, err
	}
	sets, err := dialSets()
	if err != nil {
		return nil, errors.Join(err, ns.close())
	}
	m := &Manager{cfg: cfg, ns: ns, sets: sets, want: map[string][]string{}}
	if err := m.install(&family4); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.v6 = m.install(&family6)
	if err := m.adoptContents(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Manager) install(f *family) error {
	if err := m.ensureSets(f); err != nil {
		return err
	}
	return installRules(f, m.cfg, m.want)
}

func (m *Manager) ensureSets(f *family) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range AllSets() {
		if err := m.sets.ensure(f, s, m.cfg); err != nil {
			return err
		}
	}
	return nil
}

// IPv6 returns nil when IPv6 is filtered too, otherwise why it is not.
func (m *Manager) IPv6() error { return m.v6 }

// Apply makes the changes, in their order. Adding what is there and deleting what is not there are no
// errors. Entries of one set that follow one another share a netlink message, so sort large lists by set. On
// an error the changes before the failing batch, and possibly some of that batch, are in effect; repeating
// the call is safe.
func (m *Manager) Apply(changes []Change) error {
	norm := make([]Change, len(changes))
	for i, c := range changes {
		n, err := c.normalize()
		if err != nil {
			return err
		}
		if n.IP.Is6() && m.v6 != nil {
			return fmt.Errorf("rules: %s cannot be filtered, IPv6 rules are not installed: %w", n.IP, m.v6)
		}
		norm[i] = n
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range norm {
		m.note(c)
	}
	return m.sets.apply(norm)
}

// List returns the entries of a set, of both families, as changes that would add them. Their order is the
// kernel's.
func (m *Manager) List(s Set) ([]Change, error) {
	if s >= numSets {
		return nil, fmt.Errorf("rules: there is no set number %d", uint8(s))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Change
	for _, f := range m.active() {
		list, err := m.sets.list(f, s, f.setName(s))
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}

// Clear removes every entry of the named sets.
func (m *Manager) Clear(sets ...Set) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range sets {
		if s >= numSets {
			return fmt.Errorf("rules: there is no set number %d", uint8(s))
		}
		for _, f := range m.active() {
			m.should[f.index()][s] = nil
			if err := m.sets.flush(f, f.setName(s)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Manager) active() []*family {
	if m.v6 != nil {
		return []*family{&family4}
	}
	return families()
}

// Verify returns one line for each of our sets, chains, rules and jumps that is missing, altered, or no longer
// in the first place of its hook; none means that all is as Install left it. Install repairs what it reports.
// The contents of the sets are RepairSets' affair.
func (m *Manager) Verify() ([]string, error) {
	m.iptables.Lock()
	defer m.iptables.Unlock()
	out, err := m.verifySets()
	if err != nil {
		return nil, err
	}
	err = m.ns.do(func() error {
		for _, f := range m.active() {
			lines, err := verifyRules(f, m.cfg, m.want)
			if err != nil {
				return err
			}
			out = append(out, lines...)
		}
		return nil
	})
	return out, err
}

func (m *Manager) verifySets() ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, f := range m.active() {
		for _, s := range AllSets() {
			ok, err := m.sets.exists(f, s)
			if err != nil {
				return nil, err
			}
			if !ok {
				out = append(out, fmt.Sprintf("%s: set %s is missing", f.name(), f.setName(s)))
			}
		}
	}
	return out, nil
}

// Close gives back the manager's sockets. Rules and sets stay, so that an application that is away keeps
// being held while the filter is restarted; Purge removes them.
func (m *Manager) Close() error {
	m.iptables.Lock()
	defer m.iptables.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	return errors.Join(m.sets.close(), m.ns.close())
}
