"""The engine contract: what every completion engine does, and the queue of completions that all of them share.

Rules
-----
* An operation belongs to the engine from ``submit`` to its terminal completion (one without ``MORE``). All that
  time the engine holds a reference to the operation's owner, which keeps the buffers alive.
* ``cancel`` only asks. The operation may still succeed; then it ends with that success.
* A completion is queued by ``push`` and handed over by ``deliver``, never from within ``submit`` or ``cancel``:
  an endpoint isn't re-entered by its own calls.
* Reaping a completion takes it out of the kernel's queue at once. So a callback that raises, or that submits and
  flushes more, loses nothing: what wasn't delivered is delivered next.
* A silent send is a send whose success nobody waits for. Its owner is told by ``sent_silently`` from within
  ``flush``, ``wait`` or ``submit``, and runs no user code there. Its failure is an ordinary completion.
"""
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from headrace._pool cimport Block, BufferPool

from headrace.errors import EngineError

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/ioctl.h>
    #include <sys/socket.h>
    #include <linux/sockios.h>
    #include <time.h>
    #include <unistd.h>
    static int headrace_unsent(int fd) { int n = 0; return ioctl(fd, SIOCOUTQ, &n) ? -1 : n; }
    static double headrace_monotonic(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    """
    int headrace_unsent(int fd) nogil
    double headrace_monotonic() nogil
    int c_close "close"(int fd) nogil
    int c_shutdown "shutdown"(int fd, int how) nogil
    enum: SHUT_WR
    enum: E_CANCELED "ECANCELED"


cdef class Endpoint:
    """What owns operations: a transport, a listener, the loop's watch on its selector."""

    cdef int complete(self, Completion *completion) except -1:
        raise NotImplementedError

    cdef void sent_silently(self, Operation *operation) noexcept:
        pass

    cdef int flush(self) except -1:
        raise NotImplementedError


cdef class Engine:
    """What executes operations. Not made by itself: see the ``uring``, ``epoll`` and ``simulated`` engines.

    An engine belongs to one loop. Everything but ``wake`` and ``close`` happens in the thread that called ``start``.
    """

    def __cinit__(self, *args, **kwargs):
        self.completions = NULL
        self.first = self.last = self.capacity = 0

    def __init__(self, BufferPool pool=None):
        self.name = "none"
        self.pool = pool if pool is not None else BufferPool()

    def __dealloc__(self):
        free(self.completions)

    cdef int submit(self, Operation *operation) except -1:
        raise NotImplementedError

    cdef int cancel(self, Operation *operation) except -1:
        raise NotImplementedError

    cdef int cancel_now(self, Operation *operation) except -1:
        raise NotImplementedError

    cdef int flush(self) except -1:
        raise NotImplementedError

    cdef int wait(self, double timeout) except -1:
        raise NotImplementedError

    cpdef start(self):
        raise NotImplementedError

    cpdef stop(self):
        raise NotImplementedError

    cpdef close(self):
        raise NotImplementedError

    cpdef forked(self):
        raise NotImplementedError

    cpdef wake(self):
        raise NotImplementedError

    cdef double now(self) noexcept:
        return headrace_monotonic()

    cdef int close_descriptor(self, int fd) noexcept:
        # Linux closes the descriptor even when close() says EINTR; a second try might hit somebody else's.
        return 0 if c_close(fd) == 0 else -errno

    cdef void forget_descriptor(self, int fd) noexcept:
        pass

    cdef int shutdown_write(self, int fd) noexcept:
        return 0 if c_shutdown(fd, SHUT_WR) == 0 else -errno

    cdef int unsent(self, int fd) noexcept:
        cdef int n = headrace_unsent(fd)
        return n if n >= 0 else -errno

    # ---- the queue ------------------------------------------------------------------------------------------

    cdef int push(self, Operation *operation, int32_t result, uint32_t flags, Block *block, char *data) except -1:
        """Queues a completion; one without MORE makes the operation ENDING."""
        cdef Completion *entry
        if self.last == self.capacity:
            self.make_room()
        entry = &self.completions[self.last]
        self.last += 1
        entry.operation = operation
        entry.result = result
        entry.flags = flags
        entry.block = block
        entry.data = data
        if not flags & MORE:
            operation.state = ENDING
        self.completed += 1
        return 0

    cdef int make_room(self) except -1:
        cdef Completion *grown
        cdef int capacity = self.capacity * 2 if self.capacity else 256
        grown = <Completion *>realloc(self.completions, capacity * sizeof(Completion))
        if grown == NULL:
            raise MemoryError
        self.completions = grown
        self.capacity = capacity
        return 0

    cdef int deliver(self) except -1:
        """Hands over what is queued now. What is queued meanwhile waits for the next turn: a peer that answers
        as fast as it is written to would otherwise keep timers and other callbacks waiting for as long as it likes."""
        cdef Completion completion
        cdef PyObject *owner
        cdef bint terminal
        cdef int left = self.last - self.first
        while left > 0 and self.first < self.last:
            # A copy: a callback may queue more, which can move the array.
            completion = self.completions[self.first]
            self.first += 1
            left -= 1
            owner = completion.operation.owner
            terminal = not completion.flags & MORE
            if terminal:
                completion.operation.state = IDLE
            try:
                (<Endpoint>owner).complete(&completion)
            finally:
                if terminal:
                    Py_DECREF(<object>owner)
        self.last -= self.first
        if self.last:
            memmove(self.completions, self.completions + self.first, self.last * sizeof(Completion))
        self.first = 0
        return 0

    cdef void drop_queue(self):
        """Closing: gives back what undelivered completions hold."""
        cdef Completion *entry
        cdef PyObject *owner
        while self.first < self.last:
            entry = &self.completions[self.first]
            self.first += 1
            if entry.block != NULL:
                self.pool.drop(entry.block)
            if entry.operation.kind == ACCEPT and entry.result >= 0:
                self.close_descriptor(entry.result)
            elif entry.operation.kind == FILE:
                self.drop_file(entry.operation, entry.result)
            if not entry.flags & MORE:
                owner = entry.operation.owner
                entry.operation.state = IDLE
                Py_DECREF(<object>owner)
        self.first = self.last = 0

    cdef void drop_file(self, Operation *operation, int32_t result) noexcept:
        """The result of a file operation that nobody will hear of."""
        cdef uint8_t opcode = (<FileCall *>operation.message).opcode
        if opcode == OPENAT and result >= 0:
            self.close_descriptor(result)
        elif opcode == CLOSE and result != -E_CANCELED:
            operation.fd = -1    # its number may be another file's by now

    cdef int check_usable(self) except -1:
        if self.closed:
            raise EngineError(f"the {self.name} engine is closed")
        return 0

    def stats(self):
        """Counters since the engine was made, as a dict of int."""
        return {
            "waits": self.waits,
            "calls": self.calls,
            "submitted": self.submitted,
            "completed": self.completed,
            "parked": self.parked_count,
            "silent_sends": self.silent_sends,
            "silent_failures": self.silent_failures,
        }
