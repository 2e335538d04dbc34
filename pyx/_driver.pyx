"""Drives a completion engine from Python, without a loop: for tests of engines.

Each operation is a `Request`, an endpoint of its own. The engine's duty is to keep it alive from submit to the
terminal completion. What it does wrong on the way is raised as AssertionError at the end of the turn:

* a completion after the terminal one, or one of an operation that wasn't submitted;
* a state that doesn't fit: IDLE while a completion with MORE is delivered, anything but IDLE after the last;
* MORE where there can't be more (SEND, POLL), a result beyond what was asked for;
* bytes outside their block, a block without a reference to hand over, a block that comes without bytes;
* a reference to the owner that is missing while the operation is in flight, or left over after it.
"""
import collections
import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject

from headrace._engine cimport (
    ACCEPT, ALL, CANCELLED, ENDING, IDLE, IN_FLIGHT, MORE, PARKED, POLL, RECEIVE, SEND, SILENT, SUSPENDED,
    Completion, Endpoint, Engine, Operation,
)

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <sys/uio.h>
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *)

cdef enum:
    VECTORS = 64       # the most that an endpoint gives to one send
    KEPT = 1024        # ended requests that can still be resubmitted

KINDS = {RECEIVE: "receive", SEND: "send", ACCEPT: "accept", POLL: "poll"}
STATES = {IDLE: "idle", IN_FLIGHT: "in flight", PARKED: "parked", SUSPENDED: "suspended", ENDING: "ending"}


class Record(collections.namedtuple("Record", "token kind result more data lease")):
    """One completion.

    The request's token and kind ("receive", "send", "accept", "poll"), the result (bytes, a descriptor or
    -errno), whether more will follow, the received bytes, and the lease on them when leases are held.
    """
    __slots__ = ()

    def __repr__(self):
        return f"<{self.kind} {self.token}: {self.result}{', more' if self.more else ''}>"


cdef class Request(Endpoint):
    """One operation with what it needs, and the endpoint that owns it."""
    cdef Operation operation
    cdef msghdr message
    cdef iovec vectors[VECTORS]
    cdef list buffers                # bytes that are being sent
    cdef Driver driver
    cdef readonly int token
    cdef Py_ssize_t references       # before submit
    cdef readonly bint active

    cdef int complete(self, Completion *completion) except -1:
        return self.driver.completed(self, completion)

    cdef void sent_silently(self, Operation *operation) noexcept:
        # Within submit, flush or wait: what's wrong is raised after it.
        self.driver.silent_success(self, operation)


cdef class Driver:
    """Submits operations to an engine and collects their completions as records.

    Parameters
    ----------
    engine : Engine
        Started and stopped by the caller, who also closes it.
    again : bool
        Submit receives and accepts anew, under the same token, when they end with a success that nobody asked
        for. A multishot operation may do so at any time, and every endpoint must reckon with it.
    hold : bool
        Keep received bytes leased: each record then has its ``lease``; who holds the record holds the memory.

    ``on_completion`` may be set to a callable; it's called with each record from within the delivery, and what
    it raises leaves ``wait``, as from an endpoint. ``silent`` lists the tokens of silent sends that went out.

    Not thread-safe.
    """
    cdef readonly Engine engine
    cdef public bint hold, again
    cdef public object on_completion
    cdef readonly list silent
    cdef list records
    cdef dict requests               # token -> Request, active
    cdef object ended                # token -> Request, the latest that ended
    cdef list unchecked              # ended since the last check of references
    cdef list faults
    cdef int next_token
    cdef bint delivering
    cdef object __weakref__

    def __init__(self, Engine engine not None, *, bint hold=False, bint again=True):
        self.engine = engine
        self.again = again
        self.hold = hold
        self.on_completion = None
        self.silent = []
        self.records = []
        self.requests = {}
        self.ended = collections.OrderedDict()
        self.unchecked = []
        self.faults = []

    # ---- operations ----------------------------------------------------------------------------------------

    cdef Request new(self, int kind, int fd):
        cdef Request request = Request()
        self.next_token += 1
        request.token = self.next_token
        request.driver = self
        request.operation.owner = <PyObject *>request
        request.operation.kind = kind
        request.operation.fd = fd
        return request

    cdef int submit(self, Request request) except -1:
        cdef bint silent = request.operation.kind == SEND and request.operation.flags & SILENT
        self.requests[request.token] = request
        self.ended.pop(request.token, None)
        request.active = True
        request.references = Py_REFCNT(<PyObject *>request)
        try:
            self.engine.submit(&request.operation)
        except BaseException:
            request.active = False
            del self.requests[request.token]
            raise
        if request.active and not silent and Py_REFCNT(<PyObject *>request) != request.references + 1:
            self.fault(request, "the engine took no reference to the owner")
        if request.active and not silent and request.operation.state == IDLE:
            self.fault(request, "idle after submit")
        return request.token

    def receive(self, int fd):
        """Submits a multishot receive; returns its token."""
        return self.submit(self.new(RECEIVE, fd))

    def accept(self, int fd):
        """Submits a multishot accept; returns its token."""
        return self.submit(self.new(ACCEPT, fd))

    def poll(self, int fd):
        """Submits a one-shot poll for readability; returns its token."""
        return self.submit(self.new(POLL, fd))

    def send(self, int fd, data not None, *, bint silent=False, bint all=True):
        """Submits a send of bytes; returns its token."""
        cdef Request request = self.new(SEND, fd)
        cdef bytes owned = bytes(data)
        request.buffers = [owned]
        request.operation.buffer = owned
        request.operation.length = <unsigned>len(owned)
        request.operation.flags = (SILENT if silent else 0) | (ALL if all else 0)
        return self.submit(request)

    def send_vector(self, int fd, buffers, *, bint silent=False, bint all=True):
        """Submits a send of several pieces, at most 64, as one message; returns its token."""
        cdef Request request = self.new(SEND, fd)
        cdef bytes piece
        cdef int i
        request.buffers = [bytes(buffer) for buffer in buffers]
        if not 1 <= len(request.buffers) <= VECTORS:
            raise ValueError(f"1 to {VECTORS} buffers can be sent at once, not {len(request.buffers)}")
        for i, piece in enumerate(request.buffers):
            request.vectors[i].iov_base = <char *>piece
            request.vectors[i].iov_len = len(piece)
            request.operation.length += <unsigned>len(piece)
        request.message.msg_iov = request.vectors
        request.message.msg_iovlen = len(request.buffers)
        request.operation.message = &request.message
        request.operation.flags = (SILENT if silent else 0) | (ALL if all else 0)
        return self.submit(request)

    def resubmit(self, int token):
        """Submits an ended request once more, the same operation, under the same token."""
        if token not in self.ended:
            raise KeyError(f"request {token} is active, or is too long ago")
        return self.submit(self.ended[token])

    def cancel(self, int token):
        """Asks for the end of a request; for one that has ended, does nothing."""
        request = self.requests.get(token)
        if request is not None:
            self.engine.cancel(&(<Request>request).operation)

    def cancel_now(self, int token):
        """Ends a request; its terminal completion is queued when this returns."""
        cdef Request request = self.requests.get(token)
        if request is None:
            return
        self.engine.cancel_now(&request.operation)
        if request.operation.state != ENDING:
            self.fault(request, f"{STATES[request.operation.state]} after cancel_now")

    def abandon(self):
        """Lets go of all requests: from now on nobody but the engine keeps them alive."""
        self.requests.clear()
        self.ended.clear()
        self.unchecked.clear()

    def state(self, int token):
        """"idle", "in flight", "parked", "suspended" or "ending"."""
        request = self.requests.get(token)
        if request is None:
            return "idle"
        return STATES[(<Request>request).operation.state]

    @property
    def active(self):
        """Tokens of the requests that the engine owns, a sorted list."""
        return sorted(self.requests)

    @property
    def queued(self):
        """Completions that wait to be delivered."""
        return self.engine.last - self.engine.first

    # ---- turns ---------------------------------------------------------------------------------------------

    def enter(self, double timeout):
        """The engine's ``wait`` alone, without delivery."""
        self.engine.wait(timeout)
        self.check()

    def flush(self):
        """Starts what was submitted, without waiting; silent sends are decided when it returns."""
        self.engine.flush()
        self.check()

    def deliver(self):
        """Delivers what is queued; returns the records that nobody has taken yet."""
        self.delivering = True
        try:
            self.engine.deliver()
        finally:
            self.delivering = False
        self.check()
        records, self.records = self.records, []
        return records

    def wait(self, double timeout):
        """One turn: wait at most `timeout` seconds (< 0: no limit), deliver; returns the records."""
        self.engine.wait(timeout)
        return self.deliver()

    def collect(self, int count=1, double timeout=10.0):
        """Turns until there are `count` records, or more; TimeoutError after `timeout` seconds."""
        cdef double deadline = self.engine.now() + timeout
        records = []
        while len(records) < count:
            remaining = deadline - self.engine.now()
            if remaining <= 0:
                self.records = records + self.records
                raise TimeoutError(f"{len(records)} of {count} records within {timeout} s: {records}")
            records += self.wait(remaining)
        return records

    def end(self, int token, double timeout=10.0):
        """Turns until the request has ended; returns all records since, its terminal one among them."""
        cdef double deadline = self.engine.now() + timeout
        records = []
        while token in self.requests:
            remaining = deadline - self.engine.now()
            if remaining <= 0:
                self.records = records + self.records
                raise TimeoutError(f"request {token} is {self.state(token)} after {timeout} s: {records}")
            records += self.wait(remaining)
        return records

    def now(self):
        """The engine's clock, seconds."""
        return self.engine.now()

    # ---- descriptors, by the engine ------------------------------------------------------------------------

    def close(self, int fd):
        """Closes a descriptor that nothing is in flight on. Raises OSError."""
        answer(self.engine.close_descriptor(fd))

    def shutdown(self, int fd):
        """Ends the sending direction. Raises OSError."""
        answer(self.engine.shutdown_write(fd))

    def unsent(self, int fd):
        """Bytes that the peer hasn't acknowledged yet. Raises OSError."""
        return answer(self.engine.unsent(fd))

    # ---- what the engine says ------------------------------------------------------------------------------

    cdef int completed(self, Request request, Completion *completion) except -1:
        cdef int result = completion.result
        cdef bint more = completion.flags & MORE
        cdef object data = None
        cdef object lease = None
        problem = judge(request, completion)
        if completion.block != NULL and completion.data != NULL and result > 0:
            data = PyBytes_FromStringAndSize(completion.data, result)
            if self.hold:
                lease = self.engine.pool.lease(completion.block, completion.data, result, None)
            else:
                self.engine.pool.drop(completion.block)
        if problem is not None:
            self.fault(request, problem)
        record = Record(request.token, KINDS[request.operation.kind], result, more, data, lease)
        self.records.append(record)
        if not more:
            self.finish(request)
            if self.again and goes_on(&request.operation, result):
                self.submit(request)
        if self.on_completion is not None:
            self.on_completion(record)
        return 0

    cdef int silent_success(self, Request request, Operation *operation) noexcept:
        if operation != &request.operation or not request.active:
            self.fault(request, "a silent success of an operation that isn't active")
        elif operation.state != IDLE:
            self.fault(request, f"{STATES[operation.state]} after a silent success")
        elif not operation.flags & SILENT:
            self.fault(request, "a silent success of a send that isn't silent")
        self.silent.append(request.token)
        self.finish(request)
        return 0

    cdef int finish(self, Request request) except -1:
        request.active = False
        if self.requests.pop(request.token, None) is None:
            return 0
        self.ended[request.token] = request
        self.unchecked.append(request)
        if len(self.ended) > KEPT:
            self.ended.popitem(False)
        return 0

    cdef int fault(self, Request request, str text) except -1:
        self.faults.append(f"request {request.token} ({KINDS[request.operation.kind]}): {text}")
        return 0

    cdef int check(self) except -1:
        """Raises what the engine did wrong, at the end of a turn: no code of the engine's runs then."""
        cdef Request request
        if self.delivering:
            return 0
        while self.unchecked:
            request = self.unchecked.pop()
            # Ours now: `ended` (unless it's full) in place of `requests`, and the variable.
            left = Py_REFCNT(<PyObject *>request) - 2
            if not request.active and left > 0:
                self.fault(request, f"{left} references to the owner are left after its end")
        if self.faults:
            faults, self.faults = self.faults, []
            raise AssertionError("; ".join(faults))
        return 0


cdef bint goes_on(Operation *operation, int result) noexcept:
    """Whether a multishot operation has ended without a reason."""
    if operation.flags & CANCELLED:
        return False
    return (operation.kind == RECEIVE and result > 0) or (operation.kind == ACCEPT and result >= 0)


cdef object judge(Request request, Completion *completion):
    """What's wrong with a completion, or None."""
    cdef Operation *operation = &request.operation
    cdef bint more = completion.flags & MORE
    cdef long long offset
    if completion.operation != operation:
        return "a completion of another operation"
    if not request.active:
        return "a completion after the terminal one"
    if more and operation.state == IDLE:
        return "idle, with MORE"
    if not more and operation.state != IDLE:
        return f"{STATES[operation.state]} after the terminal completion"
    if more and operation.kind != RECEIVE and operation.kind != ACCEPT:
        return "MORE of an operation that completes once"
    if operation.kind == SEND and completion.result > <long long>operation.length:
        return f"{completion.result} bytes sent of {operation.length}"
    if more and (completion.result < 0 or (completion.result == 0 and operation.kind == RECEIVE)):
        return f"MORE with result {completion.result}"
    if operation.kind != RECEIVE or completion.result <= 0:
        return None if completion.block == NULL else "a block without bytes"
    if completion.block == NULL or completion.block.references < 1:
        return "bytes without a reference to their block"
    offset = completion.data - completion.block.memory
    if offset < 0 or offset + completion.result > completion.block.size:
        return "bytes outside their block"
    return None


cdef int answer(int result) except -1:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
