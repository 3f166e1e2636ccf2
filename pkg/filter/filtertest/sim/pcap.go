package sim

import (
	"io"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
)

// Capture writes what the remotes send and what leaves the node for them, as
// pcap.
type Capture struct{ w *pcapgo.Writer }

// NewCapture begins a capture.
func NewCapture(out io.Writer) (*Capture, error) {
	w := pcapgo.NewWriter(out)
	return &Capture{w}, w.WriteFileHeader(65535, layers.LinkTypeRaw)
}

func (c *Capture) packet(now int64, b []byte) {
	_ = c.w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(0, now), CaptureLength: len(b), Length: len(b)}, b)
}
