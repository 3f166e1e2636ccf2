package vip

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
)

// Who has the address answers, in both families; who has not is silent, and so
// are we for our own.
func TestProbe(t *testing.T) {
	n := newNet(t, "probe")
	for _, text := range []string{"10.77.0.100", "fd77::100"} {
		addr := netip.MustParseAddr(text)
		ask := func(want int) {
			t.Helper()
			var got []net.HardwareAddr
			must(t, n.Client().Do(func() (err error) {
				got, err = Probe(testnet.Iface, addr)
				return err
			}))
			if len(got) != want {
				t.Fatalf("%s: %v answer, want %d", text, got, want)
			}
			if want == 0 {
				return
			}
			must(t, n.Node().Do(func() error {
				i, err := net.InterfaceByName(testnet.Iface)
				if err == nil && !bytes.Equal(i.HardwareAddr, got[0]) {
					t.Errorf("%s: %v answers, want %v", text, got, i.HardwareAddr)
				}
				return err
			}))
		}
		ask(0)
		must(t, n.Node().Do(func() error { return Add(testnet.Iface, addr) }))
		ask(1)
		must(t, n.Node().Do(func() error { return Remove(testnet.Iface, addr) }))
		ask(0)
		must(t, n.Client().Do(func() error { return Add(testnet.Iface, addr) }))
		ask(0)
	}
}

func TestProbeErrors(t *testing.T) {
	if _, err := Probe("no-such-interface", netip.MustParseAddr("192.0.2.1")); err == nil {
		t.Error("an interface that is not there was asked")
	}
	if got, err := Probe("lo", netip.MustParseAddr("192.0.2.1")); err != nil || len(got) != 0 {
		t.Errorf("lo: %v, %v", got, err)
	}
}

// Whatever is on the link is read without a panic.
func FuzzProbeAnswers(f *testing.F) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	mac := [6]byte{2, 0, 0, 0, 0, 1}
	f.Add(arpFrame(2, mac, v4.As4()))
	f.Add(advertisement(mac, v6.As16()))
	f.Add(arpProbe(mac, v4.As4()))
	f.Fuzz(func(t *testing.T, b []byte) {
		if from, ok := arpAnswer(b, v4); ok && len(from) != 6 {
			t.Errorf("%v", from)
		}
		if from, ok := advertised(b, v6); ok && len(from) != 6 {
			t.Errorf("%v", from)
		}
	})
}
