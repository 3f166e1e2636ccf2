package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	progressAfter = time.Second // before that nobody wonders
	progressEvery = 500 * time.Millisecond
	abortTime     = 2 * time.Second // for the agent to undo an operation after --timeout
)

// withAgent calls the agent, with a progress line for a terminal. When
// --timeout passes, the call is given up, which makes the agent abort.
func (c *cli) withAgent(ctx context.Context, f func(context.Context, *control.AgentClient) error) error {
	return c.callAgent(ctx, false, f)
}

// withAgentAbort is withAgent for the operations that the agent's Abort ends:
// when --timeout passes, the application is back as it was, or the error says
// why not, before the command returns.
func (c *cli) withAgentAbort(ctx context.Context, f func(context.Context, *control.AgentClient) error) error {
	return c.callAgent(ctx, true, f)
}

func (c *cli) callAgent(ctx context.Context, abort bool, f func(context.Context, *control.AgentClient) error) error {
	path, err := c.agentSocketPath()
	if err != nil {
		return err
	}
	client := control.DialAgent(path)
	defer client.Close()
	stop := c.showProgress(ctx, client)
	defer stop()
	var onTimeout func(<-chan struct{}) string
	if abort {
		onTimeout = func(finished <-chan struct{}) string { return abortOperation(ctx, client, c.app, finished) }
	}
	if err := c.bounded(ctx, onTimeout, func(ctx context.Context) error { return f(ctx, client) }); err != nil {
		return daemonError{err, "agent", path}
	}
	return nil
}

// abortOperation asks the agent to abort what it does for app, waits a little
// for the call to end (finished), and returns what came of it.
func abortOperation(ctx context.Context, client *control.AgentClient, app string, finished <-chan struct{}) string {
	ctx, cancel := context.WithTimeout(ctx, abortTime)
	defer cancel()
	r, err := client.Abort(ctx, connect.NewRequest(&nfconnfilterv1.AgentAbortRequest{App: app}))
	if err != nil {
		msg := err.Error()
		if ce := (*connect.Error)(nil); errors.As(err, &ce) {
			msg = ce.Message()
		}
		return "the operation could not be aborted and may go on (see ckptctl status): " + msg
	}
	select {
	case <-finished:
	case <-ctx.Done():
	}
	return "the operation was aborted, the application is in state " + stateWord(r.Msg.State)
}

// showProgress draws a line on the terminal while an operation takes longer
// than a second, and returns what ends and removes it.
func (c *cli) showProgress(ctx context.Context, client *control.AgentClient) func() {
	if !c.terminal || c.app == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.progress(ctx, client)
	}()
	return func() {
		cancel()
		<-done
	}
}

func (c *cli) progress(ctx context.Context, client *control.AgentClient) {
	shown := false
	defer func() {
		if shown {
			fmt.Fprint(c.err, clearLine)
		}
	}()
	wait := time.NewTimer(progressAfter)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		r, err := client.Progress(ctx, connect.NewRequest(&nfconnfilterv1.AgentProgressRequest{App: c.app}))
		if err == nil && r.Msg.Operation != "" {
			writeProgress(c.err, r.Msg)
			shown = true
		}
		wait.Reset(progressEvery)
	}
}

// clearLine returns to the line's start and erases it (ECMA-48 CR, EL).
const clearLine = "\r\x1b[K"

func writeProgress(w io.Writer, p *nfconnfilterv1.AgentProgressReply) {
	line := p.App + ": " + p.Operation
	if p.Phase != "" {
		line += ": " + p.Phase
	}
	if p.Detail != "" {
		line += " (" + p.Detail + ")"
	}
	elapsed := time.Duration(p.ElapsedMs) * time.Millisecond
	fmt.Fprintf(w, "%s%s, %.1fs", clearLine, printable(line), elapsed.Seconds())
}

// printable cuts a progress line to a terminal's width and takes control
// characters out of it.
func printable(s string) string {
	const width = 70
	out := make([]rune, 0, width)
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			r = ' '
		}
		if len(out) == width {
			return string(append(out[:width-3], '.', '.', '.'))
		}
		out = append(out, r)
	}
	return string(out)
}
