# cython: auto_pickle=False
"""The smallest loop and transport that keep the engine contract, and a switch that breaks one rule at a time.

`headrace.testing` uses it in two ways. Correct, it is the measure of the simulator: every oracle must stay silent
over thousands of seeds. With one of `BUGS` planted, an oracle must speak up: a simulator that stops catching
them has rotted. It also shows, in one screen per idea, what any endpoint has to do about each completion.

Rules for an endpoint
---------------------
* Bytes come with a block reference, which the endpoint owns: copy, then ``drop``.
* One send at a time. A send may be short: go on with the rest. A silent send may fail with EAGAIN: send it aloud.
* A multishot operation that ends without a reason is submitted again, unless the connection is closing.
* Loss cancels what is in flight; the descriptor is closed, and the protocol told, when the last operation has ended.
"""
import collections
import heapq
import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memset

from headrace._engine cimport (
    ACCEPT, ALL, IDLE, IN_FLIGHT, MORE, PARKED, RECEIVE, SEND, SILENT, SUSPENDED, Completion, Endpoint, Operation,
)
from headrace._pool cimport Block
from headrace._simulated cimport SimulatedEngine
from headrace._virtual cimport SeededRandom

cdef extern from "<errno.h>":
    enum: EAGAIN, ECANCELED, EMFILE

cdef enum Bug:
    NONE = 0
    PARTIAL_SEND_IGNORED
    TWO_SENDS
    RELEASED_BEFORE_COPY
    ONE_BYTE_TOO_MANY
    RESET_TAKEN_AS_END
    BLOCK_LEAKED_AFTER_LOSS
    SEND_RESET_SWALLOWED
    CLOSE_BEFORE_FLUSH
    NOT_CANCELLED_ON_LOSS
    REARMED_AFTER_LOSS

# Name -> (what ModelTransport does wrong, what SimulatedEngine does wrong).
BUGS = {
    "enobufs-not-rearmed": (NONE, "parked-receives-stay-parked"),
    "partial-send-ignored": (PARTIAL_SEND_IGNORED, None),
    "two-sends-in-flight": (TWO_SENDS, None),
    "released-before-copied": (RELEASED_BEFORE_COPY, None),
    "one-byte-too-many": (ONE_BYTE_TOO_MANY, None),
    "reset-taken-as-clean-end": (RESET_TAKEN_AS_END, None),
    "buffer-leaked-after-loss": (BLOCK_LEAKED_AFTER_LOSS, None),
    "send-reset-swallowed": (SEND_RESET_SWALLOWED, None),
    "close-before-flush": (CLOSE_BEFORE_FLUSH, None),
    "not-cancelled-on-loss": (NOT_CANCELLED_ON_LOSS, None),
    "rearmed-after-loss": (REARMED_AFTER_LOSS, None),
    "silent-failure-in-overflow": (NONE, "overflow-ignored"),
}

cdef enum:
    HIGH_WATER = 16 * 1024
    LOW_WATER = 4 * 1024

cdef double ACCEPT_BACKOFF = 0.1


@cython.final
cdef class ModelLoop:
    """A ready queue, timers, and one engine turn after the other; on a `SimulatedEngine` only."""

    cdef readonly SimulatedEngine engine
    cdef readonly SeededRandom random
    cdef readonly int bug
    cdef readonly list errors           # what callbacks raised
    cdef object ready
    cdef list timers, dirty
    cdef long long sequence

    def __init__(self, SimulatedEngine engine, str bug=None):
        self.engine = engine
        self.bug = BUGS[bug][0] if bug is not None else NONE
        self.random = SeededRandom(<object>engine.seed ^ 0x6d6f64656c)
        self.errors = []
        self.ready = collections.deque()
        self.timers = []
        self.dirty = []

    def time(self):
        return self.engine.clock

    def call_soon(self, callback, *arguments):
        self.ready.append((callback, arguments))

    def call_later(self, double delay, callback, *arguments):
        self.sequence += 1
        heapq.heappush(self.timers, (self.engine.clock + delay, self.sequence, callback, arguments))

    def listen(self, address, factory):
        """Serves virtual connections at `address`; returns what has a ``close()``."""
        return ModelListener(self, self.engine.listen(address), factory)

    def connect(self, address, factory):
        """Connects, and makes a transport for the protocol that `factory` gives."""
        return ModelTransport(self, self.engine.connect(address), factory())

    def run(self, finished, double limit):
        """Turns until ``finished()`` is true, or until `limit` virtual seconds have passed: then False."""
        cdef double deadline = self.engine.clock + limit
        self.engine.start()
        try:
            while not finished():
                if self.engine.clock > deadline:
                    return False
                self.turn(deadline)
            return True
        finally:
            self.engine.stop()

    cdef int turn(self, double deadline) except -1:
        cdef double timeout
        cdef list dirty = self.dirty
        self.dirty = []
        for endpoint in dirty:
            (<Endpoint>endpoint).flush()
        timeout = deadline - self.engine.clock
        if self.ready or self.dirty:
            timeout = 0
        elif self.timers:
            timeout = min(timeout, self.timers[0][0] - self.engine.clock)
        self.engine.wait(max(timeout, 0.0))
        self.engine.deliver()
        while self.timers and self.timers[0][0] <= self.engine.clock:
            _, _, callback, arguments = heapq.heappop(self.timers)
            self.call_soon(callback, *arguments)
        for _ in range(len(self.ready)):
            callback, arguments = self.ready.popleft()
            self.invoke(callback, arguments)
        return 0

    cdef int invoke(self, callback, tuple arguments) except -1:
        try:
            callback(*arguments)
        except Exception as error:
            self.errors.append(error)
        return 0


@cython.final
cdef class ModelListener(Endpoint):
    """Accepts for as long as it is open; waits a while when descriptors are short."""

    cdef ModelLoop loop
    cdef object factory
    cdef Operation accept
    cdef bint closing

    def __init__(self, ModelLoop loop, int fd, factory):
        self.loop = loop
        self.factory = factory
        memset(&self.accept, 0, sizeof(Operation))
        self.accept.owner = <PyObject *>self
        self.accept.kind = ACCEPT
        self.accept.fd = fd
        loop.engine.submit(&self.accept)

    cdef int complete(self, Completion *completion) except -1:
        if completion.result >= 0:
            ModelTransport(self.loop, completion.result, self.factory())
        if completion.flags & MORE:
            return 0
        if self.closing:
            self.loop.engine.close_descriptor(self.accept.fd)
        elif completion.result == -EMFILE:
            self.loop.call_later(ACCEPT_BACKOFF, self.accept_again)
        else:
            self.loop.engine.submit(&self.accept)
        return 0

    def accept_again(self):
        if not self.closing:
            self.loop.engine.submit(&self.accept)

    def close(self):
        if self.closing:
            return
        self.closing = True
        if self.accept.state == IDLE:
            self.loop.engine.close_descriptor(self.accept.fd)
        else:
            self.loop.engine.cancel(&self.accept)


@cython.final
cdef class Pointer:
    # What nobody should keep: where bytes were, in a block that was given back.
    cdef char *data
    cdef Py_ssize_t size


@cython.final
cdef class ModelTransport(Endpoint):
    """A stream transport with asyncio's methods and callbacks, as far as the scenarios use them."""

    cdef ModelLoop loop
    cdef object protocol
    cdef Operation receive, send, second_send
    cdef readonly int fd
    cdef object queue                  # bytes that aren't submitted
    cdef bytes sending                 # what the send in flight refers to
    cdef bytes second_sending
    cdef Py_ssize_t queued             # bytes written and not sent
    cdef object held                   # received bytes, while reading is paused
    cdef object reason                 # the exception for connection_lost
    cdef bint aloud                    # the next send mustn't be silent
    cdef bint closing, lost, gone, paused, writing_paused, eof_wanted, eof_sent, eof_seen, marked

    def __init__(self, ModelLoop loop, int fd, protocol):
        self.loop = loop
        self.fd = fd
        self.protocol = protocol
        self.queue = collections.deque()
        self.held = collections.deque()
        self.prepare(&self.receive, RECEIVE)
        self.prepare(&self.send, SEND)
        self.prepare(&self.second_send, SEND)
        self.invoke(protocol.connection_made, self)
        if not self.lost and not self.closing:
            loop.engine.submit(&self.receive)

    cdef void prepare(self, Operation *operation, int kind) noexcept:
        memset(operation, 0, sizeof(Operation))
        operation.owner = <PyObject *>self
        operation.kind = kind
        operation.fd = self.fd

    def invoke(self, callback, *arguments):
        self.loop.invoke(callback, arguments)

    # ---- what a protocol calls ------------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        return self.loop.engine.socket(self.fd) if name == "simulated_socket" and not self.gone else default

    def is_closing(self):
        return self.closing or self.lost

    def write(self, data):
        if self.closing or self.lost or self.eof_wanted:
            return
        self.queue.append(bytes(data))
        self.queued += len(data)
        if self.queued > HIGH_WATER and not self.writing_paused:
            self.writing_paused = True
            self.invoke(self.protocol.pause_writing)
        self.mark()

    def write_eof(self):
        if not self.closing and not self.lost:
            self.eof_wanted = True
            self.mark()

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False
        self.loop.call_soon(self.deliver_held)

    def close(self):
        if self.closing or self.lost:
            return
        self.closing = True
        if self.loop.bug == CLOSE_BEFORE_FLUSH:
            self.drop_writes()
        self.held.clear()
        if self.receive.state != IDLE:
            self.loop.engine.cancel(&self.receive)
        self.mark()

    def abort(self):
        self.lose(None)

    # ---- receiving ------------------------------------------------------------------------------------------

    cdef int complete(self, Completion *completion) except -1:
        if completion.operation.kind == RECEIVE:
            self.received(completion)
        else:
            self.sent(completion)
        if self.lost:
            self.finish()
        return 0

    cdef int received(self, Completion *completion) except -1:
        cdef int32_t result = completion.result
        cdef bint more = completion.flags & MORE
        if result > 0:
            self.took(completion)
        elif result == 0:
            self.got_eof()
        elif result != -ECANCELED:
            if self.loop.bug == RESET_TAKEN_AS_END:
                return self.got_eof()
            self.lose(OSError(-result, os.strerror(-result)))
        if more or result == 0:
            return 0
        if not self.closing and not self.lost or self.loop.bug == REARMED_AFTER_LOSS:
            self.loop.engine.submit(&self.receive)
        return 0

    cdef int took(self, Completion *completion) except -1:
        cdef Py_ssize_t size = completion.result
        cdef Block *block = completion.block
        if self.closing or self.lost:
            if self.loop.bug != BLOCK_LEAKED_AFTER_LOSS:
                self.loop.engine.pool.drop(block)
            return 0
        if self.loop.bug == RELEASED_BEFORE_COPY:
            self.loop.engine.pool.drop(block)
            return self.keep_pointer(completion.data, size)
        # Not beyond the end of the block: the bug is to be found by its effect, not by a page fault.
        if self.loop.bug == ONE_BYTE_TOO_MANY and completion.data + size < block.memory + block.size:
            size += 1
        data = PyBytes_FromStringAndSize(completion.data, size)
        self.loop.engine.pool.drop(block)
        self.pass_on(data)
        return 0

    def pass_on(self, data):
        if self.paused or self.held:
            self.held.append(data)
        elif not self.closing and not self.lost:
            self.invoke(self.protocol.data_received, data)

    cdef int keep_pointer(self, char *data, Py_ssize_t size) except -1:
        cdef Pointer pointer = Pointer.__new__(Pointer)
        pointer.data = data
        pointer.size = size
        self.loop.call_soon(self.copy_late, pointer)
        return 0

    def copy_late(self, Pointer pointer):
        self.pass_on(PyBytes_FromStringAndSize(pointer.data, pointer.size))

    def deliver_held(self):
        while self.held and not self.paused and not self.closing and not self.lost:
            self.invoke(self.protocol.data_received, self.held.popleft())
        if self.eof_seen and not self.held and not self.paused:
            self.tell_eof()

    cdef int got_eof(self) except -1:
        self.eof_seen = True
        if not self.held and not self.paused:
            self.tell_eof()
        return 0

    cdef int tell_eof(self) except -1:
        if self.closing or self.lost:
            return 0
        self.eof_seen = False
        try:
            keep_open = self.protocol.eof_received()
        except Exception as error:
            self.loop.errors.append(error)
            keep_open = False
        if not keep_open:
            self.close()
        return 0

    # ---- sending --------------------------------------------------------------------------------------------

    cdef int mark(self) except -1:
        if not self.marked:
            self.marked = True
            self.loop.dirty.append(self)
        return 0

    cdef int flush(self) except -1:
        self.marked = False
        if self.lost:
            return 0
        if self.send.state == IDLE:
            if self.queue:
                self.sending = b"".join(self.queue)
                self.queue.clear()
                self.start_send(&self.send, self.sending, self.can_be_silent())
            else:
                self.all_sent()
        elif self.loop.bug == TWO_SENDS and self.queue and self.second_send.state == IDLE:
            self.second_sending = self.queue.popleft()
            self.start_send(&self.second_send, self.second_sending, False)
        return 0

    cdef bint can_be_silent(self) except -1:
        """Only when nobody waits for it: a silent success wakes nobody."""
        waited_for = self.closing or self.eof_wanted or self.writing_paused or self.aloud
        self.aloud = False
        return not waited_for and self.loop.random.chance(0.7)

    cdef int start_send(self, Operation *operation, bytes data, bint silent) except -1:
        operation.buffer = PyBytes_AS_STRING(data)
        operation.length = <uint32_t>len(data)
        operation.flags = SILENT if silent else ALL if self.loop.random.chance(0.5) else 0
        return self.loop.engine.submit(operation)

    cdef void sent_silently(self, Operation *operation) noexcept:
        self.queued -= operation.length
        self.sending = None
        if self.queue or self.closing or self.eof_wanted:
            self.mark()

    cdef int sent(self, Completion *completion) except -1:
        cdef int32_t result = completion.result
        cdef Operation *operation = completion.operation
        cdef bytes data = self.second_sending if operation == &self.second_send else self.sending
        if self.lost:
            return 0
        if result == -EAGAIN:
            result = 0
        if result < 0:
            if self.loop.bug == SEND_RESET_SWALLOWED:
                self.drop_writes()
            else:
                self.lose(OSError(-result, os.strerror(-result)))
            return 0
        if self.loop.bug == PARTIAL_SEND_IGNORED and result:
            result = <int32_t>len(data)
        self.queued -= result
        if result < len(data):
            self.queue.appendleft(data[result:])
            self.aloud = True
        if self.writing_paused and self.queued <= LOW_WATER:
            self.writing_paused = False
            self.invoke(self.protocol.resume_writing)
        return self.mark()

    cdef int all_sent(self) except -1:
        if self.closing:
            self.lose(None)
        elif self.eof_wanted and not self.eof_sent:
            self.eof_sent = True
            self.loop.engine.shutdown_write(self.fd)
        return 0

    cdef int drop_writes(self) except -1:
        self.queue.clear()
        self.queued = 0
        return 0

    # ---- the end --------------------------------------------------------------------------------------------

    cdef int lose(self, reason) except -1:
        if self.lost:
            return 0
        self.lost = True
        self.reason = reason
        self.drop_writes()
        self.held.clear()
        if self.loop.bug != NOT_CANCELLED_ON_LOSS:
            for operation in (0, 1, 2):
                self.cancel(&self.receive if operation == 0 else &self.send if operation == 1 else &self.second_send)
        self.loop.call_soon(self.finish)
        return 0

    cdef int cancel(self, Operation *operation) except -1:
        if operation.state == IN_FLIGHT or operation.state == PARKED or operation.state == SUSPENDED:
            self.loop.engine.cancel(operation)
        return 0

    def finish(self):
        """Once all operations have ended: the descriptor goes, and the protocol is told."""
        if self.gone:
            return
        if self.loop.bug != REARMED_AFTER_LOSS and self.receive.state != IDLE:
            return
        if self.send.state != IDLE or self.second_send.state != IDLE:
            return
        self.gone = True
        self.loop.engine.close_descriptor(self.fd)
        self.invoke(self.protocol.connection_lost, self.reason)
        self.protocol = None
