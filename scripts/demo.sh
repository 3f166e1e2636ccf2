#!/usr/bin/env bash
# The demonstration: needs root for its network namespaces, and asks for it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $(id -u) -ne 0 ]]; then
	command -v sudo >/dev/null 2>&1 || {
		echo "demo: run it as root: it makes network namespaces and filters packets in them" >&2
		exit 1
	}
	echo "demo: network namespaces need root, asking sudo" >&2
	exec sudo "$PWD/scripts/demo.sh" "$@"
fi
scripts/deps.sh demo
PATH=$PATH:/usr/sbin:/sbin
exec bin/demo --bin "$PWD/bin" "$@"
