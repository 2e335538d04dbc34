"""The simulated engine: one seed decides everything that a kernel and a network may do to a connection.

Theory of operation
-------------------
* Behind the engine contract lies a virtual kernel with io_uring's manners: submissions are executed at the next
  "enter", completions go through a small completion queue with an overflow list, multishot operations end when they
  like, a receive without a buffer ends with ENOBUFS, a cancelled operation may succeed first.
* Behind the kernel lies a virtual network, with a clock of its own: see ``_virtual``.
* ``wait`` never sleeps but jumps to the next event or to its deadline, and each turn costs a little virtual time, so
  that a loop that spins still sees the world move. With nothing to wait for, ``wait`` raises `Deadlock`.
* What no endpoint may do is a `ContractViolation`: an operation on a closed descriptor, two sends in flight on one
  socket, a descriptor closed under its operations, memory that changes while it is being sent, a wrong reference
  count on a block. It is raised at once where that's possible and again at each later step, since
  transports rightly keep exceptions of callbacks away from the loop.

Virtual descriptors start at 2**24, beyond what any kernel hands out: a real system call on one fails with EBADF.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove

from headrace._engine cimport (
    ACCEPT, ALL, CANCELLED, IDLE, IN_FLIGHT, MORE, PARKED, POLL, RECEIVE, SEND, SILENT, SUSPENDED,
    Endpoint, Engine, Operation,
)
from headrace._pool cimport Block, BufferPool
from headrace._virtual cimport (
    CANCEL, FIRST_DESCRIPTOR, NO_SLOT, WORK, Event, Pipe, SeededRandom, Socket, VirtualWorld, grow,
)

from headrace._virtual import Deadlock
from headrace._virtual import NO_FAULTS  # no-cython-lint: for those who import it from here
from headrace.errors import EngineError

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    static int headrace_readable(int fd, int milliseconds) {
        struct pollfd p = { fd, POLLIN, 0 };
        return poll(&p, 1, milliseconds) == 1;
    }
    static void headrace_pause(int milliseconds) { poll(NULL, 0, milliseconds); }
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    enum: EAGAIN, ECANCELED, ECONNRESET, EMFILE, ENOBUFS, EPIPE
    int headrace_readable(int fd, int milliseconds) nogil
    void headrace_pause(int milliseconds) nogil

cdef enum:
    RECEIVE_LIMIT = 64 * 1024     # one completion brings at most this much
    REARM_PER_BLOCK = 4           # as in the io_uring engine
    PATIENCE_STEP = 5             # real milliseconds between two looks at the real world

cdef enum:
    # Stages of an operation within the virtual kernel.
    QUEUED = 0       # submitted, not yet seen by the kernel
    ARMED = 1
    DECIDED = 2      # a silent send that went out whole; nobody has been told yet
    DONE = 3         # its terminal completion is in the completion queue or in the overflow list

cdef enum:
    # Bugs that can be planted in this engine, to see that the oracles still catch them.
    PLANT_PARKED_STAY = 1
    PLANT_OVERFLOW_IGNORED = 2

PLANTS = {"parked-receives-stay-parked": PLANT_PARKED_STAY, "overflow-ignored": PLANT_OVERFLOW_IGNORED}

cdef dict KIND_NAMES = {RECEIVE: "receive", SEND: "send", ACCEPT: "accept", POLL: "poll"}


cdef bint remove(Operation **array, int *length, Operation *operation) noexcept:
    cdef int i
    for i in range(length[0]):
        if array[i] == operation:
            length[0] -= 1
            memmove(array + i, array + i + 1, (length[0] - i) * sizeof(Operation *))
            return True
    return False


cdef uint64_t checksum_bytes(uint64_t h, const char *data, size_t length) noexcept:
    cdef uint64_t word
    cdef size_t i = 0
    while i + 8 <= length:
        memcpy(&word, data + i, 8)
        h = (h ^ word) * <uint64_t>0x9e3779b97f4a7c15
        h ^= h >> 29
        i += 8
    while i < length:
        h = (h ^ <uint8_t>data[i]) * <uint64_t>0x100000001b3
        i += 1
    return h


cdef uint64_t checksum(Operation *operation) noexcept:
    """Of the memory that a send refers to, and of the vectors themselves."""
    cdef msghdr *message = <msghdr *>operation.message
    cdef uint64_t h = <uint64_t>0xcbf29ce484222325 + operation.length
    cdef size_t i
    if message == NULL:
        return checksum_bytes(h ^ <uint64_t><size_t>operation.buffer, operation.buffer, operation.length)
    for i in range(message.msg_iovlen):
        h = checksum_bytes(h ^ <uint64_t><size_t>message.msg_iov[i].iov_base,
                           <const char *>message.msg_iov[i].iov_base, message.msg_iov[i].iov_len)
    return h


cdef size_t total(Operation *operation) noexcept:
    cdef msghdr *message = <msghdr *>operation.message
    cdef size_t i, n = 0
    if message == NULL:
        return operation.length
    for i in range(message.msg_iovlen):
        n += message.msg_iov[i].iov_len
    return n


@cython.final
cdef class SimulatedEngine(VirtualWorld):
    """An engine on a virtual kernel, a virtual network and a virtual clock.

    Parameters
    ----------
    seed : int
        Decides everything. 0 <= seed < 2**64.
    pool : BufferPool, optional
        By default a small one, whose geometry the seed draws; it poisons blocks that came back.
    faults : Faults, optional
        By default drawn from the seed. Each fault can also be given by its name: ``reset=0``.
    send_limit, receive_limit, segment : int, optional
        Bytes that a virtual kernel buffers for a sender, for a receiver, and that cross at once; else drawn.
    descriptors : int
        The most virtual descriptors at a time; beyond it accept ends with EMFILE and others raise OSError.
    patience : float
        Real seconds to wait for a real descriptor or for ``wake`` before a standstill counts as `Deadlock`. 0 keeps
        a run repeatable; more is for loops that use threads.
    trace : bool
        Keep the last 4,000 events as text, in ``trace``.
    plant : str, optional
        A bug of this engine to plant, one of ``PLANTS``: for tests of the oracles.

    Not thread-safe, but for ``wake``.
    """

    def __init__(self, seed, BufferPool pool=None, *, faults=None, send_limit=None, receive_limit=None, segment=None,
                 int descriptors=1024, double patience=0.0, bint trace=False, str plant=None, **probabilities):
        super().__init__(seed, faults, send_limit, receive_limit, segment, descriptors, trace, probabilities)
        self.free_slot = NO_SLOT
        self.patience = patience
        self.planted = PLANTS[plant] if plant is not None else 0
        self.draw_kernel()
        self.pool = pool if pool is not None else self.draw_pool()

    def draw_kernel(self):
        cdef SeededRandom random = self.random
        self.turn_cost = 1e-6 if self.calm else random.choice((1e-6, 5e-6, 20e-6))
        self.submission_limit = 256 if self.calm else random.choice((1, 4, 64))
        self.visible_limit = 4096 if self.calm else random.choice((1, 2, 8, 64))
        self.incremental = self.calm or random.chance(0.7)

    def draw_pool(self):
        cdef SeededRandom random = self.random
        if self.calm:
            pool = BufferPool(block_size=65536, target=4, maximum=32)
        else:
            target = random.integer(2, 6)
            pool = BufferPool(
                block_size=random.choice((4096, 8192, 32768)), target=target, maximum=target + random.integer(1, 12),
            )
        (<BufferPool>pool).poison = True
        return pool

    def __dealloc__(self):
        # What a closed engine held was given back by close(). One that was never closed leaks its operations' owners,
        # as a ring would: nobody may free what a kernel could still write to.
        free(self.slots)
        free(self.submissions)
        free(self.silent)
        free(self.raw)
        free(self.parked)
        free(self.suspended)
        free(self.posted)
        free(self.known)

    # ---- life -----------------------------------------------------------------------------------------------

    cpdef start(self):
        cdef int i, n
        self.check_usable()
        if self.running:
            raise EngineError("the simulated engine is running already")
        self.running = True
        self.replenish()
        n = self.suspended_length
        self.suspended_length = 0
        for i in range(n):
            self.begin(self.suspended[i])

    cpdef stop(self):
        """Ends or suspends everything in flight; received bytes stay queued, the network stands still."""
        cdef uint32_t slot
        cdef int i
        if not self.running:
            return
        self.stopping = True
        try:
            for i in range(self.parked_length):
                self.suspend(self.parked[i])
            self.parked_length = 0
            self.execute()
            self.reap_all()
            for slot in range(self.slot_capacity):
                if self.slots[slot].operation != NULL and self.slots[slot].stage == ARMED:
                    self.cancelled(slot, True)
            self.reap_all()
        finally:
            self.stopping = False
            self.running = False

    cpdef close(self):
        """Drops every operation. Virtual descriptors that are still open stay in ``descriptors()``."""
        cdef int i
        cdef Block *block
        cdef Operation *operation
        if self.closed:
            return
        if self.running:
            raise EngineError("a running engine can't be closed; stop it first")
        self.closed = True
        # The queue first: its entries point to operations, which may go with their owners.
        self.drop_queue()
        for i in range(self.suspended_length):
            operation = self.suspended[i]
            operation.state = IDLE
            Py_DECREF(<object>operation.owner)
        self.suspended_length = 0
        for i in range(self.posted_count):
            block = self.posted[i]
            block.posted = False
            self.pool.posted -= 1
            self.pool.drop(block)
        self.posted_count = 0
        self.drop_events()

    cpdef forked(self):
        """In a child: unusable from now on."""
        self.closed = True
        self.running = False

    cpdef wake(self):
        """Makes ``wait`` return; from any thread."""
        self.woken = True

    # ---- operations -----------------------------------------------------------------------------------------

    cdef int submit(self, Operation *operation) except -1:
        cdef Socket socket = self.sockets.get(operation.fd)
        self.check_usable()
        self.raise_violation()
        if operation.state != IDLE:
            self.violated(f"{describe(operation)} was submitted while the engine has it")
        if operation.fd >= FIRST_DESCRIPTOR:
            if socket is None:
                self.violated(f"{describe(operation)} was submitted on a closed descriptor")
            self.check_free(socket, operation.kind)
        elif operation.kind != POLL:
            self.violated(f"{describe(operation)}: only a poll may be on a real descriptor")
        operation.flags &= ~CANCELLED
        Py_INCREF(<object>operation.owner)
        self.submitted += 1
        if not self.running:
            return self.suspend(operation)
        return self.begin(operation)

    def check_free(self, Socket socket, int kind):
        cdef uint32_t taken = socket.send if kind == SEND else socket.poll if kind == POLL else socket.receive
        if taken != NO_SLOT or KIND_NAMES.get(kind) in self.held_back(socket.fd):
            self.violated(f"two {KIND_NAMES.get(kind, kind)} operations at a time on descriptor {socket.fd}")
        if socket.listening != (kind == ACCEPT) and kind != POLL:
            self.violated(f"a {KIND_NAMES.get(kind, kind)} on the wrong kind of descriptor, {socket.fd}")

    cdef list held_back(self, int fd):
        """The kinds of the operations on `fd` that are parked or suspended."""
        cdef int i
        kinds = [KIND_NAMES[self.parked[i].kind] for i in range(self.parked_length) if self.parked[i].fd == fd]
        for i in range(self.suspended_length):
            if self.suspended[i].fd == fd:
                kinds.append(KIND_NAMES[self.suspended[i].kind])
        return kinds

    cdef int begin(self, Operation *operation) except -1:
        """Queues an operation that the engine already owns for the kernel."""
        if self.submission_count >= self.submission_limit:
            self.execute()
        if self.submission_count == self.submission_capacity:
            self.submissions = <uint32_t *>grow(self.submissions, &self.submission_capacity, sizeof(uint32_t))
        self.take_slot(operation, self.sockets.get(operation.fd))
        operation.state = IN_FLIGHT
        self.submissions[self.submission_count] = operation.slot
        self.submission_count += 1
        return 0

    cdef int take_slot(self, Operation *operation, object target) except -1:
        cdef Socket socket = target
        cdef Slot *entry
        cdef uint32_t i, old = self.slot_capacity
        cdef int capacity = <int>old
        if self.free_slot == NO_SLOT:
            self.slots = <Slot *>grow(self.slots, &capacity, sizeof(Slot))
            self.slot_capacity = capacity
            for i in range(old, self.slot_capacity):
                self.slots[i].operation = NULL
                self.slots[i].generation = 0
                self.slots[i].next = i + 1 if i + 1 < self.slot_capacity else NO_SLOT
            self.free_slot = old
        operation.slot = self.free_slot
        entry = &self.slots[operation.slot]
        self.free_slot = entry.next
        entry.operation = operation
        entry.progress = 0
        entry.stage = QUEUED
        entry.scheduled = False
        entry.checksum = checksum(operation) if operation.kind == SEND else 0
        entry.socket = NULL
        if socket is None:
            self.real_polls += 1
        else:
            entry.socket = <PyObject *>socket
            Py_INCREF(socket)
            if operation.kind == SEND:
                socket.send = operation.slot
            elif operation.kind == POLL:
                socket.poll = operation.slot
            else:
                socket.receive = operation.slot
        self.in_flight += 1
        return 0

    cdef int release_slot(self, uint32_t slot) except -1:
        """The engine is done with the operation; from now on its endpoint may do with memory and socket as it likes."""
        cdef Slot *entry = &self.slots[slot]
        cdef PyObject *target = entry.socket
        cdef Socket socket
        cdef uint64_t now
        if entry.operation.kind == SEND:
            now = checksum(entry.operation)
            if now != entry.checksum:
                self.remember(f"memory of {describe(entry.operation)} was changed while it was being sent")
        entry.operation = NULL
        entry.generation += 1
        entry.next = self.free_slot
        self.free_slot = slot
        self.in_flight -= 1
        if target == NULL:
            self.real_polls -= 1
        else:
            socket = <Socket>target
            entry.socket = NULL
            if socket.send == slot:
                socket.send = NO_SLOT
            elif socket.poll == slot:
                socket.poll = NO_SLOT
            else:
                socket.receive = NO_SLOT
            Py_DECREF(socket)
        return 0

    cdef int execute(self) except -1:
        """The kernel sees what was submitted, in order."""
        cdef int i = 0
        self.calls += 1
        while i < self.submission_count:
            self.arm(self.submissions[i])
            i += 1
        self.submission_count = 0
        return 0

    cdef int arm(self, uint32_t slot) except -1:
        cdef Slot *entry = &self.slots[slot]
        cdef Operation *operation = entry.operation
        entry.stage = ARMED
        if operation.kind == SEND and operation.flags & SILENT:
            return self.send_silently(slot)
        if entry.socket != NULL:
            return self.poke(<Socket>entry.socket)
        return 0

    cdef int poke(self, Socket socket) except -1:
        """Something about the socket has changed: its operations may go on."""
        if socket.closed:
            return 0
        if socket.receive != NO_SLOT:
            self.poke_slot(socket.receive, self.can_receive(socket))
        if socket.poll != NO_SLOT:
            self.poke_slot(socket.poll, self.can_receive(socket))
        if socket.send != NO_SLOT:
            self.poke_slot(socket.send, self.can_send(socket))
        return 0

    cdef int poke_slot(self, uint32_t slot, bint ready) except -1:
        cdef Slot *entry = &self.slots[slot]
        if ready and entry.stage == ARMED and not entry.scheduled:
            entry.scheduled = True
            self.schedule(self.delay(), WORK, slot, entry.generation, None)
        return 0

    cdef int operation_event(self, Event *event) except -1:
        cdef Slot *entry = &self.slots[event.slot]
        if entry.generation != event.generation or entry.operation == NULL:
            return 0    # it has ended meanwhile
        if event.kind == CANCEL:
            return self.cancelled(event.slot, False)
        entry.scheduled = False
        return self.work(event.slot, False) if entry.stage == ARMED else 0

    cdef int work(self, uint32_t slot, bint last) except -1:
        """An operation makes what progress it can; with `last` a multishot operation ends with it."""
        cdef Slot *entry = &self.slots[slot]
        cdef Operation *operation = entry.operation
        cdef Socket socket = <Socket>entry.socket
        if operation.kind == RECEIVE:
            self.work_receive(slot, socket, last)
        elif operation.kind == SEND:
            self.work_send(slot, socket)
        elif operation.kind == ACCEPT:
            self.work_accept(slot, socket, last)
        elif self.can_receive(socket):
            self.post(slot, 1, 0, NULL, NULL)
        return self.poke(socket)

    cdef int work_receive(self, uint32_t slot, Socket socket, bint last) except -1:
        cdef Pipe pipe = socket.incoming
        cdef Block *block
        cdef uint32_t n, start, first
        cdef char *data
        cdef int32_t error
        cdef uint64_t there = pipe.arrived - pipe.taken
        if there == 0:
            error = self.take_error(socket)
            if error:
                return self.post(slot, -error, 0, NULL, NULL)
            if pipe.finished or socket.reset_seen:
                return self.post(slot, 0, 0, NULL, NULL)
            return 0
        if self.posted_count == 0 or self.random.chance(self.p_no_buffers):
            if self.posted_count:
                self.inject("no_buffers")
            return self.post(slot, -ENOBUFS, 0, NULL, NULL)
        block = self.posted[0]
        n = <uint32_t>min(there, <uint64_t>min(block.size - block.offset, <uint32_t>RECEIVE_LIMIT))
        if n > 1 and self.random.chance(self.p_short_receive):
            self.inject("short_receive")
            n = 1 + <uint32_t>self.random.below(n - 1)
        data = block.memory + block.offset
        start = <uint32_t>pipe.taken & pipe.mask
        first = min(n, pipe.mask + 1 - start)
        memcpy(data, pipe.memory + start, first)
        memcpy(data + first, pipe.memory, n - first)
        pipe.taken += n
        block.offset += n
        block.references += 1
        if block.offset == block.size or not self.incremental:
            self.finish_block()
        self.move(pipe)
        if not last and self.random.chance(self.p_early_end):
            self.inject("early_end")
            last = True
        return self.post(slot, <int32_t>n, 0 if last else MORE, block, data)

    def finish_block(self):
        """The kernel is done with the first posted block; a replacement goes out at once."""
        cdef Block *block = self.posted[0]
        self.posted_count -= 1
        memmove(self.posted, self.posted + 1, self.posted_count * sizeof(Block *))
        block.posted = False
        self.pool.posted -= 1
        self.replenish()
        self.pool.drop(block)

    cdef int work_accept(self, uint32_t slot, Socket socket, bint last) except -1:
        cdef Socket accepted
        if not self.can_receive(socket):
            return 0
        if len(self.sockets) >= self.descriptor_limit or self.random.chance(self.p_accept_limit):
            self.inject("accept_limit")
            return self.post(slot, -EMFILE, 0, NULL, NULL)
        accepted, _ = socket.backlog.popleft()
        self.install(accepted)
        if not last and self.random.chance(self.p_early_end):
            self.inject("early_end")
            last = True
        return self.post(slot, accepted.fd, 0 if last else MORE, NULL, NULL)

    cdef int work_send(self, uint32_t slot, Socket socket) except -1:
        cdef Slot *entry = &self.slots[slot]
        cdef Operation *operation = entry.operation
        cdef uint32_t wanted = <uint32_t>total(operation), n
        cdef int32_t error
        if not self.can_send(socket):
            return 0
        error = self.send_error(socket)
        if error:
            # With MSG_WAITALL what went out counts more than the error, which is then told to nobody.
            return self.post(slot, <int32_t>entry.progress if entry.progress else -error, 0, NULL, NULL)
        n = self.take_from(operation, entry.progress, wanted - entry.progress, socket)
        entry.progress += n
        if entry.progress == wanted or not operation.flags & ALL:
            return self.post(slot, <int32_t>entry.progress, 0, NULL, NULL)
        return 0

    cdef int send_silently(self, uint32_t slot) except -1:
        """MSG_DONTWAIT: here and now. A completion only if it isn't all."""
        cdef Slot *entry = &self.slots[slot]
        cdef Operation *operation = entry.operation
        cdef Socket socket = <Socket>entry.socket
        cdef uint32_t wanted = <uint32_t>total(operation), n = 0
        cdef int32_t error = self.send_error(socket)
        if self.silent_count == self.silent_capacity:
            self.silent = <uint64_t *>grow(self.silent, &self.silent_capacity, sizeof(uint64_t))
        self.silent[self.silent_count] = slot | <uint64_t>entry.generation << 32
        self.silent_count += 1
        if error:
            return self.post(slot, -error, 0, NULL, NULL)
        if self.random.chance(self.p_would_block):
            self.inject("would_block")
        else:
            n = self.take_from(operation, 0, wanted, socket)
        if n == wanted:
            entry.stage = DECIDED
            return 0
        return self.post(slot, <int32_t>n if n else -EAGAIN, 0, NULL, NULL)

    cdef uint32_t take_from(self, Operation *operation, uint32_t offset, uint32_t wanted, Socket socket) except? 0:
        """Copies bytes of a send into the sender's buffer: as many as fit, or, by seed, fewer."""
        cdef msghdr *message = <msghdr *>operation.message
        cdef size_t i, start = offset, length
        cdef uint32_t done = 0, n
        if wanted > 1 and self.random.chance(self.p_short_send):
            self.inject("short_send")
            wanted = 1 + <uint32_t>self.random.below(wanted - 1)
        if message == NULL:
            return self.accept_bytes(socket, operation.buffer + offset, wanted)
        for i in range(message.msg_iovlen):
            length = message.msg_iov[i].iov_len
            if start >= length:
                start -= length
                continue
            n = <uint32_t>min(<size_t>(wanted - done), length - start)
            length = self.accept_bytes(socket, <const char *>message.msg_iov[i].iov_base + start, n)
            done += <uint32_t>length
            if length < n or done == wanted:
                break
            start = 0
        return done

    cdef int cancel(self, Operation *operation) except -1:
        operation.flags |= CANCELLED
        if operation.state == IN_FLIGHT:
            self.schedule(self.delay(), CANCEL, operation.slot, self.slots[operation.slot].generation, None)
        elif operation.state == PARKED:
            remove(self.parked, &self.parked_length, operation)
            self.push(operation, -ECANCELED, 0, NULL, NULL)
        elif operation.state == SUSPENDED:
            remove(self.suspended, &self.suspended_length, operation)
            self.push(operation, -ECANCELED, 0, NULL, NULL)
        return 0

    cdef int cancel_now(self, Operation *operation) except -1:
        self.raise_violation()
        operation.flags |= CANCELLED
        if operation.state == IN_FLIGHT:
            self.execute()
            if operation.state == IN_FLIGHT and self.slots[operation.slot].stage == ARMED:
                self.cancelled(operation.slot, True)
            self.reap_all()
        else:
            self.cancel(operation)
        return 0

    cdef int cancelled(self, uint32_t slot, bint now) except -1:
        """A cancel request has reached its operation, which may yet win the race."""
        cdef Slot *entry = &self.slots[slot]
        if entry.stage == QUEUED:
            return self.schedule(self.turn_cost, CANCEL, slot, entry.generation, None)
        if entry.stage != ARMED:
            return 0
        if entry.socket != NULL and self.random.chance(self.p_cancel_race):
            self.inject("cancel_race")
            self.work(slot, self.random.chance(0.5))
            entry = &self.slots[slot]
            if entry.stage != ARMED:
                return 0
        if entry.progress:
            return self.post(slot, <int32_t>entry.progress, 0, NULL, NULL)
        return self.post(slot, -ECANCELED, 0, NULL, NULL)

    # ---- completions ----------------------------------------------------------------------------------------

    cdef int post(self, uint32_t slot, int32_t result, uint32_t flags, Block *block, char *data) except -1:
        """Into the completion queue, or, when that is full, the overflow list: what's in there isn't seen yet."""
        cdef RawCompletion *entry
        if self.raw_count == self.raw_capacity:
            self.raw = <RawCompletion *>grow(self.raw, &self.raw_capacity, sizeof(RawCompletion))
        entry = &self.raw[self.raw_count]
        entry.slot = slot
        entry.generation = self.slots[slot].generation
        entry.result = result
        entry.flags = flags
        entry.block = block
        entry.data = data
        if self.visible == self.raw_count and self.visible < self.visible_limit:
            if self.random.chance(self.p_overflow):
                self.inject("overflow")
            else:
                self.visible += 1
        self.raw_count += 1
        if not flags & MORE:
            self.slots[slot].stage = DONE
        self.mix(<uint64_t>result)
        if self.trace is not None:
            self.note(f"{describe(self.slots[slot].operation)} -> {result}{'' if flags & MORE else ' (last)'}"
                      f"{'' if self.visible == self.raw_count else ' (overflow)'}")
        return 0

    cdef int promote(self) except -1:
        """An enter that collects: the overflow list moves up into the queue."""
        if self.visible < self.raw_count:
            self.overflows += 1
            self.visible = min(self.raw_count, self.visible_limit)
        return 0

    cdef int reap(self) except -1:
        """Takes what is in the completion queue; then silent sends can be decided, if nothing is in overflow."""
        cdef RawCompletion entry
        cdef int i, n = self.visible
        for i in range(n):
            entry = self.raw[i]
            self.settle(&entry)
        self.raw_count -= n
        self.visible = 0
        if n:
            memmove(self.raw, self.raw + n, self.raw_count * sizeof(RawCompletion))
        if self.silent_count and (self.raw_count == 0 or self.planted == PLANT_OVERFLOW_IGNORED):
            self.decide_silent()
        return 0

    cdef int collect(self) except -1:
        """The end of an enter. Completions may stay in overflow until the next one, but not under silent sends."""
        self.reap()
        return self.reap_all() if self.silent_count else 0

    cdef int reap_all(self) except -1:
        """Until the overflow list is empty."""
        self.reap()
        while self.raw_count:
            self.promote()
            self.reap()
        return 0

    cdef int settle(self, RawCompletion *raw) except -1:
        cdef Operation *operation = self.slots[raw.slot].operation
        if self.slots[raw.slot].generation != raw.generation or operation == NULL:
            # Only a planted bug gets here: the operation was taken as done before its completion was seen.
            return 0
        if raw.flags & MORE:
            return self.push(operation, raw.result, MORE, raw.block, raw.data)
        if raw.result == -ECONNRESET or raw.result == -EPIPE:
            (<Socket>self.slots[raw.slot].socket).told = -raw.result
        self.release_slot(raw.slot)
        if raw.result == -ENOBUFS and operation.kind == RECEIVE:
            self.no_buffers += 1
            if not operation.flags & CANCELLED:
                return self.suspend(operation) if self.stopping else self.park(operation)
            raw.result = -ECANCELED
        if raw.result == -ECANCELED and self.stopping and not operation.flags & CANCELLED:
            return self.suspend(operation)
        if operation.kind == SEND and operation.flags & SILENT:
            self.silent_failures += 1
        return self.push(operation, raw.result, 0, raw.block, raw.data)

    cdef int decide_silent(self) except -1:
        cdef int i, kept = 0
        cdef uint32_t slot
        cdef Operation *operation
        for i in range(self.silent_count):
            slot = <uint32_t>self.silent[i]
            operation = self.slots[slot].operation
            if operation == NULL or self.slots[slot].generation != self.silent[i] >> 32:
                continue    # it failed; its completion is queued
            if self.slots[slot].stage == DECIDED or self.planted == PLANT_OVERFLOW_IGNORED:
                self.release_slot(slot)
                operation.state = IDLE
                self.silent_sends += 1
                (<Endpoint>operation.owner).sent_silently(operation)
                Py_DECREF(<object>operation.owner)
            elif self.slots[slot].stage != DONE:
                self.silent[kept] = self.silent[i]
                kept += 1
        self.silent_count = kept
        return 0

    cdef int park(self, Operation *operation) except -1:
        if self.parked_length == self.parked_capacity:
            self.parked = <Operation **>grow(self.parked, &self.parked_capacity, sizeof(Operation *))
        self.parked[self.parked_length] = operation
        self.parked_length += 1
        operation.state = PARKED
        self.parked_count += 1
        return 0

    cdef int suspend(self, Operation *operation) except -1:
        if self.suspended_length == self.suspended_capacity:
            self.suspended = <Operation **>grow(self.suspended, &self.suspended_capacity, sizeof(Operation *))
        self.suspended[self.suspended_length] = operation
        self.suspended_length += 1
        operation.state = SUSPENDED
        return 0

    cdef int replenish(self) except -1:
        cdef Block *block
        while self.posted_count < self.pool.target:
            block = self.pool.take()
            if block == NULL:
                break
            if self.posted_count == self.posted_capacity:
                self.posted = <Block **>grow(self.posted, &self.posted_capacity, sizeof(Block *))
            block.offset = 0
            block.posted = True
            self.posted[self.posted_count] = block
            self.posted_count += 1
            self.pool.posted += 1
        return 0

    cdef int unpark(self) except -1:
        """Re-arms as many parked receives as the posted blocks can serve, the longest waiting first."""
        cdef int i, n
        self.replenish()
        n = min(self.parked_length, self.posted_count * REARM_PER_BLOCK)
        if self.planted == PLANT_PARKED_STAY:
            return 0
        for i in range(n):
            self.begin(self.parked[i])
        self.parked_length -= n
        if n and self.parked_length:
            memmove(self.parked, self.parked + n, self.parked_length * sizeof(Operation *))
        return 0

    # ---- a turn ---------------------------------------------------------------------------------------------

    cdef int flush(self) except -1:
        self.raise_violation()
        self.execute()
        return self.reap_all()

    cdef int wait(self, double timeout) except -1:
        cdef double deadline
        self.raise_violation()
        PyErr_CheckSignals()
        self.waits += 1
        self.unpark()
        self.check_blocks()
        deadline = self.clock + timeout
        self.clock += self.turn_cost
        self.promote()
        self.execute()
        self.run_events(self.clock)
        self.poll_real(0)
        self.collect()
        if timeout == 0 or self.woken:
            self.woken = False
            return 0
        while self.first == self.last and not self.woken:
            if self.parked_length:
                # A receive that found no buffer a moment ago; there may be one now.
                self.unpark()
                self.execute()
            if self.raw_count:
                self.promote()
            elif self.event_count and (timeout < 0 or self.events[0].at <= deadline):
                # What the seed puts at one moment comes in one batch.
                self.run_events(self.events[0].at)
            elif timeout >= 0:
                self.clock = max(self.clock, deadline)
                self.run_events(self.clock)
                self.collect()
                break
            else:
                self.idle()
            self.collect()
        self.woken = False
        self.raise_violation()
        return 0

    cdef int idle(self) except -1:
        """Nothing virtual will ever happen: wait for the real world, or say that all stand still."""
        for _ in range(<int>(self.patience * 1000 / PATIENCE_STEP)):
            # Another thread may have woken us, or given a block back.
            if self.woken or (self.parked_length and self.pool.free):
                return 0
            self.poll_real(PATIENCE_STEP)
            PyErr_CheckSignals()
            if self.raw_count:
                return 0
        waiting = "\n  ".join(self.operations()) or "nothing"
        raise Deadlock(f"a wait without end, and nothing can happen; in flight:\n  {waiting}\n", self.seed)

    cdef int poll_real(self, int milliseconds) except -1:
        """One-shot polls of real descriptors: the loop's selector."""
        cdef uint32_t slot
        cdef int ready, fd
        if not self.real_polls:
            if milliseconds:
                with nogil:
                    headrace_pause(milliseconds)
            return 0
        for slot in range(self.slot_capacity):
            if self.slots[slot].operation == NULL or self.slots[slot].socket != NULL:
                continue
            if self.slots[slot].stage == ARMED:
                fd = self.slots[slot].operation.fd
                with nogil:
                    ready = headrace_readable(fd, milliseconds)
                if ready:
                    self.post(slot, 1, 0, NULL, NULL)
        return 0

    # ---- checks ---------------------------------------------------------------------------------------------

    cdef int check_blocks(self) except -1:
        """posted + queued + leased + free = allocated, and each block's references are those that are known.

        Between two turns nobody else holds one: what an endpoint wants to keep it makes a lease, or copies.
        """
        cdef BufferPool pool = self.pool
        cdef Block *block
        cdef int i, free_blocks = 0, posted = 0
        while self.known_capacity < pool.slots:
            self.known = <int32_t *>grow(self.known, &self.known_capacity, sizeof(int32_t))
        for i in range(pool.slots):
            self.known[i] = 0
        for i in range(self.raw_count):
            self.count_block(self.raw[i].block)
        for i in range(self.first, self.last):
            self.count_block(self.completions[i].block)
        for i in range(pool.slots):
            block = pool.blocks[i]
            if block.memory == NULL:
                continue
            posted += block.posted
            free_blocks += block.references == 0
            self.known[i] += <int32_t>block.leases + block.posted
            if block.references != self.known[i]:
                self.violated(f"block {i} has {block.references} references, but {self.known[i]} holders are known")
        if free_blocks != pool.free:
            self.violated(f"{pool.free} blocks are on the idle stack, {free_blocks} have no reference")
        if posted != self.posted_count or posted != pool.posted:
            self.violated(f"{self.posted_count} blocks are posted, {posted} are marked so, the pool says {pool.posted}")
        return 0

    cdef void count_block(self, Block *block) noexcept:
        if block != NULL:
            self.known[block.index] += 1

    def check(self):
        """Checks the invariants now; ``wait`` does so at each step."""
        self.raise_violation()
        self.check_blocks()

    def held_blocks(self):
        """Blocks that neither the engine nor the pool has: leased, or leaked."""
        cdef BufferPool pool = self.pool
        cdef int i, held = 0
        for i in range(pool.slots):
            if pool.blocks[i].memory != NULL and pool.blocks[i].references > (1 if pool.blocks[i].posted else 0):
                held += 1
        return held

    def operations(self):
        """What is in flight, parked or suspended on virtual descriptors, as a list of text."""
        cdef uint32_t slot
        cdef int i
        lines = []
        for slot in range(self.slot_capacity):
            if self.slots[slot].operation != NULL and self.slots[slot].socket != NULL:
                stage = ("queued", "armed", "decided", "done")[self.slots[slot].stage]
                lines.append(f"{describe(self.slots[slot].operation)} ({stage})")
        for i in range(self.parked_length):
            lines.append(f"{describe(self.parked[i])} (parked)")
        for i in range(self.suspended_length):
            if self.suspended[i].fd >= FIRST_DESCRIPTOR:
                lines.append(f"{describe(self.suspended[i])} (suspended)")
        return lines

    def advance(self, double seconds):
        """Lets virtual time pass without a loop; what completes meanwhile is queued."""
        self.execute()
        self.run_events(self.clock + seconds)
        self.clock = max(self.clock, self.clock + seconds)
        self.reap_all()

    def stats(self):
        """Counters, as a dict of int: those of every engine, and posted, overflows, no_buffers, steps."""
        return Engine.stats(self) | {
            "posted": self.posted_count, "overflows": self.overflows, "no_buffers": self.no_buffers,
            "in_flight": self.in_flight, "steps": self.steps,
        }


cdef str describe(Operation *operation):
    name = KIND_NAMES.get(operation.kind, f"operation {operation.kind}")
    if operation.kind == SEND:
        name = f"{'silent ' if operation.flags & SILENT else ''}send of {total(operation)} bytes"
    cancelled = ", cancelled" if operation.flags & CANCELLED else ""
    return f"{name} on descriptor {operation.fd}{cancelled}"
