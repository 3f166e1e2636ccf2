// Command bytecount is a server for tests: it reads the deterministic stream
// of each connection (clients.Fill, the remote port is the seed), checks every
// byte, and keeps the count for each remote port in a file that it maps. A
// connection that comes back from the same remote port goes on where the file
// says. At the end of a stream it answers the count as a line and closes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
)

func main() {
	listen := flag.String("listen", "", "`IP:port` to listen on")
	file := flag.String("file", "", "`path` of the count file")
	rate := flag.Int("rate", 0, "bytes a second read from each connection; 0: as they come")
	flag.Parse()
	if *listen == "" || *file == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *listen, *file, *rate); err != nil {
		log.Fatal("bytecount: ", err)
	}
}

// run serves until ctx ends.
func run(ctx context.Context, listen, file string, rate int) error {
	counts, err := clients.OpenCountFile(file)
	if err != nil {
		return err
	}
	// The mapping lives as long as the process: connections still use it.
	return clients.Serve(ctx, listen, func(c *net.TCPConn) {
		if err := serve(c, counts, rate); err != nil {
			log.Printf("bytecount: %v: %v", c.RemoteAddr(), err)
		}
	})
}

// serve reads one connection to its end.
func serve(c *net.TCPConn, counts *clients.CountFile, rate int) error {
	defer c.Close()
	// A small receive buffer lets a freeze drain quickly also when reading is slow.
	if err := c.SetReadBuffer(128 << 10); err != nil {
		return err
	}
	rec, err := counts.Claim(uint16(c.RemoteAddr().(*net.TCPAddr).Port))
	if err != nil {
		return err
	}
	rec.Accept()
	for {
		n, err := rec.Receive(c.Read)
		if errors.Is(err, io.EOF) {
			_, err := fmt.Fprintf(c, "%d\n", rec.Count())
			return err
		}
		if err != nil {
			return err
		}
		if rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
	}
}
