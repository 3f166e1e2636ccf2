// The runtime would keep a file of the cgroup open otherwise, which need not be
// there where the process is brought back.
//
//go:debug containermaxprocs=0

// Command interp is an application for tests whose state is in its memory
// alone: an interpreter on a socket, each connection a session. It opens
// nothing but sockets and reads no clock, so that a whole process can be taken
// away and brought back.
//
// Each request is a line, ended by LF, and has one line as reply, which begins
// with "! " where the request cannot be done:
//
//	let NAME EXPR           the value: integers with + - *, strings in quotes with +;
//	                        $NAME stands for a global
//	print EXPR              the value
//	names                   how many variables, and their names
//	history N               request N of this session, the first is 1
//	count                   how many requests, with this one
//	sum N                   N lines follow; the sum of those that are integers,
//	                        and the SHA-256 of all, in hex
//	blob N                  N octets follow; their SHA-256, and how many octets
//	                        the blobs of this session have had
//	gen N SEED              N, and after the line N octets, those of clients.Fill
//	global NAME [EXPR]      the value; all sessions share it
//	session [NAME]          the session's name, at first the client's address and port
//	half                    "half" and the session's name; shuts down the sending side and
//	                        counts what is received up to the end
//	halved NAME [N|end]     octets, SHA-256 and "open", "ended" or "failed" of
//	                        the session that did half; waits for N octets or for the end
//	wait NAME               "released" and NAME, once a session has said release NAME
//	waiting NAME            how many sessions wait
//	release NAME            how many waited; done once
//	dial NAME ADDR:PORT     opens a connection of the process: its two addresses
//	tell NAME TEXT          sends TEXT over it; the line that comes back
//	hangup NAME             "closed" and NAME
//	pid                     the process's id, and what is random at each start
//	quit                    "bye", and the connection is closed
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
)

func main() {
	addrs := flag.String("listen", "", "`ADDR:PORT[,ADDR:PORT...]` to listen on")
	source := flag.String("source", "", "`IP` that outgoing connections come from")
	flag.Parse()
	ip := net.ParseIP(*source)
	if *addrs == "" || flag.NArg() != 0 || *source != "" && ip == nil {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*addrs, ip); err != nil {
		fmt.Fprintln(os.Stderr, "interp:", err)
		os.Exit(1)
	}
}

// run serves until it cannot accept any more.
func run(addrs string, source net.IP) error {
	p := newProcess(source)
	all, err := listen(addrs)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for _, l := range all {
		fmt.Println("listening on", l.Addr())
		go func() { failed <- p.accept(l) }()
	}
	return <-failed
}
