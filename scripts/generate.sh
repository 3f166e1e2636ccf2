#!/usr/bin/env bash
# Generates pkg/control/gen from the protobuf file. Needs protoc (Debian:
# protobuf-compiler); the Go plug-ins are built at the versions of go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || {
	echo "generate: protoc not found; install protobuf-compiler" >&2
	exit 1
}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
version() { go list -m -f '{{.Version}}' "$1"; }
GOBIN=$tools go install "google.golang.org/protobuf/cmd/protoc-gen-go@$(version google.golang.org/protobuf)"
GOBIN=$tools go install "connectrpc.com/connect/cmd/protoc-gen-connect-go@$(version connectrpc.com/connect)"
module=$(go list -m)
PATH=$tools:$PATH protoc -I pkg/control/proto \
	--go_out=. --go_opt=module="$module" \
	--connect-go_out=. --connect-go_opt=module="$module" \
	nfconnfilter/v1/nfconnfilter.proto
gofmt -l pkg/control/gen
