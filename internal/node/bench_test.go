package node

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/appstate"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
	"github.com/nfconnfilter/nfconnfilter/pkg/rewrite"
	"github.com/nfconnfilter/nfconnfilter/pkg/tcpemu"
)

// BenchmarkRecord writes the records of a snapshot's request to the disk, that
// many connections in one transaction.
func BenchmarkRecord(b *testing.B) {
	for _, n := range []int{1, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			j, err := journal.Open(filepath.Join(b.TempDir(), "journal.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer j.Close()
			node := &Node{journal: j}
			local := netip.MustParseAddrPort("192.0.2.100:6379")
			records := make([]filter.Record, n)
			for i := range records {
				id := filter.ConnID{Local: local, Remote: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), uint16(30000+i))}
				records[i] = filter.Record{Conn: &filter.ConnRecord{
					App: "redis", ID: id, Role: appstate.Passive, State: appstate.Connect,
					Opt:    tcpemu.Options{MSS: 1460, TS: true, SACK: true, WScale: true, RemoteScale: 7, LocalScale: 9},
					SndUna: 0x81234567, SndNxt: 0x81234567, RcvNxt: 0x91234567, Window: 512, Edge: 0x91235567, RemoteWnd: 65536,
					RemoteLast: 502, RemoteSeen: true, TSVal: 0xa1234567, TSRec: 0xb1234567, TSAt: 1 << 50,
					Handshake: true, AckSeen: true, Learned: true, Frozen: true, Confirmed: true, ISS: 0x81230000, IRS: 0x91230000,
					Created: 1 << 50, BytesIn: 0x4567, BytesOut: 0x4567, HsIRS: 0x91230000, Translated: true,
					Tr: rewrite.Translation{Out: 0x12345678, In: 0x12345678, ScaleLocal: 9, ScaleSeen: 9},
				}, ID: id}
			}
			for b.Loop() {
				if err := node.record(records); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
