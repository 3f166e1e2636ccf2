package main

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nfconnfilter/nfconnfilter/pkg/control"
)

const day = 24 * time.Hour

type certsJSON struct {
	Dir   string   `json:"dir"`
	CA    string   `json:"ca"`
	NewCA bool     `json:"new_ca"`
	Nodes []string `json:"nodes"`
}

func (c *cli) certsCommand() *cobra.Command {
	var dir string
	var days, caDays int
	var force bool
	cmd := &cobra.Command{
		Use:   "certs --out DIR NAME=ADDRESS ...",
		Short: "Make a small certificate authority and certificates for nodes",
		Long: `certs makes what the nodes of a cluster need to speak TLS with each other, for
people who have no authority of their own: DIR/ca.crt and DIR/ca.key, and for
each node NAME.crt and NAME.key. NAME is the node's name in its [[node]] and
node file, ADDRESS the one that others dial; several are separated by commas.
A scheduler on a machine of its own is called scheduler.

An authority that is in DIR already signs the new certificates, so that nodes
can be added, and certificates renewed (--force), later. Copy ca.crt, NAME.crt
and NAME.key to the node and name them in its node file under [tls]. Whoever has
ca.key can make himself a node: keep it away from all of them.`,
		Example: "  ckptctl certs --out certs node-a=192.0.2.11 node-b=192.0.2.12\n  ckptctl certs --out certs node-c=192.0.2.13,2001:db8::13\n  ckptctl certs --out certs --force node-a=192.0.2.11",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("certs takes NAME=ADDRESS for each node: see ckptctl certs --help")
			}
			return nil
		},
	}
	cmd.RunE = c.command(func(_ context.Context, args []string) error {
		if dir == "" {
			return usagef("--out is empty: name a directory")
		}
		if days < 1 || caDays < 1 {
			return usagef("--days and --ca-days: at least 1")
		}
		type node struct {
			name  string
			addrs []netip.Addr
		}
		var nodes []node
		for _, arg := range args {
			name, list, _ := strings.Cut(arg, "=")
			if slices.ContainsFunc(nodes, func(o node) bool { return o.name == name }) {
				return usagef("%s is there twice: write all its addresses in one, separated by commas", name)
			}
			n := node{name: name}
			for a := range strings.SplitSeq(list, ",") {
				addr, err := netip.ParseAddr(a)
				if err != nil || addr.Zone() != "" {
					return usagef("%q: want NAME=ADDRESS with an IP address", arg)
				}
				n.addrs = append(n.addrs, addr)
			}
			nodes = append(nodes, n)
		}
		for _, n := range nodes { // all or none
			if err := control.MayIssue(dir, n.name, force); err != nil {
				return err
			}
		}
		now := time.Now()
		ca, err := control.OpenAuthority(dir, now, time.Duration(caDays)*day)
		if err != nil {
			return err
		}
		out := certsJSON{Dir: dir, CA: filepath.Join(dir, control.CACert), NewCA: ca.Made(), Nodes: []string{}}
		for _, n := range nodes {
			if err := ca.Issue(n.name, n.addrs, now, time.Duration(days)*day, force); err != nil {
				return err
			}
			out.Nodes = append(out.Nodes, n.name)
		}
		if c.output == "json" {
			return writeJSON(c.out, out)
		}
		for _, n := range out.Nodes {
			fmt.Fprintf(c.out, "%s: copy %s, %s.crt and %s.key to it, and write in its node file:\n", n, out.CA, filepath.Join(dir, n), filepath.Join(dir, n))
			fmt.Fprintf(c.out, "  [tls]\n  cert = \"/etc/nfconnfilter/%s.crt\"\n  key = \"/etc/nfconnfilter/%s.key\"\n  ca = \"/etc/nfconnfilter/ca.crt\"\n", n, n)
		}
		return nil
	})
	cmd.Flags().StringVar(&dir, "out", "", "the `DIR` for the files")
	cmd.Flags().IntVar(&days, "days", 825, "how many `DAYS` the nodes' certificates are valid")
	cmd.Flags().IntVar(&caDays, "ca-days", 3650, "how many `DAYS` a new authority is valid")
	cmd.Flags().BoolVar(&force, "force", false, "replace certificates that are there")
	_ = cmd.MarkFlagRequired("out") // fails only for a flag that is not there
	return cmd
}
