package checkpoint

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/nfconnfilter/nfconnfilter/internal/connhook"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
)

// process.bind_vip: connections that an application opens get its VIPs as
// their source by a hook on its cgroup. That works in a network namespace of
// its own just as on the node, because the hook binds in the socket's
// namespace, where the VIP is: there is nothing to be done to routes.

// connectHooks puts the hook on a cgroup, replaces it and takes it away.
type connectHooks interface {
	attach(cgroup string, addrs []netip.Addr, ports []uint16) error
	detach(cgroup string) error
}

// kernelHooks are those of this machine.
type kernelHooks struct{}

func (kernelHooks) attach(cgroup string, addrs []netip.Addr, ports []uint16) error {
	return connhook.Attach(cgroup, connhook.Source{Addrs: addrs, Ports: ports})
}

func (kernelHooks) detach(cgroup string) error { return connhook.Detach(cgroup) }

var errNoCgroup = errors.New("it is in no cgroup of its own, as one that the agent has not started itself; " +
	"stop it and let ckptctl start start it, or set bind_vip = false")

// hook has the connections that a running application opens from now on
// follow process.bind_vip and outgoing_ports as they are now: an earlier agent,
// or an earlier configuration, may have left a hook, or none.
func (l *osLauncher) hook(app *config.App, p process) error {
	l.hooking.Lock()
	defer l.hooking.Unlock()
	group := ""
	if o, ok := p.(*osProcess); ok {
		group = o.rec.Cgroup
	}
	switch {
	case app.Process.BindVIP && group == "":
		return fmt.Errorf("process.bind_vip of %s, %s: %w", app.Name, p.describe(), errNoCgroup)
	case app.Process.BindVIP:
		return l.attach(app, cgroup(group))
	case group != "":
		// Nothing was attached by an agent that may not even look.
		if err := l.hooks.detach(group); err != nil {
			l.log.Warn("connections that the application opens may still get the VIP, although bind_vip is false", "app", app.Name, "err", err)
		}
	}
	return nil
}

func (l *osLauncher) attach(app *config.App, c cgroup) error {
	if err := l.hooks.attach(string(c), app.VIPs, app.OutgoingPorts); err != nil {
		return fmt.Errorf("process.bind_vip of %s is not possible: %w; or set bind_vip = false", app.Name, err)
	}
	return nil
}

// hookRunning is hook for applications that run on whatever comes of it.
func (a *agent) hookRunning(app *config.App, p process) {
	if err := a.launch.hook(app, p); err != nil && p.alive() {
		a.log.Error("connections that the application opens do not follow its configuration", "app", app.Name, "err", err)
	}
}
