//go:build !race

package filter_test

const slower = 1
