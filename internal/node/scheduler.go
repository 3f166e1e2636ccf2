package node

import (
	"bufio"
	"context"
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
func (n *Node) requestRestore(ctx context.Context, r filter.RestoreRequest) {
	const patience = 5 * time.Second
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), config.DefaultSchedulerPort)
	if s := n.cfg.Load().Cluster.Scheduler; s != nil {
		to = netip.AddrPortFrom(s.Address, s.Port)
	}
	answer, err := askRestore(ctx, to, r.IP, patience)
	switch {
	case ctx.Err() != nil: // the next filter asks
	case err != nil:
		n.log.Warn("restore request failed; it will be repeated", "app", r.App, "to", to, "error", err)
	case answer != "OK":
		n.log.Warn("restore request refused; it will be repeated", "app", r.App, "to", to, "answer", answer)
	default:
		n.log.Info("restore requested", "app", r.App, "to", to)
	}
}

// askRestore gives the answer's line. It ends with ctx at once: a filter that stops
// is waited for.
func askRestore(ctx context.Context, to netip.AddrPort, ip netip.Addr, patience time.Duration) (string, error) {
	d := net.Dialer{Timeout: patience}
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := c.Write(RestoreMessage(ip)); err != nil {
		return "", err
	}
	line, err := bufio.NewReaderSize(c, 512).ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(line), nil
}
