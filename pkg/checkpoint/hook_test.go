package checkpoint

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// A process that runs already gets what its file says now: at start, and from
// an agent that finds it. A new one is hooked before it begins (osLauncher).
func TestHookOfRunning(t *testing.T) {
	bind := func(t *testing.T, n int) (*world, *agent) {
		w, a := newWorld(t, n)
		a.cfg.Apps["redis"].Process.BindVIP = true
		return w, a
	}
	t.Run("start adopts", func(t *testing.T) {
		w, a := bind(t, 2)
		w.state = ""
		if _, err := a.start(t.Context(), "redis"); err != nil {
			t.Fatal(err)
		}
		wantTrace(t, w, "hook REGISTER list ADOPT sockets=2")
	})
	t.Run("start of one that is not to be hooked", func(t *testing.T) {
		w, a := bind(t, 2)
		w.state, w.fail["hook"] = "", errNoCgroup
		if _, err := a.start(t.Context(), "redis"); err == nil || !strings.Contains(err.Error(), "set bind_vip = false") {
			t.Errorf("%v", err)
		}
		wantTrace(t, w, "hook")
	})
	t.Run("start again, after a change", func(t *testing.T) {
		w, a := bind(t, 0)
		if _, err := a.start(t.Context(), "redis"); err != nil {
			t.Fatal(err)
		}
		a.cfg.Apps["redis"].Process.BindVIP = false
		if _, err := a.start(t.Context(), "redis"); err != nil {
			t.Fatal(err)
		}
		wantTrace(t, w, "hook unhook")
	})
	t.Run("start of what runs not", func(t *testing.T) {
		w, a := bind(t, 0)
		w.state, w.running, w.listening, w.vip[""] = "", false, false, false
		if _, err := a.start(t.Context(), "redis"); err != nil || !w.hooked {
			t.Fatal(err, w.hooked)
		}
		wantTrace(t, w, "REGISTER vip+eth0 exec")
	})
	t.Run("another agent", func(t *testing.T) {
		w, a := bind(t, 0)
		a.recover(t.Context())
		wantTrace(t, w, "hook")
		w.fail["hook"] = errTest // it runs on all the same
		if done, err := a.recoverApp(t.Context(), a.cfg.Apps["redis"]); !done || err != nil {
			t.Error(done, err)
		}
		wantRunning(t, w, control.StateConnected)
	})
	t.Run("reload", func(t *testing.T) {
		w, a := newWorld(t, 0)
		a.recover(t.Context())
		a.o.NodeFile = filepath.Join(t.TempDir(), "node.toml")
		writeFile(t, a.o.NodeFile, "name = \"node-a\"\ninterface = \"eth0\"\naddress = \"127.0.0.1\"\n")
		file := "name = \"redis\"\nvip = \"192.0.2.100\"\n[process]\nstart = [\"/bin/true\"]\nbind_vip = "
		for _, bind := range []string{"true", "false"} {
			writeFile(t, filepath.Join(a.o.SharedDir, "apps", "redis.toml"), file+bind+"\n")
			a.reload()
		}
		wantTrace(t, w, "hook unhook")
	})
	t.Run("another agent, of one that is none of the filter's", func(t *testing.T) {
		w, a := bind(t, 0)
		w.state = ""
		a.recover(t.Context())
		wantTrace(t, w, "")
	})
}

// fakeHooks keeps which cgroups have a hook; who tells how many processes were
// in it then.
type fakeHooks struct {
	on   map[string]string
	fail error
	seen []string
}

func (h *fakeHooks) attach(dir string, addrs []netip.Addr, ports []uint16) error {
	h.seen = append(h.seen, fmt.Sprintf("%d in it", len(cgroup(dir).members())))
	if h.fail == nil {
		h.on[dir] = fmt.Sprint(addrs, ports)
	}
	return h.fail
}

func (h *fakeHooks) detach(dir string) error {
	delete(h.on, dir)
	return h.fail
}

func hooked(script string) *config.App {
	app := shellApp(script)
	app.VIPs, app.OutgoingPorts = []netip.Addr{testVIP}, []uint16{5432}
	app.Process.BindVIP = true
	return app
}

func TestLauncherHooks(t *testing.T) {
	h := &fakeHooks{on: map[string]string{}}
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog(), hooks: h}
	t.Cleanup(l.children.Wait)
	app := hooked("sleep 1000")
	p := startShell(t, l, app)
	if h.on[p.rec.Cgroup] != "[192.0.2.100] [5432]" || len(h.on) != 1 || strings.Join(h.seen, " ") != "0 in it" {
		t.Errorf("hooks %v, %q", h.on, h.seen)
	}
	// An agent with another file finds it.
	other := &osLauncher{stateDir: l.stateDir, log: l.log, hooks: h}
	found, err := other.find(app)
	if err != nil || found == nil {
		t.Fatal(found, err)
	}
	app.OutgoingPorts = nil
	if err := other.hook(app, found); err != nil || h.on[p.rec.Cgroup] != "[192.0.2.100] []" {
		t.Errorf("%v: %v", err, h.on)
	}
	app.Process.BindVIP = false
	if err := other.hook(app, found); err != nil || len(h.on) != 0 {
		t.Errorf("%v: %v", err, h.on)
	}
	h.fail = errTest
	if err := other.hook(app, found); err != nil {
		t.Errorf("bind_vip is false and it fails: %v", err)
	}
	app.Process.BindVIP = true
	if err := other.hook(app, found); !errors.Is(err, errTest) || !strings.Contains(err.Error(), "set bind_vip = false") {
		t.Errorf("%v", err)
	}
}

// Where the hook is not possible nothing is started and nothing left.
func TestLauncherHookFails(t *testing.T) {
	for name, c := range map[string]struct {
		noCgroup bool
		says     string
	}{
		"no cgroup":     {true, "give the agent cgroup v2 (mount -t cgroup2"},
		"no permission": {false, "made to fail; or set bind_vip = false"},
	} {
		t.Run(name, func(t *testing.T) {
			l := &osLauncher{stateDir: t.TempDir(), log: quietLog(), noCgroup: c.noCgroup, hooks: &fakeHooks{fail: errTest}}
			t.Cleanup(l.children.Wait)
			mark := filepath.Join(t.TempDir(), "ran")
			app := hooked("touch " + mark)
			app.Name = "hookfails"
			if p, err := l.start(app); p != nil || err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, %v", p, err)
			}
			l.children.Wait()
			if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
				t.Error("it was started")
			}
			if left, _ := filepath.Glob(filepath.Join(cgroup2Mount(), cgroupParent, app.Name+".*")); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			if r, err := loadRecord(l.stateDir, app.Name); r != nil || err != nil {
				t.Errorf("left: %v, %v", r, err)
			}
		})
	}
	t.Run("no such command", func(t *testing.T) {
		h := &fakeHooks{on: map[string]string{}}
		l := &osLauncher{stateDir: t.TempDir(), log: quietLog(), hooks: h}
		app := hooked("")
		app.Name = "hookfails"
		bad := filepath.Join(t.TempDir(), "bad")
		writeFile(t, bad, "#!/nowhere\n")
		app.Process.Start = []string{bad}
		if p, err := l.start(app); p != nil || !errors.Is(err, unix.ENOENT) {
			t.Errorf("%v, %v", p, err)
		}
		if left, _ := filepath.Glob(filepath.Join(cgroup2Mount(), cgroupParent, app.Name+".*")); len(h.seen) != 1 || len(left) != 0 {
			t.Errorf("hooked %v, left %v", h.seen, left)
		}
	})
}

// A process that the agent has not started shares its cgroup with others.
func TestLauncherHookAdopted(t *testing.T) {
	h := &fakeHooks{on: map[string]string{}}
	l := &osLauncher{stateDir: t.TempDir(), log: quietLog(), hooks: h}
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	app := hooked("")
	app.Process.PidFile = filepath.Join(t.TempDir(), "pid")
	writeFile(t, app.Process.PidFile, strconv.Itoa(cmd.Process.Pid)+"\n")
	p, err := l.find(app)
	if err != nil || p == nil {
		t.Fatal(p, err)
	}
	if err := l.hook(app, p); !errors.Is(err, errNoCgroup) || len(h.seen) != 0 {
		t.Errorf("%v, hooked %v", err, h.seen)
	}
	app.Process.BindVIP = false
	if err := l.hook(app, p); err != nil {
		t.Error(err)
	}
}
