package main

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/nfconnfilter/nfconnfilter/internal/sockdiag"
	"github.com/nfconnfilter/nfconnfilter/pkg/checkpoint"
	"github.com/nfconnfilter/nfconnfilter/pkg/control"
	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestIoctl(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		args       string
		out, json  string
		sent, note string
	}{
		{args: "REGISTER redis 192.0.2.100,2001:DB8::1 --ports 6379,6380 --outgoing-ports 443 --exclude-ports 22", out: "redis: CONNECTED\n", json: `{"app":"redis","state":"CONNECTED"}`,
			sent: `Register app:"redis" vips:"192.0.2.100" vips:"2001:db8::1" include_ports:6379 include_ports:6380 outgoing_ports:443 exclude_ports:22`},
		{args: "UNREGISTER redis --force", out: "redis: unknown\n", json: `{"app":"redis","state":""}`, sent: `Unregister app:"redis" force:true`},
		{args: "SNAPSHOTFREEZE redis --quiet 20ms", out: "redis: SNAPSHOTFREEZE\n", json: `{"app":"redis","state":"SNAPSHOTFREEZE"}`, sent: `SnapshotFreeze app:"redis" boundary:"turn" quiet_ms:20`},
		{args: "seal redis", out: "redis: SNAPSHOTFREEZE\n", json: `{"app":"redis","state":"SNAPSHOTFREEZE"}`, sent: `Seal app:"redis"`},
		{args: "SNAPSHOTDONE redis S-1 --force", out: "redis: SNAPSHOTDONE S-1\n", json: `{"app":"redis","state":"SNAPSHOTDONE","snapshot_id":"S-1","notes":["a note"]}`,
			sent: `SnapshotDone app:"redis" snapshot_id:"S-1" force:true`, note: "a note\n"},
		{args: "SNAPSHOTABORT redis", out: "redis: RESTORED\n", json: `{"app":"redis","state":"RESTORED"}`, sent: `SnapshotAbort app:"redis"`},
		{args: "RESTORESTART redis 192.0.2.100 S-1", out: "redis: RESTORESTART\n", json: `{"app":"redis","state":"RESTORESTART"}`, sent: `RestoreStart app:"redis" ip:"192.0.2.100" snapshot_id:"S-1"`},
		{args: "RESTORECONN redis 192.0.2.100:6379 [2001:DB8::2]:40000 syn", out: "redis: RESTORESTART\n", json: `{"app":"redis","state":"RESTORESTART"}`,
			sent: `RestoreConn app:"redis" conns:{local:"192.0.2.100:6379" remote:"[2001:db8::2]:40000"} kind:"syn"`},
		{args: "RESTORED redis --reset-missing", out: "redis: RESTORED\n", json: `{"app":"redis","state":"RESTORED"}`, sent: `Restored app:"redis" reset_missing:true`},
		{args: "RESTOREABORT redis", out: "redis: SNAPSHOTDONE\n", json: `{"app":"redis","state":"SNAPSHOTDONE"}`, sent: `RestoreAbort app:"redis"`},
		{args: "RESTORESTART redis 192.0.2.100 S-1 node-b", out: "redis: RESTORESTART\n", json: `{"app":"redis","state":"RESTORESTART"}`, sent: `RestoreStart app:"redis" ip:"192.0.2.100" snapshot_id:"S-1" old_node:"node-b"`},
		{args: "HANDOVER redis node-b", out: "redis: BLOCKDATA S-1, 3 connections handed over to node node-b, 6 bytes\n",
			json: `{"app":"redis","state":"BLOCKDATA","snapshot_id":"S-1","connections":3,"bytes":6}`, sent: `Handover app:"redis" to_node:"node-b"`},
		{args: "RELEASE redis --force", out: "redis: unknown\n", json: `{"app":"redis","state":""}`, sent: `Release app:"redis" force:true`},
		{args: "GETCONNCOUNT redis", out: "7\n", json: `{"app":"redis","state":"CONNECTED","count":7}`, sent: `GetConnCount app:"redis"`},
	} {
		args := append([]string{"ioctl"}, strings.Fields(tc.args)...)
		if got := r.want(0, tc.out, args...); got.err != tc.note {
			t.Errorf("%s: standard error %q", tc.args, got.err)
		}
		if got := r.filter.last(); got != tc.sent {
			t.Errorf("%s:\nsent %s\nwant %s", tc.args, got, tc.sent)
		}
		r.want(0, tc.json+"\n", append(args, "-o", "json")...)
	}
	r.filter.err = control.Error(connect.CodeFailedPrecondition, "redis", "CONNECTED", "SEAL is not allowed in CONNECTED")
	for _, args := range []string{"SEAL redis", "GETCONNCOUNT redis", "GETCONNINFO redis", "SNAPSHOTSTART redis", "REGISTER redis 192.0.2.1"} {
		r.want(1, `{"error":{"code":"failed_precondition","message":"SEAL is not allowed in CONNECTED","app":"redis","state":"CONNECTED"}}`+"\n",
			append([]string{"ioctl", "-o", "json"}, strings.Fields(args)...)...)
	}
}

// Every request of the API has its line, in the API's order.
func TestIoctlComplete(t *testing.T) {
	var words []string
	for _, q := range ioctlRequests {
		words = append(words, q.word)
	}
	if !slices.Equal(words, control.Requests()) {
		t.Errorf("%v, want %v", words, control.Requests())
	}
}

func TestIoctlConnInfo(t *testing.T) {
	r := newRig(t)
	r.want(0, "[]\n", "ioctl", "GETCONNINFO", "redis", "-o", "json")
	r.filter.conns = []*nfconnfilterv1.ConnInfo{{Local: "192.0.2.100:6379", Remote: "198.51.100.7:4000", Role: "passive", State: "CONNECTRMT", BytesIn: 1, BytesOut: 2, Offloaded: true,
		Frozen: true, Sealed: true, Learned: true, UnackedOut: 3, KeptBytes: 4, DeliveredIn: 5, DiscardedOut: 6, LocalIdleMs: 7, Missing: "3 bytes not acknowledged", SndNxt: 4294967295, RcvNxt: 9, Restorable: true, RemoteClosed: true,
		SegmentsIn: 10, SegmentsOut: 11, Answered: 12, SentToRemote: 13, SentToLocal: 14, KeptSegments: 15, RemoteIdleMs: 1600, Reasons: map[string]uint64{"held-answered": 17}}}
	r.want(0, `[{"local":"192.0.2.100:6379","remote":"198.51.100.7:4000","role":"passive","state":"CONNECTRMT","bytes_in":1,"bytes_out":2,"translated":false,"offloaded":true,"window_closed":false,`+
		`"segments_in":10,"segments_out":11,"answered":12,"sent_to_remote":13,"sent_to_local":14,"kept_bytes":4,"kept_segments":15,"idle_seconds":1.6,"reasons":{"held-answered":17},`+
		`"frozen":true,"sealed":true,"learned":true,"unacked_out":3,"delivered_in":5,"discarded_out":6,"local_idle_ms":7,"missing":"3 bytes not acknowledged","snd_nxt":4294967295,"rcv_nxt":9,"restorable":true,"remote_closed":true}]`+"\n",
		"ioctl", "GETCONNINFO", "redis", "-o", "json")
	r.want(0, ""+
		"LOCAL             REMOTE             ROLE     STATE       BYTES-IN  BYTES-OUT  SND.NXT     RCV.NXT  UNACKED  KEPT  FLAGS      MISSING\n"+
		"192.0.2.100:6379  198.51.100.7:4000  passive  CONNECTRMT  1         2          4294967295  9        3        4     offloaded  3 bytes not acknowledged\n",
		"ioctl", "GETCONNINFO", "redis")
}

func TestIoctlSnapshotStart(t *testing.T) {
	r := newRig(t)
	r.filter.status = &nfconnfilterv1.StatusReply{Apps: []*nfconnfilterv1.AppStatus{
		{Name: "redis", Vips: []string{"192.0.2.100"}, State: "CONNECTED", IncludePorts: []uint32{80, 6379}, ExcludePorts: []uint32{22},
			ExcludeAddresses: []string{"203.0.113.128/25"}},
		{Name: "web", Vips: []string{"192.0.2.101"}, State: "CONNECTED"},
	}}
	ap := netip.MustParseAddrPort
	old := findSockets
	defer func() { findSockets = old }()
	var asked []netip.Addr
	var namespace string
	up := func(local, remote string) sockdiag.Socket {
		return sockdiag.Socket{Local: ap(local), Remote: ap(remote), State: sockdiag.Established}
	}
	findSockets = func(ns string, vips []netip.Addr) (checkpoint.Found, error) {
		asked, namespace = vips, ns
		return checkpoint.Found{Own: []netip.Addr{netip.MustParseAddr("192.0.2.11")}, Sockets: []sockdiag.Socket{
			{Local: ap("192.0.2.100:6379"), Remote: ap("198.51.100.7:4000"), State: sockdiag.Established, RecvQ: 1, SendQ: 2, Info: &sockdiag.TCPInfo{
				Options: sockdiag.Options{Timestamps: true, SACK: true, WScale: true}, SndWScale: 7, RcvWScale: 8, SndMSS: 1448, AdvMSS: 1460,
				BytesAcked: 10, BytesReceived: 11, BytesSent: 12, LastDataSent: 13 * time.Millisecond, LastDataRecv: 60 * 24 * time.Hour, RcvSpace: 14600}},
			{Local: ap("192.0.2.100:6379"), Remote: ap("198.51.100.7:4001"), State: sockdiag.TimeWait},
			{Local: ap("192.0.2.100:50000"), Remote: ap("203.0.113.1:443"), State: sockdiag.CloseWait},
			up("192.0.2.100:22", "198.51.100.7:4002"), up("192.0.2.100:9000", "198.51.100.7:4003"), // by port
			up("192.0.2.100:6379", "203.0.113.200:4004"), // by address
			up("192.0.2.100:6379", "192.0.2.11:4005"), up("192.0.2.100:6379", "192.0.2.101:4006"), up("192.0.2.100:6379", "192.0.2.100:4007"),
		}, Listeners: []sockdiag.Socket{
			{Local: ap("[::]:6379"), State: sockdiag.Listen}, {Local: ap("192.0.2.100:6379"), State: sockdiag.Listen}, {Local: ap("0.0.0.0:80"), State: sockdiag.Listen},
			{Local: ap("0.0.0.0:22"), State: sockdiag.Listen}, {Local: ap("0.0.0.0:9000"), State: sockdiag.Listen},
		}}, nil
	}
	r.want(0, `{"app":"redis","state":"SNAPSHOTSTART","learned":1,"unlearned":["a b: c"]}`+"\n", "ioctl", "SNAPSHOTSTART", "redis", "-o", "json", "--leave-out", "--learn-timeout", "3s", "--namespace", "blue")
	want := `SnapshotStart app:"redis" sockets:{local:"192.0.2.100:6379" remote:"198.51.100.7:4000" state:"ESTABLISHED" passive:true recv_queue:1 send_queue:2 has_info:true ` +
		`opt_timestamps:true opt_sack:true opt_wscale:true snd_wscale:7 rcv_wscale:8 snd_mss:1448 adv_mss:1460 bytes_acked:10 bytes_received:11 bytes_sent:12 last_data_sent_ms:13 last_data_recv_ms:4294967295 rcv_space:14600} ` +
		`sockets:{local:"192.0.2.100:50000" remote:"203.0.113.1:443" state:"CLOSE_WAIT"} listen_ports:80 listen_ports:6379 learn_timeout_ms:3000 leave_out:true`
	if got := r.filter.last(); got != want {
		t.Errorf("sent %s\nwant %s", got, want)
	}
	if len(asked) != 1 || asked[0] != netip.MustParseAddr("192.0.2.100") || namespace != "blue" {
		t.Errorf("asked for %v in %q", asked, namespace)
	}
	if got := r.want(0, "redis: SNAPSHOTSTART, 1 connections learned, 1 not\n", "ioctl", "SNAPSHOTSTART", "redis"); got.err != "not learned: a b: c\n" {
		t.Errorf("standard error %q", got.err)
	}
	if got := r.do("ioctl", "SNAPSHOTSTART", "mail"); got.code != 2 || !strings.Contains(got.err, "REGISTER makes it known") {
		t.Errorf("unknown application: %+v", got)
	}
	findSockets = func(string, []netip.Addr) (checkpoint.Found, error) {
		return checkpoint.Found{}, errors.New("no such namespace")
	}
	if got := r.do("ioctl", "SNAPSHOTSTART", "redis"); got.code != 1 || !strings.Contains(got.err, "cannot be listed") {
		t.Errorf("no sockets: %+v", got)
	}
}

// ADOPT tells what the agent would tell: what the filter looks at, and what it
// follows already.
func TestIoctlAdopt(t *testing.T) {
	r := newRig(t)
	r.filter.status = &nfconnfilterv1.StatusReply{Apps: []*nfconnfilterv1.AppStatus{{Name: "redis", Vips: []string{"192.0.2.100"}, State: "RESTORED", IncludePorts: []uint32{6379}}}}
	r.filter.conns = []*nfconnfilterv1.ConnInfo{{Local: "192.0.2.100:6380", Remote: "198.51.100.7:4001", Translated: true}}
	old := findSockets
	defer func() { findSockets = old }()
	findSockets = func(string, []netip.Addr) (checkpoint.Found, error) {
		var f checkpoint.Found
		for i, local := range []string{"192.0.2.100:6379", "192.0.2.100:6380", "192.0.2.100:6380"} {
			f.Sockets = append(f.Sockets, sockdiag.Socket{Local: netip.MustParseAddrPort(local),
				Remote: netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), uint16(4000+i)), State: sockdiag.Established})
			f.Listeners = append(f.Listeners, sockdiag.Socket{Local: netip.MustParseAddrPort(local), State: sockdiag.Listen})
		}
		return f, nil
	}
	r.want(0, "redis: RESTORED, 1 connections adopted, 2 forgotten\n", "ioctl", "ADOPT", "redis")
	got, _, _ := strings.Cut(r.filter.last(), " listed_at_ns")
	want := `Adopt app:"redis" sockets:{local:"192.0.2.100:6379" remote:"198.51.100.7:4000" state:"ESTABLISHED" passive:true} ` +
		`sockets:{local:"192.0.2.100:6380" remote:"198.51.100.7:4001" state:"ESTABLISHED" passive:true} listen_ports:6379`
	if got != want {
		t.Errorf("sent %s\nwant %s", got, want)
	}
}
