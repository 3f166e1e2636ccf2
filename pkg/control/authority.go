package control

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// Names of an authority's files in its directory.
const (
	CACert = "ca.crt"
	CAKey  = "ca.key"
)

// Authority signs the certificates of a cluster's nodes.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
	made bool
}

// OpenAuthority reads the authority in dir, or makes one that is valid for
// lifetime: ca.crt and ca.key (ECDSA P-256). A missing directory is made, for
// its owner alone.
func OpenAuthority(dir string, now time.Time, lifetime time.Duration) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a := &Authority{dir: dir}
	_, cerr := os.Stat(filepath.Join(dir, CACert))
	_, kerr := os.Stat(filepath.Join(dir, CAKey))
	if cerr == nil || kerr == nil {
		return a, a.load(now)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template(now, lifetime)
	t.Subject = pkix.Name{CommonName: "nfconnfilter cluster"}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	a.key, a.made = key, true
	return a, a.write(CACert, CAKey, der, key)
}

// Made tells whether the authority is a new one.
func (a *Authority) Made() bool { return a.made }

func (a *Authority) load(now time.Time) error {
	cp, kp := filepath.Join(a.dir, CACert), filepath.Join(a.dir, CAKey)
	fail := func(err error) error {
		return fmt.Errorf("the authority in %s: %w; move it away to make a new one, or restore the missing file", a.dir, err)
	}
	c, err := readPEM(cp, "CERTIFICATE")
	if err != nil {
		return fail(err)
	}
	if a.cert, err = x509.ParseCertificate(c); err != nil {
		return fail(fmt.Errorf("%s: %w", cp, err))
	}
	k, err := readPEM(kp, "PRIVATE KEY")
	if err != nil {
		return fail(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(k)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", kp, err))
	}
	signer, ok := key.(crypto.Signer)
	if !ok || !samePublic(signer.Public(), a.cert.PublicKey) {
		return fail(fmt.Errorf("%s is not the key of %s", kp, cp))
	}
	if now.After(a.cert.NotAfter) {
		return fail(fmt.Errorf("it expired on %s", a.cert.NotAfter.Format(time.DateOnly)))
	}
	a.key = signer
	return nil
}

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

var nodeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

// MayIssue tells what keeps Issue from making a certificate in dir: the name, or
// files that are there.
func MayIssue(dir, name string, replace bool) error {
	if !nodeName.MatchString(name) || name == "ca" {
		return fmt.Errorf("%q is not a node's name: letters, digits, '-', '_' and '.', not ca", name)
	}
	for _, file := range []string{name + ".crt", name + ".key"} {
		if _, err := os.Lstat(filepath.Join(dir, file)); err == nil && !replace {
			return fmt.Errorf("%s is there already; --force replaces it", filepath.Join(dir, file))
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Issue makes NAME.crt and NAME.key for a node that is dialled at addrs, valid
// for lifetime, but not longer than the authority. Files that are there are
// kept unless replace.
func (a *Authority) Issue(name string, addrs []netip.Addr, now time.Time, lifetime time.Duration, replace bool) error {
	if err := MayIssue(a.dir, name, replace); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := template(now, lifetime)
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	t.Subject = pkix.Name{CommonName: name}
	t.DNSNames = []string{name}
	for _, addr := range addrs {
		t.IPAddresses = append(t.IPAddresses, addr.AsSlice())
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return a.write(name+".crt", name+".key", der, key)
}

// template has what all certificates have. Clocks of nodes may differ by minutes.
func template(now time.Time, lifetime time.Duration) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // never fails (crypto/rand)
	return &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-time.Hour).UTC(), NotAfter: now.Add(lifetime).UTC()}
}

// write puts both files down, the key first: a certificate without one is of no use.
func (a *Authority) write(cert, key string, der []byte, k *ecdsa.PrivateKey) error {
	b, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	if err := a.replace(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}), 0o600); err != nil {
		return err
	}
	return a.replace(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// replace writes a file as a whole.
func (a *Authority) replace(name string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(a.dir, "."+name+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(a.dir, name))
	}
	return err
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p, _ := pem.Decode(b)
	if p == nil || p.Type != kind {
		return nil, fmt.Errorf("%s holds no %s in PEM", path, kind)
	}
	return p.Bytes, nil
}
