/* tls_echo: what a server of plain C over epoll and OpenSSL (TLS 1.3) costs.
 *
 * usage: tls_echo PORT echo|sink|source --tls PEM      (certificate and key in one file) */
#define _GNU_SOURCE
#include "tcp.h"
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EVENTS_PER_WAIT = 512, BUFFER_SIZE = 256 * 1024, READ_AHEAD = 128 * 1024, READS_PER_EVENT = 32 };

struct connection {
    SSL *ssl;
    int fd, shaken;
    char *unsent; /* what the socket didn't take */
    size_t length, offset;
};

static SSL_CTX *context;
static int epoll_fd;
static enum mode mode;
static char buffer[BUFFER_SIZE];

static void prepare_tls(const char *pem)
{
    context = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, READ_AHEAD);
    if (SSL_CTX_use_certificate_chain_file(context, pem) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, pem, SSL_FILETYPE_PEM) != 1) {
        ERR_print_errors_fp(stderr);
        exit(1);
    }
}

static int would_block(struct connection *connection, int result)
{
    int error = SSL_get_error(connection->ssl, result);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
}

static void wait_for(struct connection *connection, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

static void end(struct connection *connection)
{
    SSL_free(connection->ssl);
    close(connection->fd);
    free(connection->unsent);
    free(connection);
}

static void accept_all(int listener)
{
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        struct connection *connection = calloc(1, sizeof *connection);
        connection->fd = fd;
        connection->ssl = SSL_new(context);
        SSL_set_fd(connection->ssl, fd);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

/* Each of the following says whether the connection goes on. */

static int write_echo(struct connection *connection, const char *data, size_t length)
{
    size_t sent = 0;
    while (sent < length) {
        int result = SSL_write(connection->ssl, data + sent, (int)(length - sent));
        if (result > 0) {
            sent += (size_t)result;
            continue;
        }
        if (!would_block(connection, result))
            return 0;
        connection->length = length - sent;
        connection->offset = 0;
        connection->unsent = malloc(connection->length);
        memcpy(connection->unsent, data + sent, connection->length);
        wait_for(connection, EPOLLOUT);
        return 1;
    }
    return 1;
}

static int write_unsent(struct connection *connection)
{
    while (connection->offset < connection->length) {
        int result = SSL_write(connection->ssl, connection->unsent + connection->offset,
                               (int)(connection->length - connection->offset));
        if (result <= 0)
            return would_block(connection, result);
        connection->offset += (size_t)result;
    }
    free(connection->unsent);
    connection->unsent = NULL;
    wait_for(connection, EPOLLIN);
    return 1;
}

static int write_source(struct connection *connection)
{
    int result = SSL_write(connection->ssl, buffer, BUFFER_SIZE);
    return result > 0 || would_block(connection, result);
}

static int read_some(struct connection *connection)
{
    for (int i = 0; i < READS_PER_EVENT || SSL_pending(connection->ssl); i++) {
        int result = SSL_read(connection->ssl, buffer, BUFFER_SIZE);
        if (result <= 0)
            return would_block(connection, result);
        if (mode == SOURCE) {
            memset(buffer, SOURCE_BYTE, sizeof buffer);
            wait_for(connection, EPOLLIN | EPOLLOUT);
            return 1;
        }
        if (mode == ECHO && (!write_echo(connection, buffer, (size_t)result)))
            return 0;
        if (connection->unsent)
            return 1;
    }
    return 1;
}

static int serve(struct connection *connection, uint32_t events)
{
    ERR_clear_error();
    if (!connection->shaken) {
        int result = SSL_accept(connection->ssl);
        if (result != 1)
            return would_block(connection, result);
        connection->shaken = 1;
    }
    if (connection->unsent)
        return write_unsent(connection);
    if (mode == SOURCE && events & EPOLLOUT)
        return write_source(connection);
    return read_some(connection);
}

int main(int argc, char **argv)
{
    if (argc != 5 || strcmp(argv[3], "--tls")) {
        fprintf(stderr, "usage: tls_echo PORT echo|sink|source --tls PEM\n");
        return 1;
    }
    mode = parse_mode(argv[2]);
    prepare_tls(argv[4]);
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(atoi(argv[1]), SOCK_NONBLOCK);
    struct epoll_event listening = {.events = EPOLLIN}, events[EVENTS_PER_WAIT];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &listening);
    announce(listener);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (!connection)
                accept_all(listener);
            else if (!serve(connection, events[i].events))
                end(connection);
        }
    }
}
