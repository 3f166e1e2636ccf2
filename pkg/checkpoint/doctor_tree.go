package checkpoint

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Judgements on processes and their files. Each was seen with CRIU 4.2.1, or
// says in a comment where its source has it. The engine gives it the
// option for file locks, and none for deleted files that have other names
// (--link-remap) or Unix sockets to the outside (--ext-unix-sk).

// ghostLimit is up to which size CRIU keeps a deleted file that is open
// (files-reg.c, dump_ghost_remap; --ghost-limit).
const ghostLimit = 1 << 20

// kin is the application's processes together.
type kin struct {
	all      []*patient
	root     *patient // that CRIU is told to dump, with all its descendants
	inside   map[int]bool
	host     map[string]string // the agent's own namespaces
	outsider map[string]string // who else holds a pipe or socket, by the link in fd
}

// newTree examines the application's processes.
func newTree(proc process) (*kin, error) {
	t := &kin{inside: map[int]bool{}, host: map[string]string{}}
	p, ok := proc.(*osProcess)
	if !ok {
		return t, nil
	}
	list, err := p.members()
	if err != nil {
		return nil, err
	}
	for _, s := range list {
		one, err := examine(s)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", s.pid, err)
		}
		t.all = append(t.all, one)
	}
	for _, name := range namesIn("/proc/self/ns") {
		if target, err := os.Readlink("/proc/self/ns/" + name); err == nil {
			t.host[name] = target
		}
	}
	t.place(p.rec.PID)
	wanted := map[string]bool{}
	for _, one := range t.all {
		for _, f := range one.files {
			if f.kind() == unix.S_IFIFO && strings.HasPrefix(f.target, "pipe:") {
				wanted[f.target] = true
			}
		}
	}
	t.outsider = holders(wanted, t.inside)
	return t, nil
}

// place finds the root of the tree: the process that was started, or where
// that has put itself into the background, the one whose parent is no member.
func (t *kin) place(started int) {
	for _, p := range t.all {
		t.inside[p.pid] = true
	}
	for _, p := range t.all {
		if p.pid == started || t.root == nil && !t.inside[p.ppid] {
			t.root = p
			if p.pid == started {
				return
			}
		}
	}
}

// descends tells whether CRIU meets the process when it walks down from the
// root.
func (t *kin) descends(p *patient) bool {
	parent := map[int]int{}
	for _, o := range t.all {
		parent[o.pid] = o.ppid
	}
	for pid := p.pid; t.inside[pid]; pid = parent[pid] {
		if pid == t.root.pid {
			return true
		}
	}
	return false
}

// tree judges what concerns the processes together.
func (d *diagnosis) tree(t *kin) {
	if t.root == nil {
		return
	}
	if t.root.sid != t.root.pid {
		d.fault("session", fmt.Sprintf("%s does not lead its session, which is %d's", t.root, t.root.sid),
			"start it with process.start of the application's file, or by setsid, its output redirected to a file")
	}
	ids := map[int]bool{}
	for _, p := range t.all {
		if !t.descends(p) {
			d.fault("tree", fmt.Sprintf("%s belongs to the application and is no descendant of %s, so it would be left out", p, t.root),
				"keep the program in the foreground (it must not daemonize), so that all of it descends from the process that is started")
		}
		ids[p.pid], ids[p.pgid], ids[p.sid] = true, true, true
		for _, tid := range p.threads {
			ids[tid] = true
		}
		for _, name := range slices.Sorted(maps.Keys(p.namespaces)) {
			if p.namespaces[name] != t.root.namespaces[name] && !d.nests(t, name) {
				d.fault("namespace", fmt.Sprintf("%s is in another %s namespace than %s", p, name, t.root), "start all of it in one namespace")
			}
		}
		if len(p.strays) > 0 {
			d.fault("namespace", fmt.Sprintf("of %s these threads are in another network namespace and would come back outside of it: %s", p, some(p.strays)),
				"let the program leave the namespace again, or make a process of its own for it")
		}
	}
	d.note("pid", fmt.Sprintf("%d process and thread numbers must be free where it is restored", len(ids)),
		"where one is taken, end that process; to be sure, run the application in a PID namespace of its own")
}

// nests tells that CRIU takes such a namespace of a child along, which it does
// where the root has one of its own, too (namespaces.c, generate_ns_id).
func (d *diagnosis) nests(t *kin, name string) bool {
	return (name == "net" || name == "mnt") && t.root.namespaces[name] != t.host[name]
}

// process judges one process and its descriptors.
func (d *diagnosis) process(t *kin, p *patient) {
	if p.tracer != 0 {
		d.fault("tracer", fmt.Sprintf("%s is traced by process %d, and CRIU has to trace it itself", p, p.tracer), "end the debugger or strace")
	}
	if p.locked {
		d.at(p.String(), "privilege", "runs as another user, and the agent lacks CAP_SYS_RESOURCE, without which CRIU cannot read its limits (prlimit(2))",
			"give the agent that capability, or run the application as the agent's user")
	}
	for _, f := range p.files {
		where := fmt.Sprintf("descriptor %d of %s", f.fd, p)
		if f.info.locked {
			d.add(levelWarning, "lock", where+" holds a lock on "+f.target, "it is taken again at the restore: let nothing else lock the file while the application is away")
		}
		if strings.HasPrefix(f.target, "anon_inode:") { // the kind of these differs from kernel to kernel
			d.anonymous(t, p, f, where)
			continue
		}
		switch f.kind() {
		case unix.S_IFCHR:
			d.device(t, p, f, where)
		case unix.S_IFBLK:
			// files.c, dump_one_file: nothing takes it.
			d.at(where, "device", "is the block device "+f.target, "let the program close it before the snapshot")
		case unix.S_IFIFO:
			d.pipe(t, f, where)
		case unix.S_IFREG:
			d.regular(p, f, where)
		}
	}
	for _, m := range p.maps {
		d.mapped(t, p, m)
	}
}

// Numbers of Documentation/admin-guide/devices.txt.
const (
	majorMem       = 1
	majorTTY       = 4
	majorTTYAux    = 5
	majorMisc      = 10
	majorPTYFirst  = 136
	majorPTYLast   = 143
	minorTUN       = 200
	minorAutofs    = 235
	minorCtty      = 0 // of majorTTYAux: /dev/tty
	minorsPerMajor = 256
)

// terminal gives the number of the pseudoterminal whose slave the file is.
func (s fileStat) terminal() (int, bool) {
	major := unix.Major(s.rdev)
	if s.kind() != unix.S_IFCHR || major < majorPTYFirst || major > majorPTYLast {
		return 0, false
	}
	return int(major-majorPTYFirst)*minorsPerMajor + int(unix.Minor(s.rdev)), true
}

func (d *diagnosis) device(t *kin, p *patient, f openFile, where string) {
	const remedy = "start it without a terminal (setsid), with its input from /dev/null and its output to a file"
	major, minor := unix.Major(f.rdev), unix.Minor(f.rdev)
	if n, ok := f.terminal(); ok {
		if !t.has(func(o openFile) bool {
			return o.info.tty == n && o.kind() == unix.S_IFCHR && unix.Major(o.rdev) == majorTTYAux
		}) {
			d.at(where, "terminal", "is the terminal "+f.target+", whose other end is outside of the application", remedy)
		}
		return
	}
	switch {
	case major == majorTTYAux && minor == minorCtty:
		// tty.c, tty_verify_ctty
		if !t.has(func(o openFile) bool { _, ok := o.terminal(); return ok }) {
			d.at(where, "terminal", "is "+f.target+", and the application holds no terminal itself", remedy)
		}
	case major == majorMem, major == majorTTY, major == majorTTYAux, major == majorMisc && minor == minorAutofs:
	case major == majorMisc && minor == minorTUN:
		if p.namespaces["net"] == t.host["net"] {
			d.at(where, "device", "is "+f.target+", a network device of the host", "run the application in a network namespace of its own")
		}
	default:
		d.at(where, "device", fmt.Sprintf("is the device %s (%d:%d), which CRIU cannot dump", f.target, major, minor),
			"let the program close it before the snapshot, or run without it")
	}
}

// has tells whether any process of the application has such a file.
func (t *kin) has(f func(openFile) bool) bool {
	return slices.ContainsFunc(t.all, func(p *patient) bool { return slices.ContainsFunc(p.files, f) })
}

func (d *diagnosis) pipe(t *kin, f openFile, where string) {
	if f.flags&unix.O_DIRECT != 0 && strings.HasPrefix(f.target, "pipe:") {
		d.at(where, "pipe", "is a pipe in packet mode (O_DIRECT)", "let the program make its pipes without O_DIRECT")
	}
	if who := t.outsider[f.target]; who != "" {
		d.at(where, "pipe", fmt.Sprintf("is a pipe (%s) that %s holds, too: after a restore nobody is at that end", f.target, who),
			"redirect it to a file, or read from /dev/null; process.log_file does so for output")
	}
}

func (d *diagnosis) regular(p *patient, f openFile, where string) {
	if kind := p.mounts.byID[f.mount]; kind == "" && !strings.HasPrefix(f.target, "/memfd:") {
		if p.mounts.byID != nil && !strings.Contains(f.target, ":[") {
			d.at(where, "file", "is "+f.target+" on a file system that is mounted nowhere (a POSIX message queue, for one)", "let the program close it before the snapshot")
		}
	} else if strings.HasPrefix(kind, "nfs") && sillyName(f.target) {
		// files-reg.c, check_path_remap: it would need --link-remap.
		d.at(where, "deleted", "is "+f.target+", a deleted file on NFS", "let the program close files that it deletes, or keep them on a local disk")
	}
	d.deleted(f.fileStat, f.target, where)
}

// sillyName tells a name that an NFS client gives to a file that was deleted
// while it was open.
func sillyName(target string) bool {
	hex, ok := strings.CutPrefix(path.Base(target), ".nfs")
	return ok && len(hex) >= 16 && strings.Trim(hex, "0123456789abcdefABCDEF") == ""
}

// deleted judges a file whose name is gone.
func (d *diagnosis) deleted(s fileStat, target, where string) {
	name, ok := strings.CutSuffix(target, deletedMark)
	if !ok || strings.HasPrefix(name, "/memfd:") {
		return
	}
	switch {
	case s.links > 0:
		d.at(where, "deleted", "is "+name+", whose name was deleted while it has another one", "restart the application, or give the file its name back")
	case s.bytes > ghostLimit:
		d.at(where, "deleted", fmt.Sprintf("is %s, which was deleted or replaced and takes %d bytes: CRIU keeps deleted files up to %d", name, s.bytes, ghostLimit),
			"restart the application after an upgrade; let it keep the names of large temporary files")
	}
}

func (d *diagnosis) mapped(t *kin, p *patient, m mapping) {
	where := "the memory of " + p.String()
	switch {
	case strings.HasPrefix(m.path, "/SYSV"):
		if p.namespaces["ipc"] == t.host["ipc"] {
			d.at(where, "shm", "has a System V shared memory segment ("+strings.TrimSuffix(m.path, deletedMark)+") of the host",
				"start it in an IPC namespace of its own, as root: unshare --ipc setpriv --reuid USER --regid GROUP --init-groups COMMAND")
		}
	case m.kind() == unix.S_IFREG && !strings.HasPrefix(m.path, "/dev/zero"):
		d.deleted(m.fileStat, m.path, "a file in "+where)
	}
}

// kept are the anonymous files that CRIU knows (files.c, dump_one_file).
var kept = []string{"[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]"}

func (d *diagnosis) anonymous(t *kin, p *patient, f openFile, where string) {
	switch kind := strings.TrimPrefix(f.target, "anon_inode:"); {
	case kind == "[io_uring]":
		d.at(where, "io_uring", "is an io_uring, which CRIU cannot dump", "let the program run without io_uring")
	case !slices.Contains(kept, kind):
		d.at(where, "descriptor", "is "+f.target+", which CRIU cannot dump", "let the program run without it, or close it before the snapshot")
	case kind == "[pidfd]" && f.info.pid > 0 && !t.inside[f.info.pid]:
		d.at(where, "descriptor", fmt.Sprintf("stands for process %d, which is outside of the application", f.info.pid), "let the program close it before the snapshot")
	case kind == "inotify":
		for _, dev := range f.info.watches {
			if fs := p.mounts.byDevice[dev]; fs == "proc" || fs == "sysfs" {
				d.at(where, "inotify", "watches a file of "+fs+", which CRIU cannot find again", "let the program watch ordinary files only")
				break
			}
		}
	}
}

// files tells of what must be at the restore as it is now.
func (d *diagnosis) files(t *kin) {
	there, written := map[string]bool{}, map[string]bool{}
	for _, p := range t.all {
		for _, m := range p.maps {
			if m.kind() == unix.S_IFREG && !strings.HasSuffix(m.path, deletedMark) {
				there[m.path] = true
			}
		}
		for _, f := range p.files {
			if f.kind() != unix.S_IFREG || !strings.HasPrefix(f.target, "/") || strings.HasSuffix(f.target, deletedMark) {
				continue
			}
			there[f.target] = true
			// files-reg.c, should_check_size: all but logs.
			log := f.flags&unix.O_APPEND != 0 && f.flags&unix.O_ACCMODE == unix.O_WRONLY
			if f.flags&unix.O_ACCMODE != unix.O_RDONLY && !log {
				written[f.target] = true
			}
		}
	}
	if len(written) > 0 {
		d.warning("file", fmt.Sprintf("%d files are open for writing and must have the same size at the restore as at the snapshot: %s", len(written), some(slices.Sorted(maps.Keys(written)))),
			"let nothing else write to them while the application is away; logs are best opened with O_APPEND and O_WRONLY alone, those may grow")
	}
	if len(there) > 0 {
		d.note("file", fmt.Sprintf("%d files are open or mapped, programs and libraries among them; where it is restored, all must be there with the same size and mode", len(there)),
			"give both nodes the same packages, keep its data in a directory that both share, and upgrade nothing while it is away")
	}
}
