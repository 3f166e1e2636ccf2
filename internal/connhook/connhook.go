// Package connhook gives the TCP connections that the processes of a cgroup
// open a source address, without any change of their program: BPF programs of
// the types cgroup/connect4 and cgroup/connect6, run by the kernel at the
// beginning of each connect(2). They are written here as instructions, so that
// no compiler is needed to build them or on the node.
//
// The programs are attached to the cgroup itself (BPF_PROG_ATTACH), not by a
// link: a link ends with the process that made it unless it is pinned in a
// bpffs, which not every machine has mounted, and a pin stays when the cgroup
// is gone. An attached program stays as long as its cgroup and goes with it,
// which is the life that is wanted, and the cgroup itself tells a later process
// which programs it has. Both ways share a cgroup with programs of others
// (BPF_F_ALLOW_MULTI).
//
// It needs Linux 5.11 (BPF_F_REPLACE since 5.6; before 5.11 a program counts
// against RLIMIT_MEMLOCK) with CONFIG_CGROUP_BPF, cgroup v2 and
// CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN.
package connhook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Attach has the connections that the processes of the cgroup v2 (a directory)
// open from now on get the source; what was attached by an earlier call, also
// of another process, is replaced, without a moment in which no program is
// there. A socket is judged by the cgroup in which its process was when it made
// it. A failed call may be repeated.
func Attach(cgroup string, s Source) error {
	dir, err := os.Open(cgroup)
	if err != nil {
		return fmt.Errorf("connhook: %w", err)
	}
	defer dir.Close()
	for _, h := range hooks {
		if err := h.set(dir, s); err != nil {
			return fmt.Errorf("connhook: %s on %s: %w%s", h.name, cgroup, err, remedy(err))
		}
	}
	return nil
}

// Detach removes what Attach did. That nothing is attached, or that the cgroup
// is gone, is no error.
func Detach(cgroup string) error {
	dir, err := os.Open(cgroup)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("connhook: %w", err)
	}
	defer dir.Close()
	for _, h := range hooks {
		if err := h.clear(dir); err != nil {
			return fmt.Errorf("connhook: %s on %s: %w%s", h.name, cgroup, err, remedy(err))
		}
	}
	return nil
}

// set attaches the hook's program for the source, or removes it where there is
// none for it.
func (h hook) set(dir *os.File, s Source) error {
	spec, err := h.program(s)
	if err != nil {
		return err
	}
	if spec == nil {
		return h.clear(dir)
	}
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		return err
	}
	defer p.Close() // the cgroup holds it
	old, err := h.attached(dir)
	if err != nil {
		return err
	}
	defer closeAll(old)
	o := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: h.attach, Flags: unix.BPF_F_ALLOW_MULTI}
	if len(old) > 0 {
		o.Anchor = link.ReplaceProgram(old[0])
	}
	return link.RawAttachProgram(o)
}

func (h hook) clear(dir *os.File) error {
	old, err := h.attached(dir)
	if err != nil {
		return err
	}
	defer closeAll(old)
	for _, p := range old {
		err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: h.attach})
		if err != nil {
			return err
		}
	}
	return nil
}

// attached finds the hook's program on the cgroup by its name: none or one.
func (h hook) attached(dir *os.File) (out []*ebpf.Program, err error) {
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: h.attach})
	if err != nil {
		return nil, err
	}
	for _, at := range r.Programs {
		p, err := ebpf.NewProgramFromID(at.ID)
		if errors.Is(err, fs.ErrNotExist) { // detached meanwhile
			continue
		}
		if err == nil {
			var info *ebpf.ProgramInfo
			if info, err = p.Info(); err == nil && info.Name == h.name {
				out = append(out, p)
				continue
			}
			err = errors.Join(err, p.Close())
		}
		if err != nil {
			closeAll(out)
			return nil, err
		}
	}
	return out, nil
}

func closeAll(ps []*ebpf.Program) {
	for _, p := range ps {
		_ = p.Close() // a reference less
	}
}

// remedy tells what to do about an error.
func remedy(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "; it takes CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN, and no program above this cgroup that is attached for itself alone"
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBADF):
		return "; it takes Linux 5.11 with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, and a cgroup v2"
	}
	return ""
}
