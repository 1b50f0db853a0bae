// SPDX-License-Identifier: Apache-2.0
/*
 * The executable that the container runtime runs. It only carries a CNI call to the
 * node's agent and its answer back, so that hosts need neither Python nor a libc, and an
 * upgrade of the agent is an upgrade of the plugin.
 *
 *   request  u32 length of env, u32 length of config (big endian)
 *            env: the CNI_* variables, each "NAME=value\0"; config: standard input as it came
 *   answer   u32 exit code, u32 length (big endian), then what goes to standard output
 *
 * weir.cni.server is the other side. VERSION is answered here: the runtime may ask before
 * the agent runs. Every other command fails with "try again later" while the agent is
 * away, DEL and GC too: the runtime then repeats them, so that no teardown is lost, and
 * nothing has to be queued on disk by a process that nobody watches. STATUS waits for it.
 *
 * All buffers are static: this runs once and handles one bounded request.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/weir/cni.sock"
#define CONNECT_SECONDS 5
/* An agent that restarts is no broken node: a kubelet that heard so would mark the node, and with
 * it its pods, not ready. Well below the 30 s after which the kubelet gives the runtime up. */
#define STATUS_PATIENCE_MS 15000
#define RETRY_MS 100
#define ANSWER_SECONDS 90	/* longer than the agent's own limit, so that its text arrives */
#define CONFIG_MAX (1u << 20)
#define ENV_MAX (256u << 10)
#define ANSWER_MAX (1u << 20)
#define VALUE_MAX 108		/* sun_path; a version is far shorter */

enum { CODE_ENV = 4, CODE_IO = 5, CODE_DECODE = 6, CODE_CONFIG = 7, CODE_TRY_AGAIN = 11 };

extern char **environ;

static char config[CONFIG_MAX + 1];
static char env[ENV_MAX];
static char answer[ANSWER_MAX];
static char version[VALUE_MAX] = "1.0.0";
static char socket_path[VALUE_MAX] = DEFAULT_SOCKET;

static int write_all(int fd, const char *data, size_t length)
{
	while (length) {
		ssize_t n = write(fd, data, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		data += n;
		length -= (size_t)n;
	}
	return 0;
}

/* An error result by the CNI specification. All three texts are ours or were checked by
 * plain_value(), so nothing in them needs escaping. */
static int fail(int code, const char *message, const char *details)
{
	char text[1024];
	int n = snprintf(text, sizeof(text),
			 "{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}\n",
			 version, code, message, details);

	if (n > 0 && (size_t)n < sizeof(text))
		write_all(STDOUT_FILENO, text, (size_t)n);
	return 1;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Copies a string value that needs no unescaping: versions and paths never do. */
static void plain_value(const char *from, size_t length, char *to)
{
	if (!length || length >= VALUE_MAX)
		return;
	for (size_t i = 0; i < length; i++)
		if ((unsigned char)from[i] < 0x20 || (unsigned char)from[i] > 0x7e ||
		    from[i] == '\\' || from[i] == '"')
			return;
	memcpy(to, from, length);
	to[length] = '\0';
}

/* The end of the string whose opening quote is at p: its closing quote, or NULL. */
static const char *string_end(const char *p)
{
	for (p++; *p && *p != '"'; p++)
		if (*p == '\\' && p[1])
			p++;
	return *p ? p : NULL;
}

/* Finds "cniVersion" and "socket" among the top-level keys. What is wrong with a config is
 * the agent's to say; here it only means that the defaults stay. */
static void scan_config(const char *p)
{
	const char *key = NULL;
	size_t key_length = 0;
	int depth = 0;
	int value = 0;

	for (; *p; p++) {
		if (*p == '{' || *p == '[') {
			depth++;
		} else if (*p == '}' || *p == ']') {
			depth--;
		} else if (*p == ':' && depth == 1) {
			value = 1;
		} else if (*p == ',' && depth == 1) {
			value = 0;
			key = NULL;
		} else if (*p == '"') {
			const char *end = string_end(p);
			size_t length;

			if (!end)
				return;
			length = (size_t)(end - p - 1);
			if (depth == 1 && !value) {
				key = p + 1;
				key_length = length;
			} else if (depth == 1 && key) {
				if (key_length == 10 && !memcmp(key, "cniVersion", 10))
					plain_value(p + 1, length, version);
				else if (key_length == 6 && !memcmp(key, "socket", 6))
					plain_value(p + 1, length, socket_path);
			}
			p = end;
		}
	}
}

/* Standard input up to its end. Returns its length, or -1 when it is too long or unreadable. */
static ssize_t read_config(void)
{
	size_t length = 0;

	while (length <= CONFIG_MAX) {
		ssize_t n = read(STDIN_FILENO, config + length, CONFIG_MAX + 1 - length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (!n) {
			config[length] = '\0';
			return (ssize_t)length;
		}
		length += (size_t)n;
	}
	errno = EFBIG;
	return -1;
}

static ssize_t gather_env(void)
{
	size_t length = 0;

	for (char **e = environ; *e; e++) {
		size_t n = strlen(*e) + 1;

		if (strncmp(*e, "CNI_", 4))
			continue;
		if (n > ENV_MAX - length)
			return -1;
		memcpy(env + length, *e, n);
		length += n;
	}
	return (ssize_t)length;
}

static int send_request(int fd, size_t env_length, size_t config_length)
{
	uint32_t head[2] = { htonl((uint32_t)env_length), htonl((uint32_t)config_length) };
	struct iovec parts[3] = {
		{ head, sizeof(head) }, { env, env_length }, { config, config_length },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 3 };

	while (message.msg_iovlen) {
		ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		while (message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len) {
			n -= (ssize_t)message.msg_iov->iov_len;
			message.msg_iov++;
			message.msg_iovlen--;
		}
		if (message.msg_iovlen) {
			message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + n;
			message.msg_iov->iov_len -= (size_t)n;
		}
	}
	return 0;
}

/* Exactly `length` bytes before the deadline. */
static int receive(int fd, void *to, size_t length, int64_t deadline)
{
	char *at = to;

	while (length) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		int64_t left = deadline - now_ms();
		ssize_t n;

		if (left <= 0) {
			errno = ETIMEDOUT;
			return -1;
		}
		if (poll(&p, 1, (int)left) <= 0)
			continue;
		n = read(fd, at, length);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n <= 0) {
			if (!n)
				errno = ECONNRESET;
			return -1;
		}
		at += n;
		length -= (size_t)n;
	}
	return 0;
}

/* @patience_ms: how long to wait for an agent that is away. */
static int ask_agent(size_t env_length, size_t config_length, int64_t patience_ms)
{
	int64_t patient_until = now_ms() + patience_ms;
	static const char *away = "the Weir agent on this node does not answer yet; the call will "
				  "be repeated. If this lasts, look at the weir-agent pod of this node";
	struct timeval limit = { .tv_sec = CONNECT_SECONDS };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint32_t head[2];
	char details[256];
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return fail(CODE_IO, "cannot make a unix socket", strerror(errno));
	/* also bounds connect() while the agent's backlog is full */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	memcpy(address.sun_path, socket_path, strlen(socket_path));
	while (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		if (now_ms() < patient_until) {
			poll(NULL, 0, RETRY_MS);
			continue;
		}
		snprintf(details, sizeof(details), "connect %s: %s", socket_path, strerror(errno));
		return fail(CODE_TRY_AGAIN, away, details);
	}
	int64_t deadline = now_ms() + ANSWER_SECONDS * 1000;

	/* A failed send may still have an answer: the agent refuses some calls unread. */
	int sent = send_request(fd, env_length, config_length);
	int send_errno = errno;

	if (receive(fd, head, sizeof(head), deadline) ||
	    ntohl(head[1]) > ANSWER_MAX ||
	    receive(fd, answer, ntohl(head[1]), deadline)) {
		snprintf(details, sizeof(details), "no answer from %s: %s", socket_path,
			 strerror(sent ? send_errno : errno));
		return fail(CODE_TRY_AGAIN, away, details);
	}
	if (write_all(STDOUT_FILENO, answer, ntohl(head[1])))
		return 1;
	return (int)(ntohl(head[0]) & 0xff);
}

static int explain(void)
{
	static const char text[] =
		"weir: CNI plugin of the Weir network, run by the container runtime.\n"
		"It takes CNI_COMMAND and the other CNI_* variables, a network configuration on\n"
		"standard input, and asks the node's agent (" DEFAULT_SOCKET ", or \"socket\" in the\n"
		"configuration, or WEIR_CNI_SOCKET).\n"
		"To look at a node use the command line tool: weir status.\n";

	write_all(STDOUT_FILENO, text, sizeof(text) - 1);
	return 0;
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	const char *override = getenv("WEIR_CNI_SOCKET");
	ssize_t config_length, env_length;

	if (!command && isatty(STDIN_FILENO))
		return explain();
	config_length = read_config();
	if (config_length < 0)
		return fail(errno == EFBIG ? CODE_DECODE : CODE_IO,
			    "cannot read the network configuration from standard input",
			    strerror(errno));
	scan_config(config);
	if (override)
		plain_value(override, strlen(override), socket_path);
	if (!command || !*command)
		return fail(CODE_ENV, "CNI_COMMAND is not set", "run by the container runtime only");
	if (!strcmp(command, "VERSION")) {
		char text[256];
		int n = snprintf(text, sizeof(text), "{\"cniVersion\":\"%s\",\"supportedVersions\":"
				 "[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n", version);

		return write_all(STDOUT_FILENO, text, (size_t)n) ? 1 : 0;
	}
	env_length = gather_env();
	if (env_length < 0)
		return fail(CODE_ENV, "the CNI_* variables are too long", "at most 256 KiB");
	return ask_agent((size_t)env_length, (size_t)config_length,
			 strcmp(command, "STATUS") ? 0 : STATUS_PATIENCE_MS);
}
