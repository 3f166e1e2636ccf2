/*
 * acceptall accepts every packet of one netfilter queue with libnetfilter_queue,
 * as its users write it: one receive and one verdict a packet, a large buffer,
 * no ENOBUFS, packets whole and before segmentation. The peer of our own queue
 * loop in the benchmark.
 *
 * Usage: acceptall QUEUE. Says "ready", and at SIGTERM the number of verdicts
 * and the nanoseconds from the first to the last.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <linux/netfilter.h>
#include <linux/netlink.h>
#include <libnetfilter_queue/libnetfilter_queue.h>

static volatile sig_atomic_t done;
static uint64_t verdicts, first, last;

static void on_term(int sig)
{
	(void)sig;
	done = 1;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int packet(struct nfq_q_handle *q, struct nfgenmsg *msg, struct nfq_data *data, void *arg)
{
	struct nfqnl_msg_packet_hdr *h = nfq_get_msg_packet_hdr(data);

	(void)msg;
	(void)arg;
	if (!h)
		return 0;
	if (nfq_set_verdict(q, ntohl(h->packet_id), NF_ACCEPT, 0, NULL) < 0)
		return -1;
	/* The clock is read rarely: the peers read it once a batch. */
	if (++verdicts == 1)
		first = now();
	if ((verdicts & 63) == 0)
		last = now();
	return 0;
}

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	static char buf[256 * 1024] __attribute__((aligned(8)));
	struct sigaction term = {.sa_handler = on_term}; /* no SA_RESTART: recv ends */
	struct nfq_handle *h;
	struct nfq_q_handle *q;
	int on = 1, fd;

	if (argc != 2) {
		fprintf(stderr, "usage: acceptall QUEUE\n");
		return 2;
	}
	sigaction(SIGTERM, &term, NULL);
	h = nfq_open();
	if (!h)
		return fail("nfq_open");
	q = nfq_create_queue(h, (uint16_t)atoi(argv[1]), packet, NULL);
	if (!q)
		return fail("nfq_create_queue");
	if (nfq_set_mode(q, NFQNL_COPY_PACKET, 0xffff) < 0 || nfq_set_queue_maxlen(q, 65536) < 0)
		return fail("nfq_set_mode");
	if (nfq_set_queue_flags(q, NFQA_CFG_F_GSO, NFQA_CFG_F_GSO) < 0)
		return fail("nfq_set_queue_flags");
	fd = nfq_fd(h);
	if (setsockopt(fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &on, sizeof(on)) < 0)
		return fail("NETLINK_NO_ENOBUFS");
	nfnl_rcvbufsiz(nfq_nfnlh(h), 64 << 20);
	printf("ready\n");
	fflush(stdout);
	while (!done) {
		ssize_t n = recv(fd, buf, sizeof(buf), 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return fail("recv");
		nfq_handle_packet(h, buf, (int)n);
	}
	printf("%" PRIu64 " %" PRIu64 "\n", verdicts, last > first ? last - first : 0);
	nfq_destroy_queue(q);
	nfq_close(h);
	return 0;
}
