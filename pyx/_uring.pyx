"""The io_uring engine.

Theory of operation
-------------------
* A turn is one ``io_uring_enter``: what the last turn submitted goes in, and the wait for the next completions is
  the same call. An enter with nothing to submit, nothing to wait for and no task work flagged is left out.
* ``user_data`` is slot | generation << 32. A slot is taken at submit and given back at the terminal completion; its
  generation then moves on, so a late completion of a former user is seen to be stale.
* Receives are multishot and take their memory from one provided buffer ring. On kernels with incremental rings
  (6.12) a block of 256 KiB is filled piece by piece. Whenever the kernel finishes a block, a replacement is
  posted *at once*, while reaping: before any completion in that block has been delivered.
* A receive that finds no buffer ends with ENOBUFS and is *parked*. When blocks have come back, parked receives are
  re-armed, the longest waiting first, and a few per posted block: re-arming all would only fetch ENOBUFS for all.
* A silent send is sent with MSG_DONTWAIT and IOSQE_CQE_SKIP_SUCCESS: it posts a completion only when it fails or
  is cut short. It's known to have succeeded when the kernel has consumed its SQE, no completion of its own
  has come, *and* the completion queue isn't in overflow: a failure may sit in the overflow list.
* The ring belongs to a thread (SINGLE_ISSUER, DEFER_TASKRUN). ``stop`` cancels everything and reaps; what only the stop
  has cancelled is suspended and goes on at the next ``start``, on a new ring if that is in another thread.
* Locked memory is given back late (tens of ms) when a ring is closed, so a closed engine leaves its clean ring to
  the next engine of the same thread.
"""
import errno as errno_module
import os
import threading
import time

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from headrace._engine cimport (
    ACCEPT, ALL, CANCELLED, FILE, IDLE, IN_FLIGHT, MORE, PARKED, POLL, RECEIVE, SEND, SILENT, SUSPENDED,
    CLOSE, FSYNC, MKDIRAT, OPENAT, READ, RENAMEAT, STATX, UNLINKAT, WRITE,
    Endpoint, Engine, FileCall, Operation,
)
from headrace._pool cimport Block, BufferPool

from headrace.errors import EngineError, EngineUnavailable

cdef extern from "uring_abi.h" nogil:
    enum:
        HR_OP_POLL_ADD, HR_OP_SENDMSG, HR_OP_ACCEPT, HR_OP_ASYNC_CANCEL, HR_OP_READ, HR_OP_SEND, HR_OP_RECV
        HR_SETUP_COOP_TASKRUN, HR_SETUP_TASKRUN_FLAG, HR_SETUP_SINGLE_ISSUER, HR_SETUP_DEFER_TASKRUN
        HR_SETUP_NO_SQARRAY
        HR_SQ_CQ_OVERFLOW, HR_SQ_TASKRUN
        HR_SQE_ASYNC, HR_SQE_BUFFER_SELECT, HR_SQE_CQE_SKIP_SUCCESS
        HR_ACCEPT_MULTISHOT, HR_RECV_MULTISHOT, HR_CANCEL_ALL, HR_CANCEL_ANY
        HR_CQE_F_BUFFER, HR_CQE_F_MORE, HR_CQE_F_BUF_MORE
    int hr_ring_open(hr_ring *ring, unsigned entries, unsigned cq_entries, uint32_t flags)
    void hr_ring_close(hr_ring *ring, int in_child)
    int hr_enter(hr_ring *ring, unsigned minimum, int reap, int64_t timeout_ns)
    hr_sqe *hr_sqe_next "hr_sqe"(hr_ring *ring)
    uint32_t hr_unsubmitted(hr_ring *ring)
    uint32_t hr_load(const uint32_t *p)
    void hr_store(uint32_t *p, uint32_t v)
    int hr_bufs_register(hr_ring *ring, unsigned entries, int incremental)
    int hr_bufs_unregister(hr_ring *ring)
    void hr_bufs_post(hr_ring *ring, void *memory, uint32_t size, int bid)
    int hr_eventfd()
    int hr_gettid()
    uint64_t hr_opcodes(hr_ring *ring)

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>
    #include <sys/socket.h>
    #include <unistd.h>
    """
    enum:
        E_NOBUFS "ENOBUFS", E_CANCELED "ECANCELED", E_INTR "EINTR", E_TIME "ETIME", E_BUSY "EBUSY", E_AGAIN "EAGAIN"
        E_NOMEM "ENOMEM", E_PERM "EPERM", E_NOSYS "ENOSYS", E_EXIST "EEXIST"
        E_INVAL "EINVAL", E_IO "EIO", E_OPNOTSUPP "EOPNOTSUPP"
        MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITALL, SOCK_NONBLOCK, SOCK_CLOEXEC, POLLIN
    int c_close "close"(int fd) nogil
    int c_getpid "getpid"() nogil
    ssize_t c_write "write"(int fd, const void *data, size_t size) nogil

cdef enum:
    # Buffer ids in a ring; also the most blocks that can be posted at a time.
    BUFFER_ENTRIES = 256
    # A receive brings at most this much, in one completion or several, before it goes to the back of the queue:
    # one fast sender can't empty the ring in one enter. Pieces of 64 KiB would cost 10 to 25 % on streams.
    RECEIVE_LIMIT = 256 * 1024
    # Parked receives that are re-armed per posted block: a block holds RECEIVE_LIMIT of one fast sender, or
    # the small receives of very many.
    REARM_PER_BLOCK = 4
    # An overflowing completion queue is emptied at most this often in a turn: busy peers could refill it for ever.
    OVERFLOW_ROUNDS = 64

cdef uint64_t IGNORED = <uint64_t>-1    # the completion of a cancel request
cdef uint64_t WAKE = <uint64_t>-2       # the read of the eventfd
cdef uint64_t PROBE = <uint64_t>-3

# How long a closed ring's locked memory may stay charged was measured as 23-32 ms; see stop().
cdef double MEMLOCK_PATIENCE = 0.050
cdef double STOP_PATIENCE = 10.0
# For file operations: what a disk or a file server has begun can't be cancelled. asyncio gives an executor as long.
cdef double FILE_PATIENCE = 300.0

# Without these an engine does no file operations. All are older than Linux 6.0; a security module may deny some.
cdef uint64_t FILE_OPCODES = (
    <uint64_t>1 << FSYNC | <uint64_t>1 << OPENAT | <uint64_t>1 << CLOSE | <uint64_t>1 << STATX | <uint64_t>1 << READ
    | <uint64_t>1 << WRITE | <uint64_t>1 << RENAMEAT | <uint64_t>1 << UNLINKAT | <uint64_t>1 << MKDIRAT
)

# Rings that a closed loop left for the next loop of this thread. They go with the thread.
spare = threading.local()


@cython.final
@cython.no_gc
cdef class Ring:
    """A kernel ring, bound to the thread that made it; closed when it's collected."""

    def __cinit__(self):
        self.raw.fd = -1
        self.pid = c_getpid()
        self.tid = hr_gettid()

    def __dealloc__(self):
        if self.raw.fd >= 0:
            hr_ring_close(&self.raw, c_getpid() != self.pid)


cdef tuple SETUPS = (
    HR_SETUP_SINGLE_ISSUER | HR_SETUP_DEFER_TASKRUN | HR_SETUP_TASKRUN_FLAG | HR_SETUP_NO_SQARRAY,
    HR_SETUP_SINGLE_ISSUER | HR_SETUP_DEFER_TASKRUN | HR_SETUP_TASKRUN_FLAG,
    HR_SETUP_COOP_TASKRUN | HR_SETUP_TASKRUN_FLAG,
    0,
)
# What the first ring of this process found to work: index into SETUPS, incremental, capped.
cdef int found_setup = -1
cdef int found_incremental = -1
cdef int found_capped = -1


cdef str explain(int error):
    if error == E_PERM:
        try:
            with open("/proc/sys/kernel/io_uring_disabled") as file:
                level = file.read().strip()
        except OSError:
            level = "0"
        if level != "0":
            return f"io_uring is disabled by sysctl kernel.io_uring_disabled={level}"
        return "io_uring is denied (EPERM): a seccomp filter, as in a container's default profile, or a security module"
    if error == E_NOSYS:
        return "io_uring is missing (ENOSYS): the kernel was built without it, or a seccomp filter hides it"
    if error == E_NOMEM:
        return "no memory may be locked for io_uring (ENOMEM): raise RLIMIT_MEMLOCK (ulimit -l), 8 MiB is plenty"
    return f"io_uring can't be set up ({errno_module.errorcode.get(error, error)}: {os.strerror(error)})"


cdef int open_patiently(Ring ring, unsigned entries, unsigned cq_entries, uint32_t flags) except? 1:
    """hr_ring_open; short of locked memory it waits for closed rings' share to be given back."""
    cdef int error
    cdef double deadline = time.monotonic() + MEMLOCK_PATIENCE
    while True:
        error = hr_ring_open(&ring.raw, entries, cq_entries, flags)
        if error != -E_NOMEM or time.monotonic() >= deadline:
            return error
        time.sleep(0.005)


cdef Ring open_ring(unsigned entries, unsigned cq_entries):
    """A new ring of the best kind this kernel gives; EngineUnavailable says why there is none."""
    global found_setup
    cdef Ring ring = Ring.__new__(Ring)
    cdef int error = 0
    cdef int i
    for i in range(found_setup if found_setup >= 0 else 0, len(SETUPS)):
        error = open_patiently(ring, entries, cq_entries, <uint32_t>SETUPS[i])
        if error == -E_NOMEM and entries > 64:
            error = open_patiently(ring, 64, min(cq_entries, 256), <uint32_t>SETUPS[i])
        if error == 0:
            found_setup = i
            return ring
        if error != -E_INVAL:    # that is: a flag that this kernel doesn't know
            break
    raise EngineUnavailable(explain(-error))


cdef int probe_receive(Ring ring, bint incremental, bint capped) except? 1:
    """Whether a multishot receive into a provided buffer works in this way: 0 or -errno, by trying it."""
    cdef hr_sqe *sqe
    cdef hr_cqe *cqe
    cdef uint32_t head
    cdef int error, result = -E_TIME
    cdef bint more = False
    import socket
    memory = bytearray(8192)
    cdef char *address = memory
    error = hr_bufs_register(&ring.raw, 1, incremental)
    if error:
        hr_bufs_unregister(&ring.raw)
        return error
    hr_bufs_post(&ring.raw, address, 8192, 0)
    near, far = socket.socketpair()
    with near, far:
        far.send(b"headrace")
        far.shutdown(socket.SHUT_WR)
        sqe = hr_sqe_next(&ring.raw)
        sqe.opcode = HR_OP_RECV
        sqe.fd = near.fileno()
        sqe.flags = HR_SQE_BUFFER_SELECT
        sqe.ioprio = HR_RECV_MULTISHOT
        sqe.user_data = PROBE
        if capped:
            sqe.len = 4096
            sqe.optlen = 8192
        for _ in range(8):
            error = hr_enter(&ring.raw, 1, True, 1_000_000_000)
            if error < 0 and error != -E_INTR and error != -E_TIME:
                result = error
                break
            head = ring.raw.cq_head[0]
            while head != hr_load(ring.raw.cq_tail):
                cqe = &ring.raw.cqes[head & ring.raw.cq_mask]
                more = (cqe.flags & HR_CQE_F_MORE) != 0
                if result == -E_TIME:
                    result = cqe.res
                    if result == 8 and incremental and not cqe.flags & HR_CQE_F_BUF_MORE:
                        result = -E_OPNOTSUPP    # the flag was taken for padding
                head += 1
            hr_store(ring.raw.cq_head, head)
            if result != -E_TIME and not more:
                break
    hr_bufs_unregister(&ring.raw)
    if more:
        raise EngineUnavailable("io_uring's self-test didn't end; this kernel's io_uring isn't usable")
    return 0 if result == 8 else (result if result < 0 else -E_IO)


cdef int probe(Ring ring) except -1:
    """Finds out once per process which kind of receive works."""
    global found_incremental, found_capped
    cdef int error = 0
    if found_incremental < 0:
        for incremental, capped in ((True, True), (True, False), (False, True), (False, False)):
            error = probe_receive(ring, incremental, capped)
            if error == 0:
                found_incremental, found_capped = incremental, capped
                break
        else:
            raise EngineUnavailable(
                f"io_uring's receive with provided buffers doesn't work here ({os.strerror(-error)}); "
                "it needs Linux 6.0"
            )
    ring.incremental = found_incremental
    ring.capped = found_capped
    return 0


@cython.final
@cython.no_gc_clear    # the pool must outlive the ring, whose kernel side writes to it
cdef class UringEngine(Engine):
    """Completions from io_uring (Linux 6.0 or newer; 6.12 or newer for incremental buffers).

    Parameters
    ----------
    pool : BufferPool, optional
        Where received bytes go. By default made at the first ``start``, to the measure of the kernel: 8 blocks of
        256 KiB posted ahead; before 6.12, 64 blocks of 32 KiB.
    ring_entries, completion_entries : int
        Submission and completion queue. They aren't limits: a full submission queue is submitted, an overflowing
        completion queue is kept by the kernel.
    incremental : bool, optional
        Force (or forbid) incremental buffer rings; for tests.
    """

    def __init__(self, BufferPool pool=None, *, unsigned ring_entries=256, unsigned completion_entries=4096,
                 incremental=None):
        self.name = "uring"
        self.polls_freely = True
        self.pool = pool
        self.ring_entries = ring_entries
        self.completion_entries = completion_entries
        self.want_incremental = incremental
        self.free_slot = <uint32_t>-1
        self.wake_fd = -1

    def __dealloc__(self):
        # A loop that was never closed: the ring goes with its object. The operations' owners are still referenced
        # from `slots`; after the ring is gone nobody writes to their buffers.
        free(self.slots)
        free(self.silent)
        free(self.parked)
        free(self.suspended)
        if self.wake_fd >= 0:
            c_close(self.wake_fd)

    # ---- life -----------------------------------------------------------------------------------------------

    cpdef start(self):
        self.check_usable()
        if self.running:
            raise EngineError("the uring engine is running already")
        if self.wake_fd < 0:
            self.wake_fd = hr_eventfd()
            if self.wake_fd < 0:
                raise EngineUnavailable(
                    "no descriptor is left for the wake-up eventfd: raise RLIMIT_NOFILE (ulimit -n)"
                )
        if self.ring is not None and self.ring.tid != hr_gettid():
            self.drop_ring()
        if self.ring is None:
            self.start_ring()
        self.running = True
        self.arm_wake()
        cdef int i, n = self.suspended_length
        self.suspended_length = 0
        for i in range(n):
            self.begin(self.suspended[i])

    cdef int start_ring(self) except -1:
        cdef list rings = getattr(spare, "rings", None)
        cdef bint incremental
        if rings and self.completion_entries == 4096 and self.ring_entries == 256:
            self.ring = rings.pop()
            if self.ring.pid != c_getpid():     # this is a fork's child, and the ring its parent's
                self.ring = None
        if self.ring is None:
            self.ring = open_ring(self.ring_entries, self.completion_entries)
        try:
            probe(self.ring)
            if self.want_incremental is not None:
                self.ring.incremental = bool(self.want_incremental)
            incremental = self.ring.incremental
            error = hr_bufs_register(&self.ring.raw, BUFFER_ENTRIES, incremental)
            if error < 0:
                raise EngineUnavailable(explain(-error))
        except BaseException:
            self.ring = None
            raise
        self.file_opcodes = hr_opcodes(&self.ring.raw)
        self.files = self.file_opcodes & FILE_OPCODES == FILE_OPCODES
        if self.pool is None:
            self.pool = BufferPool() if incremental else BufferPool(block_size=32768, target=64, maximum=2048)
        self.pool.wake_fd = self.wake_fd
        self.replenish()
        if not self.pool.posted:
            raise MemoryError(f"no memory for a receive buffer of {self.pool.block_size} bytes")
        return 0

    cpdef stop(self):
        """Ends or suspends everything in flight, in the thread that runs; received bytes stay queued."""
        cdef hr_sqe *sqe
        cdef int i
        if not self.running:
            return
        self.stopping = True
        try:
            for i in range(self.parked_length):
                self.suspend(self.parked[i])
            self.parked_length = 0
            if self.in_flight or self.wake_armed:
                began = self.now()
                sqe = self.sqe()
                sqe.opcode = HR_OP_ASYNC_CANCEL
                sqe.op_flags = HR_CANCEL_ANY | HR_CANCEL_ALL
                sqe.user_data = IGNORED
                while self.in_flight or self.wake_armed:
                    self.enter(1, True, 0.1)
                    self.reap()
                    self.check_patience(self.now() - began)
        finally:
            self.stopping = False
            self.running = False

    cdef int check_patience(self, double waited) except -1:
        cdef uint32_t i
        cdef int files = 0
        if waited <= STOP_PATIENCE:
            return 0
        for i in range(self.slot_capacity):
            if self.slots[i].operation != NULL and self.slots[i].operation.kind == FILE:
                files += 1
        patience = FILE_PATIENCE if files and files == self.in_flight and not self.wake_armed else STOP_PATIENCE
        if waited > patience:
            raise EngineError(f"{self.in_flight} io_uring operations didn't end within {patience} s")
        return 0

    cpdef close(self):
        cdef Ring ring = self.ring
        cdef list rings
        cdef int i
        cdef PyObject *owner
        if self.closed:
            return
        if self.running:
            raise EngineError("a running engine can't be closed; stop it first")
        self.closed = True
        if ring is not None:
            clean = not self.in_flight and ring.tid == hr_gettid() and ring.pid == c_getpid()
            if clean and self.completion_entries == 4096 and self.ring_entries == 256:
                if hr_bufs_unregister(&ring.raw) == 0:
                    rings = spare.__dict__.setdefault("rings", [])
                    if not rings:
                        rings.append(ring)
            self.drop_ring()
        # The queue first: its entries point to operations, which may go with their owners.
        self.drop_queue()
        for i in range(<int>self.slot_capacity):    # only after a stop that failed
            if self.slots[i].operation != NULL:
                self.suspend(self.slots[i].operation)
                self.release_slot(i)
        for i in range(self.suspended_length):
            owner = self.suspended[i].owner
            self.suspended[i].state = IDLE
            Py_DECREF(<object>owner)
        self.suspended_length = 0
        if self.pool is not None:
            self.pool.wake_fd = -1
        if self.wake_fd >= 0:
            c_close(self.wake_fd)
            self.wake_fd = -1

    cpdef forked(self):
        """In a child: the ring's and the eventfd's descriptors go; the parent's ring isn't touched."""
        self.closed = True
        self.running = False
        if self.pool is not None:
            self.pool.wake_fd = -1
        if self.ring is not None and self.ring.raw.fd >= 0:
            hr_ring_close(&self.ring.raw, True)
        self.ring = None
        if self.wake_fd >= 0:
            c_close(self.wake_fd)
            self.wake_fd = -1

    cdef int drop_ring(self) except -1:
        """The ring goes, and with it the blocks that were posted to it."""
        cdef int i
        cdef Block *block
        self.ring = None
        self.wake_armed = False
        if self.pool is None:
            return 0
        for i in range(self.pool.slots):
            block = self.pool.blocks[i]
            if block.posted:
                block.posted = False
                self.pool.drop(block)
        self.pool.posted = 0
        return 0

    # ---- slots and SQEs -------------------------------------------------------------------------------------

    cdef hr_sqe *sqe(self) except NULL:
        cdef hr_sqe *entry = hr_sqe_next(&self.ring.raw)
        while entry == NULL:
            # Full: hand over what's there. With the completion queue in overflow the kernel takes
            # nothing (EBUSY) until completions were collected.
            self.enter(0, (hr_load(self.ring.raw.sq_flags) & HR_SQ_CQ_OVERFLOW) != 0, 0)
            entry = hr_sqe_next(&self.ring.raw)
            if entry == NULL:
                self.reap()
        return entry

    cdef int take_slot(self, Operation *operation) except -1:
        cdef Slot *grown
        cdef uint32_t i, capacity
        if self.free_slot == <uint32_t>-1:
            capacity = self.slot_capacity * 2 if self.slot_capacity else 64
            grown = <Slot *>realloc(self.slots, capacity * sizeof(Slot))
            if grown == NULL:
                raise MemoryError
            self.slots = grown
            i = capacity
            while i > self.slot_capacity:
                i -= 1
                grown[i].operation = NULL
                grown[i].generation = 0
                grown[i].next = self.free_slot
                self.free_slot = i
            self.slot_capacity = capacity
        i = self.free_slot
        self.free_slot = self.slots[i].next
        self.slots[i].operation = operation
        operation.slot = i
        self.in_flight += 1
        return 0

    cdef void release_slot(self, uint32_t slot) noexcept:
        self.slots[slot].operation = NULL
        # 31 bits: a user_data never looks like IGNORED, WAKE or PROBE.
        self.slots[slot].generation = (self.slots[slot].generation + 1) & 0x7fffffff
        self.slots[slot].next = self.free_slot
        self.free_slot = slot
        self.in_flight -= 1

    cdef int submit(self, Operation *operation) except -1:
        if operation.state != IDLE:
            raise EngineError(f"an operation in state {operation.state} was submitted")
        self.check_usable()
        operation.flags &= ~CANCELLED
        Py_INCREF(<object>operation.owner)
        self.submitted += 1
        if not self.running:
            return self.suspend(operation)
        return self.begin(operation)

    cdef int begin(self, Operation *operation) except -1:
        """Puts an operation that the engine already owns into the submission queue."""
        cdef hr_sqe *entry = self.sqe()
        self.take_slot(operation)
        operation.state = IN_FLIGHT
        entry.fd = operation.fd
        entry.user_data = <uint64_t>operation.slot | (<uint64_t>self.slots[operation.slot].generation << 32)
        return self.fill(entry, operation)

    cdef int fill(self, hr_sqe *entry, Operation *operation) except -1:
        cdef SilentSend *silent
        cdef FileCall *call
        if operation.kind == SEND:
            if operation.message != NULL:
                entry.opcode = HR_OP_SENDMSG
                entry.addr = <uint64_t>operation.message
                entry.len = 1
            else:
                entry.opcode = HR_OP_SEND
                entry.addr = <uint64_t>operation.buffer
                entry.len = operation.length
            entry.op_flags = MSG_NOSIGNAL
            if operation.flags & SILENT:
                # WAITALL turns a short send into a failure, which posts its completion.
                entry.op_flags |= MSG_DONTWAIT | MSG_WAITALL
                entry.flags = HR_SQE_CQE_SKIP_SUCCESS
                if self.silent_count == self.silent_capacity:
                    self.silent = <SilentSend *>grow(self.silent, &self.silent_capacity, sizeof(SilentSend))
                silent = &self.silent[self.silent_count]
                self.silent_count += 1
                silent.slot = operation.slot
                silent.generation = self.slots[operation.slot].generation
                silent.sequence = self.ring.raw.tail
            elif operation.flags & ALL:
                entry.op_flags |= MSG_WAITALL
        elif operation.kind == RECEIVE:
            entry.opcode = HR_OP_RECV
            entry.flags = HR_SQE_BUFFER_SELECT
            entry.ioprio = HR_RECV_MULTISHOT
            if self.ring.capped:
                entry.len = RECEIVE_LIMIT
                entry.optlen = RECEIVE_LIMIT
        elif operation.kind == ACCEPT:
            entry.opcode = HR_OP_ACCEPT
            entry.ioprio = HR_ACCEPT_MULTISHOT
            entry.op_flags = SOCK_NONBLOCK | SOCK_CLOEXEC
        elif operation.kind == POLL:
            entry.opcode = HR_OP_POLL_ADD
            entry.op_flags = POLLIN
        elif operation.kind == FILE:
            call = <FileCall *>operation.message
            entry.opcode = call.opcode
            entry.addr = call.address
            entry.off = call.offset
            entry.len = call.length
            entry.op_flags = call.flags
            entry.flags = HR_SQE_ASYNC if call.worker else 0
        else:
            raise EngineError(f"there is no operation of kind {operation.kind}")
        return 0

    cdef int cancel(self, Operation *operation) except -1:
        cdef hr_sqe *entry
        operation.flags |= CANCELLED
        if operation.state == IN_FLIGHT:
            entry = self.sqe()
            entry.opcode = HR_OP_ASYNC_CANCEL
            entry.addr = <uint64_t>operation.slot | (<uint64_t>self.slots[operation.slot].generation << 32)
            entry.flags = HR_SQE_CQE_SKIP_SUCCESS
            entry.user_data = IGNORED
        elif operation.state == PARKED:
            remove(self.parked, &self.parked_length, operation)
            if not self.parked_length:
                self.pool.starving = False
            self.push(operation, -E_CANCELED, 0, NULL, NULL)
        elif operation.state == SUSPENDED:
            remove(self.suspended, &self.suspended_length, operation)
            self.push(operation, -E_CANCELED, 0, NULL, NULL)
        return 0

    cdef int cancel_now(self, Operation *operation) except -1:
        cdef double deadline = self.now() + STOP_PATIENCE
        self.cancel(operation)
        while operation.state == IN_FLIGHT:
            self.enter(1, True, 0.1)
            self.reap()
            if self.now() > deadline:
                raise EngineError(f"an io_uring operation didn't end within {STOP_PATIENCE} s")
        return 0

    cdef int suspend(self, Operation *operation) except -1:
        if self.suspended_length == self.suspended_capacity:
            self.suspended = <Operation **>grow(self.suspended, &self.suspended_capacity, sizeof(Operation *))
        self.suspended[self.suspended_length] = operation
        self.suspended_length += 1
        operation.state = SUSPENDED
        return 0

    # ---- buffers --------------------------------------------------------------------------------------------

    cdef void replenish(self) noexcept:
        """Keeps `target` blocks posted, or as many as the buffer ring has room for."""
        cdef Block *block
        cdef int wanted = min(self.pool.target, BUFFER_ENTRIES)
        while self.pool.posted < wanted:
            block = self.pool.take()
            if block == NULL:
                return
            block.offset = 0
            block.posted = True
            hr_bufs_post(&self.ring.raw, block.memory, block.size, block.index)
            self.pool.posted += 1

    cdef int park(self, Operation *operation) except -1:
        if self.parked_length == self.parked_capacity:
            self.parked = <Operation **>grow(self.parked, &self.parked_capacity, sizeof(Operation *))
        self.parked[self.parked_length] = operation
        self.parked_length += 1
        operation.state = PARKED
        self.parked_count += 1
        return 0

    cdef int unpark(self) except -1:
        """Re-arms as many parked receives as the posted blocks can serve."""
        cdef int i, n
        self.replenish()
        n = min(self.parked_length, self.pool.posted * REARM_PER_BLOCK)
        for i in range(n):
            self.begin(self.parked[i])
        self.parked_length -= n
        if n and self.parked_length:
            memmove(self.parked, self.parked + n, self.parked_length * sizeof(Operation *))
        # With nothing posted, a returned block wakes the loop.
        self.pool.starving = self.parked_length > 0 and self.pool.posted == 0
        return 0

    # ---- a turn ---------------------------------------------------------------------------------------------

    cdef int enter(self, unsigned minimum, bint reap, double timeout) except -1:
        cdef hr_ring *ring = &self.ring.raw
        cdef int64_t nanoseconds = -1
        cdef int result
        if timeout >= 0:
            nanoseconds = <int64_t>(timeout * 1e9)
        self.calls += 1
        with nogil:
            result = hr_enter(ring, minimum, reap, nanoseconds)
        if result == -E_INTR:
            PyErr_CheckSignals()
        elif result < 0 and result != -E_TIME and result != -E_BUSY and result != -E_AGAIN:
            if result == -E_EXIST:
                raise EngineError("the ring belongs to another thread")
            raise OSError(-result, "io_uring_enter: " + os.strerror(-result))
        return 0

    cdef int flush(self) except -1:
        if hr_unsubmitted(&self.ring.raw):
            self.enter(0, False, 0)
            self.reap()
        return 0

    cdef int wait(self, double timeout) except -1:
        cdef hr_ring *ring = &self.ring.raw
        cdef bint sleep
        self.waits += 1
        if self.parked_length:
            self.unpark()
        elif self.pool.posted < self.pool.target:
            self.replenish()
        if not self.wake_armed:
            self.arm_wake()
        sleep = timeout != 0 and self.first == self.last and ring.cq_head[0] == hr_load(ring.cq_tail)
        if sleep or hr_unsubmitted(ring) or hr_load(ring.sq_flags) & (HR_SQ_TASKRUN | HR_SQ_CQ_OVERFLOW):
            self.enter(sleep, True, timeout)
            if sleep:
                PyErr_CheckSignals()
        self.reap()
        return 0

    cdef int reap(self) except -1:
        """Moves the kernel's completions into the queue, and decides the silent sends."""
        cdef hr_ring *ring = &self.ring.raw
        cdef uint32_t head, tail
        cdef int _round
        for _round in range(OVERFLOW_ROUNDS):
            head = ring.cq_head[0]
            tail = hr_load(ring.cq_tail)
            while head != tail:
                self.settle(&ring.cqes[head & ring.cq_mask])
                head += 1
                # One by one: if settle() raises, what it settled is gone from the queue, and nothing else.
                hr_store(ring.cq_head, head)
            if not hr_load(ring.sq_flags) & HR_SQ_CQ_OVERFLOW:
                if self.silent_count:
                    self.decide_silent()
                return 0
            self.overflows += 1
            self.enter(0, True, 0)
        return 0

    cdef int settle(self, hr_cqe *cqe) except -1:
        cdef uint64_t user_data = cqe.user_data
        cdef uint32_t slot = <uint32_t>user_data
        cdef int32_t result = cqe.res
        cdef uint32_t flags = cqe.flags
        cdef Operation *operation = NULL
        cdef Block *block = NULL
        cdef char *data = NULL
        if user_data >= PROBE:
            if user_data == WAKE:
                self.wake_armed = False
                self.wake_pending = False
            return 0
        if slot < self.slot_capacity and self.slots[slot].generation == user_data >> 32:
            operation = self.slots[slot].operation
        if flags & HR_CQE_F_BUFFER:
            block = self.pool.blocks[flags >> 16]
            data = block.memory + block.offset
            if result > 0:
                block.offset += <uint32_t>result
                block.references += 1
            if not flags & HR_CQE_F_BUF_MORE:
                # The kernel is done with the block; its replacement goes out before anyone sees these bytes.
                block.posted = False
                self.pool.posted -= 1
                self.replenish()
                self.pool.drop(block)
            if result <= 0:
                block = NULL
        if operation == NULL:
            if block != NULL:
                self.pool.drop(block)
            return 0
        if flags & HR_CQE_F_MORE:
            return self.push(operation, result, MORE, block, data)
        if block != NULL:
            self.release_slot(slot)
            return self.push(operation, result, 0, block, data)
        return self.finish(operation, slot, result)

    cdef int finish(self, Operation *operation, uint32_t slot, int32_t result) except -1:
        """A terminal completion that carries no bytes."""
        self.release_slot(slot)
        if result == -E_NOBUFS and operation.kind == RECEIVE:
            self.no_buffers += 1
            if operation.flags & CANCELLED:
                result = -E_CANCELED
            elif self.stopping:
                return self.suspend(operation)
            else:
                return self.park(operation)
        if result == -E_INTR and operation.kind == FILE and (self.stopping or operation.flags & CANCELLED):
            # That's how a kernel worker that waits, say to open a FIFO, hears of the cancel: with a signal.
            result = -E_CANCELED
        if result == -E_CANCELED and self.stopping and not operation.flags & CANCELLED:
            return self.suspend(operation)
        if operation.kind == SEND and operation.flags & SILENT:
            self.silent_failures += 1
        return self.push(operation, result, 0, NULL, NULL)

    cdef int decide_silent(self) except -1:
        """Called with all completions collected and no overflow: a silent send that is still in its slot, and
        whose SQE the kernel has consumed, went out whole."""
        cdef uint32_t consumed = hr_load(self.ring.raw.sq_head)
        cdef int i, kept = 0
        cdef SilentSend silent
        cdef Operation *operation
        for i in range(self.silent_count):
            silent = self.silent[i]
            if self.slots[silent.slot].generation != silent.generation:
                continue    # failed; its completion is queued
            if <int32_t>(consumed - silent.sequence) < 0:
                self.silent[kept] = silent
                kept += 1
                continue
            operation = self.slots[silent.slot].operation
            self.release_slot(silent.slot)
            operation.state = IDLE
            self.silent_sends += 1
            (<Endpoint>operation.owner).sent_silently(operation)
            Py_DECREF(<object>operation.owner)
        self.silent_count = kept
        return 0

    # ---- wake-up --------------------------------------------------------------------------------------------

    cdef int arm_wake(self) except -1:
        cdef hr_sqe *entry = self.sqe()
        entry.opcode = HR_OP_READ
        entry.fd = self.wake_fd
        entry.addr = <uint64_t>&self.wake_value
        entry.len = 8
        entry.off = <uint64_t>-1
        entry.user_data = WAKE
        self.wake_armed = True
        return 0

    cpdef wake(self):
        """Makes ``wait`` return; from any thread."""
        cdef uint64_t one = 1
        if self.wake_pending or self.wake_fd < 0:
            return
        self.wake_pending = True
        c_write(self.wake_fd, &one, 8)

    @property
    def features(self):
        """What this kernel was found to give beyond multishot receives, as a dict of bool.

        Empty before the first start, and after close.
        """
        if self.ring is None:
            return {}
        return {
            "incremental_buffers": bool(self.ring.incremental),
            "receive_limit": bool(self.ring.capped),
            "deferred_completions": bool(self.ring.raw.setup_flags & HR_SETUP_DEFER_TASKRUN),
            "files": bool(self.files),
        }

    def stats(self):
        """Counters, as a dict of int: those of every engine, and overflows, no_buffers and in_flight."""
        return Engine.stats(self) | {
            "overflows": self.overflows, "no_buffers": self.no_buffers, "in_flight": self.in_flight,
        }


cdef void *grow(void *array, int *capacity, size_t size) except NULL:
    cdef int wanted = capacity[0] * 2 if capacity[0] else 64
    cdef void *grown = realloc(array, wanted * size)
    if grown == NULL:
        raise MemoryError
    capacity[0] = wanted
    return grown


cdef void remove(Operation **array, int *length, Operation *operation) noexcept:
    cdef int i
    for i in range(length[0]):
        if array[i] == operation:
            length[0] -= 1
            memmove(array + i, array + i + 1, (length[0] - i) * sizeof(Operation *))
            return
