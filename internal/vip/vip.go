// Package vip adds, removes and announces the virtual addresses that move between nodes. All functions work in the
// calling thread's network namespace; a caller that entered another one has locked its goroutine to the thread.
package vip

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Add adds an address to an interface as a host address: IPv4 with /32, IPv6 with /128, without duplicate address
// detection (RFC 4862, section 5.4), which would delay its use, and deprecated (preferred lifetime 0, section 5.5.4) so
// that no connection chooses it as its source unasked. That the interface has it already is no error; an address on
// another interface of the namespace is one. It needs CAP_NET_ADMIN.
func Add(iface string, addr netip.Addr) error {
	addr, err := check(addr)
	if err != nil {
		return err
	}
	link, err := linkByName(iface)
	if err != nil {
		return err
	}
	on, ok, err := Has(addr)
	switch {
	case err != nil:
		return err
	case ok && on == iface:
		return nil
	case ok:
		return fmt.Errorf("vip: %s is on interface %s already, not on %s: remove it there (ip address del %s dev %s) or "+
			"name that interface in the configuration", addr, on, iface, addr, on)
	}
	if err := netlink.AddrAdd(link, hostAddr(addr)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("vip: add %s to interface %s: %w%s", addr, iface, err, remedy(err))
	}
	return nil
}

// Remove takes an address from an interface, whatever its prefix length. That it is not there is no error, but an
// unknown interface is. Connections of the address stay, and are cut off.
func Remove(iface string, addr netip.Addr) error {
	addr, err := check(addr)
	if err != nil {
		return err
	}
	link, err := linkByName(iface)
	if err != nil {
		return err
	}
	found, err := addrs(link, addr)
	if err != nil {
		return err
	}
	for _, a := range found {
		// Only the prefix identifies it; flags and lifetimes do not.
		err := netlink.AddrDel(link, &netlink.Addr{IPNet: a.IPNet})
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("vip: remove %s from interface %s: %w%s", addr, iface, err, remedy(err))
		}
	}
	return nil
}

// Has tells whether an interface of the namespace has the address, and which.
func Has(addr netip.Addr) (iface string, ok bool, err error) {
	addr, err = check(addr)
	if err != nil {
		return "", false, err
	}
	found, err := addrs(nil, addr)
	if err != nil || len(found) == 0 {
		return "", false, err
	}
	link, err := netlink.LinkByIndex(found[0].LinkIndex)
	if err != nil {
		return "", false, fmt.Errorf("vip: interface %d, which has %s: %w", found[0].LinkIndex, addr, err)
	}
	return link.Attrs().Name, true, nil
}

// Route tells by which interface packets to the address leave the namespace; "" when it is the namespace's own.
func Route(addr netip.Addr) (iface string, err error) {
	addr, err = check(addr)
	if err != nil {
		return "", err
	}
	routes, err := netlink.RouteGet(addr.AsSlice())
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || err == nil && len(routes) == 0 {
		return "", fmt.Errorf("vip: there is no route to %s: add one by the device that leads to it (ip route add %s dev DEVICE)", addr, addr)
	}
	if err != nil {
		return "", fmt.Errorf("vip: route to %s: %w%s", addr, err, remedy(err))
	}
	if routes[0].Type == unix.RTN_LOCAL {
		return "", nil
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("vip: interface %d, by which %s is reached: %w", routes[0].LinkIndex, addr, err)
	}
	return link.Attrs().Name, nil
}

// check refuses what cannot be a virtual address and folds the IPv4-mapped form.
func check(addr netip.Addr) (netip.Addr, error) {
	a := addr.Unmap()
	switch {
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return a, fmt.Errorf("vip: %s is no unicast address: correct it in the configuration", addr)
	case a.Is6() && a.IsLinkLocalUnicast(), a.Zone() != "":
		return a, fmt.Errorf("vip: %s is link-local: choose a global or unique local address", addr)
	}
	return a, nil
}

// listTries bounds the repetition of lists that changed while the kernel made them.
const listTries = 8

// addrs returns the entries for the address on the link, or on any when link is nil.
func addrs(link netlink.Link, addr netip.Addr) ([]netlink.Addr, error) {
	family := netlink.FAMILY_V6
	if addr.Is4() {
		family = netlink.FAMILY_V4
	}
	var (
		list []netlink.Addr
		err  error
	)
	for range listTries {
		if list, err = netlink.AddrList(link, family); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("vip: list addresses: %w%s", err, remedy(err))
	}
	var found []netlink.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == addr {
			found = append(found, a)
		}
	}
	return found, nil
}

func hostAddr(addr netip.Addr) *netlink.Addr {
	bits := addr.BitLen()
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, bits)}}
	if addr.Is6() {
		a.Flags = unix.IFA_F_NODAD
		a.PreferedLft, a.ValidLft = 0, forever
	}
	return a
}

// forever is INFINITY_LIFE_TIME of the kernel's include/net/addrconf.h.
const forever = 0xffffffff

func linkByName(iface string) (netlink.Link, error) {
	link, err := netlink.LinkByName(iface)
	if err != nil {
		return nil, fmt.Errorf("vip: interface %q: %w%s", iface, err, remedy(err))
	}
	return link, nil
}

// remedy adds to an error what to do about it.
func remedy(err error) string {
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing), errors.Is(err, unix.ENODEV):
		return " (name an existing interface in the configuration; `ip link` lists them)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return " (run as root or with CAP_NET_ADMIN; IPv6 may be disabled: sysctl net.ipv6.conf.all.disable_ipv6)"
	case errors.Is(err, unix.ENETDOWN):
		return " (set the interface up: ip link set dev NAME up)"
	}
	return ""
}
