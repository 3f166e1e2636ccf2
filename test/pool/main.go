// Command pool is an application for tests that keeps connections of its own
// to a Redis server, opened from the address it listens on, before it listens.
// To each line "ask KEY" it asks all of them for KEY, and answers with the
// values, joined by spaces; a connection that fails is answered as "!".
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nfconnfilter/nfconnfilter/test/clients"
)

// patience is how long a reply may take.
const patience = 10 * time.Second

func main() {
	listen := flag.String("listen", "", "`IP:port` to listen on")
	server := flag.String("server", "", "`IP:port` of the Redis server")
	size := flag.Int("size", 50, "how many connections")
	bind := flag.Bool("bind", true, "open the connections from the address that it listens on")
	flag.Parse()
	if *listen == "" || *server == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *listen, *server, *size, *bind); err != nil {
		log.Fatal("pool: ", err)
	}
}

// pool is the connections to the server.
type pool struct {
	mu    sync.Mutex
	conns []*bufio.ReadWriter
	raw   []net.Conn
}

func run(ctx context.Context, listen, server string, size int, bind bool) error {
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return err
	}
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	if bind {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(host)}
	}
	p := &pool{}
	for range size {
		c, err := d.DialContext(ctx, "tcp", server)
		if err != nil {
			return err
		}
		p.raw = append(p.raw, c)
		p.conns = append(p.conns, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)))
	}
	return clients.Serve(ctx, listen, p.serve)
}

// serve answers one client.
func (p *pool) serve(c *net.TCPConn) {
	defer c.Close()
	for sc := bufio.NewScanner(c); sc.Scan(); {
		key, ok := strings.CutPrefix(sc.Text(), "ask ")
		if !ok {
			return
		}
		if _, err := fmt.Fprintln(c, strings.Join(p.ask(key), " ")); err != nil {
			return
		}
	}
}

// ask asks every connection for key.
func (p *pool) ask(key string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]string, len(p.conns))
	for i, c := range p.conns {
		v, err := get(p.raw[i], c, key)
		if err != nil {
			log.Printf("%v: %v", p.raw[i].LocalAddr(), err)
			v = "!"
		}
		out[i] = v
	}
	return out
}

// get is one GET in the Redis protocol.
func get(raw net.Conn, c *bufio.ReadWriter, key string) (string, error) {
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	fmt.Fprintf(c, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", len(key), key)
	if err := c.Flush(); err != nil {
		return "", err
	}
	head, err := c.ReadString('\n')
	if err != nil {
		return "", err
	}
	n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(head, "$")))
	if err != nil || n < 0 {
		return "", fmt.Errorf("reply %q", head)
	}
	b := make([]byte, n+2)
	if _, err := io.ReadFull(c, b); err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
