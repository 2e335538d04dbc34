/* loadgen: puts load on a server and says what it cost the server. One thread, epoll, one JSON object on stdout.
 *
 * usage: loadgen echo|sink|source|storm|datagram-echo|datagram-sink -p PORT [options]
 *
 * echo    each connection sends SIZE bytes, waits until they are back, and sends them again
 * sink    sends SIZE bytes at a time without end, or at RATE in total; the server only receives
 * source  sends one byte, then receives without end
 * storm   opens all connections as fast as it can with one echoed byte each, then leaves them idle:
 *         accept rate, CPU per accepted connection, memory per idle connection
 * idle    opens connections, has SIZE bytes echoed on each, then leaves them idle: what memory they still take
 * datagram-echo  echo over UDP, one datagram each; what hasn't come back after 0.1 s is sent again
 * datagram-sink  sends datagrams of SIZE bytes without end; counted is what the server has answered, one to 16
 *
 * Built with -DTLS it is tls_loadgen: echo, sink, source, storm and idle over TLS 1.3, and
 *
 * handshake  opens a connection, has one byte echoed, ends it by close_notify, and opens it again
 * resume     the same, resuming the session of the time before
 *
 *   -n CONNECTIONS (1)   -s BYTES (64)     -t SECONDS measured (1)   -w SECONDS before that (0.3)
 *   -P PID of the server, for its CPU time and memory                -r BYTES per second (sink)
 *   -v check every received byte (echo, source)                      -l let closed connections linger (no reset)
 *   -D SECONDS deadline of the whole run (30 + measured + warm-up)
 *
 * The measured time begins when the warm-up is over AND each connection has been served once, so the cost of
 * accepting isn't counted. CPU is what the server was on a processor, in nanoseconds: the sum of
 * /proc/PID/task/<thread>/schedstat; its split in user and system comes from /proc/PID/stat in clock ticks.
 *
 * Exit: 0 measured, 1 usage, 2 can't connect, 3 can't send, 4 connection lost, 5 wrong bytes, 6 deadline passed; TLS:
 * 7 measured, but the server didn't end a connection by close_notify, 8 handshakes weren't of the kind asked for. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum exit_status {
    USAGE = 1,
    CANT_CONNECT,
    CANT_SEND,
    CONNECTION_LOST,
    WRONG_BYTES,
    DEADLINE_PASSED,
    UNCLEAN_END,
    NOT_RESUMED
};

#ifdef TLS
#include <openssl/ssl.h>
#define MODES "echo|sink|source|storm|idle|handshake|resume"
#else
#define MODES "echo|sink|source|storm|idle|datagram-echo|datagram-sink"
#endif

enum {
    EVENTS_PER_WAIT = 512,
    RECEIVE_SIZE = 1 << 20,
    PATTERN_SIZE = 256 * 1024,
    /* What the servers of this directory send in source mode; see tcp.h. */
    SOURCE_BYTE = 7,
    /* A client address has 28,000 ephemeral ports towards one server address; eight server addresses give room
     * for several rounds of 10,000 connections while the old ones are in TIME_WAIT. */
    SERVER_ADDRESSES = 8,
    /* Above this, bytes that nobody looks at are dropped in the kernel (MSG_TRUNC): the copy would be the load
     * generator's cost, and on shared caches the server's as well. */
    TRUNCATE_ABOVE = 2048,
    /* While connections are opened, answers are collected this often. */
    DIALS_PER_POLL = 64,
    /* No more connections than this may wait for the server: an accept queue that runs over drops handshakes,
     * and what is measured then is TCP's retransmission timers. */
    UNSERVED = 1024,
    SETTLE_MICROSECONDS = 600000,
    EXTRA_SECONDS = 30,
    /* Datagrams that the server answers once. */
    ANSWERED = 16,
    RESEND_MILLISECONDS = 100,
    /* From one connection, when what it has is held in memory (TLS). */
    READS_PER_EVENT = 16,
};

static const uint64_t SECOND = 1000000000ull;

/* ---- options ---- */

static struct {
    const char *mode;
    int connections, size, port, server_pid, verify, linger, resume;
    double seconds, warmup, rate, deadline;
} options = {.connections = 1, .size = 64, .seconds = 1, .warmup = 0.3};

static void parse_options(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: loadgen " MODES " -p PORT [-n -s -t -w -P -r -D -v -l]\n");
        exit(USAGE);
    }
    options.mode = argv[1];
    optind = 2;
    for (int option; (option = getopt(argc, argv, "n:s:t:w:p:P:r:D:vl")) != -1;) {
        switch (option) {
        case 'n': options.connections = atoi(optarg); break;
        case 's': options.size = atoi(optarg); break;
        case 't': options.seconds = atof(optarg); break;
        case 'w': options.warmup = atof(optarg); break;
        case 'p': options.port = atoi(optarg); break;
        case 'P': options.server_pid = atoi(optarg); break;
        case 'r': options.rate = atof(optarg); break;
        case 'D': options.deadline = atof(optarg); break;
        case 'v': options.verify = 1; break;
        case 'l': options.linger = 1; break;
        default: exit(USAGE);
        }
    }
    if (options.connections < 1 || options.size < 1 || options.port < 1 || options.seconds <= 0) {
        fprintf(stderr, "connections, size, port and seconds are needed and positive\n");
        exit(USAGE);
    }
    if (options.deadline <= 0)
        options.deadline = EXTRA_SECONDS + options.warmup + options.seconds;
}

static void stop(enum exit_status status, const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(status);
}

static void on_deadline(int signal_number)
{
    (void)signal_number;
    static const char text[] = "deadline passed: the server stopped answering\n";
    ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);
    (void)ignored;
    _exit(DEADLINE_PASSED);
}

/* Whatever hangs, the run ends. */
static void set_deadline(void)
{
    signal(SIGALRM, on_deadline);
    struct itimerval timer = {0};
    timer.it_value.tv_sec = (time_t)options.deadline;
    timer.it_value.tv_usec = (suseconds_t)((options.deadline - (double)timer.it_value.tv_sec) * 1e6);
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* ---- what the server used ---- */

struct usage {
    double user, system; /* seconds, in steps of a clock tick */
    uint64_t on_cpu;     /* nanoseconds */
    uint64_t switches;   /* voluntary context switches: how often it slept */
};

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

static void read_ticks(struct usage *usage)
{
    char path[64], line[2048];
    snprintf(path, sizeof path, "/proc/%d/stat", options.server_pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return;
    if (fgets(line, sizeof line, file)) {
        /* The program's name may hold spaces and parentheses: count the fields from its end. */
        const char *rest = strrchr(line, ')') + 2;
        unsigned long user, system;
        sscanf(rest, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
        usage->user = (double)user / (double)sysconf(_SC_CLK_TCK);
        usage->system = (double)system / (double)sysconf(_SC_CLK_TCK);
    }
    fclose(file);
}

static void add_thread(struct usage *usage, const char *directory)
{
    char path[512], line[256];
    unsigned long long on_cpu;
    unsigned long switches;
    snprintf(path, sizeof path, "%s/schedstat", directory);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%llu", &on_cpu) == 1)
            usage->on_cpu += on_cpu;
        fclose(file);
    }
    snprintf(path, sizeof path, "%s/status", directory);
    file = fopen(path, "r");
    if (file) {
        while (fgets(line, sizeof line, file)) {
            if (sscanf(line, "voluntary_ctxt_switches: %lu", &switches) == 1)
                usage->switches += switches;
        }
        fclose(file);
    }
}

static struct usage server_usage(void)
{
    struct usage usage = {0};
    if (!options.server_pid)
        return usage;
    read_ticks(&usage);
    char directory[64], thread[400];
    snprintf(directory, sizeof directory, "/proc/%d/task", options.server_pid);
    DIR *threads = opendir(directory);
    for (struct dirent *entry; threads && (entry = readdir(threads));) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(thread, sizeof thread, "%s/%s", directory, entry->d_name);
        add_thread(&usage, thread);
    }
    if (threads)
        closedir(threads);
    return usage;
}

static long server_resident_kib(void)
{
    char path[64], line[256];
    long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", options.server_pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "Rss: %ld", &kib) == 1)
            break;
    }
    fclose(file);
    return kib;
}

static double own_cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* ---- latencies: a log-linear histogram, 64 steps per power of two (1.6 % wide), in nanoseconds ---- */

enum { STEPS = 64, POWERS = 40 };
static uint32_t histogram[STEPS * POWERS];

static int step_of(uint64_t nanoseconds)
{
    if (nanoseconds < STEPS)
        return (int)nanoseconds;
    int power = 63 - __builtin_clzll(nanoseconds);
    int step = (power - 5) * STEPS + (int)(nanoseconds >> (power - 6) & (STEPS - 1));
    return step < STEPS * POWERS ? step : STEPS * POWERS - 1;
}

static uint64_t start_of(int step)
{
    if (step < STEPS)
        return (uint64_t)step;
    int power = step / STEPS + 5;
    return 1ull << power | (uint64_t)(step % STEPS) << (power - 6);
}

static double percentile_us(double share, uint64_t count)
{
    uint64_t rank = (uint64_t)(share * (double)count), seen = 0;
    for (int step = 0; step < STEPS * POWERS; step++) {
        seen += histogram[step];
        if (seen > rank)
            return (double)start_of(step) / 1e3;
    }
    return 0;
}

/* ---- connections ---- */

struct connection {
    int fd;
    int sent, received; /* of the request under way */
    uint64_t begun;
    uint8_t wants_out;
    uint8_t served; /* its first request was answered */
#ifdef TLS
    SSL *tls;
    SSL_SESSION *session; /* the newest that the server gave */
    const void *unsent;   /* OpenSSL has begun a record with these bytes: they must be written next */
    size_t unsent_length;
    uint8_t closing; /* close_notify has gone out */
    enum { SHAKING_HANDS, ECHOING, ENDING } stage;
#endif
};

static struct connection *connections;
static int served;
static int epoll_fd;
static char *pattern; /* what is sent; long enough for one whole request */
static char *received_bytes;
static char source_bytes[4096];

static void fill_buffers(void)
{
    size_t length = options.size > PATTERN_SIZE ? (size_t)options.size : PATTERN_SIZE;
    connections = calloc((size_t)options.connections, sizeof *connections);
    pattern = malloc(length);
    received_bytes = malloc(RECEIVE_SIZE);
    if (!connections || !pattern || !received_bytes)
        stop(USAGE, "memory");
    /* No short period, so that bytes which come back at a wrong place differ. */
    for (size_t i = 0; i < length; i++)
        pattern[i] = (char)(i * 131 + (i >> 8) * 7);
    memset(source_bytes, SOURCE_BYTE, sizeof source_bytes);
}

static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void connect_socket(struct connection *connection)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        stop(CANT_CONNECT, "socket");
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!options.linger) {
        /* Closed by a reset: no TIME_WAIT, and the server is rid of everything before the next round. */
        struct linger reset = {.l_onoff = 1, .l_linger = 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    }
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)options.port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)((connection - connections) % SERVER_ADDRESSES)),
    };
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        stop(CANT_CONNECT, "connect");
    connection->fd = fd;
}

static void watch_connection(struct connection *connection)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, connection->fd, &event);
}

static void want_out(struct connection *connection, int wanted)
{
    if (connection->wants_out == wanted)
        return;
    connection->wants_out = (uint8_t)wanted;
    struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0u), .data.ptr = connection};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

static void mark_served(struct connection *connection)
{
    if (!connection->served) {
        connection->served = 1;
        served++;
    }
}

/* How bytes are sent and received: send(2) and recv(2), or OpenSSL's counterparts with the same results. */
#ifdef TLS
static ssize_t put_bytes(struct connection *connection, const void *bytes, size_t length);
static ssize_t take_bytes(struct connection *connection, void *buffer, size_t length, int drop_bytes);
static int holds_bytes(const struct connection *connection);
static void shake_hands(struct connection *connection);
#else
static ssize_t put_bytes(struct connection *connection, const void *bytes, size_t length)
{
    return send(connection->fd, bytes, length, MSG_NOSIGNAL);
}

static ssize_t take_bytes(struct connection *connection, void *buffer, size_t length, int drop_bytes)
{
    return recv(connection->fd, buffer, length, drop_bytes ? MSG_TRUNC : 0);
}

/* True when there may be bytes that epoll doesn't know of. */
static int holds_bytes(const struct connection *connection)
{
    (void)connection;
    return 0;
}

static void shake_hands(struct connection *connection)
{
    (void)connection;
}
#endif

static void dial(int index)
{
    struct connection *connection = &connections[index];
    connect_socket(connection);
    shake_hands(connection);
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
    watch_connection(connection);
}

/* Bytes received, or 0 when there are none after all. */
static size_t receive(struct connection *connection, size_t wanted, int drop_bytes)
{
    size_t length = wanted < RECEIVE_SIZE ? wanted : RECEIVE_SIZE;
    ssize_t count = take_bytes(connection, received_bytes, length, drop_bytes);
    if (count > 0)
        return (size_t)count;
    if (count < 0 && errno == EAGAIN)
        return 0;
    if (count == 0)
        errno = ECONNRESET;
    stop(CONNECTION_LOST, "receive");
    return 0;
}

/* ---- the measured time ---- */

static struct {
    int begun;
    uint64_t not_before, start, end;
    struct usage usage;
    double own_cpu;
    uint64_t requests, bytes, lost;
} measured;

static void plan_measurement(void)
{
    measured.not_before = now() + (uint64_t)(options.warmup * 1e9);
}

/* True when the measured time is over. */
static int measure(uint64_t time, int all_served)
{
    if (measured.begun)
        return time >= measured.end;
    if (time < measured.not_before || !all_served)
        return 0;
    measured.begun = 1;
    measured.requests = measured.bytes = measured.lost = 0;
    memset(histogram, 0, sizeof histogram);
    measured.own_cpu = own_cpu_seconds();
    measured.usage = server_usage();
    measured.start = now();
    measured.end = measured.start + (uint64_t)(options.seconds * 1e9);
    return 0;
}

static void print_usage(const struct usage *before, const struct usage *after, double seconds, uint64_t requests)
{
    double on_cpu = (double)(after->on_cpu - before->on_cpu) / 1e9;
    printf(", \"seconds\": %.6f, \"server_cpu_seconds\": %.6f, \"server_cpu_percent_of_core\": %.3f", seconds, on_cpu,
           100 * on_cpu / seconds);
    printf(", \"server_user_seconds\": %.3f, \"server_system_seconds\": %.3f", after->user - before->user,
           after->system - before->system);
    if (requests) {
        printf(", \"cpu_us_per_request\": %.4f", on_cpu * 1e6 / (double)requests);
        printf(", \"user_us_per_request\": %.4f", (after->user - before->user) * 1e6 / (double)requests);
        printf(", \"sleeps_per_request\": %.4f", (double)(after->switches - before->switches) / (double)requests);
    }
}

static void print_result(void)
{
    uint64_t end = now();
    struct usage usage = server_usage();
    double seconds = (double)(end - measured.start) / 1e9;
    double gigabytes = (double)measured.bytes / 1e9;
    uint64_t requests = measured.requests;
    printf("{\"mode\": \"%s\", \"connections\": %d, \"size\": %d", options.mode, options.connections, options.size);
    print_usage(&measured.usage, &usage, seconds, requests);
    printf(", \"load_cpu_percent_of_core\": %.3f", 100 * (own_cpu_seconds() - measured.own_cpu) / seconds);
    printf(", \"bytes\": %llu, \"gigabytes_per_second\": %.6f", (unsigned long long)measured.bytes,
           gigabytes / seconds);
    if (requests) {
        printf(", \"requests\": %llu, \"requests_per_second\": %.1f", (unsigned long long)requests,
               (double)requests / seconds);
        printf(", \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f", percentile_us(0.5, requests),
               percentile_us(0.99, requests), percentile_us(0.999, requests));
    }
    if (measured.lost)
        printf(", \"lost\": %llu", (unsigned long long)measured.lost);
    if (measured.bytes && strcmp(options.mode, "echo"))
        printf(", \"cpu_seconds_per_gigabyte\": %.6f",
               (double)(usage.on_cpu - measured.usage.on_cpu) / 1e9 / gigabytes);
    printf(", \"verified\": %s}\n", options.verify ? "true" : "false");
}

/* ---- echo ---- */

static void send_request(struct connection *connection)
{
    while (connection->sent < options.size) {
        ssize_t count = put_bytes(connection, pattern + connection->sent, (size_t)(options.size - connection->sent));
        if (count < 0) {
            if (errno != EAGAIN)
                stop(CANT_SEND, "send");
            want_out(connection, 1);
            return;
        }
        connection->sent += (int)count;
    }
    want_out(connection, 0);
}

static void begin_request(struct connection *connection, uint64_t time)
{
    connection->sent = connection->received = 0;
    connection->begun = time;
    send_request(connection);
}

/* Nobody sends a second request before everybody's first is answered: libuv accepts one connection per turn, and
 * if each turn also serves all those accepted so far, opening n of them costs n * n / 2 echoes. */
static int repeating;

/* Some of an echo; true when there may be more of it. */
static int receive_echo(struct connection *connection)
{
    int drop_bytes = !options.verify && options.size > TRUNCATE_ABOVE;
    size_t count = receive(connection, (size_t)(options.size - connection->received), drop_bytes);
    if (options.verify && memcmp(received_bytes, pattern + connection->received, count)) {
        fprintf(stderr, "wrong bytes in an echo, after %d right ones\n", connection->received);
        exit(WRONG_BYTES);
    }
    connection->received += (int)count;
    if (count && connection->received == options.size) {
        uint64_t time = now();
        histogram[step_of(time - connection->begun)]++;
        measured.requests++;
        measured.bytes += (uint64_t)options.size;
        mark_served(connection);
        if (repeating)
            begin_request(connection, time);
        return 0;
    }
    return count && holds_bytes(connection);
}

static void serve_echoes(int timeout)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, timeout);
    for (int i = 0; i < count; i++) {
        struct connection *connection = events[i].data.ptr;
        if (events[i].events & EPOLLOUT)
            send_request(connection);
        if (!(events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
            continue;
        while (receive_echo(connection))
            ;
    }
}

static void open_and_echo(void)
{
    for (int i = 0; i < options.connections; i++) {
        while (i - served >= UNSERVED)
            serve_echoes(50);
        dial(i);
        begin_request(&connections[i], now());
    }
    while (served < options.connections)
        serve_echoes(50);
}

static void run_echo(void)
{
    open_and_echo();
    repeating = 1;
    for (int i = 0; i < options.connections; i++)
        begin_request(&connections[i], now());
    plan_measurement();
    while (!measure(now(), 1))
        serve_echoes(50);
}

/* ---- source: the server sends ---- */

static void check_source(size_t count)
{
    for (size_t at = 0; at < count; at += sizeof source_bytes) {
        size_t length = count - at < sizeof source_bytes ? count - at : sizeof source_bytes;
        if (memcmp(received_bytes + at, source_bytes, length)) {
            fprintf(stderr, "wrong bytes from a source\n");
            exit(WRONG_BYTES);
        }
    }
}

/* Some of what the server sends; true when there may be more at hand. */
static int receive_source(struct connection *connection)
{
    size_t length = receive(connection, RECEIVE_SIZE, !options.verify);
    if (length)
        mark_served(connection);
    if (options.verify)
        check_source(length);
    measured.bytes += length;
    return length && holds_bytes(connection);
}

static void run_source(void)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    for (int i = 0; i < options.connections; i++) {
        dial(i);
        if (put_bytes(&connections[i], "g", 1) != 1)
            stop(CANT_SEND, "send");
    }
    plan_measurement();
    while (!measure(now(), served == options.connections)) {
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 50);
        for (int i = 0; i < count; i++) {
            for (int reads = 0; reads < READS_PER_EVENT; reads++) {
                if (!receive_source(events[i].data.ptr))
                    break;
            }
        }
    }
}

/* ---- sink: the server receives ---- */

static void send_chunk(struct connection *connection)
{
    ssize_t count = put_bytes(connection, pattern, (size_t)options.size);
    if (count > 0)
        measured.bytes += (uint64_t)count;
    else if (errno != EAGAIN)
        stop(CANT_SEND, "send");
}

static void run_fast_sink(void)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    for (int i = 0; i < options.connections; i++)
        dial(i);
    plan_measurement();
    if (options.connections == 1)
        fcntl(connections[0].fd, F_SETFL, 0); /* one connection: a blocking send needs no epoll */
    for (int i = 0; i < options.connections; i++)
        want_out(&connections[i], 1);
    while (!measure(now(), 1)) {
        if (options.connections == 1) {
            send_chunk(&connections[0]);
            continue;
        }
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 50);
        for (int i = 0; i < count; i++)
            send_chunk(events[i].data.ptr);
    }
}

/* Sleeps until shortly before; the caller spins for the rest: timers are late by tens of microseconds, and chunks
 * are that far apart. Never longer than the end of the measured time can wait. */
static void sleep_towards(uint64_t due)
{
    const uint64_t early = 50000, shortest = 10000, longest = 20000000;
    uint64_t time = now();
    if (due < time + early + shortest)
        return;
    uint64_t pause = due - time - early;
    nanosleep(&(struct timespec){.tv_nsec = (long)(pause < longest ? pause : longest)}, NULL);
}

/* A chunk every SIZE / RATE seconds, round robin. When the server falls behind, the rate isn't reached and the
 * result says so; what wasn't sent in time is still sent, at once. */
static void run_paced_sink(void)
{
    for (int i = 0; i < options.connections; i++)
        dial(i);
    plan_measurement();
    uint64_t begun = now(), chunks = 0;
    const double nanoseconds_per_chunk = 1e9 * options.size / options.rate;
    struct connection *connection = NULL;
    while (!measure(now(), 1)) {
        if (!connection || connection->sent == options.size) {
            uint64_t due = begun + (uint64_t)((double)chunks * nanoseconds_per_chunk);
            if (now() < due) {
                sleep_towards(due);
                continue;
            }
            connection = &connections[chunks++ % (uint64_t)options.connections];
            connection->sent = 0;
        }
        ssize_t count = put_bytes(connection, pattern + connection->sent, (size_t)(options.size - connection->sent));
        if (count < 0 && errno != EAGAIN)
            stop(CANT_SEND, "send");
        if (count > 0) {
            connection->sent += (int)count;
            measured.bytes += (uint64_t)count;
        }
    }
}

static void run_sink(void)
{
    (options.rate > 0 ? run_paced_sink : run_fast_sink)();
}

/* ---- storm, idle ---- */

/* What opening all connections took. */
static struct {
    long kib;
    uint64_t begun, end;
    struct usage before, after;
} opening;

static void begin_opening(void)
{
    opening.kib = server_resident_kib();
    opening.before = server_usage();
    opening.begun = now();
}

static void end_opening(void)
{
    opening.end = now();
    opening.after = server_usage();
}

static void print_connections(void)
{
    int n = options.connections;
    double seconds = (double)(opening.end - opening.begun) / 1e9;
    /* Memory when everything is at rest, not in the middle of the last turn. */
    usleep(SETTLE_MICROSECONDS);
    long after_kib = server_resident_kib();
    printf("{\"mode\": \"%s\", \"connections\": %d", options.mode, n);
    print_usage(&opening.before, &opening.after, seconds, 0);
    printf(", \"accepts_per_second\": %.1f, \"cpu_us_per_connection\": %.4f", n / seconds,
           (double)(opening.after.on_cpu - opening.before.on_cpu) / 1e3 / n);
    printf(", \"resident_kib_before\": %ld, \"resident_kib_after\": %ld, \"bytes_per_connection\": %.1f}\n",
           opening.kib, after_kib, (double)(after_kib - opening.kib) * 1024 / n);
}

static void run_idle(void)
{
    begin_opening();
    open_and_echo();
    end_opening();
}

static void collect_storm_echoes(int timeout)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, timeout);
    for (int i = 0; i < count; i++) {
        if (receive(events[i].data.ptr, 16, 0))
            mark_served(events[i].data.ptr);
    }
}

static void run_storm(void)
{
    begin_opening();
    for (int i = 0; i < options.connections; i++) {
        while (i - served >= UNSERVED)
            collect_storm_echoes(100);
        dial(i);
        if (put_bytes(&connections[i], pattern, 1) != 1)
            stop(CANT_SEND, "send");
        if (i % DIALS_PER_POLL == 0)
            collect_storm_echoes(0);
    }
    while (served < options.connections)
        collect_storm_echoes(100);
    end_opening();
}

#ifndef TLS
/* ---- datagrams ---- */

static void dial_datagrams(int index)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)options.port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        stop(CANT_CONNECT, "connect");
    connections[index].fd = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[index]};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void send_datagram(struct connection *connection)
{
    connection->begun = now();
    if (send(connection->fd, pattern, (size_t)options.size, MSG_NOSIGNAL) < 0 && errno != EAGAIN)
        stop(CANT_SEND, "send");
}

static void receive_datagram(struct connection *connection)
{
    size_t count = receive(connection, RECEIVE_SIZE, 0);
    if (!count)
        return;
    if (count != (size_t)options.size || (options.verify && memcmp(received_bytes, pattern, count))) {
        fprintf(stderr, "wrong bytes in an echo of %zu\n", count);
        exit(WRONG_BYTES);
    }
    histogram[step_of(now() - connection->begun)]++;
    measured.requests++;
    measured.bytes += count;
    mark_served(connection);
    send_datagram(connection);
}

static void resend_lost(void)
{
    uint64_t time = now();
    for (int i = 0; i < options.connections; i++) {
        if (time - connections[i].begun > RESEND_MILLISECONDS * 1000000ull) {
            measured.lost++;
            send_datagram(&connections[i]);
        }
    }
}

static void run_datagram_echo(void)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    uint64_t looked = now();
    for (int i = 0; i < options.connections; i++) {
        dial_datagrams(i);
        send_datagram(&connections[i]);
    }
    plan_measurement();
    while (!measure(now(), served == options.connections)) {
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, RESEND_MILLISECONDS);
        for (int i = 0; i < count; i++)
            receive_datagram(events[i].data.ptr);
        if (now() - looked > RESEND_MILLISECONDS * 1000000ull) {
            looked = now();
            resend_lost();
        }
    }
}

/* Only what the server tells of counts: it answers every 16th datagram. The rest was lost in its receive buffer. */
static void run_datagram_sink(void)
{
    uint64_t sent = 0;
    dial_datagrams(0);
    plan_measurement();
    while (!measure(now(), served == 1)) {
        if (!measured.requests)
            sent = 0;
        for (int i = 0; i < ANSWERED; i++)
            send_datagram(&connections[0]);
        sent += ANSWERED;
        while (receive(&connections[0], RECEIVE_SIZE, 0)) {
            mark_served(&connections[0]);
            measured.requests += ANSWERED;
            measured.bytes += (uint64_t)ANSWERED * (uint64_t)options.size;
        }
    }
    measured.lost = sent > measured.requests ? sent - measured.requests : 0;
}

static void set_up_tls(void)
{
}

/* The end of the process resets them. */
static void end_connections(void)
{
}
#else
#include "tls_client.h"
#endif

static const struct load {
    const char *name;
    void (*run)(void), (*print)(void), (*end)(void);
} loads[] = {
    {"echo", run_echo, print_result, end_connections},
    {"sink", run_sink, print_result, end_connections},
    {"source", run_source, print_result, end_connections},
    {"storm", run_storm, print_connections, end_connections},
    {"idle", run_idle, print_connections, end_connections},
#ifdef TLS
    {"handshake", run_handshakes, print_result, end_handshakes},
    {"resume", run_resumptions, print_result, end_handshakes},
#else
    {"datagram-echo", run_datagram_echo, print_result, end_connections},
    {"datagram-sink", run_datagram_sink, print_result, end_connections},
#endif
};

static const struct load *find_load(void)
{
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++) {
        if (!strcmp(options.mode, loads[i].name))
            return &loads[i];
    }
    fprintf(stderr, "unknown mode %s: " MODES "\n", options.mode);
    exit(USAGE);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    const struct load *load = find_load();
    set_deadline();
    raise_descriptor_limit();
    fill_buffers();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    set_up_tls();
    load->run();
    load->print();
    load->end();
    return 0;
}
