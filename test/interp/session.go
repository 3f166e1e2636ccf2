package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
)

// longest is the longest line that is read.
const longest = 16 << 10

// session is one connection with what its client has said.
type session struct {
	p *process
	c *net.TCPConn
	r *bufio.Reader
	w *bufio.Writer

	name    string
	vars    map[string]value
	history []string
	blobs   uint64 // octets of all blobs

	err  error        // the connection is over
	then func() error // once the reply is written
}

func newSession(p *process, c *net.TCPConn) *session {
	return &session{
		p: p, c: c, r: bufio.NewReaderSize(c, longest), w: bufio.NewWriter(c),
		name: c.RemoteAddr().String(), vars: map[string]value{},
	}
}

// run answers until the client has ended the stream: what came before is
// answered. A line that the end cuts short is no request.
func (s *session) run() {
	defer s.c.Close()
	for s.err == nil {
		line, err := s.line()
		if errors.Is(err, bufio.ErrBufferFull) {
			fmt.Fprintf(s.w, "! a line has %d octets at most\n", longest-1)
			s.w.Flush()
		}
		if err != nil {
			return
		}
		s.history = append(s.history, line)
		s.then = s.w.Flush
		reply, err := s.answer(line)
		if s.err != nil {
			return
		}
		if err != nil {
			reply = "! " + strings.ReplaceAll(err.Error(), "\n", " ")
		}
		fmt.Fprintln(s.w, reply)
		s.err = s.then()
	}
}

// line reads one without its LF.
func (s *session) line() (string, error) {
	b, err := s.r.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	return string(b[:len(b)-1]), nil
}

// command is one that a client can give: it takes that many words, of which
// the last holds the rest of the line.
type command struct {
	least, most int
	run         func(s *session, args []string) (string, error)
}

var commands = map[string]command{
	"let":     {2, 2, (*session).let},
	"print":   {1, 1, (*session).print},
	"names":   {0, 0, (*session).names},
	"history": {1, 1, (*session).past},
	"count":   {0, 0, func(s *session, _ []string) (string, error) { return strconv.Itoa(len(s.history)), nil }},
	"sum":     {1, 1, (*session).sum},
	"blob":    {1, 1, (*session).blob},
	"gen":     {2, 2, (*session).gen},
	"global":  {1, 2, (*session).global},
	"session": {0, 1, (*session).rename},
	"pid":     {0, 0, func(s *session, _ []string) (string, error) { return s.p.pid(), nil }},
	"half":    {0, 0, (*session).half},
	"halved":  {1, 2, (*session).halved},
	"dial":    {2, 2, func(s *session, a []string) (string, error) { return s.p.dial(a[0], a[1]) }},
	"tell":    {2, 2, func(s *session, a []string) (string, error) { return s.p.tell(a[0], a[1]) }},
	"hangup":  {1, 1, func(s *session, a []string) (string, error) { return "closed " + a[0], s.p.hangUp(a[0]) }},
	"wait":    {1, 1, func(s *session, a []string) (string, error) { s.p.wait(a[0]); return "released " + a[0], nil }},
	"waiting": {1, 1, func(s *session, a []string) (string, error) { return strconv.Itoa(s.p.waiting(a[0])), nil }},
	"release": {1, 1, func(s *session, a []string) (string, error) {
		n, err := s.p.release(a[0])
		return strconv.Itoa(n), err
	}},
	"quit": {0, 0, (*session).quit},
}

func (s *session) answer(line string) (string, error) {
	word, rest, _ := strings.Cut(line, " ")
	c, ok := commands[word]
	if !ok {
		return "", fmt.Errorf("unknown request %q", word)
	}
	var args []string
	if rest = strings.TrimLeft(rest, " "); rest != "" {
		args = strings.SplitN(rest, " ", max(c.most, 1))
	}
	if len(args) < c.least || len(args) > c.most {
		return "", fmt.Errorf("%s takes %d to %d arguments", word, c.least, c.most)
	}
	return c.run(s, args)
}

// eval looks names up in the session, and those with a $ among the globals.
func (s *session) eval(expr string) (value, error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	return s.evalLocked(expr)
}

func (s *session) evalLocked(expr string) (value, error) {
	return eval(expr, func(name string) (value, bool) {
		from := s.vars
		if rest, ok := strings.CutPrefix(name, "$"); ok {
			from, name = s.p.globals, rest
		}
		v, ok := from[name]
		return v, ok
	})
}

func (s *session) let(args []string) (string, error) {
	if !named(args[0]) {
		return "", fmt.Errorf("%q is no name", args[0])
	}
	v, err := s.eval(args[1])
	if err != nil {
		return "", err
	}
	s.vars[args[0]] = v
	return v.String(), nil
}

func (s *session) print(args []string) (string, error) {
	v, err := s.eval(args[0])
	return v.String(), err
}

// global sets in one step what may depend on the value before.
func (s *session) global(args []string) (string, error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if len(args) == 1 {
		v, ok := s.p.globals[args[0]]
		if !ok {
			return "", fmt.Errorf("no global %s", args[0])
		}
		return v.String(), nil
	}
	if !named(args[0]) {
		return "", fmt.Errorf("%q is no name", args[0])
	}
	v, err := s.evalLocked(args[1])
	if err != nil {
		return "", err
	}
	s.p.globals[args[0]] = v
	return v.String(), nil
}

func (s *session) names([]string) (string, error) {
	return strings.Join(append([]string{strconv.Itoa(len(s.vars))}, slices.Sorted(maps.Keys(s.vars))...), " "), nil
}

func (s *session) past(args []string) (string, error) {
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 || n > len(s.history) {
		return "", fmt.Errorf("no request %s, there were %d", args[0], len(s.history))
	}
	return s.history[n-1], nil
}

// size reads a number of lines or octets.
func size(arg string) (int64, error) {
	n, err := strconv.ParseInt(arg, 10, 64)
	if err == nil && n < 0 {
		err = fmt.Errorf("%d is negative", n)
	}
	return n, err
}

// sum adds up the lines that are integers.
func (s *session) sum(args []string) (string, error) {
	n, err := size(args[0])
	if err != nil {
		return "", err
	}
	h, total := sha256.New(), int64(0)
	for range n {
		line, err := s.line()
		if err != nil {
			s.err = err
			return "", err
		}
		fmt.Fprintln(h, line)
		if k, err := strconv.ParseInt(line, 10, 64); err == nil {
			total += k
		}
	}
	return fmt.Sprintf("%d %x", total, h.Sum(nil)), nil
}

func (s *session) blob(args []string) (string, error) {
	n, err := size(args[0])
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if _, err := io.CopyN(h, s.r, n); err != nil {
		s.err = err
		return "", err
	}
	s.blobs += uint64(n)
	return fmt.Sprintf("%x %d", h.Sum(nil), s.blobs), nil
}

// gen sends the stream of a seed, clients.Fill, after the line.
func (s *session) gen(args []string) (string, error) {
	n, err := size(args[0])
	if err != nil {
		return "", err
	}
	seed, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return "", err
	}
	s.then = func() error {
		buf := make([]byte, 32<<10)
		for pos := int64(0); pos < n; {
			b := buf[:min(int64(len(buf)), n-pos)]
			clients.Fill(b, seed, uint64(pos))
			if _, err := s.w.Write(b); err != nil {
				return err
			}
			pos += int64(len(b))
		}
		return s.w.Flush()
	}
	return strconv.FormatInt(n, 10), nil
}

// rename tells the session's name, or gives it another one; at first it is the
// client's address.
func (s *session) rename(args []string) (string, error) {
	if len(args) == 1 {
		s.name = args[0]
	}
	return s.name, nil
}

// half shuts down the sending side after the reply. What the client still sends
// is counted and hashed, and no request.
func (s *session) half([]string) (string, error) {
	h, err := s.p.newHalf(s.name)
	if err != nil {
		return "", err
	}
	s.then = func() error {
		err := s.w.Flush()
		if err == nil {
			err = s.c.CloseWrite()
		}
		if err == nil {
			_, err = io.Copy(h, s.r)
		}
		h.end(err)
		return io.EOF
	}
	return "half " + s.name, nil
}

func (s *session) halved(args []string) (string, error) {
	least := int64(0)
	if len(args) == 2 && args[1] == "end" {
		least = math.MaxInt64
	} else if len(args) == 2 {
		var err error
		if least, err = size(args[1]); err != nil {
			return "", err
		}
	}
	h, err := s.p.half(args[0])
	if err != nil {
		return "", err
	}
	return h.await(least), nil
}

func (s *session) quit([]string) (string, error) {
	s.then = func() error {
		s.w.Flush()
		return io.EOF
	}
	return "bye", nil
}
