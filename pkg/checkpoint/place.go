package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// Where an application's VIPs are. Mostly on the node's interface. An
// application in a network namespace of its own has them there on lo, and the
// node routes them there; while it is away they are on the node's interface
// all the same: its namespace may go, and with it the route, and then nobody
// would answer for the addresses on the link.

const hostNamespace = "" // the agent's own

// nodeInterface is where VIPs on the node itself belong.
func (a *agent) nodeInterface() (string, error) {
	if i := a.config().Node.Interface; i != "" {
		return i, nil
	}
	return "", errors.New("the node file names no interface for the VIP; set interface")
}

// addVIPs puts the addresses where the running application has them.
func (a *agent) addVIPs(u *undo, app *config.App) error {
	ns, iface := app.Process.Namespace, "lo"
	for _, v := range app.VIPs {
		if ns != hostNamespace {
			if err := a.takeFromNode(v); err != nil {
				return err
			}
		}
		if _, ok, err := a.addrs.has(ns, v); err != nil {
			return err
		} else if !ok {
			if ns == hostNamespace {
				if iface, err = a.nodeInterface(); err != nil {
					return err
				}
			}
			if err := a.addrs.add(ns, iface, v); err != nil {
				return err
			}
			u.add(func(context.Context) error { return a.addrs.remove(ns, iface, v) })
		}
		if ns != hostNamespace {
			if err := a.routed(app, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// routed tells what keeps the node from forwarding to an application's
// namespace.
func (a *agent) routed(app *config.App, v netip.Addr) error {
	ns := app.Process.Namespace
	iface, err := a.addrs.route(v)
	switch {
	case err != nil:
		return err
	case iface == "":
		return fmt.Errorf("the VIP %s belongs to the node itself and not to the network namespace %s alone; remove it from the node", v, ns)
	case iface == a.config().Node.Interface:
		return fmt.Errorf("the node routes the VIP %s to %s and not to the network namespace %s: add a route to it by the device that leads there "+
			"(ip route add %s dev DEVICE)", v, iface, ns, v)
	}
	key := "net/ipv4/ip_forward"
	if v.Is6() {
		key = "net/ipv6/conf/all/forwarding"
	}
	if strings.TrimSpace(a.sysctl(hostNamespace, key)) == "0" {
		return fmt.Errorf("%s is 0, so the node does not forward to the network namespace %s; set it: sysctl -w %[1]s=1", strings.ReplaceAll(key, "/", "."), ns)
	}
	return nil
}

// takeFromNode removes a VIP from the node where it was put while its
// application was away.
func (a *agent) takeFromNode(v netip.Addr) error {
	iface, ok, err := a.addrs.has(hostNamespace, v)
	if err != nil || !ok {
		return err
	}
	if want := a.config().Node.Interface; iface != want {
		return fmt.Errorf("the VIP %s of an application in a network namespace is on the node's interface %s; remove it there (ip address del %[1]s dev %[2]s)", v, iface)
	}
	return a.addrs.remove(hostNamespace, iface, v)
}

// putOnNode gives the node the VIPs of an application that is away.
func (a *agent) putOnNode(app *config.App) error {
	if app.Process.Namespace == hostNamespace {
		return nil
	}
	iface, err := a.nodeInterface()
	if err != nil {
		return err
	}
	for _, v := range app.VIPs {
		_, ok, herr := a.addrs.has(hostNamespace, v)
		if herr == nil && !ok {
			herr = a.addrs.add(hostNamespace, iface, v)
		}
		err = errors.Join(err, herr)
	}
	return err
}

// keepOnNode is putOnNode where nothing more can be done about a failure: the
// connections are held as long as the route stays.
//
// Another node may have taken the application over just now: then the addresses
// are that one's.
func (a *agent) keepOnNode(app *config.App) {
	if app.Process.Namespace == hostNamespace {
		return
	}
	a.yielding.Lock()
	defer a.yielding.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.root), cleanupTimeout)
	defer cancel()
	st, err := a.status(ctx, app.Name)
	switch {
	case err != nil: // held or not, its packets are dropped without a filter
	case st.State == control.StateBlockData, st.State == control.StateUnknown:
		err = a.removeVIPs(app)
		if err != nil {
			a.log.Error("VIP stays on the node though another one has the application", "app", app.Name, "err", err)
		}
		return
	}
	if err := a.putOnNode(app); err != nil {
		a.log.Error("VIP is not on the node; when the application's network namespace goes, its clients do not reach the filter", "app", app.Name, "err", err)
	}
}

// removeVIPs takes the addresses away wherever they are. A namespace that is
// gone has none.
func (a *agent) removeVIPs(app *config.App) error {
	var all error
	places := []string{app.Process.Namespace}
	if app.Process.Namespace != hostNamespace {
		places = append(places, hostNamespace)
	}
	for _, v := range app.VIPs {
		for _, ns := range places {
			iface, ok, err := a.addrs.has(ns, v)
			if err == nil && ok {
				err = a.addrs.remove(ns, iface, v)
			}
			if ns != hostNamespace && errors.Is(err, os.ErrNotExist) {
				err = nil
			}
			all = errors.Join(all, err)
		}
	}
	return all
}

// nobodyElse tells which other machine on the link has a VIP that is not here.
func (a *agent) nobodyElse(app *config.App) error {
	iface := a.config().Node.Interface
	if iface == "" {
		return nil // and the VIP is on no link, or there already
	}
	for _, v := range app.VIPs {
		if _, here, err := a.addrs.has(hostNamespace, v); err != nil {
			return err
		} else if here {
			continue
		}
		answers, err := a.addrs.probe(hostNamespace, iface, v)
		if err != nil {
			return err
		}
		if len(answers) > 0 {
			return fmt.Errorf("the VIP %s is answered for on %s by %s already; find that machine, and stop the application or take the address away there", v, iface, answers[0])
		}
	}
	return nil
}
