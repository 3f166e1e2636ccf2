package main

import (
	"context"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func (c *cli) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor APP",
		Short: "Tell beforehand what would make a snapshot or its restore fail",
		Long: `doctor looks at the application as it runs now: its processes, what they have
open, its sockets, and for engine = "criu" the criu command and the kernel. It
changes nothing and is allowed in any state.

Each finding has a level, a word for what was looked at, what was found, and
the remedy:

  fault    a snapshot or its restore would fail, or lose something
  warning  it may: what was seen passes by itself, or depends on others
  note     what to know before it is restored on another node

The last line says whether a snapshot can be expected to work. Look again
after each remedy, and when the application has its usual load: files and
connections that it opens only then are not seen before. With
engine = "restart" only sockets matter.

Exit code 0 when there is no fault, 1 when there is one.`,
		Example: "  ckptctl doctor redis && ckptctl snapshot redis\n  ckptctl doctor redis -o json",
		Args:    oneApp,
		RunE: c.command(func(ctx context.Context, args []string) error {
			app, err := c.appArg(args)
			if err != nil {
				return err
			}
			var faults int
			err = c.withAgent(ctx, func(ctx context.Context, a *control.AgentClient) error {
				r, err := a.Doctor(ctx, connect.NewRequest(&nfconnfilterv1.AgentDoctorRequest{App: app}))
				if err != nil {
					return err
				}
				report := doctorOf(r.Msg)
				faults = report.count("fault")
				if c.output == "json" {
					return writeJSON(c.out, report)
				}
				return report.write(c.out)
			})
			if err == nil && faults > 0 {
				return errSaid
			}
			return err
		}),
	}
}

type doctorJSON struct {
	App      string        `json:"app"`
	Engine   string        `json:"engine"`
	OK       bool          `json:"ok"`
	Findings []findingJSON `json:"findings"`
}

type findingJSON struct {
	Level  string `json:"level"`
	Check  string `json:"check"`
	What   string `json:"what"`
	Remedy string `json:"remedy"`
}

func doctorOf(r *nfconnfilterv1.AgentDoctorReply) doctorJSON {
	d := doctorJSON{App: r.App, Engine: r.Engine, Findings: make([]findingJSON, 0, len(r.Findings))}
	for _, f := range r.Findings {
		d.Findings = append(d.Findings, findingJSON{f.Level, f.Check, f.What, f.Remedy})
	}
	d.OK = d.count("fault") == 0
	return d
}

func (d doctorJSON) count(level string) int {
	n := 0
	for _, f := range d.Findings {
		if f.Level == level {
			n++
		}
	}
	return n
}

// write prints a line and an indented remedy for each finding, and what it all
// comes to.
func (d doctorJSON) write(w io.Writer) error {
	for _, f := range d.Findings {
		if _, err := fmt.Fprintf(w, "%-8s %s: %s\n         remedy: %s\n", f.Level, f.Check, f.What, f.Remedy); err != nil {
			return err
		}
	}
	verdict := "a snapshot can be expected to work"
	switch faults, warnings := d.count("fault"), d.count("warning"); {
	case faults > 0:
		verdict = "a snapshot cannot be expected to work: " + number(faults, "fault")
	case warnings > 0:
		verdict += ", but look at " + number(warnings, "warning")
	}
	_, err := fmt.Fprintf(w, "%s (engine %s): %s\n", d.App, d.Engine, verdict)
	return err
}

// number counts things in words.
func number(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
