package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What doctor sees of a process: everything below /proc/PID that CRIU looks at
// too (proc(5)).

// patient is one process of the application.
type patient struct {
	procStat
	name       string
	tracer     int
	locked     bool // its limits cannot be read
	threads    []int
	strays     []string          // threads in another network namespace
	namespaces map[string]string // by the name of its file below ns
	files      []openFile
	maps       []mapping
	mounts     mounts
}

func (p *patient) String() string { return fmt.Sprintf("process %d (%s)", p.pid, p.name) }

// fileStat is what stat(2) tells of an open or mapped file.
type fileStat struct {
	mode         uint32
	dev, rdev    uint64
	inode, links uint64
	bytes        int64 // that it takes, which is less than its size where it has holes
}

func (s fileStat) kind() uint32 { return s.mode & unix.S_IFMT }

// openFile is one descriptor.
type openFile struct {
	fileStat
	fd     int
	target string // of the link in fd
	flags  int
	mount  int
	info   fdInfo
}

// fdInfo is what only some kinds of descriptors tell.
type fdInfo struct {
	tty     int      // number of the terminal of a ptmx; -1: it is none
	pid     int      // of a pidfd; 0: it is none
	watches []string // of an inotify: devices, as in mountinfo
	locked  bool
}

// mapping is one file in the memory of a process.
type mapping struct {
	fileStat
	path string
	area string // the name in map_files
}

// mounts are those of a process's namespace.
type mounts struct {
	byID     map[int]string    // the file system by the mount's number
	byDevice map[string]string // the file system by MAJOR:MINOR
}

const deletedMark = " (deleted)"

// examine reads one process; one that has ended is os.ErrNotExist.
func examine(s procStat) (*patient, error) {
	dir := "/proc/" + strconv.Itoa(s.pid)
	p := &patient{procStat: s, namespaces: map[string]string{}}
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return nil, gone(err)
	}
	p.name, p.tracer = parseStatus(status)
	if b, err := os.ReadFile(dir + "/mountinfo"); err == nil {
		p.mounts = parseMounts(b)
	}
	for _, name := range namesIn(dir + "/ns") {
		if target, err := os.Readlink(dir + "/ns/" + name); err == nil && !strings.HasSuffix(name, "_for_children") {
			p.namespaces[name] = target
		}
	}
	for _, name := range namesIn(dir + "/task") {
		tid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		p.threads = append(p.threads, tid)
		if ns, err := os.Readlink(dir + "/task/" + name + "/ns/net"); err == nil && ns != p.namespaces["net"] {
			p.strays = append(p.strays, name)
		}
	}
	p.locked = errors.Is(unix.Prlimit(s.pid, unix.RLIMIT_CPU, nil, &unix.Rlimit{}), unix.EPERM)
	if p.files, err = openFiles(dir); err != nil {
		return nil, gone(err)
	}
	maps, err := os.ReadFile(dir + "/maps")
	if err != nil {
		return nil, gone(err)
	}
	for _, m := range parseMaps(maps) {
		m.fileStat, _ = statOf(dir + "/map_files/" + m.area)
		p.maps = append(p.maps, m)
	}
	return p, nil
}

// gone makes one error of what a process that ends meanwhile answers.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return os.ErrNotExist
	}
	return err
}

func namesIn(dir string) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	return names
}

func statOf(path string) (fileStat, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return fileStat{}, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	const unit = 512 // st_blocks counts in these on every file system (stat(2))
	return fileStat{mode: st.Mode, dev: st.Dev, rdev: st.Rdev, inode: st.Ino, links: st.Nlink, bytes: st.Blocks * unit}, nil
}

// openFiles reads the descriptors in their order. One that is closed meanwhile
// is left out.
func openFiles(dir string) ([]openFile, error) {
	fds, err := numbers(dir + "/fd")
	if err != nil {
		return nil, err
	}
	var out []openFile
	for _, fd := range fds {
		name := strconv.Itoa(fd)
		f := openFile{fd: fd}
		if f.target, err = os.Readlink(dir + "/fd/" + name); err != nil {
			continue
		}
		info, err := os.ReadFile(dir + "/fdinfo/" + name)
		if err != nil {
			continue
		}
		f.flags, f.mount, f.info = parseFDInfo(info)
		if f.fileStat, err = statOf(dir + "/fd/" + name); err != nil {
			continue
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b openFile) int { return a.fd - b.fd })
	return out, nil
}

// parseStatus reads the name and the tracer of a process.
func parseStatus(b []byte) (name string, tracer int) {
	for line := range bytes.Lines(b) {
		key, value, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		switch key {
		case "Name":
			name = strings.TrimSpace(value)
		case "TracerPid":
			tracer, _ = strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return name, tracer
}

// parseFDInfo reads a file of fdinfo.
func parseFDInfo(b []byte) (flags, mount int, info fdInfo) {
	info.tty = -1
	for line := range bytes.Lines(b) {
		text := strings.TrimSpace(string(line))
		if strings.HasPrefix(text, "inotify ") {
			info.watches = append(info.watches, watchDevice(text))
			continue
		}
		key, value, _ := strings.Cut(text, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "flags":
			n, _ := strconv.ParseInt(value, 8, 64)
			flags = int(n)
		case "mnt_id":
			mount, _ = strconv.Atoi(value)
		case "tty-index":
			info.tty, _ = strconv.Atoi(value)
		case "Pid":
			info.pid, _ = strconv.Atoi(value)
		case "lock":
			info.locked = true
		}
	}
	return flags, mount, info
}

// watchDevice gives the device of a watch as mountinfo writes it. The kernel
// shows its own number here: the minor takes the low 20 bits.
func watchDevice(line string) string {
	for _, f := range strings.Fields(line) {
		if hex, ok := strings.CutPrefix(f, "sdev:"); ok {
			n, err := strconv.ParseUint(hex, 16, 32)
			if err == nil {
				return fmt.Sprintf("%d:%d", n>>20, n&(1<<20-1))
			}
		}
	}
	return ""
}

// parseMaps picks the mappings that have a file, each file once.
func parseMaps(b []byte) []mapping {
	var out []mapping
	seen := map[string]bool{}
	for line := range bytes.Lines(b) {
		// ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH; a path may hold spaces.
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 6)
		if len(f) < 6 {
			continue
		}
		path := strings.TrimLeft(f[5], " ")
		if !strings.HasPrefix(path, "/") || seen[f[3]+f[4]+path] {
			continue
		}
		seen[f[3]+f[4]+path] = true
		from, to, _ := strings.Cut(f[0], "-") // padded here, not in map_files
		out = append(out, mapping{path: path, area: strings.TrimLeft(from, "0") + "-" + strings.TrimLeft(to, "0")})
	}
	return out
}

// parseMounts reads mountinfo (proc_pid_mountinfo(5)).
func parseMounts(b []byte) mounts {
	m := mounts{map[int]string{}, map[string]string{}}
	for line := range bytes.Lines(b) {
		before, after, ok := strings.Cut(string(line), " - ")
		f, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 3 || len(kind) < 1 {
			continue
		}
		if id, err := strconv.Atoi(f[0]); err == nil {
			m.byID[id] = kind[0]
		}
		m.byDevice[f[2]] = kind[0]
	}
	return m
}

// holders finds the processes outside of the application that hold one of the
// files, by what their links in fd say.
func holders(wanted map[string]bool, inside map[int]bool) map[string]string {
	found := map[string]string{}
	if len(wanted) == 0 {
		return found
	}
	for _, name := range namesIn("/proc") {
		pid, err := strconv.Atoi(name)
		if err != nil || inside[pid] {
			continue
		}
		for _, fd := range namesIn("/proc/" + name + "/fd") {
			target, err := os.Readlink("/proc/" + name + "/fd/" + fd)
			if err != nil || !wanted[target] || found[target] != "" {
				continue
			}
			comm, _ := os.ReadFile("/proc/" + name + "/comm")
			found[target] = fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(comm)))
		}
	}
	return found
}
