package node

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/journal"
	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
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
				records[i] = filter.Record{Conn: &filter.ConnRecord{App: "redis", ID: id, Learned: true}, ID: id}
			}
			for b.Loop() {
				if err := node.record(records); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
