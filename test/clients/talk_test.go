package clients

import (
	"bufio"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// speaker answers, over each connection, as Redis does to the first commands of
// a client, so many of them, and then with nonsense.
func speaker(t *testing.T, right int) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for n := 0; ; n++ {
					args, err := command(r)
					if err != nil {
						return
					}
					if n == right {
						_, _ = c.Write([]byte("-NO\r\n"))
						return
					}
					answers := []string{":1\r\n", "+OK\r\n"} // INCR, SET
					if n >= len(answers) {
						answers = append(answers, string(bulk(args[len(args)-1])))
					}
					_, _ = c.Write([]byte(answers[min(n, len(answers)-1)]))
				}
			}()
		}
	}()
	return l.Addr().String()
}

// command reads one array of bulk strings.
func command(r *bufio.Reader) (args []string, err error) {
	head, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	for range int(head[1] - '0') {
		if _, err := r.ReadString('\n'); err != nil {
			return nil, err
		}
		arg, err := r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		args = append(args, strings.TrimSuffix(arg, "\r\n"))
	}
	return args, nil
}

// TestTalk: every client speaks until it is stopped, and a wrong reply shows.
func TestTalk(t *testing.T) {
	dial := func(addr string) (net.Conn, error) { return net.Dial("tcp", addr) }
	good, err := OpenLoad(dial, speaker(t, -1), 0, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	talk := good.Talk(time.Millisecond, 5*time.Second)
	deadline := time.Now().Add(5 * time.Second)
	for slices.Min(talk.Replies()) < 2 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	n, slowest := talk.Commands()
	if n < 10 || slowest <= 0 {
		t.Errorf("%d replies, the slowest after %v", n, slowest)
	}
	if errs := talk.Stop(); slices.Min(talk.Replies()) < 2 {
		t.Errorf("replies %v, %v", talk.Replies(), errs)
	}

	bad, err := OpenLoad(dial, speaker(t, 1), 0, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	talk = bad.Talk(time.Millisecond, 5*time.Second)
	select {
	case <-talk.Failed():
	case <-time.After(5 * time.Second):
		t.Error("wrong replies were not noticed")
	}
	errs := talk.Stop()
	if len(errs) == 0 || !strings.Contains(errs[0].Error(), "wrong reply") {
		t.Errorf("%v", errs)
	}
	for i, n := range talk.Replies() {
		if n > 1 {
			t.Errorf("client %d had %d right replies, the server gave one", i, n)
		}
	}
}
