/* load: a closed loop of chat completions, for measuring a router.

   load -p PORT -c CONNECTIONS -s SECONDS [-n REQUESTS] [-r PER_SECOND] [-b PROMPT_BYTES] [-g GROUPS] [-k CHUNKS] [-o OFFSET]

   Every connection keeps one request under way. With -r requests come at that rate instead, each due at its own time and sent
   on an idle connection; latencies count from when it was due, so a late one hides nothing. Half of a prompt is one of GROUPS
   shared beginnings (the system message; 0: nothing is shared), the rest is told apart by the request's number, counted from
   OFFSET. With -k the answers are streams of so many events.
   Prints one line of JSON: requests done, failures, latencies in microseconds, and for streams the delay of single events
   from the worker's write to our read. */
#include "wire.h"

enum { HEAD, FIXED, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, MAX_SAMPLES = 4000000, TEXT = 1 << 22 };

typedef struct {
  int fd, state, busy, status;
  Buffer in, out, lines; /* lines: a stream's text up to its last whole line */
  size_t left;
  uint64_t started;
  long events;
} Connection;

static int port, connections = 32, groups = 8, prompt_bytes = 1024;
static long chunks, offset, max_requests = 1000000000, issued, done, failed;
static double seconds = 5, rate;
static char *text;
static int epoll;
static uint64_t began, stop_at;
static uint32_t *latency, *delay;
static long latencies, delays, all_events;

static void open_connection(Connection *c) {
  struct sockaddr_in address = loopback(port);
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(c->fd, (void *)&address, sizeof address)) die("connect");
  set_nodelay(c->fd);
  fcntl(c->fd, F_SETFL, O_NONBLOCK);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void add(Buffer *b, const char *string) { buffer_add(b, string, strlen(string)); }

static void write_request(Connection *c, uint64_t number) {
  static Buffer body;
  char line[256];
  int shared = groups ? prompt_bytes / 2 : 0;
  uint64_t mixed = (number + 1) * 0x9E3779B97F4A7C15ull;
  body.start = body.end = 0;
  add(&body, "{\"model\":\"bench\",\"messages\":[{\"role\":\"system\",\"content\":\"");
  buffer_add(&body, text + (groups ? number % groups * 40009 : 0), shared);
  snprintf(line, sizeof line, "\"},{\"role\":\"user\",\"content\":\"%016lx", mixed);
  add(&body, line);
  buffer_add(&body, text + mixed % TEXT, prompt_bytes - shared);
  snprintf(line, sizeof line, "\"}],\"temperature\":0,\"max_tokens\":%ld,\"stream\":%s}", chunks ? chunks : 16, chunks ? "true" : "false");
  add(&body, line);
  int length = snprintf(line, sizeof line,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                        "Accept: */*\r\nAuthorization: Bearer sk-bench\r\nContent-Length: %zu\r\n\r\n",
                        port, buffer_length(&body));
  buffer_add(&c->out, line, length);
  buffer_add(&c->out, body.data, buffer_length(&body));
}

static void fail(Connection *c);

static void flush(Connection *c) {
  int sent = buffer_send(&c->out, c->fd);
  struct epoll_event event = {.events = sent ? EPOLLIN : EPOLLIN | EPOLLOUT, .data.ptr = c};
  if (sent < 0) fail(c);
  else epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

static uint64_t due(long number) { return rate ? began + number * (1e9 / rate) : 0; }

static int over(void) { return issued >= max_requests || now_ns() > stop_at; }

static void next_request(Connection *c) {
  c->busy = 0;
  if (over() || due(issued) > now_ns()) return;
  c->busy = 1;
  c->state = HEAD;
  c->events = 0;
  c->lines.start = c->lines.end = 0;
  c->started = rate ? due(issued) : now_ns();
  write_request(c, offset + issued++);
  flush(c);
}

static void fail(Connection *c) {
  failed++;
  close(c->fd);
  c->in.start = c->in.end = c->out.start = c->out.end = 0;
  open_connection(c);
  next_request(c);
}

static void finish(Connection *c) {
  if (c->status != 200 || (chunks && c->events < chunks)) {
    failed++;
  } else {
    done++;
    if (latencies < MAX_SAMPLES) latency[latencies++] = (now_ns() - c->started) / 1000;
  }
  next_request(c);
}

/* At a rate: give what is due to idle connections; returns nanoseconds until the next is. */
static uint64_t issue_due(Connection *all) {
  for (int i = 0; i < connections && !over() && due(issued) <= now_ns(); i++)
    if (!all[i].busy) next_request(&all[i]);
  uint64_t now = now_ns(), next = due(issued);
  return next > now ? next - now : 200000;
}

/* Routers may cut a stream into other HTTP chunks than the worker did: events are found by lines. */
static void read_events(Connection *c, const char *data, size_t length) {
  uint64_t now = now_ns();
  buffer_add(&c->lines, data, length);
  for (char *start, *stop; (stop = memchr(start = c->lines.data + c->lines.start, '\n', buffer_length(&c->lines)));) {
    const char *stamp = memmem(start, stop - start, "T=", 2);
    c->lines.start += stop + 1 - start;
    if (!stamp) continue;
    uint64_t written = strtoull(stamp + 2, NULL, 10);
    c->events++;
    all_events++;
    if (delays < MAX_SAMPLES) delay[delays++] = now > written ? (now - written) / 1000 : 0;
  }
}

static void read_head(Connection *c, char *start, char *stop) {
  stop[2] = 0;
  c->status = atoi(start + 9);
  const char *coding = header(start, "transfer-encoding"), *length = header(start, "content-length");
  c->left = length ? strtoul(length, NULL, 10) : 0;
  c->state = coding && !strncasecmp(coding, "chunked", 7) ? CHUNK_SIZE : FIXED;
  c->in.start += stop + 4 - start;
}

/* Take one more element of the answer. 0: more bytes are needed; 1: it was taken; 2: the answer is complete. */
static int step(Connection *c) {
  char *start = c->in.data + c->in.start;
  size_t have = buffer_length(&c->in);
  if (c->state == HEAD) {
    char *stop = memmem(start, have, "\r\n\r\n", 4);
    if (stop) read_head(c, start, stop);
    return stop != NULL;
  }
  if (c->state == FIXED || c->state == CHUNK_DATA) {
    if (have < c->left) return 0;
    if (c->state == CHUNK_DATA) read_events(c, start, c->left - 2);
    c->in.start += c->left;
    if (c->state == FIXED) return 2;
    c->state = CHUNK_SIZE;
    return 1;
  }
  char *stop = memmem(start, have, "\r\n", 2);
  if (!stop) return 0;
  c->in.start += stop + 2 - start;
  if (c->state == CHUNK_END) return stop == start ? 2 : 1;
  c->left = strtoul(start, NULL, 16) + 2;
  c->state = c->left == 2 ? CHUNK_END : CHUNK_DATA;
  return 1;
}

static void readable(Connection *c) {
  if (buffer_receive(&c->in, c->fd) < 0) {
    if (c->busy) fail(c);
    else close(c->fd);
    return;
  }
  int taken;
  while (c->busy && (taken = step(c))) {
    if (taken == 2) finish(c);
  }
}

static int compare(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

static uint32_t percentile(uint32_t *samples, long count, double share) {
  if (!count) return 0;
  qsort(samples, count, sizeof *samples, compare);
  long index = count * share;
  return samples[index < count ? index : count - 1];
}

static void options(int argc, char **argv) {
  for (int option; (option = getopt(argc, argv, "p:c:s:n:r:b:g:k:o:")) > 0;) {
    if (option == 'p') port = atoi(optarg);
    else if (option == 'c') connections = atoi(optarg);
    else if (option == 's') seconds = atof(optarg);
    else if (option == 'n') max_requests = atol(optarg);
    else if (option == 'r') rate = atof(optarg);
    else if (option == 'b') prompt_bytes = atoi(optarg);
    else if (option == 'g') groups = atoi(optarg);
    else if (option == 'k') chunks = atol(optarg);
    else if (option == 'o') offset = atol(optarg);
    else exit(2);
  }
}

int main(int argc, char **argv) {
  enum { EVENTS = 256 };
  options(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  epoll = epoll_create1(0);
  latency = malloc(sizeof *latency * MAX_SAMPLES);
  delay = malloc(sizeof *delay * MAX_SAMPLES);
  text = malloc(TEXT + prompt_bytes + groups * 40009);
  uint64_t random = 88172645463325252ull;
  for (long i = 0; i < TEXT + prompt_bytes + groups * 40009l; i++) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    text[i] = "abcdefghijklmnopqrstuvwxyz      "[random >> 20 & 31];
  }
  Connection *all = calloc(connections, sizeof *all);
  began = now_ns();
  stop_at = began + seconds * 1e9;
  for (int i = 0; i < connections; i++) open_connection(&all[i]);
  for (int i = 0; i < connections; i++) next_request(&all[i]);
  uint64_t give_up = stop_at + 30000000000ull;
  for (int busy = 1; busy && now_ns() < give_up;) {
    struct epoll_event events[EVENTS];
    uint64_t wait = rate && !over() ? issue_due(all) : 200000000;
    struct timespec timeout = {wait / 1000000000ull, wait % 1000000000ull};
    int count = epoll_pwait2(epoll, events, EVENTS, &timeout, NULL);
    for (int i = 0; i < count; i++) {
      Connection *c = events[i].data.ptr;
      if (events[i].events & EPOLLOUT) flush(c);
      if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
    }
    busy = rate && !over();
    for (int i = 0; i < connections; i++) busy += all[i].busy;
    failed += busy && now_ns() >= give_up ? busy : 0;
  }
  double elapsed = (now_ns() - began) / 1e9;
  printf("{\"done\":%ld,\"failed\":%ld,\"elapsed_s\":%.3f,\"p50_us\":%u,\"p99_us\":%u,\"events\":%ld,\"event_p50_us\":%u,\"event_p99_us\":%u}\n",
         done, failed, elapsed, percentile(latency, latencies, .5), percentile(latency, latencies, .99), all_events,
         percentile(delay, delays, .5), percentile(delay, delays, .99));
  return 0;
}
