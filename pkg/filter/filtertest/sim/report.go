package sim

import (
	"fmt"
	"strings"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// add adds the numbers of o.
func (r *Report) add(o *Report) {
	if o == nil {
		return
	}
	r.Simulated += o.Simulated
	r.Held += o.Held
	for _, p := range [][2]*int{
		{&r.Clients, &o.Clients}, {&r.Packets, &o.Packets}, {&r.Injected, &o.Injected}, {&r.Dropped, &o.Dropped},
		{&r.Lost, &o.Lost}, {&r.Duplicated, &o.Duplicated}, {&r.Reordered, &o.Reordered}, {&r.Corrupted, &o.Corrupted},
		{&r.Snapshots, &o.Snapshots}, {&r.SnapshotAborts, &o.SnapshotAborts}, {&r.Refused, &o.Refused}, {&r.AtLines, &o.AtLines}, {&r.Lines, &o.Lines},
		{&r.Restores, &o.Restores}, {&r.RestoreAborts, &o.RestoreAborts}, {&r.Crashes, &o.Crashes}, {&r.Wakes, &o.Wakes},
		{&r.DroppedDown, &o.DroppedDown}, {&r.Outsiders, &o.Outsiders}, {&r.Again, &o.Again}, {&r.Reboots, &o.Reboots}, {&r.Spools, &o.Spools}, {&r.Dials, &o.Dials}, {&r.Beats, &o.Beats}, {&r.Sends, &o.Sends},
	} {
		*p[0] += *p[1]
	}
	for i, n := range o.Reasons {
		r.Reasons[i] += n
	}
}

func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "simulated %v (held %v), %d clients (%d came again), %d packets, %d injected; link: %d lost, %d duplicated, %d reordered, %d corrupted; "+
		"%d snapshots (%d given up, %d refused, %d at lines with %d connections behind one, %d with a spool), %d restores (%d given up), %d filters ended (%d packets dropped meanwhile), %d reboots, %d wake-ups, %d of outsiders; %d connections of the application; heartbeats: %d of clients, %d to them;",
		r.Simulated, r.Held, r.Clients, r.Again, r.Packets, r.Injected, r.Lost, r.Duplicated, r.Reordered, r.Corrupted,
		r.Snapshots, r.SnapshotAborts, r.Refused, r.AtLines, r.Lines, r.Spools, r.Restores, r.RestoreAborts, r.Crashes, r.DroppedDown, r.Reboots, r.Wakes, r.Outsiders, r.Dials, r.Beats, r.Sends)
	for i, n := range r.Reasons {
		if n > 0 {
			fmt.Fprintf(&b, " %v %d", filter.Reason(i), n)
		}
	}
	return b.String()
}
