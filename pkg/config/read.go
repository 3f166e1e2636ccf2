package config

import (
	"encoding"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
)

// table is one table of a doc with the keys that were asked for so far.
type table struct {
	d     *doc
	name  string // as messages name it, with a dot at the end; "" at the top
	where *place
	m     map[string]any
	asked []string
}

// at is the offset of a key's value, or of an element in it; of the table
// itself where there is none.
func (t *table) at(key string, index ...int) int {
	p := t.where.keys[key]
	if p == nil {
		return t.where.key
	}
	for _, i := range index {
		if i >= len(p.items) {
			break
		}
		p = p.items[i]
	}
	return p.val
}

// fault notes a fault at a key's value, or at an element in it.
func (t *table) fault(key string, index []int, format string, args ...any) {
	t.d.fault(t.at(key, index...), "%s%s: %s", t.name, key, fmt.Sprintf(format, args...))
}

// get gives a key's value and remembers that the key is known.
func (t *table) get(key string) (any, bool) {
	if !slices.Contains(t.asked, key) {
		t.asked = append(t.asked, key)
	}
	v, ok := t.m[key]
	return v, ok
}

// has tells whether the file sets a key.
func (t *table) has(key string) bool {
	_, ok := t.m[key]
	return ok
}

// require tells whether a key is there and not an empty string, and notes a
// fault when not.
func (t *table) require(key, remedy string) bool {
	v, ok := t.get(key)
	if !ok {
		t.d.fault(t.where.key, "%s%s is missing; %s", t.name, key, remedy)
	} else if v == "" {
		t.fault(key, nil, "is empty; %s", remedy)
	}
	return ok && v != ""
}

// done notes a fault for every key that nobody asked for.
func (t *table) done() {
	for _, key := range slices.Sorted(maps.Keys(t.m)) {
		if slices.Contains(t.asked, key) {
			continue
		}
		offset := t.where.key
		if p := t.where.keys[key]; p != nil {
			offset = p.key
		}
		hint := "known here: " + strings.Join(t.asked, ", ")
		if near := nearest(key, t.asked); near != "" {
			hint = fmt.Sprintf("did you mean %q?", near)
		}
		t.d.fault(offset, "unknown key %q; %s", t.name+key, hint)
	}
}

// nearest gives the known key that is at most two edits away from key.
func nearest(key string, known []string) string {
	best, bestDistance := "", 3
	for _, k := range known {
		if len(key) < 64 {
			if d := distance(key, k); d < bestDistance && d < len(k) {
				best, bestDistance = k, d
			}
		}
	}
	return best
}

// distance counts the inserted, deleted or replaced bytes between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// typeName is a decoded value's type in TOML's words.
func typeName(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case int64:
		return "an integer"
	case float64:
		return "a float"
	case bool:
		return "a boolean"
	case []any, []map[string]any:
		return "an array"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

// as gives v as a T, or notes that the type is wrong.
func as[T any](t *table, key string, index []int, v any, want string) (T, bool) {
	x, ok := v.(T)
	if !ok {
		t.fault(key, index, "want %s, have %s", want, typeName(v))
	}
	return x, ok
}

// str reads a string. NUL is refused: no path, argument or name can hold it.
func (t *table) str(key string, dst *string) {
	if v, ok := t.get(key); ok {
		t.text(key, nil, v, "a string", dst)
	}
}

func (t *table) text(key string, index []int, v any, want string, dst *string) bool {
	s, ok := as[string](t, key, index, v, want)
	if ok && strings.ContainsRune(s, 0) {
		t.fault(key, index, "holds a NUL character")
		return false
	}
	if ok {
		*dst = s
	}
	return ok
}

// word reads a string that must be one of words.
func (t *table) word(key string, dst *string, words ...string) {
	v, ok := t.get(key)
	if !ok {
		return
	}
	s, ok := as[string](t, key, nil, v, "a string")
	if ok && !slices.Contains(words, s) {
		t.fault(key, nil, "%q is none of \"%s\"", s, strings.Join(words, `", "`))
		return
	}
	if ok {
		*dst = s
	}
}

// boolean reads a boolean.
func (t *table) boolean(key string, dst *bool) {
	if v, ok := t.get(key); ok {
		if b, ok := as[bool](t, key, nil, v, "true or false"); ok {
			*dst = b
		}
	}
}

// number is an integer type of a struct field.
type number interface {
	~int | ~uint16 | ~uint32
}

// integer reads an integer between low and high.
func integer[T number](t *table, key string, dst *T, low, high int64) {
	if v, ok := t.get(key); ok {
		whole(t, key, nil, v, dst, low, high)
	}
}

func whole[T number](t *table, key string, index []int, v any, dst *T, low, high int64) bool {
	n, ok := as[int64](t, key, index, v, "an integer")
	if ok && (n < low || n > high) {
		t.fault(key, index, "%d is not between %d and %d", n, low, high)
		return false
	}
	if ok {
		*dst = T(n)
	}
	return ok
}

// float reads a number that is not negative.
func (t *table) float(key string, dst *float64) {
	v, ok := t.get(key)
	if !ok {
		return
	}
	if n, isInt := v.(int64); isInt {
		v = float64(n)
	}
	f, ok := as[float64](t, key, nil, v, "a number")
	if ok && !(f >= 0 && f <= math.MaxFloat64) {
		t.fault(key, nil, "%v is not a number of 0 or more", f)
	} else if ok {
		*dst = f
	}
}

// unmarshal reads a string that dst understands.
// It tells whether it did.
func (t *table) unmarshal(key, want string, dst encoding.TextUnmarshaler) bool {
	v, ok := t.get(key)
	if !ok {
		return false
	}
	s, ok := as[string](t, key, nil, v, want)
	if !ok {
		return false
	}
	if err := dst.UnmarshalText([]byte(s)); err != nil {
		t.fault(key, nil, "%v", err)
		return false
	}
	return true
}

func (t *table) duration(key string, dst *Duration) bool {
	return t.unmarshal(key, `a duration in quotes such as "5s"`, dst)
}

func (t *table) size(key string, dst *ByteSize) bool {
	return t.unmarshal(key, `a size in quotes such as "256KiB"`, dst)
}

// list reads an array and gives each element to f; a key that is there
// always replaces the default, so f appends to an emptied slice.
func list[T any](t *table, key string, dst *[]T, f func(index []int, v any) (T, bool)) {
	v, ok := t.get(key)
	if !ok {
		return
	}
	items, ok := as[[]any](t, key, nil, v, "an array")
	if !ok {
		return
	}
	*dst = nil
	for i, v := range items {
		if x, ok := f([]int{i}, v); ok {
			*dst = append(*dst, x)
		}
	}
}

// strings reads an array of strings.
func (t *table) strings(key string, dst *[]string) {
	list(t, key, dst, func(index []int, v any) (s string, ok bool) {
		ok = t.text(key, index, v, "a string", &s)
		return s, ok
	})
}

// ports reads an array of port numbers.
func (t *table) ports(key string, dst *[]uint16) {
	list(t, key, dst, func(index []int, v any) (p uint16, ok bool) {
		ok = whole(t, key, index, v, &p, 1, 65535)
		return p, ok
	})
}

// addr reads an address of one host.
func (t *table) addr(key string, dst *netip.Addr) {
	if v, ok := t.get(key); ok {
		t.host(key, nil, v, dst)
	}
}

func (t *table) host(key string, index []int, v any, dst *netip.Addr) bool {
	s, ok := as[string](t, key, index, v, "an IP address in quotes")
	if !ok {
		return false
	}
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		t.fault(key, index, "%q is not an IP address", s)
	case a.Zone() != "":
		t.fault(key, index, "%q names a zone; write the address alone", s)
	case a.Is4In6():
		t.fault(key, index, "%q is an IPv4 address inside IPv6; write %s", s, a.Unmap())
	case a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		t.fault(key, index, "%q is not the address of one host", s)
	default:
		*dst = a
		return true
	}
	return false
}

// prefixes reads an array of prefixes.
func (t *table) prefixes(key string, dst *[]netip.Prefix) {
	list(t, key, dst, func(index []int, v any) (p netip.Prefix, ok bool) {
		ok = t.network(key, index, v, &p)
		return p, ok
	})
}

// network reads a prefix, or an address that stands for itself alone.
func (t *table) network(key string, index []int, v any, dst *netip.Prefix) bool {
	s, ok := as[string](t, key, index, v, "a prefix in quotes")
	if !ok {
		return false
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !a.Is4In6() {
		*dst = netip.PrefixFrom(a, a.BitLen())
		return true
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		t.fault(key, index, "%q is not a prefix; write one such as \"198.51.100.0/24\"", s)
	case p != p.Masked():
		t.fault(key, index, "%q has bits set after the prefix; write %q", s, p.Masked())
	default:
		*dst = p
		return true
	}
	return false
}

// sub gives the table under key; an empty one when the file has none.
func (t *table) sub(key string) *table {
	s := &table{d: t.d, name: t.name + key + ".", where: &place{key: t.where.key}, m: map[string]any{}}
	v, ok := t.get(key)
	if !ok {
		return s
	}
	if m, ok := as[map[string]any](t, key, nil, v, "a table ["+t.name+key+"]"); ok {
		s.m = m
		if p := t.where.keys[key]; p != nil {
			s.where = p
		}
	}
	return s
}

// subs gives the tables of an array of tables.
func (t *table) subs(key string) []*table {
	v, ok := t.get(key)
	if !ok {
		return nil
	}
	var maps []map[string]any
	switch v := v.(type) {
	case []map[string]any:
		maps = v
	case []any:
		for i, e := range v {
			m, ok := as[map[string]any](t, key, []int{i}, e, "a table")
			if !ok {
				return nil
			}
			maps = append(maps, m)
		}
	default:
		t.fault(key, nil, "want tables [[%s%s]], have %s", t.name, key, typeName(v))
		return nil
	}
	var subs []*table
	for i, m := range maps {
		s := &table{d: t.d, name: t.name + key + ".", where: &place{key: t.where.key}, m: m}
		if p := t.where.keys[key]; p != nil && i < len(p.items) {
			s.where = p.items[i]
		}
		subs = append(subs, s)
	}
	return subs
}
