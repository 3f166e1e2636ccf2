package checkpoint

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	pb "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const stranger = 12345 // a user that is nobody else

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes files of other users")
	}
}

// files lists what is below dir, but for dir itself.
func files(t *testing.T, dir string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if path != dir {
			all = append(all, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// state_dir is another user's, who plants what he likes: nothing of it is
// believed and nothing is written where it leads.
func TestPlantedRecords(t *testing.T) {
	needRoot(t)
	good := `{"app":"redis","pid":4242,"start_time":1,"boot_id":"` + bootID() + `"}`
	for _, c := range []struct {
		name, want string
		plant      func(state, outside string) error
		writes     bool // what was planted is a file: it is written over, and not written through
	}{
		{"directory is a link", "is no directory", func(state, outside string) error { return os.Symlink(outside, filepath.Join(state, "agent")) }, false},
		{"directory is a link inside", "is no directory", func(state, _ string) error {
			try(t, os.Mkdir(filepath.Join(state, "mine"), 0o700))
			writeFile(t, filepath.Join(state, "mine", "redis.json"), good)
			return os.Symlink("mine", filepath.Join(state, "agent"))
		}, false},
		{"directory of his own", "belongs to user 12345, and the agent, which trusts what it finds there, is user 0; move it away", func(state, _ string) error {
			writeFile(t, filepath.Join(state, "agent", "redis.json"), good)
			return os.Chown(filepath.Join(state, "agent"), stranger, stranger)
		}, false},
		{"directory that all may write", "chmod go-w", func(state, _ string) error {
			writeFile(t, filepath.Join(state, "agent", "redis.json"), good)
			return os.Chmod(filepath.Join(state, "agent"), 0o777)
		}, false},
		{"record is a link", "is no regular file", func(state, outside string) error {
			try(t, os.Mkdir(filepath.Join(state, "agent"), 0o700))
			return os.Symlink(filepath.Join(outside, "redis.json"), filepath.Join(state, "agent", "redis.json"))
		}, true},
		{"record is a pipe", "is no regular file", func(state, _ string) error {
			try(t, os.Mkdir(filepath.Join(state, "agent"), 0o700))
			return unix.Mkfifo(filepath.Join(state, "agent", "redis.json"), 0o600)
		}, true},
		{"record of his own", "redis.json belongs to user 12345", func(state, _ string) error {
			writeFile(t, filepath.Join(state, "agent", "redis.json"), good)
			return os.Chown(filepath.Join(state, "agent", "redis.json"), stranger, stranger)
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			state, outside := t.TempDir(), t.TempDir()
			writeFile(t, filepath.Join(outside, "redis.json"), good)
			writeFile(t, filepath.Join(outside, "redis.op.json"), `{"app":"redis","op":"stop","discard":true}`)
			try(t, os.Chown(state, stranger, stranger))
			try(t, c.plant(state, outside))
			if r, err := loadRecord(state, "redis"); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("loaded %+v, %v; want %q", r, err, c.want)
			}
			if c.writes {
				try(t, saveRecord(state, record{App: "redis", PID: 77, BootID: bootID()}))
				if r, err := loadRecord(state, "redis"); err != nil || r == nil || r.PID != 77 {
					t.Errorf("after a write: %+v, %v", r, err)
				}
			} else {
				s := intents{state}
				if in, err := s.load("redis"); in != nil || err == nil {
					t.Errorf("believed %+v, %v", in, err)
				}
				for what, err := range map[string]error{
					"save": saveRecord(state, record{App: "redis", PID: 77}), "remove": removeRecord(state, "redis"),
					"save intent": s.save(intent{App: "redis"}), "clear intent": s.clear("redis"), "start of the agent": checkRecords(state),
				} {
					if err == nil || !strings.Contains(err.Error(), c.want) {
						t.Errorf("%s: %v, want %q", what, err, c.want)
					}
				}
				_, a := newWorld(t, 0)
				a.cfg.Node.StateDir, a.cfg.Node.AgentSocket = state, filepath.Join(t.TempDir(), "agent.sock")
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				if err := a.serve(ctx); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("an agent serves: %v", err)
				}
			}
			if b, err := os.ReadFile(filepath.Join(outside, "redis.json")); err != nil || string(b) != good || len(files(t, outside)) != 2 {
				t.Errorf("outside: %q, %v, %v", b, err, files(t, outside))
			}
		})
	}
}

// A log goes nowhere that another user chooses.
func TestPlantedLog(t *testing.T) {
	needRoot(t)
	type place struct{ state, outside, home string }
	for _, c := range []struct {
		name, file, want string
		plant            func(p place) error
		at               string // where it goes, below home
	}{
		{"directory is a link", "", "is no directory", func(p place) error { return os.Symlink(p.outside, filepath.Join(p.state, "log")) }, ""},
		{"directory of his own", "", "belongs to user 12345", func(p place) error {
			try(t, os.Mkdir(filepath.Join(p.state, "log"), 0o755))
			return os.Chown(filepath.Join(p.state, "log"), stranger, stranger)
		}, ""},
		{"log is a link", "", "is no file", func(p place) error {
			try(t, os.Mkdir(filepath.Join(p.state, "log"), 0o755))
			return os.Symlink(filepath.Join(p.outside, "new"), filepath.Join(p.state, "log", "shell.log"))
		}, ""},
		{"log_file is a link", "logs/run", "too many levels of symbolic links", func(p place) error {
			try(t, os.Mkdir(filepath.Join(p.home, "logs"), 0o755))
			return os.Symlink(filepath.Join(p.outside, "new"), filepath.Join(p.home, "logs", "run"))
		}, ""},
		{"log_file behind his link", "logs/a/run", "it is a symbolic link of user 12345", func(p place) error {
			try(t, os.Symlink(p.outside, filepath.Join(p.home, "logs")))
			return os.Lchown(filepath.Join(p.home, "logs"), stranger, stranger)
		}, ""},
		{"log_file behind root's link", "logs/a/run", "", func(p place) error {
			try(t, os.Mkdir(filepath.Join(p.home, "data"), 0o755))
			return os.Symlink("../"+filepath.Base(p.home)+"/./data", filepath.Join(p.home, "logs"))
		}, "data/a/run"},
		{"log_file behind root's absolute link", "logs/run", "", func(p place) error {
			try(t, os.Mkdir(filepath.Join(p.home, "data"), 0o755))
			return os.Symlink(filepath.Join(p.home, "data"), filepath.Join(p.home, "logs"))
		}, "data/run"},
		{"links in a ring", "logs/run", "too many levels of symbolic links", func(p place) error { return os.Symlink("logs", filepath.Join(p.home, "logs")) }, ""},
		{"log_file with two names", "run", "more than one name", func(p place) error {
			writeFile(t, filepath.Join(p.home, "shadow"), "")
			return os.Link(filepath.Join(p.home, "shadow"), filepath.Join(p.home, "run"))
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := place{t.TempDir(), t.TempDir(), t.TempDir()}
			try(t, os.Chown(p.state, stranger, stranger))
			try(t, os.Chown(p.home, stranger, stranger))
			try(t, c.plant(p))
			l := &osLauncher{stateDir: p.state, log: quietLog(), noCgroup: true}
			app := shellApp("echo hello")
			if c.file != "" {
				app.Process.LogFile = filepath.Join(p.home, c.file)
			}
			err := l.run(t.Context(), app, app.Process.Start)
			if got := files(t, p.outside); len(got) > 0 {
				t.Errorf("written elsewhere: %v", got)
			}
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %v, want %q", err, c.want)
				}
				return
			}
			if b, rerr := os.ReadFile(filepath.Join(p.home, c.at)); err != nil || string(b) != "hello\n" {
				t.Errorf("the log says %q, %v; run: %v", b, rerr, err)
			}
		})
	}
}

// A second name of another program's pid_file names nobody.
func TestPidFileOfTwoNames(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "sshd.pid"), "1234\n")
	try(t, os.Link(filepath.Join(dir, "sshd.pid"), filepath.Join(dir, "redis.pid")))
	if pid, _, err := readPidFile(filepath.Join(dir, "redis.pid")); err == nil || !strings.Contains(err.Error(), "more than one name") {
		t.Errorf("%d, %v", pid, err)
	}
}

// A link leads the snapshot store nowhere.
func TestStoreOfLinks(t *testing.T) {
	s, outside := store{t.TempDir()}, t.TempDir()
	id := newSnapshotID(time.Now())
	writeFile(t, filepath.Join(outside, id, manifestFile), `{"version":1,"app":"redis","id":"`+id+`","files":{}}`)
	writeFile(t, filepath.Join(outside, ".new-x", "file"), "")
	try(t, os.Symlink(outside, filepath.Join(s.dir, "redis")))
	before := files(t, outside)
	if _, err := s.begin(Manifest{App: "redis", ID: newSnapshotID(time.Now())}, &pb.ConnInfoReply{}); err == nil {
		t.Error("a snapshot is stored behind a link")
	}
	if m, err := s.readManifest("redis", id); err == nil {
		t.Errorf("read %+v behind a link", m)
	}
	if err := s.prune("redis", "", "node-a", config.Snapshots{Keep: 1}, time.Now()); err == nil {
		t.Error("prune behind a link")
	}
	if after := files(t, outside); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("outside was %v, is %v", before, after)
	}
}
