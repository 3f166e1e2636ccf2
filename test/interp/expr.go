package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// value is an integer, which wraps around at 64 bits, or a string.
type value struct {
	n    int64
	s    string
	text bool
}

// String writes strings quoted, so that a reply is one line whatever is in them.
func (v value) String() string {
	if v.text {
		return strconv.Quote(v.s)
	}
	return strconv.FormatInt(v.n, 10)
}

// parser evaluates while it reads: SUM = PRODUCT {("+"|"-") PRODUCT},
// PRODUCT = FACTOR {"*" FACTOR}, FACTOR = integer | string in quotes | NAME |
// "-" FACTOR | "(" SUM ")". "+" also joins strings.
type parser struct {
	rest   string
	lookup func(name string) (value, bool)
}

// eval evaluates a whole expression.
func eval(expr string, lookup func(name string) (value, bool)) (value, error) {
	p := &parser{rest: expr, lookup: lookup}
	v, err := p.sum()
	if err == nil && p.peek() != 0 {
		err = fmt.Errorf("unexpected %q", p.rest)
	}
	return v, err
}

// peek is the next octet that is no blank, 0 at the end.
func (p *parser) peek() byte {
	if p.rest = strings.TrimLeft(p.rest, " \t"); p.rest == "" {
		return 0
	}
	return p.rest[0]
}

func (p *parser) sum() (value, error) {
	v, err := p.product()
	for err == nil && (p.peek() == '+' || p.peek() == '-') {
		op := p.rest[0]
		p.rest = p.rest[1:]
		var w value
		if w, err = p.product(); err == nil {
			v, err = apply(op, v, w)
		}
	}
	return v, err
}

func (p *parser) product() (value, error) {
	v, err := p.factor()
	for err == nil && p.peek() == '*' {
		p.rest = p.rest[1:]
		var w value
		if w, err = p.factor(); err == nil {
			v, err = apply('*', v, w)
		}
	}
	return v, err
}

func apply(op byte, v, w value) (value, error) {
	switch {
	case v.text && w.text && op == '+':
		return value{s: v.s + w.s, text: true}, nil
	case v.text || w.text:
		return value{}, fmt.Errorf("%v %c %v: only integers, or + between two strings", v, op, w)
	case op == '+':
		return value{n: v.n + w.n}, nil
	case op == '-':
		return value{n: v.n - w.n}, nil
	}
	return value{n: v.n * w.n}, nil
}

func (p *parser) factor() (value, error) {
	switch c := p.peek(); {
	case c == 0:
		return value{}, errors.New("unexpected end")
	case c == '(':
		p.rest = p.rest[1:]
		v, err := p.sum()
		if err != nil {
			return v, err
		}
		if p.peek() != ')' {
			return v, fmt.Errorf("%q instead of a closing parenthesis", p.rest)
		}
		p.rest = p.rest[1:]
		return v, nil
	case c == '-':
		p.rest = p.rest[1:]
		v, err := p.factor()
		if err != nil {
			return v, err
		}
		return apply('-', value{}, v)
	case c == '"':
		q, err := strconv.QuotedPrefix(p.rest)
		if err != nil {
			return value{}, fmt.Errorf("string %q: %w", p.rest, err)
		}
		p.rest = p.rest[len(q):]
		s, err := strconv.Unquote(q)
		return value{s: s, text: true}, err
	case digit(c):
		d := p.take(digit)
		n, err := strconv.ParseInt(d, 10, 64)
		return value{n: n}, err
	case c == '$' || letter(c):
		p.rest = p.rest[1:]
		name := string(c) + p.take(func(c byte) bool { return letter(c) || digit(c) })
		v, ok := p.lookup(name)
		if !ok {
			return v, fmt.Errorf("no %s", name)
		}
		return v, nil
	}
	return value{}, fmt.Errorf("unexpected %q", p.rest)
}

// take removes the longest beginning that is of this kind.
func (p *parser) take(is func(byte) bool) string {
	n := 0
	for n < len(p.rest) && is(p.rest[n]) {
		n++
	}
	s := p.rest[:n]
	p.rest = p.rest[n:]
	return s
}

func digit(c byte) bool  { return '0' <= c && c <= '9' }
func letter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' }

// named tells whether a variable may have this name.
func named(s string) bool {
	p := &parser{rest: s}
	return s != "" && letter(s[0]) && p.take(func(c byte) bool { return letter(c) || digit(c) }) == s
}
