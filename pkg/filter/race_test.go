//go:build race

package filter_test

// slower is how many times less a flood has under the race detector, which makes
// the engine some forty times slower and finds nothing in it: one goroutine.
const slower = 10
