package test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// demo starts the demonstration with few clients; its output is read from out.
func demo(t *testing.T) (cmd *exec.Cmd, out io.Reader, stderr *bytes.Buffer) {
	t.Helper()
	testnet.RequireRoot(t)
	cmd = exec.Command(filepath.Join(toolDir, "demo"), "-bin", binDir, "-clients", "20", "-hold", "3s")
	out, err := cmd.StdoutPipe()
	must(t, err)
	stderr = new(bytes.Buffer)
	cmd.Stderr = stderr
	must(t, cmd.Start())
	return cmd, out, stderr
}

// leftovers are namespaces and directories of a process.
func leftovers(t *testing.T, pid int) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"/run/netns", os.TempDir()} {
		m, err := filepath.Glob(fmt.Sprintf("%s/nfcf-%d-*", dir, pid))
		must(t, err)
		all = append(all, m...)
	}
	return all
}

func whole(t *testing.T) {
	t.Helper()
	cmd, out, stderr := demo(t)
	text, err := io.ReadAll(out)
	must(t, err)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, text, stderr)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if last := lines[len(lines)-1]; last != "20 of 20 connections survived with every byte right" {
		t.Errorf("last line %q\n%s", last, text)
	}
	if !strings.Contains(string(text), "no redis-server process | 20 of 20 clients connected") {
		t.Errorf("it does not show that the process is gone:\n%s", text)
	}
	for _, want := range []string{"second act", "redis-server on node-a: [], on node-b: [", "re-establish", "every reply was right; the slowest took"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("it does not show %q:\n%s", want, text)
		}
	}
	if left := leftovers(t, cmd.Process.Pid); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestDemoInterrupted: an interrupt in the middle leaves nothing behind.
func TestDemoInterrupted(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		cmd, out, stderr := demo(t)
		seen := until(out, "clients connected")
		must(t, cmd.Process.Signal(sig))
		_, _ = io.Copy(io.Discard, out)
		err := cmd.Wait()
		var exit *exec.ExitError
		if !seen || !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("%v: seen %v, %v, want exit 1\n%s", sig, seen, err, stderr)
		}
		if left := leftovers(t, cmd.Process.Pid); len(left) != 0 {
			t.Errorf("%v: left behind: %v", sig, left)
		}
	}
}

// TestDemoAfterCrash: what a killed demonstration left is removed by the next.
func TestDemoAfterCrash(t *testing.T) {
	cmd, out, stderr := demo(t)
	seen := until(out, "clients connected")
	must(t, cmd.Process.Kill())
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait()
	if left := leftovers(t, cmd.Process.Pid); !seen || len(left) == 0 {
		t.Fatalf("held connections seen: %v, left behind: %v: the test proves nothing\n%s", seen, left, stderr)
	}
	whole(t)
	if left := leftovers(t, cmd.Process.Pid); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// until reads lines until one holds text.
func until(r io.Reader, text string) bool {
	found := make(chan bool, 1)
	go func() {
		s := bufio.NewScanner(r)
		for s.Scan() {
			if strings.Contains(s.Text(), text) {
				found <- true
				return
			}
		}
		found <- false
	}()
	select {
	case ok := <-found:
		return ok
	case <-time.After(time.Minute):
		return false
	}
}
