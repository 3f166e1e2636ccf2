package vip

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	probes     = 2
	probeEvery = 75 * time.Millisecond // and as long is listened behind the last
)

// Probe asks the link of an interface who has an address, without claiming it, and gives the link-layer addresses of
// those who answer, or announce it just then, within 150 ms. The interface's own is left out.
//
// IPv4: ARP probes, with 0.0.0.0 as the sender (RFC 5227, section 2.1.1). IPv6: neighbour solicitations from the
// unspecified address, as in duplicate address detection (RFC 4862, section 5.4.2). Interfaces without Ethernet
// addresses have nobody to ask. It needs CAP_NET_RAW.
func Probe(iface string, addr netip.Addr) ([]net.HardwareAddr, error) {
	addr, err := check(addr)
	if err != nil {
		return nil, err
	}
	link, err := linkByName(iface)
	if err != nil {
		return nil, err
	}
	mac := link.Attrs().HardwareAddr
	if link.Attrs().EncapType != "ether" || len(mac) != 6 {
		return nil, nil
	}
	out, err := probe(link.Attrs().Index, [6]byte(mac), addr)
	if err != nil {
		return nil, fmt.Errorf("vip: probe %s on interface %s: %w%s", addr, iface, err, remedy(err))
	}
	return out, nil
}

func probe(ifindex int, mac [6]byte, addr netip.Addr) ([]net.HardwareAddr, error) {
	protocol, frame, answer := uint16(unix.ETH_P_ARP), []byte(nil), arpAnswer
	if addr.Is4() {
		frame = arpProbe(mac, addr.As4())
	} else {
		protocol, frame, answer = unix.ETH_P_IPV6, solicitation(mac, addr.As16()), advertised
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is written to it
	// Bound before the first probe leaves: the answer may be quicker than we.
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, protocol)), Ifindex: ifindex}); err != nil {
		return nil, err
	}
	var out []net.HardwareAddr
	for range probes {
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifindex, Halen: 6}); err != nil {
			return nil, err
		}
		err := receive(fd, time.Now().Add(probeEvery), func(b []byte) {
			from, ok := answer(b, addr)
			known := slices.ContainsFunc(out, func(o net.HardwareAddr) bool { return bytes.Equal(o, from) })
			if ok && !known && !bytes.Equal(from, mac[:]) {
				out = append(out, slices.Clone(from))
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// receive calls f with each frame that comes until the time.
func receive(fd int, until time.Time, f func([]byte)) error {
	buf := make([]byte, 256)
	for {
		left := time.Until(until)
		if left <= 0 {
			return nil
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return err
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		switch err {
		case nil:
			f(buf[:n])
		case unix.EAGAIN, unix.EINTR:
		default:
			return err
		}
	}
}

func arpProbe(mac [6]byte, ip [4]byte) []byte {
	b := ethernet([6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(append(b, mac[:]...), 0, 0, 0, 0)
	return append(append(b, 0, 0, 0, 0, 0, 0), ip[:]...)
}

// arpAnswer reads the sender of an ARP packet that claims addr.
func arpAnswer(b []byte, addr netip.Addr) (net.HardwareAddr, bool) {
	if len(b) < 14+28 || !bytes.Equal(b[14:20], []byte{0, 1, 8, 0, 6, 4}) {
		return nil, false
	}
	ip := addr.As4()
	return net.HardwareAddr(b[22:28]), bytes.Equal(b[28:32], ip[:])
}

func solicitation(mac [6]byte, ip [16]byte) []byte {
	const icmpLen = 24
	group := [16]byte{0: 0xff, 1: 0x02, 11: 1, 12: 0xff, 13: ip[13], 14: ip[14], 15: ip[15]} // RFC 4291, section 2.7.1
	b := ethernet([6]byte{0x33, 0x33, 0xff, ip[13], ip[14], ip[15]}, mac, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0, 0, icmpLen, unix.IPPROTO_ICMPV6, 255)
	b = append(append(b, make([]byte, 16)...), group[:]...)
	icmp := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, ip[:]...)
	binary.BigEndian.PutUint16(icmp[2:], icmp6Checksum([16]byte{}, group, icmp))
	return append(b, icmp...)
}

// advertised reads the sender of a neighbour advertisement for addr.
func advertised(b []byte, addr netip.Addr) (net.HardwareAddr, bool) {
	const icmp = 14 + 40
	ip := addr.As16()
	if len(b) < icmp+24 || b[14]>>4 != 6 || b[20] != unix.IPPROTO_ICMPV6 || b[21] != 255 || b[icmp] != 136 || !bytes.Equal(b[icmp+8:icmp+24], ip[:]) {
		return nil, false
	}
	if len(b) >= icmp+32 && b[icmp+24] == 2 && b[icmp+25] == 1 {
		return net.HardwareAddr(b[icmp+26 : icmp+32]), true
	}
	return net.HardwareAddr(b[6:12]), true
}
