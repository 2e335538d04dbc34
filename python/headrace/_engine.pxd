# The engine contract. Three engines implement it: _uring, _epoll, _simulated; tests/test_engine_contract.py
# runs over all of them.
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from headrace._pool cimport Block, BufferPool


cdef enum OperationKind:
    RECEIVE = 1    # multishot: completes with bytes in a pool block until it ends
    SEND = 2       # `buffer`/`length`, or `message` (a struct msghdr *)
    ACCEPT = 3     # multishot: completes with descriptors (non-blocking, close-on-exec)
    POLL = 4       # one shot: completes when the descriptor is readable
    FILE = 5       # one shot: what `call` says; only engines with `files` execute it


cdef enum OperationState:
    IDLE = 0         # not with the engine; may be submitted
    IN_FLIGHT = 1    # the engine owns it
    PARKED = 2       # a receive without a buffer; goes on when a block comes back
    SUSPENDED = 3    # the engine is stopped; goes on at the next start
    ENDING = 4       # its terminal completion is queued, not yet delivered


cdef enum OperationFlags:
    # A send whose success nobody waits for: no completion, and no wake-up, unless it fails or is cut short.
    # It never blocks. Its success is told by Endpoint.sent_silently.
    SILENT = 1
    # Send: complete only when all bytes are out (or an error came).
    ALL = 2
    # cancel() was asked for (set by the engine).
    CANCELLED = 4


cdef enum CompletionFlags:
    MORE = 1         # the operation goes on; without it this is its terminal completion


cdef enum FileOpcode:
    # The kernel's own numbers (include/uapi/linux/io_uring.h).
    FSYNC = 3
    OPENAT = 18
    CLOSE = 19
    STATX = 21
    READ = 22
    WRITE = 23
    RENAMEAT = 35
    UNLINKAT = 36
    MKDIRAT = 37
    FTRUNCATE = 55    # kernel 6.9


cdef struct FileCall:
    # What a FILE operation does, in io_uring's terms; the operation's `fd` is the descriptor, or that of a directory.
    # Owned by the endpoint, as the memory at `address` is, unchanged until the terminal completion.
    uint64_t address      # the bytes, or a path
    uint64_t offset       # in the file (-1: its own position), or a second address
    uint32_t length       # bytes, or a mode
    uint32_t flags        # of the call
    uint8_t opcode
    bint worker           # let a worker of the kernel do it from the beginning (IOSQE_ASYNC)


cdef struct Operation:
    PyObject *owner       # the Endpoint; borrowed. The engine holds a reference from submit to the terminal completion
    const char *buffer    # SEND: owned by the endpoint, unchanged until the terminal completion
    void *message         # SEND: a struct msghdr * in place of buffer, or NULL; FILE: a FileCall *
    uint32_t length       # SEND: all the bytes
    int fd
    uint32_t slot         # the engine's own
    uint8_t kind
    uint8_t state
    uint8_t flags


cdef struct Completion:
    Operation *operation
    char *data            # RECEIVE: where the bytes are
    Block *block          # RECEIVE with result > 0: the block; the receiver of the completion owns one reference
    int32_t result        # bytes, a descriptor, or -errno
    uint32_t flags


cdef class Endpoint:
    # What owns operations: a transport, a listener, the loop's watch on its selector.

    # One completion. May run user code, and raise only what must leave the loop (KeyboardInterrupt, SystemExit).
    # Owns completion.block's reference.
    cdef int complete(self, Completion *completion) except -1
    # A silent send went out whole. Runs no user code. The operation is IDLE again.
    cdef void sent_silently(self, Operation *operation) noexcept
    # The end of a loop turn: submit what was queued in it.
    cdef int flush(self) except -1
    cdef object __weakref__


cdef class Engine:
    cdef readonly str name
    cdef readonly BufferPool pool
    cdef readonly bint running     # between start() and stop()
    cdef readonly bint closed
    # Whether any number of POLLs may be on a descriptor, also on one that its owner may close meanwhile.
    cdef readonly bint polls_freely
    # Whether it executes FILE operations, and which: bit n stands for opcode n. Known once it has started.
    cdef readonly bint files
    cdef uint64_t file_opcodes
    cdef Completion *completions   # completions[first:last] wait to be delivered
    cdef int first, last, capacity
    cdef readonly long long waits, submitted, completed, calls, parked_count, silent_sends, silent_failures

    cdef int submit(self, Operation *operation) except -1
    cdef int cancel(self, Operation *operation) except -1
    # cancel() and see to it, here and now, that the operation has ended: its completions are queued when this returns.
    cdef int cancel_now(self, Operation *operation) except -1
    # Starts what was submitted, without waiting; silent sends are decided when it returns.
    cdef int flush(self) except -1
    # flush(), then wait until there is a completion or `timeout` seconds have passed (< 0: no limit; 0: only reap).
    # Also returns, early and without a completion, on a signal and on wake().
    cdef int wait(self, double timeout) except -1
    # Hands completions[first:last] to their endpoints. If one raises, the rest stay queued.
    cdef int deliver(self) except -1
    cdef int push(self, Operation *operation, int32_t result, uint32_t flags, Block *block, char *data) except -1
    cdef int make_room(self) except -1
    cdef void drop_queue(self)
    cdef void drop_file(self, Operation *operation, int32_t result) noexcept
    cdef int check_usable(self) except -1
    cdef double now(self) noexcept

    # System calls on a descriptor that have no need to overlap; virtual, because the simulator's aren't real.
    cdef int close_descriptor(self, int fd) noexcept        # 0 or -errno; no operation may be in flight on it
    cdef int shutdown_write(self, int fd) noexcept          # 0 or -errno
    cdef int unsent(self, int fd) noexcept                  # bytes that the peer hasn't acknowledged, or -errno

    cpdef start(self)                # in the thread that will call wait()
    cpdef stop(self)                 # in that thread: operations end or are SUSPENDED; received bytes stay queued
    cpdef close(self)                # any thread, not running: every operation is dropped
    cpdef forked(self)               # in a child process: descriptors are closed, nothing else is touched
    cpdef wake(self)                 # any thread

    # Somebody else has closed it: the number may be another file's by now.
    cdef void forget_descriptor(self, int fd) noexcept
