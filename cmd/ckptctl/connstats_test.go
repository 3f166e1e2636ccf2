package main

import (
	"regexp"
	"strings"
	"testing"

	nfconnfilterv1 "github.com/nfconnfilter/nfconnfilter/pkg/control/gen/nfconnfilterv1"
)

func TestConnsStatistics(t *testing.T) {
	r := newRig(t)
	r.filter.conns = []*nfconnfilterv1.ConnInfo{
		{Local: "192.0.2.100:6379", Remote: "198.51.100.7:40000", Role: "passive", State: "CONNECTRMT", BytesIn: 12345678, BytesOut: 123456789,
			WindowClosed: true, SegmentsIn: 123456, SegmentsOut: 7890, Answered: 1234, SentToRemote: 1235, SentToLocal: 12, KeptBytes: 60000, KeptSegments: 42,
			RemoteIdleMs: 86_400_000, Reasons: map[string]uint64{"held-answered": 1200, "ask-answer": 2, "held-data": 34, "pass": 2}},
		{Local: "192.0.2.100:6379", Remote: "198.51.100.7:40001", Role: "passive", State: "CONNECTRMT", KeptSegments: 1, RemoteIdleMs: -1},
		{Local: "192.0.2.100:6379", Remote: "198.51.100.7:40002", Role: "passive", State: "CONNECTRMT", RemoteIdleMs: 900},
	}
	tables := map[string]string{
		"conns redis": "" +
			"LOCAL             REMOTE              ROLE     STATE       BYTES-IN  BYTES-OUT  IDLE  FLAGS\n" +
			"192.0.2.100:6379  198.51.100.7:40000  passive  CONNECTRMT  12345678  123456789  24h   window-closed\n" +
			"192.0.2.100:6379  198.51.100.7:40001  passive  CONNECTRMT  0         0          -     -\n" +
			"192.0.2.100:6379  198.51.100.7:40002  passive  CONNECTRMT  0         0          0s    -\n",
		"conns redis --stats": "" +
			"LOCAL             REMOTE              SEGS-IN  SEGS-OUT  ANSWERED  TO-REMOTE  TO-LOCAL  KEPT\n" +
			"192.0.2.100:6379  198.51.100.7:40000  123456   7890      1234      1235       12        60000/42\n" +
			"192.0.2.100:6379  198.51.100.7:40001  0        0         0         0          0         0/1\n" +
			"192.0.2.100:6379  198.51.100.7:40002  0        0         0         0          0         -\n",
		"conns redis --reasons": "" +
			"LOCAL             REMOTE              REASON         COUNT\n" +
			"192.0.2.100:6379  198.51.100.7:40000  held-answered  1200\n" +
			"192.0.2.100:6379  198.51.100.7:40000  held-data      34\n" +
			"192.0.2.100:6379  198.51.100.7:40000  ask-answer     2\n" +
			"192.0.2.100:6379  198.51.100.7:40000  pass           2\n" +
			"192.0.2.100:6379  198.51.100.7:40001  -              0\n" +
			"192.0.2.100:6379  198.51.100.7:40002  -              0\n",
	}
	// A million connections have many reasons: they are asked for when they are shown.
	sent := map[string]string{
		"conns redis":                     `GetConnInfo app:"redis"`,
		"conns redis --stats":             `GetConnInfo app:"redis"`,
		"conns redis --reasons":           `GetConnInfo app:"redis" reasons:true`,
		"conns redis -o json":             `GetConnInfo app:"redis" reasons:true`,
		"ioctl GETCONNINFO redis":         `GetConnInfo app:"redis"`,
		"ioctl GETCONNINFO redis -o json": `GetConnInfo app:"redis" reasons:true`,
	}
	for args, want := range tables {
		r.want(0, want, strings.Fields(args)...)
		for line := range strings.Lines(want) {
			if len(strings.TrimRight(line, "\n")) > 100 {
				t.Errorf("%s: wider than 100 columns: %s", args, line)
			}
		}
	}
	for args, want := range sent {
		if got := r.do(strings.Fields(args)...); got.code != 0 {
			t.Errorf("%s: %+v", args, got)
		}
		if got := r.filter.last(); got != want {
			t.Errorf("%s: sent %s, want %s", args, got, want)
		}
	}
	got := r.do("conns", "redis", "-o", "json")
	if want := `"segments_in":123456,"segments_out":7890,"answered":1234,"sent_to_remote":1235,"sent_to_local":12,"kept_bytes":60000,"kept_segments":42,` +
		`"idle_seconds":86400,"reasons":{"ask-answer":2,"held-answered":1200,"held-data":34,"pass":2}}`; !strings.Contains(got.out, want) {
		t.Errorf("JSON %s\nlacks %s", got.out, want)
	}
	r.want(2, "", "conns", "redis", "--stats", "--reasons")
}

func TestIdleCell(t *testing.T) {
	for ms, want := range map[int64]string{
		-1: "-", 0: "0s", 999: "0s", 119_999: "119s", 120_000: "2m", 7_199_999: "119m", 7_200_000: "2h",
		172_799_999: "47h", 172_800_000: "2d", 31_536_000_000: "365d",
	} {
		if got := connStatsOf(&nfconnfilterv1.ConnInfo{RemoteIdleMs: ms}).idle(); got != want {
			t.Errorf("%d ms: %q, want %q", ms, got, want)
		}
	}
}

// Every column of every table is explained.
func TestConnsHelp(t *testing.T) {
	r := newRig(t)
	help := r.do("conns", "--help")
	if help.code != 0 {
		t.Fatalf("%+v", help)
	}
	text := strings.NewReplacer("BYTES-IN, -OUT", "BYTES-IN, BYTES-OUT", "SEGS-IN, -OUT", "SEGS-IN, SEGS-OUT").Replace(help.out)
	for _, table := range []connTable{connsTable, statsTable} {
		for column := range strings.FieldsSeq(table.header) {
			if !regexp.MustCompile(`(?m)^  ([A-Z-]+, )*` + column + `\b`).MatchString(text) {
				t.Errorf("column %s is not explained in\n%s", column, text)
			}
		}
	}
	long, _, _ := strings.Cut(help.out, "\nUsage:")
	for line := range strings.Lines(long) {
		if len(line) > 81 {
			t.Errorf("a wide line of help: %s", line)
		}
	}
}
