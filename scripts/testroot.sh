#!/usr/bin/env bash
# Runs the root tests in two halves at once: about as long each. What the second
# says is shown when it has ended. Arguments go to go test.
#
# Usage: scripts/testroot.sh [FLAGS]
set -euo pipefail
cd "$(dirname "$0")/.."
half='^(TestKills|TestBulkWriters|TestSpool|TestSoak|TestHotRestart|TestDiskFull|TestAgentDisk|TestReadOnlyState|TestCRIUAgentCrash|TestCRIUAction|TestCRIUMigrate.*|TestIPv6|TestMigrate.*|TestScheduler.*|TestHibernate|TestCluster.*|TestFilterCrash|TestAgentCrash.*|TestDemo.*|TestBehind)$'
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
go test -count=1 -v "$@" -skip "$half" ./test/ >"$dir/second" 2>&1 &
second=$!
trap 'kill $second 2>/dev/null || true; rm -rf "$dir"' EXIT
code=0
go test -count=1 -v "$@" -run "$half" ./test/ || code=$?
wait $second || code=$?
cat "$dir/second"
exit $code
