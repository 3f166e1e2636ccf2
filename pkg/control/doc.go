// Package control is the way into the connection filter and the agent of a
// node: the Go client (the reference text's connection filter subroutines),
// the server side of both Unix sockets, and the words that every part of the
// project uses for states and requests.
//
// Both sockets speak Connect, so that Connect and gRPC clients and plain HTTP
// with JSON work alike. Who may call is decided once per connection, from the
// credentials that the kernel attaches to a Unix socket (unix(7), SO_PEERCRED
// and SO_PEERGROUPS); nothing that a refused caller sends is read.
//
// The messages are in gen/nfconnfilterv1, generated from proto/.
package control
