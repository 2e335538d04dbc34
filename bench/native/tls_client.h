/* What loadgen.c does differently over TLS 1.3 (built with -DTLS as tls_loadgen): bytes go through OpenSSL, connections
 * are opened by a handshake and ended by close_notify in both directions, and handshakes can be what is measured.
 *
 * Included by loadgen.c alone, in the middle: it uses what stands above. The server's certificate isn't verified, that
 * would cost the load generator alone; its signature of the handshake is. The only cipher suite that's offered is
 * AES-256-GCM: whatever a server prefers, all of them do the same work. */
#pragma once
#include <openssl/err.h>

enum {
    /* Several records per read: the load generator must not be what limits a server. */
    READ_BUFFER = 128 * 1024,
    END_MILLISECONDS = 5000,
};

static SSL_CTX *tls_context;

static void stop_tls(enum exit_status status, const char *what)
{
    const char *reason = ERR_reason_error_string(ERR_peek_error());
    fprintf(stderr, "%s: %s\n", what, reason ? reason : strerror(errno));
    exit(status);
}

/* TLS 1.3 sessions come after the handshake, beside the first bytes. The newest is kept. */
static int keep_session(SSL *tls, SSL_SESSION *session)
{
    struct connection *connection = SSL_get_app_data(tls);
    SSL_SESSION_free(connection->session);
    connection->session = session;
    return 1;
}

static void set_up_tls(void)
{
    signal(SIGPIPE, SIG_IGN);
    tls_context = SSL_CTX_new(TLS_client_method());
    if (!tls_context || !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION) ||
        !SSL_CTX_set_ciphersuites(tls_context, "TLS_AES_256_GCM_SHA384"))
        stop_tls(USAGE, "OpenSSL");
    SSL_CTX_set_verify(tls_context, SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(tls_context, 1);
    SSL_CTX_set_default_read_buffer_len(tls_context, READ_BUFFER);
    SSL_CTX_set_session_cache_mode(tls_context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL_STORE);
    SSL_CTX_sess_set_new_cb(tls_context, keep_session);
}

static void new_tls(struct connection *connection)
{
    connection->tls = SSL_new(tls_context);
    if (!connection->tls || !SSL_set_fd(connection->tls, connection->fd))
        stop_tls(USAGE, "OpenSSL");
    SSL_set_app_data(connection->tls, connection);
    SSL_set_connect_state(connection->tls);
}

/* Of what OpenSSL has returned: -1 with errno EAGAIN to try again, 0 when the server has ended with close_notify. */
static ssize_t tls_result(const struct connection *connection, int result)
{
    int before = errno;
    switch (SSL_get_error(connection->tls, result)) {
    case SSL_ERROR_NONE: return result;
    case SSL_ERROR_ZERO_RETURN: return 0;
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: errno = EAGAIN; return -1;
    case SSL_ERROR_SYSCALL: errno = before ? before : ECONNRESET; return -1;
    default: errno = EPROTO; return -1;
    }
}

static ssize_t put_bytes(struct connection *connection, const void *bytes, size_t length)
{
    ERR_clear_error();
    errno = 0;
    ssize_t count = tls_result(connection, SSL_write(connection->tls, bytes, (int)length));
    int unsent = count < 0 && errno == EAGAIN;
    connection->unsent = unsent ? bytes : NULL;
    connection->unsent_length = unsent ? length : 0;
    return count;
}

static ssize_t take_bytes(struct connection *connection, void *buffer, size_t length, int drop_bytes)
{
    (void)drop_bytes; /* they have to be decrypted anyway */
    ERR_clear_error();
    errno = 0;
    return tls_result(connection, SSL_read(connection->tls, buffer, (int)length));
}

/* Bytes that epoll no longer knows of: read from the socket, but not by us. */
static int holds_bytes(const struct connection *connection)
{
    return SSL_has_pending(connection->tls);
}

static void shake_hands(struct connection *connection)
{
    new_tls(connection);
    ERR_clear_error();
    if (SSL_connect(connection->tls) != 1)
        stop_tls(CANT_CONNECT, "handshake");
}

/* One step towards the end; true when close_notify has gone out and come in. What the server still has for us is read
 * and forgotten; not all at once, since a source that's read as fast as it sends never looks at what we have sent. */
static int ended(struct connection *connection)
{
    if (connection->unsent && put_bytes(connection, connection->unsent, connection->unsent_length) < 0 &&
        errno != EAGAIN)
        stop_tls(UNCLEAN_END, "sending the rest before the end");
    if (!connection->unsent && !connection->closing) {
        ERR_clear_error();
        connection->closing = SSL_shutdown(connection->tls) >= 0;
    }
    want_out(connection, connection->unsent || !connection->closing);
    ssize_t count = 1;
    for (int reads = 0; count > 0 && reads < READS_PER_EVENT; reads++)
        count = take_bytes(connection, received_bytes, RECEIVE_SIZE, 0);
    if (count < 0 && errno != EAGAIN)
        stop_tls(UNCLEAN_END, "no close_notify from the server");
    return count == 0 && connection->closing;
}

static void forget_connection(struct connection *connection)
{
    SSL_free(connection->tls);
    close(connection->fd);
    connection->tls = NULL;
}

static int end_step(struct connection *connection)
{
    if (!connection->tls)
        return 0;
    if (!ended(connection))
        return 1;
    forget_connection(connection);
    return 0;
}

/* After the measured time: a server that can't end its connections has failed, whatever it cost until then. */
static void end_connections(void)
{
    for (int i = 0; i < options.connections; i++)
        fcntl(connections[i].fd, F_SETFL, O_NONBLOCK);
    uint64_t deadline = now() + END_MILLISECONDS * 1000000ull;
    for (;;) {
        /* All of them, not those that epoll names: OpenSSL may hold bytes. */
        int left = 0;
        for (int i = 0; i < options.connections; i++)
            left += end_step(&connections[i]);
        if (!left)
            return;
        if (now() > deadline) {
            fprintf(stderr, "%d of %d connections weren't ended by the server within %d ms\n", left,
                    options.connections, END_MILLISECONDS);
            exit(UNCLEAN_END);
        }
        struct epoll_event events[EVENTS_PER_WAIT];
        epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 10);
    }
}

/* ---- handshakes: each connection is opened, echoes one byte, is ended, and is opened again ---- */

static int shook_hands(struct connection *connection)
{
    ERR_clear_error();
    errno = 0;
    int result = SSL_connect(connection->tls);
    if (result != 1) {
        tls_result(connection, result);
        if (errno != EAGAIN)
            stop_tls(CANT_CONNECT, "handshake");
        return 0;
    }
    /* A connection's first handshake is a full one in any case; it's over before anything is measured. */
    if (SSL_session_reused(connection->tls) != (options.resume && connection->served)) {
        fprintf(stderr, options.resume ? "the server doesn't resume sessions\n" : "a session was resumed\n");
        exit(NOT_RESUMED);
    }
    if (put_bytes(connection, pattern, 1) != 1)
        stop_tls(CANT_SEND, "send");
    return 1;
}

static void begin_handshake(struct connection *connection)
{
    connect_socket(connection);
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
    new_tls(connection);
    if (options.resume && connection->session)
        SSL_set_session(connection->tls, connection->session);
    connection->closing = 0;
    connection->stage = SHAKING_HANDS;
    connection->wants_out = 0;
    connection->begun = now();
    watch_connection(connection);
    shook_hands(connection); /* sends the ClientHello; the answer can't be there yet */
}

/* In TLS 1.3 the client is through before the server is: only an echo shows that both are. */
static int answered(struct connection *connection)
{
    if (receive(connection, 16, 0) != 1)
        return 0;
    if (*received_bytes != *pattern) {
        fprintf(stderr, "wrong byte in an echo\n");
        exit(WRONG_BYTES);
    }
    histogram[step_of(now() - connection->begun)]++;
    measured.requests++;
    return 1;
}

static void advance_handshake(struct connection *connection)
{
    switch (connection->stage) {
    case SHAKING_HANDS:
        if (!shook_hands(connection))
            return;
        connection->stage = ECHOING;
        /* fall through */
    case ECHOING:
        if (!answered(connection))
            return;
        connection->stage = ENDING;
        /* fall through */
    case ENDING:
        if (!ended(connection))
            return;
        forget_connection(connection);
        mark_served(connection);
        begin_handshake(connection);
    }
}

static void run_handshakes(void)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    for (int i = 0; i < options.connections; i++)
        begin_handshake(&connections[i]);
    plan_measurement();
    while (!measure(now(), served == options.connections)) {
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 50);
        for (int i = 0; i < count; i++)
            advance_handshake(events[i].data.ptr);
    }
}

static void run_resumptions(void)
{
    options.resume = 1;
    run_handshakes();
}

/* The handshakes under way are completed, and not repeated. */
static void end_handshakes(void)
{
    for (int i = 0; i < options.connections; i++) {
        struct connection *connection = &connections[i];
        fcntl(connection->fd, F_SETFL, 0);
        if (connection->stage == SHAKING_HANDS && shook_hands(connection))
            connection->stage = ECHOING;
        if (connection->stage == ECHOING && !answered(connection))
            stop_tls(CONNECTION_LOST, "the last echo");
    }
    end_connections();
}
