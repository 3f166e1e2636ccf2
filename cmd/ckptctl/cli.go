package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

// Exit codes; runbooks rely on them.
const (
	exitDone        = 0
	exitFailed      = 1 // refused or failed
	exitUsage       = 2 // usage, configuration, unknown application
	exitUnreachable = 3 // daemon not reachable
	exitTimeout     = 4 // --timeout passed
)

// timeoutError is the error of a call that --timeout ended.
type timeoutError struct {
	note  string // what became of the operation
	cause error
}

func (e *timeoutError) Error() string { return "--timeout passed; " + e.note }
func (e *timeoutError) Unwrap() error { return e.cause }

// version is set when a release is linked.
var version = "devel"

// cli holds the flags that all commands share and where their output goes.
type cli struct {
	out, err io.Writer

	nodeFile    string
	socket      string
	agentSocket string
	output      string
	timeout     time.Duration

	terminal bool          // err is a terminal
	running  bool          // a command's own code was reached: no usage error any more
	app      string        // the application that the command is about, for error reports
	timedOut chan struct{} // closed when --timeout has passed
}

// errSaid makes the exit code 1 where the result on standard output has said
// why.
var errSaid = errors.New("the result says what is wrong")

// usageError is a fault of the command line or of the configuration.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// daemonError says which daemon a call was made to.
type daemonError struct {
	error
	daemon, socket string
}

func (e daemonError) Unwrap() error { return e.error }

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{out: stdout, err: stderr, terminal: isTerminal(stderr)}
	return c.run(ctx, args)
}

func (c *cli) run(ctx context.Context, args []string) int {
	c.timedOut = make(chan struct{})
	root := c.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	if !c.running {
		err = usageError{err}
		// The flag may stand after the one that was not understood.
		if wantsJSON(args) {
			c.output = "json"
		}
	}
	if errors.Is(err, errSaid) {
		return exitFailed
	}
	code := c.exitCode(ctx, err)
	c.report(ctx, err, code)
	return code
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ckptctl COMMAND",
		Short: "Stop a server process, keep its clients connected, bring it back",
		Long: `ckptctl starts and stops applications behind a virtual IP address (VIP),
takes snapshots of them and restores them, while the connection filter
keeps their clients connected.

Results go to standard output, everything else to standard error.
Exit codes: 0 done; 1 refused or failed; 2 usage, configuration or unknown
application; 3 daemon not reachable; 4 --timeout passed.`,
		Example: `  ckptctl start redis
  ckptctl snapshot redis && ckptctl restore redis
  ckptctl status -o json`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(*cobra.Command, []string) error {
			return usagef("which command? ckptctl --help lists them")
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetOut(c.out)
	root.SetErr(c.err)
	f := root.PersistentFlags()
	f.StringVar(&c.nodeFile, "node", config.DefaultNodeFile, "the node's `FILE`; it names both sockets")
	f.StringVar(&c.socket, "socket", "", "`PATH` of the filter's socket, instead of the node file's")
	f.StringVar(&c.agentSocket, "agent-socket", "", "`PATH` of the agent's socket, instead of the node file's")
	f.StringVarP(&c.output, "output", "o", "table", "how to print results: `table|json`")
	f.DurationVar(&c.timeout, "timeout", 0, "give up after this `DURATION` (as 30s) and abort the operation; 0: never")
	root.AddCommand(
		c.startCommand(), c.stopCommand(), c.statusCommand(), c.connsCommand(),
		c.snapshotCommand(), c.snapshotsCommand(), c.restoreCommand(), c.migrateCommand(), c.abortCommand(), c.releaseCommand(),
		c.waitCommand(), c.doctorCommand(), c.criuActionCommand(), c.ioctlCommand(), c.agentCommand(), c.schedulerCommand(), c.certsCommand(),
	)
	root.SetHelpCommand(helpCommand(root))
	// Otherwise they are taken for flags with a value while the command is
	// being looked for.
	root.InitDefaultHelpFlag()
	root.InitDefaultVersionFlag()
	return root
}

// helpCommand is cobra's help, with the usage exit code for unknown commands.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show what a command does",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, _, err := root.Find(args)
			if err != nil {
				return usageError{err}
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	}
}

// command wraps a command's own code: the shared flags are checked, --timeout
// starts, and from here on errors are no usage errors unless they say so.
func (c *cli) command(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if c.output != "table" && c.output != "json" {
			bad := c.output
			c.output = "table"
			return usagef("-o %s: it is table or json", bad)
		}
		if c.timeout < 0 {
			return usagef("--timeout %v: it cannot be negative", c.timeout)
		}
		c.running = true
		ctx := cmd.Context()
		if c.timeout > 0 {
			// A deadline in the context would travel to the daemon, and its
			// own time-outs could not be told from this one.
			t := time.AfterFunc(c.timeout, func() { close(c.timedOut) })
			defer t.Stop()
		}
		return f(ctx, args)
	}
}

// appArg takes the application from the arguments.
func (c *cli) appArg(args []string) (string, error) {
	c.app = args[0]
	if c.app == "" {
		return "", usagef("the application's name is empty")
	}
	return c.app, nil
}

// oneApp is the cobra check for commands that take exactly one application.
func oneApp(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("%s takes one application, got %d arguments: see %s --help", cmd.Name(), len(args), cmd.CommandPath())
	}
	return nil
}

func maybeApp(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usagef("%s takes one application or none, got %d arguments: see %s --help", cmd.Name(), len(args), cmd.CommandPath())
	}
	return nil
}

// node reads the node file when a socket's path is not given otherwise.
func (c *cli) node() (*config.Node, error) {
	n, err := config.LoadNode(c.nodeFile)
	if err != nil {
		return nil, usageError{err}
	}
	return n, nil
}

// filterSocket returns where the filter listens.
func (c *cli) filterSocket() (string, error) {
	if c.socket != "" {
		return c.socket, nil
	}
	n, err := c.node()
	if err != nil {
		return "", err
	}
	return n.ControlSocket, nil
}

func (c *cli) agentSocketPath() (string, error) {
	if c.agentSocket != "" {
		return c.agentSocket, nil
	}
	n, err := c.node()
	if err != nil {
		return "", err
	}
	return n.AgentSocket, nil
}

// withFilter calls the filter. When --timeout passes, the call is given up.
func (c *cli) withFilter(ctx context.Context, f func(context.Context, *control.FilterClient) error) error {
	path, err := c.filterSocket()
	if err != nil {
		return err
	}
	client := control.Dial(path)
	defer client.Close()
	err = c.bounded(ctx, nil, func(ctx context.Context) error { return f(ctx, client) })
	if err != nil {
		return daemonError{err, "filter", path}
	}
	return nil
}

// bounded runs f until --timeout passes; then onTimeout, when there is one,
// may end the operation in order (it should not outlast finished) and tell what
// came of that, before the context of f ends.
func (c *cli) bounded(ctx context.Context, onTimeout func(finished <-chan struct{}) string, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	finished, watched := make(chan struct{}), make(chan struct{})
	var late *timeoutError
	go func() {
		defer close(watched)
		select {
		case <-finished:
			return
		case <-c.timedOut:
		}
		late = &timeoutError{note: "the operation was given up"}
		if onTimeout != nil {
			late.note = onTimeout(finished)
		}
		cancel()
	}()
	err := f(ctx)
	close(finished)
	<-watched
	if err != nil && late != nil {
		late.cause = err
		return late
	}
	return err
}

// exitCode maps an error to the exit code.
func (c *cli) exitCode(ctx context.Context, err error) int {
	var usage usageError
	var late *timeoutError
	switch {
	case errors.As(err, &late):
		return exitTimeout
	case errors.As(err, &usage):
		return exitUsage
	case ctx.Err() != nil:
		return exitFailed
	case control.IsUnreachable(err):
		return exitUnreachable
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeInvalidArgument:
		return exitUsage
	}
	return exitFailed
}

// failure is the JSON form of an error.
type failure struct {
	Code        string   `json:"code"`
	Message     string   `json:"message"`
	App         string   `json:"app"`
	State       string   `json:"state"`
	Connections []string `json:"connections,omitempty"`
}

// report prints a failure: as JSON on standard output, or as text on standard
// error.
func (c *cli) report(ctx context.Context, err error, code int) {
	f := c.describe(ctx, err, code)
	if c.output == "json" {
		_ = writeJSON(c.out, struct {
			Error failure `json:"error"`
		}{f})
		return
	}
	fmt.Fprintf(c.err, "ckptctl: %s\n", f.Message)
	for _, line := range f.Connections {
		fmt.Fprintf(c.err, "  %s\n", line)
	}
}

func (c *cli) describe(ctx context.Context, err error, code int) failure {
	f := failure{Code: connect.CodeOf(err).String(), Message: err.Error(), App: c.app}
	var ce *connect.Error
	if errors.As(err, &ce) {
		f.Message = ce.Message()
	}
	if info := control.Info(err); info != nil {
		f.State, f.Connections = info.State, info.Connections
		if info.App != "" {
			f.App = info.App
		}
	}
	switch {
	case code == exitTimeout:
		f.Code = connect.CodeDeadlineExceeded.String()
		var late *timeoutError
		if errors.As(err, &late) {
			f.Message = fmt.Sprintf("not finished within --timeout %v; %s", c.timeout, late.note)
		}
	case code == exitUnreachable:
		f.Code, f.Message = connect.CodeUnavailable.String(), unreachableText(err)
	case ctx.Err() != nil:
		f.Code, f.Message = connect.CodeCanceled.String(), "interrupted; the operation was given up"
	case code == exitUsage:
		if connect.CodeOf(err) == connect.CodeUnknown {
			f.Code = connect.CodeInvalidArgument.String()
		}
	}
	return f
}

func unreachableText(err error) string {
	daemon, socket := "daemon", ""
	var de daemonError
	if errors.As(err, &de) {
		daemon, socket = de.daemon, de.socket
	}
	start, flag := "nfconnfilter run", "--socket"
	if daemon == "agent" {
		start, flag = "ckptctl agent", "--agent-socket"
	}
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Sprintf("the %s at %s cannot be reached: permission denied: be root or a member of control_group", daemon, socket)
	case errors.Is(err, unix.ENOENT):
		return fmt.Sprintf("the %s cannot be reached: there is no socket %s: start %s, or name its socket with --node or %s", daemon, socket, start, flag)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Sprintf("the %s cannot be reached: nobody listens on %s: start %s", daemon, socket, start)
	}
	return fmt.Sprintf("the %s at %s went away before it answered; whether the request took effect is not known: see ckptctl status", daemon, socket)
}

// wantsJSON finds -o json in a command line that cobra did not understand.
func wantsJSON(args []string) bool {
	for i, a := range args {
		switch a {
		case "--":
			return false
		case "-ojson", "-o=json", "--output=json":
			return true
		case "-o", "--output":
			if i+1 < len(args) && args[i+1] == "json" {
				return true
			}
		}
	}
	return false
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// words joins words for a message: "A, B or C".
func words(list []string) string {
	list = slices.Clone(list)
	if n := len(list); n > 1 {
		return strings.Join(list[:n-1], ", ") + " or " + list[n-1]
	}
	return strings.Join(list, "")
}
