/* tls_server: the plain C epoll server over OpenSSL, TLS 1.3; the limit of what a TLS server can reach.
 *
 * usage: tls_server PORT tls-echo|tls-sink|tls-source CERTIFICATE [BUFFER_SIZE]
 *
 * echo    sends back what it receives
 * sink    receives and forgets
 * source  sends without end after the first byte received
 *
 * CERTIFICATE is a PEM file with the certificate and its key. Level-triggered; one buffer for all connections; OpenSSL
 * reads and writes the sockets itself, several records per read. A client's close_notify is answered by one. */
#define _GNU_SOURCE
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "tcp.h"

enum { EVENTS_PER_WAIT = 512, READS_PER_EVENT = 32, READ_BUFFER = 128 * 1024 };

struct connection {
    int fd;
    SSL *tls;
    char *pending; /* echo: bytes that the socket wouldn't take; while there are any, nothing is read */
    size_t pending_length, pending_sent;
};

static int epoll_fd;
static SSL_CTX *context;
static enum mode mode;
static char *buffer, *source_data;
static size_t buffer_size = 256 * 1024;

static void watch(struct connection *connection, int operation, unsigned events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    epoll_ctl(epoll_fd, operation, connection->fd, &event);
}

static void drop(struct connection *connection)
{
    SSL_free(connection->tls);
    close(connection->fd);
    free(connection->pending);
    free(connection);
}

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *connection = calloc(1, sizeof *connection);
        SSL *tls = SSL_new(context);
        if (!connection || !tls || !SSL_set_fd(tls, fd)) {
            SSL_free(tls);
            free(connection);
            close(fd);
            return;
        }
        SSL_set_accept_state(tls);
        connection->fd = fd;
        connection->tls = tls;
        watch(connection, EPOLL_CTL_ADD, EPOLLIN);
    }
}

/* True when the operation is to be tried again; otherwise the connection has ended and is gone. */
static int survives(struct connection *connection, int result)
{
    int reason = SSL_get_error(connection->tls, result);
    if (reason == SSL_ERROR_WANT_READ || reason == SSL_ERROR_WANT_WRITE)
        return 1;
    if (reason == SSL_ERROR_ZERO_RETURN)
        SSL_shutdown(connection->tls);
    drop(connection);
    return 0;
}

static void send_pending(struct connection *connection)
{
    int sent = SSL_write(connection->tls, connection->pending + connection->pending_sent,
                         (int)(connection->pending_length - connection->pending_sent));
    if (sent <= 0) {
        survives(connection, sent);
        return;
    }
    connection->pending_sent += (size_t)sent;
    if (connection->pending_sent == connection->pending_length) {
        free(connection->pending);
        connection->pending = NULL;
        watch(connection, EPOLL_CTL_MOD, EPOLLIN);
    }
}

/* One record a call: as many as the data has, or as the socket takes. */
static void send_source(struct connection *connection)
{
    for (size_t total = 0; total < buffer_size;) {
        int sent = SSL_write(connection->tls, source_data, (int)buffer_size);
        if (sent <= 0) {
            survives(connection, sent);
            return;
        }
        total += (size_t)sent;
    }
}

static int keep_pending(struct connection *connection, const char *bytes, size_t length)
{
    connection->pending = malloc(length);
    if (!connection->pending) {
        drop(connection);
        return 0;
    }
    memcpy(connection->pending, bytes, length);
    connection->pending_length = length;
    connection->pending_sent = 0;
    watch(connection, EPOLL_CTL_MOD, EPOLLOUT);
    return 0;
}

/* True when everything was sent. */
static int echo(struct connection *connection, size_t received)
{
    size_t sent = 0;
    while (sent < received) {
        int count = SSL_write(connection->tls, buffer + sent, (int)(received - sent));
        if (count <= 0)
            return survives(connection, count) && keep_pending(connection, buffer + sent, received - sent);
        sent += (size_t)count;
    }
    return 1;
}

/* One read, and what follows from it; true when there may be more to read now. */
static int receive(struct connection *connection)
{
    ERR_clear_error();
    int received = SSL_read(connection->tls, buffer, (int)buffer_size);
    if (received <= 0) {
        survives(connection, received);
        return 0;
    }
    if (mode == ECHO)
        return echo(connection, (size_t)received);
    if (mode == SOURCE)
        watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    return mode == SINK;
}

/* What OpenSSL has read from the socket has to be taken now: epoll won't tell of it again. */
static void receive_all(struct connection *connection)
{
    for (int reads = 0; receive(connection); reads++) {
        if (reads >= READS_PER_EVENT && !SSL_has_pending(connection->tls))
            return;
    }
}

static void serve(struct connection *connection, unsigned events)
{
    ERR_clear_error();
    if (connection->pending) {
        if (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
            send_pending(connection);
    } else if (mode == SOURCE && (events & EPOLLOUT) && !(events & EPOLLIN))
        send_source(connection);
    else
        receive_all(connection);
}

static void set_up_tls(const char *certificate)
{
    context = SSL_CTX_new(TLS_server_method());
    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) ||
        SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, certificate, SSL_FILETYPE_PEM) != 1) {
        ERR_print_errors_fp(stderr);
        exit(1);
    }
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, READ_BUFFER);
}

int main(int argc, char **argv)
{
    if (argc < 4 || strncmp(argv[2], "tls-", 4)) {
        fprintf(stderr, "usage: tls_server PORT tls-echo|tls-sink|tls-source CERTIFICATE [BUFFER_SIZE]\n");
        return 1;
    }
    mode = parse_mode(argv[2] + 4);
    set_up_tls(argv[3]);
    if (argc > 4)
        buffer_size = strtoul(argv[4], NULL, 10);
    signal(SIGPIPE, SIG_IGN);
    buffer = malloc(buffer_size);
    source_data = malloc(buffer_size);
    if (!buffer || !source_data)
        return 1;
    memset(source_data, SOURCE_BYTE, buffer_size);
    int listener = listen_on(atoi(argv[1]), SOCK_NONBLOCK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    /* The listener is the one without a connection. */
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    announce(listener);

    struct epoll_event events[EVENTS_PER_WAIT];
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                serve(events[i].data.ptr, events[i].events);
            else
                accept_all(listener);
        }
    }
}
