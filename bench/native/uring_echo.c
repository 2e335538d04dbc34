/* uring_echo: a plain C io_uring server, the limit of what a completion loop can reach. Every feature has a switch,
 * so that one can see what it is worth.
 *
 * usage: uring_echo PORT echo|sink|source [option=value...]
 *
 *   tr=defer|coop|none|sqpoll   how the kernel runs our completions (default defer)
 *   recv=multi|single|own       multishot or single-shot with provided buffers, or a buffer per connection
 *   bs=BYTES nb=COUNT           provided buffers: size and number (a power of 2)
 *   inc=0|1                     incremental buffers: a receive takes what it needs, the rest stays posted (6.12)
 *   bundle=0|1                  one receive may fill several buffers (6.10)
 *   skip=0|1                    silent sends: no completion unless they fail or are cut short
 *   zc=0|1                      zero-copy sends
 *   direct=0|1                  accepted sockets as direct descriptors
 *   accept=multi|single         regring=0|1   nosqa=0|1 (no SQ array)   sqs=ENTRIES cqs=ENTRIES
 *   eager=0|1                   one enter per send in place of one per turn
 *   pollfirst=0|1               receive: poll before the first try
 *   chunk=BYTES                 source: size of one send
 *   stats=0|1                   counters to stderr every 2,000 enters
 *
 * The best for TCP found so far, and what `c-uring` means in the tables: skip=1 inc=1 bs=262144 nb=8.
 *
 * A turn: publish returned buffers, re-arm receives that ended, one enter for everything, then the completions; what
 * a connection received in the turn leaves in one (vectored) send at its end. One send per connection is in flight:
 * two could be reordered after a partial one. */
#include "uring_raw.h"

#include <signal.h>
#include <sys/uio.h>

#include "tcp.h"

enum operation { ACCEPT = 1, RECEIVE, SEND, CLOSE, HANDLED };

enum {
    MAX_CONNECTIONS = 32768,
    MAX_SEGMENTS = 262144,
    MAX_BUFFERS = 65536,
    MAX_VECTORS = 64,
    DIRECT_DESCRIPTORS = 16000,
    STATS_EVERY = 2000,
    NONE = -1,
};

/* Received bytes on their way out; a list per connection, and one of the free ones. */
struct segment {
    char *data;
    uint32_t length;
    uint32_t buffer;
    int next;
};

struct connection {
    int fd;
    uint8_t used;
    uint8_t receiving; /* a receive is armed */
    uint8_t sending;   /* a send is in flight */
    uint8_t silent;    /* ... and it is a silent one */
    uint8_t blocked;   /* a silent send was cut short: the next one waits for the socket */
    uint8_t ended;     /* end of file or an error */
    uint8_t marked;    /* in the list of those to flush */
    int first, last;   /* queue of segments */
    int in_flight;     /* segments in the send in flight */
    uint32_t sent;     /* bytes of the first segment that are out already */
    int notified;      /* zero-copy: bytes sent, until the notification */
    struct msghdr message;
    struct iovec *vectors; /* outlive the connection: slots are used again */
    char *own_buffer;
};

struct options {
    const char *task_run;
    int multishot, own_buffers, incremental, bundle, direct, zero_copy, silent, register_ring, no_array;
    int multishot_accept, eager, poll_first, stats;
    size_t buffer_size;
    unsigned buffer_count, chunk, sq_entries, cq_entries;
};

static struct options options = {
    .task_run = "defer",
    .multishot = 1,
    .register_ring = 1,
    .no_array = 1,
    .multishot_accept = 1,
    .buffer_size = 4096,
    .buffer_count = 1024,
    .chunk = 256 * 1024,
    .sq_entries = 4096,
    .cq_entries = 16384,
};

static enum mode mode;
static struct ring ring;
static struct buffers buffers;
static struct connection *connections;
static struct segment *segments;
static int free_segment = NONE;
static uint32_t *references; /* per buffer: ours, and the kernel's while it may still write */
static uint32_t *offsets;    /* per incremental buffer: where the next received byte lies */
static int *marked, marked_count;
static int *to_rearm, rearm_count;
static int *silent_sends, silent_count;
static int listener, accepting;
static char *source_data;
static struct {
    uint64_t receives, no_buffers, sends, vectored, completions, silent_failures;
} counters;

static uint64_t user_data(enum operation operation, int index)
{
    return (uint64_t)operation << 56 | (uint32_t)index;
}

static void fail(const char *what, int error)
{
    fprintf(stderr, "%s: %s\n", what, strerror(error));
    exit(1);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail("memory", ENOMEM);
    return memory;
}

/* ---- submissions ---- */

static struct io_uring_sqe *entry_for(int opcode, enum operation operation, int index)
{
    struct io_uring_sqe *entry = ring_entry(&ring);
    entry->opcode = opcode;
    entry->user_data = user_data(operation, index);
    return entry;
}

static void set_descriptor(struct io_uring_sqe *entry, int fd)
{
    entry->fd = fd;
    if (options.direct)
        entry->flags |= IOSQE_FIXED_FILE;
}

static void arm_accept(void)
{
    struct io_uring_sqe *entry = entry_for(IORING_OP_ACCEPT, ACCEPT, 0);
    entry->fd = listener;
    if (options.multishot_accept)
        entry->ioprio = IORING_ACCEPT_MULTISHOT;
    if (options.direct)
        entry->file_index = IORING_FILE_INDEX_ALLOC;
    accepting = 1;
}

static void arm_receive(int index)
{
    struct connection *connection = &connections[index];
    struct io_uring_sqe *entry = entry_for(IORING_OP_RECV, RECEIVE, index);
    set_descriptor(entry, connection->fd);
    connection->receiving = 1;
    if (options.own_buffers) {
        if (!connection->own_buffer)
            connection->own_buffer = allocate(1, options.buffer_size);
        entry->addr = (uint64_t)connection->own_buffer;
        entry->len = options.buffer_size;
    } else {
        entry->flags |= IOSQE_BUFFER_SELECT;
        if (options.multishot)
            entry->ioprio |= IORING_RECV_MULTISHOT;
        if (options.bundle)
            entry->ioprio |= IORING_RECVSEND_BUNDLE;
    }
    if (options.poll_first)
        entry->ioprio |= IORING_RECVSEND_POLL_FIRST;
}

static void rearm_later(int index)
{
    to_rearm[rearm_count++] = index;
}

static void mark(int index)
{
    if (connections[index].marked)
        return;
    connections[index].marked = 1;
    marked[marked_count++] = index;
}

/* ---- received bytes: buffers and the queue of segments ---- */

static void release_buffer(uint32_t buffer)
{
    if (options.own_buffers || --references[buffer])
        return;
    offsets[buffer] = 0;
    buffers_recycle(&buffers, buffer);
}

static void enqueue(struct connection *connection, char *data, uint32_t length, uint32_t buffer)
{
    int index = free_segment;
    if (index == NONE)
        fail("segments", ENOBUFS);
    free_segment = segments[index].next;
    segments[index] = (struct segment){data, length, buffer, NONE};
    if (connection->last == NONE)
        connection->first = index;
    else
        segments[connection->last].next = index;
    connection->last = index;
}

static void drop_first(struct connection *connection)
{
    int index = connection->first;
    connection->first = segments[index].next;
    if (connection->first == NONE)
        connection->last = NONE;
    release_buffer(segments[index].buffer);
    segments[index].next = free_segment;
    free_segment = index;
}

static void drop_queue(struct connection *connection)
{
    while (connection->first != NONE)
        drop_first(connection);
    connection->sent = 0;
}

/* `count` more bytes of the queue are out. */
static void advance(struct connection *connection, uint32_t count)
{
    count += connection->sent;
    while (connection->first != NONE && count >= segments[connection->first].length) {
        count -= segments[connection->first].length;
        drop_first(connection);
    }
    connection->sent = connection->first == NONE ? 0 : count;
}

/* ---- sends ---- */

static void close_if_done(int index)
{
    struct connection *connection = &connections[index];
    if (!connection->used || !connection->ended || connection->sending || connection->receiving ||
        connection->first != NONE)
        return;
    connection->used = 0;
    struct io_uring_sqe *entry = entry_for(IORING_OP_CLOSE, CLOSE, index);
    if (options.direct)
        entry->file_index = connection->fd + 1;
    else
        entry->fd = connection->fd;
    entry->flags |= IOSQE_CQE_SKIP_SUCCESS;
}

static void send_source(int index)
{
    struct connection *connection = &connections[index];
    if (connection->ended) {
        close_if_done(index);
        return;
    }
    struct io_uring_sqe *entry = entry_for(options.zero_copy ? IORING_OP_SEND_ZC : IORING_OP_SEND, SEND, index);
    set_descriptor(entry, connection->fd);
    entry->addr = (uint64_t)source_data;
    entry->len = options.chunk;
    entry->msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
    connection->sending = 1;
}

static void fill_single(struct connection *connection, struct io_uring_sqe *entry)
{
    struct segment *segment = &segments[connection->first];
    entry->opcode = options.zero_copy ? IORING_OP_SEND_ZC : IORING_OP_SEND;
    entry->addr = (uint64_t)(segment->data + connection->sent);
    entry->len = segment->length - connection->sent;
    connection->in_flight = 1;
}

static void fill_vectored(struct connection *connection, struct io_uring_sqe *entry)
{
    if (!connection->vectors)
        connection->vectors = allocate(MAX_VECTORS, sizeof(struct iovec));
    uint32_t skip = connection->sent;
    int count = 0;
    for (int k = connection->first; k != NONE && count < MAX_VECTORS; k = segments[k].next) {
        connection->vectors[count].iov_base = segments[k].data + skip;
        connection->vectors[count++].iov_len = segments[k].length - skip;
        skip = 0;
    }
    connection->message = (struct msghdr){.msg_iov = connection->vectors, .msg_iovlen = count};
    entry->opcode = options.zero_copy ? IORING_OP_SENDMSG_ZC : IORING_OP_SENDMSG;
    entry->addr = (uint64_t)&connection->message;
    entry->len = 1;
    connection->in_flight = count;
    counters.vectored++;
}

/* A silent send wakes nobody, so nothing may wait for it: not the close, no retry after a short one, and no
 * notification that zero-copied memory is free. */
static int may_be_silent(const struct connection *connection)
{
    return options.silent && !connection->blocked && !connection->ended && !options.own_buffers &&
           !options.zero_copy;
}

static void send_queue(int index)
{
    struct connection *connection = &connections[index];
    if (connection->first == NONE) {
        close_if_done(index);
        return;
    }
    struct io_uring_sqe *entry = entry_for(IORING_OP_SEND, SEND, index);
    set_descriptor(entry, connection->fd);
    entry->msg_flags = MSG_NOSIGNAL | MSG_WAITALL;
    if (segments[connection->first].next == NONE)
        fill_single(connection, entry);
    else
        fill_vectored(connection, entry);
    connection->sending = 1;
    counters.sends++;
    if (may_be_silent(connection)) {
        /* With DONTWAIT a completion means failure: -EAGAIN, an error, or the partial count. */
        entry->msg_flags |= MSG_DONTWAIT;
        entry->flags |= IOSQE_CQE_SKIP_SUCCESS;
        connection->silent = 1;
        silent_sends[silent_count++] = index;
    }
    if (options.eager)
        ring_submit_and_wait(&ring, 0);
}

static void flush(int index)
{
    struct connection *connection = &connections[index];
    connection->marked = 0;
    if (connection->sending || !connection->used)
        return;
    if (mode == SOURCE)
        send_source(index);
    else
        send_queue(index);
}

/* ---- completions ---- */

static void on_accept(const struct io_uring_cqe *completion)
{
    if (!(completion->flags & IORING_CQE_F_MORE))
        accepting = 0;
    if (completion->res < 0) {
        fprintf(stderr, "accept: %s\n", strerror(-completion->res));
        return;
    }
    if (completion->res >= MAX_CONNECTIONS)
        fail("connections", EMFILE);
    struct connection *connection = &connections[completion->res];
    *connection = (struct connection){
        .fd = completion->res,
        .used = 1,
        .first = NONE,
        .last = NONE,
        .vectors = connection->vectors,
        .own_buffer = connection->own_buffer,
    };
    arm_receive(completion->res);
}

/* One buffer is consumed in pieces; the kernel keeps its reference until a completion comes without BUF_MORE. */
static void take_incremental(struct connection *connection, uint32_t buffer, uint32_t received, unsigned flags)
{
    while (received) {
        uint32_t offset = offsets[buffer];
        uint32_t room = buffers.size - offset;
        uint32_t length = received < room ? received : room;
        int finished = length == room || (length == received && !(flags & IORING_CQE_F_BUF_MORE));
        if (offset == 0)
            references[buffer] = 1;
        offsets[buffer] = offset + length;
        if (mode == ECHO) {
            references[buffer]++;
            enqueue(connection, buffers.memory + (size_t)buffer * buffers.size + offset, length, buffer);
        }
        received -= length;
        if (finished) {
            release_buffer(buffer);
            buffers.head++;
            if (received)
                buffer = buffers.ring[buffers.head & buffers.mask].bid;
        }
    }
}

static void take_whole(struct connection *connection, uint32_t buffer, uint32_t received)
{
    for (;;) {
        uint32_t length = received < buffers.size ? received : buffers.size;
        buffers.head++;
        references[buffer] = 1;
        if (mode == ECHO)
            enqueue(connection, buffers.memory + (size_t)buffer * buffers.size, length, buffer);
        else
            release_buffer(buffer);
        received -= length;
        if (!received)
            return;
        buffer = buffers.ring[buffers.head & buffers.mask].bid;
    }
}

/* A receive that ends without bytes may have consumed a buffer all the same. */
static void return_empty_buffer(const struct io_uring_cqe *completion)
{
    if (options.own_buffers || !(completion->flags & IORING_CQE_F_BUFFER) ||
        (completion->flags & IORING_CQE_F_BUF_MORE))
        return;
    uint32_t buffer = completion->flags >> IORING_CQE_BUFFER_SHIFT;
    if (offsets[buffer] == 0)
        references[buffer] = 1;
    buffers.head++;
    release_buffer(buffer);
}

static void on_receive_end(int index, const struct io_uring_cqe *completion)
{
    struct connection *connection = &connections[index];
    if (completion->res == -ENOBUFS) {
        counters.no_buffers++;
        rearm_later(index);
        return;
    }
    return_empty_buffer(completion);
    connection->ended = 1;
    if (completion->res < 0 && !connection->sending)
        drop_queue(connection);
    mark(index);
}

static void on_receive(int index, const struct io_uring_cqe *completion)
{
    struct connection *connection = &connections[index];
    counters.receives++;
    if (!(completion->flags & IORING_CQE_F_MORE))
        connection->receiving = 0;
    if (completion->res <= 0) {
        on_receive_end(index, completion);
        return;
    }
    if (options.own_buffers) {
        if (mode == ECHO)
            enqueue(connection, connection->own_buffer, completion->res, 0);
        else
            rearm_later(index);
        /* An echo's buffer is busy until the send is done: re-armed there. */
    } else {
        uint32_t buffer = completion->flags >> IORING_CQE_BUFFER_SHIFT;
        if (options.incremental)
            take_incremental(connection, buffer, completion->res, completion->flags);
        else
            take_whole(connection, buffer, completion->res);
        if (!connection->receiving)
            rearm_later(index);
    }
    if (mode != SINK)
        mark(index);
}

/* Zero-copy: the first completion tells the count, the notification that the memory is ours again.
 * False for a completion that is neither: a send that failed, or needed no notification. */
static int on_zero_copy(int index, const struct io_uring_cqe *completion)
{
    struct connection *connection = &connections[index];
    if (completion->flags & IORING_CQE_F_NOTIF) {
        connection->sending = 0;
        if (mode == ECHO)
            advance(connection, connection->notified);
        mark(index);
        return 1;
    }
    if (!(completion->flags & IORING_CQE_F_MORE))
        return 0;
    connection->notified = completion->res > 0 ? completion->res : 0;
    if (completion->res < 0)
        connection->ended = 1;
    return 1;
}

static void on_send(int index, const struct io_uring_cqe *completion)
{
    struct connection *connection = &connections[index];
    if (options.zero_copy && on_zero_copy(index, completion))
        return;
    connection->sending = 0;
    connection->blocked = 0;
    if (completion->res < 0) {
        connection->ended = 1;
        drop_queue(connection);
    } else if (mode == ECHO) {
        advance(connection, completion->res);
    }
    if (connection->first != NONE || connection->ended || mode == SOURCE)
        mark(index);
    if (options.own_buffers && !connection->receiving)
        rearm_later(index);
}

static void silent_send_failed(int index, const struct io_uring_cqe *completion)
{
    struct connection *connection = &connections[index];
    connection->silent = 0;
    connection->sending = 0;
    counters.silent_failures++;
    if (completion->res > 0)
        advance(connection, completion->res);
    else if (completion->res != -EAGAIN)
        drop_queue(connection);
    if (connection->first != NONE)
        connection->blocked = 1;
    mark(index);
}

static void silent_send_succeeded(int index)
{
    struct connection *connection = &connections[index];
    connection->silent = 0;
    connection->sending = 0;
    connection->sent = 0;
    for (int n = connection->in_flight; n > 0; n--)
        drop_first(connection);
    if (connection->first != NONE || connection->ended)
        mark(index);
}

/* Failures first: whatever has no completion by now went out whole. Receives of the same batch come after, so that
 * what they queue can be sent in this turn. */
static void settle_silent_sends(unsigned head, unsigned tail)
{
    if (!silent_count)
        return;
    for (unsigned at = head; at != tail; at++) {
        struct io_uring_cqe *completion = &ring.cqes[at & ring.cq_mask];
        int index = (int)(completion->user_data & 0xffffff);
        if (completion->user_data >> 56 == SEND && connections[index].silent) {
            silent_send_failed(index, completion);
            completion->user_data = user_data(HANDLED, 0);
        }
    }
    for (int k = 0; k < silent_count; k++) {
        if (connections[silent_sends[k]].silent)
            silent_send_succeeded(silent_sends[k]);
    }
    silent_count = 0;
}

static void dispatch(const struct io_uring_cqe *completion)
{
    int index = (int)(completion->user_data & 0xffffff);
    counters.completions++;
    switch (completion->user_data >> 56) {
    case ACCEPT:
        on_accept(completion);
        break;
    case RECEIVE:
        on_receive(index, completion);
        break;
    case SEND:
        on_send(index, completion);
        break;
    case CLOSE:
        fprintf(stderr, "close: %s\n", strerror(-completion->res));
        break;
    }
}

/* ---- the loop ---- */

static void rearm_receives(void)
{
    int count = rearm_count;
    rearm_count = 0;
    for (int k = 0; k < count; k++) {
        struct connection *connection = &connections[to_rearm[k]];
        int busy = options.own_buffers && connection->first != NONE;
        if (connection->used && !connection->receiving && !connection->ended && !busy)
            arm_receive(to_rearm[k]);
    }
}

static void print_counters(void)
{
    static uint64_t printed;
    if (!options.stats || ring.enters - printed <= STATS_EVERY)
        return;
    printed = ring.enters;
    fprintf(stderr, "enters %lu receives %lu sends %lu vectored %lu completions %lu no_buffers %lu silent_failures %lu\n",
            ring.enters, counters.receives, counters.sends, counters.vectored, counters.completions,
            counters.no_buffers, counters.silent_failures);
}

static void turn(void)
{
    buffers_publish(&buffers);
    rearm_receives();
    int result = ring_submit_and_wait(&ring, 1);
    if (result < 0 && result != -EINTR && result != -EBUSY && result != -ETIME)
        fail("io_uring_enter", -result);

    unsigned head = *ring.cq_head;
    unsigned tail = __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE);
    settle_silent_sends(head, tail);
    for (; head != tail; head++)
        dispatch(&ring.cqes[head & ring.cq_mask]);
    __atomic_store_n(ring.cq_head, head, __ATOMIC_RELEASE);

    if (!accepting)
        arm_accept();
    for (int k = 0; k < marked_count; k++)
        flush(marked[k]);
    marked_count = 0;
    print_counters();
}

/* ---- start ---- */

static int set_number(const char *name, long number)
{
    struct {
        const char *name;
        int *value;
    } switches[] = {
        {"inc", &options.incremental},      {"bundle", &options.bundle},      {"direct", &options.direct},
        {"zc", &options.zero_copy},         {"skip", &options.silent},        {"regring", &options.register_ring},
        {"nosqa", &options.no_array},       {"eager", &options.eager},        {"pollfirst", &options.poll_first},
        {"stats", &options.stats},
    };
    for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) {
        if (!strcmp(name, switches[i].name)) {
            *switches[i].value = (int)number;
            return 1;
        }
    }
    struct {
        const char *name;
        unsigned *value;
    } counts[] = {
        {"nb", &options.buffer_count},
        {"chunk", &options.chunk},
        {"sqs", &options.sq_entries},
        {"cqs", &options.cq_entries},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        if (!strcmp(name, counts[i].name)) {
            *counts[i].value = (unsigned)number;
            return 1;
        }
    }
    return 0;
}

static void set_option(char *option)
{
    char *value = strchr(option, '=');
    if (!value) {
        fprintf(stderr, "option=value, not %s\n", option);
        exit(1);
    }
    *value++ = 0;
    if (!strcmp(option, "tr")) {
        options.task_run = value;
    } else if (!strcmp(option, "recv")) {
        options.multishot = !strcmp(value, "multi");
        options.own_buffers = !strcmp(value, "own");
    } else if (!strcmp(option, "accept")) {
        options.multishot_accept = !strcmp(value, "multi");
    } else if (!strcmp(option, "bs")) {
        options.buffer_size = strtoul(value, NULL, 10);
    } else if (!set_number(option, atol(value))) {
        fprintf(stderr, "unknown option %s\n", option);
        exit(1);
    }
}

static unsigned setup_flags(void)
{
    unsigned flags = options.no_array ? SETUP_NO_SQARRAY : 0;
    if (!strcmp(options.task_run, "defer"))
        return flags | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    if (!strcmp(options.task_run, "coop"))
        return flags | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN;
    if (!strcmp(options.task_run, "sqpoll"))
        return flags | IORING_SETUP_SQPOLL;
    return flags;
}

static void start_ring(void)
{
    int error = ring_init(&ring, options.sq_entries, options.cq_entries, setup_flags(), options.register_ring);
    if (error)
        fail("io_uring_setup", -error);
    if (!options.own_buffers) {
        unsigned flags = options.incremental ? PBUF_RING_INC : 0;
        error = buffers_init(&ring, &buffers, options.buffer_count, options.buffer_size, flags);
        if (error)
            fail("buffer ring", -error);
    }
    if (options.direct) {
        struct io_uring_rsrc_register table = {.nr = DIRECT_DESCRIPTORS, .flags = IORING_RSRC_REGISTER_SPARSE};
        if (ring_register(&ring, IORING_REGISTER_FILES2, &table, sizeof table) < 0)
            fail("direct descriptors", errno);
    }
}

static void allocate_tables(void)
{
    connections = allocate(MAX_CONNECTIONS, sizeof *connections);
    references = allocate(MAX_BUFFERS, sizeof *references);
    offsets = allocate(MAX_BUFFERS, sizeof *offsets);
    marked = allocate(MAX_CONNECTIONS, sizeof *marked);
    /* A connection can be queued for re-arming twice in a turn: by its receive and by its send. */
    to_rearm = allocate(2 * MAX_CONNECTIONS, sizeof *to_rearm);
    silent_sends = allocate(2 * MAX_CONNECTIONS, sizeof *silent_sends);
    segments = allocate(MAX_SEGMENTS, sizeof *segments);
    source_data = allocate(1, options.chunk);
    for (int k = MAX_SEGMENTS - 1; k >= 0; k--) {
        segments[k].next = free_segment;
        free_segment = k;
    }
    memset(source_data, SOURCE_BYTE, options.chunk);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: uring_echo PORT echo|sink|source [option=value...]\n");
        return 1;
    }
    mode = parse_mode(argv[2]);
    for (int i = 3; i < argc; i++)
        set_option(argv[i]);
    signal(SIGPIPE, SIG_IGN);
    start_ring();
    allocate_tables();
    listener = listen_on(atoi(argv[1]), 0);
    arm_accept();
    announce(listener);
    for (;;)
        turn();
}
