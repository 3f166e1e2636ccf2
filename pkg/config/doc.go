package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

const (
	// maxFileSize bounds what is read of one file, in bytes.
	maxFileSize = 256 << 10
	// maxFaults bounds what is reported of one file.
	maxFaults = 100
)

// doc is one file while it is read.
type doc struct {
	file    string
	text    string
	faults  Faults
	dropped bool
}

// readText reads a file. A file that is not there gives fs.ErrNotExist.
func readText(file string) (string, error) {
	st, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() {
		return "", errors.New("not a regular file")
	}
	if st.Size() > maxFileSize {
		return "", fmt.Errorf("larger than %d KiB", maxFileSize>>10)
	}
	b, err := os.ReadFile(file)
	return string(b), err
}

// reason is err without the path, which the fault already names.
func reason(err error) string {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// parse reads text; after a syntax error the table is nil and the doc has the
// fault.
func parse(file, text string) (d *doc, root *table) {
	d = &doc{file: file, text: strings.TrimPrefix(text, "\ufeff")}
	for i, r := range d.text {
		if r == utf8.RuneError && !strings.HasPrefix(d.text[i:], "\ufffd") {
			d.fault(i, "byte %#02x is not UTF-8; save the file as UTF-8", d.text[i])
			return d, nil
		}
	}
	where, deep := scan(d.text)
	if deep >= 0 {
		d.fault(deep, "nests deeper than %d levels", maxDepth)
		return d, nil
	}
	var m map[string]any
	if _, err := toml.Decode(d.text, &m); err != nil {
		d.syntax(err)
		return d, nil
	}
	return d, &table{d: d, where: where, m: m}
}

// syntax notes an error of the TOML library.
func (d *doc) syntax(err error) {
	pe := toml.ParseError{}
	if !errors.As(err, &pe) {
		d.fault(0, "%v", err)
		return
	}
	offset, message := pe.Position.Start, pe.Message
	if message == "" {
		message = strings.TrimPrefix(pe.Error(), "toml: ")
	}
	// Where something stands that does not belong there, the library points at
	// the space before it.
	if strings.Contains(message, "but got") && 0 <= offset && offset < len(d.text) {
		rest := d.text[offset:]
		if s := strings.TrimLeft(rest, " \t"); s != "" && s[0] != '\n' && s[0] != '\r' {
			offset += len(rest) - len(s)
		}
	}
	d.fault(offset, "%s", message)
}

// fault notes a fault at a byte offset.
func (d *doc) fault(offset int, format string, args ...any) {
	if len(d.faults) >= maxFaults {
		d.dropped = true
		return
	}
	offset = max(0, min(offset, len(d.text)))
	before := d.text[:offset]
	lineStart := strings.LastIndexByte(before, '\n') + 1
	d.faults = append(d.faults, Fault{
		File:    d.file,
		Line:    strings.Count(before, "\n") + 1,
		Col:     utf8.RuneCountInString(before[lineStart:]) + 1,
		Message: fmt.Sprintf(format, args...),
	})
}

// unreadable is the fault of a file that gives no text.
func unreadable(file string, err error) Faults {
	return Faults{{File: file, Line: 1, Col: 1, Message: "cannot be read: " + reason(err)}}
}

// result gives a doc's faults in order.
func (d *doc) result() Faults {
	if d == nil {
		return nil
	}
	faults := slices.Clone(d.faults)
	faults.sort()
	if d.dropped {
		last := faults[len(faults)-1]
		last.Message = fmt.Sprintf("more faults follow; only %d are shown", maxFaults)
		faults = append(faults, last)
	}
	return faults
}
