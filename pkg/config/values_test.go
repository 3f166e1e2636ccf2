package config

import (
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{"0s": 0, "0": 0, "50ms": 50 * time.Millisecond, "1h30m": 90 * time.Minute, "+1s": time.Second} {
		var d, again Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d.Std() != want {
			t.Errorf("%q is %v, %v", text, d, err)
		}
		written, err := d.MarshalText()
		if err != nil || again.UnmarshalText(written) != nil || again != d {
			t.Errorf("%q written as %q is %v", text, written, again)
		}
	}
	for _, text := range []string{"", "5", "s", "-1ns", "1 s", "1e3s", "9999999h"} {
		d := Duration(1)
		if err := d.UnmarshalText([]byte(text)); err == nil || d != 1 {
			t.Errorf("%q is %v, %v", text, d, err)
		}
	}
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]struct {
		size    ByteSize
		written string
	}{
		"0": {0, "0"}, "0GiB": {0, "0"}, "1": {1, "1B"}, "1023B": {1023, "1023B"}, "1024": {1024, "1KiB"}, "256KiB": {256 << 10, "256KiB"},
		"3 MiB": {3 << 20, "3MiB"}, "1025KiB": {1025 << 10, "1025KiB"}, "2GiB": {2 << 30, "2GiB"}, "5TiB": {5 << 40, "5TiB"},
		"9223372036854775807": {1<<63 - 1, "9223372036854775807B"},
	} {
		var b, again ByteSize
		if err := b.UnmarshalText([]byte(text)); err != nil || b != want.size {
			t.Errorf("%q is %d, %v", text, b, err)
		}
		written, err := b.MarshalText()
		if err != nil || string(written) != want.written || again.UnmarshalText(written) != nil || again != b {
			t.Errorf("%q written as %q is %d", text, written, again)
		}
	}
	for _, text := range []string{"", "KiB", "-1", "+1", "1.5KiB", "1KB", "1kib", "0x10", "1_000", "9223372036854775808", "8388608TiB", "99999999999999999999"} {
		b := ByteSize(7)
		if err := b.UnmarshalText([]byte(text)); err == nil || b != 7 {
			t.Errorf("%q is %d, %v", text, b, err)
		}
	}
}
