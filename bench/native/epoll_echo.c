/* epoll_echo: the plain C epoll server, the limit of what a readiness loop can reach.
 *
 * usage: epoll_echo PORT echo|sink|source [BUFFER_SIZE]
 *
 * echo    sends back what it receives
 * sink    receives and forgets
 * source  sends without end after the first byte received
 *
 * Level-triggered; one buffer for all connections; reads once and writes at once, and waits for writability
 * only when the socket wouldn't take everything. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "tcp.h"

enum { EVENTS_PER_WAIT = 512 };

struct connection {
    int fd;
    char *pending; /* echo: bytes that the socket wouldn't take; while there are any, nothing is read */
    size_t pending_length, pending_sent;
};

static int epoll_fd;
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
    close(connection->fd);
    free(connection->pending);
    free(connection);
}

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *connection = calloc(1, sizeof *connection);
        if (!connection) {
            close(fd);
            return;
        }
        connection->fd = fd;
        watch(connection, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static void send_pending(struct connection *connection)
{
    ssize_t sent = send(connection->fd, connection->pending + connection->pending_sent,
                        connection->pending_length - connection->pending_sent, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            drop(connection);
        return;
    }
    connection->pending_sent += sent;
    if (connection->pending_sent == connection->pending_length) {
        free(connection->pending);
        connection->pending = NULL;
        watch(connection, EPOLL_CTL_MOD, EPOLLIN);
    }
}

static void send_source(struct connection *connection)
{
    if (send(connection->fd, source_data, buffer_size, MSG_NOSIGNAL) < 0 && errno != EAGAIN)
        drop(connection);
}

static void echo(struct connection *connection, size_t received)
{
    ssize_t sent = send(connection->fd, buffer, received, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) {
            drop(connection);
            return;
        }
        sent = 0;
    }
    if ((size_t)sent == received)
        return;
    connection->pending_length = received - sent;
    connection->pending_sent = 0;
    connection->pending = malloc(connection->pending_length);
    if (!connection->pending) {
        drop(connection);
        return;
    }
    memcpy(connection->pending, buffer + sent, connection->pending_length);
    watch(connection, EPOLL_CTL_MOD, EPOLLOUT);
}

static void receive(struct connection *connection)
{
    ssize_t received = recv(connection->fd, buffer, buffer_size, 0);
    if (received <= 0) {
        if (received == 0 || errno != EAGAIN)
            drop(connection);
        return;
    }
    if (mode == ECHO)
        echo(connection, received);
    else if (mode == SOURCE)
        watch(connection, EPOLL_CTL_MOD, EPOLLOUT);
}

static void serve(struct connection *connection, unsigned events)
{
    if (connection->pending && (events & EPOLLOUT))
        send_pending(connection);
    else if (mode == SOURCE && (events & EPOLLOUT))
        send_source(connection);
    else
        receive(connection);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: epoll_echo PORT echo|sink|source [BUFFER_SIZE]\n");
        return 1;
    }
    mode = parse_mode(argv[2]);
    if (argc > 3)
        buffer_size = strtoul(argv[3], NULL, 10);
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
