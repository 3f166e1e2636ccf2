#!/usr/bin/env bash
# Runs every fuzz target of the module for a while, one after the other.
# Inputs that reach something new are shortened by a few tries only: the default
# of a minute for each would leave no time to look for more.
#
# Usage: scripts/fuzz.sh [TIME]     TIME as of go test -fuzztime, default 30s
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-30s}
found=0
while IFS= read -r pkg; do
	dir=$(go list -f '{{.Dir}}' "$pkg")
	while IFS= read -r target; do
		found=1
		echo "== $pkg $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 50x "$pkg"
	done < <(cat "$dir"/*_test.go 2>/dev/null | sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' | sort -u)
done < <(go list ./...)
if [[ $found -eq 0 ]]; then
	echo "fuzz: no fuzz target found" >&2
	exit 1
fi
