package criu

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// state is that of a file, as fstatat(2) has it.
func state(t *testing.T, path string) *unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return &st
}

// TestFollow: what is closed before Stop is known, as long as it stays as it is; large and
// foreign files are not, and nothing is where nothing can be followed.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("before.img", []byte("before"))
	f := Follow(dir)
	write("small.img", []byte("small"))
	write("again.img", []byte("again"))
	write("again.img", []byte("once more"))
	write("full.img", bytes.Repeat([]byte{7}, mostEarly))
	write("large.img", bytes.Repeat([]byte{7}, mostEarly+1))
	write("changed.img", []byte("changed"))
	write("gone.img", nil)
	if err := os.Remove(at("gone.img")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("small.img", at("link.img")); err != nil {
		t.Fatal(err)
	}
	f.Stop()
	f.Stop()
	write("changed.img", []byte("CHANGED"))
	write("after.img", []byte("after"))
	for name, known := range map[string]bool{"small.img": true, "again.img": true, "full.img": true, "large.img": false,
		"changed.img": false, "before.img": false, "after.img": false, "link.img": false} {
		b, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		want := sha256.Sum256(b)
		sum, ok := f.Sum(name, state(t, at(name)))
		if ok != known || ok && sum != hex.EncodeToString(want[:]) {
			t.Errorf("%s: known %v, sum %q", name, ok, sum)
		}
	}
	none := Follow(at("nothing"))
	none.Stop()
	if _, ok := none.Sum("small.img", state(t, at("small.img"))); ok {
		t.Error("something is known of a directory that is not there")
	}
}

// TestFollowSockets: the numbers of sockets are those that were read early, and of files
// that have changed since the new ones.
func TestFollowSockets(t *testing.T) {
	dir := t.TempDir()
	f := Follow(dir)
	image(t, filepath.Join(dir, "tcp-stream-1.img"), nil, numbers(0, 100, 0, 200))
	image(t, filepath.Join(dir, "tcp-stream-2.img"), []byte("queue"), numbers(5, 300, 0, 400))
	image(t, filepath.Join(dir, "files.img"), nil,
		socket(1, established, inet, "10.0.0.1:80", "10.0.0.2:1"), socket(2, established, inet, "10.0.0.1:80", "10.0.0.2:2"))
	f.Stop()
	want, err := Sockets(dir)
	if err != nil || len(want) != 2 {
		t.Fatalf("%+v, %v", want, err)
	}
	if got, err := f.Sockets(); err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	// One that claims to be what was read is not read again.
	first := filepath.Join(dir, "tcp-stream-1.img")
	st := state(t, first)
	image(t, first, nil, numbers(0, 101, 0, 200))
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, first, []unix.Timespec{st.Atim, st.Mtim}, 0); err != nil {
		t.Fatal(err)
	}
	image(t, filepath.Join(dir, "tcp-stream-2.img"), []byte("queues"), numbers(6, 300, 0, 400))
	got, err := f.Sockets()
	if err != nil || len(got) != 2 || got[0].RcvNxt != 100 || got[1].Unread != 6 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Sockets(); err == nil {
		t.Errorf("a file that is gone: %+v", got)
	}
}
