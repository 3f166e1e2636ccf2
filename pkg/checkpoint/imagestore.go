package checkpoint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/nfconnfilter/nfconnfilter/pkg/config"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

// Images in the store: in a directory of the snapshot, each with its checksum in the
// manifest.

const (
	imagesDir    = "images"
	preImagesDir = "pre-images" // of memory that was written before the process was stopped
	dumpLog      = "dump.log"
	preDumpLog   = "pre-dump.log"
	failedDump   = "failed-dump.log" // of the last dump that failed, beside the snapshots
	restoreLogs  = "restore-%s.log"  // of each node
)

// makeImages makes a directory for images of a snapshot that is being written.
func (p *pendingSnapshot) makeImages(name string) error {
	dir, err := p.store.open()
	if err == nil {
		defer dir.Close()
		if err = dir.Mkdir(filepath.Join(p.temp, name), 0o700); errors.Is(err, os.ErrExist) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	return nil
}

// dropImages removes one again.
func (p *pendingSnapshot) dropImages(name string) error {
	dir, err := p.store.open()
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	defer dir.Close()
	return dir.RemoveAll(filepath.Join(p.temp, name))
}

func (p *pendingSnapshot) dir() string { return filepath.Join(p.store.dir, p.temp) }

// keepLog leaves the log of a failed dump beside the snapshots, and gives its path; ""
// where there is none.
func (p *pendingSnapshot) keepLog() string {
	dir, err := p.store.open()
	if err != nil {
		return ""
	}
	defer dir.Close()
	name := filepath.Join(filepath.Dir(p.temp), failedDump)
	if dir.Rename(filepath.Join(p.temp, dumpLog), name) != nil {
		return ""
	}
	return filepath.Join(p.store.dir, name)
}

// reopen goes on with a snapshot that an earlier agent has begun in temp.
func (s store) reopen(m Manifest, temp string) (*pendingSnapshot, error) {
	p := &pendingSnapshot{store: s, temp: temp, final: filepath.Join(m.App, m.ID), manifest: m}
	p.manifest.Version = manifestVersion
	if !isTemp(m.App, temp) {
		return nil, fmt.Errorf("snapshot store: %q is no place of a snapshot", temp)
	}
	dir, err := s.open()
	if err == nil {
		defer dir.Close()
		if _, err = dir.Stat(filepath.Join(temp, imagesDir)); errors.Is(err, os.ErrNotExist) {
			// That agent may have given it its name.
			if _, ferr := dir.Stat(filepath.Join(p.final, imagesDir)); ferr == nil {
				p.temp, err = p.final, nil
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	return p, nil
}

// writeOut begins to have the images on the disk, all of them: sumImages waits for it.
func (p *pendingSnapshot) writeOut() {
	p.written = make(chan error, 1)
	go func() {
		dir, err := p.store.open()
		if err == nil {
			defer dir.Close()
			err = syncImages(dir, filepath.Join(p.temp, imagesDir))
		}
		p.written <- err
	}()
}

// sumImages notes the checksum of every image, and has the images on the disk. It
// goes on while the caller does other things; what it gives ends it.
func (p *pendingSnapshot) sumImages() <-chan error {
	if p.written == nil {
		p.writeOut()
	}
	done := make(chan error, 1)
	go func() { done <- p.sum() }()
	return done
}

func (p *pendingSnapshot) sum() error {
	var sums map[string]string
	dir, err := p.store.open()
	if err == nil {
		defer dir.Close()
		sums, err = sumImages(context.Background(), dir, p.temp, p.early)
	}
	if err = errors.Join(err, <-p.written); err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	p.images = sums
	return nil
}

// imageDirs are the directories of images in a snapshot's.
var imageDirs = []string{imagesDir, preImagesDir}

// isImage tells whether a name of the manifest is of an image.
func isImage(name string) bool {
	dir, file := path.Split(name)
	return slices.Contains(imageDirs, strings.TrimSuffix(dir, "/")) && file != ""
}

// sumImages gives the SHA-256 of each image of a snapshot's directory. Those that early knows
// are not read again. It ends with ctx.
func sumImages(ctx context.Context, dir *os.Root, snapshot string, early follower) (map[string]string, error) {
	all := map[string]string{}
	for _, d := range imageDirs {
		if d != imagesDir {
			early = nil
		}
		sums, err := sumDir(ctx, dir, filepath.Join(snapshot, d), early)
		if errors.Is(err, os.ErrNotExist) && d == preImagesDir {
			continue
		}
		if err != nil {
			return nil, err
		}
		for name, sum := range sums {
			all[path.Join(d, name)] = sum
		}
	}
	return all, nil
}

// parentLink is what CRIU leaves in a directory of images to find those of the pre-dump.
const parentLink = "parent"

// finishImages writes what the manifest and the connections are in the end, which info
// asks for.
func (p *pendingSnapshot) finishImages(summed <-chan error, info func() (*nfconnfilterv1.ConnInfoReply, error)) error {
	dir, err := p.store.open()
	if err != nil {
		return errors.Join(fmt.Errorf("snapshot store: %w", err), <-summed)
	}
	defer dir.Close()
	var b []byte
	conns, err := info()
	if err == nil {
		b, err = p.describe(conns)
	}
	if err == nil {
		err = p.writeConnections(dir, b)
	}
	if err = errors.Join(err, <-summed); err != nil {
		return err
	}
	return p.writeManifest(dir)
}

// syncImages writes a directory's files out: one request for all of them, there are
// thousands.
func syncImages(dir *os.Root, name string) error {
	d, err := dir.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// sumDir gives the SHA-256 of each file of a directory, in hexadecimal. There are
// thousands of small ones: each costs but what the kernel takes for it.
func sumDir(ctx context.Context, dir *os.Root, name string, early follower) (map[string]string, error) {
	d, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	if i := slices.Index(names, parentLink); i >= 0 {
		if to, err := dir.Readlink(filepath.Join(name, parentLink)); err == nil {
			if to != "../"+preImagesDir {
				return nil, fmt.Errorf("%s leads to %q, which is no image of this snapshot", filepath.Join(name, parentLink), to)
			}
			names = slices.Delete(names, i, i+1)
		}
	}
	slices.Sort(names)
	out := make([]string, len(names))
	n := runtime.GOMAXPROCS(0)
	errs := make([]error, n)
	var wg sync.WaitGroup
	var next atomic.Int64
	for w := range n {
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(names) {
					return
				}
				if out[i] = known(early, int(d.Fd()), names[i]); out[i] != "" {
					continue
				}
				if out[i], errs[w] = sumFile(ctx, int(d.Fd()), names[i], buf); errs[w] != nil {
					errs[w] = fmt.Errorf("%s: %w", filepath.Join(name, names[i]), errs[w])
				}
			}
		})
	}
	wg.Wait()
	sums := make(map[string]string, len(names))
	for i, f := range names {
		sums[f] = out[i]
	}
	return sums, errors.Join(errs...)
}

// known gives the sum of a file that was read early and has not been changed since, else "".
func known(early follower, dir int, name string) string {
	var st unix.Stat_t
	if early == nil || unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return ""
	}
	sum, _ := early.Sum(name, &st)
	return sum
}

func sumFile(ctx context.Context, dir int, name string, buf []byte) (string, error) {
	fd, err := again(func() (int, error) {
		return unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", errors.New("it is no regular file")
	}
	h := sha256.New()
	for {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		n, err := again(func() (int, error) { return unix.Read(fd, buf) })
		if err != nil {
			return "", err
		}
		if n == 0 {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		h.Write(buf[:n])
	}
}

// again repeats a system call that a signal has interrupted.
func again(f func() (int, error)) (n int, err error) {
	for n, err = f(); err == unix.EINTR; n, err = f() {
	}
	return n, err
}

// checkImages compares the images of a snapshot with its manifest: each is there as it
// was written, and nothing else. There may be much to read: it ends with ctx.
func (s store) checkImages(ctx context.Context, m *Manifest) error {
	dir, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	where := filepath.Join(m.App, m.ID)
	bad := func(what string) error {
		return fmt.Errorf("snapshot %s of %s is damaged: %s; its connections stay held, put the file back from another copy or give the application up (ckptctl stop %[2]s --discard)", m.ID, m.App, what)
	}
	sums, err := sumImages(ctx, dir, where, nil)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return bad(err.Error())
	}
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		if !isImage(name) {
			continue
		}
		switch have, there := sums[name]; {
		case !there:
			return bad(filepath.Join(s.dir, where, name) + " is missing")
		case have != m.Files[name]:
			return bad(filepath.Join(s.dir, where, name) + " does not have the checksum of the manifest")
		}
		delete(sums, name)
	}
	for name := range sums {
		return bad(filepath.Join(s.dir, where, name) + " is not in the manifest")
	}
	return nil
}

// imagesOurs tells who else can write a directory of images, or an image in it. Of links
// there is none but the one to the pre-dump, see sumDir.
func imagesOurs(dir string) error {
	fi, err := os.Lstat(dir)
	if err == nil {
		err = ours(dir, fi)
	}
	if err != nil {
		return err
	}
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Type()&os.ModeSymlink != 0 {
			continue
		}
		if fi, err = e.Info(); err == nil {
			err = ours(filepath.Join(dir, e.Name()), fi)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// drop removes what a snapshot that was given up has left in temp.
func (s store) drop(app, temp string) {
	if isTemp(app, temp) {
		(&pendingSnapshot{store: s, temp: temp}).discard()
	}
}

// isTemp tells whether a path, which comes from a record, is one of a snapshot that is
// being written.
func isTemp(app, temp string) bool {
	return filepath.IsLocal(temp) && filepath.Dir(temp) == app && strings.HasPrefix(filepath.Base(temp), tempPrefix)
}

// manifestOf gives the manifest of an application's snapshot; nil: it is not stored.
func (s store) manifestOf(app, id string) (*Manifest, error) {
	if !validSnapshotID(id) {
		return nil, nil // of SNAPSHOTDONE by hand
	}
	m, err := s.readManifest(app, id)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return m, err
}

// imagesOf gives it where the snapshot is one of images; else nil.
func (s store) imagesOf(app, id string) (*Manifest, error) {
	m, err := s.manifestOf(app, id)
	if err != nil || m == nil || !m.images() {
		return nil, err
	}
	return m, nil
}

// callersOf gives it where somebody else had CRIU write the images; else nil.
func (s store) callersOf(app, id string) (*Manifest, error) {
	m, err := s.manifestOf(app, id)
	if err != nil || m == nil || m.Images == "" {
		return nil, err
	}
	return m, nil
}

// notStored keeps images that have no name yet: they are all that is left of the
// application. Their record stays, and they are stored as soon as they can be.
func (r *snapshotRun) notStored(err error) error {
	r.unstored = true
	r.op.left = r.op.name != opRecover
	return noted(err, fmt.Sprintf("; its images are whole and stay in %s, see that the store can be written and has room: it is tried again", r.pending.dir()))
}

// storeLate stores images that could not be stored when they were written.
func (a *agent) storeLate(op *operation, app *config.App, in *intent, id string) error {
	if in == nil || in.Temp == "" || !in.Sealed || in.SnapshotID != id || !validSnapshotID(id) {
		return nil
	}
	p, err := a.store.reopen(a.manifest(app, id, config.EngineCRIU, ""), in.Temp)
	if err == nil && p.temp == p.final { // it has its name, and so its checksums
		return nil
	}
	if err == nil {
		err = p.finishImages(p.sumImages(), func() (*nfconnfilterv1.ConnInfoReply, error) { return a.connInfo(op.ctx, app.Name) })
	}
	if err == nil {
		err = p.commit(nil)
	}
	if err != nil {
		return fmt.Errorf("its snapshot %s is not stored yet: %w; see that the store can be written and has room", id, err)
	}
	a.log.Warn("a snapshot that could not be stored at once is stored", "app", app.Name, "id", id)
	return nil
}
