package filter

// DueAt tells of how many connections what is due at t is, -1 for anything.
func (e *Engine) DueAt(t Time) int {
	if l, ok := e.asked[t]; ok && l == nil {
		return -1
	}
	return len(e.asked[t])
}

// Heads is how many octets of heads are counted.
func (e *Engine) Heads() int { return e.heads }
