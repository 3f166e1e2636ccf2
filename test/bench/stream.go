package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/nfconnfilter/nfconnfilter/internal/testnet"
	"github.com/nfconnfilter/nfconnfilter/test/harness"
)

const (
	vip  = "10.77.0.100"
	port = 5201
)

// streamTarget is the least median ratio of an iperf3 stream through a VIP to
// one where nothing of this project runs.
const streamTarget = 0.97

// streams measures what the filter costs a bulk stream in both directions while
// no application is away, in pairs that alternate in order.
func streams(bin string, behind bool, pairs int, length time.Duration) (err error) {
	server := harness.App{Name: "iperf", Namespace: behind, VIP: vip, Ports: []int{port}, Start: []string{"iperf3", "-s", "-B", vip, "-p", strconv.Itoa(port)}}
	filtered, err := harness.New(harness.Options{Name: "bench", Bin: bin, Apps: []harness.App{server}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, filtered.Close()) }()
	if err := filtered.Up(); err != nil {
		return fmt.Errorf("%w\n%s", err, filtered.Logs())
	}
	raw, err := harness.New(harness.Options{Name: "raw", Bin: bin})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, raw.Close()) }()
	place, iface := raw.Net.Node(), testnet.Iface
	if behind {
		if err := raw.AddBehind(server.Name, vip); err != nil {
			return err
		}
		place, iface = raw.Behind(server.Name), "lo"
	}
	if err := place.AddAddr(iface, vip+"/32"); err != nil {
		return err
	}
	cmd := place.Command(server.Start[0], server.Start[1:]...)
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if err := harness.Wait(5*time.Second, "iperf3 listens", func() bool {
		c, err := raw.Dial(net.JoinHostPort(vip, strconv.Itoa(port)))
		if err == nil {
			c.Close()
		}
		return err == nil
	}); err != nil {
		return err
	}
	for _, direction := range []string{"to the VIP", "from the VIP"} {
		ratio, derr := compare(filtered, raw, direction, pairs, length)
		if derr != nil {
			return derr
		}
		if ratio < streamTarget {
			err = errors.Join(err, fmt.Errorf("%s: median ratio %.3f, target %.2f", direction, ratio, streamTarget))
		}
	}
	return err
}

// compare runs the pairs of one direction and returns the median ratio.
func compare(filtered, raw *harness.Node, direction string, pairs int, length time.Duration) (float64, error) {
	fmt.Printf("one iperf3 stream %s, %d pairs of %v, Gbit/s\n  pair    raw  through VIP  ratio\n", direction, pairs, length)
	var ratios []float64
	for i := range pairs {
		order := []*harness.Node{raw, filtered}
		if i%2 == 1 {
			slices.Reverse(order)
		}
		rate := map[*harness.Node]float64{}
		for _, n := range order {
			r, err := stream(n, direction == "from the VIP", length)
			if err != nil {
				return 0, err
			}
			rate[n] = r
		}
		ratio := rate[filtered] / rate[raw]
		ratios = append(ratios, ratio)
		fmt.Printf("  %4d %6.2f  %11.2f  %5.3f\n", i+1, rate[raw], rate[filtered], ratio)
	}
	m := median(ratios)
	fmt.Printf("  median ratio %.3f, target %.2f\n", m, streamTarget)
	return m, nil
}

// stream runs one iperf3 client and returns what the receiver got, in Gbit/s.
func stream(n *harness.Node, reverse bool, length time.Duration) (float64, error) {
	args := []string{"-c", vip, "-p", strconv.Itoa(port), "-J", "-t", strconv.Itoa(int(length.Seconds()))}
	if reverse {
		args = append(args, "-R")
	}
	out, err := n.Net.Client().Command("iperf3", args...).Output()
	var report struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if jerr := json.Unmarshal(out, &report); jerr != nil {
		return 0, fmt.Errorf("iperf3: %w", errors.Join(err, jerr))
	}
	if report.Error != "" || err != nil {
		return 0, fmt.Errorf("iperf3: %s %v", report.Error, err)
	}
	if report.End.Received.BitsPerSecond <= 0 {
		return 0, errors.New("iperf3 received nothing")
	}
	return report.End.Received.BitsPerSecond / 1e9, nil
}
