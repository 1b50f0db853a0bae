// SPDX-License-Identifier: Apache-2.0
/*
 * Load for the benchmarks: one small static program, so that it runs in any pod.
 *
 *   load server CPU PORT,... NETNS...
 *   load client CPU MODE SECONDS TURN_MS NETNS,ADDRESS,PORT[,SOURCE,COUNT]...
 *   load probe CPU SECONDS GAP_MS NETNS,ADDRESS,PORT
 *
 * NETNS is a path, or - for the one it was started in. CPU -1: any. Connections to a target with
 * SOURCE come from COUNT IPv4 addresses in turn, from that one on. The client gives its targets
 * turns, so that what else the machine does hits all alike, and prints for each turn
 * "TARGET COUNT NANOSECONDS". COUNT is connections (crr: connect, a byte each way, end),
 * round trips (rr, urr over UDP) or bytes (stream). Whatever fails ends the program: a rate with
 * errors in it is no rate. A probe sends a datagram each GAP_MS, each from a socket of its own, so
 * that it is a new flow, and prints for each that is answered when it was sent, in nanoseconds of
 * CLOCK_MONOTONIC, which is the machine's. Ports are used in turn: a flow that is remembered for
 * half a minute is forgotten when its port comes round. A probe ends when its input does.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 4096, MAX_TARGETS = 8, CHUNK = 128 * 1024, WAIT_SECONDS = 5 };

/* The first byte of a TCP connection says what the server does with it. */
enum { ONCE = 'c', ECHO = 'e', SINK = 's' };

enum kind { LISTENER = 1, DATAGRAM, FRESH, ECHOING, SINKING };

static char buffer[CHUNK];

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int check(int result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

static void enter(const char *netns)
{
	if (!strcmp(netns, "-"))
		return;
	int fd = check(open(netns, O_RDONLY | O_CLOEXEC), netns);
	check(setns(fd, CLONE_NEWNET), netns);
	close(fd);
}

static void pin(int cpu)
{
	if (cpu < 0)
		return;
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	check(sched_setaffinity(0, sizeof(set), &set), "pin");
	/* What else the machine runs shall not come between; not real time, which would keep the
	 * kernel's own network threads from running. */
	check(setpriority(PRIO_PROCESS, 0, -20), "priority (CAP_SYS_NICE)");

	/* With autogroups a nice value counts inside a session only: raise the session too. */
	setsid();
	int group = open("/proc/self/autogroup", O_WRONLY | O_CLOEXEC);

	if (group >= 0) {
		/* The kernel takes ten of these a second, from all processes together. */
		for (int tries = 0; write(group, "-20", 3) < 0; tries++) {
			if (errno != EAGAIN || tries == 50)
				check(-1, "autogroup");
			usleep(100000);
		}
		close(group);
	}
}

/* ---- server ---------------------------------------------------------------- */

static unsigned char kinds[MAX_FDS];

static void watch(int poll, int fd, enum kind kind)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	if (fd >= MAX_FDS) {
		errno = EMFILE;
		die("too many connections");
	}
	kinds[fd] = kind;
	check(epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void open_port(int poll, int port, int type, enum kind kind)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int one = 1, zero = 0;
	int fd = check(socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket");

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	check(bind(fd, (struct sockaddr *)&any, sizeof(any)), "bind");
	if (type == SOCK_STREAM)
		check(listen(fd, 4096), "listen");
	watch(poll, fd, kind);
}

/* Returns 0 when the connection is over. */
static int serve(int poll, int fd, int watched)
{
	ssize_t got = read(fd, buffer, sizeof(buffer));

	if (got < 0 && errno == EAGAIN) {
		if (!watched)
			watch(poll, fd, FRESH);
		return 1;
	}
	if (got <= 0)
		return 0;
	if (kinds[fd] == FRESH) {
		if (buffer[0] == ONCE) {
			ssize_t sent = write(fd, buffer, 1);
			return (void)sent, 0;
		}
		enum kind kind = buffer[0] == ECHO ? ECHOING : SINKING;
		if (!watched)
			watch(poll, fd, kind);
		kinds[fd] = kind;
	}
	if (kinds[fd] == ECHOING && write(fd, buffer, got) != got)
		return 0;
	return 1;
}

static void accept_all(int poll, int listener)
{
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		int one = 1;

		if (fd < 0 && (errno == EAGAIN || errno == ECONNABORTED))
			return;
		check(fd, "accept");
		if (fd >= MAX_FDS) {
			errno = EMFILE;
			die("too many connections");
		}
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		kinds[fd] = FRESH;
		/* The request usually is there already: no epoll round for it. */
		if (!serve(poll, fd, 0))
			close(fd);
	}
}

static void answer_datagrams(int fd)
{
	struct sockaddr_storage from;
	socklen_t size = sizeof(from);
	ssize_t got;

	while ((got = recvfrom(fd, buffer, sizeof(buffer), 0, (void *)&from, &size)) >= 0) {
		sendto(fd, buffer, got, 0, (void *)&from, size);
		size = sizeof(from);
	}
}

static void server(char **arguments, int count)
{
	int poll = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
	struct epoll_event events[64];

	for (int i = 1; i < count; i++) {
		char *ports = strdup(arguments[0]), *rest = NULL;

		enter(arguments[i]);
		for (char *port = strtok_r(ports, ",", &rest); port; port = strtok_r(NULL, ",", &rest)) {
			open_port(poll, atoi(port), SOCK_STREAM, LISTENER);
			open_port(poll, atoi(port), SOCK_DGRAM, DATAGRAM);
		}
		free(ports);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(poll, events, 64, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;

			if (kinds[fd] == LISTENER)
				accept_all(poll, fd);
			else if (kinds[fd] == DATAGRAM)
				answer_datagrams(fd);
			else if (!serve(poll, fd, 1))
				close(fd);
		}
	}
}

/* ---- client ---------------------------------------------------------------- */

struct target {
	const char *netns;
	struct sockaddr_storage address;
	socklen_t size;
	int fd;				/* rr, urr, stream: kept over all turns */
	uint32_t source, sources;	/* the first one, in host order, and how many */
	uint32_t turn;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct target parse(char *text)
{
	struct target target = { .netns = strtok(text, ","), .fd = -1 };
	char *address = strtok(NULL, ","), *port = strtok(NULL, ",");
	char *source = strtok(NULL, ","), *sources = strtok(NULL, ",");
	struct in_addr first;
	struct sockaddr_in *v4 = (void *)&target.address;
	struct sockaddr_in6 *v6 = (void *)&target.address;

	errno = EINVAL;
	if (!port)
		die("target");
	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(atoi(port));
		target.size = sizeof(*v4);
	} else if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(atoi(port));
		target.size = sizeof(*v6);
	} else {
		die(address);
	}
	if (sources) {
		if (inet_pton(AF_INET, source, &first) != 1)
			die(source);
		target.source = ntohl(first.s_addr);
		target.sources = atoi(sources);
	}
	return target;
}

/* The next of the target's source addresses; the port is chosen by connect, as without. */
static void bind_source(struct target *target, int fd)
{
	struct sockaddr_in from = { .sin_family = AF_INET };
	int one = 1;

	if (!target->sources)
		return;
	from.sin_addr.s_addr = htonl(target->source + target->turn++ % target->sources);
	setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
	check(bind(fd, (void *)&from, sizeof(from)), "bind to a source address");
}

static int dial(struct target *target, int type)
{
	struct timeval patience = { .tv_sec = WAIT_SECONDS };
	int one = 1;
	int fd = check(socket(target->address.ss_family, type | SOCK_CLOEXEC, 0), "socket");

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	bind_source(target, fd);
	check(connect(fd, (void *)&target->address, target->size), "connect");
	return fd;
}

static void round_trip(int fd, char byte)
{
	char answer;

	if (write(fd, &byte, 1) != 1)
		die("write");
	if (read(fd, &answer, 1) != 1)
		die("read");
}

/* Who closes first keeps the port for a minute (TIME_WAIT). That must be the server, whose one
 * port serves all: a client soon has no port left, and then each connect searches for one that a
 * minute has freed: 28,000 in 60 s, whatever lies between the two. */
static void await_end(int fd)
{
	char none;

	if (read(fd, &none, 1) != 0)
		die("end of connection");
}

static uint64_t once(const char *mode, struct target *target)
{
	if (!strcmp(mode, "crr")) {
		int fd = dial(target, SOCK_STREAM);

		round_trip(fd, ONCE);
		await_end(fd);
		close(fd);
		return 1;
	}
	if (target->fd < 0)
		target->fd = dial(target, !strcmp(mode, "urr") ? SOCK_DGRAM : SOCK_STREAM);
	if (!strcmp(mode, "stream")) {
		ssize_t sent = write(target->fd, buffer, sizeof(buffer));

		if (sent <= 0)
			die("write");
		return sent;
	}
	round_trip(target->fd, ECHO);
	return 1;
}

static void client(char **arguments, int count)
{
	const char *mode = arguments[0];
	uint64_t end = now() + (uint64_t)(atof(arguments[1]) * 1e9);
	uint64_t turn = atoll(arguments[2]) * 1000000ull;
	struct target targets[MAX_TARGETS];
	int n = count - 3;

	errno = E2BIG;
	if (n < 1 || n > MAX_TARGETS)
		die("targets");
	for (int i = 0; i < n; i++)
		targets[i] = parse(arguments[3 + i]);
	memset(buffer, SINK, sizeof(buffer));
	while (now() < end) {
		for (int i = 0; i < n; i++) {
			uint64_t done = 0, start, stop;

			enter(targets[i].netns);
			start = now();
			do {
				done += once(mode, &targets[i]);
				stop = now();
			} while (stop - start < turn);
			printf("%d %llu %llu\n", i, (unsigned long long)done,
			       (unsigned long long)(stop - start));
		}
	}
}

/* ---- probe ----------------------------------------------------------------- */

/* Sockets in flight, in a ring: one whose turn comes round was not answered. */
enum { PROBES = 1024, FIRST_PORT = 1024, PORT_COUNT = 64000 };

static int probe_socket(struct target *target, unsigned int turn)
{
	/* Family aside, a v4 and a v6 address begin alike, and the rest of it is 0: any address. */
	struct sockaddr_storage from = { .ss_family = target->address.ss_family };
	int type = SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
	int fd = check(socket(from.ss_family, type, 0), "socket");

	((struct sockaddr_in *)&from)->sin_port = htons(FIRST_PORT + turn % PORT_COUNT);
	check(bind(fd, (void *)&from, target->size), "bind");
	check(connect(fd, (void *)&target->address, target->size), "connect");
	return fd;
}

static void probe(char **arguments)
{
	uint64_t end = now() + (uint64_t)(atof(arguments[0]) * 1e9);
	uint64_t gap = atoll(arguments[1]) * 1000000ull, next = now();
	struct target target = parse(arguments[2]);
	int poll = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
	int fds[PROBES];

	/* Who asked ends this by closing its input: its own end is not told to what runs in a pod. */
	struct epoll_event input = { .events = EPOLLIN, .data.u32 = PROBES };

	check(epoll_ctl(poll, EPOLL_CTL_ADD, STDIN_FILENO, &input), "epoll_ctl of the input");
	memset(fds, -1, sizeof(fds));
	enter(target.netns);
	for (unsigned int turn = 0; now() < end;) {
		struct epoll_event events[64];
		int n = epoll_wait(poll, events, 64, now() < next ? 1 : 0);

		for (int i = 0; i < n; i++) {
			if (events[i].data.u32 == PROBES)
				return;
			int *fd = &fds[events[i].data.u32];
			uint64_t sent;

			/* Refused ones have an error instead of an answer. */
			if (read(*fd, &sent, sizeof(sent)) == sizeof(sent)) {
				printf("%llu\n", (unsigned long long)sent);
				fflush(stdout);
			}
			close(*fd);
			*fd = -1;
		}
		if (now() < next)
			continue;
		unsigned int at = turn % PROBES;
		struct epoll_event event = { .events = EPOLLIN, .data.u32 = at };

		if (fds[at] >= 0)
			close(fds[at]);
		fds[at] = probe_socket(&target, turn++);
		check(epoll_ctl(poll, EPOLL_CTL_ADD, fds[at], &event), "epoll_ctl");
		next = now();
		/* Not sent is not answered: some refusals are told at once. */
		(void)!write(fds[at], &next, sizeof(next));
		next += gap;
	}
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc >= 5 && !strcmp(argv[1], "server")) {
		pin(atoi(argv[2]));
		server(argv + 3, argc - 3);
	} else if (argc >= 7 && !strcmp(argv[1], "client")) {
		pin(atoi(argv[2]));
		client(argv + 3, argc - 3);
	} else if (argc == 6 && !strcmp(argv[1], "probe")) {
		pin(atoi(argv[2]));
		probe(argv + 3);
	} else {
		fprintf(stderr, "load: see the head of load.c\n");
		return 2;
	}
	return 0;
}
