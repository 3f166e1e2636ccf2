// Package config reads and validates the TOML configuration of a node: the
// shared cluster.toml and apps/*.toml, and the node's own file.
//
// Every fault carries file, line and column, and all faults of all files are
// found in one go. A faulty application file disables only that application;
// a fault elsewhere makes the configuration as a whole invalid, and the caller
// keeps the one it has.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ErrUnknownApp is what LoadApp's error wraps when no file describes the
// application.
var ErrUnknownApp = errors.New("unknown application")

// Load reads SHARED/cluster.toml, SHARED/apps/*.toml and the node's file.
//
// The error is of type Faults when cluster.toml or the node's file is invalid
// or unreadable; it then holds the applications' faults as well. A missing
// cluster.toml is a single node with the defaults. The faults of applications
// alone are no error: see Config.AppFaults.
func Load(sharedDir, nodeFile string) (*Config, error) {
	return (&loader{shared: sharedDir, nodeFile: nodeFile}).load()
}

// LoadScheduler is Load for a scheduler, whose machine need not be a node: its
// file may have a name that is no [[node]] and needs no interface.
func LoadScheduler(sharedDir, nodeFile string) (*Config, error) {
	return (&loader{shared: sharedDir, nodeFile: nodeFile, apart: true}).load()
}

func (l *loader) load() (*Config, error) {
	l.readNode()
	l.readCluster()
	l.crossNode()
	l.readApps()
	l.crossApps()
	return l.result()
}

// LoadApp reads one application afresh, with everything that it must agree
// with: the node, the cluster and the other applications' VIPs. The error is
// of type Faults, or wraps ErrUnknownApp.
func LoadApp(sharedDir, nodeFile, name string) (*App, error) {
	c, err := Load(sharedDir, nodeFile)
	if err != nil {
		return nil, err
	}
	if faults := c.AppFaults[name]; faults != nil {
		return nil, faults
	}
	if app := c.Apps[name]; app != nil {
		return app, nil
	}
	dir := filepath.Join(sharedDir, "apps")
	if !plainName.MatchString(name) {
		return nil, fmt.Errorf("%w %q: not a name; %s", ErrUnknownApp, name, plainNameRule)
	}
	return nil, fmt.Errorf("%w %q: there is no %s", ErrUnknownApp, name, filepath.Join(dir, name+".toml"))
}

// LoadNode reads the node's file alone, for programs that need only its
// sockets. A missing file at DefaultNodeFile gives the defaults. The error is
// of type Faults.
func LoadNode(nodeFile string) (*Node, error) {
	text, err := readText(nodeFile)
	if err != nil {
		if nodeFile == DefaultNodeFile && errors.Is(err, fs.ErrNotExist) {
			n := defaultNode()
			return &n, nil
		}
		return nil, unreadable(nodeFile, err)
	}
	n, d, _ := readNode(nodeFile, text)
	if faults := d.result(); len(faults) > 0 {
		return nil, faults
	}
	return &n, nil
}

// AllFaults gives the faults of all disabled applications, in the order of
// their files.
func (c *Config) AllFaults() Faults {
	var all Faults
	for _, name := range slices.Sorted(maps.Keys(c.AppFaults)) {
		all = append(all, c.AppFaults[name]...)
	}
	return all
}

// loader holds what Load has read so far.
type loader struct {
	shared, nodeFile string
	apart            bool   // the machine need not be a node
	faults           Faults // of files that could not be read

	node     Node
	nodeDoc  *doc
	nodeRoot *table

	cluster      Cluster
	clusterDoc   *doc
	clusterRoot  *table
	clusterNodes []*table

	apps    []*appFile
	hasApps bool
}

// appFile is one apps/*.toml while it is read.
type appFile struct {
	name   string
	file   string
	app    *App
	doc    *doc
	root   *table
	faults Faults // when the file could not be read
	own    bool   // has faults of its own, before it is compared with others
}

func (l *loader) readNode() {
	text, err := readText(l.nodeFile)
	if err != nil {
		l.faults = append(l.faults, unreadable(l.nodeFile, err)...)
		return
	}
	l.node, l.nodeDoc, l.nodeRoot = readNode(l.nodeFile, text)
	if l.nodeRoot != nil && !l.apart {
		l.nodeRoot.require("interface", "name the network interface that carries the VIPs, such as \"eth0\"")
	}
}

func (l *loader) readCluster() {
	file := filepath.Join(l.shared, "cluster.toml")
	l.cluster = defaultCluster()
	text, err := readText(file)
	if errors.Is(err, fs.ErrNotExist) {
		// Only the file may be missing: a directory that is not there is a
		// wrong path or a share that is not mounted.
		var st os.FileInfo
		if st, err = os.Stat(l.shared); err == nil && !st.IsDir() {
			err = errors.New("not a directory")
		}
		if err != nil {
			l.faults = append(l.faults, unreadable(l.shared, err)...)
		}
		return
	}
	if err != nil {
		l.faults = append(l.faults, unreadable(file, err)...)
		return
	}
	l.cluster, l.clusterDoc, l.clusterRoot, l.clusterNodes = readCluster(file, text)
}

func (l *loader) readApps() {
	dir := filepath.Join(l.shared, "apps")
	entries, err := os.ReadDir(dir)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			l.faults = append(l.faults, unreadable(dir, err)...)
		}
		return
	}
	l.hasApps = true
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".toml")
		if !ok || strings.HasPrefix(name, ".") || e.IsDir() {
			continue
		}
		f := &appFile{name: name, file: filepath.Join(dir, e.Name())}
		if text, err := readText(f.file); err != nil {
			f.faults = unreadable(f.file, err)
		} else {
			f.app, f.doc, f.root = readApp(f.file, text, name, l.cluster.Hold)
		}
		l.apps = append(l.apps, f)
	}
}

// result sorts what was read into a configuration or an error.
func (l *loader) result() (*Config, error) {
	c := &Config{
		Cluster: l.cluster, Node: l.node,
		Apps: make(map[string]*App), AppFaults: make(map[string]Faults),
		SharedDir: l.shared, NodeFile: l.nodeFile, Generation: 1,
		hasCluster: l.clusterDoc != nil, hasApps: l.hasApps,
	}
	for _, f := range l.apps {
		if faults := append(f.faults, f.doc.result()...); len(faults) > 0 {
			c.AppFaults[f.name] = faults
		} else {
			c.Apps[f.name] = f.app
		}
	}
	faults := slices.Concat(l.faults, l.clusterDoc.result(), l.nodeDoc.result())
	if len(faults) > 0 {
		return nil, append(faults, c.AllFaults()...)
	}
	return c, nil
}
