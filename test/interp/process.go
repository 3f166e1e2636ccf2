package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"net"
	"os"
	"strings"
	"sync"
)

// process is what the sessions share.
type process struct {
	source net.IP // of outgoing connections, nil: the kernel chooses
	nonce  string // of this start

	mu      sync.Mutex
	globals map[string]value
	gates   map[string]*gate
	halves  map[string]*half
	peers   map[string]*peer
}

func newProcess(source net.IP) *process {
	return &process{
		source: source, nonce: rand.Text(),
		globals: map[string]value{}, gates: map[string]*gate{}, halves: map[string]*half{}, peers: map[string]*peer{},
	}
}

// listen opens plain TCP sockets: MPTCP ones can be neither held nor dumped.
func listen(addrs string) (all []net.Listener, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	for addr := range strings.SplitSeq(addrs, ",") {
		network := "tcp4"
		if strings.HasPrefix(addr, "[") {
			network = "tcp6" // and no IPv4 through it
		}
		l, err := lc.Listen(context.Background(), network, addr)
		if err != nil {
			for _, l := range all {
				l.Close()
			}
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// accept gives every connection a session, until the listener is closed.
func (p *process) accept(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go newSession(p, c.(*net.TCPConn)).run()
	}
}

// pid tells this process from one that was started anew.
func (p *process) pid() string { return fmt.Sprintf("%d %s", os.Getpid(), p.nonce) }

// gate holds replies until it is released, for good: whichever of wait and
// release comes first.
type gate struct {
	waiting int
	open    bool
	opened  chan struct{}
}

// gate must be called with mu held.
func (p *process) gate(name string) *gate {
	g := p.gates[name]
	if g == nil {
		g = &gate{opened: make(chan struct{})}
		p.gates[name] = g
	}
	return g
}

func (p *process) wait(name string) {
	p.mu.Lock()
	g := p.gate(name)
	g.waiting++
	p.mu.Unlock()
	<-g.opened
	p.mu.Lock()
	g.waiting--
	p.mu.Unlock()
}

func (p *process) waiting(name string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g := p.gates[name]; g != nil {
		return g.waiting
	}
	return 0
}

// release returns how many waited.
func (p *process) release(name string) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.gate(name)
	if g.open {
		return 0, fmt.Errorf("%s is released", name)
	}
	g.open = true
	close(g.opened)
	return g.waiting, nil
}

// half is what a session has received since it shut down its sending side.
type half struct {
	mu    sync.Mutex
	grown *sync.Cond
	n     int64
	hash  hash.Hash
	state string // open, ended or failed
}

// newHalf begins one under the name of a session.
func (p *process) newHalf(name string) (*half, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.halves[name] != nil {
		return nil, fmt.Errorf("there was a half-closed session %s", name)
	}
	h := &half{hash: sha256.New(), state: "open"}
	h.grown = sync.NewCond(&h.mu)
	p.halves[name] = h
	return h, nil
}

func (h *half) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hash.Write(b)
	h.n += int64(len(b))
	h.grown.Broadcast()
	return len(b), nil
}

// end notes how the reading has ended.
func (h *half) end(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state = "ended"
	if err != nil {
		h.state = "failed"
	}
	h.grown.Broadcast()
}

// await returns what has been received once it is as much as least, or the end has come.
func (h *half) await(least int64) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.n < least && h.state == "open" {
		h.grown.Wait()
	}
	return fmt.Sprintf("%d %x %s", h.n, h.hash.Sum(nil), h.state)
}

func (p *process) half(name string) (*half, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h := p.halves[name]; h != nil {
		return h, nil
	}
	return nil, fmt.Errorf("no half-closed session %s", name)
}

// peer is an outgoing connection. Without deadlines: the clock may run on by
// any time while the process is away.
type peer struct {
	c *net.TCPConn

	mu sync.Mutex // one question at a time
	r  *bufio.Reader
}

func (p *process) dial(name, addr string) (string, error) {
	if p.peer(name) != nil {
		return "", fmt.Errorf("there is a connection %s", name)
	}
	var d net.Dialer
	d.SetMultipathTCP(false)
	if p.source != nil {
		d.LocalAddr = &net.TCPAddr{IP: p.source}
	}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.peers[name] != nil {
		c.Close()
		return "", fmt.Errorf("there is a connection %s", name)
	}
	p.peers[name] = &peer{c: c.(*net.TCPConn), r: bufio.NewReader(c)}
	return fmt.Sprintf("%v %v", c.LocalAddr(), c.RemoteAddr()), nil
}

func (p *process) peer(name string) *peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peers[name]
}

// tell asks over an outgoing connection; the reply is whatever line comes.
func (p *process) tell(name, text string) (string, error) {
	to := p.peer(name)
	if to == nil {
		return "", fmt.Errorf("no connection %s", name)
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	if _, err := fmt.Fprintln(to.c, text); err != nil {
		return "", err
	}
	line, err := to.r.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

func (p *process) hangUp(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	to := p.peers[name]
	if to == nil {
		return fmt.Errorf("no connection %s", name)
	}
	delete(p.peers, name)
	return to.c.Close()
}
