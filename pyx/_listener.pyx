"""Accepting: a multishot accept per listening socket.

At the descriptor limit a multishot accept ends with EMFILE, and re-arming it at once would spin. So it is re-armed
after a while (100 ms, doubling to 1 s), or as soon as a transport of this loop closes its descriptor. The same goes for
a listening socket that is broken: another process that shares it may have shut it down.
"""
import errno
import os
from asyncio import trsock
from asyncio.log import logger

cimport cython
from cpython.contextvars cimport PyContext_Copy, PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject

from headrace._engine cimport ACCEPT, IDLE, Completion, Endpoint
from headrace._loop cimport LoopCore
from headrace._stream cimport StreamTransport

cdef extern from *:
    """
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    """
    enum:
        E_CANCELED "ECANCELED"
        AF_INET, AF_INET6, IPPROTO_TCP, TCP_NODELAY, SOCK_STREAM
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void *value, unsigned size) nogil

cdef double RETRY_FIRST = 0.1
cdef double RETRY_LAST = 1.0
cdef double REPORT_INTERVAL = 60.0

cdef frozenset OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
# What accept(2) says of one connection, which is gone, not of the listener.
cdef frozenset OF_ONE_CONNECTION = frozenset((
    errno.EAGAIN, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENONET, errno.ENOPROTOOPT, errno.EPERM, errno.EPROTO,
))


@cython.final
cdef class Listener(Endpoint):
    """What serves one listening socket for an ``asyncio.Server``."""

    def __init__(self, LoopCore loop, protocol_factory, sock, server):
        cdef int on = 1
        self.loop = loop
        self.factory = protocol_factory
        self.sock = sock
        self.family = sock.family
        self.type = sock.type
        self.proto = sock.proto
        self.server = server
        self.context = PyContext_CopyCurrent()
        self.retry_delay = RETRY_FIRST
        self.accept.owner = <PyObject *>self
        self.accept.kind = ACCEPT
        self.accept.fd = sock.fileno()
        if self.family in (AF_INET, AF_INET6) and self.type == SOCK_STREAM:
            # Accepted sockets inherit it: one system call less for each.
            c_setsockopt(self.accept.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
        self.arm()

    cdef int arm(self) except -1:
        if self.accept.state == IDLE and not self.stopped and not self.loop.engine.closed:
            self.loop.engine.submit(&self.accept)
        return 0

    cdef int flush(self) except -1:
        """A descriptor has become free, or the time is up."""
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        return self.arm()

    def _retry(self):
        if self in self.loop.accept_starved:
            self.loop.accept_starved.remove(self)
        self.flush()

    cdef int complete(self, Completion *completion) except -1:
        cdef int result = completion.result
        if result >= 0:
            if self.stopped:
                # Accepted while the accept was being cancelled: nobody serves it any more.
                self.loop.engine.close_descriptor(result)
                return 0
            self.retry_delay = RETRY_FIRST
            try:
                if self.loop._debug:
                    self.connection_watched(result)
                else:
                    self.connection(result)
            finally:    # an interrupt ends that connection, not the listener
                self.arm()
            return 0
        if result == -E_CANCELED:
            return self.arm()
        if -result not in OF_ONE_CONNECTION:
            return self.refused(-result)
        if self.loop._debug:
            logger.debug("%r: accept failed: %s", self.server, os.strerror(-result))
        return self.arm()

    cdef int refused(self, int error) except -1:
        """No resources for another connection, which stays in the backlog; or the listening socket is broken."""
        if self.stopped:
            return 0
        self.retry = self.loop.call_later(self.retry_delay, self._retry)
        self.retry_delay = min(2 * self.retry_delay, RETRY_LAST)
        self.loop.accept_starved.append(self)
        if self.loop.clock() >= self.report_after:    # not at each attempt
            self.report_after = self.loop.clock() + REPORT_INTERVAL
            if error in OUT_OF_RESOURCES:
                message = (f"accept() is out of system resources, retrying: {os.strerror(error)} "
                           "(raise RLIMIT_NOFILE, or close connections)")
            else:
                message = f"accept() fails, retrying: {os.strerror(error)}"
            self.loop.call_exception_handler({
                "message": message,
                "exception": OSError(error, os.strerror(error)),
                "socket": trsock.TransportSocket(self.sock),
            })
        return 0

    cdef int connection_watched(self, int fd) except -1:
        """The same in debug mode: a factory or ``connection_made`` that takes long is named, as callbacks are."""
        cdef double began = self.loop.clock(), seconds
        try:
            return self.connection(fd)
        finally:
            seconds = self.loop.clock() - began
            if seconds >= self.loop.slow_callback_duration:
                self.loop.was_slow(f"{self.factory!r} of {self.server!r}", seconds)

    cdef int connection(self, int fd) except -1:
        """A new connection, in a context of its own."""
        cdef StreamTransport transport
        cdef object context
        cdef object protocol = None
        context = PyContext_Copy(self.context)
        PyContext_Enter(context)
        try:
            protocol = self.factory()
            transport = StreamTransport.__new__(StreamTransport)
            transport.adopt(protocol)
            transport.open(self.loop, None, fd, self.family, self.type, self.proto, self.server, None)
        except (SystemExit, KeyboardInterrupt):
            self.loop.engine.close_descriptor(fd)
            raise
        except BaseException as exc:
            self.loop.engine.close_descriptor(fd)
            self.loop.call_exception_handler({
                "message": "Error on transport creation for incoming connection",
                "exception": exc, "protocol": protocol,
            })
            return 0
        finally:
            PyContext_Exit(context)
        return transport.connect()

    def stop(self):
        """Ends accepting. When it returns, nothing but the caller's socket holds the port."""
        if self.stopped:
            return
        self.stopped = True
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
            self.loop.accept_starved.remove(self)
        self.loop.engine.cancel_now(&self.accept)
