package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration written as in time.ParseDuration ("50ms").
type Duration time.Duration

// Std gives the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String writes d so that UnmarshalText reads it back.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. Negative durations are
// errors: none of the keys has a meaning for one.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration; write one such as \"50ms\", \"5s\" or \"1h30m\"", text)
	}
	if v < 0 {
		return fmt.Errorf("%q is negative; write a duration of 0s or more", text)
	}
	*d = Duration(v)
	return nil
}

// ByteSize is a number of bytes, written "0" or with a unit ("256KiB").
type ByteSize uint64

// The units from large to small, each with the power of two it stands for.
var byteUnits = []struct {
	name  string
	shift uint
}{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}, {"B", 0}}

// String writes b with the largest unit that divides it.
func (b ByteSize) String() string {
	if b == 0 {
		return "0"
	}
	for _, u := range byteUnits {
		if b&(1<<u.shift-1) == 0 {
			return strconv.FormatUint(uint64(b>>u.shift), 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(b), 10)
}

// MarshalText implements encoding.TextMarshaler.
func (b ByteSize) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It takes whole numbers
// with B, KiB, MiB, GiB, TiB or no unit (bytes), up to 2^63-1.
func (b *ByteSize) UnmarshalText(text []byte) error {
	number, shift := string(text), uint(0)
	for _, u := range byteUnits {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, shift = strings.TrimSpace(rest), u.shift
			break
		}
	}
	// ParseUint refuses signs, so that -1 is not taken for a large number.
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not a size; write one such as \"0\", \"4096\", \"256KiB\" or \"1MiB\"", text)
	}
	if n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is more than the largest size, 2^63-1 bytes", text)
	}
	*b = ByteSize(n << shift)
	return nil
}
