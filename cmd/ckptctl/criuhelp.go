package main

const criuActionHelp = `criu-action is an action script for people who call CRIU themselves, or have
podman or runc call it: clients of the process that is dumped stay connected
while it is away, as with ckptctl snapshot. CRIU runs it and tells it in the
environment what it does:

  pre-dump        freezes every connection (so does network-lock, where that
                  comes alone)
  post-dump       compares CRIU's images with what the filter has seen; a
                  connection that cannot be held cancels the dump, and the
                  process runs on
  CRIU's end      where CRIU has ended the process, the filter answers the
                  clients and there is a snapshot; where it has let it run on
                  (--leave-running), or has failed, the connections go on
  pre-restore     brings the addresses and clears old sockets
  post-restore    looks whether every socket is there again, or cancels the
                  restore
  pre-resume      opens the connections; if CRIU ends before, clients stay held

Other actions pass. ckptctl agent and nfconnfilter run must run.

CRIU passes no arguments, so it runs a link, or a script of one line:

  ln -s ckptctl /usr/sbin/ckptctl-criu-action

  #!/bin/sh
  exec /usr/sbin/ckptctl --node /etc/nfconnfilter/node.toml criu-action --app redis

What CRIU needs: --tcp-established, and --network-lock skip, or its own lock
would keep the filter's answers from the clients (the dump is cancelled then).
--skip-in-flight helps where clients connect all the time. Images have to be
files: no --stream, no --page-server, no --lazy-pages. Either CRIU is given
the application's root process, or one from which all of it descends.

The application is --app, or $NFCONNFILTER_APP (CRIU's environment is passed
on), or else the one whose process is dumped: one that ckptctl start has
started, or adopted by process.pid_file. At a restore it is the one that is
held and whose connections are in the images. Where it is none of this node's,
nothing is done and the exit code is 0, so that other processes and containers
can be dumped with the same configuration.

While it is away only CRIU brings it back: ckptctl restore and a client that
speaks are told so (ckptctl status names what is waited for). Restore it on the
node where it was dumped. ckptctl abort gives a dump or restore up, and stop
--discard the connections.

A network namespace of its own: process.namespace names it, the VIP is on lo
there and the node has a route to it. Best is one that stays and of which CRIU
is told, as container engines do: dump --external net[INODE]:NAME, restore
--inherit-fd fd[N]:NAME. Where CRIU makes a new one, process.namespace must be
a name that leads to it by post-restore (ip netns attach at setup-namespaces),
the old one must be gone, and the node's side of the link with its address and
the route is to be made anew at post-setup-namespaces.

One line is printed on standard output, "APP: ACTION: what was done", or with
-o json an object with app, action, state and note. Exit codes: 0 CRIU may go
on; 1 it must not (refused or failed, the reason is on standard error); 2 usage
or unknown application; 3 the agent is not reachable; 4 --timeout passed. CRIU
gives up whatever is not 0, except at pre-resume, where the processes are ended
if the connections cannot be opened.`

const criuActionExamples = `  # CRIU by hand
  criu dump -t $(pidof redis-server) -D /srv/img --tcp-established \
    --network-lock skip --action-script /usr/sbin/ckptctl-criu-action
  criu restore -d -D /srv/img --tcp-established \
    --network-lock skip --action-script /usr/sbin/ckptctl-criu-action

  # the same, in a network namespace "redis" that stays
  criu dump -t PID -D /srv/img --tcp-established --network-lock skip \
    --action-script /usr/sbin/ckptctl-criu-action \
    --external "net[$(stat -Lc %i /run/netns/redis)]:redis"
  criu restore -d -D /srv/img --tcp-established --network-lock skip \
    --action-script /usr/sbin/ckptctl-criu-action \
    --inherit-fd fd[3]:redis 3</run/netns/redis

  # a namespace that CRIU makes anew; the script that it is given
  #!/bin/sh
  case $CRTOOLS_SCRIPT_ACTION in
  setup-namespaces) ip netns attach redis $CRTOOLS_INIT_PID ;;
  post-setup-namespaces) ip addr add 10.78.1.1/30 dev veth-redis &&
    ip link set veth-redis up && ip route add 192.0.2.100 via 10.78.1.2 ;;
  esac || exit 1
  exec ckptctl criu-action --app redis
  # criu restore ... --external veth[eth0]:veth-redis; and behind the dump:
  # ip netns del redis

  # podman and runc: a configuration file for CRIU, /etc/criu/held.conf
  tcp-established
  network-lock skip
  action-script /usr/sbin/ckptctl-criu-action

  # podman; in apps/redis.toml: [process] namespace = "redis" and
  # pid_file = "/run/redis.pid"
  ip netns add redis                      # with link, route and addresses
  podman run -d --name redis --network ns:/run/netns/redis \
    --pidfile /run/redis.pid --annotation org.criu.config=/etc/criu/held.conf redis
  ckptctl start redis                     # adopts it
  podman container checkpoint --tcp-established redis
  podman container restore --tcp-established redis

  # runc; "annotations": {"org.criu.config": "/etc/criu/held.conf"} and the
  # path /run/netns/redis of the network namespace in config.json
  runc run -d --pid-file /run/redis.pid redis && ckptctl start redis
  runc checkpoint --tcp-established --image-path /srv/img redis
  runc restore -d --tcp-established --image-path /srv/img redis`
