/* The limit: how fast C moves the same bytes with blocking sockets and without looking at them.
 *
 * Two processes, one connection. No frames, no checks, no events: whatever is slower than this pays for something.
 * (recv with MSG_WAITALL was no faster region to region, and slower device to device.)
 *
 *   region: send straight from a mapped memfd, receive straight into another.
 *   device: a chunk is copied from device memory into a region, sent, received into a region, copied out of it.
 *
 * limit region|device tcp|unix BYTES CHUNK REGION fresh|populated
 *
 * Prints one line of JSON: seconds from the first byte sent to the last byte in its place, CPU seconds of each side. That
 * everything arrived is checked afterwards, outside of these times.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct side {
	double began, ended, cpu;
	unsigned long sum;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double seconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

static char *memory(size_t size, int populate)
{
	int fd = memfd_create("limit", MFD_CLOEXEC);
	char *at;

	if (fd < 0 || ftruncate(fd, size))
		die("memfd");
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED || (populate && madvise(at, size, MADV_POPULATE_WRITE)))
		die("mmap");
	close(fd);
	return at;
}

static void fill(char *at, size_t size)
{
	unsigned long word = 88172645463325252ul;

	for (size_t n = 0; n + sizeof(word) <= size; n += sizeof(word)) {
		word ^= word << 13;
		word ^= word >> 7;
		word ^= word << 17;
		memcpy(at + n, &word, sizeof(word));
	}
}

/* Differs when two words changed places, too. */
static unsigned long sum(const char *at, size_t size)
{
	unsigned long total = 0, word;

	for (size_t n = 0; n + sizeof(word) <= size; n += sizeof(word)) {
		memcpy(&word, at + n, sizeof(word));
		total = total * 31 + word;
	}
	return total;
}

static void send_all(int sock, const char *at, size_t size)
{
	while (size) {
		ssize_t count = send(sock, at, size, 0);

		if (count < 0 && errno != EINTR)
			die("send");
		if (count > 0)
			at += count, size -= count;
	}
}

static void receive_all(int sock, char *at, size_t size)
{
	while (size) {
		ssize_t count = recv(sock, at, size, 0);

		if (count == 0 || (count < 0 && errno != EINTR))
			die("recv");
		if (count > 0)
			at += count, size -= count;
	}
}

/* One side's half of the transfer: device memory, through a region if there is one. */
static void move(int sock, int sends, char *content, size_t bytes, size_t chunk, char *region, size_t region_size)
{
	for (size_t done = 0; done < bytes;) {
		size_t filled = region ? region_size : bytes;

		if (filled > bytes - done)
			filled = bytes - done;
		if (region && sends)
			memcpy(region, content + done, filled);
		for (size_t pos = 0; pos < filled; pos += chunk) {
			size_t size = filled - pos < chunk ? filled - pos : chunk;
			char *at = (region ? region : content + done) + pos;

			if (sends)
				send_all(sock, at, size);
			else
				receive_all(sock, at, size);
		}
		if (region && !sends)
			memcpy(content + done, region, filled);
		done += filled;
	}
}

static void make_pair(int tcp, int ends[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener, on = 1;

	if (!tcp) {
		if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
			die("socketpair");
		return;
	}
	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &length))
		die("listen");
	ends[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(ends[0], (struct sockaddr *)&address, length))
		die("connect");
	ends[1] = accept(listener, NULL, NULL);
	if (ends[1] < 0)
		die("accept");
	setsockopt(ends[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	close(listener);
}

int main(int argc, char **argv)
{
	int ends[2], device, populate;
	size_t bytes, chunk, region_size;
	char go = 1, *content, *region = NULL;
	struct side *sides, *mine;
	int child, status;

	if (argc != 7) {
		fprintf(stderr, "usage: %s region|device tcp|unix BYTES CHUNK REGION fresh|populated\n", argv[0]);
		return 2;
	}
	device = !strcmp(argv[1], "device");
	bytes = strtoull(argv[3], NULL, 0);
	chunk = strtoull(argv[4], NULL, 0);
	region_size = strtoull(argv[5], NULL, 0);
	populate = !strcmp(argv[6], "populated");
	if (!bytes || !chunk || !region_size || bytes % sizeof(long)) {
		fprintf(stderr, "sizes must not be 0, and BYTES whole words\n");
		return 2;
	}
	sides = mmap(NULL, 2 * sizeof(*sides), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (sides == MAP_FAILED)
		die("mmap");
	make_pair(!strcmp(argv[2], "tcp"), ends);
	child = fork();
	if (child < 0)
		die("fork");
	mine = &sides[child ? 0 : 1];
	/* So that the end of one is seen by the other. */
	close(ends[child ? 1 : 0]);
	content = memory(bytes, child || populate);
	if (child)
		fill(content, bytes);
	if (device) {
		region = memory(region_size, 1);
		memset(region, 1, region_size);
	}
	/* When the sender has its memory the receiver sees to its own, and says when that is ready. */
	if (child) {
		send_all(ends[0], &go, 1);
		receive_all(ends[0], &go, 1);
	} else {
		receive_all(ends[1], &go, 1);
		/* What is free may have to come back from a hypervisor first: that is not what is to be measured. */
		if (!populate)
			munmap(memory(bytes, 1), bytes);
		send_all(ends[1], &go, 1);
	}
	mine->cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	mine->began = seconds(CLOCK_MONOTONIC);
	move(ends[child ? 0 : 1], child != 0, content, bytes, chunk, region, region_size);
	mine->ended = seconds(CLOCK_MONOTONIC);
	mine->cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - mine->cpu;
	mine->sum = sum(content, bytes);
	if (!child)
		return 0;
	if (waitpid(child, &status, 0) != child || status)
		return 1;
	if (sides[0].sum != sides[1].sum) {
		fprintf(stderr, "what arrived is not what was sent\n");
		return 1;
	}
	printf("{\"bytes\": %zu, \"seconds\": %.6f, \"sender_cpu\": %.6f, \"receiver_cpu\": %.6f}\n", bytes,
	       sides[1].ended - sides[0].began, sides[0].cpu, sides[1].cpu);
	return 0;
}
