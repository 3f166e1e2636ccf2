package restorereq

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// FuzzReadRequest reads what a stranger sends, in pieces of any size: the same
// line comes out, and never more than one.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte("Restore 192.000.002.100\r\nRestore 192.000.002.101\r\n"))
	f.Add([]byte("Restore 2001:0db8:0000:0000:0000:0000:0000:0001\r\n"))
	f.Add([]byte("Restore 192.000.002.100"))
	f.Add([]byte(strings.Repeat("x", 2*requestLen6)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		want, wantErr := readRequest(bytes.NewReader(b))
		if len(want) > requestLen6 || !bytes.HasPrefix(b, want) || wantErr == nil && bytes.IndexByte(want, '\n') != len(want)-1 {
			t.Fatalf("%q, %v", want, wantErr)
		}
		for _, r := range []io.Reader{iotest.OneByteReader(bytes.NewReader(b)), iotest.HalfReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b))} {
			if got, err := readRequest(r); !bytes.Equal(got, want) || (err == nil) != (wantErr == nil) {
				t.Fatalf("%q, %v; at once %q, %v", got, err, want, wantErr)
			}
		}
		if vip, err := parseRequest(want); err == nil && (!vip.IsValid() || wantErr != nil) {
			t.Fatalf("%q is %v, %v", want, vip, wantErr)
		}
	})
}
