"""Stream transports (TCP, Unix) over an engine.

Rules
-----
* One receive and one send are in flight per transport. The receive is multishot: it is armed once and goes on.
* Writing only queues. At the end of the turn all that was queued goes out as one send: a single item as it lies, a few
  small ones joined, many as one vectored send. When the high-water mark is crossed the send is started at once (of
  leases, a good deal above it: see SLACK),
  and the protocol is paused only if the socket didn't take it; a socket that was full not long ago isn't tried.
* A send is *silent* while nothing waits for it (see ``_engine``): not when the transport is closing, half-closing, its
  protocol is paused, or the socket was found full.
* After ``pause_reading`` no callback comes. What completes all the same is held, in order, and the receive is cancelled
  when the first such completion comes: a pause that is over before any byte arrives costs nothing.
* The end: ``closing`` (nothing more is read; queued bytes go out) -> ``ending`` (operations are cancelled) ->
  ``finished`` (all have ended; ``connection_lost`` is scheduled) -> the descriptor is closed. Each step happens once.
* Callbacks run in the context that the transport was made in, and only from ``complete`` or the ready queue: never from
  within a call the protocol makes, but for ``pause_writing``, which asyncio calls from within ``write``.
"""
import asyncio
import functools
import os
import warnings
from asyncio import constants, transports
from asyncio.log import logger

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from libc.stdint cimport int32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from headrace._engine cimport (
    ALL, IDLE, MORE, RECEIVE, SEND, SILENT, Completion, Endpoint, Operation,
)
from headrace._loop cimport LoopCore
from headrace._pool cimport Block, BufferPool, Ledger, Lease

from headrace.errors import StalledError
from headrace.protocol import Protocol as LeaseProtocol

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    """
    enum:
        E_AGAIN "EAGAIN", E_CANCELED "ECANCELED", E_NOBUFS "ENOBUFS", E_INTR "EINTR", E_NOTCONN "ENOTCONN"
        AF_INET, AF_INET6, IPPROTO_TCP, TCP_NODELAY, SOCK_STREAM, INET6_ADDRSTRLEN
    int c_getpeername "getpeername"(int fd, sockaddr *address, unsigned *size) nogil
    int c_getsockname "getsockname"(int fd, sockaddr *address, unsigned *size) nogil
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void *value, unsigned size) nogil
    const char *inet_ntop(int family, const void *address, char *text, unsigned size) nogil
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        in_addr sin_addr
        unsigned short sin_port
    struct sockaddr_in6:
        in6_addr sin6_addr
        unsigned short sin6_port
        unsigned sin6_flowinfo, sin6_scope_id
    unsigned short ntohs(unsigned short) nogil
    unsigned ntohl(unsigned) nogil

cdef extern from "Python.h":
    object PyObject_CallOneArg(object callable, object argument)
    object PyMemoryView_GET_BASE_object "(PyObject *)PyMemoryView_GET_BASE"(object view)
    Py_buffer *PyMemoryView_GET_BUFFER(object view)
    bint PyBuffer_IsContiguous(const Py_buffer *view, char order)

cdef enum:
    LEASES = 1
    BYTES = 2
    BUFFERED = 3

cdef enum:
    # A lease this small owns a copy: that costs the same, and it can't pin a block.
    SMALL_RECEIVE = 2048
    # Bytes of pool blocks that one connection's leases may hold; what comes beyond is copied.
    LEASE_BUDGET = 256 * 1024
    # A silent send takes at most this much: the socket buffer hardly ever has room for more at once.
    SILENT_LIMIT = 256 * 1024
    # A send that is waited for takes at most this much, so that its completions tell of progress.
    SEND_LIMIT = 1024 * 1024
    # Items up to this size in all are joined: one copy is cheaper than a vector.
    JOIN_LIMIT = 8 * 1024
    # So are many that are this small on average: the kernel's work per part of a vector is more than the copy.
    JOIN_AVERAGE = 512
    VECTOR_LENGTH = 64
    DEFAULT_HIGH_WATER = 64 * 1024
    # So far above the high-water mark a write may go before it's tried at once, and not at the end of the turn.
    SLACK = SILENT_LIMIT - DEFAULT_HIGH_WATER

# close() gives up when the peer took no byte for so long (seconds).
cdef double DRAIN_PATIENCE = 30.0
EOF = object()


class _Facade(transports._FlowControlMixin):
    """What ``transport.__class__`` answers, so that ``isinstance(transport, asyncio.Transport)`` holds.

    asyncio's sendfile fallback even asks for the mixin that its own transports have their flow control from.

    A class with C fields can't inherit from a Python class with a layout of its own.
    """


cdef inline Py_ssize_t size_of(object item) noexcept:
    return PyBytes_GET_SIZE(item) if type(item) is bytes else (<Lease>item).size


cdef inline const char *memory_of(object item) noexcept:
    return <const char *>PyBytes_AS_STRING(item) if type(item) is bytes else (<Lease>item).data


cdef inline void done_with(object item) noexcept:
    if type(item) is Lease:
        (<Lease>item).unpin()


cdef object os_error(int32_t result):
    return OSError(-result, os.strerror(-result))


def _data_received(protocol, data):
    """For protocols without ``data_received``: one that only writes needs none until bytes come."""
    protocol.data_received(data)


cdef object address_of(headrace_address *address):
    """What the socket module makes of an IPv4 or IPv6 address; None for anything else."""
    cdef char text[INET6_ADDRSTRLEN]
    cdef sockaddr_in *v4 = <sockaddr_in *>address
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>address
    if address.any.sa_family == AF_INET:
        inet_ntop(AF_INET, &v4.sin_addr, text, INET6_ADDRSTRLEN)
        return (text.decode("ascii"), ntohs(v4.sin_port))
    if address.any.sa_family == AF_INET6:
        inet_ntop(AF_INET6, &v6.sin6_addr, text, INET6_ADDRSTRLEN)
        return (text.decode("ascii"), ntohs(v6.sin6_port), ntohl(v6.sin6_flowinfo), v6.sin6_scope_id)
    return None


@cython.final
cdef class StreamTransport(Endpoint):
    """A connected stream socket; an :class:`asyncio.Transport`.

    Made by the loop, never directly. Not thread-safe: every method belongs to the loop's thread.
    """

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, LoopCore loop, sock, protocol, waiter=None, extra=None, server=None):
        self.adopt(protocol)
        self.open(loop, sock, sock.fileno(), sock.family, sock.type, sock.proto, server, extra)
        loop.call_soon(self._connect, waiter is None, context=self.context)
        if waiter is not None:
            # Whoever waits gets the transport before the protocol gets its first bytes: at that turn's end its wake-up
            # is in the ready queue, and reading begins behind it.
            loop.call_soon(asyncio.futures._set_result_unless_cancelled, waiter, None)
            loop.call_soon(loop.call_soon, self._begin_reading)
            # The connection may be over when it's looked at; what asyncio knows by then is known here, too.
            self.get_extra_info("sockname")

    cdef int open(self, LoopCore loop, object sock, int fd, int family, int type, int proto,
                  object server, dict extra) except -1:
        """Takes the descriptor over, as the last step: what fails here leaves it with the caller."""
        cdef unsigned size = sizeof(headrace_address)
        cdef int on = 1
        self.loop = loop
        self.engine = loop.engine
        self.sock = sock
        self.family = family
        self.type = type
        self.proto = proto
        self.extra = extra
        self.context = PyContext_CopyCurrent()
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.receive.owner = self.send.owner = <PyObject *>self
        self.receive.kind = RECEIVE
        self.send.kind = SEND
        self.receive.fd = self.send.fd = fd
        if family == AF_INET or family == AF_INET6:
            # Asked now: after a reset the kernel doesn't tell any more.
            if c_getpeername(fd, &self.peer.any, &size) != 0:
                self.peer.any.sa_family = 0
            # Accepted sockets have NODELAY from their listener.
            if sock is not None and type == SOCK_STREAM:
                c_setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
        if server is not None:
            attach(server, self)
            self.server = server
        loop.remember(fd, self)
        loop.transports_open += 1
        self.fd = fd
        return 0

    cdef int adopt(self, object protocol) except -1:
        """Finds out which of the three kinds the protocol is."""
        self.protocol = protocol
        if isinstance(protocol, LeaseProtocol):
            self.kind = LEASES
            self.received = protocol.lease_received
        elif isinstance(protocol, asyncio.BufferedProtocol):
            self.kind = BUFFERED
            self.received = None
        else:
            self.kind = BYTES
            self.received = getattr(protocol, "data_received", None)
            if self.received is None:
                self.received = functools.partial(_data_received, protocol)
        return 0

    def _connect(self, read):
        """The first callback of a transport that wasn't accepted; then reads, unless it is told to later."""
        if self.ending:
            return
        self.connected = True
        try:
            self.protocol.connection_made(self)
        finally:
            if read:
                self.begin_reading()

    def _begin_reading(self):
        self.begin_reading()

    cdef int connect(self) except -1:
        """The same for an accepted connection, at once; a protocol that fails here is not served."""
        self.connected = True
        PyContext_Enter(self.context)
        try:
            self.protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.fatal(exc, "Fatal error: protocol.connection_made() call failed.")
        finally:
            PyContext_Exit(self.context)
            self.begin_reading()
        return 0

    # ---- receiving ------------------------------------------------------------------------------------------

    cdef int begin_reading(self) except -1:
        if self.closing:
            return 0
        self.reading = True
        return self.arm()

    cdef int arm(self) except -1:
        if self.receive.state == IDLE and self.reading and not self.paused and not self.closing:
            self.engine.submit(&self.receive)
        return 0

    cdef int complete(self, Completion *completion) except -1:
        if self.loop._debug:
            return self.complete_watched(completion)
        if completion.operation == &self.receive:
            return self.on_receive(completion)
        return self.on_send(completion.result)

    cdef int complete_watched(self, Completion *completion) except -1:
        """The same in debug mode: protocols that take long are named, as callbacks are."""
        cdef object protocol = self.protocol    # its end makes the transport let go of it
        cdef double began = self.loop.clock(), seconds
        try:
            if completion.operation == &self.receive:
                return self.on_receive(completion)
            return self.on_send(completion.result)
        finally:
            seconds = self.loop.clock() - began
            if seconds >= self.loop.slow_callback_duration:
                self.loop.was_slow(f"{protocol!r} of {self!r}", seconds)

    cdef int on_receive(self, Completion *completion) except -1:
        cdef int32_t result = completion.result
        if self.closing:
            if completion.block != NULL:
                self.engine.pool.drop(completion.block)
            return self.check_finished() if self.ending else 0
        if self.paused or self.held is not None:
            return self.hold(completion)
        if result > 0:
            if not completion.flags & MORE:
                self.arm()    # before the bytes are looked at: the socket never waits for the protocol
            return self.pass_on(completion.block, completion.data, result)
        return self.on_end(result)

    cdef int on_end(self, int32_t result) except -1:
        """A receive that brought no bytes: the end of the stream, an error, or our own cancel."""
        if result == -E_CANCELED or result == -E_INTR or result == -E_AGAIN:
            return self.arm()
        self.reading = False
        if result == 0:
            return self.on_eof()
        return self.fatal(os_error(result), "Fatal read error on socket transport")

    cdef int on_eof(self) except -1:
        cdef object keep_open = False
        if self.loop._debug:
            logger.debug("%r received EOF", self)
        PyContext_Enter(self.context)
        try:
            keep_open = self.protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.fatal(exc, "Fatal error: protocol.eof_received() call failed.")
        finally:
            PyContext_Exit(self.context)
            if not keep_open:
                self.close()
        return 0

    cdef Lease make_lease(self, Block *block, char *data, Py_ssize_t size):
        """A lease on received bytes. Takes over the reference to the block."""
        cdef BufferPool pool = self.engine.pool
        cdef Lease lease
        if size > SMALL_RECEIVE and not pool.low:
            if self.ledger is None:
                self.ledger = Ledger.__new__(Ledger)
            if self.ledger.leased + size <= LEASE_BUDGET:
                return pool.lease(block, data, size, self.ledger)
        try:
            lease = pool.copy(data, size)
        finally:
            pool.drop(block)
        return lease

    cdef int pass_on(self, Block *block, char *data, Py_ssize_t size) except -1:
        """Hands received bytes to the protocol. Takes over the reference to the block."""
        cdef object item
        if self.kind == LEASES:
            item = self.make_lease(block, data, size)
            return self.call(self.received, item, "lease_received")
        if self.kind == BUFFERED:
            try:
                return self.pass_buffered(data, size)
            finally:
                self.engine.pool.drop(block)
        try:
            item = PyBytes_FromStringAndSize(data, size)
        finally:
            self.engine.pool.drop(block)
        return self.call(self.received, item, "data_received")

    cdef int call(self, object function, object argument, str name) except -1:
        PyContext_Enter(self.context)
        try:
            PyObject_CallOneArg(function, argument)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.fatal(exc, f"Fatal error: protocol.{name}() call failed.")
        finally:
            PyContext_Exit(self.context)
        return 0

    cdef int pass_buffered(self, char *data, Py_ssize_t size) except -1:
        """Copies into the protocol's buffers, as many as it takes. What it doesn't want any more (paused, closed,
        interrupted, or another protocol has taken over) is held."""
        cdef Py_ssize_t part
        cdef object protocol = self.protocol
        try:
            while size and not self.paused and not self.closing and self.protocol is protocol:
                part = self.fill_buffer(protocol, data, size)
                data += part
                size -= part
                if part:
                    self.call(protocol.buffer_updated, part, "buffer_updated")
        finally:
            if size and not self.closing:
                if self.held is None:
                    self.held = []
                # First of all that is held: this may be the head of it.
                self.held.insert(0, self.engine.pool.copy(data, size))
                self.schedule_held()
        return 0

    cdef Py_ssize_t fill_buffer(self, object protocol, char *data, Py_ssize_t size) except -1:
        """Copies into the next of the protocol's buffers: how many bytes; 0: it failed, and the connection is over."""
        cdef Py_buffer view
        cdef Py_ssize_t part = 0
        PyContext_Enter(self.context)
        try:
            buffer = protocol.get_buffer(size)
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                part = min(size, view.len)
                memcpy(view.buf, data, part)
            finally:
                PyBuffer_Release(&view)
            if not part:
                raise RuntimeError("get_buffer() returned an empty buffer")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.fatal(exc, "Fatal error: protocol.get_buffer() call failed.")
            return 0
        finally:
            PyContext_Exit(self.context)
        return part

    # ---- paused ---------------------------------------------------------------------------------------------

    cdef int hold(self, Completion *completion) except -1:
        """Keeps a completion for when reading is resumed."""
        cdef int32_t result = completion.result
        if result == -E_CANCELED or result == -E_INTR or result == -E_AGAIN:
            return self.arm()
        if self.held is None:
            self.held = []
        if result > 0:
            self.held.append(self.make_lease(completion.block, completion.data, result))
            if self.paused and completion.flags & MORE:
                self.engine.cancel(&self.receive)
        else:
            self.held.append(result)
            self.reading = False
        return 0

    cdef int schedule_held(self) except -1:
        if self.held is not None and not self.held_scheduled and not self.paused and not self.closing:
            self.held_scheduled = True
            # In a copy of the context: the callbacks below enter the transport's own, as always.
            self.loop.call_soon(self._pass_held)
        return 0

    def _pass_held(self):
        self.held_scheduled = False
        self.pass_held()

    cdef int drop_held(self) except -1:
        cdef object item
        if self.held is not None:
            for item in self.held:
                if type(item) is Lease:
                    item.release()
            self.held = None
        return 0

    cdef int pass_held(self) except -1:
        try:
            while self.held and not self.paused and not self.closing:
                self.pass_item(self.held.pop(0))
        finally:
            if self.held:
                self.schedule_held()
            else:
                self.held = None
                self.arm()
        return 0

    cdef int pass_item(self, object item) except -1:
        cdef Lease lease
        if type(item) is not Lease:
            return self.on_end(<int32_t>item)
        if self.kind == LEASES:
            return self.call(self.received, item, "lease_received")
        lease = item
        try:
            if self.kind == BUFFERED:
                return self.pass_buffered(<char *>lease.data, lease.size)
            data = bytes(lease)
        finally:
            lease.release()
        return self.call(self.received, data, "data_received")

    def pause_reading(self):
        """No callback brings bytes, or the end of the stream, until ``resume_reading``."""
        if self.closing or self.paused:
            return
        self.paused = True
        if self.loop._debug:
            logger.debug("%r pauses reading", self)

    def resume_reading(self):
        """Ends a pause. What was received meanwhile comes first, in the next turn."""
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
        """Whether bytes are being passed on: neither paused nor closing."""
        return not self.closing and not self.paused

    # ---- writing --------------------------------------------------------------------------------------------

    cdef object check_item(self, object data):
        """bytes or a Lease that hold what is to be sent, unchanged until it's sent."""
        if type(data) is bytes or type(data) is Lease:
            return data
        if isinstance(data, bytearray):
            return bytes(data)
        if isinstance(data, memoryview):
            return bytes(data)
        if isinstance(data, bytes):
            return bytes(data)
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")

    def write(self, data):
        """Queues ``data`` (bytes, bytearray, memoryview or Lease) to be sent at the end of this loop turn.

        A Lease is sent from where it lies and kept until the kernel is done with it; mutable buffers are copied.
        Never blocks; see ``pause_writing``. After the connection is lost, what is written is dropped.
        """
        cdef Py_ssize_t size
        if type(data) is not bytes:
            data = self.check_item(data)
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        size = size_of(data)
        if size:
            if type(data) is Lease and (<Lease>data).released:
                raise ValueError("a released lease can't be written")
            if self.append(data, size):
                self.queued(size)

    def writelines(self, list_of_data):
        """Queues every item, as ``write`` does, with one look at the flow control at the end."""
        cdef Py_ssize_t size, total = 0
        cdef object item
        if self.eof_written:
            raise RuntimeError("Cannot call writelines() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to writelines; sendfile is in progress")
        cdef list items = [self.check_item(item) for item in list_of_data]
        for item in items:
            if type(item) is Lease and (<Lease>item).released:
                raise ValueError("a released lease can't be written")
        for item in items:
            size = size_of(item)
            if size:
                if not self.append(item, size):
                    return
                total += size
        if total:
            self.queued(total)

    cdef int append(self, object item, Py_ssize_t size) except -1:
        """1 when queued, 0 when the connection is lost and the item dropped."""
        if self.lost:
            if self.lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("socket.send() raised exception.")
            self.lost += 1
            return 0
        if type(item) is Lease:
            (<Lease>item).pin()
        if self.first is None:
            self.first = item
        elif self.queue is None:
            self.queue = [item]
        else:
            self.queue.append(item)
        self.buffered += size
        return 1

    cdef int queued(self, Py_ssize_t size) except -1:
        """Flow control, after `size` more bytes were queued."""
        if self.buffered > self.high and not self.protocol_paused:
            if (type(self.first) is Lease and self.buffered <= self.high + SLACK and self.high >= DEFAULT_HIGH_WATER
                    and (self.send.state == IDLE or self.send.flags & SILENT) and not self.bulk):
                # Most likely the socket takes it, together with what others write in this turn; on_send() looks. Bytes
                # are better sent at once: they are in the caches, and the next ones get the same memory.
                return self.want_flush(size)
            if self.send.state == IDLE and not self.bulk and self.engine.running:
                self.begin_send()
                self.engine.flush()
            if self.buffered > self.high:
                return self.pause_protocol()
            if self.first is None:
                return 0
        return self.want_flush(size)

    cdef int want_flush(self, Py_ssize_t size) except -1:
        """Asks for a flush at the turn's end, `size` more bytes being queued. A send that completes does as well."""
        if not self.marked and (self.send.state == IDLE or self.send.flags & SILENT):
            self.marked = True
            self.loop.mark(self, size)
        return 0

    cdef int flush(self) except -1:
        self.marked = False
        if self.send.state != IDLE:
            if self.send.flags & SILENT and self.engine.running:
                # Nothing would tell that it's out, and that what was queued behind it can go.
                self.engine.flush()
            if self.send.state != IDLE:
                return 0
        if self.ending:
            # A silent send was under way when the end came, and has gone out.
            self.drop_queue()
            return self.check_finished()
        if self.first is not None:
            self.begin_send()
            if self.buffered > self.high and not self.protocol_paused and not self.send.flags & SILENT:
                return self.pause_protocol()
            return 0
        if self.protocol_paused:
            # Not here: a protocol's write may be what flushes.
            self.loop.call_soon(self._drained)
            return 0
        return self.drained()

    def _drained(self):
        if self.first is None and not self.ending:
            self.drained()

    cdef int begin_send(self) except -1:
        """Puts what is queued in flight, or as much of it as one send takes."""
        cdef Operation *send = &self.send
        if self.queue is not None and (self.buffered <= JOIN_LIMIT or (
                self.buffered <= SILENT_LIMIT and self.buffered < JOIN_AVERAGE * len(self.queue))):
            self.join_small()
        if self.queue is not None:
            self.fill_vector()
        else:
            send.message = NULL
            send.buffer = memory_of(self.first) + self.offset
            self.sending = min(size_of(self.first) - self.offset, SEND_LIMIT)
        send.length = <unsigned>self.sending
        if self.bulk and self.buffered <= self.high:
            self.bulk = False
        if (self.sending == self.buffered and self.buffered <= SILENT_LIMIT and not self.blocked and not self.closing
                and not self.protocol_paused and not self.eof_written and self.empty_waiter is None):
            send.flags = SILENT
        else:
            # A closing transport wants to see every bit of progress; see _check_drain.
            send.flags = 0 if self.closing else ALL
        return self.engine.submit(send)

    cdef int join_small(self) except -1:
        cdef bytes joined = PyBytes_FromStringAndSize(NULL, self.buffered)
        cdef char *to = PyBytes_AS_STRING(joined)
        cdef Py_ssize_t size = size_of(self.first) - self.offset
        memcpy(to, memory_of(self.first) + self.offset, size)
        done_with(self.first)
        for item in self.queue:
            to += size
            size = size_of(item)
            memcpy(to, memory_of(item), size)
            done_with(item)
        self.first = joined
        self.offset = 0
        self.queue = None
        return 0

    cdef int fill_vector(self) except -1:
        cdef Vector *vector = self.vector
        cdef Py_ssize_t skip = self.offset, total = 0
        cdef int i, count = min(1 + len(self.queue), VECTOR_LENGTH)
        cdef object item
        if vector == NULL:
            vector = self.vector = <Vector *>malloc(sizeof(Vector))
            if vector == NULL:
                raise MemoryError
        for i in range(count):
            item = self.first if i == 0 else self.queue[i - 1]
            vector.parts[i].iov_base = <void *>(memory_of(item) + skip)
            vector.parts[i].iov_len = size_of(item) - skip
            total += size_of(item) - skip
            skip = 0
        memset(&vector.header, 0, sizeof(msghdr))
        vector.header.msg_iov = vector.parts
        vector.header.msg_iovlen = count
        self.send.message = &vector.header
        self.sending = total
        return 0

    cdef void sent_silently(self, Operation *operation) noexcept:
        self.consume(self.sending)
        self.sending = 0
        if (self.first is not None or self.closing or self.eof_written or self.protocol_paused
                or self.empty_waiter is not None):
            # Something has come to depend on this send since it was submitted.
            if not self.marked:
                self.marked = True
                self.loop.dirty.append(self)

    cdef int consume(self, Py_ssize_t size) noexcept:
        """`size` more bytes are out."""
        cdef Py_ssize_t left
        cdef Py_ssize_t i = 0
        self.buffered -= size
        self.sent_total += size
        if self.vector != NULL:
            free(self.vector)
            self.vector = NULL
        if self.queue is None:
            left = size_of(self.first) - self.offset
            if size < left:
                self.offset += size
                return 0
            done_with(self.first)
            self.first = None
            self.offset = 0
            return 0
        while True:
            item = self.first if i == 0 else self.queue[i - 1]
            left = size_of(item) - self.offset
            if size < left:
                self.offset += size
                break
            size -= left
            self.offset = 0
            done_with(item)
            i += 1
            if i > len(self.queue):
                self.first = None
                self.queue = None
                return 0
        if i:
            self.first = self.queue[i - 1]
            del self.queue[:i]
            if not self.queue:
                self.queue = None
        return 0

    cdef int drop_queue(self) noexcept:
        """Forgets what isn't sent. No send is in flight."""
        if self.first is not None:
            done_with(self.first)
            self.first = None
        if self.queue is not None:
            for item in self.queue:
                done_with(item)
            self.queue = None
        if self.vector != NULL:
            free(self.vector)
            self.vector = NULL
        self.buffered = self.sending = self.offset = 0
        return 0

    cdef int on_send(self, int32_t result) except -1:
        self.sending = 0
        if self.ending:
            self.drop_queue()
            return self.check_finished()
        if result >= 0:
            self.consume(result)
            self.blocked = self.first is not None and self.send.flags & SILENT
        elif result == -E_AGAIN:
            self.blocked = True
        elif result != -E_CANCELED and result != -E_INTR:
            self.fatal(os_error(result), "Fatal write error on socket transport")
            return 0
        if self.blocked:
            self.bulk = True
        if self.protocol_paused and self.buffered <= self.low:
            self.resume_protocol()
        if self.ending or self.send.state != IDLE:
            return 0
        if self.first is None:
            return self.drained()
        # At the turn's end, as always: it's submitted no earlier anyway, and what is written until then goes with it.
        return self.want_flush(0)

    cdef int drained(self) except -1:
        """All that was queued is with the kernel."""
        cdef int error
        if self.protocol_paused:
            self.resume_protocol()
            if self.first is not None or self.ending:
                return 0
        if self.empty_waiter is not None and not self.empty_waiter.done():
            self.empty_waiter.set_result(None)
        if self.closing:
            return self.end()
        if self.eof_written and not self.shut and self.empty_waiter is None:    # not in front of a file
            self.shut = True
            error = self.engine.shutdown_write(self.fd)
            # Not connected any more: the receive tells, and knows why.
            if error < 0 and error != -E_NOTCONN:
                self.fatal(os_error(error), "Fatal error on shutdown of the socket's writing side")
        return 0

    def write_eof(self):
        """Closes the writing side when all that is queued is sent; the peer sees the end of the stream."""
        if self.closing or self.eof_written:
            return
        self.eof_written = True
        if self.first is None and not self.protocol_paused:
            self.drained()
        else:
            self.want_flush(0)

    def can_write_eof(self):
        """True: a stream socket can be half-closed."""
        return True

    # ---- flow control ---------------------------------------------------------------------------------------

    cdef int pause_protocol(self) except -1:
        self.protocol_paused = True
        # A send that was submitted silently must now tell when it's out: there may be nothing else to wake the loop.
        self.want_flush(0)
        try:
            self.protocol.pause_writing()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.loop.call_exception_handler({
                "message": "protocol.pause_writing() failed",
                "exception": exc, "transport": self, "protocol": self.protocol,
            })
        return 0

    cdef int resume_protocol(self) except -1:
        self.protocol_paused = False
        PyContext_Enter(self.context)
        try:
            self.protocol.resume_writing()
        except (SystemExit, KeyboardInterrupt):
            # What the caller would do next, the flush does.
            self.want_flush(0)
            raise
        except BaseException as exc:
            self.loop.call_exception_handler({
                "message": "protocol.resume_writing() failed",
                "exception": exc, "transport": self, "protocol": self.protocol,
            })
        finally:
            PyContext_Exit(self.context)
        return 0

    def get_write_buffer_size(self):
        """Bytes that are queued or in flight."""
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
        if self.buffered > self.high and not self.protocol_paused:
            self.pause_protocol()

    # ---- the end --------------------------------------------------------------------------------------------

    def is_closing(self):
        """Whether ``close`` or ``abort`` was called, or the connection has ended."""
        return self.closing

    def close(self):
        """Stops receiving at once, sends what is queued, then closes the connection.

        A peer that takes no byte for 30 s while data is queued is given up (``StalledError``).
        """
        if self.closing:
            return
        self.closing = True
        self.drop_held()
        if self.first is None:
            self.lost += 1
            self.end()
            return
        if self.receive.state != IDLE:
            self.engine.cancel(&self.receive)
        if self.send.state != IDLE and self.send.flags & ALL:
            # It would tell of no progress; the rest is sent anew, so that it does.
            self.engine.cancel(&self.send)
        self.want_flush(0)
        self.watch_drain(self.engine.unsent(self.fd))

    cdef int watch_drain(self, int unsent) except -1:
        self.drain_timer = self.loop.call_later(DRAIN_PATIENCE, self._check_drain, self.sent_total, unsent)
        return 0

    def _check_drain(self, sent, unsent):
        """Gives up a peer that accepts nothing; one that accepts a little is waited for, however slow."""
        if self.ending:
            return
        now = self.engine.unsent(self.fd)
        if self.sent_total == sent and now == unsent:
            self.force_close(StalledError(
                f"the peer took no byte for {DRAIN_PATIENCE:g} s while the closing transport had "
                f"{self.buffered} to send"
            ))
        else:
            self.watch_drain(now)

    def abort(self):
        """Closes the connection at once; what is queued is dropped."""
        self.force_close(None)

    cdef int fatal(self, object exc, str message) except -1:
        if isinstance(exc, OSError):
            if self.loop._debug:
                logger.debug("%r: %s", self, message, exc_info=exc)
            return self.force_close(exc)
        try:
            self.loop.call_exception_handler({
                "message": message, "exception": exc, "transport": self, "protocol": self.protocol,
            })
        finally:
            self.force_close(exc)
        return 0

    def _force_close(self, exc):
        self.force_close(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        self.fatal(exc, message)

    cdef int force_close(self, object exc) except -1:
        if self.ending:
            return 0
        self.closing = True
        self.lost += 1
        self.drop_held()
        self.error = exc
        if self.send.state == IDLE:
            self.drop_queue()
        return self.end()

    cdef int end(self) except -1:
        """Nothing more to send: what is still in flight is cancelled, and awaited."""
        if self.ending:
            return 0
        self.ending = True
        self.reading = False
        if self.drain_timer is not None:
            self.drain_timer.cancel()    # it would keep this transport alive
            self.drain_timer = None
        if not self.lost:
            self.lost = 1
        if self.receive.state != IDLE:
            self.engine.cancel(&self.receive)
        if self.send.state != IDLE:
            self.engine.cancel(&self.send)
        if self.borrower is not None:
            self.borrower()
        # Queued here, so that connection_lost has the place among the ready callbacks that it has with asyncio. Engines
        # end what is cancelled in their next wait, which comes first: then it's time already.
        self.loop.call_soon(self._finish, context=self.context)
        return 0

    def _finish(self):
        self.finishing = True
        if self.at_rest():
            self.finished = True
            self._call_connection_lost(self.error)

    cdef bint at_rest(self) noexcept:
        """Whether nobody uses the descriptor any more."""
        return self.receive.state == IDLE and self.send.state == IDLE and self.borrower is None

    cdef int check_finished(self) except -1:
        if self.finishing and not self.finished and self.at_rest():
            self.finished = True
            self.loop.call_soon(self._call_connection_lost, self.error, context=self.context)
        return 0

    def _call_connection_lost(self, exc):
        cdef object waiter = self.empty_waiter
        try:
            if self.connected:
                self.protocol.connection_lost(exc)
        finally:
            self.protocol = self.received = None
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionError("Connection is closed by peer"))
            self.let_go()

    cdef int let_go(self) except -1:
        """Gives back the descriptor, and the place among the server's connections."""
        cdef int fd = self.fd
        cdef unsigned size = sizeof(headrace_address)
        cdef object server = self.server
        if server is not None:
            self.server = None
            detach(server, self)
        if fd >= 0:
            # The last chance to ask; like the peer's, it stays known.
            if self.family in (AF_INET, AF_INET6) and c_getsockname(fd, &self.near.any, &size) != 0:
                self.near.any.sa_family = 0
            self.fd = -1
            self.loop.transports_open -= 1
            self.loop.forget(fd)
            if self.sock is not None and self.sock.detach() < 0:
                # The socket object was closed, or collected together with this transport before it.
                self.engine.forget_descriptor(fd)
            else:
                self.engine.close_descriptor(fd)
            self.loop.descriptor_closed()
        return 0

    def __dealloc__(self):
        free(self.vector)

    def __del__(self):
        # Nothing is in flight: the engine would hold a reference.
        if self.fd >= 0:
            try:
                warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self, stacklevel=1)
            finally:    # the warning may be an error
                self.let_go()

    # ---- what it is -----------------------------------------------------------------------------------------

    cdef object socket(self):
        if self.sock is None and self.fd >= 0:
            self.sock = self.loop._accepted_socket(self.fd, self.family, self.type, self.proto)
        return self.sock

    def get_extra_info(self, name, default=None):
        """``socket``, ``sockname``, ``peername``, or what the connection's maker has put there."""
        cdef unsigned size = sizeof(headrace_address)
        cdef object value = None
        if self.extra is not None and name in self.extra:
            return self.extra[name]
        if name == "socket":
            value = self.socket()
            if value is None:
                return default
            value = asyncio.trsock.TransportSocket(value)
        elif name == "peername":
            value = address_of(&self.peer)
            if value is None and self.fd >= 0:
                value = ask(self.socket().getpeername)
        elif name == "sockname":
            if self.fd >= 0 and self.family in (AF_INET, AF_INET6):
                c_getsockname(self.fd, &self.near.any, &size)
            value = address_of(&self.near)
            if value is None and self.fd >= 0:
                value = ask(self.socket().getsockname)
        if value is None:
            return default
        if self.extra is None:
            self.extra = {}
        self.extra[name] = value
        return value

    def get_protocol(self):
        """The protocol that the callbacks go to."""
        return self.protocol

    def set_protocol(self, protocol):
        """Makes another protocol take over, from the next callback on; of any of the three kinds."""
        self.adopt(protocol)
        self.connected = True

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
        return self.socket()

    @property
    def _sock_fd(self):
        return self.fd

    @property
    def _extra(self):
        return {} if self.extra is None else self.extra

    @property
    def _protocol_paused(self):
        return self.protocol_paused

    # What BaseEventLoop.start_tls and sendfile ask for.
    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.TRY_NATIVE

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        self.empty_waiter = (<object>self.loop).create_future()
        if self.first is None and self.send.state == IDLE:
            self.empty_waiter.set_result(None)
        else:
            self.want_flush(0)
        return self.empty_waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None
        if self.eof_written and not self.ending:
            self.want_flush(0)

    def _lend_descriptor(self, stop):
        """For sendfile: the loop's ``sock_*`` methods may use the descriptor until it's given back. When the transport
        ends, it calls ``stop`` and waits for that."""
        self.loop.forget(self.fd)
        self.borrower = stop

    def _take_back_descriptor(self):
        self.borrower = None
        self.loop.remember(self.fd, self)
        self.check_finished()

    def __repr__(self):
        if self.fd < 0:
            state = "closed"
        elif self.closing:
            state = "closing"
        else:
            state = "paused" if self.paused else "reading" if self.reading else "open"
        return f"<headrace.StreamTransport fd={self.fd} {state} write_buffer={self.buffered}>"


cdef object ask(function):
    try:
        return function()
    except OSError:
        return None    # not connected (any more): the caller's default


cdef int attach(object server, StreamTransport transport) except -1:
    if ATTACH_TAKES_TRANSPORT:
        server._attach(transport)
    else:
        server._attach()
    return 0


cdef int detach(object server, StreamTransport transport) except -1:
    if ATTACH_TAKES_TRANSPORT:
        server._detach(transport)
    else:
        server._detach()
    return 0


# asyncio.Server keeps its transports since 3.13, and only counts them before.
cdef bint ATTACH_TAKES_TRANSPORT = asyncio.base_events.Server._attach.__code__.co_argcount == 2
