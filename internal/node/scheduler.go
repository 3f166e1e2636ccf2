package node

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// RestoreMessage is the restore request for an application's address: 25
// octets for IPv4, with zero-padded octets; for IPv6 eight groups of four
// lower-case hexadecimal digits.
func RestoreMessage(ip netip.Addr) []byte {
	if ip.Is4() {
		a := ip.As4()
		return fmt.Appendf(nil, "Restore %03d.%03d.%03d.%03d\r\n", a[0], a[1], a[2], a[3])
	}
	return []byte("Restore " + ip.StringExpanded() + "\r\n")
}

// requestRestore sends one restore request to the scheduler, or to the agent
// on a node without one. The engine repeats it until the state changes.
func (n *Node) requestRestore(r filter.RestoreRequest) {
	const patience = 5 * time.Second
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), config.DefaultSchedulerPort)
	if s := n.cfg.Load().Cluster.Scheduler; s != nil {
		to = netip.AddrPortFrom(s.Address, s.Port)
	}
	answer, err := askRestore(to, r.IP, patience)
	switch {
	case err != nil:
		n.log.Warn("restore request failed; it will be repeated", "app", r.App, "to", to, "error", err)
	case answer != "OK":
		n.log.Warn("restore request refused; it will be repeated", "app", r.App, "to", to, "answer", answer)
	default:
		n.log.Info("restore requested", "app", r.App, "to", to)
	}
}

func askRestore(to netip.AddrPort, ip netip.Addr, patience time.Duration) (string, error) {
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := c.Write(RestoreMessage(ip)); err != nil {
		return "", err
	}
	line, err := bufio.NewReaderSize(c, 512).ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(line), nil
}
