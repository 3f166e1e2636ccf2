package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// script makes a command that answers as CRIU does.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	for body, want := range map[string]string{
		`[ "$*" = --version ] && printf 'Version: 4.2.1\n'`:     "4.2.1",
		`printf 'Version: 4.2-dev\nGitID: v4.2-7-gabcdef012\n'`: "4.2-dev",
		`printf 'Warn: odd\nVersion:   3.17\n'`:                 "3.17",
	} {
		if got, err := Version(t.Context(), script(t, body)); got != want || err != nil {
			t.Errorf("%s: %q, %v", body, got, err)
		}
	}
	for body, want := range map[string]string{
		"echo hello": "is it CRIU?",
		"exit 3":     "exit status 3",
		"echo 'Error (criu/crtools.c:9): not on this machine' >&2; exit 1": "not on this machine",
	} {
		if got, err := Version(t.Context(), script(t, body)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v", body, got, err)
		}
	}
	if _, err := Version(t.Context(), "/nowhere/criu"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no command: %v", err)
	}
	cause := errors.New("too slow")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if _, err := Version(ctx, script(t, "exec sleep 100")); !errors.Is(err, cause) {
		t.Errorf("a command that hangs: %v", err)
	}
}

func TestCheckAndFeature(t *testing.T) {
	good := script(t, `case "$*" in check|"check --feature mem_dirty_track") echo Looks good.;; *) exit 9;; esac`)
	if err := Check(t.Context(), good); err != nil {
		t.Error(err)
	}
	if ok, why := Feature(t.Context(), good, "mem_dirty_track"); !ok || why != "" {
		t.Errorf("a feature that is there: %v %q", ok, why)
	}
	bad := script(t, `printf '%s\n' 'Warn  (criu/kerndat.c:1): minor' "Error (criu/cr-check.c:824): $* is OFF" >&2; exit 1`)
	if err := Check(t.Context(), bad); err == nil || err.Error() != "check is OFF" {
		t.Errorf("check: %v", err)
	}
	if ok, why := Feature(t.Context(), bad, "x"); ok || why != "check --feature x is OFF" {
		t.Errorf("feature: %v %q", ok, why)
	}
}

func TestAtLeast(t *testing.T) {
	for _, c := range []struct {
		version, least string
		want           bool
	}{
		{"4.2.1", "4.2", true}, {"4.2", "4.2", true}, {"4.1.1", "4.2", false}, {"4.10", "4.2", true}, {"5.0", "4.2", true}, {"3.17", "4.0", false},
		{"4.2-dev", "4.2", true}, {"6.18.44-generic", "6.16", true}, {"6.1.0-9-amd64", "6.16", false}, {"6.16", "6.16.0", true}, {"", "4.0", false},
	} {
		if got := AtLeast(c.version, c.least); got != c.want {
			t.Errorf("%q >= %q: %v", c.version, c.least, got)
		}
	}
}
