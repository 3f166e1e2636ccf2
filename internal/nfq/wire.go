package nfq

import "golang.org/x/sys/unix"

// Message types of the nfnetlink queue subsystem, enum nfqnl_msg_types in
// include/uapi/linux/netfilter/nfnetlink_queue.h. The subsystem is the high
// byte of the netlink message type.
const (
	msgPacket  = unix.NFNL_SUBSYS_QUEUE << 8
	msgVerdict = unix.NFNL_SUBSYS_QUEUE<<8 | 1
	msgConfig  = unix.NFNL_SUBSYS_QUEUE<<8 | 2
)

// Attributes of a packet or a verdict, enum nfqnl_attr_type in the same file.
const (
	attrPacketHdr  = 1
	attrVerdictHdr = 2
	attrMark       = 3
	attrInDev      = 5
	attrOutDev     = 6
	attrPayload    = 10
	attrCapLen     = 13
	attrSkbInfo    = 14
)

// Attributes of a configuration message, enum nfqnl_attr_config.
const (
	cfgAttrCmd    = 1
	cfgAttrParams = 2
	cfgAttrMaxLen = 3
	cfgAttrMask   = 4
	cfgAttrFlags  = 5
)

// Values inside a configuration message.
const (
	cfgCmdBind       = 1
	copyPacket       = 2
	copyRange        = 0xffff
	cfgFlagFailOpen  = 1 << 0
	cfgFlagConntrack = 1 << 1
	cfgFlagGSO       = 1 << 2
	cfgFlagUIDGID    = 1 << 3
)

// Bits of Packet.SkbInfo, NFQA_SKB_* in nfnetlink_queue.h.
const (
	// SkbCsumNotReady says that the transport checksum holds only the
	// pseudo-header sum; the device or the kernel would have filled it in.
	SkbCsumNotReady = 1 << 0
	// SkbGSO says that the packet is larger than the path's MTU and is cut
	// into segments after the verdict.
	SkbGSO = 1 << 1
	// SkbCsumNotVerified says that no device has verified the checksum.
	SkbCsumNotVerified = 1 << 2
)

// Netfilter verdicts, include/uapi/linux/netfilter.h.
const (
	nfDrop   = 0
	nfAccept = 1
)

const (
	nlmsgHdrLen = unix.SizeofNlMsghdr // 16
	nfgenLen    = 4                   // struct nfgenmsg
	nlaHdrLen   = 4
	nlaTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER

	// MaxPayload is the most bytes of one packet that the kernel copies out or
	// takes back: an attribute's length field has 16 bits and counts its header.
	MaxPayload = 0xffff - nlaHdrLen
)

// align4 rounds up to the alignment of netlink messages and attributes.
func align4(n int) int { return (n + 3) &^ 3 }
