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
		if m := errorLine.FindStringSubmatch(sc.Text()); m != nil {
			return strings.TrimSpace(m[1])
		}
	}
	return ""
}
