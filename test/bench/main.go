// Command bench measures what the project costs and how fast it is, each
// against a target: a bulk stream past an idle filter, packets through the
// queue loop against its peers, snapshot, restore and restart of the filter
// with thousands of held connections, their migration to another node, and a
// snapshot by image against CRIU alone. It needs root for its network namespaces.
// Figures are ratios of runs in turn, or medians; the exit code is 1 when one misses
// its target. Those of migrate and criu stand beside their limits and are no failure.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

func main() {
	bin := flag.String("bin", "bin", "`directory` that holds nfconnfilter and ckptctl")
	only := flag.String("only", "stream,queue,hold,migrate,criu", "what is measured, a `list` of stream, queue, hold, migrate and criu")
	pairs := flag.Int("pairs", 25, "paired runs of stream for each direction")
	rounds := flag.Int("rounds", 7, "rounds of queue, hold, migrate and criu")
	conns := flag.Int("conns", 0, "connections of migrate, 1000 or 10000, and of criu, 1000 or 5000; 0: one after the other")
	length := flag.Duration("time", time.Second, "length of one run of stream and queue, whole seconds")
	behind := flag.Bool("behind", false, "the application of stream is in a network namespace behind the node")
	consumer := flag.String("consume", "", "internal: be one of the Go loops of queue")
	loadFor := flag.Duration("load", 0, "internal: be the load of queue for so long")
	flag.Parse()
	switch {
	case *consumer != "":
		exit(consume(*consumer))
	case *loadFor > 0:
		exit(load(*loadFor))
	}
	which := strings.Split(*only, ",")
	known := !slices.ContainsFunc(which, func(s string) bool {
		return !slices.Contains([]string{"stream", "queue", "hold", "migrate", "criu"}, s)
	})
	known = known && slices.Contains([]int{0, 1000, 5000, 10000}, *conns)
	if flag.NArg() != 0 || *pairs < 1 || *rounds < 1 || *length < time.Second || !known {
		flag.Usage()
		os.Exit(2)
	}
	if os.Geteuid() != 0 {
		exit(errors.New("it needs root to make network namespaces"))
	}
	dir, err := filepath.Abs(*bin)
	if err == nil {
		err = harness.Sweep()
	}
	if err != nil {
		exit(err)
	}
	for _, w := range which {
		switch w {
		case "stream":
			err = errors.Join(err, streams(dir, *behind, *pairs, *length))
		case "queue":
			err = errors.Join(err, queueLoops(*rounds, *length))
		case "hold":
			err = errors.Join(err, holds(dir, *rounds))
		case "migrate":
			err = errors.Join(err, migrations(dir, *rounds, *conns))
		case "criu":
			err = errors.Join(err, dumps(dir, *rounds, *conns))
		}
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// median of at least one figure.
func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}
