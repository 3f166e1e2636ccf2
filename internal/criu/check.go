package criu

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// Version asks the command for its version, such as "4.2.1".
func Version(ctx context.Context, command string) (string, error) {
	out, err := output(ctx, command, "--version")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Version:"); ok {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("%s --version says no version; is it CRIU?", command)
}

// Check asks whether this kernel, and what the caller may do, suffice. It needs
// root, or CAP_CHECKPOINT_RESTORE.
func Check(ctx context.Context, command string) error {
	_, err := output(ctx, command, "check")
	return err
}

// Feature asks whether the kernel has what CRIU calls by that name (criu check
// --feature), and if not, why.
func Feature(ctx context.Context, command, feature string) (bool, string) {
	if _, err := output(ctx, command, "check", "--feature", feature); err != nil {
		return false, err.Error()
	}
	return true, ""
}

// AtLeast compares versions number by number; what is no number counts as 0.
func AtLeast(version, least string) bool {
	v, l := strings.Split(version, "."), strings.Split(least, ".")
	number := func(s []string, i int) int {
		if i >= len(s) {
			return 0
		}
		digits := strings.IndexFunc(s[i], func(r rune) bool { return r < '0' || r > '9' })
		if digits < 0 {
			digits = len(s[i])
		}
		n, _ := strconv.Atoi(s[i][:digits])
		return n
	}
	for i := range max(len(v), len(l)) {
		if a, b := number(v, i), number(l, i); a != b {
			return a > b
		}
	}
	return true
}

// output runs the command; the error says what it complained of.
func output(ctx context.Context, command string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, command, args...)
	cmd.Dir = "/" // it leaves no file where the agent was started
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err == nil {
		return out.String(), nil
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("%s %s: %w", command, strings.Join(args, " "), context.Cause(ctx))
	}
	if why := complaint(errs.String() + "\n" + out.String()); why != "" && errors.As(err, new(*exec.ExitError)) {
		return "", errors.New(why)
	}
	return "", fmt.Errorf("%s %s: %w", command, strings.Join(args, " "), err)
}

// complaint picks the last line that names a failure, without the place in
// CRIU's source.
func complaint(log string) string {
	last := ""
	for line := range strings.Lines(log) {
		for _, level := range []string{"Error", "Warn"} {
			if _, after, ok := strings.Cut(line, level); ok {
				if _, text, ok := strings.Cut(after, "): "); ok {
					after = text
				}
				last = strings.TrimSpace(after)
			}
		}
	}
	return last
}
