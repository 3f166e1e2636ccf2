package criu

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	sk_inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	sk_opts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"github.com/checkpoint-restore/go-criu/v8/magic"
)

// begin is what an image of a kind begins with.
func begin(kind uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, magicImage), kind)
}

// image writes one as CRIU does: two magic numbers, entries behind their lengths, and more.
func image(t *testing.T, path string, more []byte, entries ...proto.Message) {
	t.Helper()
	b := begin(magicStream)
	switch filepath.Base(path) {
	case "files.img":
		b = begin(magicFiles)
	case "pstree.img":
		b = begin(magicTree)
	}
	for _, e := range entries {
		p, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	if err := os.WriteFile(path, append(b, more...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// words are an address as CRIU writes it.
func words(a netip.Addr) (out []uint32) {
	for b := a.AsSlice(); len(b) > 0; b = b[4:] {
		out = append(out, binary.LittleEndian.Uint32(b))
	}
	return out
}

func socket(ino, state uint32, family uint32, local, remote string) *fdinfo.FileEntry {
	l, r := netip.MustParseAddrPort(local), netip.MustParseAddrPort(remote)
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: proto.Uint32(ino), Isk: &sk_inet.InetSkEntry{
		Id: proto.Uint32(ino), Ino: proto.Uint32(ino), Family: proto.Uint32(family), Type: proto.Uint32(1), Proto: proto.Uint32(ipprotoTCP),
		State: proto.Uint32(state), SrcPort: proto.Uint32(uint32(l.Port())), DstPort: proto.Uint32(uint32(r.Port())), Flags: proto.Uint32(2), Backlog: proto.Uint32(0),
		SrcAddr: words(l.Addr()), DstAddr: words(r.Addr()), Fown: &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)},
		Opts: &sk_opts.SkOptsEntry{SoSndbuf: proto.Uint32(1), SoRcvbuf: proto.Uint32(1), SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0), SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)},
	}}
}

func numbers(inqLen, inq, outqLen, outq uint32) *tcp_stream.TcpStreamEntry {
	return &tcp_stream.TcpStreamEntry{InqLen: proto.Uint32(inqLen), InqSeq: proto.Uint32(inq), OutqLen: proto.Uint32(outqLen), OutqSeq: proto.Uint32(outq),
		OptMask: proto.Uint32(optTimestamps | optSACK | optWScale), SndWscale: proto.Uint32(7), RcvWscale: proto.Uint32(10), MssClamp: proto.Uint32(1460), Timestamp: proto.Uint32(99),
		SndWnd: proto.Uint32(500), RcvWnd: proto.Uint32(600), RcvWup: proto.Uint32(inq)}
}

// An image holds what it holds; queues stand behind the numbers.
func TestSockets(t *testing.T) {
	dir := t.TempDir()
	udp := socket(0x50, established, inet, "192.0.2.1:53", "192.0.2.2:53")
	udp.Isk.Proto, udp.Isk.Type = proto.Uint32(17), proto.Uint32(2)
	image(t, filepath.Join(dir, "files.img"), nil,
		socket(0x10, established, inet, "192.0.2.100:6379", "198.51.100.7:40000"),
		socket(0x11, listen, inet, "192.0.2.100:6379", "0.0.0.0:0"), udp,
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(7)},
		socket(0x12, finWait1, inet6, "[::ffff:192.0.2.100]:6379", "[::ffff:198.51.100.7]:40001"),
		socket(0x13, closeWait, inet6, "[2001:db8::1]:6379", "[2001:db8::2]:40002"),
		socket(0x14, finWait2, inet, "192.0.2.100:6379", "198.51.100.7:40003"),
		socket(0x15, lastAck, inet, "192.0.2.100:6379", "198.51.100.7:40004"))
	for ino, n := range map[string]*tcp_stream.TcpStreamEntry{"10": numbers(3, 1000, 20, 5000), "12": numbers(0, 1000, 0, 5001), "13": numbers(0, 1001, 0, 5000),
		"14": numbers(0, 1000, 0, 5001), "15": numbers(0, 1001, 7, 5008)} {
		image(t, filepath.Join(dir, "tcp-stream-"+ino+".img"), []byte("queues of any length \xff\xff\xff\xff"), n)
	}
	got, err := Sockets(dir)
	if err != nil || len(got) != 5 {
		t.Fatalf("%+v, %v", got, err)
	}
	first := Socket{Local: netip.MustParseAddrPort("192.0.2.100:6379"), Remote: netip.MustParseAddrPort("198.51.100.7:40000"),
		RcvNxt: 1000, SndUna: 4980, SndNxt: 5000, Unread: 3, Timestamps: true, SACK: true, WScale: true, SndWScale: 7, RcvWScale: 10,
		TSVal: 99, MSS: 1460, SndWnd: 500, RcvWnd: 600, RcvWup: 1000}
	if got[0] != first {
		t.Errorf("%+v\nwant %+v", got[0], first)
	}
	for i, want := range []struct {
		remote      string
		local, peer bool
		una         uint32
	}{{"198.51.100.7:40000", false, false, 4980}, {"198.51.100.7:40001", true, false, 5000}, {"[2001:db8::2]:40002", false, true, 5000},
		{"198.51.100.7:40003", true, false, 5001}, {"198.51.100.7:40004", true, true, 5000}} {
		if s := got[i]; s.Remote.String() != want.remote || s.LocalClosed != want.local || s.RemoteClosed != want.peer || s.SndUna != want.una {
			t.Errorf("%d: %+v, want %+v", i, s, want)
		}
	}
}

// Damaged images are named, whatever is wrong with them.
func TestImageFaults(t *testing.T) {
	behind := func(kind uint32, more string) []byte { return append(begin(kind), more...) }
	for name, c := range map[string]struct {
		files, stream []byte
		want          string
	}{
		"no files":         {nil, nil, "files.img"},
		"empty":            {[]byte{}, nil, "files.img: it is cut off"},
		"cut in magic":     {begin(magicFiles)[:7], nil, "files.img: it is cut off"},
		"another kind":     {behind(magicTree, ""), nil, "files.img: it is no image of that kind"},
		"no image":         {[]byte("#!/bin/sh\nexit 0\n"), nil, "files.img: it is no image of that kind"},
		"cut in length":    {behind(magicFiles, "\x01"), nil, "it is cut off"},
		"cut in entry":     {behind(magicFiles, "\x09\x00\x00\x00abc"), nil, "it is cut off"},
		"too long":         {behind(magicFiles, "\x00\x00\x00\x80"), nil, "none of CRIU's"},
		"no protobuf":      {behind(magicFiles, "\x03\x00\x00\x00\xff\xff\xff"), nil, "files.img"},
		"stream of nobody": {[]byte("ok"), []byte{}, "tcp-stream-10.img: it is cut off"},
		"stream foreign":   {[]byte("ok"), behind(magicFiles, "\x00\x00\x00\x00"), "tcp-stream-10.img: it is no image of that kind"},
		"stream missing":   {[]byte("ok"), nil, "tcp-stream-10.img"},
		"stream empty":     {[]byte("ok"), begin(magicStream), "it has no entry"},
		"stream cut":       {[]byte("ok"), behind(magicStream, "\xf0\x00\x00\x00"), "tcp-stream-10.img"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "files.img")
		switch {
		case string(c.files) == "ok":
			image(t, path, nil, socket(0x10, established, inet, "192.0.2.100:6379", "198.51.100.7:40000"))
		case c.files != nil:
			if err := os.WriteFile(path, c.files, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if c.stream != nil {
			if err := os.WriteFile(filepath.Join(dir, "tcp-stream-10.img"), c.stream, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Sockets(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	dir := t.TempDir()
	image(t, filepath.Join(dir, "files.img"), nil, socket(0x10, established, 77, "192.0.2.100:6379", "198.51.100.7:40000"))
	if _, err := Sockets(dir); err == nil || !strings.Contains(err.Error(), "family 77") {
		t.Errorf("unknown family: %v", err)
	}
}

func TestPIDs(t *testing.T) {
	dir := t.TempDir()
	tree := func(pid uint32, threads ...uint32) *pstree.PstreeEntry {
		return &pstree.PstreeEntry{Pid: proto.Uint32(pid), Ppid: proto.Uint32(0), Pgid: proto.Uint32(pid), Sid: proto.Uint32(pid), Threads: threads}
	}
	image(t, filepath.Join(dir, "pstree.img"), nil, tree(100, 100, 101), tree(102, 102))
	if got, err := PIDs(dir); err != nil || len(got) != 3 || got[0] != 100 || got[2] != 102 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := PIDs(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	image(t, filepath.Join(dir, "pstree.img"), nil)
	if _, err := PIDs(dir); !errors.Is(err, errNone) {
		t.Errorf("no process: %v", err)
	}
}

// The numbers are CRIU's.
func TestMagicNumbers(t *testing.T) {
	for name, have := range map[string]uint64{"IMG_COMMON": magicImage, "FILES": magicFiles, "PSTREE": magicTree, "TCP_STREAM": magicStream, "INVENTORY": magicInventory} {
		if want := magic.LoadMagic().ByName[name]; have != want {
			t.Errorf("%s: %#x, want %#x", name, have, want)
		}
	}
}

// TestNetworkLock reads the one image that begins with one number.
func TestNetworkLock(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "inventory.img")
	write := func(kind uint32) {
		b, err := proto.Marshal(&inventory.InventoryEntry{ImgVersion: proto.Uint32(2), NetworkLockMethod: proto.Uint32(2)})
		if err != nil {
			t.Fatal(err)
		}
		all := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, kind), uint32(len(b)))
		if err := os.WriteFile(path, append(all, b...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(magicInventory)
	if lock, err := NetworkLock(dir); lock != LockSkip || err != nil {
		t.Errorf("%s, %v", lock, err)
	}
	for _, spoil := range []func(){func() { write(magicImage) }, func() { _ = os.Truncate(path, 2) }, func() { _ = os.Truncate(path, 0) }} {
		spoil()
		if _, err := NetworkLock(dir); err == nil || !strings.Contains(err.Error(), "inventory.img: it is ") {
			t.Errorf("%v", err)
		}
	}
}

// FuzzSockets: no image makes the reader panic or hold more than it has.
func FuzzSockets(f *testing.F) {
	f.Add(append(begin(magicFiles), "\x03\x00\x00\x00abc"...), append(begin(magicStream), "\x02\x00\x00\x00\x08\x01"...))
	f.Add(append(begin(magicTree), "\x00\x00\x00\x00"...), []byte{})
	f.Fuzz(func(t *testing.T, files, stream []byte) {
		dir := t.TempDir()
		_ = os.WriteFile(filepath.Join(dir, "files.img"), files, 0o600)
		_ = os.WriteFile(filepath.Join(dir, "pstree.img"), files, 0o600)
		_ = os.WriteFile(filepath.Join(dir, "tcp-stream-10.img"), stream, 0o600)
		_, _ = Sockets(dir)
		_, _ = PIDs(dir)
	})
}
