package checkpoint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

const (
	// manifestVersion is the layout of a snapshot's directory.
	manifestVersion = 1
	// tempAge is when a directory that a snapshot was written into counts as
	// left behind, where that may be another node's.
	tempAge = 24 * time.Hour
	// appears is how long a snapshot that another node has just named may stay
	// unseen on a network file system.
	appears = 5 * time.Second

	// mostManifest and mostStored bound what is read of a snapshot.
	mostManifest = 64 << 20
	mostStored   = 1 << 30

	manifestFile    = "manifest.json"
	connectionsFile = "connections.json"
)

// Manifest describes one stored snapshot: manifest.json of its directory.
type Manifest struct {
	Version     int       `json:"version"` // 1
	App         string    `json:"app"`
	ID          string    `json:"id"`
	Node        string    `json:"node"`
	NodeAddress string    `json:"node_address"`
	Time        time.Time `json:"time"` // UTC, RFC 3339
	Engine      string    `json:"engine"`
	// Images is the directory to which a CRIU that was not ours has written; "":
	// images, if any, are in the snapshot.
	Images string `json:"images,omitempty"`
	// Files holds the SHA-256 of every other file, in hexadecimal.
	Files map[string]string `json:"files"`
}

// images tells whether the snapshot holds the images of its process.
func (m *Manifest) images() bool { return m.Engine == config.EngineCRIU && m.Images == "" }

// store keeps snapshots below DIR/snapshots. It leaves that directory by no
// link.
type store struct{ dir string }

// open makes the store where it is missing.
func (s store) open() (*os.Root, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	return os.OpenRoot(s.dir)
}

// newSnapshotID makes an ID that sorts by time; two nodes never make the same.
func newSnapshotID(now time.Time) string {
	return now.UTC().Format("20060102T150405Z") + "-" + randomHex(3)
}

const tempPrefix = ".new-"

// tempName is where a node writes a snapshot.
func tempName(node, rest string) string { return tempPrefix + node + "@" + rest }

// stamp is the time in a snapshot's ID.
func stamp(id string) time.Time {
	text, _, _ := strings.Cut(id, "-")
	t, _ := time.Parse("20060102T150405Z", text) // valid, see ids
	return t
}

// validSnapshotID guards paths: an ID comes in with requests.
func validSnapshotID(id string) bool {
	stamp, suffix, ok := strings.Cut(id, "-")
	if !ok || len(suffix) != 6 || strings.Trim(suffix, "0123456789abcdef") != "" {
		return false
	}
	_, err := time.Parse("20060102T150405Z", stamp)
	return err == nil
}

// pendingSnapshot is a snapshot being written beside its final place.
type pendingSnapshot struct {
	store       store
	temp, final string // below the store's directory
	manifest    Manifest
	images      map[string]string // checksums
	written     chan error        // the images are on the disk
	early       follower          // has read images already; nil: none
}

// begin makes the directory of a new snapshot and writes what is known, so
// that a full or read-only disk shows before the application is gone.
func (s store) begin(m Manifest, conns *nfconnfilterv1.ConnInfoReply) (*pendingSnapshot, error) {
	dir, err := s.open()
	if err == nil {
		defer dir.Close()
		err = dir.MkdirAll(m.App, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	m.Version = manifestVersion
	p := &pendingSnapshot{store: s, final: filepath.Join(m.App, m.ID), manifest: m}
	// An earlier agent may have got that far.
	if err := dir.RemoveAll(p.final); err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	p.temp = filepath.Join(m.App, tempName(m.Node, m.ID+"-"+randomHex(4)))
	if err := dir.Mkdir(p.temp, 0o700); err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	if err := p.write(dir, conns); err != nil {
		p.discard()
		return nil, err
	}
	return p, nil
}

// write puts both files down durably, at once: each waits for the disk.
func (p *pendingSnapshot) write(dir *os.Root, conns *nfconnfilterv1.ConnInfoReply) error {
	b, err := p.describe(conns)
	if err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { written <- p.writeConnections(dir, b) }()
	return errors.Join(p.writeManifest(dir), <-written)
}

// describe makes the octets of the file of connections; the manifest has their checksum.
func (p *pendingSnapshot) describe(conns *nfconnfilterv1.ConnInfoReply) ([]byte, error) {
	b, err := protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Marshal(conns)
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	sum := sha256.Sum256(b)
	p.manifest.Files = map[string]string{connectionsFile: hex.EncodeToString(sum[:])}
	return b, nil
}

func (p *pendingSnapshot) writeConnections(dir *os.Root, b []byte) error {
	if err := writeAtomic(dir, filepath.Join(p.temp, connectionsFile), b, 0o600); err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	return nil
}

func (p *pendingSnapshot) writeManifest(dir *os.Root) error {
	maps.Copy(p.manifest.Files, p.images)
	m, err := json.MarshalIndent(p.manifest, "", "  ")
	if err == nil {
		err = writeAtomic(dir, filepath.Join(p.temp, manifestFile), append(m, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	return nil
}

// commit gives the snapshot its name: it is there as a whole or not at all.
// Connections that have changed since begin are written before; nil: none.
func (p *pendingSnapshot) commit(conns *nfconnfilterv1.ConnInfoReply) error {
	dir, err := p.store.open()
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	defer dir.Close()
	if conns != nil {
		if err := p.write(dir, conns); err != nil {
			return err
		}
	}
	if p.temp != p.final {
		if err := dir.Rename(p.temp, p.final); err != nil {
			return fmt.Errorf("snapshot store: %w", err)
		}
	}
	above := make(chan error, 1)
	go func() { above <- syncDir(dir, ".") }()
	if err := errors.Join(syncDir(dir, filepath.Dir(p.final)), <-above); err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	return nil
}

func (p *pendingSnapshot) discard() {
	if dir, err := p.store.open(); err == nil {
		defer dir.Close()
		_ = dir.RemoveAll(p.temp)
	}
}

// list gives an application's snapshots, oldest first; "" all applications'.
// A damaged one is left out of the list and named in the error.
func (s store) list(app string) ([]Manifest, error) {
	apps := []string{app}
	if app == "" {
		apps = nil
		entries, err := os.ReadDir(s.dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("snapshot store: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() {
				apps = append(apps, e.Name())
			}
		}
	}
	var out []Manifest
	var damaged error
	for _, a := range apps {
		ids, err := s.ids(a)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			m, err := s.readManifest(a, id)
			if err != nil {
				damaged = errors.Join(damaged, err)
				continue
			}
			out = append(out, *m)
		}
	}
	return out, damaged
}

// ids lists complete snapshots of one application, oldest first.
func (s store) ids(app string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, app))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && validSnapshotID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (s store) read(app, id, name string) ([]byte, error) {
	dir, err := os.OpenRoot(s.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	path := filepath.Join(app, id, name)
	f, err := dir.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe in its place would be waited for
	if err != nil {
		return nil, err
	}
	defer f.Close()
	most := int64(mostStored)
	if name == manifestFile {
		most = mostManifest
	}
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file", path)
	case fi.Size() > most:
		return nil, fmt.Errorf("%s has %d octets, and %d are the most that an agent writes", path, fi.Size(), most)
	}
	return io.ReadAll(io.LimitReader(f, most))
}

func (s store) readManifest(app, id string) (*Manifest, error) {
	path := filepath.Join(s.dir, app, id, manifestFile)
	b, err := s.read(app, id, manifestFile)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s of %s: %w", id, app, err)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("snapshot %s of %s is damaged: %s: %w", id, app, path, err)
	}
	if m.Version != manifestVersion {
		return nil, fmt.Errorf("snapshot %s of %s has version %d, this program reads %d", id, app, m.Version, manifestVersion)
	}
	if m.App != app || m.ID != id {
		return nil, fmt.Errorf("snapshot %s of %s is damaged: %s is of snapshot %s of %s", id, app, path, m.ID, m.App)
	}
	return &m, nil
}

// load reads a snapshot and checks every file against its manifest.
func (s store) load(app, id string) (*Manifest, *nfconnfilterv1.ConnInfoReply, error) {
	m, b, err := s.check(app, id)
	if err != nil {
		return nil, nil, err
	}
	var conns nfconnfilterv1.ConnInfoReply
	if err := protojson.Unmarshal(b, &conns); err != nil {
		return nil, nil, fmt.Errorf("snapshot %s of %s is damaged: %s: %w", id, app, filepath.Join(s.dir, app, id, connectionsFile), err)
	}
	return m, &conns, nil
}

// check is load without making sense of the connections, of which it gives the
// octets.
func (s store) check(app, id string) (m *Manifest, connections []byte, err error) {
	if !validSnapshotID(id) {
		return nil, nil, fmt.Errorf("%q is not a snapshot ID", id)
	}
	if m, err = s.readManifest(app, id); err != nil {
		return nil, nil, err
	}
	if _, ok := m.Files[connectionsFile]; !ok {
		return nil, nil, fmt.Errorf("snapshot %s of %s is damaged: its manifest does not name %s", id, app, connectionsFile)
	}
	if m.images() {
		if err := s.checkImages(context.Background(), m); err != nil {
			return nil, nil, err
		}
	}
	for name, want := range m.Files {
		if isImage(name) && m.images() {
			continue
		}
		if name != filepath.Base(name) || name == ".." || name == "." {
			return nil, nil, fmt.Errorf("snapshot %s of %s is damaged: its manifest names %q", id, app, name)
		}
		b, err := s.read(app, id, name)
		if err != nil {
			return nil, nil, fmt.Errorf("snapshot %s of %s is damaged: %w", id, app, err)
		}
		if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != want {
			return nil, nil, fmt.Errorf("snapshot %s of %s is damaged: %s does not have the checksum of the manifest", id, app, filepath.Join(s.dir, app, id, name))
		}
		if name == connectionsFile {
			connections = b
		}
	}
	return m, connections, nil
}

// await is check of a snapshot that another node has stored: its name may become
// visible late.
func (s store) await(ctx context.Context, app, id string) error {
	ctx, cancel := context.WithTimeout(ctx, appears)
	defer cancel()
	var last error
	err := poll(ctx, pollFirst, pollMost, func() (bool, error) {
		_, _, last = s.check(app, id)
		if errors.Is(last, os.ErrNotExist) {
			return false, nil
		}
		return true, last
	})
	if errors.Is(last, os.ErrNotExist) {
		last = fmt.Errorf("%w; see that all nodes have the same directory there", last)
	}
	if last != nil {
		return last
	}
	return err
}

// markName is a file that the node which has an application shows to the one
// that is to take it. It counts as left by an interrupted snapshot.
func markName(app, node string) string { return filepath.Join(app, tempName(node, "shared")) }

// mark puts it there.
func (s store) mark(app, node string) (unmark func(), err error) {
	dir, err := s.open()
	if err == nil {
		defer dir.Close()
		err = writeAtomic(dir, markName(app, node), nil, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot store %s: %w", s.dir, err)
	}
	return func() {
		if dir, err := s.open(); err == nil {
			_ = dir.Remove(markName(app, node)) // what stays goes with the next snapshot
			dir.Close()
		}
	}, nil
}

// shares tells whether another node's mark is seen here; it may become visible
// late.
func (s store) shares(ctx context.Context, app, node string) error {
	ctx, cancel := context.WithTimeout(ctx, appears)
	defer cancel()
	var last error
	_ = poll(ctx, pollFirst, pollMost, func() (bool, error) {
		dir, err := s.open()
		if err == nil {
			_, err = dir.Lstat(markName(app, node))
			dir.Close()
		}
		last = err
		return !errors.Is(err, os.ErrNotExist), nil
	})
	if errors.Is(last, os.ErrNotExist) {
		return fmt.Errorf("snapshot store %s: what node %s has just written there is not seen here; see that all nodes have the same directory there", s.dir, node)
	}
	return last
}

// prune removes all but the newest keep snapshots of an application, those that
// were older than maxAge at now (0: none), and what an interrupted snapshot
// left, of this node at once, of others after a day. The current one always
// stays. With the zero time, before
// everything, nothing goes for its age.
func (s store) prune(app, current, node string, rule config.Snapshots, now time.Time) error {
	ids, err := s.ids(app)
	if err != nil {
		return err
	}
	dir, err := s.open()
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	defer dir.Close()
	for i, id := range ids {
		old := rule.MaxAge > 0 && now.Sub(stamp(id)) > rule.MaxAge.Std()
		if id != current && (old || i < len(ids)-max(rule.Keep, 1)) {
			err = errors.Join(err, dir.RemoveAll(filepath.Join(app, id)))
		}
	}
	left, _ := filepath.Glob(filepath.Join(s.dir, app, tempPrefix+"*"))
	half, _ := filepath.Glob(filepath.Join(s.dir, app, "."+tempPrefix+"*")) // see writeAtomic
	left = append(left, half...)
	for _, path := range left {
		name := filepath.Base(path)
		fi, serr := dir.Lstat(filepath.Join(app, name))
		if serr != nil {
			if !errors.Is(serr, os.ErrNotExist) {
				err = errors.Join(err, serr)
			}
			continue
		}
		if !strings.HasPrefix(strings.TrimLeft(name, "."), strings.TrimLeft(tempName(node, ""), ".")) && now.Sub(fi.ModTime()) < tempAge {
			continue // another node may be writing there
		}
		err = errors.Join(err, dir.RemoveAll(filepath.Join(app, name)))
	}
	return err
}

// writable tells what keeps a snapshot of the application from being stored:
// a directory that cannot be written, or a full disk.
func (s store) writable(app string) error {
	dir, err := s.open()
	if err == nil {
		defer dir.Close()
		err = dir.MkdirAll(app, 0o700)
	}
	if err == nil {
		name := filepath.Join(app, tempName("", randomHex(8))) // what stays goes with a later snapshot
		if err = writeAtomic(dir, name, make([]byte, 4096), 0o600); err == nil {
			err = dir.Remove(name)
		}
	}
	if err != nil {
		return fmt.Errorf("snapshot store %s: %w; make it writable for root on every node, and see that it has room", s.dir, err)
	}
	return nil
}
