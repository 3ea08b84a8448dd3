/* What both programs share: time, sockets, and where an HTTP/1.1 message's body begins and ends. */
#ifndef WIRE_H
#define WIRE_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static inline void die(const char *what) {
  perror(what);
  exit(1);
}

static inline void set_nodelay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline struct sockaddr_in loopback(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

/* A growing byte buffer, consumed from the front. */
typedef struct {
  char *data;
  size_t start, end, size;
} Buffer;

static inline char *buffer_room(Buffer *b, size_t wanted) {
  if (b->start == b->end) b->start = b->end = 0;
  if (b->size - b->end < wanted && b->start) {
    memmove(b->data, b->data + b->start, b->end - b->start);
    b->end -= b->start;
    b->start = 0;
  }
  if (b->size - b->end < wanted) {
    b->size = (b->end + wanted) * 2;
    b->data = realloc(b->data, b->size);
    if (!b->data) die("realloc");
  }
  return b->data + b->end;
}

static inline void buffer_add(Buffer *b, const void *bytes, size_t count) {
  memcpy(buffer_room(b, count), bytes, count);
  b->end += count;
}

static inline size_t buffer_length(const Buffer *b) { return b->end - b->start; }

/* Send what is there. 1: all of it went; 0: the socket is full; -1: it is broken. */
static inline int buffer_send(Buffer *b, int fd) {
  while (buffer_length(b)) {
    ssize_t sent = send(fd, b->data + b->start, buffer_length(b), MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN ? 0 : -1;
    b->start += sent;
  }
  return 1;
}

/* One read. Bytes read; 0: nothing there yet; -1: the other side ended the connection. */
static inline ssize_t buffer_receive(Buffer *b, int fd) {
  enum { READ = 262144 };
  ssize_t got = recv(fd, buffer_room(b, READ), READ, 0);
  if (got > 0) b->end += got;
  if (got < 0 && errno == EAGAIN) return 0;
  return got > 0 ? got : -1;
}

/* A header's value in a head that ends with a NUL, or NULL. */
static inline const char *header(const char *head, const char *name) {
  char line[64];
  snprintf(line, sizeof line, "\r\n%s:", name);
  const char *found = strcasestr(head, line);
  return found ? found + strlen(line) + strspn(found + strlen(line), " ") : NULL;
}
#endif
