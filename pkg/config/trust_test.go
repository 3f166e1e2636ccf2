package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckTrusted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes files of other users")
	}
	type file struct {
		name string // a directory when it ends in /, a link when target is set
		mode fs.FileMode
		uid  int
		gid  int
		link string
	}
	for _, tt := range []struct {
		name  string
		files []file
		path  string
		want  string // part of the error; empty: trusted
	}{
		{"root's", []file{{"d/", 0o755, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}}, "d/f", ""},
		{"with dots", []file{{"d/", 0o755, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}}, "d/./../d/f", ""},
		{"root's group may write", []file{{"f", 0o664, 0, 0, ""}}, "f", ""},
		{"another's file", []file{{"f", 0o644, 1234, 0, ""}}, "f", "f belongs to user 1234, but root executes what it says; run: chown root "},
		{"another group may write", []file{{"f", 0o664, 0, 1234, ""}}, "f", "f can be written by others than root (mode 0664)"},
		{"others may write", []file{{"f", 0o646, 0, 0, ""}}, "f", "f can be written by others than root (mode 0646)"},
		{"others may write the directory", []file{{"d/", 0o757, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}}, "d/f", "d can be written by others"},
		{"another's directory above", []file{{"c/", 0o755, 1234, 0, ""}, {"c/d/", 0o755, 0, 0, ""}, {"c/d/f", 0o644, 0, 0, ""}}, "c/d/f", "c belongs to user 1234"},
		{"sticky directory", []file{{"d/", 0o777 | fs.ModeSticky, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}}, "d/f", ""},
		{"another's in a sticky directory", []file{{"d/", 0o777 | fs.ModeSticky, 0, 0, ""}, {"d/f", 0o644, 1234, 0, ""}}, "d/f", "f belongs to user 1234"},
		{"link to root's", []file{{"d/", 0o755, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}, {"l", 0, 0, 0, "d/../d/f"}}, "l", ""},
		{"link to another's", []file{{"f", 0o644, 1234, 0, ""}, {"l", 0, 0, 0, "f"}}, "l", "f belongs to user 1234"},
		{"another's link to root's", []file{{"f", 0o644, 0, 0, ""}, {"l", 0, 1234, 0, "f"}}, "l", "l belongs to user 1234"},
		{"link of a directory", []file{{"d/", 0o757, 0, 0, ""}, {"d/f", 0o644, 0, 0, ""}, {"l", 0, 0, 0, "d"}}, "l/f", "d can be written by others"},
		{"absolute link", []file{{"l", 0, 0, 0, "/dev/shm/../null"}}, "l", "/dev/null can be written by others"},
		{"ring of links", []file{{"l", 0, 0, 0, "m"}, {"m", 0, 0, 0, "l"}}, "l", "goes through more than 40 symbolic links"},
		{"missing", nil, "f", "no such file or directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range tt.files {
				path := filepath.Join(dir, f.name)
				var err error
				switch {
				case f.link != "":
					err = os.Symlink(f.link, path)
				case strings.HasSuffix(f.name, "/"):
					err = os.Mkdir(path, 0o755)
				default:
					err = os.WriteFile(path, nil, 0o600)
				}
				if err == nil {
					err = os.Lchown(path, f.uid, f.gid)
				}
				if err == nil && f.link == "" {
					err = os.Chmod(path, f.mode)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			err := CheckTrusted(filepath.Join(dir, "/") + "/" + tt.path)
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if tt.name == "missing" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v is not fs.ErrNotExist", err)
			}
		})
	}
}
