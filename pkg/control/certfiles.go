package control

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// certFiles are a node's certificate, its key and the authority, as they are on
// the disk now.
type certFiles struct {
	cert, key, ca string
	now           func() time.Time // for tests; nil: time.Now

	mu    sync.Mutex
	state string // of the files when they were read
	have  *certs
	said  string // the failure that is in the log
}

type certs struct {
	own   tls.Certificate
	roots *x509.CertPool
}

func (f *certFiles) time() time.Time {
	if f.now != nil {
		return f.now()
	}
	return time.Now()
}

// current reads the files again where they have changed. Where they cannot be
// read what was read before stays in force.
func (f *certFiles) current() (*certs, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	state := ""
	for _, path := range []string{f.cert, f.key, f.ca} {
		if fi, err := os.Stat(path); err == nil {
			state += fmt.Sprint(fi.ModTime().UnixNano(), " ", fi.Size(), ";")
		}
	}
	if f.have != nil && state == f.state {
		return f.have, nil
	}
	c, err := f.read()
	switch {
	case err == nil:
		f.have, f.state, f.said = c, state, ""
	case f.have == nil:
		return nil, err
	case f.said != err.Error():
		f.said = err.Error()
		slog.Error("the new certificate cannot be read, the old one stays in force", "error", err)
	}
	return f.have, nil
}

func (f *certFiles) read() (*certs, error) {
	own, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, fmt.Errorf("[tls] cert %s and key %s: %w", f.cert, f.key, err)
	}
	b, err := os.ReadFile(f.ca)
	if err != nil {
		return nil, fmt.Errorf("[tls] ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("[tls] ca: %s holds no certificate in PEM", f.ca)
	}
	return &certs{own: own, roots: roots}, nil
}

// renew is the remedy for most.
const renew = "make a new one with ckptctl certs"

// check tells what is wrong with a peer's certificate, whoever it names.
func (f *certFiles) check(chain []*x509.Certificate, use x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return errors.New("it has no certificate: set [tls] in its node file")
	}
	c, err := f.current()
	if err != nil {
		return err
	}
	leaf, now := chain[0], f.time()
	name := strings.Join(leaf.DNSNames, ", ")
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate of %s expired on %s; %s", name, leaf.NotAfter.Format(time.DateOnly), renew)
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the certificate of %s is valid from %s on only; look at the clocks of both nodes", name, leaf.NotBefore.Format(time.DateTime))
	}
	between := x509.NewCertPool()
	for _, o := range chain[1:] {
		between.AddCert(o)
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: c.roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use}})
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		return fmt.Errorf("the certificate of %s was signed by another authority than the one in %s; both nodes need certificates of one (ckptctl certs)", name, f.ca)
	}
	if err != nil {
		return fmt.Errorf("the certificate of %s is not valid: %w; %s", name, err, renew)
	}
	return nil
}

// names tells whether a certificate is a peer's.
func (p Peer) named(c *x509.Certificate) bool {
	return slices.Contains(c.DNSNames, p.Name) ||
		slices.ContainsFunc(c.IPAddresses, func(ip net.IP) bool { return p.Address.IsValid() && ip.Equal(p.Address.AsSlice()) })
}

// whose gives the one peer that a client's certificate names.
func (f *certFiles) whose(chain []*x509.Certificate, peers []Peer) (Peer, error) {
	if err := f.check(chain, x509.ExtKeyUsageClientAuth); err != nil {
		return Peer{}, err
	}
	leaf := chain[0]
	// A name counts before an address: nodes may share one.
	for _, p := range peers {
		if slices.Contains(leaf.DNSNames, p.Name) {
			return p, nil
		}
	}
	// An address counts where there is no name, and for a scheduler that runs
	// on a node's machine: it is not that node.
	scheduler := slices.Contains(leaf.DNSNames, SchedulerName)
	for _, p := range peers {
		if (scheduler || len(leaf.DNSNames) == 0) && p.named(leaf) {
			if scheduler {
				return Peer{Name: SchedulerName, Address: p.Address}, nil
			}
			return p, nil
		}
	}
	return Peer{}, fmt.Errorf("the certificate names %q, which is no [[node]] of this node's cluster.toml", append(slices.Clone(leaf.DNSNames), addresses(leaf)...))
}

func addresses(c *x509.Certificate) (out []string) {
	for _, ip := range c.IPAddresses {
		out = append(out, ip.String())
	}
	return out
}

// serverTLS asks for a certificate and leaves it to the request to be refused
// for it, in words: an alert would tell the peer nothing.
func (p *Peers) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := p.certs.current()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:             tls.VersionTLS13,
				Certificates:           []tls.Certificate{c.own},
				ClientAuth:             tls.RequestClientCert,
				SessionTicketsDisabled: true, // the certificate is looked at each time
				NextProtos:             []string{"http/1.1"},
			}, nil
		},
	}
}

// clientTLS accepts the certificate of one peer alone.
func (p *Peers) clientTLS(to Peer) (*tls.Config, error) {
	c, err := p.certs.current()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{c.own},
		NextProtos:   []string{"http/1.1"},
		// VerifyConnection does it, with words that help.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if err := p.certs.check(s.PeerCertificates, x509.ExtKeyUsageServerAuth); err != nil {
				return fmt.Errorf("node %s: %w", to.Name, err)
			}
			leaf := s.PeerCertificates[0]
			if !slices.Contains(leaf.DNSNames, to.Name) && (len(leaf.DNSNames) > 0 || !to.named(leaf)) {
				return fmt.Errorf("at the address of node %s answers the certificate of %q; look at the addresses in cluster.toml", to.Name, append(slices.Clone(leaf.DNSNames), addresses(leaf)...))
			}
			return nil
		},
	}, nil
}
