"""Datagram transports (UDP and Unix) over an engine.

Rules
-----
* One poll is in flight per transport. When it completes, the transport takes its place in the ready queue, as
  asyncio's does: what was ready before comes first. There one ``recvmmsg`` takes up to ``HR_BATCH`` datagrams; then the
  poll is armed again, so that a busy socket can't keep the others waiting. No endpoint holds receive memory: the
  buffers belong to the loop, since between two calls nothing is in them.
* Sending only queues. At the end of the turn all that was queued goes out by ``sendmmsg``; earlier if it's more than
  one call takes, or more than the high-water mark. The protocol is paused only if the socket didn't take it.
* A datagram that can't be sent is dropped, and ``error_received`` told from the ready queue, never from within a call
  the protocol makes; those behind it are sent all the same.
* What was received and can't be passed on yet (reading is paused, or an interrupt left the loop) is held, in order;
  nothing more is received before that's gone.
* The end, as in ``_stream``: ``closing`` (nothing more is received; queued datagrams go out) -> ``ending`` (the poll is
  cancelled) -> ``finished`` (it has ended; ``connection_lost`` is scheduled) -> the descriptor is closed.
"""
import asyncio
import os
import sys
import warnings
from asyncio import constants, transports
from asyncio.log import logger

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from headrace._engine cimport IDLE, POLL, Completion, Endpoint, Engine, Operation
from headrace._loop cimport LoopCore
from headrace._pool cimport Lease
from headrace._stream cimport address_of, headrace_address, sockaddr

from headrace.errors import StalledError

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/un.h>

    /* Datagrams of one recvmmsg, and of one sendmmsg. */
    #define HR_BATCH 32
    /* asyncio's buffer, and more than UDP can carry; a Unix datagram may be longer, up to the sender's SO_SNDBUF. */
    #define HR_DATAGRAM_LIMIT (256 * 1024)
    /* From one receive buffer to the next. Not a power of two: the heads of a batch would share their cache sets. */
    #define HR_STRIDE (HR_DATAGRAM_LIMIT + 4096 + 1088)

    union hr_name {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un un;
    };

    struct hr_datagrams {
        char *memory;    /* pages that no datagram has touched cost nothing */
        int used;        /* `in` whose msg_namelen the kernel has overwritten */
        struct mmsghdr in[HR_BATCH], out[HR_BATCH];
        struct iovec in_parts[HR_BATCH], out_parts[HR_BATCH];
        union hr_name names[HR_BATCH];
    };

    static int hr_datagrams_open(struct hr_datagrams *d) {
        d->memory = mmap(NULL, (size_t)HR_BATCH * HR_STRIDE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (d->memory == MAP_FAILED) {
            d->memory = NULL;
            return -1;
        }
        /* One small datagram isn't worth a huge page. */
        madvise(d->memory, (size_t)HR_BATCH * HR_STRIDE, MADV_NOHUGEPAGE);
        for (int i = 0; i < HR_BATCH; i++) {
            d->in_parts[i].iov_base = d->memory + (size_t)i * HR_STRIDE;
            d->in_parts[i].iov_len = HR_DATAGRAM_LIMIT;
            d->in[i].msg_hdr.msg_iov = &d->in_parts[i];
            d->in[i].msg_hdr.msg_iovlen = 1;
            d->in[i].msg_hdr.msg_name = &d->names[i];
            d->out[i].msg_hdr.msg_iov = &d->out_parts[i];
            d->out[i].msg_hdr.msg_iovlen = 1;
        }
        d->used = HR_BATCH;
        return 0;
    }

    static void hr_datagrams_close(struct hr_datagrams *d) {
        if (d->memory != NULL)
            munmap(d->memory, (size_t)HR_BATCH * HR_STRIDE);
    }

    /* How many datagrams, or -errno. With MSG_TRUNC, msg_len is a datagram's own length, however much of it fits. */
    static int hr_receive(struct hr_datagrams *d, int fd) {
        int n;
        for (int i = 0; i < d->used; i++)
            d->in[i].msg_hdr.msg_namelen = sizeof(union hr_name);
        n = recvmmsg(fd, d->in, HR_BATCH, MSG_DONTWAIT | MSG_TRUNC, NULL);
        d->used = n > 0 ? n : 1;
        return n >= 0 ? n : -errno;
    }

    static void hr_put(struct hr_datagrams *d, int i, const void *data, size_t size, void *name, unsigned namelen) {
        d->out_parts[i].iov_base = (void *)data;
        d->out_parts[i].iov_len = size;
        d->out[i].msg_hdr.msg_name = name;
        d->out[i].msg_hdr.msg_namelen = namelen;
    }

    /* How many of `count` were sent, or -errno of the first. */
    static int hr_send_out(struct hr_datagrams *d, int fd, int count) {
        struct msghdr *first = &d->out[0].msg_hdr;
        int n;
        if (count == 1)    /* less to copy for the kernel */
            n = sendto(fd, d->out_parts[0].iov_base, d->out_parts[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL,
                       first->msg_name, first->msg_namelen) < 0 ? -1 : 1;
        else
            n = sendmmsg(fd, d->out, count, MSG_DONTWAIT | MSG_NOSIGNAL);
        return n >= 0 ? n : -errno;
    }

    static unsigned hr_name_hash(const union hr_name *name, unsigned size) {
        uint32_t word, hash = size;
        for (unsigned i = 0; i + 4 <= size; i += 4) {
            memcpy(&word, (const char *)name + i, 4);
            hash = (hash ^ word) * 0x9e3779b1u;
            hash ^= hash >> 15;
        }
        return hash;
    }

    static unsigned hr_v4_name(union hr_name *name, const char *host, unsigned port) {
        memset(&name->v4, 0, sizeof(name->v4));
        name->v4.sin_family = AF_INET;
        name->v4.sin_port = htons(port);
        return inet_pton(AF_INET, host, &name->v4.sin_addr) == 1 ? sizeof(name->v4) : 0;
    }

    static unsigned hr_v6_name(union hr_name *name, const char *host, unsigned port, unsigned flow, unsigned scope) {
        memset(&name->v6, 0, sizeof(name->v6));
        name->v6.sin6_family = AF_INET6;
        name->v6.sin6_port = htons(port);
        name->v6.sin6_flowinfo = htonl(flow);
        name->v6.sin6_scope_id = scope;
        return inet_pton(AF_INET6, host, &name->v6.sin6_addr) == 1 ? sizeof(name->v6) : 0;
    }

    /* A path, which is followed by a NUL, or an abstract name, which begins with one. 0: it's neither. */
    static unsigned hr_un_name(union hr_name *name, const char *path, size_t size) {
        if (size == 0 || size > sizeof(name->un.sun_path) - (path[0] != 0) || (path[0] && memchr(path, 0, size)))
            return 0;
        memset(&name->un, 0, sizeof(name->un));
        name->un.sun_family = AF_UNIX;
        memcpy(name->un.sun_path, path, size);
        return offsetof(struct sockaddr_un, sun_path) + size + (path[0] != 0);
    }
    static const char *hr_un_path(const union hr_name *name) { return name->un.sun_path; }
    static unsigned hr_un_size(unsigned namelen) {
        unsigned head = offsetof(struct sockaddr_un, sun_path);
        return namelen > head ? namelen - head : 0;
    }
    """
    enum:
        AF_INET, AF_INET6, AF_UNIX, HR_BATCH, HR_DATAGRAM_LIMIT
        E_AGAIN "EAGAIN", E_CANCELED "ECANCELED", E_INTR "EINTR", E_MSGSIZE "EMSGSIZE"
    union hr_name:
        sockaddr any
    struct iovec:
        void *iov_base
    struct msghdr:
        unsigned msg_namelen
    struct mmsghdr:
        msghdr msg_hdr
        unsigned msg_len
    struct hr_datagrams:
        char *memory
        mmsghdr *incoming "in"
        iovec *in_parts
        hr_name *names
    int hr_datagrams_open(hr_datagrams *d)
    void hr_datagrams_close(hr_datagrams *d)
    int hr_receive(hr_datagrams *d, int fd)
    void hr_put(hr_datagrams *d, int i, const void *data, size_t size, void *name, unsigned namelen)
    int hr_send_out(hr_datagrams *d, int fd, int count)
    unsigned hr_name_hash(const hr_name *name, unsigned size)
    unsigned hr_v4_name(hr_name *name, const char *host, unsigned port)
    unsigned hr_v6_name(hr_name *name, const char *host, unsigned port, unsigned flow, unsigned scope)
    unsigned hr_un_name(hr_name *name, const char *path, size_t size)
    const char *hr_un_path(const hr_name *name)
    unsigned hr_un_size(unsigned namelen)
    int memcmp(const void *a, const void *b, size_t size)
    size_t strnlen(const char *text, size_t size)

cdef enum:
    # Peers whose addresses are kept ready, by what the kernel calls them and by the object that users call them.
    PEERS = 1024
    DEFAULT_HIGH_WATER = 64 * 1024

# What a queued datagram counts for besides its bytes; and whether an empty one is sent. Both as this Python's asyncio.
cdef int HEADER_SIZE = 8 if sys.version_info >= (3, 13) else 0
cdef bint SENDS_EMPTY = sys.version_info >= (3, 13)

# A Unix socket can be writable although the peer it sends to isn't: tried again after a while (seconds).
cdef double RETRY_FIRST = 0.0005
cdef double RETRY_LAST = 0.016
# close() gives up when no datagram went out for so long (seconds).
cdef double DRAIN_PATIENCE = 30.0


class _Facade(transports._FlowControlMixin, transports.DatagramTransport):
    """What ``transport.__class__`` answers, so that ``isinstance(transport, asyncio.DatagramTransport)`` holds.

    A class with C fields can't inherit from a Python class with a layout of its own.
    """


@cython.final
@cython.freelist(64)
cdef class Peer:
    """An address, as the kernel has it and as users see it."""

    cdef hr_name name
    cdef unsigned size      # of the name; 0: one that only the socket module understands
    cdef object address


cdef object unix_address(const hr_name *name, unsigned size):
    """What the socket module makes of it: None for an unnamed socket, bytes for an abstract name, else a path."""
    cdef const char *path = hr_un_path(name)
    cdef unsigned length = hr_un_size(size)
    if size == 0:
        return None
    if length and path[0] == 0:
        return PyBytes_FromStringAndSize(path, length)
    return os.fsdecode(PyBytes_FromStringAndSize(path, strnlen(path, length)))


cdef unsigned read_inet(hr_name *name, int family, tuple address):
    """The kernel's form of an address whose host is in numbers; 0: leave it to the socket module."""
    cdef Py_ssize_t i, count = len(address)
    cdef long numbers[3]
    if count < 2 or count > (2 if family == AF_INET else 4) or type(address[0]) is not str:
        return 0
    numbers[1] = numbers[2] = 0
    for i in range(1, count):
        if type(address[i]) is not int or not 0 <= address[i] <= (0xffff, 0xfffff, 0xffffffff)[i - 1]:
            return 0
        numbers[i - 1] = address[i]
    try:
        host = (<str>address[0]).encode("ascii")
    except UnicodeEncodeError:
        return 0
    if b"\0" in host:
        return 0
    if family == AF_INET:
        return hr_v4_name(name, host, <unsigned>numbers[0])
    return hr_v6_name(name, host, <unsigned>numbers[0], <unsigned>numbers[1], <unsigned>numbers[2])


@cython.final
cdef class DatagramBatch:
    """What the endpoints of one loop share: buffers for a batch of datagrams, and the peers that were met.

    A batch is passed on before anything else is received. Whoever runs a turn of the loop within a callback makes its
    ``reader`` put by what is left.
    """

    cdef hr_datagrams *batch
    cdef Endpoint reader            # whose datagrams are in the buffers, while they are passed on
    cdef list by_name, by_object    # of Peer; a hash decides the place, and who comes later takes it

    def __cinit__(self):
        self.batch = <hr_datagrams *>calloc(1, sizeof(hr_datagrams))
        if self.batch == NULL or hr_datagrams_open(self.batch) < 0:
            raise MemoryError("no memory for receiving datagrams")
        self.by_name = [None] * PEERS
        self.by_object = [None] * PEERS

    def __dealloc__(self):
        if self.batch != NULL:
            hr_datagrams_close(self.batch)
            free(self.batch)

    cdef object sender(self, int i):
        """The address that the `i`-th received datagram came from."""
        cdef hr_name *name = &self.batch.names[i]
        cdef unsigned size = self.batch.incoming[i].msg_hdr.msg_namelen
        cdef unsigned place
        cdef Peer peer
        if size > sizeof(hr_name):
            size = sizeof(hr_name)
        if size == 0:
            return None
        place = hr_name_hash(name, size) % PEERS
        peer = <Peer>self.by_name[place]
        if peer is not None and peer.size == size and memcmp(&peer.name, name, size) == 0:
            return peer.address
        peer = Peer.__new__(Peer)
        memcpy(&peer.name, name, size)
        peer.size = size
        if name.any.sa_family == AF_UNIX:
            peer.address = unix_address(name, size)
        else:
            peer.address = address_of(<headrace_address *>name)
        self.by_name[place] = peer
        self.remember(peer)
        return peer.address

    cdef int remember(self, Peer peer) except -1:
        # Whoever answers uses the very object that came with the question.
        self.by_object[(<uintptr_t><PyObject *>peer.address >> 4) % PEERS] = peer
        return 0

    cdef Peer find(self, int family, object address):
        """The peer that `address` names. One of size 0 is left to the socket module, name resolution included."""
        cdef Peer peer = <Peer>self.by_object[(<uintptr_t><PyObject *>address >> 4) % PEERS]
        if peer is not None and peer.address is address and peer.name.any.sa_family == family:
            return peer
        peer = Peer.__new__(Peer)
        peer.address = address
        peer.size = 0
        if family == AF_UNIX:
            if type(address) is str or type(address) is bytes:
                path = os.fsencode(address)
                peer.size = hr_un_name(&peer.name, PyBytes_AS_STRING(path), PyBytes_GET_SIZE(path))
        elif type(address) is tuple:
            peer.size = read_inet(&peer.name, family, address)
        if peer.size:
            self.remember(peer)
        return peer


cdef inline Py_ssize_t size_of(object item) noexcept:
    return PyBytes_GET_SIZE(item) if type(item) is bytes else (<Lease>item).size


cdef inline const char *memory_of(object item) noexcept:
    return <const char *>PyBytes_AS_STRING(item) if type(item) is bytes else (<Lease>item).data


cdef inline void done_with(object item) noexcept:
    if type(item) is Lease:
        (<Lease>item).unpin()


cdef object os_error(int result):
    return OSError(-result, os.strerror(-result))


@cython.final
cdef class DatagramTransport(Endpoint):
    """A datagram socket; an :class:`asyncio.DatagramTransport`.

    Made by the loop, never directly. Not thread-safe: every method belongs to the loop's thread.
    """

    cdef LoopCore loop
    cdef Engine engine
    cdef DatagramBatch shared
    cdef object protocol
    cdef object context            # contextvars of whoever made the endpoint; callbacks run in it
    cdef object sock
    cdef object address            # of remote_addr=: the only one that may be sent to
    cdef dict extra
    cdef list items                # what is to be sent: bytes and leases,
    cdef list targets              # and to whom: a Peer, or None when connected
    cdef list held                 # (data, address) that can't be passed on yet
    cdef object retry              # the timer of a Unix socket whose peer is full
    cdef object drain_timer        # while a close waits for queued datagrams
    cdef object error              # what ended the endpoint
    cdef double retry_delay
    cdef Py_ssize_t buffered       # bytes queued
    cdef Py_ssize_t high, low
    cdef long long sent_total      # datagrams, for the drain check of close()
    cdef Operation poll
    cdef int fd, family
    cdef int next, count           # datagrams of the batch that this transport is passing on, if it is
    cdef int lost                  # > 0: no more can be sent; counts the attempts
    cdef bint connected            # the socket has a peer
    cdef bint reading              # receiving has begun
    cdef bint paused               # by pause_reading
    cdef bint receiving            # from the poll's completion until the batch is passed on
    cdef bint held_scheduled
    cdef bint marked               # in the loop's list of what to flush
    cdef bint sending              # send_out is at work
    cdef bint blocked              # the socket was full; waits for it
    cdef bint protocol_paused
    cdef bint closing
    cdef bint ending               # nothing more to do but to let the poll end
    cdef bint finishing            # from now on the poll's end schedules connection_lost
    cdef bint finished             # connection_lost is scheduled

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, LoopCore loop, DatagramBatch shared, sock, protocol, address=None, waiter=None, extra=None):
        self.loop = loop
        self.engine = loop.engine
        self.shared = shared
        self.sock = sock
        self.family = sock.family
        self.address = address if address else None
        self.context = PyContext_CopyCurrent()
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.items = []
        self.targets = []
        self.retry_delay = RETRY_FIRST
        self.poll.owner = <PyObject *>self
        self.poll.kind = POLL
        self.poll.fd = sock.fileno()
        self.describe({} if extra is None else extra)
        self.set_protocol(protocol)
        loop.remember(self.poll.fd, self)
        self.fd = self.poll.fd
        loop.call_soon(protocol.connection_made, self, context=self.context)
        if waiter is None:
            loop.call_soon(self._begin_reading)
            return
        # Whoever waits gets the transport before the protocol gets its first datagram: at that turn's end its wake-up
        # is in the ready queue, and reading begins behind it.
        loop.call_soon(asyncio.futures._set_result_unless_cancelled, waiter, None)
        loop.call_soon(loop.call_soon, self._begin_reading)

    cdef int describe(self, dict extra) except -1:
        """What get_extra_info tells. As with asyncio, that's how things stand now: a later bind doesn't show."""
        cdef object peer = ask(self.sock.getpeername)
        self.connected = peer is not None
        self.extra = dict(extra)
        self.extra["socket"] = asyncio.trsock.TransportSocket(self.sock)
        self.extra["sockname"] = ask(self.sock.getsockname)
        self.extra.setdefault("peername", peer)
        return 0

    # ---- receiving ------------------------------------------------------------------------------------------

    def _begin_reading(self):
        self.reading = True
        self.arm()

    cdef int arm(self) except -1:
        if (self.poll.state == IDLE and self.reading and not self.receiving and not self.paused
                and not self.closing and self.held is None):
            self.engine.submit(&self.poll)
        return 0

    cdef int complete(self, Completion *completion) except -1:
        cdef int32_t result = completion.result
        if self.closing:
            return self.check_finished() if self.ending else 0
        if result < 0 and result != -E_CANCELED and result != -E_INTR and result != -E_AGAIN:
            return self.force_close(os_error(result))    # not a socket any more: its owner closed it
        if result < 0:
            return self.arm()
        self.receiving = True
        self.loop.call_soon(self._receive, context=self.context)
        return 0

    def _receive(self):
        try:
            if not self.closing and not self.paused:
                self.receive()
        finally:
            self.receiving = False
            self.schedule_held()
            self.arm()

    cdef int receive(self) except -1:
        cdef int n
        if self.shared.reader is not None:
            (<DatagramTransport>self.shared.reader).hold()
        self.engine.calls += 1
        n = hr_receive(self.shared.batch, self.fd)
        if n > 0:
            return self.pass_batch(n)
        if n < 0 and n != -E_AGAIN and n != -E_INTR:
            self.tell_error(os_error(n))
        return 0

    cdef int pass_batch(self, int count) except -1:
        self.next = 0
        self.count = count
        self.shared.reader = self
        try:
            while self.next < self.count and not self.paused and not self.closing:
                self.next += 1
                self.pass_received(self.next - 1)
        finally:
            if self.shared.reader is self:
                self.hold()
        return 0

    cdef int pass_received(self, int i) except -1:
        cdef unsigned size = self.shared.batch.incoming[i].msg_len
        if size > HR_DATAGRAM_LIMIT:
            return self.tell_error(self.too_long(size))
        return self.pass_on(
            PyBytes_FromStringAndSize(<char *>self.shared.batch.in_parts[i].iov_base, size), self.shared.sender(i)
        )

    cdef object too_long(self, unsigned size):
        return OSError(E_MSGSIZE, f"a datagram of {size} bytes was dropped: more than {HR_DATAGRAM_LIMIT} "
                                  "aren't received")

    cdef int pass_on(self, object data, object address) except -1:
        """As with asyncio, a protocol that fails is reported and goes on."""
        try:
            self.protocol.datagram_received(data, address)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.report("Exception in protocol.datagram_received()", exc)
        return 0

    cdef int tell_error(self, object error) except -1:
        try:
            self.protocol.error_received(error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.report("Exception in protocol.error_received()", exc)
        return 0

    cdef int report(self, str message, object exc) except -1:
        self.loop.call_exception_handler({
            "message": message, "exception": exc, "transport": self, "protocol": self.protocol,
        })
        return 0

    # ---- paused ---------------------------------------------------------------------------------------------

    cdef int hold(self) except -1:
        """Copies what is left of the batch: the buffers are wanted by other endpoints."""
        cdef int i
        cdef unsigned size
        self.shared.reader = None
        if self.next == self.count or self.closing:
            return 0
        self.held = []
        for i in range(self.next, self.count):
            size = self.shared.batch.incoming[i].msg_len
            if size > HR_DATAGRAM_LIMIT:
                self.held.append((None, self.too_long(size)))
            else:
                data = PyBytes_FromStringAndSize(<char *>self.shared.batch.in_parts[i].iov_base, size)
                self.held.append((data, self.shared.sender(i)))
        self.next = self.count
        return 0

    cdef int schedule_held(self) except -1:
        if (self.held is not None and not self.held_scheduled and not self.receiving and not self.paused
                and not self.closing):
            self.held_scheduled = True
            self.loop.call_soon(self._pass_held, context=self.context)
        return 0

    def _pass_held(self):
        self.held_scheduled = False
        try:
            while self.held and not self.paused and not self.closing:
                data, address = self.held.pop(0)
                if data is None:
                    self.tell_error(address)
                else:
                    self.pass_on(data, address)
        finally:
            if self.held:
                self.schedule_held()
            else:
                self.held = None
                self.arm()

    def pause_reading(self):
        """No datagram is passed on until ``resume_reading``; the kernel keeps what fits into its buffer."""
        if self.closing or self.paused:
            return
        self.paused = True
        if self.loop._debug:
            logger.debug("%r pauses reading", self)

    def resume_reading(self):
        """Ends a pause. What was received already comes first, in the next turn."""
        if self.closing or not self.paused:
            return
        self.paused = False
        if self.held is not None:
            self.schedule_held()
        else:
            self.arm()
        if self.loop._debug:
            logger.debug("%r resumes reading", self)

    def is_reading(self):
        """Whether datagrams are being passed on: neither paused nor closing."""
        return not self.closing and not self.paused

    # ---- sending --------------------------------------------------------------------------------------------

    cdef object check_item(self, object data):
        """bytes or a Lease that hold what is to be sent, unchanged until it's sent."""
        if type(data) is Lease:
            if (<Lease>data).released:
                raise ValueError("a released lease can't be sent")
            return data
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")

    def sendto(self, data, addr=None):
        """Queues ``data`` (bytes, bytearray, memoryview or Lease) to be sent to ``addr`` at the end of this loop turn.

        ``addr`` is an address of the socket's family, as in :mod:`socket`; None for a connected socket. One whose host
        is a name is resolved here, which blocks, as with asyncio. A Lease is kept until its bytes are sent; mutable
        buffers are copied. What can't be sent is dropped and told to ``error_received``.

        Raises
        ------
        TypeError
            ``data`` isn't bytes-like.
        ValueError
            ``addr`` is another than ``remote_addr``; or a lease was released.
        """
        if type(data) is not bytes:
            data = self.check_item(data)
        if not SENDS_EMPTY and not size_of(data):
            return
        if self.address is not None:
            if addr is not None and addr != self.address:
                raise ValueError(f"Invalid address: must be None or {self.address}")
            addr = self.address
        if self.closing:
            if self.lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("socket.send() raised exception.")
            self.lost += 1
            return
        if self.connected and (addr is None or self.extra["peername"]):
            self.enqueue(data, None)
        else:
            self.enqueue(data, self.shared.find(self.family, addr))

    cdef int enqueue(self, object data, Peer target) except -1:
        if type(data) is Lease:
            (<Lease>data).pin()
        self.items.append(data)
        self.targets.append(target)
        self.buffered += size_of(data) + HEADER_SIZE
        if self.blocked or self.sending:
            return self.check_mark()
        if (self.buffered > self.high or len(self.items) >= HR_BATCH or not self.engine.running
                or (target is not None and not target.size)):
            self.send_out()
            return self.check_mark()
        if not self.marked:
            self.marked = True
            self.loop.mark(self, 0)
        return 0

    cdef int flush(self) except -1:
        self.marked = False
        if not self.blocked:
            self.send_out()
        return 0

    cdef int send_out(self) except -1:
        """Sends what is queued, until the socket takes no more."""
        cdef Py_ssize_t done = 0
        cdef int n
        self.sending = True
        try:
            while done < len(self.items) and not self.ending:
                n = self.send_batch(done)
                if n == -E_AGAIN:
                    self.wait_for_room(done > 0)
                    break
                if n == -E_INTR:
                    continue
                if n < 0:
                    self.fail(os_error(n))
                    n = 1
                else:
                    self.sent_total += n
                done += n
        finally:
            self.sending = False
            self.forget_sent(len(self.items) if self.ending else done)
        return 0

    cdef int send_batch(self, Py_ssize_t first) except? -1:
        """Sends from the queue's `first` on. How many, or -errno."""
        cdef hr_datagrams *batch = self.shared.batch
        cdef Py_ssize_t count = min(len(self.items) - first, HR_BATCH)
        cdef Peer target
        cdef int i
        for i in range(<int>count):
            item = self.items[first + i]
            target = <Peer>self.targets[first + i]
            if target is None:
                hr_put(batch, i, memory_of(item), size_of(item), NULL, 0)
            elif target.size:
                hr_put(batch, i, memory_of(item), size_of(item), &target.name, target.size)
            elif i == 0:
                return self.send_by_module(item, target.address)
            else:
                count = i
                break
        self.engine.calls += 1
        return hr_send_out(batch, self.fd, <int>count)

    cdef int send_by_module(self, object item, object address) except? -1:
        """Host names and everything unusual: the socket module knows, and knows what to raise."""
        if type(item) is Lease:    # maybe released since
            item = PyBytes_FromStringAndSize(memory_of(item), size_of(item))
        try:
            self.sock.sendto(item, address)
        except (BlockingIOError, InterruptedError):
            return -E_AGAIN
        except OSError as exc:
            self.fail(exc)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.fatal(exc, "Fatal write error on datagram transport")
        return 1

    cdef int forget_sent(self, Py_ssize_t count) except -1:
        cdef Py_ssize_t i
        for i in range(count):
            item = self.items[i]
            self.buffered -= size_of(item) + HEADER_SIZE
            done_with(item)
        del self.items[:count]
        del self.targets[:count]
        return 0

    cdef int fail(self, object error) except -1:
        """A datagram couldn't be sent. Not told from here: a protocol's sendto may be what sends."""
        self.loop.call_soon(self._tell_error, error, context=self.context)
        return 0

    def _tell_error(self, error):
        if self.protocol is not None:
            self.protocol.error_received(error)

    # ---- a full socket --------------------------------------------------------------------------------------

    cdef int wait_for_room(self, bint progress) except -1:
        """Calls _writable when there may be room again."""
        if progress:
            self.retry_delay = RETRY_FIRST
        if self.family == AF_UNIX and not self.connected:
            # It's the peer's queue that is full. The kernel doesn't tell of its end: the socket itself is writable.
            self.retry = self.loop.call_later(self.retry_delay, self._writable)
            self.retry_delay = min(2 * self.retry_delay, RETRY_LAST)
        elif not self.blocked:
            self.loop._add_writer(self.fd, self._writable)
        self.blocked = True
        return 0

    cdef int stop_waiting(self) except -1:
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        elif self.blocked and not self.loop._closed:
            self.loop._remove_writer(self.fd)
        self.blocked = False
        return 0

    def _writable(self):
        if self.ending:
            return
        self.retry = None
        self.send_out()
        if self.ending:
            return
        if not self.items:
            self.stop_waiting()
        try:
            if self.protocol_paused and self.buffered <= self.low:
                self.resume_protocol()    # may queue more
        finally:
            if self.closing and not self.items:
                self.end()

    cdef int check_mark(self) except -1:
        if self.buffered > self.high and not self.protocol_paused:
            self.protocol_paused = True
            try:
                self.protocol.pause_writing()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self.report("protocol.pause_writing() failed", exc)
        return 0

    cdef int resume_protocol(self) except -1:
        self.protocol_paused = False
        PyContext_Enter(self.context)
        try:
            self.protocol.resume_writing()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.report("protocol.resume_writing() failed", exc)
        finally:
            PyContext_Exit(self.context)
        return 0

    def get_write_buffer_size(self):
        """Bytes that are queued; from Python 3.13 on with 8 more for each datagram, as asyncio counts."""
        return self.buffered

    def get_write_buffer_limits(self):
        """(low, high), in bytes."""
        return (self.low, self.high)

    def set_write_buffer_limits(self, high=None, low=None):
        """Sets the marks of flow control, in bytes; by default 64 KiB, and a quarter of the high one."""
        if high is None:
            high = DEFAULT_HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high = high
        self.low = low
        if self.buffered > self.high and not self.ending:
            if not self.blocked:
                self.send_out()
            self.check_mark()

    # ---- the end --------------------------------------------------------------------------------------------

    def is_closing(self):
        """Whether ``close`` or ``abort`` was called, or the endpoint has failed."""
        return self.closing

    def close(self):
        """Stops receiving at once, sends what is queued, then closes the socket.

        A full peer that takes no datagram for 30 s meanwhile is given up (``StalledError``).
        """
        if self.closing:
            return
        self.closing = True
        self.held = None
        if not self.blocked:
            self.send_out()
        if not self.items:
            self.end()
            return
        if self.poll.state != IDLE:
            self.engine.cancel(&self.poll)
        self.watch_drain()

    cdef int watch_drain(self) except -1:
        self.drain_timer = self.loop.call_later(DRAIN_PATIENCE, self._check_drain, self.sent_total)
        return 0

    def _check_drain(self, sent):
        if self.ending:
            return
        if self.sent_total == sent:
            self.force_close(StalledError(
                f"no datagram could be sent for {DRAIN_PATIENCE:g} s while the closing transport had "
                f"{len(self.items)} to send"
            ))
        else:
            self.watch_drain()

    def abort(self):
        """Closes the socket at once; what is queued is dropped."""
        self.force_close(None)

    cdef int fatal(self, object exc, str message) except -1:
        try:
            self.report(message, exc)
        finally:
            self.force_close(exc)
        return 0

    def _force_close(self, exc):
        self.force_close(exc)

    cdef int force_close(self, object exc) except -1:
        if self.ending:
            return 0
        self.closing = True
        self.held = None
        self.error = exc
        return self.end()

    cdef int end(self) except -1:
        """Nothing more is sent: the poll is cancelled, and awaited."""
        if self.ending:
            return 0
        self.ending = True
        self.lost += 1
        self.stop_waiting()
        if self.drain_timer is not None:
            self.drain_timer.cancel()    # it would keep this transport alive
            self.drain_timer = None
        if not self.sending:
            self.forget_sent(len(self.items))
        if self.poll.state != IDLE:
            self.engine.cancel(&self.poll)
        # Queued here, so that connection_lost has the place among the ready callbacks that it has with asyncio. Engines
        # end what is cancelled in their next wait, which comes first: then it's time already.
        self.loop.call_soon(self._finish, context=self.context)
        return 0

    def _finish(self):
        self.finishing = True
        if self.poll.state == IDLE:
            self.finished = True
            self._call_connection_lost(self.error)

    cdef int check_finished(self) except -1:
        if self.finishing and not self.finished and self.poll.state == IDLE:
            self.finished = True
            self.loop.call_soon(self._call_connection_lost, self.error, context=self.context)
        return 0

    def _call_connection_lost(self, exc):
        try:
            self.protocol.connection_lost(exc)
        finally:
            self.protocol = None
            self.let_go()

    cdef int let_go(self) except -1:
        cdef int fd = self.fd
        if fd >= 0:
            self.fd = -1
            self.loop.forget(fd)
            if self.sock.detach() < 0:
                # The socket object was closed, or collected together with this transport before it.
                self.engine.forget_descriptor(fd)
            else:
                self.engine.close_descriptor(fd)
            self.loop.descriptor_closed()
        return 0

    def __del__(self):
        # Nothing is in flight: the engine would hold a reference.
        if self.fd >= 0:
            try:
                warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self, stacklevel=1)
            finally:    # the warning may be an error
                self.let_go()

    # ---- what it is -----------------------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        """``socket``, ``sockname`` or ``peername``, as they were when the endpoint was made."""
        return self.extra.get(name, default)

    def get_protocol(self):
        """The protocol that the callbacks go to."""
        return self.protocol

    def set_protocol(self, protocol):
        """Makes another protocol take over, from the next callback on."""
        self.protocol = protocol

    @property
    def __class__(self):
        return _Facade

    @property
    def _loop(self):
        return self.loop

    @property
    def _protocol(self):
        return self.protocol

    @property
    def _sock(self):
        return self.sock

    @property
    def _sock_fd(self):
        return self.fd

    @property
    def _extra(self):
        return self.extra

    def __repr__(self):
        state = "closed" if self.fd < 0 else "closing" if self.closing else "paused" if self.paused else "open"
        return f"<headrace.DatagramTransport fd={self.fd} {state} write_buffer={self.buffered}>"


cdef object ask(function):
    try:
        return function()
    except OSError:
        return None    # not bound, or not connected
