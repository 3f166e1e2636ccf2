package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/criu"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Levels of a finding, the worst first.
const (
	levelFault   = "fault"   // a snapshot or its restore would fail, or lose something
	levelWarning = "warning" // they may
	levelNote    = "note"
)

var levels = []string{levelFault, levelWarning, levelNote}

// doctorTimeout bounds the runs of the criu command.
const doctorTimeout = 20 * time.Second

// diagnosis collects what there is to say of an application.
type diagnosis struct {
	app      *config.App
	criu     bool
	findings []*pb.Finding
	places   map[string]*place // of findings that are somewhere in a process
}

// place is a finding that several processes may share, as workers do that
// inherited a descriptor.
type place struct {
	*pb.Finding
	first string
	more  int
}

func (d *diagnosis) add(level, check, what, remedy string) {
	d.findings = append(d.findings, &pb.Finding{Level: level, Check: check, What: what, Remedy: remedy})
}

func (d *diagnosis) fault(check, what, remedy string)   { d.add(levelFault, check, what, remedy) }
func (d *diagnosis) warning(check, what, remedy string) { d.add(levelWarning, check, what, remedy) }
func (d *diagnosis) note(check, what, remedy string)    { d.add(levelNote, check, what, remedy) }

// at adds a fault that is somewhere; the same one elsewhere is counted only.
func (d *diagnosis) at(where, check, what, remedy string) {
	key := check + "\n" + what
	if p := d.places[key]; p != nil {
		p.more++
		p.What = fmt.Sprintf("%s (and %d more) %s", p.first, p.more, what)
		return
	}
	d.fault(check, where+" "+what, remedy)
	if d.places == nil {
		d.places = map[string]*place{}
	}
	d.places[key] = &place{Finding: d.findings[len(d.findings)-1], first: where}
}

// Doctor serves the request of the same name.
func (a *agent) Doctor(ctx context.Context, r *connect.Request[pb.AgentDoctorRequest]) (*connect.Response[pb.AgentDoctorReply], error) {
	app, err := a.app(r.Msg.App)
	if err != nil {
		return nil, err
	}
	d := &diagnosis{app: app, criu: app.Checkpoint.Engine == config.EngineCRIU}
	if d.criu {
		d.command(ctx, a)
	}
	if err := d.running(ctx, a); err != nil {
		return nil, failed("doctor", app.Name, "", err)
	}
	slices.SortStableFunc(d.findings, func(x, y *pb.Finding) int {
		return slices.Index(levels, x.Level) - slices.Index(levels, y.Level)
	})
	return answer(&pb.AgentDoctorReply{App: app.Name, Engine: app.Checkpoint.Engine, Findings: d.findings}, nil)
}

// running looks at the process and its sockets.
func (d *diagnosis) running(ctx context.Context, a *agent) error {
	proc, err := a.processOf(d.app)
	if err != nil {
		return err
	}
	if proc == nil {
		d.fault("process", "it does not run on this node, so nothing of it can be looked at",
			"ckptctl start "+d.app.Name+", or ckptctl restore "+d.app.Name+" where it is away")
		return nil
	}
	if err := proc.within(d.app.Process.Namespace); errors.Is(err, errElsewhere) {
		d.fault("namespace", err.Error(), "set process.namespace to the one that it runs in, or stop and start it")
		return nil
	} else if err != nil {
		return err
	}
	t, err := newTree(proc)
	if err != nil {
		return err
	}
	if d.criu {
		d.tree(t)
		for _, p := range t.all {
			d.process(t, p)
		}
		d.files(t)
	}
	return d.sockets(ctx, a, t)
}

// command looks at the criu command and at what the kernel has for it.
func (d *diagnosis) command(ctx context.Context, a *agent) {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, fmt.Errorf("it did not answer within %s", doctorTimeout))
	defer cancel()
	name := a.config().Node.CRIU.Command
	path, err := exec.LookPath(name)
	if err != nil {
		d.fault("criu", fmt.Sprintf("the command %q of CRIU cannot be run: %v", name, err),
			"install CRIU, or name it in the node's file: [criu] command = \"/path/to/criu\"")
		return
	}
	if os.Geteuid() == 0 {
		if err := a.trust(path); err != nil {
			d.fault("criu", "the agent does not run CRIU as root: "+err.Error(), "make it root's own, writable by nobody else")
			return
		}
	}
	version, err := criu.Version(ctx, path)
	if err != nil {
		d.fault("criu", fmt.Sprintf("%s does not tell its version: %v", path, err), "install a CRIU that works here")
		return
	}
	if least := leastCRIU(kernelRelease()); !criu.AtLeast(version, least) {
		d.fault("criu", fmt.Sprintf("%s is version %s, and Linux %s needs %s at least", path, version, kernelRelease(), least),
			"install a newer CRIU and name it in [criu] command of the node's file")
		return
	}
	if err := criu.Check(ctx, path); err != nil {
		d.fault("criu", "criu check fails: "+err.Error(), "run "+path+" check as root and give the kernel, or the agent's privileges, what it names")
	}
	if ok, why := criu.Feature(ctx, path, "mem_dirty_track"); !ok {
		d.note("memory", "the kernel does not track which memory has changed ("+why+"), so memory cannot be copied before the application is stopped: the larger it is, the longer it stands still",
			"none is needed; a kernel with CONFIG_MEM_SOFT_DIRTY shortens the pause")
	}
}

// leastCRIU gives the version that dumps sockets on a kernel: since 6.16
// SO_PASSCRED is refused for sockets that are not Unix ones, and older versions
// take that for a failure.
func leastCRIU(kernel string) string {
	if criu.AtLeast(kernel, "6.16") {
		return "4.2"
	}
	return "4.0"
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// some names a few of many.
func some(list []string) string {
	if len(list) <= maxNamed {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:maxNamed], ", "), len(list)-maxNamed)
}
