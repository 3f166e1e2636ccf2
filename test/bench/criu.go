package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

// criuSizes are numbers of connections, and what a snapshot of them may take longer
// than CRIU alone, in ms.
var criuSizes = []struct {
	conns int
	most  float64
}{{1000, 10}, {5000, 50}}

const (
	// imageData is how much a Redis that is dumped has in its memory, in MiB.
	imageData = 16
	// pidFree is how long a process number may be another's that was given it meanwhile.
	pidFree = time.Minute
)

// dumps measures, with idle Redis clients, a snapshot by image against CRIU alone,
// without a lock for its connections and with its own; in turn, after one round that
// does not count. It is fairest with TMPDIR on a file system where nobody else deletes
// or writes. Figures beyond the limits are shown as such, and are no failure.
func dumps(bin string, rounds, only int) error {
	out, err := exec.Command(filepath.Join(filepath.Dir(bin), "scripts", "criu.sh")).Output()
	if err != nil {
		return fmt.Errorf("scripts/criu.sh: %w", err)
	}
	command := strings.TrimSpace(string(out))
	var errs []error
	for _, size := range criuSizes {
		if only == 0 || only == size.conns {
			errs = append(errs, measureDumps(bin, command, rounds, size.conns, size.most))
		}
	}
	return errors.Join(errs...)
}

// dumped is a Redis that is dumped again and again, with its clients.
type dumped struct {
	n    *harness.Node
	load *clients.Load
}

// imageFigures are those of all rounds, in ms.
type imageFigures struct {
	snapshot, restore        []float64 // of ckptctl
	skip, written, skipBack  []float64 // CRIU alone; with its images on the disk
	nftables, nftablesBack   []float64
	phases, phasesBack       map[string][][2]float64
	phaseNames, phaseNamesUp []string
}

func measureDumps(bin, command string, rounds, conns int, most float64) (err error) {
	server := harness.Redis("redis", vip)
	server.Before = nil
	server.Checkpoint = "engine = \"criu\"\n"
	setFlag(server.Start, "--maxclients", strconv.Itoa(conns+1000))
	n, err := harness.New(harness.Options{Name: "image", Bin: bin, CRIU: command, Apps: []harness.App{server}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	// Nothing is deleted before the end: for minutes ext4 goes past each inode that was
	// free shortly before (kernel fs/ext4/ialloc.c, recently_deleted), at every new file.
	if err := os.WriteFile(n.Path("shared", "cluster.toml"), fmt.Appendf(nil, "[snapshots]\nkeep = %d\n", rounds+2), 0o644); err != nil {
		return err
	}
	if err := n.Up(); err != nil {
		return fmt.Errorf("%w\n%s", err, n.Logs())
	}
	ours := dumped{n: n}
	if err := ours.connect(net.JoinHostPort(vip, strconv.Itoa(redisPort)), conns); err != nil {
		return err
	}
	defer ours.load.Close()
	host := n.Net.NodeAddr().String()
	pure := alonely{dumped: dumped{n: n}, command: command, dir: n.Path("alone")}
	if err := pure.start(server, host); err != nil {
		return err
	}
	if err := pure.connect(net.JoinHostPort(host, strconv.Itoa(alonePort)), conns); err != nil {
		return err
	}
	defer pure.load.Close()

	fmt.Printf("%d idle connections, %d MiB of data, dumped, ms (criu: alone, with --network-lock skip or nftables)\n", conns, imageData)
	fmt.Println("  round  snapshot  criu skip  on the disk  criu nftables   beyond skip   restore  criu skip  criu nftables  load average")
	f := imageFigures{phases: map[string][][2]float64{}, phasesBack: map[string][][2]float64{}}
	for i := range rounds + 1 {
		if i == 1 { // what came before was the first touch of everything
			f = imageFigures{phases: map[string][][2]float64{}, phasesBack: map[string][][2]float64{}}
		}
		steps := []func() error{
			func() error { return f.ours(&ours) },
			func() error { return f.alone(&pure, false) },
			func() error { return f.alone(&pure, true) },
		}
		for k := range steps { // each is the first as often
			if err := steps[(i+k)%len(steps)](); err != nil {
				return fmt.Errorf("%w\n%s", err, n.Logs())
			}
		}
		at := len(f.snapshot) - 1
		fmt.Printf("  %5d %9.1f %10.1f %12.1f %14.1f %13.1f %9.1f %10.1f %14.1f  %s\n", i, f.snapshot[at], f.skip[at], f.written[at], f.nftables[at],
			f.snapshot[at]-f.skip[at], f.restore[at], f.skipBack[at], f.nftablesBack[at], loadAverage())
	}
	f.tell(most)
	return nil
}

// connect opens clients and gives the server its data.
func (d *dumped) connect(addr string, conns int) error {
	raw, err := clients.DialRaw(d.n.Dial, addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	for i := range imageData {
		if err := raw.SetGet(fmt.Sprintf("data:%d", i), 1<<20, time.Minute); err != nil {
			return err
		}
	}
	// One in ten asks every second whether its server lives.
	mix := make([]clients.KeepAlive, 10)
	mix[0] = clients.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 20}
	d.load, err = clients.OpenLoad(d.n.Dial, addr, 0, conns, mix...)
	return err
}

// check has every client get the right reply; they are idle behind it.
func (d *dumped) check() error { return clients.Summary(d.load.Round(time.Minute)) }

// ours is one snapshot by ckptctl, and back.
func (f *imageFigures) ours(d *dumped) error {
	if err := d.check(); err != nil {
		return err
	}
	down, took, err := timed(d.n, "snapshot")
	if err != nil {
		return err
	}
	f.snapshot = append(f.snapshot, took)
	f.phaseNames = note(f.phases, down)
	var up []phase
	err = again(func() (err error) { up, took, err = timed(d.n, "restore"); return err })
	if err != nil {
		return err
	}
	f.restore = append(f.restore, took)
	f.phaseNamesUp = note(f.phasesBack, up)
	return d.check()
}

// again repeats a restore while one of its process numbers is another's, on a machine
// that starts many.
func again(restore func() error) (err error) {
	taken := func() bool {
		return strings.Contains(err.Error(), "is taken by another process") || strings.Contains(err.Error(), "File exists")
	}
	werr := harness.Wait(pidFree, "its process number is free", func() bool { err = restore(); return err == nil || !taken() })
	return errors.Join(err, werr)
}

// note adds the phases of an operation, and of each what the filter took, to the figures.
func note(all map[string][][2]float64, phases []phase) (names []string) {
	for _, p := range phases {
		all[p.Name] = append(all[p.Name], [2]float64{p.MS, p.FilterMS})
		names = append(names, p.Name)
	}
	return names
}

// timed runs an operation and gives what the whole command took, in ms.
func timed(n *harness.Node, command string) ([]phase, float64, error) {
	r := n.Ctl("-o", "json", command, "redis")
	if err := r.Err(); err != nil {
		return nil, 0, err
	}
	var reply struct {
		Phases []phase `json:"phases"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &reply); err != nil || len(reply.Phases) == 0 {
		return nil, 0, fmt.Errorf("%s says %q: %w", command, r.Stdout, err)
	}
	phases := append(reply.Phases, phase{Name: "the command itself", MS: ms(r.Took) - sum(reply.Phases)})
	return phases, ms(r.Took), nil
}

// alonely is a Redis that nothing of this project knows.
type alonely struct {
	dumped
	command, dir string
	images, pid  int
	ended        chan error // of the process, whose parent we are: its number is free then
}

func (p *alonely) start(server harness.App, host string) error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	args := slices.Clone(server.Start)
	setFlag(args, "--bind", host)
	setFlag(args, "--port", strconv.Itoa(alonePort))
	setFlag(args, "--dir", p.dir)
	cmd := p.n.Net.Node().Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.pid, p.ended = cmd.Process.Pid, make(chan error, 1)
	go func() { p.ended <- cmd.Wait() }()
	return harness.Wait(10*time.Second, "redis alone listens", func() bool {
		c, err := p.n.Dial(net.JoinHostPort(host, strconv.Itoa(alonePort)))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// alone is one dump by CRIU alone, and back.
func (f *imageFigures) alone(p *alonely, lock bool) error {
	if err := p.check(); err != nil {
		return err
	}
	p.images++
	dir := filepath.Join(p.dir, fmt.Sprint("images-", p.images))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	method := "nftables"
	if !lock { // what the kernel says of closed sockets would reset the clients'
		method = "skip"
		if err := p.lock("-I"); err != nil {
			return err
		}
	}
	took, err := p.criu("dump", "-t", strconv.Itoa(p.pid), "-D", dir, "--tcp-established", "--network-lock", method)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := syncFS(dir); err != nil {
		return err
	}
	synced := ms(time.Since(began))
	<-p.ended
	back, err := p.restore(dir)
	if err != nil {
		return err
	}
	if lock {
		f.nftables, f.nftablesBack = append(f.nftables, took), append(f.nftablesBack, back)
	} else {
		f.skip, f.written, f.skipBack = append(f.skip, took), append(f.written, took+synced), append(f.skipBack, back)
		if err := p.lock("-D"); err != nil {
			return err
		}
	}
	return p.check()
}

// lock drops (-I), or no longer (-D), what goes to or comes from the server.
func (p *alonely) lock(do string) error {
	for _, chain := range []struct{ name, port string }{{"INPUT", "--dport"}, {"OUTPUT", "--sport"}} {
		cmd := p.n.Net.Node().Command("iptables", "-w", do, chain.name, "-p", "tcp", chain.port, strconv.Itoa(alonePort), "-j", "DROP")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("iptables: %w: %s", err, out)
		}
	}
	return nil
}

// restore makes the process again, a child of this one, and gives how long it took, in ms.
func (p *alonely) restore(dir string) (took float64, err error) {
	err = again(func() (err error) {
		const log = "restore.log" // a pipe would be open as long as what is restored
		if took, err = p.criu("restore", "-d", "--restore-sibling", "-D", dir, "-o", log, "--tcp-established"); err != nil {
			text, _ := os.ReadFile(filepath.Join(dir, log))
			err = fmt.Errorf("%w: %s", err, text)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	child, err := os.FindProcess(p.pid)
	if err != nil {
		return 0, err
	}
	go func() { _, err := child.Wait(); p.ended <- err }()
	return took, nil
}

// criu runs a command of CRIU and gives how long it took, in ms.
func (p *alonely) criu(args ...string) (float64, error) {
	cmd := p.n.Net.Node().Command(p.command, args...)
	var out bytes.Buffer
	if args[0] == "dump" {
		cmd.Stdout, cmd.Stderr = &out, &out
	}
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("criu %s: %w: %s", args[0], err, out.String())
	}
	return ms(time.Since(began)), nil
}

func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// tell shows what all rounds gave.
func (f *imageFigures) tell(most float64) {
	var beyond, written []float64
	for i := range f.snapshot { // of the same round: the machine is not as busy in each
		beyond = append(beyond, f.snapshot[i]-f.skip[i])
		written = append(written, f.snapshot[i]-f.written[i])
	}
	fmt.Println("                                     median   minimum  quartiles          maximum")
	spread("snapshot", f.snapshot)
	spread("criu skip", f.skip)
	spread("criu skip, on the disk", f.written)
	spread("criu nftables", f.nftables)
	spread("restore", f.restore)
	spread("criu skip, restore", f.skipBack)
	spread("criu nftables, restore", f.nftablesBack)
	spread("snapshot beyond skip, on disk", written)
	spread("snapshot beyond criu skip", beyond)
	verdict := "within"
	if median(beyond) > most {
		verdict = "BEYOND"
	}
	fmt.Printf("  snapshot beyond criu skip, median %.1f ms, limit %.0f ms: %s\n", median(beyond), most, verdict)
	tellPhases("snapshot", f.phaseNames, f.phases)
	tellPhases("restore", f.phaseNamesUp, f.phasesBack)
}

func spread(what string, x []float64) {
	s := slices.Sorted(slices.Values(x))
	fmt.Printf("  %-30s %10.1f %9.1f %8.1f %8.1f %10.1f\n", what, median(s), s[0], s[len(s)/4], s[len(s)-1-len(s)/4], s[len(s)-1])
}

func tellPhases(what string, names []string, all map[string][][2]float64) {
	fmt.Printf("  phases of %s, median (minimum; of the median in the filter):", what)
	for _, n := range names {
		var took, filter []float64
		for _, p := range all[n] {
			took, filter = append(took, p[0]), append(filter, p[1])
		}
		fmt.Printf("  %s %.1f (%.1f; %.1f)", n, median(took), slices.Min(took), median(filter))
	}
	fmt.Println()
}
