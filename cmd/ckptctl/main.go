// Command ckptctl is the checkpoint helper: the shell commands of runbooks and
// the snapshot and restore daemon of a node.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// The agent takes its own signals; for a command they mean to give up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, arguments(os.Args), os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
