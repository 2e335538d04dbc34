"""The epoll engine: the same completions as io_uring's, made from readiness.

Theory of operation
-------------------
* Everything is level-triggered, one ``recv`` per event. Measured on 100 connections: edge triggering isn't
  cheaper, and it needs care that level triggering doesn't (a short read at an urgent mark isn't the end).
* All receives of a turn are done in ``wait``, one after the other, before any callback runs. That's 3 % cheaper
  than receive, callback, send, receive, ...: the kernel's receive path stays in the instruction cache.
* ``table[fd]`` holds what a descriptor is waited for. An event carries the descriptor and the entry's
  generation; closing the descriptor moves the generation on, so that an event for its former owner is seen to
  be stale. Descriptors are therefore closed through the engine.
* Interest is dropped lazily. When an operation ends its descriptor stays registered, since most often the next
  operation follows at once; an event that finds no operation takes the registration away. So pausing, resuming
  and polling the same descriptor turn after turn need no system call.
* Received bytes go into one pool block after another, piece by piece. When nobody holds anything of the block
  any more it is filled from its beginning again, which keeps it in the cache.
* A turn receives at most ``TURN_LIMIT`` bytes. Receives left over are served first in the next turn.
* A receive that finds no block is *parked*, in a queue. A block that comes back writes to the eventfd; the
  longest parked receive is tried first, without asking epoll again.
* Sends are executed in ``submit``. Only what the socket didn't take waits for EPOLLOUT.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove, memset, strerror

from headrace._engine cimport (
    ACCEPT, ALL, CANCELLED, IDLE, IN_FLIGHT, MORE, PARKED, POLL, RECEIVE, SEND, SILENT,
    Endpoint, Engine, Operation,
)
from headrace._pool cimport Block, BufferPool

from headrace.errors import EngineError, EngineUnavailable

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SYS_epoll_pwait2
    #define SYS_epoll_pwait2 441
    #endif

    enum { HR_VECTORS = 64 };

    /* epoll_wait with a time limit in nanoseconds (< 0: none). The number of events, or -errno. */
    static int hr_epoll_wait(int epoll_fd, struct epoll_event *events, int capacity, int64_t nanoseconds)
    {
        static int has_pwait2 = 1;
        int64_t milliseconds = nanoseconds < 0 ? -1 : 0;
        int n;
        if (nanoseconds > 0 && has_pwait2) {   /* Linux 5.11; a seccomp filter may not know it */
            struct { int64_t s, ns; } limit = {nanoseconds / 1000000000, nanoseconds % 1000000000};
            n = (int)syscall(SYS_epoll_pwait2, epoll_fd, events, capacity, &limit, NULL, (size_t)0);
            if (n >= 0 || (errno != ENOSYS && errno != EPERM))
                return n >= 0 ? n : -errno;
            has_pwait2 = 0;
        }
        if (nanoseconds > 0) {                 /* rounded up: neither early nor, below 1 ms, a spin */
            milliseconds = (nanoseconds + 999999) / 1000000;
            if (milliseconds > INT_MAX)
                milliseconds = INT_MAX;
        }
        n = epoll_wait(epoll_fd, events, capacity, (int)milliseconds);
        return n >= 0 ? n : -errno;
    }

    static int hr_epoll_set(int epoll_fd, int how, int fd, uint32_t events, uint64_t key)
    {
        struct epoll_event event;
        event.events = events;
        event.data.u64 = key;
        return epoll_ctl(epoll_fd, how, fd, &event) == 0 ? 0 : -errno;
    }

    static ssize_t hr_recv(int fd, void *data, size_t size)
    {
        ssize_t n;
        do n = recv(fd, data, size, MSG_DONTWAIT); while (n < 0 && errno == EINTR);
        return n >= 0 ? n : -errno;
    }

    static ssize_t hr_send(int fd, const char *data, size_t size)
    {
        ssize_t n;
        do n = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL); while (n < 0 && errno == EINTR);
        return n >= 0 ? n : -errno;
    }

    /* sendmsg of what comes after the first `done` bytes; the owner's header and vectors aren't modified. */
    static ssize_t hr_send_message(int fd, const void *owned, size_t done)
    {
        struct msghdr message = *(const struct msghdr *)owned;
        struct iovec rest[HR_VECTORS];
        ssize_t n;
        if (done) {
            struct iovec *from = message.msg_iov, *end = from + message.msg_iovlen;
            int count = 0;
            while (from < end && done >= from->iov_len)
                done -= from++->iov_len;
            for (; from < end && count < HR_VECTORS; from++, count++) {
                rest[count].iov_base = (char *)from->iov_base + done;
                rest[count].iov_len = from->iov_len - done;
                done = 0;
            }
            message.msg_iov = rest;
            message.msg_iovlen = count;
            message.msg_control = NULL;        /* went out with the first byte */
            message.msg_controllen = 0;
        }
        do n = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); while (n < 0 && errno == EINTR);
        return n >= 0 ? n : -errno;
    }

    static int hr_accept(int fd)
    {
        int accepted = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        return accepted >= 0 ? accepted : -errno;
    }

    /* A listener must not block accept4, which has no flag for that. */
    static int hr_set_nonblocking(int fd)
    {
        int flags = fcntl(fd, F_GETFL);
        if (flags >= 0 && !(flags & O_NONBLOCK))
            flags = fcntl(fd, F_SETFL, flags | O_NONBLOCK);
        return flags >= 0 ? 0 : -errno;
    }

    static int hr_epoll_open(void) { return epoll_create1(EPOLL_CLOEXEC); }
    static int hr_eventfd_open(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }
    """
    enum:
        EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLET, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
        E_AGAIN "EAGAIN", E_BADF "EBADF", E_BUSY "EBUSY", E_CANCELED "ECANCELED", E_CONNABORTED "ECONNABORTED"
        E_EXIST "EEXIST", E_HOSTDOWN "EHOSTDOWN", E_HOSTUNREACH "EHOSTUNREACH", E_INTR "EINTR"
        E_NETDOWN "ENETDOWN", E_NETUNREACH "ENETUNREACH", E_NOENT "ENOENT", E_NONET "ENONET"
        E_NOPROTOOPT "ENOPROTOOPT", E_PERM "EPERM", E_PROTO "EPROTO"
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int hr_epoll_wait(int epoll_fd, epoll_event *events, int capacity, int64_t nanoseconds) nogil
    int hr_epoll_set(int epoll_fd, int how, int fd, uint32_t events, uint64_t key) nogil
    ssize_t hr_recv(int fd, void *data, size_t size) nogil
    ssize_t hr_send(int fd, const char *data, size_t size) nogil
    ssize_t hr_send_message(int fd, const void *owned, size_t done) nogil
    int hr_accept(int fd) nogil
    int hr_set_nonblocking(int fd) nogil
    int hr_epoll_open() nogil
    int hr_eventfd_open() nogil
    ssize_t c_write "write"(int fd, const void *data, size_t size) nogil
    int c_close "close"(int fd) nogil

cdef enum:
    EVENTS = 256
    # One receive brings at most this much; then it's the next connection's turn. 64 KiB cost 10 to 25 % on
    # streams.
    RECEIVE_LIMIT = 256 * 1024
    # What all receives of one turn bring, give or take one receive: it fits into the second-level cache. From
    # 256 KiB to 1 MiB no difference was seen, 8 MiB cost 10 % with 100 connections.
    TURN_LIMIT = 512 * 1024
    # With less room than this (a quarter of a small block) a block is finished. A short receive costs a system
    # call more, wasted room only memory. With no other block to be had, an eighth of that is still used.
    ROOM_WANTED = 16 * 1024
    # Pieces begin on a cache line.
    ALIGNMENT = 64
    ACCEPT_LIMIT = 64
    READABLE = EPOLLIN | EPOLLHUP | EPOLLERR
    WRITABLE = EPOLLOUT | EPOLLHUP | EPOLLERR

cdef uint64_t WAKE = <uint64_t>-1       # the eventfd's key; a descriptor is less than 2^31
cdef double LONGEST = 1e9               # seconds; more is no limit


cdef struct Entry:
    Operation *read        # a RECEIVE, ACCEPT or POLL
    Operation *write       # a SEND that the socket didn't take whole
    uint32_t registered    # EPOLLIN and EPOLLOUT, as the kernel has them
    uint32_t generation
    uint32_t sent          # bytes of `write` that are out
    bint blocked           # the last send, a silent one, found the socket full


cdef inline bint passing(int error) noexcept:
    """Whether accept4 said this of one connection, which is gone, not of the listener; see accept(2)."""
    return (error == -E_CONNABORTED or error == -E_PROTO or error == -E_PERM or error == -E_INTR
            or error == -E_NETDOWN or error == -E_NOPROTOOPT or error == -E_HOSTDOWN or error == -E_NONET
            or error == -E_HOSTUNREACH or error == -E_NETUNREACH)


@cython.final
cdef class EpollEngine(Engine):
    """Completions from epoll and non-blocking system calls, on any Linux.

    Not bound to a thread: it may be started, stopped and started again in another. Nothing of it is in the
    kernel's hands between two calls, so ``stop`` leaves the operations as they are.

    Parameters
    ----------
    pool : BufferPool, optional
        Where received bytes go. By default a pool of its own, with blocks of 256 KiB.
    """

    cdef int epoll_fd, wake_fd
    cdef bint wake_pending, woken, in_child
    cdef Entry *table
    cdef int table_size
    cdef epoll_event events[EVENTS]
    cdef int event_count           # events[:event_count] are receives left over from the last turn
    cdef Block *block              # the one that is being filled
    cdef uint32_t room_wanted
    cdef Py_ssize_t received       # in this turn
    cdef Operation **parked        # the longest waiting first
    cdef int parked_length, parked_capacity

    def __cinit__(self, *args, **kwargs):
        self.epoll_fd = self.wake_fd = -1

    def __init__(self, BufferPool pool=None):
        Engine.__init__(self, pool)
        self.name = "epoll"
        self.room_wanted = <uint32_t>min(ROOM_WANTED, self.pool.block_size // 4)

    def __dealloc__(self):
        if self.pool is not None:
            self.drop_block()
        self.close_own()
        free(self.table)
        free(self.parked)

    # ---- life ----------------------------------------------------------------------------------------------

    cdef int check_usable(self) except -1:
        if self.in_child:
            raise EngineError("the epoll engine was made before a fork; a child process needs one of its own")
        return Engine.check_usable(self)

    cdef int open(self) except -1:
        self.check_usable()
        self.epoll_fd = hr_epoll_open()
        if self.epoll_fd >= 0:
            self.wake_fd = hr_eventfd_open()
        # Edge-triggered, each write to the eventfd is an event, and nobody needs to read it.
        if (self.wake_fd < 0
                or hr_epoll_set(self.epoll_fd, EPOLL_CTL_ADD, self.wake_fd, EPOLLIN | EPOLLET, WAKE) < 0):
            self.close_own()
            raise EngineUnavailable(
                "no descriptors are left for epoll and its eventfd: raise RLIMIT_NOFILE (ulimit -n)"
            )
        self.pool.wake_fd = self.wake_fd
        return 0

    cdef void close_own(self) noexcept:
        if self.epoll_fd >= 0:
            c_close(self.epoll_fd)
        if self.wake_fd >= 0:
            c_close(self.wake_fd)
        self.epoll_fd = self.wake_fd = -1

    cpdef start(self):
        """Opens the descriptors if need be. Raises EngineError if running, closed or in a forked child."""
        self.check_usable()
        if self.running:
            raise EngineError("the epoll engine is running already")
        if self.epoll_fd < 0:
            self.open()
        self.running = True

    cpdef stop(self):
        """The operations stay; they go on with the next ``wait``, in whichever thread."""
        self.running = False

    cpdef close(self):
        cdef int fd
        if self.closed:
            return
        if self.running:
            raise EngineError("a running engine can't be closed; stop it first")
        self.closed = True
        # The queue first: its entries point to operations, which may go with their owners.
        self.drop_queue()
        self.parked_length = 0
        self.event_count = 0
        for fd in range(self.table_size):
            if self.table[fd].read != NULL:
                self.abandon(&self.table[fd].read)
            if self.table[fd].write != NULL:
                self.abandon(&self.table[fd].write)
        self.drop_block()
        self.pool.starving = False
        self.pool.wake_fd = -1
        self.close_own()

    cdef void drop_block(self) noexcept:
        if self.block != NULL:
            self.block.posted = False
            self.pool.posted = 0
            self.pool.drop(self.block)
            self.block = NULL

    cdef int abandon(self, Operation **slot) except -1:
        cdef Operation *operation = slot[0]
        cdef PyObject *owner = operation.owner
        slot[0] = NULL
        operation.state = IDLE
        Py_DECREF(<object>owner)
        return 0

    cpdef forked(self):
        """In a child: its copies of the descriptors go; every later use but ``close`` raises EngineError."""
        self.in_child = True
        self.closed = True
        self.running = False
        self.pool.starving = False
        self.pool.wake_fd = -1
        self.close_own()

    # ---- the table -----------------------------------------------------------------------------------------

    cdef int grow(self, int fd) except -1:
        cdef Entry *grown
        cdef int size = max(self.table_size * 2, 64)
        while size <= fd:
            size *= 2
        grown = <Entry *>realloc(self.table, size * sizeof(Entry))
        if grown == NULL:
            raise MemoryError
        memset(grown + self.table_size, 0, (size - self.table_size) * sizeof(Entry))
        self.table = grown
        self.table_size = size
        return 0

    cdef inline int set(self, int how, int fd, uint32_t events) noexcept:
        self.calls += 1
        return hr_epoll_set(self.epoll_fd, how, fd, events,
                            <uint64_t><uint32_t>fd | (<uint64_t>self.table[fd].generation << 32))

    cdef int arm(self, int fd, uint32_t events) noexcept:
        """Sees to it that these events are registered: 0 or -errno."""
        cdef Entry *entry = &self.table[fd]
        cdef int error
        if (entry.registered & events) == events:
            return 0
        events |= entry.registered
        if entry.registered:
            error = self.set(EPOLL_CTL_MOD, fd, events)
            if error == -E_NOENT:      # closed by somebody else, and the number is in use again
                error = self.set(EPOLL_CTL_ADD, fd, events)
        else:
            error = self.set(EPOLL_CTL_ADD, fd, events)
            if error == -E_EXIST:
                error = self.set(EPOLL_CTL_MOD, fd, events)
        if error == 0:
            entry.registered = events
        return error

    cdef void disarm(self, int fd) noexcept:
        """Takes away what no operation waits for; all, if that's all: a hang-up can't be masked."""
        cdef Entry *entry = &self.table[fd]
        cdef uint32_t wanted = 0
        if entry.read != NULL and entry.read.state != PARKED:
            wanted |= EPOLLIN
        if entry.write != NULL:
            wanted |= EPOLLOUT
        if entry.registered != wanted:
            self.set(EPOLL_CTL_MOD if wanted else EPOLL_CTL_DEL, fd, wanted)
            entry.registered = wanted

    cdef void forget_descriptor(self, int fd) noexcept:
        """The descriptor is closed, or new."""
        cdef Entry *entry
        if fd < self.table_size:
            entry = &self.table[fd]
            entry.registered = 0
            entry.blocked = False
            entry.generation += 1

    cdef int close_descriptor(self, int fd) noexcept:
        cdef Entry *entry
        if 0 <= fd < self.table_size:
            entry = &self.table[fd]
            if entry.read != NULL or entry.write != NULL:
                return -E_BUSY
            # close() alone doesn't unregister a file that has another descriptor, after dup() or in a child.
            if entry.registered and self.epoll_fd >= 0:
                self.set(EPOLL_CTL_DEL, fd, 0)
            self.forget_descriptor(fd)
        self.calls += 1
        return Engine.close_descriptor(self, fd)

    # ---- operations ----------------------------------------------------------------------------------------

    cdef int submit(self, Operation *operation) except -1:
        cdef int fd = operation.fd
        if operation.state != IDLE:
            raise EngineError(f"an operation in state {operation.state} was submitted")
        if self.epoll_fd < 0:
            self.open()
        operation.flags &= <unsigned char>~CANCELLED
        self.submitted += 1
        if not 0 <= fd < self.table_size:
            if fd < 0:
                Py_INCREF(<object>operation.owner)
                return self.push(operation, -E_BADF, 0, NULL, NULL)
            self.grow(fd)
        if operation.kind == SEND:
            return self.send(operation, &self.table[fd])
        return self.listen(operation, &self.table[fd])

    cdef int listen(self, Operation *operation, Entry *entry) except -1:
        """Starts an operation that waits for EPOLLIN."""
        cdef int error = 0
        if entry.read != NULL:
            raise EngineError(f"descriptor {operation.fd} is received from already")
        if operation.kind == ACCEPT:
            error = hr_set_nonblocking(operation.fd)
        elif operation.kind != RECEIVE and operation.kind != POLL:
            raise EngineError(f"there is no operation of kind {operation.kind}")
        if error == 0:
            error = self.arm(operation.fd, EPOLLIN)
        Py_INCREF(<object>operation.owner)
        if error < 0:
            return self.push(operation, error, 0, NULL, NULL)
        entry.read = operation
        operation.state = IN_FLIGHT
        return 0

    cdef inline ssize_t transmit(self, Operation *operation, uint32_t done) noexcept:
        self.calls += 1
        if operation.message == NULL:
            return hr_send(operation.fd, operation.buffer + done, operation.length - done)
        return hr_send_message(operation.fd, operation.message, done)

    cdef int send(self, Operation *operation, Entry *entry) except -1:
        cdef ssize_t n = -E_AGAIN
        cdef int error
        if entry.write != NULL:
            raise EngineError(f"descriptor {operation.fd} is sent to already")
        if operation.length > <uint32_t>INT32_MAX:
            raise EngineError("a send of 2 GiB or more")
        if entry.blocked and not operation.flags & SILENT:
            entry.blocked = False      # tried just now; EPOLLOUT tells if that has changed
        else:
            n = self.transmit(operation, 0)
        if operation.flags & SILENT:
            if n == operation.length:
                self.silent_sends += 1
                (<Endpoint>operation.owner).sent_silently(operation)
                return 0
            self.silent_failures += 1
            entry.blocked = n >= 0 or n == -E_AGAIN
        elif n == -E_AGAIN or (0 <= n < operation.length and (operation.flags & ALL or n == 0)):
            error = self.arm(operation.fd, EPOLLOUT)
            if error == 0:
                Py_INCREF(<object>operation.owner)
                entry.sent = <uint32_t>n if n > 0 else 0
                entry.write = operation
                operation.state = IN_FLIGHT
                return 0
            n = n if n > 0 else error
        Py_INCREF(<object>operation.owner)
        return self.push(operation, <int32_t>n, 0, NULL, NULL)

    cdef int send_rest(self, Operation *operation, Entry *entry) except -1:
        cdef ssize_t n = self.transmit(operation, entry.sent)
        if n == -E_AGAIN:
            return 0
        if n > 0:
            entry.sent += <uint32_t>n
            if entry.sent < operation.length and operation.flags & ALL:
                return 0
        # As the kernel does it: an error after some progress is told to the next send.
        entry.write = NULL
        return self.push(operation, <int32_t>entry.sent if entry.sent else <int32_t>n, 0, NULL, NULL)

    cdef int cancel(self, Operation *operation) except -1:
        cdef Entry *entry
        cdef int32_t result = -E_CANCELED
        operation.flags |= CANCELLED
        if operation.state != IN_FLIGHT and operation.state != PARKED:
            return 0
        entry = &self.table[operation.fd]
        if operation.kind == SEND:
            entry.write = NULL
            if entry.sent:
                result = <int32_t>entry.sent
        else:
            entry.read = NULL
            if operation.state == PARKED:
                self.remove_parked(operation)
            # Lazily only where the descriptor is ours to close. A listener may be closed by its owner, and the
            # kernel doesn't tell when a registration goes with it.
            if operation.kind != RECEIVE:
                self.disarm(operation.fd)
        return self.push(operation, result, 0, NULL, NULL)

    cdef int cancel_now(self, Operation *operation) except -1:
        return self.cancel(operation)

    # ---- receiving -----------------------------------------------------------------------------------------

    cdef inline Block *room(self) noexcept:
        """The block to receive into, NULL if there is none."""
        cdef Block *block = self.block
        if block != NULL:
            if block.references == 1:
                block.offset = 0       # nobody but us: from the beginning, where it's warm
            if block.offset + self.room_wanted <= block.size:
                return block
        return self.next_block()

    cdef Block *next_block(self) noexcept:
        cdef Block *old = self.block
        cdef Block *block = self.pool.take()
        if block == NULL and old != NULL and old.offset + self.room_wanted // 8 <= old.size:
            return old
        # Without our reference, the last lease's return puts the old block on the pool's stack, and wakes us.
        if old != NULL:
            old.posted = False
            self.pool.drop(old)
        if block != NULL:
            block.posted = True
        self.block = block
        self.pool.posted = block != NULL
        return block

    cdef int receive(self, Operation *operation, Entry *entry) except -1:
        cdef Block *block = self.room()
        cdef char *data
        cdef size_t size
        cdef ssize_t n
        if block == NULL:
            return self.park(operation)
        data = block.memory + block.offset
        size = block.size - block.offset
        if size > RECEIVE_LIMIT:
            size = RECEIVE_LIMIT
        self.calls += 1
        n = hr_recv(operation.fd, data, size)
        if n > 0:
            self.received += n
            # Blocks are whole pages: rounding up doesn't lead beyond the end.
            block.offset = (block.offset + <uint32_t>n + ALIGNMENT - 1) & <uint32_t>~(ALIGNMENT - 1)
            block.references += 1
            return self.push(operation, <int32_t>n, MORE, block, data)
        if n == -E_AGAIN:
            return 0
        entry.read = NULL
        return self.push(operation, <int32_t>n, 0, NULL, NULL)

    cdef int park(self, Operation *operation) except -1:
        cdef Operation **grown
        cdef int capacity
        if self.parked_length == self.parked_capacity:
            capacity = max(self.parked_capacity * 2, 64)
            grown = <Operation **>realloc(self.parked, capacity * sizeof(Operation *))
            if grown == NULL:
                raise MemoryError
            self.parked = grown
            self.parked_capacity = capacity
        self.parked[self.parked_length] = operation
        self.parked_length += 1
        self.parked_count += 1
        operation.state = PARKED
        return 0

    cdef void remove_parked(self, Operation *operation) noexcept:
        cdef int i
        for i in range(self.parked_length):
            if self.parked[i] == operation:
                self.parked_length -= 1
                self.pool.starving = self.parked_length > 0
                memmove(self.parked + i, self.parked + i + 1, (self.parked_length - i) * sizeof(Operation *))
                return

    cdef int unpark(self) except -1:
        """Serves parked receives as far as there are blocks; a block that comes back writes to the eventfd."""
        cdef Operation *operation
        cdef int error, served = 0
        try:
            while served < self.parked_length and self.received < TURN_LIMIT and self.room() != NULL:
                operation = self.parked[served]
                served += 1
                operation.state = IN_FLIGHT
                self.receive(operation, &self.table[operation.fd])
                if operation.state == IN_FLIGHT:
                    error = self.arm(operation.fd, EPOLLIN)
                    if error < 0:
                        self.table[operation.fd].read = NULL
                        self.push(operation, error, 0, NULL, NULL)
        finally:
            self.parked_length -= served
            memmove(self.parked, self.parked + served, self.parked_length * sizeof(Operation *))
            self.pool.starving = self.parked_length > 0
        return 0

    cdef int accept(self, Operation *operation, Entry *entry) except -1:
        cdef int fd
        for _ in range(ACCEPT_LIMIT):
            self.calls += 1
            fd = hr_accept(operation.fd)
            if fd >= 0:
                self.forget_descriptor(fd)
                self.push(operation, fd, MORE, NULL, NULL)
            elif fd == -E_AGAIN:
                return 0
            elif not passing(fd):
                entry.read = NULL
                return self.push(operation, fd, 0, NULL, NULL)
        return 0

    # ---- a turn --------------------------------------------------------------------------------------------

    cdef int serve(self) except -1:
        """Turns events[:event_count] into completions; keeps the receives beyond this turn's limit."""
        cdef epoll_event *event
        cdef Entry *entry
        cdef Operation *operation
        cdef uint32_t fd, events, unclaimed
        cdef int i = 0, n = self.event_count, kept = 0
        try:
            while i < n:
                event = &self.events[i]
                i += 1
                events = event.events
                fd = <uint32_t>event.data.u64
                if event.data.u64 == WAKE:
                    self.wake_pending = False
                    self.woken = True
                    continue
                entry = &self.table[fd]
                if entry.generation != <uint32_t>(event.data.u64 >> 32):
                    continue
                unclaimed = events & (EPOLLIN | EPOLLOUT)
                operation = entry.read
                if operation != NULL and operation.state != PARKED:
                    unclaimed &= <uint32_t>~EPOLLIN
                    if not events & READABLE:
                        pass
                    elif operation.kind != RECEIVE:
                        self.other(operation, entry, events)
                    elif self.received < TURN_LIMIT:
                        self.receive(operation, entry)
                    else:
                        event.events &= <uint32_t>~EPOLLOUT
                        self.events[kept] = event[0]
                        kept += 1
                elif entry.write == NULL:
                    unclaimed = EPOLLIN    # also when it's only a hang-up
                if entry.write != NULL:
                    unclaimed &= <uint32_t>~EPOLLOUT
                    if events & WRITABLE:
                        self.send_rest(entry.write, entry)
                if unclaimed:
                    self.disarm(fd)
        finally:
            # The rest: none, but after an exception. That of the eventfd wouldn't come again.
            memmove(&self.events[kept], &self.events[i], (n - i) * sizeof(epoll_event))
            self.event_count = kept + n - i
        return 0

    cdef int other(self, Operation *operation, Entry *entry, uint32_t events) except -1:
        if operation.kind == ACCEPT:
            return self.accept(operation, entry)
        entry.read = NULL
        return self.push(operation, <int32_t>events, 0, NULL, NULL)

    cdef int poll(self, double timeout) except -1:
        """Asks epoll; the number of events, or 0 after a signal, then with `woken` set."""
        cdef int64_t nanoseconds = -1
        cdef int n
        self.calls += 1
        if timeout == 0:
            # It doesn't sleep, so the interpreter isn't given away.
            n = hr_epoll_wait(self.epoll_fd, self.events, EVENTS, 0)
        else:
            if 0 < timeout < LONGEST:
                nanoseconds = <int64_t>(timeout * 1e9) + 1      # never early, never a spin
            with nogil:
                n = hr_epoll_wait(self.epoll_fd, self.events, EVENTS, nanoseconds)
        if n >= 0:
            self.event_count = n       # before a signal handler may raise
        elif n == -E_INTR:
            self.woken = True
            n = 0
        else:
            raise OSError(-n, f"epoll_wait: {strerror(-n).decode()}")
        if timeout != 0:
            PyErr_CheckSignals()
        return n

    cdef int flush(self) except -1:
        return 0                       # submit() has done it

    cdef int wait(self, double timeout) except -1:
        cdef double deadline = 0
        if self.epoll_fd < 0:
            self.open()
        self.waits += 1
        self.received = 0
        self.woken = False
        if self.parked_length:
            self.unpark()
        if self.event_count:
            self.serve()
            if self.event_count:
                return 0
        if timeout > 0:
            deadline = self.now() + timeout
        while True:
            if self.first < self.last:
                timeout = 0
            if self.poll(timeout):
                self.serve()
                if self.woken and self.parked_length:
                    self.unpark()
            elif timeout > 0:
                return 0
            if timeout == 0 or self.woken or self.first < self.last:
                return 0
            # What came was stale, or the end of an interest. Nobody waits for that.
            if timeout > 0:
                timeout = deadline - self.now()
                if timeout <= 0:
                    return 0

    cpdef wake(self):
        """Makes ``wait`` return, the one under way or the next; from any thread. Any number are one write."""
        cdef uint64_t one = 1
        if self.wake_pending or self.wake_fd < 0:
            return
        self.wake_pending = True
        self.calls += 1
        c_write(self.wake_fd, &one, 8)

    def stats(self):
        """Counters, as a dict of int: those of every engine, and those parked and left over just now."""
        return Engine.stats(self) | {"parked_now": self.parked_length, "left_over": self.event_count}
