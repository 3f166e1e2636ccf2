#!/usr/bin/env bash
# Puts a CRIU that works on this kernel where the tests and the demo find it,
# without touching a library of the system: prints the path of its command.
#
# A criu on PATH that is new enough is preferred. Otherwise Debian's packages of
# it and of every library that it needs are unpacked below DIR, and a wrapper
# starts it there through its own dynamic linker.
#
# Usage: scripts/criu.sh [DIR]        default: /var/cache/nfconnfilter-criu
#   CRIU_SUITE   the suite of Debian that it comes from, default unstable
set -euo pipefail

# Older ones fail on kernels since 6.16: they cannot dump sockets there.
least=4.2
suite=${CRIU_SUITE:-unstable}
dir=${1:-/var/cache/nfconnfilter-criu}
command=$dir/criu

say() { echo "criu: $*" >&2; }

# version COMMAND: its version, nothing where it does not run.
version() { "$1" --version 2>/dev/null | sed -n 's/^Version: *//p' | head -n 1; }

new_enough() { [[ -n $1 && $(printf '%s\n%s\n' "$least" "$1" | sort -V | head -n 1) == "$least" ]]; }

PATH=$PATH:/usr/sbin:/sbin
if found=$(command -v criu); then
	if new_enough "$(version "$found")"; then
		echo "$found"
		exit 0
	fi
	say "$found is older than $least, another one is looked for"
fi
if [[ -x $command ]] && new_enough "$(version "$command")"; then
	echo "$command"
	exit 0
fi

for tool in apt-get dpkg; do
	command -v "$tool" >/dev/null 2>&1 || {
		say "no criu >= $least on PATH, and no $tool to get one; install criu >= $least and repeat"
		exit 1
	}
done
machine=$(dpkg --print-architecture)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -r $keyring ]] || {
	say "$keyring is missing; install debian-archive-keyring, or criu >= $least yourself"
	exit 1
}
mkdir -p "$dir" 2>/dev/null && [[ -w $dir ]] || {
	say "$dir cannot be written; run this as root, or name another directory"
	exit 1
}

work=$(mktemp -d "$dir/.new-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,root}
: >"$work/status" # nothing counts as installed: every library comes along
echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main" >"$work/sources.list"
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=-
	-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Dir::State::status=$work/status"
	-o APT::Sandbox::User=root)

say "getting criu from Debian's $suite into $dir"
"${apt[@]}" update >&2
"${apt[@]}" -y --no-install-recommends --print-uris install criu | sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p" >"$work/packages"
[[ -s $work/packages ]] || {
	say "Debian's $suite has no criu for $machine"
	exit 1
}
(cd "$work/debs" && xargs "${apt[@]}" download <"$work/packages") >&2
for deb in "$work"/debs/*.deb; do
	dpkg -x "$deb" "$work/root"
done

# The wrapper names the final place; what is there is replaced as a whole.
linker=$(cd "$work/root" && find usr/lib -name 'ld-linux*.so.*' | head -n 1)
program=$(cd "$work/root" && find usr -path '*bin/criu' -type f | head -n 1)
[[ -n $linker && -n $program ]] || {
	say "the packages hold no criu, or no dynamic linker"
	exit 1
}
cat >"$work/criu" <<EOF
#!/bin/sh
root=$dir/root
exec "\$root/$linker" --library-path "\$root/$(dirname "$linker")" "\$root/$program" "\$@"
EOF
chmod 755 "$work/criu"
rm -rf "$dir/root"
mv "$work/root" "$dir/root"
mv -f "$work/criu" "$command"

got=$(version "$command")
new_enough "$got" || {
	say "$command says version '${got:-none}', $least is needed"
	exit 1
}
say "criu $got is $command"
echo "$command"
