package testnet

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The SIOCETHTOOL commands that set one feature each (include/uapi/linux/ethtool.h).
const (
	ethtoolSRXCSUM = 0x15
	ethtoolSTXCSUM = 0x17
	ethtoolSTSO    = 0x1f
	ethtoolGGSO    = 0x23
	ethtoolSGSO    = 0x24
	ethtoolSGRO    = 0x2c
	ethtoolGTXCSUM = 0x16
)

type ethtoolValue struct {
	cmd, data uint32
}

type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte // the kernel copies the whole union, of at most 24 bytes
}

// DisableOffloads switches an interface's checksum and segmentation offloads off, so that every frame on it is small
// and has a full checksum.
func (ns *NS) DisableOffloads(iface string) error {
	for _, cmd := range []uint32{ethtoolSTXCSUM, ethtoolSRXCSUM, ethtoolSTSO, ethtoolSGSO, ethtoolSGRO} {
		if _, err := ns.ethtool(iface, cmd, 0); err != nil {
			return err
		}
	}
	return nil
}

// offloads tells whether transmit checksums and segmentation are left to the device.
func (ns *NS) offloads(iface string) (txcsum, gso bool, err error) {
	c, err1 := ns.ethtool(iface, ethtoolGTXCSUM, 0)
	g, err2 := ns.ethtool(iface, ethtoolGGSO, 0)
	return c != 0, g != 0, errors.Join(err1, err2)
}

func (ns *NS) ethtool(iface string, cmd, data uint32) (uint32, error) {
	value := ethtoolValue{cmd: cmd, data: data}
	req := ifreqData{data: unsafe.Pointer(&value)}
	if len(iface) >= len(req.name) {
		return 0, fmt.Errorf("testnet: interface name %q is too long", iface)
	}
	copy(req.name[:], iface)
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // nothing was written
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("testnet: ethtool command %#x on %s in %s: %w", cmd, iface, ns.name, err)
	}
	return value.data, nil
}
