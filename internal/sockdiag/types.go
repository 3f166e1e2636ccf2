// Package sockdiag lists and destroys TCP sockets of one network namespace with the kernel's inet_diag interface
// (sock_diag(7), net/ipv4/inet_diag.c, include/uapi/linux/inet_diag.h).
package sockdiag

import (
	"fmt"
	"net/netip"
	"time"
)

// State is a TCP state by the kernel's number (include/net/tcp_states.h).
type State uint8

// The kernel's TCP states. NewSynReceived is a connection request that has no full socket yet; the kernel reports
// it as SynReceived, so it is of use in Query.States only.
const (
	Established State = iota + 1
	SynSent
	SynReceived
	FinWait1
	FinWait2
	TimeWait
	Closed
	CloseWait
	LastAck
	Listen
	Closing
	NewSynReceived
)

var stateNames = [...]string{
	Established: "ESTABLISHED", SynSent: "SYN_SENT", SynReceived: "SYN_RECEIVED", FinWait1: "FIN_WAIT1",
	FinWait2: "FIN_WAIT2", TimeWait: "TIME_WAIT", Closed: "CLOSED", CloseWait: "CLOSE_WAIT", LastAck: "LAST_ACK",
	Listen: "LISTEN", Closing: "CLOSING", NewSynReceived: "SYN_RECEIVED",
}

// String returns the name of RFC 9293, section 3.3.2, with underscores for hyphens.
func (s State) String() string {
	if int(s) < len(stateNames) && stateNames[s] != "" {
		return stateNames[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// Socket is one TCP socket as the kernel reported it.
type Socket struct {
	// Local and Remote are the two ends; IPv4-mapped IPv6 addresses are folded to IPv4. Remote of a listener is
	// the unspecified address with port 0.
	Local, Remote netip.AddrPort
	// Family is the socket's own address family, AF_INET or AF_INET6. A connection over IPv4 that a dual-stack
	// listener accepted has an IPv4 Local and Family AF_INET6.
	Family uint8
	State  State
	// RecvQ and SendQ are in bytes of sequence space: received and not read, written and not acknowledged; a FIN
	// counts 1 in each (kernel tcp_diag_get_info). For a listener: connections that wait for accept, and the
	// backlog.
	RecvQ, SendQ uint32
	// Inode is that of the socket's file, 0 when no process holds it (TIME_WAIT, orphans, requests).
	Inode uint32
	// UID is the owner's user number.
	UID uint32
	// Interface is the index of the device that the socket is bound to, 0 for none.
	Interface uint32
	// Cookie identifies the socket in the kernel for its lifetime; both words 0xffffffff match any.
	Cookie [2]uint32
	// V6Only tells that an IPv6 listener takes no IPv4 connections.
	V6Only bool
	// MD5 tells that the socket has keys of TCP-MD5 (RFC 2385). The kernel shows them to
	// CAP_NET_ADMIN alone, and with Query.Info.
	MD5 bool
	// Retransmits counts the time-outs, or the unanswered probes, of the running timer.
	Retransmits uint8
	// Info is set for full sockets when Query.Info was asked for; nil in TIME_WAIT and for requests.
	Info *TCPInfo
}

// String returns state and both ends, for messages.
func (s Socket) String() string {
	return fmt.Sprintf("%s %s-%s", s.State, s.Local, s.Remote)
}

// Options are the TCP options that both ends agreed on.
type Options struct {
	Timestamps, SACK, WScale, ECN bool
}

// TCPInfo is the part of the kernel's struct tcp_info (include/uapi/linux/tcp.h) that is of use here. Fields that
// the running kernel does not report are 0.
type TCPInfo struct {
	State State
	// Options tells what was negotiated in the handshake.
	Options Options
	// SndWScale is the shift for windows that the remote announces, RcvWScale for those announced to it.
	SndWScale, RcvWScale uint8
	// Retransmits, Probes and Backoff count unanswered retransmissions, unanswered window or keepalive probes and
	// doublings of the timer.
	Retransmits, Probes, Backoff uint8
	// RTO, RTT and RTTVar are the retransmission time-out, the smoothed round trip and its variance.
	RTO, RTT, RTTVar time.Duration
	// Sizes in bytes: SndMSS without options, AdvMSS as announced to the remote.
	SndMSS, RcvMSS, AdvMSS, PMTU uint32
	// Unacked, Sacked, Lost and Retrans are in segments; for a listener Unacked is the accept queue's length and
	// Sacked the backlog.
	Unacked, Sacked, Lost, Retrans uint32
	TotalRetrans                   uint32
	// Times since the event. They run from the connection's start when it never happened.
	LastDataSent, LastDataRecv, LastAckRecv time.Duration
	// BytesAcked counts what the remote acknowledged (RFC 4898 tcpEStatsAppHCThruOctetsAcked): sequence space, so
	// an active opener's SYN and a FIN count 1. BytesReceived likewise counts a FIN. BytesSent counts payload with
	// retransmissions, of which BytesRetrans.
	BytesAcked, BytesReceived, BytesSent, BytesRetrans uint64
	SegsOut, SegsIn                                    uint32
	// NotSent is the number of bytes in the send queue that were never sent.
	NotSent uint32
	// RcvSpace is the receive buffer auto-tuning's target, SndWnd the remote's window, RcvWnd the window last
	// announced; all in bytes, scaled.
	RcvSpace, SndWnd, RcvWnd uint32
	// ULP names the upper layer protocol on the socket: "tls", "mptcp", or empty.
	ULP string
}

// Query selects sockets.
type Query struct {
	// Local restricts to sockets with one of these local addresses; listeners also match when bound to the wildcard
	// through which they would accept for one of them. Empty: every address.
	Local []netip.Addr
	// States restricts to these states. Empty: all but LISTEN, among them TIME_WAIT and connection requests.
	States []State
	// Info asks for Socket.Info.
	Info bool
}
