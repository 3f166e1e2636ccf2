package vip

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Announce tells the link that the interface now has the address, so that neighbours replace the hardware address they
// remember.
//
// IPv4: one gratuitous ARP request and one reply, both broadcast, with the address as sender and target (RFC 5227,
// section 3; RFC 5944, section 4.6): some neighbours heed only one of the two. IPv6: an unsolicited neighbour
// advertisement to all nodes with the override flag (RFC 4861, section 7.2.6). A single frame may be lost: the caller repeats it
// after a second. Interfaces without Ethernet addresses, such as the loopback, need none and get none. It needs
// CAP_NET_RAW.
func Announce(iface string, addr netip.Addr) error {
	addr, err := check(addr)
	if err != nil {
		return err
	}
	link, err := linkByName(iface)
	if err != nil {
		return err
	}
	mac := link.Attrs().HardwareAddr
	if link.Attrs().EncapType != "ether" || len(mac) != 6 {
		return nil
	}
	var frames [][]byte
	if addr.Is4() {
		frames = [][]byte{arpFrame(1, [6]byte(mac), addr.As4()), arpFrame(2, [6]byte(mac), addr.As4())}
	} else {
		frames = [][]byte{advertisement([6]byte(mac), addr.As16())}
	}
	if err := sendFrames(link.Attrs().Index, frames); err != nil {
		return fmt.Errorf("vip: announce %s on interface %s: %w%s", addr, iface, err, remedy(err))
	}
	return nil
}

// sendFrames sends whole Ethernet frames through a packet socket that receives nothing.
func sendFrames(ifindex int, frames [][]byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // what was sent is sent
	for _, f := range frames {
		if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: ifindex, Halen: 6}); err != nil {
			return err
		}
	}
	return nil
}

func ethernet(dst, src [6]byte, ethertype uint16) []byte {
	b := append(dst[:], src[:]...)
	return binary.BigEndian.AppendUint16(b, ethertype)
}

// arpFrame builds a gratuitous ARP packet (RFC 826): operation 1 is a request, 2 a reply.
func arpFrame(operation uint16, mac [6]byte, ip [4]byte) []byte {
	broadcast := [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	b := ethernet(broadcast, mac, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4) // Ethernet and IPv4, with their address lengths
	b = binary.BigEndian.AppendUint16(b, operation)
	b = append(append(b, mac[:]...), ip[:]...)
	b = append(append(b, broadcast[:]...), ip[:]...)
	return b
}

// advertisement builds an unsolicited neighbour advertisement (RFC 4861, section 4.4) with the target link-layer
// address option (section 4.6.1), from the address itself to ff02::1.
func advertisement(mac [6]byte, ip [16]byte) []byte {
	const icmpLen = 32
	allNodes := [16]byte{0: 0xff, 1: 0x02, 15: 1}
	b := ethernet([6]byte{0x33, 0x33, 0, 0, 0, 1}, mac, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0, 0, icmpLen, unix.IPPROTO_ICMPV6, 255) // hop limit 255: section 7.1.2
	b = append(append(b, ip[:]...), allNodes[:]...)
	icmp := []byte{136, 0, 0, 0, 0x20, 0, 0, 0} // override flag alone
	icmp = append(append(icmp, ip[:]...), 2, 1)
	icmp = append(icmp, mac[:]...)
	binary.BigEndian.PutUint16(icmp[2:], icmp6Checksum(ip, allNodes, icmp))
	return append(b, icmp...)
}

// icmp6Checksum is that of RFC 4443, section 2.3, for a message of even length with a zero checksum field.
func icmp6Checksum(src, dst [16]byte, icmp []byte) uint16 {
	sum := uint32(len(icmp)) + unix.IPPROTO_ICMPV6
	for _, part := range [][]byte{src[:], dst[:], icmp} {
		for i := 0; i+1 < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
