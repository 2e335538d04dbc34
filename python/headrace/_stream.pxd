from libc.stdint cimport int32_t, uint8_t, uint32_t

from headrace._engine cimport Completion, Endpoint, Engine, Operation
from headrace._loop cimport LoopCore
from headrace._pool cimport Block, Ledger, Lease

cdef extern from *:
    """
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    /* An address as the kernel gave it: turned into Python objects only when somebody asks. */
    union headrace_address {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    };
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct sockaddr:
        int sa_family
    union headrace_address:
        sockaddr any


# What the socket module makes of an IPv4 or IPv6 address; None for anything else.
cdef object address_of(headrace_address *address)


cdef struct Vector:
    msghdr header
    iovec parts[64]


cdef class StreamTransport(Endpoint):
    cdef LoopCore loop
    cdef Engine engine
    cdef object protocol
    cdef object received           # the protocol's bound method that takes bytes, whichever it is
    cdef object context            # contextvars of whoever made the connection; callbacks run in it
    cdef object sock               # a socket object; made when asked for, or given
    cdef object server
    cdef dict extra
    cdef object first              # the first unsent item: bytes or Lease; None: all sent
    cdef list queue                # further items
    cdef list held                 # what came while reading was paused: leases, then maybe an errno or EOF
    cdef Ledger ledger
    cdef Vector *vector            # while a vectored send is in flight
    cdef object empty_waiter
    cdef object drain_timer        # while a close waits for queued bytes
    cdef object borrower           # while sendfile uses the descriptor: what ends that
    cdef object error              # what ended the connection
    cdef Py_ssize_t offset         # bytes of `first` that are sent
    cdef Py_ssize_t buffered       # bytes queued and in flight
    cdef Py_ssize_t sending        # bytes in flight
    cdef Py_ssize_t high, low
    cdef long long sent_total      # for the drain check of close()
    cdef Operation receive
    cdef Operation send
    cdef headrace_address peer
    cdef headrace_address near     # once somebody has asked, or the descriptor is closed
    cdef int fd, family, type, proto
    cdef int lost                  # > 0: no more can be written; counts the attempts
    cdef uint8_t kind              # LEASES, BYTES or BUFFERED
    cdef bint connected            # connection_made was called; connection_lost is owed
    cdef bint reading              # receives are wanted (started, and no EOF yet)
    cdef bint paused               # by pause_reading
    cdef bint held_scheduled
    cdef bint marked               # in the loop's list of what to flush
    cdef bint blocked              # the socket buffer was full
    cdef bint bulk                 # it was, not long ago: more than the high-water mark isn't tried at once
    cdef bint protocol_paused
    cdef bint closing
    cdef bint ending               # nothing more to do but to let operations end
    cdef bint finishing            # from now on the last operation's end schedules connection_lost
    cdef bint finished             # connection_lost is scheduled
    cdef bint eof_written          # by write_eof
    cdef bint shut                 # the FIN is out

    cdef int open(self, LoopCore loop, object sock, int fd, int family, int type, int proto,
                  object server, dict extra) except -1
    cdef int adopt(self, object protocol) except -1
    cdef int connect(self) except -1
    cdef int begin_reading(self) except -1
    cdef int arm(self) except -1
    cdef int complete_watched(self, Completion *completion) except -1
    cdef int on_receive(self, Completion *completion) except -1
    cdef int pass_on(self, Block *block, char *data, Py_ssize_t size) except -1
    cdef int pass_buffered(self, char *data, Py_ssize_t size) except -1
    cdef Py_ssize_t fill_buffer(self, object protocol, char *data, Py_ssize_t size) except -1
    cdef Lease make_lease(self, Block *block, char *data, Py_ssize_t size)
    cdef int call(self, object function, object argument, str name) except -1
    cdef int hold(self, Completion *completion) except -1
    cdef int schedule_held(self) except -1
    cdef int pass_held(self) except -1
    cdef int pass_item(self, object item) except -1
    cdef int drop_held(self) except -1
    cdef int on_end(self, int32_t result) except -1
    cdef int on_eof(self) except -1
    cdef object check_item(self, object data)
    cdef int append(self, object item, Py_ssize_t size) except -1
    cdef int queued(self, Py_ssize_t size) except -1
    cdef int want_flush(self, Py_ssize_t size) except -1
    cdef int begin_send(self) except -1
    cdef int fill_vector(self) except -1
    cdef int join_small(self) except -1
    cdef int consume(self, Py_ssize_t size) noexcept
    cdef int drop_queue(self) noexcept
    cdef int on_send(self, int32_t result) except -1
    cdef int drained(self) except -1
    cdef int pause_protocol(self) except -1
    cdef int resume_protocol(self) except -1
    cdef int watch_drain(self, int unsent) except -1
    cdef int fatal(self, object exc, str message) except -1
    cdef int force_close(self, object exc) except -1
    cdef int end(self) except -1
    cdef bint at_rest(self) noexcept
    cdef int check_finished(self) except -1
    cdef int let_go(self) except -1
    cdef object socket(self)
