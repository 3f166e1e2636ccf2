// Package clients holds checked clients for the root tests and the demo: each
// knows every byte that it must see, so that a lost, repeated or altered byte,
// a reset and a close are all told apart and reported with the place.
//
// Sockets are made by a Dialer that the caller supplies, so that they can live
// in any network namespace.
package clients
