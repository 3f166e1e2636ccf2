#!/bin/sh
# nfcf-rules.sh - the packet rules of nfconnfilter, to read and to run.
#
#   nfcf-rules.sh [--queue N] [--mark M] [--mask M] [--maxelem N]    write them
#   nfcf-rules.sh --purge                                            remove every rule and set
#
# The filter writes the same rules by itself when it starts. Run this by hand to see that a node can carry
# them, to put them up before the filter starts (boot), or to clean up after it. Running it again changes
# nothing that is right already: set contents stay, chains are replaced in one transaction.
#
# How it works: the rules never change. They look addresses up in sets, and the filter adds and removes set
# entries:
#   vip   VIPs of registered applications: SYN, FIN and RST are queued, bulk never leaves the kernel
#   full  VIPs of which everything is queued (a snapshot is announced)
#   away  VIPs whose application is frozen or gone: everything is queued, and dropped without a filter
#   active  VIPs with anything in full, away or flow: only of these is bulk looked at, and ICMP errors queued
#   skip  VIP,tcp:port that is never captured
#   flow  remote,tcp:port,VIP of connections whose numbers are translated; dropped without a filter
# --queue-bypass lets packets pass while no filter runs. The rules without it stand first.
# NFCF-FWD is for applications in a network namespace behind the node: what they send comes in by the device to
# which the node routes their VIP. What has a VIP as its source and comes in elsewhere is forged, and dropped.
set -eu

queue=64
mark=0x4e460000
mask=0xffff0000
maxelem=1048576
purge=no

usage() {
	echo "usage: $0 [--queue N] [--mark M] [--mask M] [--maxelem N] | --purge" >&2
	exit 2
}

number() {
	case $2 in
	'' | *[!0-9a-fA-FxX]*) echo "$0: $1 needs a number, not '$2'" >&2; exit 2 ;;
	esac
}

while [ $# -gt 0 ]; do
	case $1 in
	--purge) purge=yes; shift; continue ;;
	--queue | --mark | --mask | --maxelem) [ $# -ge 2 ] || usage ;;
	*) usage ;;
	esac
	number "$1" "$2"
	case $1 in
	--queue) queue=$2 ;;
	--mark) mark=$2 ;;
	--mask) mask=$2 ;;
	--maxelem) maxelem=$2 ;;
	esac
	shift 2
done

PATH=$PATH:/usr/sbin:/sbin
for tool in iptables ipset; do
	command -v $tool >/dev/null || { echo "$0: $tool is not there: install the package $tool" >&2; exit 1; }
done

# The mark of injected packets that connection tracking must not see.
notrack=$(printf '0x%x' $((mark | 1)))
mark=$(printf '0x%x' $((mark)))
mask=$(printf '0x%x' $((mask)))

# jumps IPTABLES TABLE HOOK CHAIN SET DIRECTION: what leads to a chain, first in its hook: SYN, FIN and RST, and
# everything of active VIPs. Bulk of other VIPs meets no more than these two. Jumps that are there are replaced.
jumps() {
	$1 -w -t "$2" -S "$3" | sed -n "s/^-A \($3\( .*\)* -j $4\)\$/-D \1/p"
	echo "-I $3 1 -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -j $4"
	echo "-I $3 2 -m set --match-set $5 $6 -j $4"
	# what the filter injects to the application: connection tracking must not see all of it
	if [ "$3" = OUTPUT ]; then echo "-I $3 3 -m set --match-set $5 dst -j $4"; fi
}

# forward IPTABLES PREFIX: everything that active VIPs behind the node send, third in PREROUTING.
forward() {
	$1 -w -t raw -S PREROUTING | sed -n "s/^-A \(PREROUTING\( .*\)* -j NFCF-FWD\)\$/-D \1/p"
	echo "-I PREROUTING 3 -m set --match-set $2active src -j NFCF-FWD"
}

# resets IPTABLES: every RST of the node, fourth in OUTPUT.
resets() {
	$1 -w -t raw -S OUTPUT | sed -n "s/^-A \(OUTPUT\( .*\)* -j NFCF-RST\)\$/-D \1/p"
	echo "-I OUTPUT 4 -p tcp -m tcp --tcp-flags RST RST -j NFCF-RST"
}

# sets PREFIX FAMILY
sets() {
	ipset create -exist "$1vip" hash:ip family "$2" maxelem 65536
	ipset create -exist "$1full" hash:ip family "$2" maxelem 65536
	ipset create -exist "$1away" hash:ip family "$2" maxelem 65536
	ipset create -exist "$1active" hash:ip family "$2" maxelem 65536
	ipset create -exist "$1skip" hash:ip,port family "$2" maxelem 65536
	ipset create -exist "$1flow" hash:ip,port,ip family "$2" maxelem "$maxelem"
}

# icmp_errors IPTABLES PREFIX: destination unreachable, time exceeded, parameter problem (and packet too big)
icmp_errors() {
	case $1 in
	iptables) match='-p icmp -m icmp --icmp-type' types='3 11 12' ;;
	*) match='-p ipv6-icmp -m icmp6 --icmpv6-type' types='1 2 3 4' ;;
	esac
	for t in $types; do
		echo "-A NFCF-IN $match $t -m set --match-set $2active dst -j NFQUEUE --queue-num $queue --queue-bypass"
	done
}

# rules IPTABLES PREFIX
rules() {
	# Before connection tracking: what comes from the remote, and what a dying or held application sends.
	"$1-restore" -w --noflush <<-EOF
		*raw
		:NFCF-IN - [0:0]
		:NFCF-FWD - [0:0]
		:NFCF-OUT - [0:0]
		:NFCF-RST - [0:0]
		# the filter's own packets
		-A NFCF-IN -m mark --mark $notrack -j CT --notrack
		-A NFCF-IN -m mark --mark $mark/$mask -j RETURN
		# the node itself, ports that are never captured
		-A NFCF-IN -i lo -j RETURN
		-A NFCF-IN -m set --match-set $2skip dst,dst -j RETURN
		# never without the filter
		-A NFCF-IN -p tcp -m set --match-set $2away dst -j NFQUEUE --queue-num $queue
		-A NFCF-IN -p tcp -m set --match-set $2flow src,src,dst -j NFQUEUE --queue-num $queue
		# with the filter, if it runs
		-A NFCF-IN -p tcp -m set --match-set $2full dst -j NFQUEUE --queue-num $queue --queue-bypass
		-A NFCF-IN -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -m set --match-set $2vip dst -j NFQUEUE --queue-num $queue --queue-bypass
		$(icmp_errors "$1" "$2")
		# what a namespace behind the node sends
		-A NFCF-IN -p tcp -m set --match-set $2vip src -j NFCF-FWD
		-A NFCF-FWD -m rpfilter --invert -j DROP
		-A NFCF-FWD -m addrtype --dst-type LOCAL -j RETURN
		-A NFCF-FWD -m set --match-set $2skip src,src -j RETURN
		-A NFCF-FWD -p tcp -m set --match-set $2away src -j NFQUEUE --queue-num $queue
		-A NFCF-FWD -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -m set --match-set $2vip src -j NFQUEUE --queue-num $queue --queue-bypass
		-A NFCF-OUT -m mark --mark $notrack -j CT --notrack
		-A NFCF-OUT -m mark --mark $mark/$mask -j RETURN
		-A NFCF-OUT -o lo -j RETURN
		-A NFCF-OUT -m set --match-set $2skip src,src -j RETURN
		-A NFCF-OUT -p tcp -m set --match-set $2away src -j NFQUEUE --queue-num $queue
		-A NFCF-OUT -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -m set --match-set $2vip src -j NFQUEUE --queue-num $queue --queue-bypass
		# a RST of the kernel's for a held connection, also when another program has emptied the sets
		-A NFCF-RST -m mark --mark $mark/$mask -j RETURN
		-A NFCF-RST -o lo -j RETURN
		-A NFCF-RST -p tcp -j NFQUEUE --queue-num $queue --queue-bypass
		$(jumps "$1" raw PREROUTING NFCF-IN "$2active" dst)
		$(forward "$1" "$2")
		$(jumps "$1" raw OUTPUT NFCF-OUT "$2active" src)
		$(resets "$1")
		COMMIT
	EOF
	# After connection tracking, which so sees local numbers only: what goes to the remote. The filter has
	# this chain, the jump to NFCF-RST and the second one to the others, only while something is away or translated, and the jump to
	# NFCF-FWD only if a VIP is not the node's own address: bulk is faster without them.
	"$1-restore" -w --noflush <<-EOF
		*mangle
		:NFCF-POST - [0:0]
		-A NFCF-POST -m mark --mark $mark/$mask -j RETURN
		-A NFCF-POST -o lo -j RETURN
		-A NFCF-POST -m set --match-set $2skip src,src -j RETURN
		-A NFCF-POST -p tcp -m set --match-set $2flow dst,dst,src -j NFQUEUE --queue-num $queue
		-A NFCF-POST -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -m set --match-set $2away src -j NFQUEUE --queue-num $queue
		-A NFCF-POST -p tcp -m set --match-set $2full src -j NFQUEUE --queue-num $queue --queue-bypass
		-A NFCF-POST -p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE -m set --match-set $2vip src -j NFQUEUE --queue-num $queue --queue-bypass
		$(jumps "$1" mangle POSTROUTING NFCF-POST "$2active" src)
		COMMIT
	EOF
}

# unhook IPTABLES TABLE HOOK CHAIN
unhook() {
	$1 -w -t "$2" -S "$3" 2>/dev/null | sed -n "s/^-A \($3\( .*\)* -j $4\)\$/-D \1/p" | while read -r rule; do
		# shellcheck disable=SC2086 # the words of a rule
		$1 -w -t "$2" $rule
	done
	if $1 -w -t "$2" -S "$4" >/dev/null 2>&1; then
		$1 -w -t "$2" -F "$4"
		$1 -w -t "$2" -X "$4"
	fi
}

# remove IPTABLES PREFIX
remove() {
	unhook "$1" raw PREROUTING NFCF-IN
	unhook "$1" raw PREROUTING NFCF-FWD
	unhook "$1" raw OUTPUT NFCF-OUT
	unhook "$1" raw OUTPUT NFCF-RST
	unhook "$1" mangle POSTROUTING NFCF-POST
	for s in vip full away active skip flow; do
		# The kernel lets go of a set a moment after the last rule that named it.
		tries=50
		while ipset list -n "$2$s" >/dev/null 2>&1 && ! ipset destroy "$2$s" 2>/dev/null; do
			tries=$((tries - 1))
			[ $tries -gt 0 ] || { ipset destroy "$2$s"; exit 1; }
			sleep 0.1
		done
	done
}

ipv6=no
if command -v ip6tables >/dev/null && ip6tables -w -t raw -S >/dev/null 2>&1; then ipv6=yes; fi

if [ $purge = yes ]; then
	remove iptables nfcf4-
	if [ $ipv6 = yes ]; then remove ip6tables nfcf6-; fi
	exit 0
fi
sets nfcf4- inet
rules iptables nfcf4-
if [ $ipv6 = yes ]; then
	sets nfcf6- inet6
	rules ip6tables nfcf6-
fi
