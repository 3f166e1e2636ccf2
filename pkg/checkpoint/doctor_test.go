package checkpoint

import (
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestParseProc(t *testing.T) {
	name, tracer := parseStatus([]byte("Name:\tredis: x\nState:\tS (sleeping)\nTracerPid:\t77\n"))
	if name != "redis: x" || tracer != 77 {
		t.Errorf("status: %q %d", name, tracer)
	}
	for text, want := range map[string]struct {
		flags, mount int
		info         fdInfo
	}{
		"pos:\t0\nflags:\t0102001\nmnt_id:\t29\nino:\t5\n":                 {unix.O_WRONLY | unix.O_APPEND | 0o100000, 29, fdInfo{tty: -1}},
		"flags:\t02\nmnt_id:\t7\ntty-index:\t3\n":                          {unix.O_RDWR, 7, fdInfo{tty: 3}},
		"flags:\t02\nPid:\t-1\nNSpid:\t-1\n":                               {unix.O_RDWR, 0, fdInfo{tty: -1, pid: -1}},
		"flags:\t0\nlock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11 0 EOF\n": {0, 0, fdInfo{tty: -1, locked: true}},
		"flags:\t0\ninotify wd:2 ino:1 sdev:800013 mask:100 ignored_mask:0 fhandle-bytes:8\ninotify wd:1 ino:9 sdev:15 mask:2\n": {0, 0,
			fdInfo{tty: -1, watches: []string{"8:19", "0:21"}}},
	} {
		if flags, mount, info := parseFDInfo([]byte(text)); flags != want.flags || mount != want.mount || !reflect.DeepEqual(info, want.info) {
			t.Errorf("%q: %o %d %+v", text, flags, mount, info)
		}
	}
	m := parseMounts([]byte("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n23 22 0:21 / /proc rw - proc proc rw\nodd\n25 22 0:30 / /srv/a\\040b rw - nfs4 h:/ rw\n"))
	if m.byID[22] != "ext4" || m.byID[25] != "nfs4" || m.byDevice["0:21"] != "proc" || len(m.byID) != 3 {
		t.Errorf("mounts: %+v", m)
	}
	maps := parseMaps([]byte("00400000-0048a000 r-xp 00000000 fd:03 960637       /opt/my prog (deleted)\n" +
		"0048a000-0048b000 rw-p 00000000 fd:03 960637       /opt/my prog (deleted)\n" + // the same file
		"7f00-7f01 rw-p 00000000 00:00 0 \n7f02-7f03 rw-p 00000000 00:00 0    [heap]\n7f04-7f05 rw-s 00000000 00:01 65536   /SYSV00000000 (deleted)\n"))
	want := []mapping{{path: "/opt/my prog (deleted)", area: "400000-48a000"}, {path: "/SYSV00000000 (deleted)", area: "7f04-7f05"}}
	if !reflect.DeepEqual(maps, want) {
		t.Errorf("maps: %+v", maps)
	}
}

// said gives what a judgement says: "LEVEL CHECK" for each finding.
func said(judge func(*diagnosis)) string {
	d := &diagnosis{app: &config.App{Name: "redis"}, criu: true}
	judge(d)
	var out []string
	for _, f := range d.findings {
		out = append(out, f.Level+" "+f.Check)
	}
	return strings.Join(out, ", ")
}

func person(pid, ppid, sid int) *patient {
	return &patient{procStat: procStat{pid: pid, ppid: ppid, pgid: sid, sid: sid}, threads: []int{pid},
		namespaces: map[string]string{"net": "net:[1]", "mnt": "mnt:[1]", "ipc": "ipc:[1]"}}
}

func TestDoctorTree(t *testing.T) {
	in := func(p *patient, name, id string) *patient {
		p.namespaces[name] = id
		return p
	}
	for name, c := range map[string]struct {
		started int
		all     []*patient
		want    string
	}{
		"one process":                      {10, []*patient{person(10, 1, 10)}, "note pid"},
		"a family":                         {10, []*patient{person(12, 11, 10), person(11, 10, 10), person(10, 1, 10)}, "note pid"},
		"of another's session":             {10, []*patient{person(10, 1, 7)}, "fault session, note pid"},
		"gone to the background":           {9, []*patient{person(11, 10, 10), person(10, 1, 10)}, "note pid"},
		"left behind":                      {10, []*patient{person(10, 1, 10), person(12, 1, 10)}, "fault tree, note pid"},
		"child in another IPC namespace":   {10, []*patient{person(10, 1, 10), in(person(11, 10, 10), "ipc", "ipc:[2]")}, "fault namespace, note pid"},
		"child in another mount namespace": {10, []*patient{person(10, 1, 10), in(person(11, 10, 10), "mnt", "mnt:[2]")}, "fault namespace, note pid"},
		// Where the root is in one of its own, children may be in others.
		"a namespace within one": {10, []*patient{in(person(10, 1, 10), "net", "net:[2]"), in(person(11, 10, 10), "net", "net:[3]")}, "note pid"},
		"nobody":                 {10, nil, ""},
	} {
		k := &kin{all: c.all, inside: map[int]bool{}, host: person(1, 0, 1).namespaces}
		k.place(c.started)
		if got := said(func(d *diagnosis) { d.tree(k) }); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	family := &kin{all: []*patient{person(10, 1, 7), person(11, 10, 11)}, inside: map[int]bool{}}
	family.all[0].threads = []int{10, 14}
	family.place(10)
	d := &diagnosis{}
	d.tree(family)
	if what := d.findings[len(d.findings)-1].What; !strings.HasPrefix(what, "4 process and thread numbers") { // 7, 10, 11, 14
		t.Error(what)
	}
}

func TestDoctorDescriptors(t *testing.T) {
	const nfsMount, localMount = 30, 22
	chr := func(major, minor uint32) fileStat {
		return fileStat{mode: unix.S_IFCHR, rdev: unix.Mkdev(major, minor)}
	}
	regular := func(target string, links uint64, bytes int64) openFile {
		return openFile{target: target, mount: localMount, fileStat: fileStat{mode: unix.S_IFREG, links: links, bytes: bytes}}
	}
	on := func(f openFile, mount int) openFile {
		f.mount = mount
		return f
	}
	master := openFile{target: "/dev/ptmx", fileStat: chr(majorTTYAux, 2), info: fdInfo{tty: 256 + 5}}
	slave := openFile{target: "/dev/pts/261", fileStat: chr(majorPTYFirst+1, 5), info: fdInfo{tty: -1}}
	ctty := openFile{target: "/dev/tty", fileStat: chr(majorTTYAux, 0), info: fdInfo{tty: -1}}
	for name, c := range map[string]struct {
		files []openFile
		want  string
	}{
		"null":                     {[]openFile{{target: "/dev/null", fileStat: chr(majorMem, 3)}}, ""},
		"a console":                {[]openFile{{target: "/dev/tty1", fileStat: chr(majorTTY, 1)}}, ""},
		"fuse":                     {[]openFile{{target: "/dev/fuse", fileStat: chr(majorMisc, 229)}}, "fault device"},
		"TUN of the host":          {[]openFile{{target: "/dev/net/tun", fileStat: chr(majorMisc, minorTUN)}}, "fault device"},
		"a disk":                   {[]openFile{{target: "/dev/sda", fileStat: fileStat{mode: unix.S_IFBLK}}}, "fault device"},
		"both ends of a terminal":  {[]openFile{master, slave, ctty}, ""},
		"one end of a terminal":    {[]openFile{slave}, "fault terminal"},
		"another terminal":         {[]openFile{{target: "/dev/ptmx", fileStat: chr(majorTTYAux, 2), info: fdInfo{tty: 5}}, slave}, "fault terminal"},
		"/dev/tty and no terminal": {[]openFile{ctty}, "fault terminal"},
		"a large deleted file":     {[]openFile{regular("/a (deleted)", 0, ghostLimit+1)}, "fault deleted"},
		"a small deleted file":     {[]openFile{regular("/a (deleted)", 0, ghostLimit)}, ""},
		"a large file":             {[]openFile{regular("/a", 1, ghostLimit+1)}, ""},
		"a deleted name":           {[]openFile{regular("/a (deleted)", 1, 0)}, "fault deleted"},
		"a large memfd":            {[]openFile{on(regular("/memfd:x (deleted)", 0, ghostLimit+1), 1)}, ""},
		"a namespace":              {[]openFile{on(regular("net:[4026531840]", 1, 0), 4)}, ""},
		"mounted nowhere":          {[]openFile{on(regular("/queue", 1, 0), 21)}, "fault file"},
		"a silly name on NFS":      {[]openFile{on(regular("/srv/.nfs00000000a1b2c3d400000001", 1, 0), nfsMount)}, "fault deleted"},
		"such a name elsewhere":    {[]openFile{regular("/srv/.nfs00000000a1b2c3d400000001", 1, 0)}, ""},
		"a file on NFS":            {[]openFile{on(regular("/srv/.nfsrc", 1, 0), nfsMount)}, ""},
		"a pipe of its own":        {[]openFile{{target: "pipe:[5]", fileStat: fileStat{mode: unix.S_IFIFO}}}, ""},
		"a pipe to outside":        {[]openFile{{target: "pipe:[6]", fileStat: fileStat{mode: unix.S_IFIFO}}}, "fault pipe"},
		"a pipe with packets":      {[]openFile{{target: "pipe:[5]", flags: unix.O_DIRECT, fileStat: fileStat{mode: unix.S_IFIFO}}}, "fault pipe"},
		"a named pipe":             {[]openFile{{target: "/run/fifo", flags: unix.O_DIRECT, fileStat: fileStat{mode: unix.S_IFIFO}}}, ""},
		"epoll and timers":         {[]openFile{{target: "anon_inode:[eventpoll]"}, {target: "anon_inode:[timerfd]"}, {target: "anon_inode:[eventfd]"}, {target: "anon_inode:[signalfd]"}}, ""},
		"a regular anonymous file": {[]openFile{{target: "anon_inode:[io_uring]", fileStat: fileStat{mode: unix.S_IFREG}}}, "fault io_uring"},
		"perf":                     {[]openFile{{target: "anon_inode:[perf_event]"}}, "fault descriptor"},
		"itself":                   {[]openFile{{target: "anon_inode:[pidfd]", info: fdInfo{pid: 10}}}, ""},
		"a process that has ended": {[]openFile{{target: "anon_inode:[pidfd]", info: fdInfo{pid: -1}}}, ""},
		"another process":          {[]openFile{{target: "anon_inode:[pidfd]", info: fdInfo{pid: 9}}}, "fault descriptor"},
		"watches files":            {[]openFile{{target: "anon_inode:inotify", info: fdInfo{watches: []string{"8:1"}}}}, ""},
		"watches sysfs":            {[]openFile{{target: "anon_inode:inotify", info: fdInfo{watches: []string{"8:1", "0:22"}}}}, "fault inotify"},
		"a lock":                   {[]openFile{{target: "/a", info: fdInfo{locked: true}}}, "warning lock"},
	} {
		p := person(10, 1, 10)
		p.files = c.files
		p.mounts = mounts{map[int]string{localMount: "ext4", nfsMount: "nfs4"}, map[string]string{"8:1": "ext4", "0:22": "sysfs"}}
		k := &kin{all: []*patient{p}, inside: map[int]bool{10: true}, host: person(1, 0, 1).namespaces, outsider: map[string]string{"pipe:[6]": "process 7 (sh)"}}
		if got := said(func(d *diagnosis) { d.process(k, p) }); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// What workers share is said once.
func TestDoctorShared(t *testing.T) {
	k := &kin{inside: map[int]bool{}, host: map[string]string{}, outsider: map[string]string{"pipe:[6]": "process 7 (sh)"}}
	d := &diagnosis{}
	for pid := 10; pid < 13; pid++ {
		p := person(pid, 1, 10)
		p.name, p.locked = "worker", pid > 10
		p.files = []openFile{{fd: pid - 9, target: "pipe:[6]", fileStat: fileStat{mode: unix.S_IFIFO}}}
		p.maps = []mapping{{path: "/SYSV00000001 (deleted)"}}
		p.namespaces = map[string]string{}
		d.process(k, p)
	}
	var got []string
	for _, f := range d.findings {
		got = append(got, f.Level+" "+f.Check+" "+f.What)
	}
	for i, want := range []string{"fault pipe descriptor 1 of process 10 (worker) (and 2 more) is a pipe (pipe:[6]) that process 7 (sh) holds",
		"fault shm the memory of process 10 (worker) (and 2 more) has a System V", "fault privilege process 11 (worker) (and 1 more) runs as another user"} {
		if len(got) != 3 || !strings.HasPrefix(got[i], want) {
			t.Fatalf("%d: want %q in %q", i, want, got)
		}
	}
}

func TestDoctorFiles(t *testing.T) {
	p := person(10, 1, 10)
	file := func(target string, flags int) openFile {
		return openFile{target: target, flags: flags, fileStat: fileStat{mode: unix.S_IFREG}}
	}
	p.files = []openFile{file("/log", unix.O_WRONLY|unix.O_APPEND), file("/read", unix.O_RDONLY), file("/gone (deleted)", unix.O_RDWR), file("/memfd:x", unix.O_RDONLY)}
	p.maps = []mapping{{path: "/lib.so", fileStat: fileStat{mode: unix.S_IFREG}}, {path: "/dev/zero (deleted)", fileStat: fileStat{mode: unix.S_IFREG}}}
	k := &kin{all: []*patient{p, p}}
	if got := said(func(d *diagnosis) { d.files(k) }); got != "note file" {
		t.Errorf("a log: %s", got)
	}
	for i := range 7 {
		p.files = append(p.files, file(fmt.Sprintf("/data%d", i), unix.O_RDWR|unix.O_APPEND*(i%2)))
	}
	d := &diagnosis{}
	d.files(k)
	if len(d.findings) != 2 || !strings.Contains(d.findings[0].What, "7 files") || !strings.HasSuffix(d.findings[0].What, "/data0, /data1, /data2, /data3, /data4 and 2 more") {
		t.Errorf("files that may change: %v", d.findings)
	}
}

func TestDoctorEndpoints(t *testing.T) {
	for name, c := range map[string]struct {
		e             endpoint
		criu, restart string
	}{
		"TCP":              {endpoint{family: unix.AF_INET, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_TCP, listening: true}, "", ""},
		"UDP":              {endpoint{family: unix.AF_INET6, kind: unix.SOCK_DGRAM, proto: unix.IPPROTO_UDP}, "", ""},
		"raw":              {endpoint{family: unix.AF_INET, kind: unix.SOCK_RAW, proto: 255}, "", ""},
		"SCTP":             {endpoint{family: unix.AF_INET, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_SCTP}, "fault socket", ""},
		"netlink":          {endpoint{family: unix.AF_NETLINK, kind: unix.SOCK_RAW}, "", ""},
		"crypto":           {endpoint{family: unix.AF_ALG, kind: unix.SOCK_SEQPACKET}, "fault socket", ""},
		"MPTCP listener":   {endpoint{family: unix.AF_INET, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_MPTCP, listening: true}, "fault mptcp", "warning mptcp"},
		"MPTCP connection": {endpoint{family: unix.AF_INET6, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_MPTCP}, "fault mptcp", "fault mptcp"},
		"backlog":          {endpoint{family: unix.AF_INET, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_TCP, listening: true, queue: 2}, "warning backlog", ""},
		"deferred":         {endpoint{family: unix.AF_INET, kind: unix.SOCK_STREAM, proto: unix.IPPROTO_TCP, listening: true, deferAccept: true}, "note defer-accept", "warning defer-accept"},
	} {
		for _, criu := range []bool{true, false} {
			want := map[bool]string{true: c.criu, false: c.restart}[criu]
			if got := said(func(d *diagnosis) { d.criu = criu; d.endpoint(c.e) }); got != want {
				t.Errorf("%s, CRIU %v: %q, want %q", name, criu, got, want)
			}
		}
	}
}

func TestDoctorCommand(t *testing.T) {
	untrusted := errors.New("it can be written by others")
	for name, c := range map[string]struct {
		command string
		trust   error
		want    string
	}{
		"good":       {fakeCRIU(t, "99.0", ""), nil, "note memory"},
		"missing":    {filepath.Join(t.TempDir(), "criu"), nil, "fault criu"},
		"no CRIU":    {"true", nil, "fault criu"},
		"too old":    {fakeCRIU(t, "3.17", ""), nil, "fault criu"},
		"bad kernel": {fakeCRIU(t, "99.0", "no soup"), nil, "fault criu, note memory"},
		"untrusted":  {fakeCRIU(t, "99.0", ""), untrusted, "fault criu"},
	} {
		_, a := newWorld(t, 0)
		a.cfg.Node.CRIU.Command = c.command
		a.trust = func(string) error { return c.trust }
		var last *pb.Finding
		got := said(func(d *diagnosis) {
			d.command(t.Context(), a)
			if len(d.findings) > 0 {
				last = d.findings[0]
			}
		})
		if got != c.want || last.Remedy == "" {
			t.Errorf("%s: %q, want %q; %v", name, got, c.want, last)
		}
	}
	if leastCRIU("6.16.0-rc1") != "4.2" || leastCRIU("6.15.9") != "4.0" {
		t.Error("the kernel decides which version is needed")
	}
}

// Doctor begins no operation, is allowed in every state, and sorts.
func TestDoctorRequest(t *testing.T) {
	w, a := newWorld(t, 2)
	ask := func(app string) (*pb.AgentDoctorReply, error) {
		r, err := a.Doctor(t.Context(), connect.NewRequest(&pb.AgentDoctorRequest{App: app}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	}
	a.sysctl = func(string, string) string { return "1\n" }
	op, err := a.begin(t.Context(), "redis", opSnapshot)
	try(t, err)
	r, err := ask("redis")
	if err != nil || r.App != "redis" || r.Engine != config.EngineRestart || len(r.Findings) != 0 {
		t.Errorf("during a snapshot: %v, %v", r, err)
	}
	a.finish(op, nil)
	if _, err := ask("nginx"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unknown: %v", err)
	}

	a.sysctl = func(string, string) string { return "0\n" }
	if r, err := ask("redis"); err != nil || len(r.Findings) != 1 || r.Findings[0].Check != "dsack" || r.Findings[0].Level != levelWarning {
		t.Errorf("no DSACK: %v, %v", r, err)
	}
	w.socks[0].Info = &sockdiag.TCPInfo{Options: sockdiag.Options{SACK: true}}
	w.socks[1].Remote = sock("192.0.2.100:9", sockdiag.Established).Remote
	a.cfg.Apps["redis"].Checkpoint.Engine = config.EngineCRIU
	a.cfg.Node.CRIU.Command = fakeCRIU(t, "99.0", "")
	r, err = ask("redis")
	var got []string
	for _, f := range r.GetFindings() {
		got = append(got, f.Level+" "+f.Check)
	}
	if err != nil || strings.Join(got, ", ") != "fault dsack, warning same-host, note memory" {
		t.Errorf("sorted: %v, %v", got, err)
	}

	w.away()
	r, err = ask("redis")
	if err != nil || len(r.Findings) == 0 || r.Findings[0].Check != "process" || !strings.Contains(r.Findings[0].Remedy, "ckptctl restore redis") {
		t.Errorf("away: %v, %v", r, err)
	}
}
