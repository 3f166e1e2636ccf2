package criu

import (
	"bufio"
	"os"
	"regexp"
	"strings"
)

// errorLine is a line of CRIU's log (criu/log.c): "(00.012345) 123: Error (criu/x.c:99): text".
var errorLine = regexp.MustCompile(`Error \([^)]*\): (.*)`)

// Telling gives the line of CRIU's log that says most about a failure: the first error,
// the others follow from it. "": there is none.
func Telling(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if m := errorLine.FindStringSubmatch(unharmful(sc.Text())); m != nil {
			return strings.TrimSpace(m[1])
		}
	}
	return ""
}

// unharmful takes out what CRIU reports as an error and goes on after: it may not raise
// its own limit of open files.
func unharmful(text string) string {
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if !strings.Contains(line, "Can't setup RLIMIT_NOFILE for self") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}
