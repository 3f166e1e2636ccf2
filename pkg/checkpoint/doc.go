// Package checkpoint is the agent of a node: it starts and stops applications,
// snapshots and restores them with the restart engine, keeps the snapshots,
// and takes restore requests from the filter.
//
// The agent drives the connection filter through its control socket and finds
// out about sockets by inet_diag. It parses no packets. What it needs of the
// outside (filter, sockets, addresses, processes) stands behind small
// interfaces, so that each step of a snapshot is tested without them.
//
// One operation at a time runs for an application. Until the filter is told to
// seal, a snapshot that fails or is cancelled is undone and the application
// runs on; after it, the snapshot goes on to its end whatever happens to the
// caller.
package checkpoint
