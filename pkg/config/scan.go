package config

import (
	"strings"

	"github.com/BurntSushi/toml"
)

// The TOML library tells the position of a syntax error but not of a key or a
// value that it could decode. This scanner finds those. Its result counts only
// for text that the library accepts, so it needs no error messages; on text that
// it does not understand it stops, and positions fall back to the enclosing table.

// maxDepth bounds how deep keys, arrays and inline tables nest; ours need 4.
// The library's time grows with the third power of the depth.
const maxDepth = 32

// place is where a key, its value and what is inside the value begin, as byte
// offsets into the text.
type place struct {
	key, val int
	keys     map[string]*place
	items    []*place
}

// child gives the place of a key inside p, made at offset when it is new.
func (p *place) child(key string, offset int) *place {
	if c := p.keys[key]; c != nil {
		return c
	}
	if p.keys == nil {
		p.keys = make(map[string]*place)
	}
	c := &place{key: offset, val: offset}
	p.keys[key] = c
	return c
}

// last is the table that a header's path goes through: the newest element of
// an array of tables, otherwise p itself.
func (p *place) last() *place {
	if n := len(p.items); n > 0 {
		return p.items[n-1]
	}
	return p
}

type scanner struct {
	text  string
	i     int
	depth int
	deep  int // where maxDepth is passed; -1: nowhere
}

// scan gives the places of everything in text, and the offset at which it
// nests too deep, or -1.
func scan(text string) (root *place, deep int) {
	s := &scanner{text: text, deep: -1}
	root = &place{}
	table := root
	for s.skip(true) {
		before := s.i
		if s.text[s.i] == '[' {
			table = s.header(root)
		} else {
			s.pair(table)
		}
		if table == nil || s.i == before {
			break
		}
	}
	return root, s.deep
}

// enter goes n levels deeper, or stops the scan where that is too deep.
func (s *scanner) enter(n, offset int) bool {
	s.depth += n
	if s.depth > maxDepth {
		if s.deep < 0 {
			s.deep = offset
		}
		s.i = len(s.text)
		return false
	}
	return true
}

// skip moves past spaces and comments, and past newlines when lines is set.
// It tells whether text is left.
func (s *scanner) skip(lines bool) bool {
	for s.i < len(s.text) {
		switch c := s.text[s.i]; {
		case c == ' ' || c == '\t' || lines && (c == '\n' || c == '\r'):
			s.i++
		case c == '#' && lines:
			if n := strings.IndexByte(s.text[s.i:], '\n'); n >= 0 {
				s.i += n
			} else {
				s.i = len(s.text)
			}
		default:
			return true
		}
	}
	return false
}

// take moves past c if it is next.
func (s *scanner) take(c byte) bool {
	if s.i < len(s.text) && s.text[s.i] == c {
		s.i++
		return true
	}
	return false
}

// part is one name of a dotted key.
type part struct {
	name   string
	offset int
}

// path reads a dotted key.
func (s *scanner) path() []part {
	var parts []part
	for s.skip(false) {
		start := s.i
		p := part{offset: start}
		if c := s.text[start]; c == '"' || c == '\'' {
			s.str()
			p.name = unquote(s.text[start:s.i])
		} else {
			for s.i < len(s.text) && !strings.ContainsRune(" \t\r\n.=]}", rune(s.text[s.i])) {
				s.i++
			}
			p.name = s.text[start:s.i]
		}
		parts = append(parts, p)
		s.skip(false)
		if !s.take('.') {
			break
		}
	}
	return parts
}

// unquote gives the value of a string with its quotes; the library knows
// the escapes.
func unquote(quoted string) string {
	var v struct{ K string }
	if _, err := toml.Decode("K="+quoted, &v); err != nil {
		return quoted
	}
	return v.K
}

// header reads [a.b] or [[a.b]] and gives the table's place.
func (s *scanner) header(root *place) *place {
	s.take('[')
	array := s.take('[')
	start := s.i
	parts := s.path()
	if !s.enter(len(parts), start) {
		return nil
	}
	s.depth = 0
	if len(parts) == 0 || !s.take(']') || array && !s.take(']') {
		return nil
	}
	p := root
	for _, k := range parts {
		p = p.last().child(k.name, k.offset)
	}
	at := parts[len(parts)-1].offset
	if array {
		p.items = append(p.items, &place{key: at, val: at})
		return p.last()
	}
	p.key, p.val = at, at
	return p
}

// pair reads key = value.
func (s *scanner) pair(table *place) {
	p, start := table, s.i
	parts := s.path()
	defer func(depth int) { s.depth = depth }(s.depth)
	if !s.enter(len(parts), start) {
		return
	}
	for _, k := range parts {
		p = p.child(k.name, k.offset)
	}
	if !s.take('=') {
		s.i = len(s.text)
		return
	}
	s.skip(false)
	s.value(p)
}

// value reads a value and notes where it and its parts begin.
func (s *scanner) value(p *place) {
	p.val = s.i
	if s.i >= len(s.text) {
		return
	}
	switch s.text[s.i] {
	case '"', '\'':
		s.str()
	case '[':
		defer func(depth int) { s.depth = depth }(s.depth)
		if !s.enter(1, s.i) {
			return
		}
		s.i++
		for s.skip(true) && !s.take(']') {
			item := &place{key: s.i}
			p.items = append(p.items, item)
			before := s.i
			s.value(item)
			if s.skip(true) && !s.take(',') && s.i == before {
				s.i = len(s.text)
			}
		}
	case '{':
		s.i++
		for s.skip(true) && !s.take('}') {
			s.pair(p)
			s.skip(true)
			s.take(',')
		}
	default:
		// A date with a space in it is one value: only these end it.
		for s.i < len(s.text) && !strings.ContainsRune(",]}#\r\n", rune(s.text[s.i])) {
			s.i++
		}
	}
}

// str moves past a string of any of the four kinds.
func (s *scanner) str() {
	q := s.text[s.i]
	long := strings.Repeat(string(q), 3)
	if strings.HasPrefix(s.text[s.i:], long) {
		s.i += 3
		for s.i < len(s.text) && !strings.HasPrefix(s.text[s.i:], long) {
			s.char(q)
		}
		s.i = min(s.i+3, len(s.text))
		// Up to two quotes may stand directly before the closing ones.
		for n := 0; n < 2 && s.take(q); n++ {
		}
		return
	}
	s.i++
	for s.i < len(s.text) && s.text[s.i] != q {
		s.char(q)
	}
	s.take(q)
}

// char moves past one byte of a string, or past a backslash and what it
// escapes.
func (s *scanner) char(q byte) {
	if q == '"' && s.text[s.i] == '\\' {
		s.i++
	}
	s.i = min(s.i+1, len(s.text))
}
