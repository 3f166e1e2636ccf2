package clients

import (
	"encoding/binary"
	"fmt"
	"net"
	"time"
)

// Fill writes the bytes of the deterministic stream of a seed, from position
// pos on, into b. Each run of eight bytes is a mix of seed and position, so a
// byte lost, repeated or moved makes what follows differ.
func Fill(b []byte, seed, pos uint64) {
	for len(b) > 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], mix(seed<<40^pos>>3))
		n := copy(b, w[pos&7:])
		b = b[n:]
		pos += uint64(n)
	}
}

// Match returns how many bytes at the start of b are those of the stream.
func Match(b []byte, seed, pos uint64) int {
	var w [512]byte
	for done := 0; done < len(b); {
		want := w[:min(len(w), len(b)-done)]
		Fill(want, seed, pos+uint64(done))
		for i := range want {
			if b[done+i] != want[i] {
				return done + i
			}
		}
		done += len(want)
	}
	return len(b)
}

// mix is the finaliser of the SplitMix64 generator.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// ByteWriter writes the stream that belongs to its own port to a byte-counting
// server without a pause.
type ByteWriter struct {
	conn  *net.TCPConn
	port  uint16
	total uint64
}

// DialByteWriter connects to the server at addr; total is the length of the
// stream in bytes.
func DialByteWriter(d Dialer, addr string, total uint64, k KeepAlive) (*ByteWriter, error) {
	c, err := dial(d, addr, k)
	if err != nil {
		return nil, err
	}
	port := c.LocalAddr().(*net.TCPAddr).Port
	return &ByteWriter{conn: c, port: uint16(port), total: total}, nil
}

// Port is the writer's own port: the seed of its stream and its key in the
// server's CountFile.
func (w *ByteWriter) Port() uint16 { return w.port }

// Close closes the connection.
func (w *ByteWriter) Close() error { return w.conn.Close() }

// Run writes the whole stream, closes the writing side and checks the number
// that the server answers: it counts every byte up to the FIN. The deadline is
// for all of it.
func (w *ByteWriter) Run(deadline time.Time) error {
	if err := w.conn.SetDeadline(deadline); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for pos := uint64(0); pos < w.total; {
		b := buf[:min(uint64(len(buf)), w.total-pos)]
		Fill(b, uint64(w.port), pos)
		n, err := w.conn.Write(b)
		pos += uint64(n)
		if err != nil {
			return fmt.Errorf("writer %d, after %d bytes: %w", w.port, pos, fault(err))
		}
	}
	if err := w.conn.CloseWrite(); err != nil {
		return fmt.Errorf("writer %d: %w", w.port, fault(err))
	}
	var got uint64
	if _, err := fmt.Fscanf(w.conn, "%d\n", &got); err != nil {
		return fmt.Errorf("writer %d: the server's count: %w", w.port, fault(err))
	}
	if got != w.total {
		return fmt.Errorf("writer %d: the server counted %d bytes, %d were written", w.port, got, w.total)
	}
	return nil
}
