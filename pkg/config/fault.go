package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Fault is one error in a configuration file. Line and Col count from 1, Col
// in characters. A fault of a file as a whole stands at 1:1.
type Fault struct {
	File      string
	Line, Col int
	Message   string
}

// Error gives FILE:LINE:COL: message.
func (f Fault) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Col, f.Message)
}

// Faults are all faults found in one go, by file and position.
type Faults []Fault

// Error gives each fault a line of its own.
func (fs Faults) Error() string {
	lines := make([]string, len(fs))
	for i, f := range fs {
		lines[i] = f.Error()
	}
	return strings.Join(lines, "\n")
}

// sort puts faults into the order of file, line and column; faults at one
// position keep the order in which they were found.
func (fs Faults) sort() {
	slices.SortStableFunc(fs, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
}
