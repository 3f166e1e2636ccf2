package connhook

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Source is what the opened connections of an application get.
type Source struct {
	// Addrs are its VIPs, at most one of each family.
	Addrs []netip.Addr
	// Ports are the remote ports of the connections that get them; empty: all.
	Ports []uint16
}

// maxRanges bounds the comparisons of ports: the verifier follows at most 8192
// branches that it has not yet come to the end of (BPF_COMPLEXITY_LIMIT_JMP_SEQ,
// kernel/bpf/verifier.c), and a range has two.
const maxRanges = 1024

// Offsets in struct bpf_sock_addr and struct bpf_sock (kernel
// include/uapi/linux/bpf.h). Addresses and the remote port are in network
// order there, the local port in host order.
const (
	ctxIP4      = 4
	ctxIP6      = 8
	ctxPort     = 24
	ctxProtocol = 36
	ctxSock     = 64
	sockIP4     = 24
	sockIP6     = 28
)

// Labels of a program.
const (
	toPorts = "ports" // the address is on the stack: does the port count?
	toBind  = "bind"
	toOut   = "out"
)

// hook is one of the two programs.
type hook struct {
	name   string // at most 15 bytes (BPF_OBJ_NAME_LEN)
	attach ebpf.AttachType
	build  func(v4, v6 netip.Addr) asm.Instructions
}

var hooks = []hook{
	{"nfcf_connect4", ebpf.AttachCGroupInet4Connect, connect4},
	{"nfcf_connect6", ebpf.AttachCGroupInet6Connect, connect6},
}

// program gives the hook's program; nil where it would never bind.
func (h hook) program(s Source) (*ebpf.ProgramSpec, error) {
	v4, v6, err := s.families()
	if err != nil {
		return nil, err
	}
	ranges := portRanges(s.Ports)
	if len(ranges) > maxRanges {
		return nil, fmt.Errorf("connhook: %d separate ranges of remote ports, at most %d are possible: name fewer, or none for all", len(ranges), maxRanges)
	}
	body := h.build(v4, v6)
	if body == nil {
		return nil, nil
	}
	return &ebpf.ProgramSpec{
		Name: h.name, Type: ebpf.CGroupSockAddr, AttachType: h.attach, License: "Apache-2.0",
		Instructions: slices.Concat(
			// Every socket but that of TCP is left alone.
			asm.Instructions{
				asm.Mov.Reg(asm.R6, asm.R1),
				asm.LoadMem(asm.R2, asm.R6, ctxProtocol, asm.Word),
				asm.JNE.Imm(asm.R2, unix.IPPROTO_TCP, toOut),
				asm.LoadMem(asm.R7, asm.R6, ctxSock, asm.DWord),
			}, body, ports(ranges), bind(), asm.Instructions{
				// 1: the connect goes on, whatever came of the bind.
				asm.Mov.Imm(asm.R0, 1).WithSymbol(toOut),
				asm.Return(),
			}),
	}, nil
}

// families tells the VIPs apart.
func (s Source) families() (v4, v6 netip.Addr, err error) {
	for _, a := range s.Addrs {
		p := &v6
		if a = a.Unmap(); a.Is4() {
			p = &v4
		}
		if !a.IsValid() || a.IsUnspecified() || p.IsValid() {
			return v4, v6, fmt.Errorf("connhook: %v is not one address of each family", s.Addrs)
		}
		*p = a
	}
	if !v4.IsValid() && !v6.IsValid() {
		return v4, v6, fmt.Errorf("connhook: no address to bind to")
	}
	return v4, v6, nil
}

// word is an address' 32 bits as the program loads them.
func word(b []byte) int32 { return int32(binary.NativeEndian.Uint32(b)) }

// connect4 judges a connect of an AF_INET socket.
func connect4(v4, _ netip.Addr) asm.Instructions {
	if !v4.IsValid() {
		return nil
	}
	b := v4.As4()
	return slices.Concat(asm.Instructions{
		asm.LoadMem(asm.R2, asm.R7, sockIP4, asm.Word),
		asm.JNE.Imm(asm.R2, 0, toOut), // bound by the program itself
		asm.LoadMem(asm.R2, asm.R6, ctxIP4, asm.Word),
	}, notHere4(b), asm.Instructions{
		// struct sockaddr_in: family, port 0, address, padding.
		asm.StoreImm(asm.R10, -16, unix.AF_INET, asm.Half),
		asm.StoreImm(asm.R10, -14, 0, asm.Half),
		asm.StoreImm(asm.R10, -12, int64(word(b[:])), asm.Word),
		asm.StoreImm(asm.R10, -8, 0, asm.Word),
		asm.StoreImm(asm.R10, -4, 0, asm.Word),
		asm.Mov.Imm(asm.R8, -16),
		asm.Mov.Imm(asm.R9, unix.SizeofSockaddrInet4),
		asm.Ja.Label(toPorts),
	})
}

// notHere4 leaves out, for the destination in R2, what never leaves this
// machine: 0.0.0.0 and 127.0.0.0/8, which are loopback, and the VIP.
func notHere4(vip [4]byte) asm.Instructions {
	return asm.Instructions{
		asm.JEq.Imm(asm.R2, 0, toOut),
		asm.JEq.Imm32(asm.R2, word(vip[:]), toOut),
		asm.HostTo(asm.BE, asm.R2, asm.Word),
		asm.RSh.Imm(asm.R2, 24),
		asm.JEq.Imm(asm.R2, 127, toOut),
	}
}

// connect6 judges a connect of an AF_INET6 socket. Where the destination is an
// IPv4 address (RFC 4291, section 2.5.5.2) the connection will be one of IPv4,
// and gets the IPv4 VIP in the same form: programs with one kind of socket for
// both families connect so.
func connect6(v4, v6 netip.Addr) asm.Instructions {
	const mapped, native = "mapped", "native"
	onlyIf := func(a netip.Addr, label string) string {
		if a.IsValid() {
			return label
		}
		return toOut
	}
	in := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R7, sockIP6, asm.Word),
	}
	for i := int16(1); i < 4; i++ {
		in = append(in, asm.LoadMem(asm.R3, asm.R7, sockIP6+4*i, asm.Word), asm.Or.Reg(asm.R2, asm.R3))
	}
	in = append(in,
		asm.JNE.Imm(asm.R2, 0, toOut), // bound by the program itself
		asm.LoadMem(asm.R2, asm.R6, ctxIP6, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, ctxIP6+4, asm.Word),
		asm.LoadMem(asm.R4, asm.R6, ctxIP6+8, asm.Word),
		asm.LoadMem(asm.R5, asm.R6, ctxIP6+12, asm.Word),
		asm.Mov.Reg(asm.R0, asm.R2),
		asm.Or.Reg(asm.R0, asm.R3),
		asm.JNE.Imm(asm.R0, 0, onlyIf(v6, native)),
		asm.JEq.Imm32(asm.R4, word([]byte{0, 0, 0xff, 0xff}), onlyIf(v4, mapped)),
		asm.JNE.Imm(asm.R4, 0, onlyIf(v6, native)),
		asm.JEq.Imm(asm.R5, 0, toOut),                          // ::, which is loopback too
		asm.JEq.Imm32(asm.R5, word([]byte{0, 0, 0, 1}), toOut), // ::1
		asm.Ja.Label(onlyIf(v6, native)),
	)
	if v4.IsValid() {
		b, m := v4.As4(), netip.AddrFrom16(v4.As16()).As16()
		in = append(in, asm.Mov.Reg(asm.R2, asm.R5).WithSymbol(mapped))
		in = append(in, notHere4(b)...)
		in = append(in, store6(m)...)
	}
	if v6.IsValid() {
		b := v6.As16()
		const other = "other"
		in = append(in,
			asm.JNE.Imm32(asm.R2, word(b[0:]), other).WithSymbol(native),
			asm.JNE.Imm32(asm.R3, word(b[4:]), other),
			asm.JNE.Imm32(asm.R4, word(b[8:]), other),
			asm.JEq.Imm32(asm.R5, word(b[12:]), toOut)) // the VIP
		s := store6(b)
		s[0] = s[0].WithSymbol(other)
		in = append(in, s...)
	}
	return in
}

// store6 writes a struct sockaddr_in6: family, port 0, flow 0, address, scope 0.
func store6(b [16]byte) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.R10, -32, unix.AF_INET6, asm.Half),
		asm.StoreImm(asm.R10, -30, 0, asm.Half),
		asm.StoreImm(asm.R10, -28, 0, asm.Word),
		asm.StoreImm(asm.R10, -24, int64(word(b[0:])), asm.Word),
		asm.StoreImm(asm.R10, -20, int64(word(b[4:])), asm.Word),
		asm.StoreImm(asm.R10, -16, int64(word(b[8:])), asm.Word),
		asm.StoreImm(asm.R10, -12, int64(word(b[12:])), asm.Word),
		asm.StoreImm(asm.R10, -8, 0, asm.Word),
		asm.Mov.Imm(asm.R8, -32),
		asm.Mov.Imm(asm.R9, unix.SizeofSockaddrInet6),
		asm.Ja.Label(toPorts),
	}
}

// ports lets the remote ports go on that count.
func ports(ranges []portRange) asm.Instructions {
	in := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R6, ctxPort, asm.Word).WithSymbol(toPorts),
		asm.HostTo(asm.BE, asm.R2, asm.Half),
	}
	if len(ranges) == 0 {
		return in
	}
	// In rising order, so what is below a range is in none.
	for _, r := range ranges {
		in = append(in,
			asm.JLT.Imm(asm.R2, int32(r.first), toOut),
			asm.JLE.Imm(asm.R2, int32(r.last), toBind))
	}
	return append(in, asm.Ja.Label(toOut))
}

// bind gives the socket its address.
//
// A bind(2) to port 0 takes a port at once, which then serves one connection:
// about 28,000 connections in all, not to each remote. bpf_bind (kernel
// net/core/filter.c) sets BIND_FORCE_ADDRESS_NO_PORT for port 0, which is what
// the option IP_BIND_ADDRESS_NO_PORT asks for (ip(7)): __inet_bind and
// __inet6_bind (net/ipv4/af_inet.c, net/ipv6/af_inet6.c) keep the address
// alone, and connect chooses a port that is free for the four-tuple. It takes
// no lock (no BIND_WITH_LOCK): connect holds the socket's already.
//
// It refuses a socket that has a port of its own and an address that is not
// there. Then the connection has the source that it would have had without us.
func bind() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(toBind),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Reg(asm.R2, asm.R8),
		asm.Mov.Reg(asm.R3, asm.R9),
		asm.FnBind.Call(),
	}
}

type portRange struct{ first, last uint16 }

// portRanges joins neighbouring ports, in rising order.
func portRanges(ports []uint16) []portRange {
	var out []portRange
	for _, p := range slices.Compact(slices.Sorted(slices.Values(ports))) {
		if n := len(out); n > 0 && out[n-1].last+1 == p {
			out[n-1].last = p
			continue
		}
		out = append(out, portRange{p, p})
	}
	return out
}
