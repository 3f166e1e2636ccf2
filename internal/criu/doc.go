// Package criu runs CRIU: its service protocol (criu/images/rpc.proto), its log and the
// sockets in its images. It knows nothing of applications or filters.
package criu
