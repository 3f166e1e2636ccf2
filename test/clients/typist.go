package clients

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Typist is a client of test/interp that knows by itself what its session must
// remember, and with it every octet of each reply: of everything that it has ever said.
type Typist struct {
	ID int
	*Interp

	said  []string // each request's line
	ints  map[string]int64
	word  string // the string that grows
	blobs uint64
	n     int // steps
}

// DialTypist connects typist id to the interpreter at addr.
func DialTypist(d Dialer, addr string, id int, k KeepAlive) (*Typist, error) {
	c, err := DialInterp(d, addr, k)
	if err != nil {
		return nil, fmt.Errorf("typist %d: %w", id, err)
	}
	return newTypist(c, id), nil
}

func newTypist(c *Interp, id int) *Typist {
	return &Typist{ID: id, Interp: c, ints: map[string]int64{}}
}

// typed is a request with its reply: a line and the octets after it.
type typed struct {
	request []byte
	line    string
	stream  int
	seed    uint64
	at      time.Time
}

// next makes the next request.
func (t *Typist) next() typed {
	n := t.n
	t.n++
	// Numbers that look nothing like those before.
	r := mix(uint64(t.ID)<<32 ^ uint64(n))
	say := func(line, reply string) typed {
		t.said = append(t.said, line)
		return typed{request: []byte(line + "\n"), line: reply}
	}
	name := fmt.Sprintf("n%d", n/10%7)
	switch n % 10 {
	case 0:
		v := int64(r >> 40)
		if old, ok := t.ints[name]; ok {
			t.ints[name] = (old-v)*3 + 7
			return say(fmt.Sprintf("let %s (%s - %d) * 3 + 7", name, name, v), fmt.Sprint(t.ints[name]))
		}
		t.ints[name] = v
		return say(fmt.Sprintf("let %s %d", name, v), fmt.Sprint(v))
	case 1:
		add := fmt.Sprintf("%d.%d ", t.ID, n)
		if len(t.word) > 500 {
			t.word = ""
		}
		was := t.word
		t.word += add
		if was == "" {
			return say(fmt.Sprintf("let word %q", add), fmt.Sprintf("%q", t.word))
		}
		return say(fmt.Sprintf("let word word + %q", add), fmt.Sprintf("%q", t.word))
	case 2:
		return say("print "+name+" * 2", fmt.Sprint(t.ints[name]*2))
	case 3:
		return say("print word", fmt.Sprintf("%q", t.word))
	case 4:
		names := append(slices.Collect(maps.Keys(t.ints)), "word")
		slices.Sort(names)
		return say("names", fmt.Sprintf("%d %s", len(names), strings.Join(names, " ")))
	case 5:
		k := int(r % uint64(len(t.said)))
		return say(fmt.Sprintf("history %d", k+1), t.said[k])
	case 6:
		return say("count", fmt.Sprint(len(t.said)+1))
	case 7:
		a, b := int64(r>>50), int64(r&0xffff)
		lines := fmt.Sprintf("%d\ncount\n%d\n", a, -b)
		q := say("sum 3", fmt.Sprintf("%d %x", a-b, sha256.Sum256([]byte(lines))))
		q.request = append(q.request, lines...)
		return q
	case 8:
		b := make([]byte, 1+r%3000)
		Fill(b, r, 0)
		t.blobs += uint64(len(b))
		q := say(fmt.Sprintf("blob %d", len(b)), fmt.Sprintf("%x %d", sha256.Sum256(b), t.blobs))
		q.request = append(q.request, b...)
		return q
	}
	size := int(r % 5000)
	q := say(fmt.Sprintf("gen %d %d", size, r), fmt.Sprint(size))
	q.stream, q.seed = size, r
	return q
}

// check reads the reply to q.
func (t *Typist) check(q typed) error {
	line, _, _ := bytes.Cut(q.request, []byte("\n"))
	got, err := t.Reply()
	if err == nil && got != q.line || errors.Is(err, ErrRefused) {
		err = fmt.Errorf("%w %.200q, want %.200q", ErrWrong, got, q.line)
	} else if err == nil {
		err = t.Stream(q.stream, q.seed)
	}
	if err != nil {
		return fmt.Errorf("typist %d (%v), %.60s: %w", t.ID, t.LocalAddr(), line, err)
	}
	return nil
}

// Type sends one request and checks its reply.
func (t *Typist) Type() error {
	q := t.next()
	if err := t.Write(q.request); err != nil {
		return fmt.Errorf("typist %d (%v): %w", t.ID, t.LocalAddr(), err)
	}
	return t.check(q)
}

// Typists are many, each with a session of its own.
type Typists []*Typist

// OpenTypists connects n of them, numbered from first on, their keepalive
// settings taken from mix in turn (Mixed when it is empty).
func OpenTypists(d Dialer, addr string, first, n int, mix ...KeepAlive) (Typists, error) {
	if len(mix) == 0 {
		mix = Mixed
	}
	var all Typists
	for i := range n {
		t, err := DialTypist(d, addr, first+i, mix[i%len(mix)])
		if err != nil {
			all.Close()
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

// Close closes every connection.
func (all Typists) Close() {
	for _, t := range all {
		t.Close()
	}
}

// Round lets every typist send one request and check its reply; the errors are
// one a typist. Not while they are typing on.
func (all Typists) Round() []error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for _, t := range all {
		wg.Go(func() {
			if err := t.Type(); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return errs
}

// Idle checks every connection without sending anything.
func (all Typists) Idle() []error {
	var errs []error
	for _, t := range all {
		if err := t.Idle(); err != nil {
			errs = append(errs, fmt.Errorf("typist %d (%v): %w", t.ID, t.LocalAddr(), err))
		}
	}
	return errs
}

// Typing is typists at work.
type Typing struct {
	stop   chan struct{}
	failed chan struct{} // closed with the first error
	wg     sync.WaitGroup

	mu     sync.Mutex
	report Typed
}

// Typed is what has come of it.
type Typed struct {
	Sent, Right, Wrong int
	Each               []int // right replies of each typist
	Slowest            time.Duration
	SlowestAt          time.Time // when that request was sent
	Errors             []TypingError
}

// TypingError is a wrong reply, or what has ended a connection.
type TypingError struct {
	At  time.Time
	ID  int
	Err error
}

func (e TypingError) Unwrap() error { return e.Err }

func (e TypingError) Error() string { return e.At.Format("15:04:05.000 ") + e.Err.Error() }

// Err joins the errors, the earliest first; nil when every reply was right.
func (r Typed) Err() error {
	errs := make([]error, len(r.Errors))
	for i, e := range r.Errors {
		errs[i] = e
	}
	return Summary(errs)
}

// Type has every typist send a request each time pause is over, from a place of
// its own in the first pause on, whether or not replies have come, but never more
// than ahead of them beyond the last reply. A typist goes on after a wrong reply, and
// is silent once its connection has failed.
func (all Typists) Type(pause time.Duration, ahead int) *Typing {
	w := &Typing{stop: make(chan struct{}), failed: make(chan struct{}), report: Typed{Each: make([]int, len(all))}}
	for i, t := range all {
		w.wg.Go(func() { w.run(i, t, pause*time.Duration(i)/time.Duration(len(all)), pause, ahead) })
	}
	return w
}

func (w *Typing) run(i int, t *Typist, first, pause time.Duration, ahead int) {
	room := make(chan struct{}, ahead) // an entry for each request without a reply
	sent := make(chan typed, ahead)
	over := make(chan struct{})
	w.wg.Go(func() {
		defer close(over)
		for q := range sent {
			err := t.check(q)
			w.note(i, t.ID, q.at, err)
			if err != nil && !errors.Is(err, ErrWrong) {
				return
			}
			<-room
		}
	})
	defer close(sent)
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-over:
			return
		case <-timer.C:
		}
		timer.Reset(pause)
		select {
		case <-w.stop:
			return
		case <-over:
			return
		case room <- struct{}{}:
		}
		q := t.next()
		q.at = time.Now()
		w.mu.Lock()
		w.report.Sent++
		w.mu.Unlock()
		sent <- q // a reply may come before the last octet is written
		if err := t.Write(q.request); err != nil {
			// The one that reads says why.
			t.conn.CloseWrite()
			return
		}
	}
}

func (w *Typing) note(i, id int, at time.Time, err error) {
	took := time.Since(at)
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &w.report
	if took > r.Slowest {
		r.Slowest, r.SlowestAt = took, at
	}
	if err == nil {
		r.Right++
		r.Each[i]++
		return
	}
	if errors.Is(err, ErrWrong) {
		r.Wrong++
	}
	if len(r.Errors) == 0 {
		close(w.failed)
	}
	r.Errors = append(r.Errors, TypingError{At: time.Now(), ID: id, Err: err})
}

// Failed is closed with the first error.
func (w *Typing) Failed() <-chan struct{} { return w.failed }

// Report tells what has come so far.
func (w *Typing) Report() Typed { return w.look(false) }

// Fresh is Report, and from now on the slowest reply is looked for anew.
func (w *Typing) Fresh() Typed { return w.look(true) }

func (w *Typing) look(anew bool) Typed {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.report
	r.Each, r.Errors = slices.Clone(r.Each), slices.Clone(r.Errors)
	if anew {
		w.report.Slowest, w.report.SlowestAt = 0, time.Time{}
	}
	return r
}

// Stop waits until every request that was sent has its reply, and reports. The
// typists can type on afterwards.
func (w *Typing) Stop() Typed {
	close(w.stop)
	w.wg.Wait()
	return w.Report()
}
