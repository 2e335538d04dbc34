/* What the two plain C servers share: a listening socket, and the line that tells a runner they are up. */
#pragma once
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BACKLOG = 4096 };

/* What a source sends. The load generator knows it, so that `loadgen source -v` can check every byte. */
#define SOURCE_BYTE 7

enum mode { ECHO, SINK, SOURCE };

static enum mode parse_mode(const char *word)
{
    if (!strcmp(word, "echo"))
        return ECHO;
    if (!strcmp(word, "sink"))
        return SINK;
    if (!strcmp(word, "source"))
        return SOURCE;
    fprintf(stderr, "unknown mode %s: echo, sink or source\n", word);
    exit(1);
}

/* Port 0 lets the kernel choose: a runner reads the choice from the READY line, so two runs can't collide. */
static int listen_on(int port, int socket_flags)
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | socket_flags, 0);
    if (listener < 0) {
        perror("socket");
        exit(1);
    }
    int one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    /* Accepted sockets inherit it: one system call less per connection. */
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG)) {
        perror("bind");
        exit(1);
    }
    return listener;
}

static void announce(int listener)
{
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    if (getsockname(listener, (struct sockaddr *)&address, &length)) {
        perror("getsockname");
        exit(1);
    }
    printf("READY %d\n", ntohs(address.sin_port));
    fflush(stdout);
}
