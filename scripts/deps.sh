#!/usr/bin/env bash
# Installs, with apt, the programs that the demo, the tests and the benchmarks
# need and that are not there yet. Nothing is started: a policy-rc.d guard
# refuses every service start while packages are unpacked.
#
# Usage: scripts/deps.sh demo|test|bench
set -euo pipefail

purpose=${1:-test}

# program:package, one a line; a program that is found needs no package.
demo_deps="iptables:iptables ipset:ipset ip:iproute2 redis-server:redis-server redis-cli:redis-tools ethtool:ethtool"
test_deps="$demo_deps nft:nftables nginx:nginx-light wrk:wrk iperf3:iperf3 conntrack:conntrack tcpdump:tcpdump gcc:gcc"
bench_deps="$demo_deps nft:nftables iperf3:iperf3 gcc:gcc taskset:util-linux"

case $purpose in
demo) deps=$demo_deps ;;
test) deps=$test_deps ;;
bench) deps=$bench_deps ;;
*)
	echo "usage: $0 demo|test|bench" >&2
	exit 2
	;;
esac

PATH=$PATH:/usr/sbin:/sbin
missing=()
for dep in $deps; do
	command -v "${dep%%:*}" >/dev/null 2>&1 || missing+=("${dep##*:}")
done
# header:package, for the race detector and the peer in C: the compiler alone is not enough.
case $purpose in
test) headers="stdlib.h:libc6-dev" ;;
bench) headers="stdlib.h:libc6-dev libnetfilter_queue/libnetfilter_queue.h:libnetfilter-queue-dev" ;;
*) headers="" ;;
esac
for dep in $headers; do
	[[ -e /usr/include/${dep%%:*} ]] || missing+=("${dep##*:}")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "deps: not found on this machine: ${missing[*]}; install these (Debian's names), then repeat" >&2
	exit 1
fi
if [[ $(id -u) -ne 0 ]]; then
	command -v sudo >/dev/null 2>&1 || {
		echo "deps: root is needed to install: ${missing[*]}" >&2
		exit 1
	}
	echo "deps: installing ${missing[*]} through sudo" >&2
	exec sudo "$0" "$purpose"
fi

guard=/usr/sbin/policy-rc.d
made_guard=
cleanup() { [[ -z $made_guard ]] || rm -f "$guard"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [[ ! -e $guard ]]; then
	made_guard=1
	printf '#!/bin/sh\nexit 101\n' >"$guard"
	chmod 755 "$guard"
fi

export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
install() { apt-get install -y -q --no-install-recommends "${missing[@]}" >&2; }
echo "deps: installing ${missing[*]}" >&2
# An index that is missing or older than the archive makes the first try fail.
if ! install; then
	apt-get update -q >&2
	install
fi
