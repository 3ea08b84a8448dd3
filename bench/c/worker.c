/* worker PORT [PORT…]: engines that cost nothing, for measuring what stands before them.

   Answers every POST at once with a fixed chat completion, or, if its body says "stream":true, with "max_tokens" events,
   each an HTTP chunk of its own holding the time it was written (T=nanoseconds), one every `pace` microseconds per stream.
   GET /pace?us=N sets the pace of all ports; any other GET lists the model. Bodies must have a content-length. */
#include "wire.h"

typedef struct Connection {
  int fd;
  Buffer in, out;
  long chunks_left; /* of the stream being written; 0: none */
  uint64_t due;
  struct Connection *next, *previous; /* in the list of streams */
} Connection;

static Connection streams = {.next = &streams, .previous = &streams};
static uint64_t pace_ns;
static int epoll;

static const char ANSWER[] =
    "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,"
    "\"message\":{\"role\":\"assistant\",\"content\":\"The answer of an engine that costs nothing.\"},\"finish_reason\":\"stop\"}],"
    "\"usage\":{\"prompt_tokens\":256,\"completion_tokens\":10,\"total_tokens\":266}}";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"vllm\","
    "\"root\":\"bench\",\"parent\":null,\"max_model_len\":131072}]}";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\",\"choices\":"
    "[{\"index\":0,\"delta\":{\"content\":\"T=%020lu\"},\"finish_reason\":null}]}\n\n";

static void leave_streams(Connection *c) {
  if (!c->chunks_left) return;
  c->chunks_left = 0;
  c->previous->next = c->next;
  c->next->previous = c->previous;
}

static void end(Connection *c) {
  leave_streams(c);
  close(c->fd);
  free(c->in.data);
  free(c->out.data);
  free(c);
}

static void want(Connection *c, uint32_t events) {
  struct epoll_event event = {.events = events, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

static void reply(Connection *c, const char *body) {
  char head[160];
  int length = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", strlen(body));
  buffer_add(&c->out, head, length);
  buffer_add(&c->out, body, strlen(body));
}

static void write_event(Connection *c) {
  char event[512], chunk[640];
  int length = snprintf(event, sizeof event, EVENT, now_ns());
  int total = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", length, event);
  buffer_add(&c->out, chunk, total);
  if (c->chunks_left == 1) {
    buffer_add(&c->out, STREAM_END, sizeof STREAM_END - 1);
    leave_streams(c);
  } else {
    c->chunks_left--;
  }
}

static void answer_post(Connection *c, const char *body) {
  if (!strstr(body, "\"stream\":true")) {
    reply(c, ANSWER);
    return;
  }
  const char *limit = strstr(body, "\"max_tokens\":");
  if (!limit || limit[13] == 'n') limit = strstr(body, "_tokens\":"); /* gateways that parse may rename it, or send null */
  buffer_add(&c->out, STREAM_HEAD, sizeof STREAM_HEAD - 1);
  c->chunks_left = limit ? atol(strchr(limit, ':') + 1) : 1;
  if (c->chunks_left < 1) c->chunks_left = 1;
  c->due = now_ns();
  c->next = &streams;
  c->previous = streams.previous;
  streams.previous->next = c;
  streams.previous = c;
}

/* Answer the whole requests that have come; a body's options are looked for in its last part. 0: the connection is broken. */
enum { SEARCHED = 8192 };
static int answer(Connection *c) {
  while (buffer_length(&c->in) && !c->chunks_left) {
    char *start = c->in.data + c->in.start;
    char *stop = memmem(start, buffer_length(&c->in), "\r\n\r\n", 4);
    if (!stop) break;
    char kept = stop[2];
    stop[2] = 0;
    const char *length_text = header(start, "content-length");
    size_t length = length_text ? strtoul(length_text, NULL, 10) : 0;
    const char *pace = !strncmp(start, "GET /pace?us=", 13) ? start + 13 : NULL;
    if (pace) pace_ns = strtoul(pace, NULL, 10) * 1000;
    size_t head = stop + 4 - start;
    stop[2] = kept;
    if (buffer_length(&c->in) < head + length) {
      buffer_room(&c->in, head + length - buffer_length(&c->in) + 1);
      break;
    }
    if (start[0] == 'P') {
      char *body = c->in.data + c->in.start + head, *after = body + length;
      buffer_room(&c->in, 1);
      body = c->in.data + c->in.start + head;
      after = body + length;
      char next = *after;
      *after = 0;
      answer_post(c, length > SEARCHED ? after - SEARCHED : body);
      *after = next;
    } else {
      reply(c, MODELS);
    }
    c->in.start += head + length;
  }
  int sent = buffer_send(&c->out, c->fd);
  if (!sent) want(c, EPOLLIN | EPOLLOUT);
  return sent >= 0;
}

/* Write the events that are due; returns milliseconds until the next, -1 without streams. A full socket waits its turn. */
static void write_due(uint64_t now) {
  for (Connection *c = streams.next, *next; c != &streams; c = next) {
    next = c->next;
    if (c->due > now || buffer_length(&c->out)) continue;
    c->due += pace_ns;
    write_event(c);
    int sent = buffer_send(&c->out, c->fd);
    if (!sent) want(c, EPOLLIN | EPOLLOUT);
    if (sent < 0) end(c);
  }
}

static struct timespec until_due(void) {
  uint64_t now = now_ns(), first = now + 1000000000ull;
  for (Connection *c = streams.next; c != &streams; c = c->next)
    if (c->due < first && !buffer_length(&c->out)) first = c->due;
  uint64_t wait = first > now ? first - now : 0;
  return (struct timespec){wait / 1000000000ull, wait % 1000000000ull};
}

static int listen_on(int port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in address = loopback(port);
  if (bind(fd, (void *)&address, sizeof address) || listen(fd, 4096)) die("listen");
  return fd;
}

static void accept_all(int listener) {
  int fd;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    set_nodelay(fd);
    Connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  }
}

int main(int argc, char **argv) {
  enum { EVENTS = 256 };
  static int listeners[64];
  signal(SIGPIPE, SIG_IGN);
  epoll = epoll_create1(0);
  for (int i = 1; i < argc && i < 64; i++) {
    listeners[i] = listen_on(atoi(argv[i]));
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listeners[i]};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listeners[i], &event);
  }
  for (;;) {
    struct epoll_event events[EVENTS];
    struct timespec wait = until_due();
    int count = epoll_pwait2(epoll, events, EVENTS, &wait, NULL);
    for (int i = 0; i < count; i++) {
      int *listener = events[i].data.ptr;
      if (listener >= listeners && listener < listeners + 64) {
        accept_all(*listener);
        continue;
      }
      Connection *c = events[i].data.ptr;
      int alive = 1;
      if (events[i].events & EPOLLOUT) {
        int sent = buffer_send(&c->out, c->fd);
        if (sent > 0) want(c, EPOLLIN);
        alive = sent >= 0;
      }
      if (alive && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) alive = buffer_receive(&c->in, c->fd) >= 0 && answer(c);
      if (!alive) end(c);
    }
    write_due(now_ns());
  }
}
