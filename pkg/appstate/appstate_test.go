package appstate

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// The request table, row by row: where it is allowed and what it leads to.
var requests = map[Request]struct {
	from []App
	to   App
	stay bool
}{
	ReqRegister:       {[]App{Unknown}, Connected, false},
	ReqUnregister:     {[]App{Connected, Restored}, Unknown, false},
	ReqSnapshotStart:  {[]App{Connected, Restored}, SnapshotStart, false},
	ReqSnapshotFreeze: {[]App{SnapshotStart}, SnapshotFreeze, false},
	ReqSeal:           {[]App{SnapshotFreeze}, Unknown, true},
	ReqSnapshotDone:   {[]App{SnapshotFreeze}, SnapshotDone, false},
	ReqSnapshotAbort:  {[]App{SnapshotStart, SnapshotFreeze}, Restored, false},
	ReqRestoreStart:   {[]App{SnapshotDone}, RestoreStart, false},
	ReqRestoreConn:    {[]App{RestoreStart}, Unknown, true},
	ReqRestored:       {[]App{RestoreStart}, Restored, false},
	ReqRestoreAbort:   {[]App{RestoreStart}, SnapshotDone, false},
	ReqAdopt:          {[]App{Connected, Restored, SnapshotStart}, Unknown, true},
	ReqHandover:       {[]App{SnapshotDone}, BlockData, false},
	ReqHandback:       {[]App{BlockData}, SnapshotDone, false},
	ReqRelease:        {[]App{BlockData}, Unknown, false},
	ReqRestoreTaken:   {[]App{SnapshotDone, BlockData, Unknown}, RestoreStart, false},
	ReqYield:          {[]App{RestoreStart, SnapshotDone}, BlockData, false},
	ReqUnyield:        {[]App{BlockData}, RestoreStart, false},
}

func TestRequests(t *testing.T) {
	if len(requests) != len(table) {
		t.Errorf("%d requests, %d are tested", len(table), len(requests))
	}
	for r, row := range requests {
		for a := Unknown; a <= BlockData; a++ {
			done, err := Permit("x", r, a, false)
			switch {
			case slices.Contains(row.from, a):
				if done || err != nil {
					t.Errorf("%v in %v: %v, %v, want it allowed", r, a, done, err)
				}
				want := row.to
				if row.stay {
					want = a
				}
				if To(r, a) != want {
					t.Errorf("%v in %v leads to %v", r, a, To(r, a))
				}
			case !row.stay && a == row.to:
				if !done || err != nil {
					t.Errorf("%v repeated in %v: %v, %v, want success", r, a, done, err)
				}
			default:
				var se *StateError
				if !errors.As(err, &se) || se.State != a || se.Request != r || !strings.Contains(err.Error(), r.String()) {
					t.Errorf("%v in %v: %v, want a StateError that names both", r, a, err)
				}
				if a != Unknown && !strings.Contains(err.Error(), a.String()) {
					t.Errorf("%v: the state is not named", err)
				}
			}
		}
	}
	if _, err := Permit("x", ReqUnregister, SnapshotDone, true); err != nil {
		t.Errorf("forced UNREGISTER in SNAPSHOTDONE: %v", err)
	}
}

func TestNames(t *testing.T) {
	for a := Unknown; a <= BlockData; a++ {
		if b, ok := ParseApp(a.String()); !ok || b != a {
			t.Errorf("%v reads back as %v", a, b)
		}
	}
	if _, ok := ParseApp("ASLEEP"); ok {
		t.Error("ASLEEP is no state")
	}
}

func TestConnTransitions(t *testing.T) {
	for _, c := range []struct {
		path []Conn
		ok   bool
	}{
		{[]Conn{SynRcvd, Connect, ConnectRmt, Restoring, Connect, Closing, Removed}, true},
		{[]Conn{SynRcvd, Connect, ConnectRmt, Rst, Restoring, Removed}, true},
		{[]Conn{SynSent, Connect, Closing, ConnectRmt, Restoring, ConnectRmt}, true},
		{[]Conn{Removed, Connect}, false},
		{[]Conn{Rst, Connect}, false},
		{[]Conn{SynSent, ConnectRmt}, false},
	} {
		ok := true
		for i := 1; i < len(c.path); i++ {
			ok = ok && c.path[i-1].CanFollow(c.path[i])
		}
		if ok != c.ok {
			t.Errorf("%v: %v, want %v", c.path, ok, c.ok)
		}
	}
	for a := ConnNone; a <= Removed; a++ {
		if !a.CanFollow(a) {
			t.Errorf("%v cannot stay", a)
		}
	}
}

func TestAway(t *testing.T) {
	for a := Unknown; a <= BlockData; a++ {
		if want := a == SnapshotFreeze || a == SnapshotDone || a == RestoreStart; a.Away() != want {
			t.Errorf("%v.Away() = %v", a, a.Away())
		}
		if want := a.Away() || a == BlockData; a.Captured() != want {
			t.Errorf("%v.Captured() = %v", a, a.Captured())
		}
	}
}
